"""As many photo loaders as a person has photos, where they all feed one FeedFace Encode Faces."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from feedface_core.errors import FeedFaceError
from tools.queue.workflow import Target, is_link, numbered, title_of
from tools.workflow_format import Prompt, inputs_of

ENCODER = "FeedFaceEncodeFaces"


def fit_photos(
    workflow: Prompt, loaders: tuple[Target, ...], count: int, object_info: dict[str, Any]
) -> tuple[Prompt, tuple[Target, ...]]:
    """The workflow with a loader for each of ``count`` photos, and these loaders.

    Each loader with what lies between it and the encoder is one branch. Branches without a photo are removed, further
    ones are copies of the last. Photos beyond what the encoder takes are left out, as the published method does.

    Raises:
        FeedFaceError: the number does not fit and the graph has no such branches.
    """
    if count == len(loaders):
        return workflow, loaders
    branches = [branch_of(workflow, loader.node) for loader in loaders]
    encoders = {branch[-1][0] for branch in branches if branch}
    if len(encoders) != 1 or None in branches:
        if count > len(loaders):
            return workflow, loaders
        raise FeedFaceError(
            f"{count} photos, and the workflow takes {len(loaders)}: add photos, or use a workflow that loads fewer"
        )
    encoder = encoders.pop()
    inputs = sorted(
        (entry[0] for entry in inputs_of(object_info[ENCODER]) if entry[0].startswith("crops")), key=numbered
    )
    count = min(count, len(inputs))
    if str(workflow[encoder]["inputs"].get("weights", "")).strip() and count != len(loaders):
        raise FeedFaceError(
            f"{count} photos, and {title_of(workflow, encoder)!r} has weights for {len(loaders)}: empty its weights, "
            "or give as many photos"
        )
    prompt = deepcopy(workflow)
    kept = [branch for branch, _ in zip(branches, range(count), strict=False)]
    for branch in branches[count:]:
        remove_branch(prompt, branch)
    new = list(loaders[:count])
    while len(kept) < count:
        kept.append(copy_branch(prompt, kept[-1], len(kept) + 1))
        new.append(Target(kept[-1][0][0], loaders[0].input))
    links = [[branch[-2][0], workflow[encoder]["inputs"][branch[-1][1]][1]] for branch in kept]
    for name in inputs:
        prompt[encoder]["inputs"].pop(name, None)
    prompt[encoder]["inputs"] |= dict(zip(inputs, links, strict=False))
    return prompt, tuple(new)


Branch = list[tuple[str, str]]  # (node, its input that the one before feeds), loader first, encoder last


def branch_of(prompt: Prompt, loader: str) -> Branch | None:
    """The way from a loader to the encoder; None where there is none, or several."""
    links = [
        (str(value[0]), other, name)
        for other, one in prompt.items()
        for name, value in one["inputs"].items()
        if is_link(value)
    ]
    before: dict[str, list[str]] = {}
    for source, other, _ in links:
        before.setdefault(other, []).append(source)
    leading = {node for node, one in prompt.items() if one["class_type"] == ENCODER}  # to an encoder
    waiting = list(leading)
    while waiting:
        new = set(before.get(waiting.pop(), ())) - leading
        leading |= new
        waiting += new
    after: dict[str, Branch] = {}
    for source, other, name in links:
        if other in leading:
            after.setdefault(source, []).append((other, name))
    way, passed = [(loader, "")], {loader}
    while prompt[way[-1][0]]["class_type"] != ENCODER:
        onward = after.get(way[-1][0], [])
        if len(onward) != 1 or onward[0][0] in passed:
            return None
        way.append(onward[0])
        passed.add(onward[0][0])
    return way


def remove_branch(prompt: Prompt, branch: Branch) -> None:
    """Without the nodes of a branch, and without those that only show something of them."""
    gone = {node for node, _ in branch[:-1]}
    for name in [
        name for name, value in prompt[branch[-1][0]]["inputs"].items() if is_link(value) and value[0] in gone
    ]:
        del prompt[branch[-1][0]]["inputs"][name]
    for node in gone:
        del prompt[node]
    fed = {str(value[0]) for one in prompt.values() for value in one["inputs"].values() if is_link(value)}
    for node, one in list(prompt.items()):
        if any(is_link(value) and value[0] in gone for value in one["inputs"].values()):
            if node in fed:
                raise FeedFaceError(
                    f"the node {title_of(prompt, node)!r} needs the photo that is left out: add photos, "
                    "or use a workflow that loads fewer"
                )
            del prompt[node]


def copy_branch(prompt: Prompt, branch: Branch, number: int) -> Branch:
    """A copy of a branch's nodes, linked like it."""
    names = {node: f"{node}_photo{number}" for node, _ in branch[:-1]}
    for node, name in names.items():
        prompt[name] = deepcopy(prompt[node])
        for key, value in prompt[name]["inputs"].items():
            if is_link(value) and str(value[0]) in names:
                prompt[name]["inputs"][key] = [names[str(value[0])], value[1]]
    return [*((names[node], key) for node, key in branch[:-1]), branch[-1]]
