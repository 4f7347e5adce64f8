"""AdamW with a stateless learning-rate schedule, its state by parameter name, and a moving average of the
weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..config import OptimiserSettings

Named = Mapping[str, nn.Parameter]


def make_optimiser(parameters: Named, settings: OptimiserSettings) -> torch.optim.AdamW:
    """AdamW over the trained parameters. Norms, biases and null tokens are not decayed."""
    decayed = [value for value in parameters.values() if value.dim() == 2]
    others = [value for value in parameters.values() if value.dim() != 2]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=settings.fused,
    )


def learning_rate(step: int, steps: int, settings: OptimiserSettings) -> float:
    """Learning rate of optimiser step ``step`` (from 0): a function of the step alone, whatever the number of
    processes, so there is nothing to save and nothing that runs too fast.

    Linear warm-up that reaches ``lr`` at step ``warmup_steps``, then constant, linear to 0 or half a cosine
    to 0.
    """
    warmup = min(1.0, (step + 1) / (settings.warmup_steps + 1))
    done = (step - settings.warmup_steps) / max(steps - settings.warmup_steps, 1)
    done = min(max(done, 0.0), 1.0)
    shape = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return settings.lr * warmup * shape[settings.schedule]


def set_learning_rate(optimiser: torch.optim.Optimizer, value: float) -> None:
    """Give every group this learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = value


def optimiser_tensors(optimiser: torch.optim.Optimizer, parameters: Named) -> dict[str, Tensor]:
    """The state of each parameter, ``<state>.<parameter name>`` → tensor."""
    return {
        f"{key}.{name}": value
        for name, parameter in parameters.items()
        for key, value in optimiser.state.get(parameter, {}).items()
    }


def load_optimiser_tensors(optimiser: torch.optim.Optimizer, parameters: Named, tensors: Mapping[str, Tensor]) -> None:
    """Put back what :func:`optimiser_tensors` gave.

    Raises:
        ValueError: for a parameter that has no state, or state of no parameter.
    """
    own: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        key, _, parameter = name.partition(".")
        own.setdefault(parameter, {})[key] = tensor
    if own and own.keys() != parameters.keys():
        odd = sorted(own.keys() ^ parameters.keys())
        raise ValueError(f"the optimiser's state does not fit the trained parameters: {', '.join(odd[:3])}")
    for name, states in own.items():
        parameter = parameters[name]
        # A step count is a single number, kept as it is; running means follow their parameter.
        optimiser.state[parameter] = {
            key: value.to(parameter.device if value.dim() or optimiser.defaults.get("fused") else "cpu")
            for key, value in states.items()
        }


class MovingAverage:
    """Exponential moving average of the trained weights, float32.

    ``average ← d·average + (1 − d)·weights`` after each optimiser step, with
    ``d = min(decay, (1 + step) / (10 + step))`` so that the random start is forgotten quickly.
    """

    def __init__(self, parameters: Named, decay: float):
        self.decay = decay
        self.values = {name: value.detach().clone().float() for name, value in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Named, step: int) -> None:
        """Take in the weights after optimiser step ``step`` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = list(self.values.values())
        torch._foreach_lerp_(averages, [parameters[name].detach().float() for name in self.values], 1.0 - decay)

    @contextmanager
    def applied(self, parameters: Named) -> Iterator[None]:
        """Within it, the parameters hold the averages."""
        kept = {name: value.detach().clone() for name, value in parameters.items()}
        try:
            for name, value in self.values.items():
                parameters[name].data.copy_(value)
            yield
        finally:
            for name, value in kept.items():
                parameters[name].data.copy_(value)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back saved averages. Raises ``ValueError`` for other names."""
        if tensors.keys() != self.values.keys():
            raise ValueError("the moving average in the checkpoint is of other weights")
        for name, value in tensors.items():
            self.values[name].copy_(value)
