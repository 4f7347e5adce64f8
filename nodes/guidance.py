"""The guider with separate scales for text and face."""

from __future__ import annotations

import comfy.samplers
import node_helpers
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..feedface_core import guidance
from .compat import make_schema
from .patches import SETTINGS, USE_FACE
from .unidiffuser_model import UNCONDITIONAL_KEY

JOINT = "joint"
TEXT_THEN_FACE = "text, then face"
FACE_THEN_TEXT = "face, then text"
THREE_WEIGHTS = "three weights"
FORMS = (TEXT_THEN_FACE, FACE_THEN_TEXT, THREE_WEIGHTS, JOINT)

#: The guider's names of the four predictions. ComfyUI itself looks for "positive" and "negative".
CONDITIONINGS = {"dropped": "negative", "text": "positive_without_face", "face": "negative_with_face",
                 "both": "positive"}

#: What belongs to the text of a conditioning, beside its states.
TEXT_VALUES = ("pooled_output", UNCONDITIONAL_KEY)


class FeedFaceGuider(comfy.samplers.CFGGuider):
    """Combines the predictions ε(∅,∅), ε(t,∅), ε(∅,f) and ε(t,f); see :mod:`feedface_core.guidance`."""

    def set_guidance(self, weights: guidance.Guidance) -> None:
        self.weights = weights

    def set_conds(self, positive, negative) -> None:
        self.inner_set_conds({
            "positive": positive,
            "negative": negative,
            "positive_without_face": node_helpers.conditioning_set_values(positive, {USE_FACE: False}),
            "negative_with_face": with_faces_of(negative, positive),
        })

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options=None, seed=None) -> Tensor:
        model_options = model_options or {}
        needed = set(self.weights.needed)
        if model_options.get("disable_cfg1_optimization", False):
            needed |= {"dropped", "both"}
        names = [name for name in guidance.PREDICTIONS if name in needed]
        conds = [self.conds[CONDITIONINGS[name]] for name in names]
        out = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
        predictions = dict(zip(names, out, strict=True))
        return self.after_guidance(self.weights.combine(predictions), predictions, x, timestep, model_options)

    def after_guidance(self, denoised: Tensor, predictions: dict[str, Tensor], x: Tensor, timestep: Tensor,
                       model_options: dict) -> Tensor:
        """Runs the post-CFG functions that other nodes put on the model."""
        for function in model_options.get("sampler_post_cfg_function", []):
            denoised = function({
                "denoised": denoised, "input": x, "sigma": timestep, "model": self.inner_model,
                "model_options": model_options, "cond_scale": self.weights.both,
                "cond": self.conds["positive"], "uncond": self.conds["negative"],
                "cond_denoised": predictions.get("both", denoised),
                "uncond_denoised": predictions.get("dropped", denoised),
            })
        return denoised


class JointGuider(comfy.samplers.CFGGuider):
    """``ε(t,f) + s·(ε(t,f) − ε(∅,∅))``: ComfyUI's own guidance at cfg s + 1, with everything that patches it."""

    def set_scale(self, scale: float) -> None:
        self.set_cfg(scale + 1.0)


def with_faces_of(negative, positive):
    """The negative text in every region of the positive prompt, with the positive prompt's faces.

    This is ε(∅,f): areas, masks, hooks and faces stay, only the text is dropped.
    """
    text, values = negative[0][0], negative[0][1]
    out = []
    for entry in positive:
        own = {key: value for key, value in entry[1].items() if key not in TEXT_VALUES}
        own |= {key: values[key] for key in TEXT_VALUES if key in values}
        out.append([text, {**own, USE_FACE: own.get(USE_FACE, True), SETTINGS: own.get(SETTINGS, {})}])
    return out


def make_guider(model: ModelPatcher, positive, negative, text_scale: float, face_scale: float, both_scale: float,
                form: str) -> comfy.samplers.CFGGuider:
    """The guider of one form; the meaning of the scales is that of :mod:`feedface_core.guidance`."""
    if not positive or not negative:
        raise ValueError("FeedFace Guider: positive and negative both need at least one prompt")
    if form == JOINT:
        guider = JointGuider(model)
        guider.set_conds(positive, negative)
        guider.set_scale(text_scale)
        return guider
    if form == TEXT_THEN_FACE:
        weights = guidance.text_then_face(text_scale, face_scale)
    elif form == FACE_THEN_TEXT:
        weights = guidance.face_then_text(text_scale, face_scale)
    elif form == THREE_WEIGHTS:
        weights = guidance.three_weights(text_scale, face_scale, both_scale)
    else:
        raise ValueError(f"FeedFace Guider: form {form!r}, expected one of {', '.join(FORMS)}")
    guider = FeedFaceGuider(model)
    guider.set_guidance(weights)
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
                io.Float.Input("text_scale", default=6.0, min=0.0, max=30.0, step=0.1,
                               tooltip="How strongly the text pulls. In the joint form the one scale s: cfg s + 1."),
                io.Float.Input("face_scale", default=4.0, min=0.0, max=30.0, step=0.1,
                               tooltip="How strongly the face pulls. Not used in the joint form."),
                io.Combo.Input("form", options=list(FORMS), default=TEXT_THEN_FACE,
                               tooltip="text, then face: the face is added to what the text says. face, then text: the "
                                       "mirror image. three weights: text alone, face alone and both (Face0). joint: "
                                       "the published form with one scale."),
                io.Float.Input("both_scale", default=0.0, min=0.0, max=30.0, step=0.1, optional=True,
                               tooltip="Three weights only: how strongly text and face together pull."),
            ],
            outputs=[io.Guider.Output(display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, positive, negative, text_scale: float, face_scale: float, form: str,
                both_scale: float = 0.0) -> io.NodeOutput:
        return io.NodeOutput(make_guider(model, positive, negative, text_scale, face_scale, both_scale, form))


NODES = [Guider]
