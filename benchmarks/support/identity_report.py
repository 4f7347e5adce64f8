"""The identity benchmark as Markdown with plots, from the numbers of one run."""

from __future__ import annotations

from pathlib import Path

TITLES = {
    "main": "Without a face",
    "references": "References",
    "crops": "What is cut out",
    "losses": "Losses",
    "retrieval": "Retrieval",
    "branches": "Cheaper branches",
    "training": "Along the training",
    "scales": "Text and face scales",
}


def write_report(result: dict, folder: Path) -> Path:
    """Writes ``identity.md`` and its plots into ``folder``; returns the Markdown file."""
    folder.mkdir(parents=True, exist_ok=True)
    chance, rows = result["chance"], result["rows"]
    lines = [
        "# Identity benchmark",
        "",
        f"`python run.py bench identity` wrote this page from one run of {result['seconds']} s: the "
        f"[small model](../models/feedface_small/README.md) draws {result['identities']} people that no part of it was "
        f"trained on, {result['prompts']} prompts each, {result['steps']} sampling steps, and a recogniser that never "
        "conditions anything judges the pictures.",
        "",
        f"- **top-1**: share told to be the right one of the {result['identities']} people; chance is {chance:.3f}. Of "
        f"other pictures of them, as they were drawn, the recogniser names {result['ceiling']['drawn']:.3f}, and "
        f"{result['ceiling']['decoded']:.3f} once they went through the autoencoder: no model can be better.",
        "- **similarity**: mean-centred cosine to the pictures of the person that the recogniser knows.",
        "- **prompt**: share of the caption's attributes read back from the picture.",
        "- **background**: mean absolute difference (0…1) from the frozen model's picture, outside both heads.",
        "- Brackets are 95 % bootstrap intervals over people. Unless the row says otherwise: four references, "
        "concatenated, joint guidance with scale 2 (cfg 3). Every row draws from the same noise.",
        "",
        "## What was to come out",
        "",
        *verdicts(result),
    ]
    for group in dict.fromkeys(row["group"] for row in rows):
        part = [row for row in rows if row["group"] == group]
        lines += ["", f"## {TITLES.get(group, group)}", ""]
        if group == "scales":
            lines += [f"![Top-1 and prompt accuracy over text and face scale]({plot_scales(part, folder)})", ""]
        elif group in ("references", "training") and all(row["point"] for row in part):
            lines += [f"![Top-1 and similarity]({plot_line(part, group, folder)})", ""]
        lines += markdown_table(part)
    if result["differences"]:
        lines += ["", "## Differences, picture by picture", "", *markdown_table(result["differences"], "{:+.3f}")]
    if result["absent"]:
        lines += ["", f"Not measured in this run, for want of a trained adapter: {', '.join(result['absent'])}."]
    path = folder / "identity.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def markdown_table(rows: list[dict], number: str = "{:.3f}") -> list[str]:
    """A table of rows, figures in the format ``number``; with the cost where it differs."""
    costs = len({row.get("gflop") for row in rows}) > 1 and all("gflop" in row for row in rows)
    head = ["", "top-1", "similarity", "prompt", "background", *(["parameters", "GFLOP a step"] if costs else [])]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for row in rows:
        cells = [row["name"]]
        for measure in ("top1", "similarity", "prompt", "background"):
            mean, low, high = (number.format(value) for value in (row[measure], *row[f"{measure}_ci"]))
            cells.append(f"{mean} [{low}, {high}]")
        cells += [f"{row['parameters'] / 1e6:.2f} M", f"{row['gflop']:.3f}"] if costs else []
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def verdicts(result: dict) -> list[str]:
    """What the method should show, each with yes or no and the numbers; only what this run measured."""
    rows = {row["name"]: row for row in result["rows"]}
    said = []

    def say(holds: bool, text: str) -> None:
        said.append(f"- {'yes' if holds else '**no**'}: {text}")

    best, plain, one = rows.get("4 references"), rows.get("no face"), rows.get("1 reference")
    if best and plain:
        chance = result["chance"]
        say(best["top1"] >= 20 * chance, f"20 × chance: {best['top1']:.3f}, which is {best['top1'] / chance:.0f} ×")
        times = f", so {best['top1'] / plain['top1']:.0f} ×" if plain["top1"] else ""
        say(best["top1"] >= 5 * plain["top1"], f"5 × the model without a face, which has {plain['top1']:.3f}{times}")
        lost = plain["prompt"] - best["prompt"]
        say(lost <= 0.10, f"prompt accuracy within 10 points: {plain['prompt']:.3f} → {best['prompt']:.3f}")
    if best and one:
        better = best["top1"] > one["top1"]
        near = f"similarity {best['similarity']:.3f} against {one['similarity']:.3f}"
        say(better, f"4 references better than 1: {best['top1']:.3f} against {one['top1']:.3f}, {near}")
    losses = {name: rows.get(f"{name} loss") for name in ("regularised", "standard", "mask")}
    if all(losses.values()):
        drift = {name: row["background"] for name, row in losses.items()}
        least = min(drift, key=drift.get) == "regularised"
        named = ", ".join(f"{name} {value:.4f}" for name, value in drift.items())
        told = ", ".join(f"{name} {row['top1']:.3f}" for name, row in losses.items())
        say(least, f"the regularised loss keeps the background best: drift {named}; top-1 {told}")
    return said + findings(result)


def findings(result: dict) -> list[str]:
    """What the comparisons found that have no expected outcome; only what this run measured."""
    found, named = [], {row["name"]: row for row in result["rows"]}
    apart = {row["name"]: row for row in result["differences"]}
    own = apart.get("retrieval − no retrieval")
    if own:
        low, high = own["top1_ci"]
        found.append(
            "- retrieval (the reference is another photo of the person) instead of the target's own face: top-1 "
            f"{own['top1']:+.3f} [{low:+.3f}, {high:+.3f}], prompt {own['prompt']:+.3f}, background "
            f"{own['background']:+.4f}"
        )
    full = named.get("full branches")
    cheaper = [row for row in result["rows"] if f"{row['name']} − full branches" in apart]
    if full and cheaper:
        # as good: the interval of the paired difference does not lie below zero
        equal = [row for row in cheaper if apart[f"{row['name']} − full branches"]["top1_ci"][1] >= 0]
        cheapest = min([full, *equal], key=lambda row: row["gflop"])
        share = cheapest["gflop"] / full["gflop"]
        what = (
            "none is cheaper than full branches"
            if cheapest is full
            else (
                f"{cheapest['name']}, {share:.0%} of the operations and "
                f"{cheapest['parameters'] / full['parameters']:.0%} of the parameters, top-1 {cheapest['top1']:.3f} "
                f"against {full['top1']:.3f}"
            )
        )
        found.append(f"- the cheapest branch that is not worse than full branches, picture by picture: {what}")
    return found


def plot_line(rows: list[dict], group: str, folder: Path) -> str:
    """Top-1 and similarity over the rows' point, with intervals; a line for each combination."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    kinds = {
        "concatenated": [r for r in rows if "averaged" not in r["name"]],
        "averaged": [r for r in rows if "averaged" in r["name"]],
    }
    for axis, measure in zip(axes, ("top1", "similarity"), strict=True):
        for label, part in kinds.items():
            if part:
                x = [row["point"][0] for row in part]
                y = [row[measure] for row in part]
                spread = [
                    [v - row[f"{measure}_ci"][0] for v, row in zip(y, part, strict=True)],
                    [row[f"{measure}_ci"][1] - v for v, row in zip(y, part, strict=True)],
                ]
                axis.errorbar(x, y, spread, marker="o", capsize=3, label=label)
        axis.set_title({"top1": "top-1", "similarity": "similarity"}[measure])
        axis.set_xlabel({"references": "references", "training": "per cent of the training"}[group])
        axis.set_xticks(sorted({row["point"][0] for row in rows}))
        axis.set_ylim(bottom=0)
        if kinds["averaged"]:
            axis.legend()
    name = f"identity_{group}.png"
    figure.savefig(folder / name, dpi=110)
    pyplot.close(figure)
    return name


def plot_scales(rows: list[dict], folder: Path) -> str:
    """Two maps over text scale and face scale: top-1 and prompt accuracy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    texts = sorted({row["point"][0] for row in rows})
    faces = sorted({row["point"][1] for row in rows})
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    for axis, measure in zip(axes, ("top1", "prompt"), strict=True):
        found = {tuple(row["point"]): row[measure] for row in rows}
        grid = [[found[(text, face)] for face in faces] for text in texts]
        image = axis.imshow(grid, origin="lower", vmin=0, vmax=1, cmap="viridis")
        for i, line in enumerate(grid):
            for j, value in enumerate(line):
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
        axis.set_xticks(range(len(faces)), [f"{v:g}" for v in faces])
        axis.set_yticks(range(len(texts)), [f"{v:g}" for v in texts])
        axis.set_xlabel("face scale")
        axis.set_ylabel("text scale")
        axis.set_title({"top1": "top-1", "prompt": "prompt accuracy"}[measure])
        figure.colorbar(image, ax=axis)
    figure.savefig(folder / "identity_scales.png", dpi=110)
    pyplot.close(figure)
    return "identity_scales.png"
