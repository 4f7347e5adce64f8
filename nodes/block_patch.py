"""A frozen block with a branch beside it, and what it finds in ``transformer_options``.

Nothing here is changed after it was made but :attr:`Run.used`: models cloned from one another share these objects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ..feedface_core.conditioning import FaceControl, Rows
from ..feedface_core.errors import FeedFaceError
from ..feedface_core.hosts.site import Site
from ..feedface_core.modules.adapter import FaceAdapter


class Shared:
    """A deep copy of an immutable object is the object itself: ComfyUI copies a model's options deeply."""

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self


@dataclass(eq=False)
class Run(Shared):
    """One sampling run: the adapter on its device, whether any conditioning carries a face, what one without a face
    gets (None where the branches are switched off), and whether a branch has run."""

    adapter: FaceAdapter
    active: bool
    dropped: FaceControl | None = None
    used: bool = False


@dataclass(frozen=True, eq=False)
class Evaluation(Shared):
    """A run at one noise level: what the blocks find in ``transformer_options``.

    Args:
        run: it belongs to.
        controls: by the place of a list of conditionings and the uuid of one in it.
        batch: rows of each conditioning.
        rows: what acts on each row of the batch at hand, once it is known.
        factor: ``()`` on the strength at this noise level; None without a schedule over the steps.
    """

    run: Run
    controls: Mapping[tuple[int, Any], FaceControl]
    batch: int
    rows: Rows | None = None
    factor: torch.Tensor | None = None

    def of_batch(self, options: Mapping[str, Any], total: int) -> Evaluation:
        """The same with its rows: the model's ``transformer_options`` say whose rows ComfyUI stacked, and tiled
        sampling repeats them to ``total``. Raises :class:`FeedFaceError` when that is no multiple."""
        stacked = zip(options.get("cond_or_uncond", ()), options.get("uuids", ()), strict=True)
        controls = [self.controls.get(key, self.run.dropped) for key in stacked]
        rows = [(self.batch, _in_window(control, options.get("context_window"), self.batch)) for control in controls]
        if not rows or total % (self.batch * len(rows)):
            raise FeedFaceError(
                f"FeedFace: the model was called with {total} rows, but ComfyUI stacked "
                f"{self.batch * len(rows)} for {len(rows)} prompts: another node changes the batch inside "
                "the model. Lower that node's batch size to 1 or remove it."
            )
        return replace(self, rows=rows * (total // (self.batch * len(rows))))


def _in_window(control: FaceControl | None, window, batch: int) -> FaceControl | None:
    """A control whose masks are those of the pictures that a context window holds."""
    if control is None or control.mask is None or len(control.mask) in (1, batch):
        return control
    if window is None:
        raise FeedFaceError(
            f"FeedFace: {len(control.mask)} face masks, but the model was called with {batch} pictures: "
            "another node splits the batch. Give one mask for all pictures, or remove that node."
        )
    return replace(control, mask=window.get_tensor(control.mask, control.mask.device, dim=0))


class BlockWithBranch(Shared):
    """``forward`` of a frozen transformer block (the ``previous`` one, its own or another patch) with the branch
    ``index`` of the adapter beside it, whose strength is multiplied with ``scale``."""

    def __init__(self, key: str, index: int, site: Site, previous: Callable[..., Any], scale: float = 1.0):
        self.key, self.index, self.site, self.previous, self.scale = key, index, site, previous, scale

    # Patches are bound methods of these objects: a compiler compares what is in them, not the objects themselves, so
    # the graph of one Apply serves the next.
    def forward(self, *args, **kwargs) -> Any:
        returned = self.previous(*args, **kwargs)
        options = kwargs.get("transformer_options") or {}
        step = options.get(self.key)
        if not isinstance(step, Evaluation):
            return returned
        if step.rows is None:
            step = step.of_batch(options, self.site.stream.result(returned).shape[0])
        step.run.used = True
        run, how = step.run, (step.rows, self.scale, step.factor)
        return self.site.add_control(run.adapter, self.index, args, kwargs, returned, *how)


def follow_model(source: ModelPatcher, clone: ModelPatcher) -> None:
    """Callback of ON_CLONE: a clone onto other weights (``model_override``) runs the blocks of those weights."""
    if clone.model is source.model:
        return
    for path, patch in clone.object_patches.items():
        if isinstance(getattr(patch, "__self__", None), BlockWithBranch):
            clone.object_patches[path] = _rebound(patch, comfy.utils.get_attr(clone.model, path.rpartition(".")[0]))


def _rebound(forward: Callable[..., Any], block: torch.nn.Module) -> Callable[..., Any]:
    """A block's forward, patched or its own, for another block of the kind."""
    owner = getattr(forward, "__self__", None)
    if isinstance(owner, BlockWithBranch):
        previous = _rebound(owner.previous, block)
        return BlockWithBranch(owner.key, owner.index, owner.site, previous, owner.scale).forward
    return forward.__func__.__get__(block) if isinstance(owner, torch.nn.Module) else forward
