"""Which number format a base computes in, on processors with and without bfloat16 arithmetic."""

from __future__ import annotations

import logging
import platform

import pytest
import torch

from tools.tiny_diffusers import make_base
from trainer.config import ModelSettings
from trainer.models.frozen_model import COMPONENTS, load_frozen_model
from trainer.models.precision import computes_bf16, cpu_autocast, fastest_precision, warn_of_slow

ASKED = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


def processor(monkeypatch: pytest.MonkeyPatch, *has: bool | None) -> None:
    """A processor that has, or lacks, what each of ``ASKED`` is about; None: this torch cannot tell."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for name, answer in zip(ASKED, has, strict=True):
        if answer is None:
            monkeypatch.delattr(torch.cpu, name, raising=False)
        else:
            monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer, raising=False)


@pytest.mark.parametrize("has", [(True, False), (False, True), (True, None), (False, False), (None, None)])
def test_bf16_is_taken_only_where_the_processor_computes_in_it(monkeypatch, has):
    processor(monkeypatch, *has)
    assert computes_bf16() is any(has)
    assert fastest_precision() == ("bf16" if any(has) else "fp32")
    with cpu_autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if any(has) else torch.float32)


def test_an_arm_processor_is_asked_in_its_own_way(monkeypatch):
    processor(monkeypatch, True, True)
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert computes_bf16() is torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.parametrize(
    ("precision", "native", "components", "warned"),
    [
        ("bf16", False, COMPONENTS, True),
        ("bf16", True, COMPONENTS, False),
        ("fp32", False, COMPONENTS, False),
        ("bf16", False, ("autoencoder", "text"), False),
    ],
)
def test_a_base_that_is_slow_here_is_said_to_be(tmp_path, monkeypatch, caplog, precision, native, components, warned):
    make_base(tmp_path, "sd1")
    processor(monkeypatch, native, native)
    with caplog.at_level(logging.WARNING):
        load_frozen_model(ModelSettings(base=str(tmp_path), precision=precision), components=components)
    assert ("model.precision=fp32" in caplog.text) is warned


def test_a_gpu_that_emulates_bf16_wants_fp16(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    with caplog.at_level(logging.WARNING):
        warn_of_slow("bf16", "cuda:0")
    assert "(cuda)" in caplog.text and "model.precision=fp16" in caplog.text
