"""The variants of ``bench train``, each in a process of its own: it trains a round when told, and reports."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import cycle, islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

VARIANTS = ("plain", "uncached", "cached", "bare")
RESOLUTION = 256
Rounds = Callable[[Iterable[Any]], Iterator[Any]]


def memory(field: str) -> float:
    """``VmRSS`` or ``VmHWM`` of this process in MB; 0 where the system does not tell."""
    try:
        found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found.group(1)) / 1024 if found else 0.0
    except OSError:
        return 0.0


def forget_peak() -> None:
    """Give freed memory back and let the peak start from what is held now."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def import_libraries() -> None:
    """All that a run imports sooner or later, so that it counts for no variant."""
    import diffusers
    import transformers

    for library, names in (
        (diffusers, ("UNet2DConditionModel", "AutoencoderKL", "DDPMScheduler")),
        (transformers, ("CLIPTextModel", "CLIPVisionModel", "CLIPTokenizer")),
    ):
        for name in names:  # these libraries import a class when it is asked for
            getattr(library, name)


def in_rounds(
    batches: Iterable[Any], connection: Connection, steps: int, idle: float, more: dict[str, float] | None = None
) -> Iterator[Any]:
    """Batches in rounds of ``steps``: each begins when asked for, and is reported with its seconds and peak memory.

    Args:
        connection: to the process that asks.
        idle: memory of this process before anything was loaded, in MB.
        more: further numbers of a round, which the consumer adds to; reported and set back to 0 after each.
    """
    more = {} if more is None else more
    forget_peak()
    connection.send("ready")
    source = iter(batches)
    while connection.recv() == "go":
        began = time.perf_counter()
        for _ in range(steps):
            yield next(source)
        # The consumer comes back here when the last step of the round is done.
        connection.send({"seconds": time.perf_counter() - began, "peak": memory("VmHWM") - idle, **more})
        more.update(dict.fromkeys(more, 0.0))


def run_variant(name: str, connection: Connection, path: Path, mixed: bool, steps: int, threads: int) -> None:
    """Train with the configuration in a file until the process is ended."""
    import torch

    import_libraries()
    from trainer.config import Config
    from trainer.models.adapter import load_models
    from trainer.train import make_batches, read_records, release_encoders
    from trainer.training.adapter import adapter_trainer
    from trainer.training.processes import be_deterministic, make_accelerator

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rounds = partial(in_rounds, connection=connection, steps=steps, idle=memory("VmRSS"))
    config = Config.from_json(path.read_text())
    if name == "plain":
        return run_plain(config, mixed, rounds)
    output = path.parent / f"run-{name}"
    data = config.data if name != "uncached" else config.data.model_copy(update={"cache": None})
    train = config.train.model_copy(update={"output": str(output)})
    config = config.model_copy(update={"data": data, "train": train})
    output.mkdir()
    be_deterministic()
    accelerator = make_accelerator(config.train, config.model.precision)
    models = load_models(config, accelerator.device)
    _, batches = make_batches(config, accelerator, models, read_records(config))
    release_encoders(config, models)
    trainer = adapter_trainer(config, accelerator, models, lambda start: rounds(batches(start)))
    if name == "bare":
        run_bare(trainer, models, batches(0), rounds)
    trainer.run()


class SharedPrefix:
    """Counts the seconds that passes without gradient spend before a branch could make a difference: up to and with
    the first site's frozen block. That much of the frozen model's own prediction the trained pass computes again.

    Attributes:
        seconds: the sum so far, as ``prefix``; those of all passes without gradient as ``frozen pass``.
    """

    def __init__(self, models) -> None:
        import torch

        from feedface_core.hosts import match_sites

        self.seconds = {"prefix": 0.0, "frozen pass": 0.0}
        host, began = models.frozen.host, [0.0]

        def note(name: str) -> None:
            if not torch.is_grad_enabled():
                self.seconds[name] += time.perf_counter() - began[0]

        host.register_forward_pre_hook(lambda *_: began.__setitem__(0, time.perf_counter()))
        first = host.get_submodule(match_sites(models.adapter.config, host)[0].path)
        first.register_forward_hook(lambda *_: note("prefix"))
        host.register_forward_hook(lambda *_: note("frozen pass"))


def run_bare(trainer, models, batches: Iterable[Any], rounds: Rounds) -> None:
    """Forward, backward and optimiser, and nothing else; with the seconds of :class:`SharedPrefix`."""
    from trainer.training.step import encode_batch

    rounds = partial(rounds, more=SharedPrefix(models).seconds)
    step = trainer.accelerator.unwrap_model(trainer.step)
    prepared = [
        (batch, encode_batch(batch, models.frozen, models.encoder), step.plan(batch))
        for batch in islice(batches, 16)  # those of the cached run
    ]
    (optimiser,) = trainer.state.optimisers
    for batch, features, plan in rounds(cycle(prepared)):
        with trainer.accelerator.autocast():
            loss, _, _ = step.loss(batch, features, plan)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()


def run_plain(config, mixed: bool, rounds: Rounds) -> None:
    """The released trainer's step on this model, with everything that it computes and reads:

    photo, caption and face are encoded each time in fp32; a dropped face is a crop of zeros that is computed like any
    other; the frozen model's prediction is computed whether or not the loss contains it; the frozen model's weights
    require gradients, which nobody clears; three losses are read back from the device, and the processes wait.
    """
    import torch
    from torch.optim.lr_scheduler import LambdaLR

    from trainer.data.dataset import FaceDataset, TensorShapes, make_loader
    from trainer.data.manifest import read_manifest
    from trainer.data.order import GlobalBatches
    from trainer.models.adapter import load_models
    from trainer.training.processes import make_accelerator

    model = config.model.model_copy(update={"precision": "fp32"})
    loss = config.loss.model_copy(update={"face_dropout": 0.0, "text_dropout": 0.0})
    config = config.model_copy(update={"model": model, "loss": loss})
    accelerator = make_accelerator(config.train, "bf16" if mixed else "fp32")
    models = load_models(config, accelerator.device)
    frozen, adapter = models.frozen, models.adapter
    frozen.host.requires_grad_(True)
    records, _ = read_manifest(config.data.manifest)
    dataset = FaceDataset(records, config, TensorShapes.of(frozen, RESOLUTION))
    order = GlobalBatches(len(records), config.train.batch_size, 0, 10**6)
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=2e-5, betas=(0.9, 0.9), weight_decay=0.03)
    schedule = LambdaLR(optimiser, lambda step: min(step / 100, 1.0))

    def mean(squares: torch.Tensor) -> torch.Tensor:
        return squares.flatten(1).mean(1)  # (B,)

    for number, batch in enumerate(rounds(make_loader(dataset, order, config.data.workers))):
        with torch.no_grad():
            latents = frozen.sample_latents(frozen.encode_pixels(batch.pixels), batch.latent_noise)
            text = frozen.encode_text(batch.captions)
            crops = torch.zeros_like(batch.crops) if number % 10 == 9 else batch.crops
            hidden = models.encoder.encode(crops)  # (B, T, E), one reference each
        noisy = frozen.scheduler.add_noise(latents, batch.noise, batch.timesteps)
        with accelerator.autocast():
            rows = [(len(batch), adapter.control(adapter.project(hidden.float())))]
            prediction = frozen.predict(noisy, batch.timesteps, text, rows)
            with torch.no_grad():
                original = frozen.predict(noisy, batch.timesteps, text)
        difference = batch.noise - prediction
        value = mean(difference.square())
        if number % 10 != 4:
            outside = (original - prediction) * (1 - batch.masks)
            value = mean((difference * batch.masks).square()) + mean(outside.square())
        accelerator.backward(value.mean())
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        for part in (value, value, value):  # the whole, the picture's and the image token's
            accelerator.gather(part.detach().mean()).mean().item()
        accelerator.wait_for_everyone()
