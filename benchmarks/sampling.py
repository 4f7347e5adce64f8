"""What a face costs at each sampling step, at true size with random weights, on ComfyUI's own path.

    python run.py bench sampling                 Stable Diffusion 1.5: branches at its 16 sites
    python run.py bench sampling --host uvit     UniDiffuser (952 M) with branches of the released shape (694 M),
                                                 and the same step with branches computed the plain way
    python run.py bench sampling --no-self-attention --no-mlp --sites 5      cheaper branches on fewer sites
    python run.py bench sampling --count         counts the operations of every kind of branch, and times nothing

In bfloat16 where the device computes in it, else in float32. Two rows of guidance, so only one of them carries a face.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.support.comfy_models import (
    DTYPE,
    apply,
    branches_of,
    encode,
    pack,
    patch_plainly,
    random_adapter,
    stable_diffusion,
    unidiffuser,
)
from benchmarks.support.step_speed import Say, Steps, measure, table
from tools.options import whole

HOSTS = {"sd": stable_diffusion, "uvit": unidiffuser}
RELEASED_STRENGTH = 0.8  # that the released adapter is meant for
LIGHT = {"self_attention": False, "mlp": False}
#: Kinds of branches by name, with what they change in an adapter's config.
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "no self-attention": {"self_attention": False},
    "light": LIGHT,
    "light, rank 64": {**LIGHT, "rank": 64},
}


def run(
    host: str,
    latent: int,
    rounds: int,
    say: Say,
    kind: dict[str, Any] | None = None,
    site_count: int | None = None,
    **size: Any,
) -> dict[str, float | int]:
    """The figures for one host (:func:`benchmarks.support.step_speed.measure`).

    Args:
        latent: side of the latent.
        rounds: timed steps of each variant.
        kind: what the branches change in the adapter's config, such as those of :data:`KINDS`.
        site_count: spreads that many branches evenly over the host's sites.
        size: ``size=…`` for a smaller model (:data:`HOSTS`).
    """
    say(f"building {host} and an adapter with random weights in {str(DTYPE).removeprefix('torch.')}")
    model = HOSTS[host](**size)
    adapter, face, crop, strength = make(host, model, kind or {}, site_count)
    built = branches_of(adapter)
    sizes = f"model {millions(model.model.diffusion_model)}, branches {millions(built.branches)}"
    say(f"{sizes}; latent {latent} x {latent}")
    plain = patch_plainly(model, built, face.hidden, strength) if host == "uvit" else None
    return measure(model, adapter, face, crop, strength, latent, rounds, say, plain)


def count(host: str, latent: int, say: Say, kinds: Mapping[str, dict[str, Any]] = KINDS, **size: Any) -> list[dict]:
    """For each kind of branches at all sites the operations that a face adds to a step, over those of the model alone,
    and its parameters."""
    model, steps, rows = HOSTS[host](**size), Steps(latent), []
    alone = steps.operations(model)
    for name, kind in kinds.items():
        adapter, face, _, strength = make(host, model, kind, None)
        counted = steps.operations(apply(model, adapter, face, strength)) / alone - 1
        parameters = sum(parameter.numel() for parameter in branches_of(adapter).branches.parameters())
        rows.append({"branches": name, "counted_overhead": counted, "parameters": parameters})
        say(f"{name:<20} +{counted:.2%} operations a step, {parameters / 1e6:.1f} M parameters")
    return rows


def make(host: str, model, kind: dict[str, Any], site_count: int | None) -> tuple[Any, Any, torch.Tensor, float]:
    """An adapter with random weights for a model, a face, another crop, and the strength."""
    diffusion_model = model.model.diffusion_model
    sites = pack(f"feedface_core.hosts.{'uvit' if host == 'uvit' else 'sd_unet'}").default_sites(diffusion_model)
    if site_count:
        sites = tuple(sites[round(index * (len(sites) - 1) / max(site_count - 1, 1))] for index in range(site_count))
    context, fields, strength = 768, dict(kind), 1.0
    if host == "uvit":
        context, strength = sites[0].width, RELEASED_STRENGTH
        fields |= {"tap": "output", "strength": strength}
    family = "unidiffuser" if host == "uvit" else "sd1"
    crops = torch.rand(2, 224, 224, 3, generator=torch.Generator().manual_seed(3))
    with tempfile.TemporaryDirectory(prefix="feedface-bench-") as folder:
        adapter = random_adapter(Path(folder), family, sites, context, **fields)
        face = encode(adapter, crops[:1])
        apply(model, adapter, face, strength)  # builds the branches while the file is there
    return adapter, face, crops[1:], strength


def millions(module: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.0f} M parameters"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python run.py bench sampling", description=__doc__.splitlines()[0])
    parser.add_argument("--host", choices=tuple(HOSTS), default="sd")
    parser.add_argument("--latent", type=whole(8, 1024), default=32, help="side of the latent (default 32)")
    parser.add_argument("--rounds", type=whole(1), default=9, help="timed steps of each variant (default 9)")
    parser.add_argument("--no-self-attention", action="store_true", help="branches that only attend to the face")
    parser.add_argument("--no-mlp", action="store_true", help="branches without an MLP")
    parser.add_argument("--rank", type=whole(1), help="rank of the branches' projections")
    parser.add_argument("--count", action="store_true", help="only count the operations of every kind of branch")
    parser.add_argument("--sites", type=whole(1), metavar="N", help="branches on N of the host's sites")
    options = parser.parse_args(arguments)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if options.count:
        rows = count(options.host, options.latent, say)
        print("\n".join(f"{row['branches']:<20} +{row['counted_overhead']:.2%}" for row in rows))
        print(json.dumps(rows))
        return 0
    kind = {"self_attention": not options.no_self_attention, "mlp": not options.no_mlp, "rank": options.rank}
    result = run(options.host, options.latent, options.rounds, say, kind, options.sites)
    print(table(result))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
