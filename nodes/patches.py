"""How an adapter enters a MODEL: immutable objects on ComfyUI's public hooks.

* ``extra_conds`` of the model is called once for each conditioning at the start of sampling. There every conditioning
  gets a :class:`FaceCondition` that says which face it carries, or none.
* ComfyUI joins those of one batch as it joins prompts, so the face stays with its prompt under every guider, area,
  mask, hook and split of the batch.
* An ``APPLY_MODEL`` wrapper hands the joined list to the blocks, where :func:`feedface_core.rows.add_control` reads it.

Nothing here is changed after it was made: models cloned from one another share these objects.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from weakref import WeakValueDictionary

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor
from torch.nn import functional

from ..feedface_core.hosts import Site, match_sites
from ..feedface_core.rows import Face, FaceContext, FaceRows, add_control
from .adapter import LoadedAdapter

#: Key of a conditioning's dict under which :class:`FaceSettings` travel.
SETTINGS = "feedface"
#: Key of a conditioning's dict: True gives it the model's face although it is negative, False takes it away.
USE_FACE = "feedface_use_face"


@dataclass(frozen=True, eq=False)
class FaceSettings:
    """A face and how it acts: what ApplyFeedFace gives to a model, or SetFace to one conditioning.

    Args:
        face: None for no face.
        strength: factor on what the branches add.
        mask: ``(1 or batch, H, W)``, values 0…1, in any resolution of the picture's shape.
    """

    face: Face | None = None
    strength: float = 1.0
    mask: Tensor | None = None

    @property
    def active(self) -> bool:
        return (self.face is not None and not self.face.empty and self.strength != 0.0
                and (self.mask is None or bool(self.mask.any())))


class FaceCondition:
    """One conditioning's share of a batch, by the protocol of ``comfy.conds``."""

    def __init__(self, rows: Sequence[FaceRows]):
        self.rows = tuple(rows)

    def process_cond(self, batch_size: int, area: Sequence[int] | None = None, **_) -> FaceCondition:
        """The description for ``batch_size`` pictures; a mask follows the conditioning's area (h, w, y, x)."""
        return FaceCondition([replace(entry, count=batch_size, mask=_crop(entry.mask, area), _grids={})
                              for entry in self.rows])

    def can_concat(self, other) -> bool:
        return isinstance(other, FaceCondition)

    def concat(self, others: Sequence[FaceCondition]) -> list[FaceRows]:
        return [entry for condition in (self, *others) for entry in condition.rows]

    def size(self) -> list[int]:
        return [1]


def _crop(mask: Tensor | None, area: Sequence[int] | None) -> Tensor | None:
    if mask is None or area is None:
        return mask
    height, width, top, left = area
    return mask[:, top:top + height, left:left + width]


class Shared:
    """A deep copy of an immutable object is the object itself: ComfyUI copies a model's options deeply."""

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self


class FacePatch(Shared):
    """One application of an adapter to a model.

    Args:
        adapter: the loaded adapter.
        patcher: its weights in the type of the model.
        settings: face for every conditioning that is not negative and has none of its own.
        start, end: share of the sampling run, 0…1, between which the branches act.
    """

    def __init__(self, adapter: LoadedAdapter, patcher: ModelPatcher, settings: FaceSettings, start: float, end: float):
        self.adapter = adapter
        self.patcher = patcher
        self.settings = settings
        self.start = start
        self.end = end
        self.key = f"feedface_{uuid.uuid4().hex}"
        # Keys and values of the faces in use. An entry lives as long as the conditionings of a run hold it.
        self._contexts: WeakValueDictionary[int, FaceContext] = WeakValueDictionary()

    def apply_to(self, model: ModelPatcher) -> ModelPatcher:
        """A clone of the model with this patch; the model given stays as it is.

        Raises:
            ValueError: the adapter was made for another model.
        """
        patched = model.clone()
        sites = match_sites(self.adapter.config, model.get_model_object("diffusion_model"), self.adapter.name)
        for index, site in enumerate(sites):
            path = block_path(site)
            patched.add_object_patch(path, BlockWithBranch(self.key, index, model.get_model_object(path)))
        patched.add_object_patch("extra_conds", ConditionFaces(self, model.get_model_object("extra_conds")))
        patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, self.key, RowsIntoOptions(self))
        patched.set_additional_models(self.key, [self.patcher])
        return patched

    def context(self, face: Face) -> FaceContext:
        """Keys and values of a face, shared by all conditionings of a run."""
        context = self._contexts.get(id(face))
        if context is None:
            context = FaceContext.of(self.patcher.model, face)
            context.face = face  # keeps the id from being given to another face while this entry lives
            self._contexts[id(face)] = context
        return context

    def rows(self, settings: FaceSettings, noise: Tensor) -> FaceRows:
        """The description of one picture of a conditioning with these settings."""
        if not settings.active:
            if self.adapter.config.null == "off" or not self.settings.active:
                return FaceRows(1)
            return FaceRows(1, self.null_context(noise), self.settings.strength)
        self.adapter.check_face(settings.face)
        mask = None if settings.mask is None else latent_mask(settings.mask, noise)
        return FaceRows(1, self.context(settings.face), settings.strength, mask)

    def null_context(self, noise: Tensor) -> FaceContext:
        """What "no face" means to an adapter that was trained with a null instead of a switched-off branch."""
        context = self._contexts.get(-1)
        if context is None:
            dtype = self.adapter.dtype_of(self.patcher)
            context = self._contexts[-1] = FaceContext.null(self.patcher.model, noise.device, dtype)
        return context


def block_path(site: Site) -> str:
    return f"diffusion_model.{site.path}.forward"


class ConditionFaces(Shared):
    """``extra_conds`` of a model, which also says which face the conditioning carries."""

    def __init__(self, patch: FacePatch, previous: Callable[..., dict]):
        self.patch = patch
        self.previous = previous

    def __call__(self, **kwargs) -> dict:
        out = self.previous(**kwargs)
        settings = self.settings_for(kwargs)
        # Every conditioning gets an entry: ComfyUI batches only those with the same keys.
        out[self.patch.key] = FaceCondition([self.patch.rows(settings, kwargs["noise"])])
        return out

    def settings_for(self, conditioning: dict) -> FaceSettings:
        """The conditioning's own settings, else the model's face unless the conditioning is a negative one."""
        use = conditioning.get(USE_FACE)
        if use is False:
            return FaceSettings()
        own = conditioning.get(SETTINGS, {})
        for key in (self.patch.adapter.key, None):  # set for this adapter, or for any
            if key in own:
                return own[key]
        negative = "negative" in conditioning.get("prompt_type", "")
        return FaceSettings() if negative and not use else self.patch.settings


class RowsIntoOptions(Shared):
    """Moves the batch's faces from the model's arguments to where its blocks see them."""

    def __init__(self, patch: FacePatch):
        self.patch = patch

    def __call__(self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None,
                 **kwargs):
        rows = kwargs.pop(self.patch.key, None)
        options = dict(transformer_options or {})
        if rows and self.in_range(executor.class_obj, t):
            options[self.patch.key] = rows
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def in_range(self, model, sigma: Tensor) -> bool:
        if self.patch.start <= 0.0 and self.patch.end >= 1.0:
            return True  # without reading the sigma back from the device
        sampling = model.model_sampling
        first, last = sampling.percent_to_sigma(self.patch.start), sampling.percent_to_sigma(self.patch.end)
        return float(last) <= float(sigma.flatten()[0]) <= float(first)


class BlockWithBranch(Shared):
    """``forward`` of a frozen transformer block with a control branch beside it."""

    def __init__(self, key: str, index: int, previous: Callable[..., Tensor]):
        self.key = key
        self.index = index
        self.previous = previous

    def __call__(self, x: Tensor, *args, **kwargs) -> Tensor:
        out = self.previous(x, *args, **kwargs)
        options = kwargs.get("transformer_options") or {}
        rows = options.get(self.key)
        return out if rows is None else add_control(self.index, x, out, rows, token_grid(options))


def token_grid(options: dict) -> tuple[int, int]:
    """(h, w) of the image tokens at the block being run: the U-ViT says it, ComfyUI's spatial transformers do too."""
    grid = options.get("picture_grid") or options["activations_shape"][-2:]
    return int(grid[0]), int(grid[1])


def latent_mask(mask: Tensor, noise: Tensor) -> Tensor:
    """A mask in any resolution of the picture's shape → ``(1 or batch, h, w)`` in latent pixels.

    Raises:
        ValueError: the shape or the number of masks does not fit the latent.
    """
    height, width = noise.shape[-2:]
    count, mask_height, mask_width = mask.shape
    # One latent pixel of rounding on either side is no reason to refuse.
    if abs(mask_width * height - mask_height * width) > max(mask_width, mask_height, width, height):
        raise ValueError(
            f"FeedFace: the face mask is {mask_width} × {mask_height} pixels, but the picture being made has the shape "
            f"{width} × {height} (latent; {width * 8} × {height * 8} pixels). Make the mask at the picture's size."
        )
    if count not in (1, noise.shape[0]):
        raise ValueError(f"FeedFace: {count} face masks for a batch of {noise.shape[0]} pictures; give one mask, or "
                         "one for each picture.")
    return functional.interpolate(mask.unsqueeze(1).float(), size=(height, width), mode="area").squeeze(1)


def model_dtype(model: ModelPatcher) -> torch.dtype:
    """The type the model computes in: that of its weights, unless ComfyUI casts them."""
    dtype = model.get_model_object("manual_cast_dtype") or model.model_dtype()
    return torch.bfloat16 if dtype.itemsize < 2 else dtype  # branches are not quantised
