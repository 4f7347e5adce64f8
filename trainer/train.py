"""``python -m trainer.train CONFIG [name=value …]``: train an adapter.

One process or several under ``accelerate launch`` or ``torchrun``; started again on the same output folder it
goes on where it stopped. A signal writes a checkpoint and stops: see :mod:`trainer.training.stopping`.
"""

from __future__ import annotations

from .training.stopping import StopRequest  # before what takes seconds to import: it remembers who started this process

# isort: split
import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch.nn.attention import SDPBackend, sdpa_kernel

from .config import Config
from .data.batch import Batch
from .data.dataset import FaceDataset, TensorShapes, make_loader
from .data.features import find_cache, open_cache
from .data.manifest import Record, common_rule, read_manifest
from .data.order import GlobalBatches
from .errors import TrainerError
from .fields import as_path, make_folder
from .training.build import Parts, SetupError, build_parts
from .training.checkpoint import CheckpointError, RunLock, RunLocked
from .training.metrics import TrainingDiverged
from .training.processes import MainProcessFailed, make_accelerator, on_main
from .training.trainer import Trainer

if TYPE_CHECKING:
    from .training.validation import Validation

logger = logging.getLogger("trainer")

#: What goes wrong with the input; anything else is a defect and shows its traceback.
EXPECTED = (TrainerError, SetupError, CheckpointError, RunLocked, TrainingDiverged, MainProcessFailed)


def parse(arguments: Sequence[str] | None = None) -> Config:
    """The configuration that a command line names.

    Raises:
        TrainerError: see :meth:`Config.load`.
    """
    parser = argparse.ArgumentParser(
        prog="python -m trainer.train",
        description="Train a face adapter.",
        epilog="settings:\n" + Config.describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", dest="option", help="the YAML file, if it does not come first")
    parser.add_argument("values", nargs="*", metavar="CONFIG | name=value", help="YAML file, then settings")
    options = parser.parse_args(arguments)
    values = list(options.values)
    path = options.option
    if path is None and values and "=" not in values[0]:
        path = values.pop(0)
    if path is None:
        parser.error("give a configuration, such as trainer/configs/sd15.yaml")
    return Config.load(path, values)


def be_deterministic(config: Config) -> None:
    """Deterministic kernels, so that a resumed run is bit-identical."""
    if not config.train.deterministic:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written


def lock(config: Config) -> RunLock:
    """The lock on the output folder, which is made if it is not there.

    Raises:
        TrainerError: a folder that cannot be written to.
        RunLocked: another run is writing to it.
    """
    output = make_folder(config.train.output, "train.output")
    try:
        return RunLock(output)
    except OSError as error:
        raise TrainerError(f"train.output {output}: cannot be locked ({error})") from error


def check_files(config: Config) -> None:
    """Raises ``TrainerError`` for files that would be missed only after the models are loaded."""
    shown = config.validation.references if config.train.validate_every is not None else []
    named = [("validation.references", path) for path in shown]
    if config.adapter.init is not None:
        named.append(("adapter.init", config.adapter.init))
    for setting, path in named:
        if not os.path.isfile(as_path(path, setting)):
            raise TrainerError(f"{setting}: {path}: no such file")
    if config.data.cache is not None:
        find_cache(config)


def read_records(config: Config) -> list[Record]:
    """The photos of the run.

    Raises:
        TrainerError: photos that cannot be used.
    """
    records, dropped = read_manifest(config.data.manifest, config.data.root, config.data.drop_missing)
    for line in dropped[:5]:
        logger.warning("left out: %s", line)
    logger.info("%d photos%s", len(records), f", {len(dropped)} rows left out" if dropped else "")
    return records


def make_batches(
    config: Config, accelerator: Accelerator, parts: Parts, records: Sequence[Record]
) -> tuple[FaceDataset, Callable]:
    """The samples, and a function from the first step to the batches of this process.

    Raises:
        TrainerError: cached features that cannot be used.
    """
    cache = None
    if config.data.cache is not None:
        cache = open_cache(config, records, parts.base, parts.encoder)
    dataset = FaceDataset(records, config, TensorShapes.of(parts.base, config.data.resolution), cache)

    def batches(start: int) -> Iterator[Batch]:
        order = GlobalBatches(
            len(dataset),
            config.train.batch_size,
            config.train.seed,
            config.train.steps,
            start=start,
            repeat=config.data.repeat,
            accumulation=config.optimiser.accumulation,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
        )
        return iter(make_loader(dataset, order, config.data.workers, accelerator.device.type == "cuda"))

    return dataset, batches


def make_validation(
    config: Config, accelerator: Accelerator, parts: Parts, dataset: FaceDataset, stop: StopRequest
) -> Validation | None:
    """What makes validation pictures on the main process; None on the others, or when there are to be none."""
    if config.train.validate_every is None:
        return None
    from .training.validation import Validation

    return on_main(accelerator, lambda: Validation(config, parts, dataset, accelerator, lambda: stop.requested))


def release_encoders(config: Config, parts: Parts) -> None:
    """Free what a cached run does not need: text encoders, and without validation the autoencoder as well."""
    if config.data.cache is None:
        return
    parts.base.release("text")
    parts.encoder.release()
    if config.train.validate_every is None:
        parts.base.release("autoencoder")


def train(config: Config) -> bool:
    """Train as configured; whether all steps are done."""
    accelerator = make_accelerator(config)
    logging.getLogger().setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    be_deterministic(config)
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        on_main(accelerator, lambda: stack.enter_context(lock(config)))
        if config.model.attention == "plain":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        records = read_records(config)
        rule = common_rule(records)
        check_files(config)
        parts = build_parts(config, accelerator.device, rule)
        dataset, batches = make_batches(config, accelerator, parts, records)
        validation = make_validation(config, accelerator, parts, dataset, stop)
        release_encoders(config, parts)
        if config.train.tracker != "none":
            accelerator.init_trackers("tensorboard" if config.train.tracker == "tensorboard" else "feedface")
        trainer = Trainer(config, accelerator, parts, batches, validation, dataset.described(), lambda: stop.requested)
        stop.listen(trainer.save_beside)
        count = sum(value.numel() for value in trainer.parameters.values())
        logger.info(
            "%s: %d branches, %.1f M trained parameters; step %d of %d; %d process(es)",
            parts.base.family,
            len(parts.adapter.branches),
            count / 1e6,
            trainer.done,
            config.train.steps,
            accelerator.num_processes,
        )
        finished = trainer.run()
        accelerator.end_training()
    told = "done" if finished else "stopped"
    logger.info(
        "%s at step %d. Write the adapter with: python -m trainer.export %s", told, trainer.done, config.train.output
    )
    return finished


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 when trained or stopped on request, 1 for an error of the input."""
    from .models.face_encoder import EncoderError
    from .models.frozen_model import BaseError

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    try:
        train(parse(arguments))
    except (*EXPECTED, BaseError, EncoderError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
