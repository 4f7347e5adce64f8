"""How an adapter enters a MODEL. The only code that touches ComfyUI's models, on its public hooks:

* Each site's block gets a ``forward`` (object patch) that adds the control branch.
* ``OUTER_SAMPLE`` and ``SAMPLER_SAMPLE`` wrappers give each conditioning of a run its face, and make keys and values
  when the models are loaded. So a face stays with its prompt under every guider, area, mask and hook.
* A ``CALC_COND_BATCH`` wrapper leads the faces to the blocks through ``transformer_options``, in which ComfyUI says
  whose rows a batch holds. They get there on every path to the model, also past ``apply_model``.
* An ``APPLY_MODEL`` wrapper looks the rows up before the model runs: a compiled model would be traced anew for every
  conditioning.

Nothing here is changed after it was made: models cloned from one another share these objects.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor
from torch.nn import functional

from ..feedface_core.conditioning import FaceControl
from ..feedface_core.errors import FeedFaceError
from ..feedface_core.hosts import match_sites
from .adapter import LoadedAdapter
from .block_patch import BlockWithBranch, Evaluation, Run, Shared, follow_model

#: Key of a conditioning's dict: :class:`FaceControl` for each adapter's key, None for any adapter.
CONTROLS = "feedface"
#: Key of a conditioning's dict: True gives it the model's face although it is negative, False takes it away.
USE_FACE = "feedface_use_face"
_NO_FACE = FaceControl()


@dataclass(frozen=True, eq=False)
class FacePatch(Shared):
    """One application of an adapter to a model.

    Args:
        loaded: the adapter.
        patcher: its weights in the type of the model.
        control: for every conditioning that is not negative and has none of its own.
        number: how many applications the model has already.
    """

    loaded: LoadedAdapter
    patcher: ModelPatcher
    control: FaceControl
    number: int = 0

    @property
    def key(self) -> str:
        """Of everything this application puts into a model: the same in every run, so that a compiled model is not
        traced anew."""
        return f"feedface_{self.number}"

    @classmethod
    def apply(cls, loaded: LoadedAdapter, control: FaceControl, model: ModelPatcher) -> ModelPatcher:
        """A clone of the model with an adapter and a face; the model given stays as it is.

        Raises:
            FeedFaceError: the adapter was made for another model.
        """
        number = sum(key.startswith("feedface_") for key in model.additional_models)
        return cls(loaded, loaded.patcher(model_dtype(model)), control, number).apply_to(model)

    def apply_to(self, model: ModelPatcher) -> ModelPatcher:
        """See :meth:`apply`."""
        patched = model.clone()
        sites = match_sites(self.loaded.config, model.get_model_object("diffusion_model"), self.loaded.name)
        for index, site in enumerate(sites):
            path = f"diffusion_model.{site.path}.forward"
            patched.add_object_patch(path, BlockWithBranch(self.key, index, site, model.get_model_object(path)).forward)
        patched.add_callback_with_key(CallbacksMP.ON_CLONE, self.key, follow_model)
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, self.key, self.outer_sample)
        patched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, self.key, self.sampler_sample)
        patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, self.key, self.calc_cond_batch)
        patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, self.key, self.apply_model)
        patched.set_additional_models(self.key, [self.patcher])
        return patched

    def outer_sample(self, executor: Callable, *args, **kwargs) -> Tensor:
        """Wrapper of OUTER_SAMPLE: says of each conditioning which face it carries, before ComfyUI copies them from one
        prompt to the other for their areas. They travel where ComfyUI keeps what it computed for a text."""
        for kind, conds in executor.class_obj.conds.items():
            for cond in conds:
                control = self.control_for(cond.get("prompt_type", kind), cond)
                cond["model_conds"] = {**cond["model_conds"], self.key: control}
        return executor(*args, **kwargs)

    def sampler_sample(
        self, executor: Callable, guider, sigmas: Tensor, extra_args: dict, callback, noise: Tensor, *args, **kwargs
    ) -> Tensor:
        """Wrapper of SAMPLER_SAMPLE: the faces of a run, made when its models are loaded and its prompts are ready."""
        run = self.start(guider, noise)
        extra_args["model_options"].setdefault("transformer_options", {})[self.key] = run
        result = executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)
        if run.active and not run.used and self.acts_during(guider.inner_model.model_sampling, sigmas):
            logging.warning(
                "[FeedFace] the face of %s did not reach the picture: another node runs the model without "
                "its blocks. Remove nodes that cache or replace the model's steps.",
                self.loaded.name,
            )
        return result

    def start(self, guider, noise: Tensor) -> Run:
        """Keys and values of the faces of a guider's conditionings, left in each under the patch's key.

        Args:
            guider: whose models are loaded.
            noise: of the latents' shape, on their device.
        """
        adapter = guider.model_patcher.get_additional_models_with_key(self.key)[0].model
        factory = {"device": noise.device, "dtype": adapter.projection.weight.dtype}
        made: dict[FaceControl, FaceControl] = {}  # prompts that share a face share its keys and values
        for cond in (cond for conds in guider.conds.values() for cond in conds):
            cond["model_conds"] = dict(cond["model_conds"])
            own = cond["model_conds"].pop(self.key, _NO_FACE)
            if own.active and own not in made:
                self.loaded.check_face(own.face)
                mask = None if own.mask is None else latent_mask(own.mask, noise).to(noise.device)
                made[own] = adapter.control_of(own.face, **factory, strength=own.strength, mask=mask)
            if own.active:
                cond[self.key] = _cropped(made[own], cond.get("area"))
        dropped = adapter.null_control(**factory, strength=self.control.strength) if made else None
        return Run(adapter, bool(made), dropped)

    def control_for(self, kind: str, cond: Mapping[str, Any]) -> FaceControl:
        """The conditioning's own face, else the model's unless the conditioning is a negative one.

        Args:
            kind: what the guider calls the conditionings, such as ``positive``.
            cond: the conditioning's dict.
        """
        use = cond.get(USE_FACE)
        if use is False:
            return _NO_FACE
        own = cond.get(CONTROLS, {})
        for key in (self.loaded.key, None):  # set for this adapter, or for any
            if key in own:
                return own[key]
        return _NO_FACE if "negative" in kind and not use else self.control

    def calc_cond_batch(
        self, executor: Callable, model, conds: list, x_in: Tensor, timestep: Tensor, model_options: dict
    ) -> list[Tensor]:
        """Wrapper of CALC_COND_BATCH: within the range of the run, the blocks get to see its faces."""
        options = model_options.get("transformer_options", {})
        run = options.get(self.key)
        if run is None:
            return executor(model, conds, x_in, timestep, model_options)
        run = run.run if isinstance(run, Evaluation) else run  # a function inside an evaluation starts another
        seen = {key: value for key, value in options.items() if key != self.key}
        if run.active and self.acts_at(model.model_sampling, timestep):
            controls = {
                (place, cond.get("uuid")): cond[self.key]
                for place, own in enumerate(conds)
                for cond in own or ()
                if self.key in cond
            }
            seen[self.key] = Evaluation(run, controls, x_in.shape[0])
        return executor(model, conds, x_in, timestep, {**model_options, "transformer_options": seen})

    def apply_model(
        self,
        executor: Callable,
        x: Tensor,
        t: Tensor,
        c_concat=None,
        c_crossattn=None,
        control=None,
        transformer_options: dict | None = None,
        **kwargs,
    ) -> Tensor:
        """Wrapper of APPLY_MODEL: the rows of the batch, found before the model runs."""
        options = transformer_options or {}
        if isinstance(options.get(self.key), Evaluation):
            options = {**options, self.key: options[self.key].of_batch(options, x.shape[0])}
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def acts_at(self, sampling, sigma: Tensor) -> bool:
        """Whether the branches act at a noise level."""
        if self.control.start <= 0.0 and self.control.end >= 1.0:
            return True  # without reading the sigma back from the device
        first, last = (float(sampling.percent_to_sigma(at)) for at in (self.control.start, self.control.end))
        return self.control.start < self.control.end and last <= float(sigma.flatten()[0]) <= first

    def acts_during(self, sampling, sigmas: Tensor) -> bool:
        return any(self.acts_at(sampling, sigma) for sigma in sigmas[:-1])


def _cropped(control: FaceControl, area: Sequence[int] | None) -> FaceControl:
    """A control whose mask follows the conditioning's area (h, w, y, x) in latent pixels."""
    if control.mask is None or area is None:
        return control
    height, width, top, left = area
    return replace(control, mask=control.mask[:, top : top + height, left : left + width])


def latent_mask(mask: Tensor, noise: Tensor) -> Tensor:
    """A mask in any resolution of the picture's shape → ``(1 or batch, h, w)`` in latent pixels.

    Raises:
        FeedFaceError: the shape or the number of masks does not fit the latent.
    """
    height, width = noise.shape[-2:]
    count, mask_height, mask_width = mask.shape
    # One latent pixel of rounding on either side is no reason to refuse.
    if abs(mask_width * height - mask_height * width) > max(mask_width, mask_height, width, height):
        raise FeedFaceError(
            f"FeedFace: the face mask is {mask_width} × {mask_height} pixels, but the picture being made has the shape "
            f"{width} × {height} (latent; {width * 8} × {height * 8} pixels). Make the mask at the picture's size."
        )
    if count not in (1, noise.shape[0]):
        raise FeedFaceError(
            f"FeedFace: {count} face masks for a batch of {noise.shape[0]} pictures; give one mask, or "
            "one for each picture."
        )
    return functional.interpolate(mask.unsqueeze(1).float(), size=(height, width), mode="area").squeeze(1)


def model_dtype(model: ModelPatcher) -> torch.dtype:
    """The type the model computes in: that of its weights, unless ComfyUI casts them."""
    dtype = model.get_model_object("manual_cast_dtype") or model.model_dtype()
    return torch.bfloat16 if dtype.itemsize < 2 else dtype  # branches are not quantised
