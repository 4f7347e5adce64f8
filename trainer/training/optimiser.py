"""The optimiser that the settings name, what it keeps beside tensors, and a learning-rate schedule without state."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from feedface_core.errors import shorten

from ..config import OptimiserSettings
from ..errors import TrainerError

#: Short names: where the class is, and what installs it.
KNOWN = {
    "adamw": ("torch.optim.AdamW", "torch"),
    "adamw8bit": ("bitsandbytes.optim.AdamW8bit", "bitsandbytes"),
    "prodigy": ("prodigyopt.Prodigy", "prodigyopt"),
}


def find_optimiser(name: str) -> type[Optimizer]:
    """The class that ``optimiser.name`` names.

    Raises:
        TrainerError: nothing of that name is installed, or it is no optimiser that steps on gradients alone.
    """
    path, package = KNOWN.get(name, (name if "." in name else f"torch.optim.{name}", name.split(".")[0]))
    module, _, attribute = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        known = ", ".join(sorted(one for one in dir(torch.optim) if _is_optimiser(getattr(torch.optim, one))))
        hint = f"pip install {package}" if name in KNOWN or "." in name else f"torch.optim has {known}"
        raise TrainerError(f"optimiser.name: there is no {shorten(name)} here ({shorten(error)}); {hint}") from error
    if not _is_optimiser(found):
        raise TrainerError(f"optimiser.name: {shorten(path)} is no optimiser of torch's kind")
    if found is torch.optim.LBFGS or found is torch.optim.SparseAdam:
        raise TrainerError(f"optimiser.name: {found.__name__} does not step on one dense gradient")
    return found


def _is_optimiser(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, Optimizer) and found is not Optimizer


def make_optimiser(parameters: Iterable[nn.Parameter], settings: OptimiserSettings) -> Optimizer:
    """The optimiser over the trained parameters. Norms, biases and null tokens are not decayed.

    It gets those of ``lr``, ``betas``, ``eps``, ``weight_decay`` and (AdamW of torch) ``fused`` that it takes.

    Raises:
        TrainerError: an optimiser that is not installed, or does not take the options.
    """
    cls = find_optimiser(settings.name)
    taken = inspect.signature(cls).parameters
    values = {name: getattr(settings, name) for name in ("lr", "betas", "eps", "weight_decay") if name in taken}
    if "eps" in values and not isinstance(taken["eps"].default, float):  # Adafactor's are two thresholds
        del values["eps"]
    if cls is torch.optim.AdamW:
        values["fused"] = settings.fused
    if odd := sorted(settings.options.keys() - taken.keys() | settings.options.keys() & {"params", "lr"}):
        raise TrainerError(
            f"optimiser.options: {cls.__name__} takes no {shorten(odd[0])} there; it takes "
            f"{', '.join(name for name in taken if name not in ('params', 'lr'))}"
        )
    decayed, others = [], []
    for value in parameters:
        (decayed if value.dim() == 2 else others).append(value)
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    if "weight_decay" not in taken:
        groups = [{"params": decayed + others}]
    try:
        return cls([group for group in groups if group["params"]], **values, **settings.options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TrainerError(f"optimiser.name={settings.name}: {shorten(error)}; see optimiser.options") from error


def plain_values(optimiser: Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
    """What an optimiser keeps that is no tensor, as JSON values: its class, and what it has found out for each group
    and for each parameter by name. What it was constructed with is left to the settings."""

    def plain(values: Mapping[str, Any], without: Iterable[str] = ()) -> dict[str, Any]:
        kinds = (bool, int, float, str, type(None))
        return {key: value for key, value in values.items() if key not in without and isinstance(value, kinds)}

    given = inspect.signature(type(optimiser)).parameters
    return {
        "class": type(optimiser).__name__,
        "groups": [plain(group, given) for group in optimiser.param_groups],
        "parameters": {names[one]: plain(values) for one, values in optimiser.state.items() if plain(values)},
    }


def state_bytes(settings: OptimiserSettings) -> float:
    """Bytes of state for each trained number, measured on a matrix of 128 × 128 on the CPU.

    Raises:
        TrainerError: as :func:`make_optimiser`.
    """
    weight = nn.Parameter(torch.ones(128, 128))
    optimiser = make_optimiser([weight], settings.model_copy(update={"fused": False}))
    weight.grad = torch.ones_like(weight)
    optimiser.step()
    tensors = [value for value in optimiser.state[weight].values() if isinstance(value, torch.Tensor)]
    return sum(value.nbytes for value in tensors if value.numel() > 512) / weight.numel()  # 512: tables of codes


def learning_rate(step: int, steps: int, settings: OptimiserSettings) -> float:
    """Learning rate of optimiser step ``step`` (from 0): a function of the step alone, whatever the number of
    processes, so there is nothing to save and nothing that runs too fast.

    Linear warm-up that reaches ``lr`` at step ``warmup_steps``, then constant, linear to 0 or half a cosine to 0.
    """
    warmup = min(1.0, (step + 1) / (settings.warmup_steps + 1))
    done = (step - settings.warmup_steps) / max(steps - settings.warmup_steps, 1)
    done = min(max(done, 0.0), 1.0)
    shape = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return settings.lr * warmup * shape[settings.schedule]
