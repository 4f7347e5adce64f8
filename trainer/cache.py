"""Features of the frozen models, computed once: moments of the photos, text states, hidden states of the face crops.

    python -m trainer.cache trainer/configs/sd15.yaml
    accelerate launch -m trainer.cache trainer/configs/sd15.yaml data.cache=dataset/cache --prune

Photos and crops are encoded both ways round (``data.flip``), captions once each, and the crop of a person with one
photo in ``data.augment_variants`` augmented ways. Run again after anything changed: only what is missing is computed.
``--shards FOLDER`` writes records and features together, for training from one folder or address at any size.
Training with a cache needs neither photos nor encoders; it stops if the cache does not belong to its models, settings
and photos.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import Config
from .config.fields import make_folder
from .data.manifest_index import IndexedRecords, open_manifest
from .data.records import common_rule
from .errors import TrainerError, exit_code, first_of
from .models.face_encoder import FaceEncoder, load_face_encoder
from .models.feature_cache import FeatureCache
from .models.features import Features
from .models.frozen_model import FrozenModel, load_frozen_model
from .models.pack import PHOTOS, Packer

if TYPE_CHECKING:
    from accelerate import PartialState

logger = logging.getLogger(__name__)


@dataclass
class CacheSummary:
    """What a run of the cache did.

    Args:
        computed, found: features by kind, over all processes.
        empty_masks, full_masks: photos whose mask is all zero or all one inside the training square.
        unreadable: photos that cannot be encoded, by id, with the reason.
    """

    computed: dict[str, int] = field(default_factory=dict)
    found: dict[str, int] = field(default_factory=dict)
    empty_masks: list[str] = field(default_factory=list)
    full_masks: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)

    def note_mask(self, features: Features, item: Any, tensors: Mapping[str, Tensor]) -> None:
        """Name a photo whose mask says nothing."""
        if features.kind == "picture" and not item[1] and tensors["mask"].max() == 0:
            self.empty_masks.append(features.name(item))
        elif features.kind == "picture" and not item[1] and tensors["mask"].min() == 1:
            self.full_masks.append(features.name(item))


def fill_cache(
    cache: FeatureCache,
    config: Config,
    base: FrozenModel,
    encoder: FaceEncoder,
    process: int = 0,
    processes: int = 1,
    progress: bool = True,
) -> CacheSummary:
    """Compute and write the features that are missing.

    Args:
        cache: of the run.
        config: says how many are encoded at once, and how many loader processes read.
        base: with its autoencoder and text encoder.
        encoder: of the faces.
        process, processes: this one computes its share of the features.

    Raises:
        TrainerError: if the disk is full.
    """
    from tqdm import tqdm

    if process == 0:
        cache.hashes.save()
    summary = CacheSummary()
    for kind, features in cache.items():
        missing = features.missing()
        summary.computed[kind] = len(missing)
        summary.found[kind] = len(set(features.keys.values())) - len(missing)
        # By the key itself: processes that start at different times see different features missing.
        mine = {key: item for key, item in missing.items() if int(key[:8], 16) % processes == process}
        with tqdm(total=len(mine), desc=kind, disable=None if progress and mine else True) as bar:
            for key, item, tensors, reason in features.encode_all(mine, config.data, base, encoder):
                bar.update()
                if tensors is None:
                    summary.unreadable[features.name(item)] = reason
                    continue
                features.add(key, tensors)
                summary.note_mask(features, item, tensors)
        features.flush()
    return summary


def _start(config: Config, folder: Path) -> tuple[PartialState, IndexedRecords, FrozenModel, FaceEncoder]:
    """This process among the others, all photos, and the frozen models that encode."""
    from accelerate import PartialState

    # Without being told so, accelerate runs several processes on the CPU as if each were alone.
    timeout = timedelta(minutes=config.train.timeout_minutes)
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timeout)
    records = open_manifest(config.data.manifest, config.data.root, config.data.drop_missing, [folder])
    if records.dropped_count:
        logger.warning("left out:%s", first_of(records.dropped, records.dropped_count))
    common_rule(records)  # what training would refuse later
    base = load_frozen_model(config.model, state.device, ("autoencoder", "text"))
    return state, records, base, load_face_encoder(config.adapter.encoder, state.device, config.model.allow_hub)


def make_cache(config: Config, prune: bool = False, progress: bool = True) -> CacheSummary:
    """Load the frozen models and compute what is missing, in each process of ``accelerate launch``.

    Raises:
        TrainerError: for models and manifests that cannot be used; for photos that cannot be read, after all others
            are done; or if the disk is full.
    """
    if config.data.cache is None:
        raise TrainerError("data.cache is null: give the folder of the cache, such as data.cache=dataset/cache")
    state, records, base, encoder = _start(config, make_folder(config.data.cache, "data.cache"))
    with state.main_process_first():  # which hashes the files; the others find its hashes
        cache = FeatureCache(config, records, base, encoder)
        if state.is_main_process:
            cache.hashes.save()
    state.wait_for_everyone()
    share = state.process_index, state.num_processes
    summary = fill_cache(cache, config, base, encoder, *share, progress and state.is_main_process)
    state.wait_for_everyone()
    if state.is_main_process:
        for features in cache.values():
            features.read_index()  # other processes have written since
        stale = [path for features in cache.values() for path in features.unused()]
        while prune and stale:
            stale.pop().unlink(missing_ok=True)
        print(report(summary, cache.folder, stale))
    _refuse_unreadable(summary)
    return summary


def make_shards(config: Config, folder: str | Path, photos: int = PHOTOS, progress: bool = True) -> CacheSummary:
    """Load the frozen models and write the shards that are missing, in each process of ``accelerate launch``.

    Args:
        folder: of the shards.
        photos: the most in one shard.

    Raises:
        TrainerError: as :func:`make_cache`.
    """
    from tqdm import tqdm

    folder = make_folder(folder, "--shards")
    state, records, base, encoder = _start(config, make_folder(folder / "files", "--shards"))
    packer, summary = Packer(config, records, base, encoder, folder, photos), CacheSummary({"shards": 0}, {"shards": 0})
    mine = range(state.process_index, packer.count, state.num_processes)
    for number in tqdm(mine, "shards", disable=None if progress and state.is_main_process else True):
        written, unreadable, encoded = packer.write(number)
        if not unreadable:
            (summary.computed if written else summary.found)["shards"] += 1
        summary.unreadable |= unreadable
        for features, item, tensors in encoded:
            summary.note_mask(features, item, tensors)
    state.wait_for_everyone()
    _refuse_unreadable(summary)
    if state.is_main_process:
        packer.finish()
        print(report(summary, folder))
    state.wait_for_everyone()
    return summary


def _refuse_unreadable(summary: CacheSummary) -> None:
    if summary.unreadable:
        reasons = [f"{name}: {reason}" for name, reason in summary.unreadable.items()]
        raise TrainerError(
            f"{len(reasons)} photo(s) or masks cannot be read; take them out of the manifest:{first_of(reasons)}"
        )


def report(summary: CacheSummary, folder: Path, stale: Sequence[Path] = ()) -> str:
    """The summary as lines."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    lines = [
        f"{kind:<8} {count:>8} computed {summary.found[kind]:>8} found" for kind, count in summary.computed.items()
    ]
    lines.append(f"{folder}: {size / 2**20:.1f} MiB")
    for what, names in (("empty", summary.empty_masks), ("full", summary.full_masks)):
        if names:
            lines.append(f"{len(names)} photo(s) with an {what} mask, trained as without one: {', '.join(names[:3])}")
    if stale:
        unused = sum(path.stat().st_size for path in stale)
        lines.append(f"{len(stale)} shard(s), {unused / 2**20:.1f} MiB, belong to other settings; --prune deletes them")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 when the cache is complete."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.cache",
        description="Compute the features of the frozen models once.",
        epilog="settings:\n" + Config.describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="the YAML file of the training")
    parser.add_argument("settings", nargs="*", metavar="name=value")
    parser.add_argument("--prune", action="store_true", help="delete features of other models and settings")
    parser.add_argument("--shards", metavar="FOLDER", help="write shards with records and features instead of a cache")
    parser.add_argument("--shard-photos", type=_positive, default=PHOTOS, help=f"most of a shard (default {PHOTOS})")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def run() -> None:
        config = Config.load(options.config, options.settings)
        if options.shards is None:
            make_cache(config, options.prune)
        else:
            make_shards(config, options.shards, options.shard_photos)

    return exit_code(run)


def _positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 10**6:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to a million, found {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
