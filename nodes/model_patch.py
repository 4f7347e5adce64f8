"""How an adapter enters a MODEL. The only code that touches ComfyUI's models, on its public hooks:

* Each site's block gets a ``forward`` (object patch) that adds the control branch.
* ``OUTER_SAMPLE`` and ``SAMPLER_SAMPLE`` wrappers give each conditioning of a run its face, and make keys and values
  when the models are loaded. So a face stays with its prompt under every guider, area, mask and hook.
* A ``CALC_COND_BATCH`` wrapper leads the faces to the blocks through ``transformer_options``, in which ComfyUI says
  whose rows a batch holds. They get there on every path to the model, also past ``apply_model``.
* For an adapter whose face stands in the text the same wrapper exchanges the text's states, and no block is patched.
* An ``APPLY_MODEL`` wrapper looks the rows up before the model runs: a compiled model would be traced anew for every
  conditioning.

Nothing here is changed after it was made but :attr:`Run.used`: models cloned from one another share these objects.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor

from ..feedface_core.conditioning import FaceControl
from ..feedface_core.errors import FeedFaceError
from ..feedface_core.hosts import match_sites
from ..feedface_core.schedule import Schedule
from ..feedface_core.text_tokens import replace_last
from .adapter import Stream
from .block_patch import BlockWithBranch, Evaluation, Run, Shared, follow_model

#: Key of a conditioning's dict: :class:`FaceControl` for each adapter's key, None for any adapter.
CONTROLS = "feedface"
#: Key of a conditioning's dict: True gives it the model's face although it is negative, False takes it away.
USE_FACE = "feedface_use_face"
#: Key of a conditioning's dict: False takes its background away, of an adapter with a second stream.
USE_BACKGROUND = "feedface_use_background"
MASKED_TEXT = (
    "this adapter puts the face into the text's tokens, which act on the whole picture, so a mask of the face does "
    "nothing. Put the mask on the prompt (Conditioning Set Mask)"
)
_NO_FACE = FaceControl()


@dataclass(frozen=True, eq=False)
class FacePatch(Shared):
    """One application of an adapter to a model.

    Args:
        loaded: the adapter's stream.
        patcher: its weights in the type of the model.
        control: for every conditioning that is not negative and has none of its own.
        key: of everything this application puts into a model: the same in every run, so that a compiled model is not
            traced anew.
    """

    loaded: Stream
    patcher: ModelPatcher
    control: FaceControl
    key: str

    @classmethod
    def apply(cls, loaded: Stream, control: FaceControl, model: ModelPatcher) -> ModelPatcher:
        """A clone of the model with a stream of an adapter and a face; the model given stays as it is.

        Raises:
            FeedFaceError: the adapter was made for another model, or there is a mask for what goes into the text.
        """
        if loaded.config.text_tokens and control.mask is not None:
            raise FeedFaceError(MASKED_TEXT)
        sites = match_sites(loaded.config, model.get_model_object("diffusion_model"), loaded.name)
        scales = site_scales(control.schedule, [site.name for site in loaded.config.sites])
        key = f"feedface_{sum(key.startswith('feedface_') for key in model.additional_models)}"
        patch, patched = cls(loaded, loaded.patcher(model_dtype(model)), control, key), model.clone()
        for index, (site, scale) in enumerate(zip(sites, scales, strict=True)):
            if scale:
                path = f"diffusion_model.{site.path}.forward"
                block = BlockWithBranch(key, index, site, model.get_model_object(path), scale)
                patched.add_object_patch(path, block.forward)
        patched.add_callback_with_key(CallbacksMP.ON_CLONE, key, follow_model)
        for hook in ("outer_sample", "sampler_sample", "calc_cond_batch", "apply_model"):
            patched.add_wrapper_with_key(getattr(WrappersMP, hook.upper()), key, getattr(patch, hook))
        patched.set_additional_models(key, [patch.patcher])
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
        sampling = guider.inner_model.model_sampling
        names = [site.name for site in self.loaded.config.sites]
        silent = bool(names) and not any(site_scales(self.control.schedule, names))
        if run.active and not run.used and not silent and any(self.factor_at(sampling, sigma) for sigma in sigmas[:-1]):
            logging.warning(
                "[FeedFace] the face of %s did not reach the picture: another node runs the model without "
                "its blocks. Remove nodes that cache or replace the model's steps.",
                self.loaded.name,
            )
        return result

    def start(self, guider, noise: Tensor) -> Run:
        """Keys and values of the faces of a guider's conditionings, left in each under the patch's key; ``noise`` has
        the latents' shape and device."""
        adapter = guider.model_patcher.get_additional_models_with_key(self.key)[0].model
        factory = {"device": noise.device, "dtype": adapter.dtype}
        made: dict[FaceControl, FaceControl] = {}  # prompts that share a face share its keys and values
        for cond in (cond for conds in guider.conds.values() for cond in conds):
            cond["model_conds"] = dict(cond["model_conds"])
            own = cond["model_conds"].pop(self.key, _NO_FACE)
            if own.active and own not in made:
                self.loaded.check_face(own.face)
                if self.loaded.config.text_tokens and own.mask is not None:
                    raise FeedFaceError(f"FeedFace: {MASKED_TEXT}")
                made[own] = adapter.control_of(own.face, **factory, strength=own.strength, **own.at_latents(noise))
            if own.active:
                cond[self.key] = made[own].cropped(cond.get("area"))
        dropped = adapter.null_control(**factory, strength=self.control.strength) if made else None
        return Run(adapter, bool(made), dropped)

    def control_for(self, kind: str, cond: Mapping[str, Any]) -> FaceControl:
        """The face of a conditioning's dict, else the model's unless ``kind``, the guider's word, is negative."""
        use = cond.get(USE_FACE)
        if use is False or (self.loaded.config.stream == "background" and cond.get(USE_BACKGROUND) is False):
            return _NO_FACE
        own = cond.get(CONTROLS, {})
        anywhere = (None,) if self.loaded.config.stream == "face" else ()  # set for any adapter
        for key in (self.loaded.key, *anywhere):
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
        factor = self.factor_at(model.model_sampling, timestep) if run.active else 0.0
        if factor and self.loaded.config.text_tokens:
            run.used = True
            conds = [own and [self.with_text_tokens(cond, run, factor) for cond in own] for own in conds]
        elif factor:
            controls = {
                (place, cond.get("uuid")): cond[self.key]
                for place, own in enumerate(conds)
                for cond in own or ()
                if self.key in cond
            }
            varies = self.control.schedule is not None and self.control.schedule.varies
            step = torch.tensor(factor, device=x_in.device) if varies else None
            seen[self.key] = Evaluation(run, controls, x_in.shape[0], factor=step)
        return executor(model, conds, x_in, timestep, {**model_options, "transformer_options": seen})

    def with_text_tokens(self, cond: dict[str, Any], run: Run, factor: float) -> dict[str, Any]:
        """A conditioning with the face in its text; one without a face gets the null tokens, where there are any."""
        control, text = cond.get(self.key, run.dropped), cond["model_conds"].get("c_crossattn")
        if control is None or text is None:
            return cond
        offset = self.loaded.config.text_tokens.offset
        states = replace_last(text.cond, control.text_tokens, control.strength * factor, offset)
        return {**cond, "model_conds": {**cond["model_conds"], "c_crossattn": text._copy_with(states)}}

    def apply_model(
        self, executor: Callable, x: Tensor, t: Tensor, c_concat=None, c_crossattn=None, control=None,
        transformer_options: dict | None = None, **kwargs,
    ) -> Tensor:  # fmt: skip
        """Wrapper of APPLY_MODEL: the rows of the batch, found before the model runs."""
        options = transformer_options or {}
        if isinstance(options.get(self.key), Evaluation):
            options = {**options, self.key: options[self.key].of_batch(options, x.shape[0])}
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def factor_at(self, sampling, sigma: Tensor) -> float:
        """What the schedule multiplies the strength with at a noise level; 0 where the branches do not act."""
        start, end, schedule = self.control.start, self.control.end, self.control.schedule
        varies = schedule is not None and schedule.varies
        constant = 1.0 if schedule is None else schedule.points[0][1]
        if start <= 0.0 and end >= 1.0 and not varies:
            return constant  # without reading the sigma back from the device
        level = float(sigma.flatten()[0])
        first, last = (float(sampling.percent_to_sigma(share)) for share in (start, end))
        if not (start < end and last <= level <= first):
            return 0.0
        return schedule.at(share_of_run(sampling, level)) if varies else constant


def site_scales(schedule: Schedule | None, names: Sequence[str]) -> list[float]:
    """The factor of each site that holds for the whole run, with that of the steps where it does not change. Raises
    :class:`FeedFaceError` for a pattern that fits no site."""
    if schedule is None:
        return [1.0] * len(names)
    schedule.check_sites(names)
    return [schedule.of_site(name) * (1.0 if schedule.varies else schedule.points[0][1]) for name in names]


def share_of_run(sampling, sigma: float) -> float:
    """The share 0…1 of a run at which a noise level comes, the inverse of ``percent_to_sigma``, to a millionth."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if float(sampling.percent_to_sigma(middle)) >= sigma else (low, middle)
    return low


def model_dtype(model: ModelPatcher) -> torch.dtype:
    """The type the model computes in: that of its weights, unless ComfyUI casts them."""
    dtype = model.get_model_object("manual_cast_dtype") or model.model_dtype()
    return torch.bfloat16 if dtype.itemsize < 2 else dtype  # branches are not quantised
