"""What a face costs at each sampling step, at true size with random weights in bfloat16, on ComfyUI's own path.

    python run.py bench sampling                 Stable Diffusion 1.5: branches at its 16 sites
    python run.py bench sampling --host uvit     UniDiffuser (952 M) with branches of the released shape (694 M),
                                                 and the same step with branches computed the plain way
    python run.py bench sampling --no-self-attention --sites 5      cheaper branches on fewer sites

Two rows of guidance, so only one of them carries a face. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.support.comfy_models import (
    apply,
    branches_of,
    encode,
    pack,
    patch_plainly,
    random_adapter,
    stable_diffusion,
    unidiffuser,
)
from benchmarks.support.step_speed import Say, measure, table

HOSTS = {"sd": stable_diffusion, "uvit": unidiffuser}
RELEASED_STRENGTH = 0.8  # that the released adapter is meant for


def run(
    host: str,
    latent: int,
    rounds: int,
    say: Say,
    self_attention: bool = True,
    site_count: int | None = None,
    **size: Any,
) -> dict[str, float | int]:
    """The figures for one host (:func:`benchmarks.support.step_speed.measure`).

    Args:
        latent: side of the latent.
        rounds: timed steps of each variant.
        site_count: spreads that many branches evenly over the host's sites.
        size: ``size=…`` for a smaller model (:data:`HOSTS`).
    """
    say(f"building {host} and an adapter with random weights in bfloat16")
    model = HOSTS[host](**size)
    diffusion_model = model.model.diffusion_model
    sites = pack(f"feedface_core.hosts.{'uvit' if host == 'uvit' else 'sd_unet'}").default_sites(diffusion_model)
    if site_count:
        sites = tuple(sites[round(index * (len(sites) - 1) / max(site_count - 1, 1))] for index in range(site_count))
    context, fields, strength = 768, {"self_attention": self_attention}, 1.0
    if host == "uvit":
        context, strength = sites[0].width, RELEASED_STRENGTH
        fields |= {"tap": "output", "strength": strength}
    family = "unidiffuser" if host == "uvit" else "sd1"
    crops = torch.rand(2, 224, 224, 3, generator=torch.Generator().manual_seed(3))
    with tempfile.TemporaryDirectory(prefix="feedface-bench-") as folder:
        adapter = random_adapter(Path(folder), family, sites, context, **fields)
        face = encode(adapter, crops[:1])
        apply(model, adapter, face, strength)  # builds the branches while the file is there
    built = branches_of(adapter)
    say(f"model {millions(diffusion_model)}, branches {millions(built.branches)}; latent {latent} x {latent}")
    plain = patch_plainly(model, built, face.hidden, strength) if host == "uvit" else None
    return measure(model, adapter, face, crops[1:], strength, latent, rounds, say, plain)


def millions(module: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.0f} M parameters"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python run.py bench sampling", description=__doc__.splitlines()[0])
    parser.add_argument("--host", choices=tuple(HOSTS), default="sd")
    parser.add_argument("--latent", type=int, default=32, help="side of the latent (default 32)")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each variant (default 9)")
    parser.add_argument("--no-self-attention", action="store_true", help="branches that only attend to the face")
    parser.add_argument("--sites", type=int, metavar="N", help="branches on N of the host's sites")
    options = parser.parse_args(arguments)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    result = run(options.host, options.latent, options.rounds, say, not options.no_self_attention, options.sites)
    print(table(result))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
