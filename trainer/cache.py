"""Features of the frozen models, computed once: moments of the photos, text states, hidden states of the face crops.

    python -m trainer.cache trainer/configs/sd15.yaml
    accelerate launch -m trainer.cache trainer/configs/sd15.yaml data.cache=dataset/cache --prune

Photos and crops are encoded both ways round (``data.flip``), captions once each, and the crop of a person with one
photo in ``data.augment_variants`` augmented ways. Run again after anything changed: only what is missing is computed.
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
from typing import Any

import torch
from torch import Tensor

from .config import Config
from .config.fields import make_folder
from .data.manifest_index import open_manifest
from .data.records import common_rule
from .errors import TrainerError, exit_code, first_of
from .models.face_encoder import FaceEncoder, load_face_encoder
from .models.features import FeatureCache, Features
from .models.frozen_model import FrozenModel, load_frozen_model

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


def make_cache(config: Config, prune: bool = False, progress: bool = True) -> CacheSummary:
    """Load the frozen models and compute what is missing, in each process of ``accelerate launch``.

    Raises:
        TrainerError: for models and manifests that cannot be used; for photos that cannot be read, after all others
            are done; or if the disk is full.
    """
    from accelerate import PartialState

    if config.data.cache is None:
        raise TrainerError("data.cache is null: give the folder of the cache, such as data.cache=dataset/cache")
    folder = make_folder(config.data.cache, "data.cache")
    # Without being told so, accelerate runs several processes on the CPU as if each were alone.
    timeout = timedelta(minutes=config.train.timeout_minutes)
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timeout)
    records = open_manifest(config.data.manifest, config.data.root, config.data.drop_missing, [folder])
    if records.dropped_count:
        logger.warning("left out:%s", first_of(records.dropped, records.dropped_count))
    common_rule(records)  # what training would refuse later
    base = load_frozen_model(config.model, state.device, ("autoencoder", "text"))
    encoder = load_face_encoder(config.adapter.encoder, state.device, config.model.allow_hub)
    cache = FeatureCache(config, records, base, encoder)
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
    if summary.unreadable:
        reasons = [f"{name}: {reason}" for name, reason in summary.unreadable.items()]
        raise TrainerError(
            f"{len(reasons)} photo(s) or masks cannot be read; take them out of the manifest:{first_of(reasons)}"
        )
    return summary


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
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return exit_code(lambda: make_cache(Config.load(options.config, options.settings), options.prune))


if __name__ == "__main__":
    sys.exit(main())
