"""The adapters that the identity benchmark compares with the published one."""

from __future__ import annotations

import json

from diffusers import UNet2DConditionModel

from feedface_core.hosts import sd_unet
from trainer.config import TrainSettings
from trainer.errors import TrainerError

VARIANTS = ("standard-loss", "mask-loss", "no-retrieval", "no-self-attention", "every-second-site", "one-a-resolution")
VARIANTS += ("light",)
STREAMS = ("face0", "face0-lora", "mixer", "mixer-text", "several")
"""Other kinds of adapters: the face among the text's tokens, without and with a LoRA of the U-Net, a second stream for
the background, and branches that have seen two people in one picture."""
PERCENT = (25, 50, 100)
"""Parts of an adapter's training that become a file each."""
#: The finished adapter, in the working folder.
FULL = "adapters/full-100.safetensors"
#: Those that need the encoder's class token alone, which is cached by itself.
IN_TEXT = ("face0", "face0-lora", "mixer-text")
#: Folders of features, where they are not those of most.
CACHES = {**dict.fromkeys(IN_TEXT, "cache-text"), "several": "cache-several"}
#: The encoder's last class token is what it tells people apart by.
TEXT = ("adapter.text_tokens.width=512", "adapter.encoder.pooling=class", "adapter.encoder.layer=-1")


def overrides_of(variant: str, unet: UNet2DConditionModel, size: int) -> list[str]:
    """What a variant of the adapter for a U-Net changes in ``adapter.yaml``.

    Args:
        variant: one of :data:`VARIANTS` or :data:`STREAMS`; any other changes nothing.
        size: side of the pictures in pixels.
    """
    squares = [f"data.resolution={size}"]
    if variant == "several":  # of the buckets of this area one is two squares wide; begins where "full" ended
        return [f"data.resolution={size * 3 // 2}", f"data.bucket_step={size // 2}", f"adapter.init={FULL}"]
    names = [site.name for site in sd_unet.list_sites(unet)]
    middle = next(name for name in names if name.startswith("middle_block"))
    changes = {
        "standard-loss": ["loss.kind=standard"],
        "mask-loss": ["loss.kind=mask"],
        "no-retrieval": ["data.retrieval=false", "data.augment_variants=0"],
        "no-self-attention": ["adapter.self_attention=false"],
        "every-second-site": [f"adapter.sites={json.dumps(names[::2])}"],
        "one-a-resolution": [f"adapter.sites={json.dumps([middle, names[-1]])}"],
        "light": ["adapter.self_attention=false", "adapter.mlp=false"],
        "face0": [*TEXT],
        "face0-lora": [*TEXT, "train.unet=lora"],
        "mixer": ["adapter.background=true"],
        "mixer-text": [*TEXT, "adapter.background=true"],
    }
    return [*squares, *changes.get(variant, [])]


def steps_of_files(variant: str, train: TrainSettings) -> dict[int, int]:
    """The step at each of :data:`PERCENT`. Raises ``TrainerError`` where no checkpoint is written at one of them."""
    parts = {percent: train.steps * percent // 100 for percent in PERCENT}
    for percent, step in parts.items():
        if step % train.checkpoint_every:
            raise TrainerError(
                f"{variant}: a file is wanted at {percent} % of train.steps={train.steps}, and "
                f"train.checkpoint_every={train.checkpoint_every} writes no checkpoint at step {step}"
            )
    return parts
