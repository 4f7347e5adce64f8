"""What a run will cost, before it starts: memory, time by GPU, disk. Nothing is trained, and no weights are read.

The step itself runs once over tensors that hold nothing (``FakeTensorMode``): every operation is counted
(``torch.utils.flop_counter``), and so is every tensor that is alive at once. So the estimate follows from the code that
trains, its branches, losses and gradient checkpointing included.

Counted, for each process: the frozen host and the adapter, its gradients, optimiser state and moving average, and what
the largest forward and backward pass holds, all rows having a face. Not counted: an identity loss, pictures for
validation, other programs, and without a cache the encoders and their operations.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary

from feedface_core.conditioning import Rows

from ..config import Config
from ..data.batch import Batch
from ..models.adapter import Models
from ..models.outline import Outline, materialise
from .gpus import GPUS, Gpu
from .optimiser import state_bytes
from .step import AdapterStep, Features, Plan

GB = 1e9
#: Share of a GPU's dense peak that training reaches. Published: 4.8 million pairs in 1.5 days on six A100, which by the
#: operations of that trainer's step (counted here) is 0.29 of their peak.
EFFICIENCY = 0.3
#: What CUDA, cuBLAS and cuDNN take before the first tensor, and the share that torch's allocator adds to what is alive.
CONTEXT, FRAGMENTS = 0.8 * GB, 0.08


class LiveMemory(TorchDispatchMode):
    """Bytes of the storages that are alive within it, now and at most.

    Args:
        known: tensors that are not counted, nor are views of them.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = None

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return tree_map_only(Tensor, self._count, function(*args, **(kwargs or {})))

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen[storage] = None
            size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, size)
        return tensor

    def _free(self, size: int) -> None:
        self.now -= size


@dataclass(frozen=True)
class Estimate:
    """Bytes for each process, operations for each sample, bytes on the disk.

    Args:
        host, adapter: weights.
        optimiser, average: optimiser state, and the moving average of the main process.
        passes: most that a forward and backward pass holds, gradients included.
        trained: weights that are trained.
        samples: of one pass, and of the whole run.
        operations: of an average sample; 2 for a multiply-add.
        checkpoints, cache_photo: of all kept checkpoints and one more; of the features of one photo.
        assumed: what stands for files that are missing.
    """

    host: int
    adapter: int
    optimiser: int
    average: int
    passes: int
    trained: int
    samples: tuple[int, int]
    operations: float
    checkpoints: int
    cache_photo: int
    assumed: tuple[str, ...]

    @property
    def memory(self) -> int:
        """Bytes of tensors at the peak."""
        return self.host + self.adapter + self.optimiser + self.average + self.passes

    @property
    def gpu_memory(self) -> float:
        """Bytes of a GPU's memory, with what CUDA and torch's allocator add."""
        return self.memory * (1 + FRAGMENTS) + CONTEXT

    def hours(self, gpu: Gpu, precision: str) -> float:
        """Hours of one GPU for the whole run at :data:`EFFICIENCY`."""
        peak = gpu.single if precision == "fp32" else gpu.half
        return self.samples[1] * self.operations / (peak * 1e12 * EFFICIENCY) / 3600


def estimate(config: Config, processes: int = 1) -> Estimate:
    """Run the step over tensors that hold nothing, and count.

    Args:
        processes: between which ``train.batch_size`` is split.

    Raises:
        TrainerError: the base's size is not known, or an optimiser is not installed.
    """
    outline = Outline(config)
    count = max(config.train.batch_size // (processes * config.optimiser.accumulation), 1)
    state = state_bytes(config.optimiser)
    models = outline.make()
    with FakeTensorMode(allow_non_fake_inputs=True):
        materialise(models.frozen.host, models.adapter)
        unet = {} if models.unet is None else models.unet.trained()
        trained = sum(value.numel() for value in (*models.adapter.parameters(), *unet.values()))
        passes, with_original, without = _passes(config, models, outline, count)
    loss = config.loss
    taught = 1.0 - loss.face_dropout if models.adapter.config.null == "off" and models.unet is None else 1.0
    regularised = 1.0 - loss.standard_probability if loss.kind == "regularised" else 0.0
    weights = sum(value.nbytes for value in models.adapter.state_dict().values())
    saved = weights + sum(value.nbytes for value in unet.values())
    average = 4 * trained if config.train.ema is not None else 0
    parts = processes if config.train.sharding == "fsdp2" else 1
    return Estimate(
        host=sum(value.nbytes for value in models.frozen.host.state_dict().values()),
        adapter=weights
        if parts == 1
        else weights + (weights + 4 * trained) // parts,  # whole, its part, and gradient's
        optimiser=int(state * trained / parts),
        average=average // parts,
        passes=passes,
        trained=trained,
        samples=(count, config.train.steps * config.train.batch_size),
        operations=taught * (without + regularised * (with_original - without)) / count,
        checkpoints=int((config.train.keep + 1) * (saved + state * trained + average)),
        cache_photo=_cache_bytes(config, models, outline),
        assumed=tuple(outline.assumed),
    )


def _passes(config: Config, models: Models, outline: Outline, count: int) -> tuple[int, int, int]:
    """Peak bytes of a pass, and its operations with and without the frozen model's own prediction."""
    shape, encoder = models.frozen.latent_shape(*[config.data.resolution] * 2), models.adapter.config.encoder
    cells = config.data.resolution // models.frozen.cell
    references = config.data.references
    values: dict[str, Any] = {field.name: None for field in fields(Batch)}
    for name in ("drop_face", "drop_text", "standard_loss"):
        values[name] = [False] * count
    values |= {"ids": [""] * count, "captions": [""] * count, "reference_counts": [references] * count}
    values |= {"masks": torch.zeros(count, 1, cells, cells), "noise": torch.zeros(count, *shape)}
    values |= {"timesteps": torch.zeros(count, dtype=torch.int64)}
    hidden = torch.zeros(count * references, encoder.tokens, encoder.width)
    second = models.adapter.background
    values["drop_background"] = [second is None] * count
    background = None if second is None else torch.zeros(count, encoder.tokens, encoder.width)
    features = Features(torch.zeros(count, *shape), outline.text(count), hidden, background)
    step = _Step(models, config.loss, config.adapter.combination)
    known = [*models.frozen.host.state_dict().values(), *models.adapter.state_dict().values()]
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(config.model.precision)
    plan = Plan.of(values["drop_face"], values["standard_loss"], config.loss.kind, models.adapter.config.null)
    memory, operations = LiveMemory(known), FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    blocks = _Recomputed(memory, operations)
    if config.model.gradient_checkpointing:
        models.frozen.recompute = blocks
        models.frozen.enable_gradient_checkpointing()
    with operations, memory:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss, *_ = step.loss(Batch(**values), features, plan)
        loss.backward()
    peak = memory.peak - sum(blocks.freed) + max(blocks.freed, default=0)
    total, original = operations.get_total_flops() + blocks.operations, 0
    if plan.originals:
        with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as operations, torch.no_grad():
            models.frozen.predict(values["noise"], values["timesteps"], features.text)
        original = operations.get_total_flops()
    return peak, total, total - original


class _Recomputed:
    """In the place of gradient checkpointing: what each block would free after its forward pass, and compute again.

    Recomputing itself would count wrongly: tensors that hold nothing are not let go in a backward pass.
    """

    def __init__(self, memory: LiveMemory, operations: FlopCounterMode) -> None:
        self._memory, self._counter = memory, operations
        self.freed: list[int] = []
        self.operations = 0

    def __call__(self, function: Callable[..., Any], *inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*inputs)
        bytes_before, before = self._memory.now, self._counter.get_total_flops()
        returned = function(*inputs)
        kept = sum(one.nbytes for one in tree_leaves(returned) if isinstance(one, Tensor))
        self.freed.append(max(self._memory.now - bytes_before - kept, 0))
        self.operations += self._counter.get_total_flops() - before
        return returned


class _Step(AdapterStep):
    """Combines references by their shapes: what is left out and biased depends on values, and there are none."""

    def _face_rows(self, plan: Plan, batch: Batch, features: Features) -> Rows:
        adapter, second = self.adapter, self.adapter.background
        tokens = features.hidden.unflatten(0, (len(batch), -1))  # (B, references, T, E)
        side_by_side = self.combination == "concat" and not adapter.config.text_tokens
        tokens = adapter.project(tokens.flatten(1, 2) if side_by_side else tokens.mean(1))
        background = None if second is None else second.control(second.project(features.background))
        return [(len(batch), adapter.control(tokens, background=background))]


def _attention(query, key, value, *_, out_shape=None, **__) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient, query, key, value, *_, out_shape=None, **__) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def _cache_bytes(config: Config, models: Models, outline: Outline) -> int:
    """Features of a photo: moments and mask in each direction, its crop's variants, one caption."""
    data, encoder = config.data, models.adapter.config.encoder
    shape = models.frozen.latent_shape(data.resolution, data.resolution)
    moments = 2 * torch.Size(shape).numel() + (data.resolution // models.frozen.cell) ** 2
    crops = max(data.augment_variants, 1 + data.mirrors_references)
    text = sum(value[0].numel() for value in outline.text(1).values()) * models.frozen.dtype.itemsize
    return 4 * moments * (1 + data.flip) + 4 * crops * encoder.tokens * encoder.width + text


def describe(config: Config, found: Estimate, photos: int | None) -> str:
    """The estimate for people, and on the last line as JSON."""

    def gb(size: float) -> str:
        return f"{size / GB:.2f} GB"

    lines = [f"assumed: {text}" for text in found.assumed]
    if config.loss.identity.active:
        lines.append("not counted: the identity loss")
    if config.data.cache is None:
        lines.append("not counted: the encoders, which run at every step (make a cache to be rid of them)")
    lines += [
        f"{found.samples[1]:,} samples, {found.samples[0]} in a pass; {found.trained / 1e6:.1f} M trained weights; "
        f"{found.operations / 1e12:.3f} TFLOP a sample",
        f"memory for each process: {gb(found.memory)} in tensors (frozen model {gb(found.host)}, adapter "
        f"{gb(found.adapter)}, optimiser {gb(found.optimiser)}, moving average {gb(found.average)}, gradients and "
        f"activations {gb(found.passes)}); on a GPU about {gb(found.gpu_memory)}",
        f"disk: {gb(found.checkpoints)} for checkpoints (train.keep={config.train.keep}, and one being written); cache "
        f"up to {found.cache_photo / 1e6:.2f} MB a photo"
        + ("" if photos is None else f", {gb(found.cache_photo * photos)} for {photos:,}"),
        f"time, at {EFFICIENCY:.0%} of the peak of {config.model.precision}:",
    ]
    hours = {}
    for name, gpu in GPUS.items():
        one = found.hours(gpu, config.model.precision)
        fits = found.gpu_memory <= gpu.memory * 2**30
        hours[name] = round(one, 2) if fits else None
        text = f"{one:8.1f} h on one, {one / 8:7.1f} h on eight" if fits else "    does not fit"
        lines.append(f"  {name:<11}{text}")
    if all(value is None for value in hours.values()):
        lines.append("lower train.batch_size or raise optimiser.accumulation, or set model.gradient_checkpointing=true")
    values = {"memory": found.memory, "gpu_memory": round(found.gpu_memory), "operations": round(found.operations)}
    values |= {"checkpoints": found.checkpoints, "cache_photo": found.cache_photo, "hours": hours}
    return "\n".join([*lines, json.dumps(values)])
