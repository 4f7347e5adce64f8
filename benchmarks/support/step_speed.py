"""Timed steps on ComfyUI's own path, and counted operations.

The variants take turns, step by step, so that whatever else the machine does falls on all of them. Times are medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

from benchmarks.support.comfy_models import DTYPE, apply, branches_of, encode, people

GUIDANCE = 6.0
#: Steps of the run that counts projections of keys and values.
COUNTED_STEPS = 20
Say = Callable[[str], None]


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
    def sample(self, model, count: int, callback: Callable[..., None] | None = None) -> Tensor:
        """Latents after ``count`` Euler steps."""
        import comfy.sample

        prompts, latent = (self.positive, self.negative), torch.zeros_like(self.noise)
        settings = (count, GUIDANCE, "euler", "normal")
        return comfy.sample.sample(
            model, self.noise, *settings, *prompts, latent, seed=0, disable_pbar=True, callback=callback
        )

    def times(self, model, count: int) -> list[float]:
        """Seconds of each of ``count`` steps; the first includes what a run computes once."""
        times = [time.perf_counter()]
        self.sample(model, count, lambda *_: times.append(time.perf_counter()))
        return [after - before for before, after in zip(times, times[1:], strict=False)]

    def operations(self, model) -> int:
        """Floating-point operations of a step, without what a run computes once."""
        counts = []
        for steps in (1, 2):
            with count_operations() as counter:
                self.sample(model, steps)
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
    layers = [block.attn2.to_k for branch in adapter.branches for block in branch.blocks]
    handles = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in layers]
    run()
    for handle in handles:
        handle.remove()
    return len(calls)


def time_variants(variants: Mapping[str, Any], steps: Steps, rounds: int, say: Say) -> dict[str, float]:
    """Median seconds of one step of each variant, after a round of warming up."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, variant in variants.items():  # the first step of a run projects keys and values
            times[name].append(steps.times(variant, 2)[-1])
        last = ", ".join(f"{name} {seconds[-1]:.2f} s" for name, seconds in times.items())
        say(f"round {number} of {rounds}{'' if number else ' (warm-up)'}: {last}")
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def time_swap(model, adapter, crop: Tensor, strength: float, rounds: int = 3) -> tuple[float, float]:
    """Median seconds of (all that another reference photo costs, encoding it alone).

    A swap is the nodes FeedFace Encode Faces and FeedFace Apply Adapter run again, and keys and values projected for
    every site.
    """
    swaps, encodes = [], []
    for _ in range(rounds):
        started = time.perf_counter()
        adapter.encode(crop)
        encoded = time.perf_counter()
        face = encode(adapter, crop)
        apply(model, adapter, face, strength)
        with torch.inference_mode():
            branches_of(adapter).control_of(face, "cpu", DTYPE)
        swaps.append(time.perf_counter() - encoded)
        encodes.append(encoded - started)
    return statistics.median(swaps), statistics.median(encodes)


def measure(
    model, adapter, face, crop: Tensor, strength: float, latent: int, rounds: int, say: Say, plain: Any = None
) -> dict[str, float | int]:
    """The figures of ``bench sampling`` for one host.

    Args:
        plain: the same model patched in a plain way, whose figures begin with ``plain_``; None leaves them out.
        crop: ``(1, H, W, 3)``, another photo to swap to.
        latent: side of the latent.
        rounds: timed steps of each variant.
    """
    steps = Steps(latent)
    patched = apply(model, adapter, face, strength)
    variants = {"unpatched": model, "face": patched, "off": apply(model, adapter, face, 0.0)}
    variants["people"] = apply(model, adapter, people(face, 4, 8 * latent), strength)
    variants |= {"plain": plain} if plain else {}
    medians = time_variants(variants, steps, rounds, say)
    counted = {name: steps.operations(variant) for name, variant in variants.items() if name != "off"}
    small = Steps(8)  # counting needs no size
    projections = count_projections(branches_of(adapter), lambda: small.sample(patched, COUNTED_STEPS))
    swap, encoding = time_swap(model, adapter, crop, strength)
    result = {
        "unpatched_s": medians["unpatched"],
        "face_s": medians["face"],
        "off_s": medians["off"],
        "overhead": medians["face"] / medians["unpatched"] - 1,
        "counted_overhead": counted["face"] / counted["unpatched"] - 1,
        "off_ratio": medians["off"] / medians["unpatched"],
        "four_people_ratio": medians["people"] / medians["face"],
        "four_people_counted_ratio": counted["people"] / counted["face"],
        "sites": len(adapter.config.sites),
        "kv_projections": projections,
        "swap_s": swap,
        "encode_s": encoding,
    }
    if plain:
        result |= {
            "plain_s": medians["plain"],
            "plain_overhead": medians["plain"] / medians["unpatched"] - 1,
            "plain_counted_overhead": counted["plain"] / counted["unpatched"] - 1,
            "plain_ratio": medians["plain"] / medians["face"],
        }
    return result


def table(result: Mapping[str, float | int]) -> str:
    """The result for people."""
    counted = f"counted {result['four_people_counted_ratio']:.3f}"
    face = f"+{result['overhead']:.1%}; counted in operations +{result['counted_overhead']:.1%}"
    rows = {
        "step, unpatched": f"{result['unpatched_s']:.3f} s",
        "step, with a face": f"{result['face_s']:.3f} s   ({face})",
        "step, patched but off": f"{result['off_s']:.3f} s   ({result['off_ratio']:.3f} of unpatched)",
        "step, four people": f"{result['four_people_ratio']:.3f} of one   ({counted})",
    }
    if "plain_s" in result:
        plain = f"+{result['plain_overhead']:.1%}; counted +{result['plain_counted_overhead']:.1%}"
        plain += f"; {result['plain_ratio']:.2f} of that with a face"
        rows["step, plain"] = f"{result['plain_s']:.3f} s   ({plain})"
    rows[f"K/V projections in {COUNTED_STEPS} steps"] = f"{result['kv_projections']} for {result['sites']} sites"
    rows["swapping the photo"] = f"{result['swap_s']:.3f} s   (one encode {result['encode_s']:.3f} s)"
    return "\n".join(f"{name:<32} {value}" for name, value in rows.items())
