"""What the sampling benchmarks share: the pack in this process, timed steps on ComfyUI's own path, counted operations.

The variants take turns, step by step, so that whatever else the machine does falls on all of them. Times are medians.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

ROOT = Path(__file__).resolve().parents[2]
PACK = "feedface_pack"
GUIDANCE = 6.0
#: Steps of the run that counts projections of keys and values.
COUNTED_STEPS = 20
#: CLIP ViT-B/32, the encoder of the published method.
VIT_B32 = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 32,
    "image_size": 224,
    "hidden_act": "quick_gelu",
}
Say = Callable[[str], None]


def load_pack(**modules: str) -> SimpleNamespace:
    """Modules of the pack, loaded as ComfyUI loads them, in this process. ``COMFYUI_PATH`` names ComfyUI."""
    if PACK not in sys.modules:
        comfyui = os.environ.get("COMFYUI_PATH")
        if not comfyui or not (Path(comfyui) / "comfy").is_dir():
            raise SystemExit("COMFYUI_PATH must name ComfyUI's folder; `python run.py bench sampling` sets it")
        sys.path.insert(0, comfyui)
        from comfy.cli_args import args

        args.cpu = not torch.cuda.is_available()
        spec = importlib.util.spec_from_file_location(
            PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        sys.modules[PACK] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[PACK])
    names = {
        "adapter": "nodes.adapter",
        "apply": "nodes.apply",
        "face": "nodes.encode",
        "config": "feedface_core.config",
        "encoder": "feedface_core.modules.encoder",
        "format": "feedface_core.files.adapter_file",
        "core_adapter": "feedface_core.modules.adapter",
        **modules,
    }
    return SimpleNamespace(**{name: importlib.import_module(f"{PACK}.{path}") for name, path in names.items()})


@torch.no_grad()
def fill(module: torch.nn.Module, seed: int) -> None:
    """Random weights that keep activations near one: matrices by their width, norms one, biases zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.ndim < 2:
            parameter.fill_(0.0)
        else:
            bound = (3.0 / parameter[0].numel()) ** 0.5
            parameter.uniform_(-bound, bound, generator=generator)
    for layer in module.modules():
        if isinstance(layer, (torch.nn.LayerNorm, torch.nn.GroupNorm)):
            layer.weight.fill_(1.0)


def random_adapter(pack: SimpleNamespace, folder: Path, host: str, sites, context_width: int, **fields):
    """An adapter with random weights in bfloat16 and CLIP ViT-B/32, through a file, as the node loads it."""
    encoder = pack.config.EncoderConfig(config=VIT_B32, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    config = pack.config.AdapterConfig(host=host, sites=sites, context_width=context_width, encoder=encoder, **fields)
    built = pack.core_adapter.FaceAdapter(config, dtype=torch.bfloat16)
    fill(built, seed=1)
    torch.manual_seed(2)
    weights = pack.encoder.build_encoder(encoder).state_dict()
    path = pack.format.save_adapter(
        folder / "random.safetensors", config, built.state_dict(), weights, dtype=torch.bfloat16
    )
    return pack.adapter.LoadedAdapter(str(path))


class Steps:
    """Sampling runs of a model at one size, two rows of guidance, timed step by step.

    Args:
        latent: side of the latent.
        context: width of the text states.
    """

    def __init__(self, latent: int, context: int = 768):
        self.noise = torch.randn(1, 4, latent, latent, generator=torch.Generator().manual_seed(0))
        states = torch.randn(2, 77, context, generator=torch.Generator().manual_seed(1))
        self.positive, self.negative = ([[states[row : row + 1], {}]] for row in (0, 1))

    @torch.inference_mode()
    def run(self, model, count: int) -> list[float]:
        """Seconds of each of ``count`` Euler steps; the first includes what a run computes once."""
        import comfy.sample

        times = [time.perf_counter()]
        comfy.sample.sample(
            model,
            self.noise,
            count,
            GUIDANCE,
            "euler",
            "normal",
            self.positive,
            self.negative,
            torch.zeros_like(self.noise),
            seed=0,
            disable_pbar=True,
            callback=lambda *_: times.append(time.perf_counter()),
        )
        return [after - before for before, after in zip(times, times[1:], strict=False)]

    def operations(self, model) -> int:
        """Floating-point operations of a step, without what a run computes once."""
        counts = []
        for steps in (1, 2):
            with count_operations() as counter:
                self.run(model, steps)
            counts.append(counter.get_total_flops())
        return counts[1] - counts[0]


def count_operations() -> FlopCounterMode:
    """torch's counter, which leaves out the attention kernel of CPUs unless told of it."""

    def attention(query, key, value, *_, out_shape=None, **__) -> int:
        return sdpa_flop(query, key, value)

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={kernel: attention})


def count_projections(adapter: torch.nn.Module, run: Callable[[], Any]) -> int:
    """How many times a branch projects keys and values of the face while ``run`` runs."""
    calls = []
    handles = [
        block.attn2.to_k.register_forward_hook(lambda *_: calls.append(1))
        for branch in adapter.branches
        for block in branch.blocks
    ]
    run()
    for handle in handles:
        handle.remove()
    return len(calls)


def apply(pack: SimpleNamespace, model, adapter, face, strength: float):
    """What FeedFace Apply Adapter makes of a model."""
    return pack.apply.ApplyFeedFace.execute(model, adapter, strength, 0.0, 1.0, face).args[0]


def time_variants(variants: Mapping[str, Any], steps: Steps, rounds: int, say: Say) -> dict[str, float]:
    """Median seconds of one step of each variant, after a round of warming up."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, variant in variants.items():
            seconds = steps.run(variant, 2)[-1]  # the first step of a run projects keys and values
            if turn:
                times[name].append(seconds)
        say(
            f"round {turn} of {rounds}: "
            + ", ".join(f"{name} {values[-1]:.2f} s" for name, values in times.items() if values)
        )
    return {name: statistics.median(values) for name, values in times.items()}


def time_swap(
    pack: SimpleNamespace, model, adapter, crop: Tensor, strength: float, rounds: int = 3
) -> tuple[float, float]:
    """Median seconds of (all that another reference photo costs, encoding it alone).

    A swap is the nodes FeedFace Encode Faces and FeedFace Apply Adapter run again, and keys and values projected for
    every site.
    """
    built = adapter.patcher(torch.bfloat16).model
    swaps, encodes = [], []
    for _ in range(rounds):
        started = time.perf_counter()
        adapter.encode(crop)
        encoded = time.perf_counter()
        face = pack.face.EncodeFaces.execute(adapter, crop).args[0]
        apply(pack, model, adapter, face, strength)
        with torch.inference_mode():
            built.control_of(face, "cpu", torch.bfloat16)
        swaps.append(time.perf_counter() - encoded)
        encodes.append(encoded - started)
    return statistics.median(swaps), statistics.median(encodes)


def measure(
    pack: SimpleNamespace,
    model,
    adapter,
    face,
    crop: Tensor,
    strength: float,
    latent: int,
    rounds: int,
    say: Say,
    **more_variants,
) -> dict[str, float | int]:
    """The figures of ``bench sampling`` for one host, and ``{name}_s`` for further variants of the patched model."""
    steps = Steps(latent)
    patched = apply(pack, model, adapter, face, strength)
    variants = {"unpatched": model, "face": patched, "off": apply(pack, model, adapter, face, 0.0), **more_variants}
    medians = time_variants(variants, steps, rounds, say)
    counted = {name: steps.operations(variant) for name, variant in variants.items() if name != "off"}
    built = adapter.patcher(torch.bfloat16).model
    small = Steps(8)  # counting needs no size
    projections = count_projections(built, lambda: small.run(patched, COUNTED_STEPS))
    swap, encode = time_swap(pack, model, adapter, crop, strength)
    result = {
        "unpatched_s": medians["unpatched"],
        "face_s": medians["face"],
        "off_s": medians["off"],
        "overhead": medians["face"] / medians["unpatched"] - 1,
        "counted_overhead": counted["face"] / counted["unpatched"] - 1,
        "off_ratio": medians["off"] / medians["unpatched"],
        "sites": len(adapter.config.sites),
        "kv_projections": projections,
        "swap_s": swap,
        "encode_s": encode,
    }
    for name in more_variants:
        result |= {
            f"{name}_s": medians[name],
            f"{name}_overhead": medians[name] / medians["unpatched"] - 1,
            f"{name}_counted_overhead": counted[name] / counted["unpatched"] - 1,
            f"{name}_ratio": medians[name] / medians["face"],
        }
    return result


def table(result: Mapping[str, float | int]) -> str:
    """The result for people."""
    rows = [
        ("step, unpatched", f"{result['unpatched_s']:.3f} s"),
        (
            "step, with a face",
            f"{result['face_s']:.3f} s   (+{result['overhead']:.1%}; counted in operations "
            f"+{result['counted_overhead']:.1%})",
        ),
        ("step, patched but off", f"{result['off_s']:.3f} s   ({result['off_ratio']:.3f} of unpatched)"),
        *(
            (
                f"step, {name.removesuffix('_ratio')}",
                f"{result[name.replace('_ratio', '_s')]:.3f} s   "
                f"(+{result[name.replace('_ratio', '_overhead')]:.1%}; counted "
                f"+{result[name.replace('_ratio', '_counted_overhead')]:.1%}; {result[name]:.2f} of that with a face)",
            )
            for name in result
            if name.endswith("_ratio") and name != "off_ratio"
        ),
        (f"K/V projections in {COUNTED_STEPS} steps", f"{result['kv_projections']} for {result['sites']} sites"),
        ("swapping the photo", f"{result['swap_s']:.3f} s   (one encode {result['encode_s']:.3f} s)"),
    ]
    return "\n".join(f"{name:<32} {value}" for name, value in rows)
