"""The guider with separate scales for text and face."""

from __future__ import annotations

import comfy.samplers
import node_helpers
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..feedface_core import guidance
from ..feedface_core.errors import FeedFaceError
from .checks import checked
from .model_patch import CONTROLS, USE_BACKGROUND, USE_FACE
from .types import make_schema
from .unidiffuser.model import UNCONDITIONAL_KEY

#: What the node calls the forms of :mod:`feedface_core.guidance`.
FORMS = {
    "text, then face": "text_then_face",
    "face, then text": "face_then_text",
    "three weights": "three_weights",
    "joint": "joint",
    "text, face, background": "text_face_background",
}

#: The guider's names of the predictions. ComfyUI itself looks for "positive" and "negative".
CONDITIONINGS = {
    "both": "positive",
    "dropped": "negative",
    "text": "positive_without_face",
    "face": "negative_with_face",
    "no_background": "positive_without_background",
}

#: What belongs to the text of a conditioning, beside its states.
TEXT_VALUES = ("pooled_output", UNCONDITIONAL_KEY)


class FeedFaceGuider(comfy.samplers.CFGGuider):
    """Combines the predictions ε(∅,∅), ε(t,∅), ε(∅,f) and ε(t,f), this with and without the background; see
    :mod:`feedface_core.guidance`."""

    weights: guidance.Guidance

    def set_conds(self, positive, negative) -> None:
        without = node_helpers.conditioning_set_values(positive, {USE_FACE: False})
        alone = node_helpers.conditioning_set_values(positive, {USE_BACKGROUND: False})
        with_face = with_faces_of(negative, positive)
        conds = dict(zip(CONDITIONINGS.values(), (positive, negative, without, with_face, alone), strict=True))
        self.inner_set_conds(conds)

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options=None, seed=None) -> Tensor:
        """``(B, C, H, W)`` noisy latents → the guided denoised ones, as ComfyUI's own ``sampling_function`` does it for
        two predictions: functions that other nodes put before, in place of and behind the guidance run in their turn.
        """
        options, weights = model_options or {}, self.weights
        needed = set(weights.needed)
        if options.get("disable_cfg1_optimization", False):
            needed |= {"dropped", "both"}
        # Functions of other nodes expect the prompt first and the negative second; further ones are left alone.
        names = [name for name in CONDITIONINGS if name in needed or name in ("both", "dropped")]
        conds = [self.conds[CONDITIONINGS[name]] if name in needed else None for name in names]
        common = {"input": x, "sigma": timestep, "timestep": timestep, "model": self.inner_model}
        common |= {"model_options": options, "cond_scale": weights.scale}
        if "sampler_calc_cond_batch_function" in options:
            out = options["sampler_calc_cond_batch_function"]({**common, "conds": conds})
        else:
            out = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, options)
        for function in options.get("sampler_pre_cfg_function", []):
            changed = function({**common, "conds": conds, "conds_out": out})
            out = [*changed, *out[len(changed) :]]
        predictions = dict(zip(names, out, strict=True))
        denoised, dropped = weights.combine(predictions), predictions["dropped"]
        if "sampler_cfg_function" in options:
            cond = weights.conditional(predictions)
            noise = {"cond": x - cond, "uncond": x - dropped, "input_cond": conds[0], "input_uncond": conds[1]}
            clean = {"cond_denoised": cond, "uncond_denoised": dropped}
            denoised = x - options["sampler_cfg_function"]({**common, **noise, **clean})
        both = predictions["both"] if "both" in needed else weights.conditional(predictions)
        clean = {"cond": conds[0], "uncond": conds[1], "cond_denoised": both, "uncond_denoised": dropped}
        for function in options.get("sampler_post_cfg_function", []):
            denoised = function({**common, **clean, "denoised": denoised})
        return denoised


def with_faces_of(negative, positive):
    """The negative text in every region of the positive prompt, with the positive prompt's faces.

    This is ε(∅,f): areas, masks, hooks and faces stay, only the text is dropped.
    """
    text, values = negative[0][0], negative[0][1]
    out = []
    for entry in positive:
        own = {key: value for key, value in entry[1].items() if key not in TEXT_VALUES}
        own |= {key: values[key] for key in TEXT_VALUES if key in values}
        out.append([text, {**own, USE_FACE: own.get(USE_FACE, True), CONTROLS: own.get(CONTROLS, {})}])
    return out


def make_guider(
    model: ModelPatcher, positive, negative, text_scale: float, face_scale: float, both_scale: float, form: str
) -> comfy.samplers.CFGGuider:
    """The guider of one form; the meaning of the scales is that of :mod:`feedface_core.guidance`."""
    if not positive or not negative:
        raise FeedFaceError("positive and negative both need at least one prompt")
    weights = guidance.by_name(FORMS[form], text_scale, face_scale, both_scale)
    if form == "joint":  # ComfyUI's own guidance, with everything that patches it
        guider = comfy.samplers.CFGGuider(model)
        guider.set_cfg(weights.scale)
    else:
        guider = FeedFaceGuider(model)
        guider.weights = weights
    guider.set_conds(positive, negative)
    return guider


class Guider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        scale = {"min": 0.0, "max": 30.0, "step": 0.1}
        return make_schema(
            "FeedFaceGuider",
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Float.Input("text_scale", default=6.0, **scale),
                io.Float.Input("face_scale", default=4.0, **scale),
                io.Combo.Input("form", options=list(FORMS), default="text, then face"),
                io.Float.Input("both_scale", default=0.0, optional=True, **scale),
            ],
            outputs=[io.Guider.Output()],
            search_aliases=["face guidance", "face cfg", "dual cfg", "text and face scale", "guider", "likeness"],
            advanced=("both_scale",),
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: ModelPatcher,
        positive,
        negative,
        text_scale: float,
        face_scale: float,
        form: str,
        both_scale: float = 0.0,
    ) -> io.NodeOutput:
        return io.NodeOutput(make_guider(model, positive, negative, text_scale, face_scale, both_scale, form))


NODES = [Guider]
