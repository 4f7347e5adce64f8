"""Optimisers by name: what they get from the settings, what they keep, and what is refused."""

from __future__ import annotations

import pytest
from torch import nn

from trainer.config import Config, OptimiserSettings
from trainer.errors import TrainerError
from trainer.training.optimiser import make_optimiser, state_bytes


def parameters() -> list[nn.Parameter]:
    return [*nn.Linear(4, 4).parameters()]


def test_settings_reach_those_that_take_them():
    values = {"lr": 0.5, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.2}
    first, second = make_optimiser(parameters(), OptimiserSettings(name="NAdam", **values)).param_groups
    assert {name: first[name] for name in values} == values
    assert second["weight_decay"] == 0.0 and second["params"][0].dim() == 1
    (only,) = make_optimiser(parameters(), OptimiserSettings(name="Rprop", fused=False)).param_groups
    assert len(only["params"]) == 2  # it knows no decay
    assert make_optimiser(parameters(), OptimiserSettings()).defaults["fused"] is True


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "AdamWW"}, r"optimiser.name: there is no 'AdamWW' here.*torch.optim has .*NAdam"),
        ({"name": "nothing.of.this.Kind"}, r"there is no 'nothing.of.this.Kind' here.*pip install nothing"),
        ({"name": "torch.nn.Linear"}, "is no optimiser of torch's kind"),
        ({"name": "Optimizer"}, "is no optimiser of torch's kind"),
        ({"name": "LBFGS"}, "LBFGS does not step on one dense gradient"),
        ({"options": {"amsgradd": True}}, "AdamW takes no 'amsgradd' there; it takes .*amsgrad"),
        ({"options": {"lr": 1.0}}, "AdamW takes no 'lr' there"),
        ({"name": "SGD", "options": {"momentum": "much"}}, "optimiser.name=SGD: "),
    ],
)
def test_refused(values, message):
    with pytest.raises(TrainerError, match=message):
        make_optimiser(parameters(), OptimiserSettings(**values))


def test_bytes_of_state():
    assert state_bytes(OptimiserSettings()) == 8.0
    assert state_bytes(OptimiserSettings(name="SGD")) == 0.0
    assert state_bytes(OptimiserSettings(name="Adafactor")) < 0.1


def test_prodigy_keeps_four_numbers_a_weight():
    pytest.importorskip("prodigyopt")
    assert state_bytes(OptimiserSettings(name="prodigy")) == 16.0


def test_adamw_in_eight_bits():
    pytest.importorskip("bitsandbytes")
    assert state_bytes(OptimiserSettings(name="adamw8bit")) == pytest.approx(2.0, abs=0.1)


def test_options_come_from_the_command_line(tmp_path):
    required = ["model.base=a", "adapter.encoder.path=b", "data.manifest=c", "train.output=d"]
    config = Config.load(None, [*required, "optimiser.name=prodigy", "optimiser.options.d_coef=0.5"])
    assert config.optimiser.options == {"d_coef": 0.5} and Config.from_json(config.to_json()) == config
