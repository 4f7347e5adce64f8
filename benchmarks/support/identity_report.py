"""The identity benchmark as Markdown with plots, from the numbers of one run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.support.identity_findings import findings, interval, verdicts

MEASURES = ("top1", "similarity", "prompt", "background")
TITLES = {
    "main": "Without a face",
    "references": "References",
    "drawings": "Drawings instead of the model's pictures",
    "ladder": "What the examiner goes by: strangers given one feature of the person after the other",
    "again": "Other noise, other people",
    "kinds": "Other kinds of adapters",
    "guidance": "Identity guidance",
    "crops": "What is cut out",
    "losses": "Losses",
    "retrieval": "Retrieval",
    "branches": "Cheaper branches",
    "sites": "Without one of the blocks",
    "training": "Along the training",
    "scales": "Text and face scales",
}
TEXT = """# Identity benchmark

`python run.py bench identity` wrote this page from one run of {seconds} s: the \
[small model](../models/feedface_small/README.md) draws {identities} people that no part of it was trained on, \
{prompts} prompts each, {steps} sampling steps, and a recogniser that never conditions anything judges the pictures.

- **top-1**: share told to be the right one of the {identities} people; chance is {chance:.3f}. Of other pictures of \
them, as they were drawn, the recogniser names {ceiling[drawn]:.3f}, and {ceiling[decoded]:.3f} once they went through \
the autoencoder: no model can be better.
- **similarity**: mean-centred cosine to the pictures of the person that the recogniser knows.
- **prompt**: share of the caption's attributes read back from the picture.
- **background**: mean absolute difference (0…1) from the frozen model's picture, outside both heads.
- **equal colours**: the people redrawn with one skin and one hair colour, the examiner's gallery too: shape alone.
- **ceiling**: top-1 of the same people's own drawings through the autoencoder.
- **eyes**: share of the pictures without glasses with exactly two similar, level eyes.
- **Fréchet**: distance in the examiner's features from as many drawings of other people.
- **copied**: where prompt and first reference differ in expression, glasses or headwear: share as in the reference.
- Brackets are 95 % bootstrap intervals over people. Unless the row says otherwise: four references, concatenated, \
joint guidance with scale 2 (cfg 3). Every row draws from the same noise.

## What was to come out
"""


DRAWN = """## What drawn people show, and what only real weights could

- They show that the method works as built: one file, the nodes and the guidance carry a person whom no part was \
trained on from references into pictures of other scenes, and the prompt goes on being followed. They compare losses, \
references, branches and scales under equal noise, in minutes, on a CPU.
- They do not show how alike a photograph becomes. A drawn person is told by a dozen features, and mostly by two \
colours: read top-1 beside the rows of equal colours, the ladder and the face's colour alone.
- A drawing's features are each one of a few dozen shapes. Age, expression lines, light and pose of photographs have \
no counterpart here, nor has a detector that misses or an encoder that saw the person in its own training.
- The model is small and trained for hours, so what it cannot draw at all (eyes, the words of the prompt: see the \
tables) bounds what the adapter can add. Order and sign of a difference may carry over to Stable Diffusion; its size \
need not.
- Likeness of photographs needs an adapter trained on photographs for Stable Diffusion and a recogniser that it was \
not trained with, on people who are in neither training set. This page says nothing of that."""
REGIONS = """*FeedFace Regions* with a column for each person, in one pass. *full* is the adapter of the other rows, \
trained on pictures of one person; *several* went on from it on pictures of two. The picture is as many squares wide \
as there are people. A column is judged as a picture of one person is; alone: as wide, without the others' faces; \
confused: taken for one of the others. Hoped for: 0.9 of the rate of one person (*full*), and 5 % confused."""
CHAIN = """Balanced accuracy for the held-out people. Encoder and projection: a linear probe on the tokens of one \
reference. Picture: what the examiner reads from the pictures with one reference; ceiling: from drawings through the \
autoencoder."""


def write_report(result: dict, folder: Path) -> Path:
    """Writes ``identity.md`` and its plots into ``folder``; returns the Markdown file."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, lines = result["rows"], [TEXT.format(**result), *verdicts(result), *findings(result)]
    lines += ["", "## The pictures", "", *quality_table(rows), "", "## Each attribute of the prompt", ""]
    lines += ["Balanced accuracy: chance is 1 / values.", "", *attribute_table(rows)]
    if result["chain"]:
        lines += ["", "## Where features are lost", "", CHAIN, "", *chain_table(result["chain"])]
    for group in dict.fromkeys(row["group"] for row in rows):
        members = [row for row in rows if row["group"] == group]
        lines += ["", f"## {TITLES.get(group, group)}", ""]
        if group == "scales":
            lines += [f"![Top-1 and prompt accuracy over text and face scale]({plot_scales(members, folder)})", ""]
        elif group in ("references", "training"):
            lines += [f"![Top-1 and similarity]({plot_line(members, group, folder)})", ""]
        lines += markdown_table(members)
    if result.get("regions"):
        lines += ["", "## Several people in one picture", "", REGIONS, "", *regions_table(result["regions"])]
    if result["differences"]:
        lines += ["", "## Differences, picture by picture", "", *markdown_table(result["differences"], "{:+.3f}")]
    if result["absent"]:
        lines += ["", f"Not measured in this run, for want of a trained adapter: {', '.join(result['absent'])}."]
    lines += ["", DRAWN]
    path = folder / "identity.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A Markdown table; figures with three digits, None as a dash."""
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for row in rows:
        cells = ("–" if cell is None else f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def quality_table(rows: Sequence[dict]) -> list[str]:
    """What is measured of all pictures of a row together; a line for each row of the main comparisons."""
    shown = [row for row in rows if row["group"] in ("main", "references", "drawings", "again")]
    head = ["", "top-1", "ceiling", "top-1 of the ceiling", "eyes", "Fréchet", "copied"]
    lines = [
        [row["name"], row["top1"], row["ceiling"], row["top1"] / row["ceiling"] if row["ceiling"] else None]
        + [interval(row, "eyes"), row["frechet"], row["copied"]]
        for row in shown
    ]
    return table(head, lines)


def attribute_table(rows: Sequence[dict]) -> list[str]:
    """Balanced accuracy of each attribute; a line for each row of the main comparisons."""
    shown = [row for row in rows if row["group"] in ("main", "references", "drawings") and row["attributes"]]
    names = list(shown[0]["attributes"]) if shown else []
    head = ["", *(name.replace("_", " ") for name in names)]
    return table(head, [[row["name"], *row["attributes"].values()] for row in shown])


def regions_table(rows: Sequence[dict]) -> list[str]:
    """A line for each number of people in a picture."""
    head = ["adapter", "people", "pictures", "top-1", "of one person's", "alone", "confused", "similarity", "prompt"]
    lines = [
        [row["adapter"], row["people"], row["pictures"], interval(row, "top1", "{:.3f}"), row["of_single"]]
        + [None if row["alone"] is None else interval(row, "alone", "{:.3f}")]
        + [interval(row, name, "{:.3f}") for name in ("confused", "similarity", "prompt")]
        for row in rows
    ]
    return table(head, lines)


def chain_table(chain: Sequence[dict]) -> list[str]:
    """A line for each feature of the person."""
    columns = ("encoder", "projection", "picture", "ceiling", "chance")
    return table(["", *columns], [[line["feature"], *(line[name] for name in columns)] for line in chain])


def text_table(rows: Sequence[dict], chance: float) -> str:
    """The result for people."""
    heads = f"{'top-1':>18}{'ceiling':>9}{'similarity':>12}{'prompt':>9}{'background':>12}{'eyes':>8}{'Fréchet':>9}"
    lines = [f"{'':46}{heads}   (chance {chance:.3f})"]
    columns = {
        "ceiling": "9.3f",
        "similarity": "12.3f",
        "prompt": "9.3f",
        "background": "12.4f",
        "eyes": "8.3f",
        "frechet": "9.2f",
    }
    for row in rows:
        cells = [f"{row['name']:46}{interval(row, 'top1', '{:.3f}', '{:.2f}'):>18}"]
        for name, form in columns.items():
            width = int(form.split(".")[0])
            cells.append(f"{'':{width}}" if row[name] is None else f"{row[name]:{form}}")
        lines.append("".join(cells))
    return "\n".join(lines)


def markdown_table(rows: Sequence[dict], number: str = "{:.3f}") -> list[str]:
    """A table of rows, figures in the format ``number``; with the cost where it differs."""
    costs = len({row.get("gflop") for row in rows}) > 1 and all("gflop" in row for row in rows)
    lines, head = [], ["", "top-1", "similarity", "prompt", "background"]
    head += ["parameters", "GFLOP a step"] if costs else []
    for row in rows:
        cells = [row["name"], *(interval(row, measure, number) for measure in MEASURES)]
        cells += [f"{row['parameters'] / 1e6:.2f} M", f"{row['gflop']:.3f}"] if costs else []
        lines.append(cells)
    return table(head, lines)


def _figure(height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, 2, figsize=(8, height), layout="constrained")


def plot_line(rows: Sequence[dict], group: str, folder: Path) -> str:
    """Top-1 and similarity over the rows' point, with intervals; a line for each combination. Returns the file's
    name."""
    figure, axes = _figure(3)
    averaged = [row for row in rows if "averaged" in row["name"]]
    equal = [row for row in rows if "equal colours" in row["name"]]
    plain = [row for row in rows if row not in averaged and row not in equal]
    lines = {"concatenated": plain, "averaged": averaged, "equal colours": equal}
    for axis, measure, title in zip(axes, ("top1", "similarity"), ("top-1", "similarity"), strict=True):
        for label, line in lines.items():
            if line:
                x, y = [row["point"][0] for row in line], [row[measure] for row in line]
                spread = [[abs(row[measure] - row[f"{measure}_ci"][end]) for row in line] for end in (0, 1)]
                axis.errorbar(x, y, spread, marker="o", capsize=3, label=label)
        axis.set(title=title, xlabel="references" if group == "references" else "per cent of the training")
        axis.set_xticks(sorted({row["point"][0] for row in rows}))
        axis.set_ylim(bottom=0)
        if averaged or equal:
            axis.legend()
    figure.savefig(folder / f"identity_{group}.png", dpi=110)
    return f"identity_{group}.png"


def plot_scales(rows: Sequence[dict], folder: Path) -> str:
    """Two maps over text scale and face scale: top-1 and prompt accuracy. Returns the file's name."""
    texts, faces = (sorted({row["point"][i] for row in rows}) for i in (0, 1))
    figure, axes = _figure(3.4)
    for axis, measure, title in zip(axes, ("top1", "prompt"), ("top-1", "prompt accuracy"), strict=True):
        found = {tuple(row["point"]): row[measure] for row in rows}
        image = axis.imshow([[found[t, f] for f in faces] for t in texts], origin="lower", vmin=0, vmax=1)
        for i, text in enumerate(texts):
            for j, face in enumerate(faces):
                value = found[text, face]
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
        axis.set_xticks(range(len(faces)), [f"{scale:g}" for scale in faces])
        axis.set_yticks(range(len(texts)), [f"{scale:g}" for scale in texts])
        axis.set(xlabel="face scale", ylabel="text scale", title=title)
        figure.colorbar(image, ax=axis)
    figure.savefig(folder / "identity_scales.png", dpi=110)
    return "identity_scales.png"
