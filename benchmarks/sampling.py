"""What a face costs at each sampling step, at true size with random weights in bfloat16, on ComfyUI's own path.

    python run.py bench sampling                 Stable Diffusion 1.5: branches at its 16 sites
    python run.py bench sampling --host uvit     UniDiffuser with the released adapter's shape
    python run.py bench sampling --no-self-attention --sites 5      cheaper branches on fewer sites

Two rows of guidance, so only one of them carries a face. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.support.sampling_speed import Say, apply, load_pack, measure, random_adapter, table
from tools.tiny_checkpoint import SD15, unet_weights


def build_model(pack: SimpleNamespace):
    """Stable Diffusion 1.5's U-Net with random weights, by ComfyUI's own detection and classes."""
    import comfy.model_detection
    import comfy.model_management
    from comfy.model_patcher import ModelPatcher

    weights = unet_weights(SD15, dtype=torch.bfloat16)
    config = comfy.model_detection.model_config_from_unet(weights, "")
    config.set_inference_dtype(torch.bfloat16, None)
    model = config.get_model(weights, "")
    model.load_model_weights(weights, "")
    return ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def run_sd(latent: int, rounds: int, self_attention: bool, site_count: int | None, say: Say) -> dict[str, float | int]:
    """Stable Diffusion 1.5; ``site_count`` spreads that many branches evenly over the 16 sites."""
    pack = load_pack(sd_unet="feedface_core.hosts.sd_unet")
    say("building Stable Diffusion 1.5's U-Net and an adapter with random weights in bfloat16")
    model = build_model(pack)
    sites = pack.sd_unet.default_sites(model.model.diffusion_model)
    if site_count:
        sites = tuple(sites[round(index * (len(sites) - 1) / max(site_count - 1, 1))] for index in range(site_count))
    with tempfile.TemporaryDirectory(prefix="feedface-bench-") as folder:
        adapter = random_adapter(pack, Path(folder), "sd1", sites, 768, self_attention=self_attention)
        crops = torch.rand(2, 224, 224, 3, generator=torch.Generator().manual_seed(3))
        face = pack.face.EncodeFaces.execute(adapter, crops[:1]).args[0]
        apply(pack, model, adapter, face, 1.0)  # builds the branches while the file is there
    built = adapter.patcher(torch.bfloat16).model
    say(f"U-Net {size(model.model.diffusion_model)}, branches {size(built.branches)}; latent {latent} x {latent}")
    return measure(pack, model, adapter, face, crops[1:], 1.0, latent, rounds, say)


def size(module: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.0f} M parameters"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python run.py bench sampling", description=__doc__.splitlines()[0])
    parser.add_argument("--host", choices=("sd1", "uvit"), default="sd1")
    parser.add_argument("--latent", type=int, default=32, help="side of the latent (default 32)")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each variant (default 9)")
    parser.add_argument("--no-self-attention", action="store_true", help="branches that only attend to the face (sd1)")
    parser.add_argument("--sites", type=int, metavar="N", help="branches on N of the 16 sites (sd1)")
    options = parser.parse_args(arguments)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if options.host == "uvit":
        from benchmarks.uvit import run_uvit

        result = run_uvit(options.latent, options.rounds, say=say)
    else:
        result = run_sd(options.latent, options.rounds, not options.no_self_attention, options.sites, say)
    print(table(result))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
