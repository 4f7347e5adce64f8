"""The rows of the identity benchmark: what is compared with what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.support.identity_ladder import WITHOUT_COLORS, rungs
from feedface_core.guidance import Guidance, joint, text_then_face

SCALE = 2.0  # of the joint guidance; ComfyUI's cfg is 3
TRAININGS = 3
PULLS = (0.02, 0.05, 0.1)  # scales of the identity guidance
GRID = (1.0, 2.0, 3.0, 5.0)
STRONG = text_then_face(3.0, 5.0)  # the joint guidance is about text 3, face 3
EQUAL = ", equal colours"
LADDER = (*rungs(), WITHOUT_COLORS)
OTHERS = {"heldout": "second", "second": "heldout", "heldout-equal": "second-equal", "second-equal": "heldout-equal"}
"""For each split of test people the one whose drawings its Fréchet distances are from."""
PAIRS = (
    ("4 references", "1 reference"),
    (f"4 references{EQUAL}", f"1 reference{EQUAL}"),
    ("4 references, averaged", "4 references"),
    *((f"4 references, identity guidance {pull:g}", "4 references") for pull in PULLS),
    *((f"4 references{equal}, face scale 5", f"4 references{equal}") for equal in ("", EQUAL)),
    *((f"4 references{e}, face scale 5, identity guidance {PULLS[-1]:g}", f"4 references{e}") for e in ("", EQUAL)),
    ("4 references, a detector's box", "4 references, the whole head"),
    ("regularised loss", "standard loss"),
    ("regularised loss", "mask loss"),
    ("retrieval", "no retrieval"),
    ("no self-attention", "full branches"),
    ("every second site", "full branches"),
    ("one a resolution", "full branches"),
    ("light", "full branches"),
    ("Face0, 4 references", "4 references"),
    ("Face0, 4 references", "Face0, 1 reference"),
    ("Face0 with a LoRA, 4 references", "Face0, 4 references"),
    ("Face0 with a LoRA, 4 references", "4 references"),
    ("Face Mixer, 4 references, no background", "4 references"),
    ("Face Mixer in the text, 4 references, no background", "Face0, 4 references"),
)
ALL_SITES = "all sites"


def without_face(guidance: Guidance) -> Guidance:
    """The same guidance where the face changes nothing, with no prediction computed twice."""
    return Guidance(guidance.dropped + guidance.face, guidance.text + guidance.both, 0.0, 0.0)


PLAIN = without_face(joint(SCALE))


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: shown.
        group: rows of one comparison.
        adapter: its variant, or None for the frozen model alone.
        references, combination, crop: how the face is given.
        guidance: how the predictions are combined.
        point: where the row lies in a plot of its group.
        people: split of the test people.
        noise: seeds the noise.
        percent: of the adapter's training.
        trainings: most trainings of the adapter, with other seeds, that the row is the mean of.
        pull: scale of the identity guidance; 0 is none.
        without: names of the sites whose branches are switched off.
        drawing: what is judged instead of the model's pictures: ``drawn`` or ``decoded`` references, ``color``, or the
            name of a rung of the ladder.
    """

    name: str
    group: str
    adapter: str | None = "full"
    references: int = 4
    combination: str = "concat"
    crop: str = "head"
    guidance: Guidance = joint(SCALE)
    point: tuple[float, ...] = ()
    people: str = "heldout"
    noise: int = 0
    percent: int = 100
    trainings: int = 1
    pull: float = 0.0
    without: tuple[str, ...] = ()
    drawing: str | None = None


def all_rows(quick: bool) -> Iterator[Row]:
    """The rows in the order of the table."""
    for split, equal in (("heldout", ""), ("heldout-equal", EQUAL)):
        yield Row(f"no face{equal}", "main", None, 0, guidance=PLAIN, people=split)
        for count in (1, 2, 4):
            name = f"{count} reference{'s' if count > 1 else ''}{equal}"
            yield Row(name, "references", references=count, point=(count,), people=split)
    for split, equal in (("heldout", ""), ("heldout-equal", EQUAL)):
        for name, drawing in (("drawings", "drawn"), ("drawings through the autoencoder", "decoded")):
            yield Row(f"{name}{equal}", "drawings", None, 0, people=split, drawing=drawing)
        yield Row(f"the face's colour alone{equal}", "drawings", None, 0, people=split, drawing="color")
    if quick:
        return
    for pull in PULLS:
        yield Row(f"4 references, identity guidance {pull:g}", "guidance", pull=pull)
    for split, equal in (("heldout", ""), ("heldout-equal", EQUAL)):
        name, how = f"4 references{equal}, face scale 5", {"people": split, "guidance": STRONG}
        yield Row(name, "guidance", **how)
        yield Row(f"{name}, identity guidance {PULLS[-1]:g}", "guidance", pull=PULLS[-1], **how)
    for rung in LADDER:
        yield Row(f"ladder: {rung}", "ladder", None, 0, drawing=rung)
    for split, equal in (("heldout", ""), ("heldout-equal", EQUAL)):
        other = split.replace("heldout", "second")
        for label, what in (("other noise", {"people": split, "noise": 1}), ("other people", {"people": other})):
            yield Row(f"no face{equal}, {label}", "again", None, 0, guidance=PLAIN, **what)
            yield Row(f"4 references{equal}, {label}", "again", **what)
    for count in (2, 4):
        name = f"{count} references, averaged"
        yield Row(name, "references", references=count, combination="average", point=(count,))
    yield Row("4 references, the whole head", "crops")
    yield Row("4 references, a detector's box", "crops", crop="detector")
    for name, adapter in (("regularised", "full"), ("standard", "standard-loss"), ("mask", "mask-loss")):
        yield Row(f"{name} loss", "losses", adapter, trainings=TRAININGS)
    yield Row("retrieval", "retrieval", trainings=TRAININGS)
    yield Row("no retrieval", "retrieval", "no-retrieval", trainings=TRAININGS)
    yield Row("full branches", "branches", trainings=TRAININGS)
    for name in ("no self-attention", "every second site", "one a resolution", "light"):
        yield Row(name, "branches", name.replace(" ", "-"), trainings=TRAININGS)
    for count in (1, 4):
        beside = f"{count} reference{'s' if count > 1 else ''}"
        yield Row(f"Face0, {beside}", "kinds", "face0", count)
        yield Row(f"Face0, {beside}{EQUAL}", "kinds", "face0", count, people="heldout-equal")
    for count in (1, 4):
        beside = f"{count} reference{'s' if count > 1 else ''}"
        yield Row(f"Face0 with a LoRA, {beside}", "kinds", "face0-lora", count)
    yield Row("Face Mixer, 4 references, no background", "kinds", "mixer")
    yield Row("Face Mixer in the text, 4 references, no background", "kinds", "mixer-text")
    for percent in (25, 50, 100):
        yield Row(f"{percent} % of the training", "training", percent=percent, point=(percent,))
    for text in GRID:
        for face in GRID:
            guidance = text_then_face(text, face)
            yield Row(f"text {text:g}, face {face:g}", "scales", guidance=guidance, point=(text, face))


def site_rows(sites: Sequence[str]) -> Iterator[Row]:
    """The full adapter, it without each of its sites, and with the last ones alone: which of them a cheaper adapter
    could leave out."""
    yield Row(ALL_SITES, "sites")
    for name in sites:
        yield Row(f"without {name.removesuffix('.transformer_blocks.0')}", "sites", without=(name,))
    for kept in range(len(sites) - 2, 0, -1):
        yield Row(f"the last {kept} alone" if kept > 1 else "the last one alone", "sites", without=tuple(sites[:-kept]))


def pairs_of(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The pairs of rows that are compared picture by picture."""
    return [*PAIRS, *((row.name, ALL_SITES) for row in rows if row.without)]
