"""Speed of the published model at its true size: UniDiffuser's U-ViT (952 M) and FeedFace's branches (694 M).

    python run.py bench sampling --host uvit

Beside the figures for every host, the same step computed the plain way: every row through the branches, keys and values
of the face anew at each step, attention of the branches in fp32.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.support.sampling_speed import Say, apply, fill, load_pack, measure, random_adapter, table

#: The strength the released adapter is meant for.
STRENGTH = 0.8


def build_model(pack: SimpleNamespace, size: Any = None):
    """UniDiffuser's MODEL with random weights; ``size`` is a ``UViTConfig``, the published one when None."""
    import comfy.model_management
    from comfy.model_patcher import ModelPatcher

    config = pack.model.UniDiffuserConfig(size or pack.uvit_config.UViTConfig(), 768)
    config.set_inference_dtype(torch.bfloat16, None)
    model = config.get_model({})
    fill(model.diffusion_model, seed=0)
    patcher = ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    return pack.model.carry_token(patcher)


class PlainBranches:
    """The step written down straightforwardly, as a patch of the model.

    Args:
        pack: modules of the pack.
        built: the adapter, whose weights are shared.
        hidden: ``(N, T, E)`` hidden states of the face.
        strength: of the rows with the face; the others go through the branches with strength 0.
    """

    def __init__(self, pack: SimpleNamespace, built: torch.nn.Module, hidden: Tensor, strength: float):
        self.adapter = pack.core_adapter.FaceAdapter(built.config, device="meta", attention=fp32_attention)
        self.adapter.load_state_dict(built.state_dict(), assign=True)
        self.hidden = hidden
        self.strength = strength

    def apply_to(self, model):
        patched = model.clone()
        for index, site in enumerate(self.adapter.config.sites):
            path = f"diffusion_model.{site.name}.forward"
            patched.add_object_patch(path, self.around(index, model.get_model_object(path)))
        return patched

    def around(self, index: int, previous: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``forward`` of a block with its branch."""

        def forward(x: Tensor, *args, **kwargs) -> Tensor:
            out = previous(x, *args, **kwargs)
            options = kwargs["transformer_options"]
            height, width = options["picture_grid"]
            first = out.shape[1] - height * width
            branch = self.adapter.branches[index]
            tokens = self.adapter.project(self.hidden.to(out)).flatten(0, 1).expand(out.shape[0], -1, -1)
            # Conditionings lie one after the other in the batch; number 0 is the positive one.
            strengths = [self.strength if number == 0 else 0.0 for number in options["cond_or_uncond"]]
            strength = out.new_tensor(strengths).repeat_interleave(out.shape[0] // len(strengths)).view(-1, 1, 1)
            added = branch(out[:, first:], branch.project_face(tokens)) * strength
            return torch.cat([out[:, :first], out[:, first:] + added], dim=1)

        return forward


def fp32_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Softmax attention in single precision, with all its logits in memory."""
    dtype = q.dtype
    q, k, v = (t.float().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, heads, N, L)
    weights = (logits if mask is None else logits + mask).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2).to(dtype)


def run_uvit(latent: int = 32, rounds: int = 5, size: Any = None, say: Say = print) -> dict[str, float | int]:
    """The benchmark: keys of :func:`benchmarks.support.sampling_speed.measure`, and ``plain_s`` and its company.

    Args:
        latent: side of the picture latent.
        rounds: timed steps of each variant.
        size: a ``UViTConfig`` for a smaller model; the published one when None.
        say: where progress goes, a line at a time.
    """
    pack = load_pack(
        model="nodes.unidiffuser.model",
        uvit="feedface_core.modules.uvit",
        uvit_config="feedface_core.modules.uvit_config",
    )
    say("building UniDiffuser and an adapter with random weights in bfloat16")
    model = build_model(pack, size)
    sites = pack.uvit.default_sites(model.model.diffusion_model)
    with tempfile.TemporaryDirectory(prefix="feedface-bench-") as folder:
        adapter = random_adapter(
            pack, Path(folder), "unidiffuser", sites, sites[0].width, tap="output", strength=STRENGTH
        )
        crops = torch.rand(2, 224, 224, 3, generator=torch.Generator().manual_seed(3))
        face = pack.face.EncodeFaces.execute(adapter, crops[:1]).args[0]
        apply(pack, model, adapter, face, STRENGTH)  # builds the branches while the file is there
    built = adapter.patcher(torch.bfloat16).model
    host_size, branch_size = (
        sum(parameter.numel() for parameter in module.parameters()) / 1e6
        for module in (model.model.diffusion_model, built.branches)
    )
    say(f"U-ViT {host_size:.0f} M, branches {branch_size:.0f} M parameters; latent {latent} x {latent}")
    plain = PlainBranches(pack, built, face.hidden, STRENGTH).apply_to(model)
    return measure(pack, model, adapter, face, crops[1:], STRENGTH, latent, rounds, say, plain=plain)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python run.py bench uvit", description=__doc__.splitlines()[0])
    parser.add_argument("--latent", type=int, default=32, help="side of the picture latent (default 32)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each variant (default 5)")
    options = parser.parse_args(arguments)
    result = run_uvit(options.latent, options.rounds, say=lambda text: print(text, file=sys.stderr, flush=True))
    print(table(result))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
