"""The guider with separate scales for text and face."""

from __future__ import annotations

import comfy.samplers
import node_helpers
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..feedface_core import guidance
from .compat import make_schema
from .model_patch import CONTROLS, USE_FACE
from .unidiffuser.model import UNCONDITIONAL_KEY

#: What the node calls the forms of :mod:`feedface_core.guidance`.
FORMS = {
    "text, then face": "text_then_face",
    "face, then text": "face_then_text",
    "three weights": "three_weights",
    "joint": "joint",
}

#: The guider's names of the four predictions. ComfyUI itself looks for "positive" and "negative".
CONDITIONINGS = {
    "dropped": "negative",
    "text": "positive_without_face",
    "face": "negative_with_face",
    "both": "positive",
}

#: What belongs to the text of a conditioning, beside its states.
TEXT_VALUES = ("pooled_output", UNCONDITIONAL_KEY)


class FeedFaceGuider(comfy.samplers.CFGGuider):
    """Combines the predictions ε(∅,∅), ε(t,∅), ε(∅,f) and ε(t,f); see :mod:`feedface_core.guidance`."""

    weights: guidance.Guidance

    def set_conds(self, positive, negative) -> None:
        self.inner_set_conds(
            {
                "positive": positive,
                "negative": negative,
                "positive_without_face": node_helpers.conditioning_set_values(positive, {USE_FACE: False}),
                "negative_with_face": with_faces_of(negative, positive),
            }
        )

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options=None, seed=None) -> Tensor:
        """``(B, C, H, W)`` noisy latents → the guided denoised ones, as ComfyUI's own ``sampling_function`` does it for
        two predictions: functions that other nodes put before, in place of and behind the guidance run in their turn.
        """
        options = model_options or {}
        needed = set(self.weights.needed)
        if options.get("disable_cfg1_optimization", False):
            needed |= {"dropped", "both"}
        # Functions of other nodes expect the prompt first and the negative second; further ones are left alone.
        names = [name for name in ("both", "dropped", "text", "face") if name in needed or name in ("both", "dropped")]
        conds = [self.conds[CONDITIONINGS[name]] if name in needed else None for name in names]
        about = {
            "input": x,
            "sigma": timestep,
            "timestep": timestep,
            "model": self.inner_model,
            "model_options": options,
            "cond_scale": self.weights.scale,
        }
        if "sampler_calc_cond_batch_function" in options:
            out = options["sampler_calc_cond_batch_function"]({**about, "conds": conds})
        else:
            out = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, options)
        for function in options.get("sampler_pre_cfg_function", []):
            changed = function({**about, "conds": conds, "conds_out": out})
            out = [*changed, *out[len(changed) :]]
        return self._guide(dict(zip(names, out, strict=True)), needed, x, conds, about)

    def _guide(self, predictions: dict[str, Tensor], needed: set[str], x: Tensor, conds: list, about: dict) -> Tensor:
        options, dropped = about["model_options"], predictions["dropped"]
        denoised = self.weights.combine(predictions)
        if "sampler_cfg_function" in options:
            cond = self.weights.conditional(predictions)
            denoised = x - options["sampler_cfg_function"](
                {
                    **about,
                    "cond": x - cond,
                    "uncond": x - dropped,
                    "cond_denoised": cond,
                    "uncond_denoised": dropped,
                    "input_cond": conds[0],
                    "input_uncond": conds[1],
                }
            )
        both = predictions["both"] if "both" in needed else self.weights.conditional(predictions)
        for function in options.get("sampler_post_cfg_function", []):
            denoised = function(
                {
                    **about,
                    "denoised": denoised,
                    "cond": conds[0],
                    "uncond": conds[1],
                    "cond_denoised": both,
                    "uncond_denoised": dropped,
                }
            )
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
        raise ValueError("FeedFace Guider: positive and negative both need at least one prompt")
    if form not in FORMS:
        raise ValueError(f"FeedFace Guider: form {form!r}, expected one of {', '.join(FORMS)}")
    weights = guidance.by_name(FORMS[form], text_scale, face_scale, both_scale)
    if FORMS[form] == "joint":  # ComfyUI's own guidance, with everything that patches it
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
        return make_schema(
            node_id="FeedFaceGuider",
            display_name="FeedFace Guider",
            search_aliases=["face guidance", "face cfg", "dual cfg", "text and face scale", "guider"],
            description=(
                "Guides with separate scales for text and face, for SamplerCustomAdvanced. Equal scales in a nested "
                "form cost two predictions, different scales three, the three weights up to four."
            ),
            inputs=[
                io.Model.Input("model", tooltip="From FeedFace Apply Adapter."),
                io.Conditioning.Input("positive", tooltip="The prompt; it carries the face."),
                io.Conditioning.Input("negative", tooltip="What to keep away from; it carries no face."),
                io.Float.Input(
                    "text_scale",
                    default=6.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="How strongly the text pulls. In the joint form the one scale s: cfg s + 1.",
                ),
                io.Float.Input(
                    "face_scale",
                    default=4.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="How strongly the face pulls. Not used in the joint form.",
                ),
                io.Combo.Input(
                    "form",
                    options=list(FORMS),
                    default="text, then face",
                    tooltip="text, then face: the face is added to what the text says. face, then text: the "
                    "mirror image. three weights: text alone, face alone and both (Face0). joint: "
                    "the published form with one scale.",
                ),
                io.Float.Input(
                    "both_scale",
                    default=0.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    optional=True,
                    tooltip="Three weights only: how strongly text and face together pull.",
                ),
            ],
            outputs=[io.Guider.Output(display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
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
