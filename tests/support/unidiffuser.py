"""UniDiffuser at the size of the golden numbers: fixtures' parts, sampling through ComfyUI, and a loop without it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from torch import Tensor

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
TOLERANCE = 1e-4  # relative; wrong variants are at least 1.4 % away


def released_folders(folder: Path, tiny_models: Path) -> Path:
    """Model folders as the notes in the workflows describe them. Small sizes need their heads told by a JSON file."""
    places = {
        "uvit.pth": "diffusion_models/uvit_v1.pth",
        "caption_decoder.pth": "text_encoders/caption_decoder.pth",
        "feed.pt": "feedface/feed-4800000.pt",
    }
    for name, place in places.items():
        (folder / place).parent.mkdir()
        shutil.copy(GOLDEN / name, folder / place)
        shutil.copy(GOLDEN / "config.json", (folder / place).with_suffix(".json"))
    (folder / "checkpoints").mkdir()
    checkpoint = "v1-5-pruned-emaonly-fp16.safetensors"
    shutil.copy(tiny_models / "checkpoints/tiny_sd1.safetensors", folder / "checkpoints" / checkpoint)
    return folder


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def text(golden: dict[str, Tensor], row: int, **values) -> list:
    return [[golden["in.text_states"][row : row + 1], values]]


def faced(uni, model, adapter, golden, references: int, combination: str = "concat", strength: float = 1.0, **options):
    hidden = uni.encoder.encode_pixels(
        uni.encoder.build_encoder(adapter.config.encoder, released_encoder(uni)),
        adapter.config.encoder,
        golden["in.crops"][:references],
    )
    face = uni.conditioning.Face(hidden, combination=combination)
    values = {"start": 0.0, "end": 1.0, **options}
    return uni.apply.ApplyFeedFace.execute(model, adapter, strength, face=face, **values).args[0]


def released_encoder(uni) -> dict[str, Tensor]:
    state = torch.load(GOLDEN / "feed.pt", weights_only=True)
    prefix = "preprocess_module.clip_model."
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def sample(
    model,
    positive,
    negative,
    *,
    size=(16, 16),
    batch=1,
    steps=3,
    cfg=3.0,
    sampler="euler",
    latent=None,
    seed=5,
    noise=None,
    **options,
) -> Tensor:
    import comfy.sample

    latent = torch.zeros(batch, 4, *size) if latent is None else latent
    if noise is None:
        noise = comfy.sample.prepare_noise(latent, seed)
    with torch.no_grad():
        return comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            sampler,
            "normal",
            positive,
            negative,
            latent,
            seed=seed,
            disable_pbar=True,
            **options,
        )


def direct(uni, golden, steps: int, cfg: float, *, size=(16, 16), seed: int = 5, face=None) -> Tensor:
    """Euler from pure noise over the host itself, one prediction at a time, nothing of ComfyUI in between.

    ``face`` is (adapter, face, strength) for the conditional prediction.
    """
    tensors = torch.load(GOLDEN / "uvit.pth", weights_only=True)
    settings = json.loads((GOLDEN / "config.json").read_text())
    host = uni.uvit.UViT(uni.uvit_config.UViTConfig.from_state_dict(tensors, settings)).eval()
    host.load_state_dict(tensors)
    decoder = torch.load(GOLDEN / "caption_decoder.pth", weights_only=True)
    texts = torch.nn.functional.linear(
        golden["in.text_states"], decoder["encode_prefix.weight"], decoder["encode_prefix.bias"]
    )
    rows: list = []
    if face is not None:
        built, who, strength = face
        hooks = uni.hooks.BranchHooks(host, built)
        rows = [(1, built.control_of(who, "cpu", torch.float32, strength=strength))]
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    cumulated = torch.cumprod(1 - betas, 0)
    table = ((1 - cumulated) / cumulated).sqrt()
    levels = normal_levels(table, steps)
    picture = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(seed))
    token = uni.joint.row_noise(picture, 1, 512)
    picture, token = (start * (1 + levels[0] ** 2) ** 0.5 for start in (picture, token))
    for level, following in zip(levels, levels[1:], strict=False):
        scale = (level**2 + 1) ** 0.5
        time = (table.log() - math.log(level)).abs().argmin()[None].float() + 1
        with torch.no_grad():
            if rows:
                with hooks.faces(rows):
                    conditional = host(picture / scale, token / scale, texts[:1], time)
            else:
                conditional = host(picture / scale, token / scale, texts[:1], time)
            unconditional = host(picture / scale, token / scale, texts[1:], time)
        slopes = [u + cfg * (c - u) for c, u in zip(conditional, unconditional, strict=True)]
        picture, token = (x + slope * (following - level) for x, slope in zip((picture, token), slopes, strict=True))
    return picture / 0.18215


def normal_levels(table: Tensor, steps: int) -> list[float]:
    """ComfyUI's scheduler "normal": equal steps of time from the last to the first, then zero."""
    times = torch.linspace(999.0, 0.0, steps, dtype=torch.float64)
    low, high = times.floor().long(), times.ceil().long()
    logs = table.log()
    return [*torch.lerp(logs[low], logs[high], times.frac()).exp().tolist(), 0.0]
