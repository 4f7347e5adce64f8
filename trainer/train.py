"""``python -m trainer.train CONFIG [name=value …]``: train an adapter; with ``--plan`` say what it will cost.

One process or several under ``accelerate launch`` or ``torchrun``; started again on the same output folder it goes on
where it stopped. A signal writes a checkpoint and stops: see :mod:`trainer.training.stopping`.
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
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch.nn.attention import SDPBackend, sdpa_kernel

from feedface_core.modules.likeness import EncoderLikeness

from .config import Config
from .config.fields import as_path, make_folder
from .data.batch import Batch
from .data.buckets import BucketedBatches, Buckets, parts_by_bucket
from .data.dataset import FaceDataset, TensorShapes, make_loader
from .data.held_out import split
from .data.manifest_index import IndexedRecords, open_manifest
from .data.mixture import MixedBatches, count_rows, parts_of
from .data.order import GlobalBatches
from .data.records import common_rule
from .data.shards import open_records
from .errors import TrainerError, exit_code
from .models.adapter import Models, load_models
from .models.feature_cache import find_cache, open_cache
from .models.pack import open_shards
from .training.adapter import adapter_trainer
from .training.checkpoint import run_lock
from .training.folder import describe_run
from .training.held_out import HeldOutLoss
from .training.processes import be_deterministic, end_processes, make_accelerator, on_main

logger = logging.getLogger("trainer")


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
    parser.add_argument(
        "--plan", action="store_true", help="say what the run will cost in memory, time and disk, and end"
    )
    parser.add_argument("values", nargs="*", metavar="CONFIG | name=value", help="YAML file, then settings")
    options = parser.parse_args(arguments)
    values = list(options.values)
    path = options.option
    if path is None and values and "=" not in values[0]:
        path = values.pop(0)
    if path is None:
        parser.error("give a configuration, such as trainer/configs/sd15.yaml")
    return Config.load(path, values)


def check_files(config: Config) -> None:
    """Raises ``TrainerError`` for files that would be missed only after the models are loaded."""
    wanted = config.validation.references if config.train.validate_every is not None else []
    named = [("validation.references", path) for path in wanted]
    if config.adapter.init is not None:
        named.append(("adapter.init", config.adapter.init))
    if config.loss.identity.active and config.loss.identity.path is not None:
        named.append(("loss.identity.path", config.loss.identity.path))
    for setting, path in named:
        if not as_path(path, setting).is_file():
            raise TrainerError(f"{setting}: {path}: no such file")
    if config.data.shards is not None:
        check_without_photos(config)
    elif config.data.cache is not None:
        find_cache(config)


def check_without_photos(config: Config) -> None:
    """Raises ``TrainerError`` for settings that need photos, which shards do not hold."""
    if config.train.validate_every is not None and not config.validation.references:
        raise TrainerError(
            "validation.references is empty, and data.shards hold no photos to take faces from: name some photos, or "
            "set train.validate_every=null"
        )
    if config.loss.identity.sees_crops:
        raise TrainerError(
            "data.shards hold no face crops, which loss.identity with a recogniser of its own has to see: train with "
            "data.cache and the photos"
        )


def read_records(config: Config) -> IndexedRecords:
    """The photos of the run, by an index that lies in ``data.shards``, ``data.cache`` or ``train.output``.

    Raises:
        TrainerError: photos that cannot be used.
    """
    data, folders = config.data, [Path(config.train.output)]
    if data.shards is not None:
        records = open_records(data.shards, folders[0])
        logger.info("%d photos in shards", len(records))
        return records
    if data.cache is not None:
        folders.insert(0, Path(data.cache).expanduser())
    records = open_manifest(data.manifest, data.root, data.drop_missing, folders)
    for line in records.dropped:
        logger.warning("left out: %s", line)
    left_out = ""
    if records.dropped_count:
        left_out = f", {records.dropped_count} rows left out when {records.folder} was made (delete it to look again)"
    logger.info("%d photos%s", len(records), left_out)
    return records


def make_batches(
    config: Config,
    accelerator: Accelerator,
    models: Models,
    records: IndexedRecords,
    held_out: Sequence[Any] | None = None,
) -> tuple[FaceDataset, Callable[[int], Iterator[Batch]]]:
    """The samples, and a function from the first step to the batches of this process.

    Args:
        held_out: from :func:`~trainer.data.held_out.split`.

    Raises:
        TrainerError: cached features that cannot be used.
    """
    cache = None
    if config.data.shards is not None:
        cache = open_shards(config, records, models.frozen, models.encoder)
    elif config.data.cache is not None:
        cache = open_cache(config, records, models.frozen, models.encoder)
    shapes = TensorShapes.of(models.frozen, config.data.resolution, Buckets.of(config.data))
    dataset = FaceDataset(records, config, shapes, cache)
    if held_out is not None:
        dataset.chosen = held_out[0]

    order = partial(
        GlobalBatches,
        len(dataset.chosen),
        config.train.batch_size,
        config.train.seed,
        config.train.steps,
        repeat=config.data.repeat,
        accumulation=config.optimiser.accumulation,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        samples=None if held_out is None else dataset.chosen,
    )
    if config.data.bucket_step is not None:
        order = partial(
            BucketedBatches, *order.args, **order.keywords, parts=parts_by_bucket(dataset.bucket_of, dataset.chosen)
        )
    if config.data.weights is not None:
        parts = parts_of(count_rows(config.data, len(records)), dataset.chosen)
        order = partial(MixedBatches, *order.args, **order.keywords, parts=parts, weights=tuple(config.data.weights))
    order()  # what is wrong with it shows before long work

    def batches(start: int) -> Iterator[Batch]:
        return iter(make_loader(dataset, order(start=start), config.data.workers, accelerator.device.type == "cuda"))

    return dataset, batches


def release_encoders(config: Config, models: Models) -> None:
    """Free what a cached run does not need: text encoders, and the autoencoder and the face encoder as well unless
    validation or the identity loss uses them."""
    if config.data.holds_features:
        decodes = config.train.validate_every is not None or config.loss.identity.active
        models.frozen.release("text", *([] if decodes else ["autoencoder"]))
        if not isinstance(models.recogniser, EncoderLikeness):
            models.encoder.release()


def train(config: Config) -> bool:
    """Train as configured; whether all steps are done."""
    accelerator = make_accelerator(config.train, config.model.precision, config.optimiser.accumulation)
    logging.getLogger().setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    step = _train(config, accelerator)
    end_processes(accelerator)
    finished = step >= config.train.steps
    how = "done" if finished else "stopped"
    advice = f"Write the adapter with: python -m trainer.export {config.train.output}"
    logger.info("%s at step %d. %s", how, step, advice)
    return finished


def _train(config: Config, accelerator: Accelerator) -> int:
    """The steps that are done at the end. All that was made for it is gone afterwards."""
    if config.train.deterministic:
        be_deterministic()
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        output = make_folder(config.train.output, "train.output")
        on_main(accelerator, lambda: stack.enter_context(run_lock(output)))
        if config.model.attention == "plain":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        records = read_records(config)
        rule = common_rule(records)
        check_files(config)
        models = load_models(config, accelerator.device, rule)
        held_out = split(records, config.data.held_out) if config.data.held_out else None
        dataset, batches = make_batches(config, accelerator, models, records, held_out)
        validation = None
        if config.train.validate_every is not None:
            from .training.validation import Validation

            make = lambda: Validation(config, models, dataset, accelerator, lambda: stop.requested)  # noqa: E731
            validation = on_main(accelerator, make)
        measure = None
        if held_out is not None:
            logger.info("%d photos to train on, %d of people held out", *map(len, held_out))
            measure = on_main(accelerator, lambda: HeldOutLoss(config, models, dataset, held_out[1], accelerator))
        release_encoders(config, models)
        if config.train.tracker != "none":
            accelerator.init_trackers("tensorboard" if config.train.tracker == "tensorboard" else "feedface")
        described = dataset.described()
        trainer = adapter_trainer(config, accelerator, models, batches, validation, described, stop, measure)
        facts = len(models.adapter.branches), described, trainer.state.done, accelerator.num_processes
        on_main(accelerator, lambda: describe_run(output, config, *facts))
        logger.info(
            "%s: %d branches, %.1f M trained parameters; step %d of %d; %d process(es)",
            models.frozen.family,
            len(models.adapter.branches),
            sum(value.numel() for value in trainer.state.parameters.values()) / 1e6,
            trainer.state.done,
            config.train.steps,
            accelerator.num_processes,
        )
        trainer.run()
        return trainer.state.done


def plan(config: Config) -> None:
    """Print what the run will cost. Neither weights nor photos have to be there."""
    from .data.manifest import read_rows
    from .training.plan import describe, estimate

    manifests = [config.data.manifest] if isinstance(config.data.manifest, str) else config.data.manifest
    paths = [as_path(path, "data.manifest") for path in manifests]
    photos = sum(len(read_rows(path)) for path in paths) if all(path.is_file() for path in paths) else None
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    print(describe(config, estimate(config, processes), photos))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 when trained or stopped on request, 1 for an error of the input."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    arguments = sys.argv[1:] if arguments is None else arguments
    action = plan if "--plan" in arguments else train
    return exit_code(lambda: action(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
