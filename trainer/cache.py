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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from feedface_core.faces import FaceError

from .config import Config
from .data import pictures
from .data.dataset import read_picture, read_reference
from .data.feature_store import CacheError, FeatureStore, FileHashes
from .data.features import KINDS, Keys, open_cache
from .data.manifest import ManifestError, Record, read_manifest
from .data.references import Reference, References
from .errors import TrainerError
from .models.face_encoder import EncoderError, FaceEncoder, load_face_encoder
from .models.frozen_model import Base, BaseError, load_base
from .training.processes import process_timeout

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

__all__ = ["CacheMaker", "CacheSummary", "make_cache", "open_cache"]

logger = logging.getLogger(__name__)
_SHOWN = 5


@dataclass
class CacheSummary:
    """What a run of the cache did.

    Args:
        computed, found: features by kind, over all processes.
        empty_masks, full_masks: photos whose mask is all zero or all one inside the training square.
        unreadable: photos that cannot be encoded, by id, with the reason.
    """

    computed: dict[str, int]
    found: dict[str, int]
    empty_masks: list[str]
    full_masks: list[str]
    unreadable: dict[str, str]


class _Sources(torch.utils.data.Dataset):
    """Reads pictures and crops in the loader's processes; a problem comes back as text.

    Args:
        places: the key and the place of each feature; a place begins with the index of the record.
        read: from a place to tensors.
    """

    def __init__(self, places: Sequence[tuple[str, tuple]], read: Callable[[Any], Any]) -> None:
        self.places, self.read = list(places), read

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> tuple[str, tuple, Any]:
        key, place = self.places[number]
        try:
            return key, place, self.read(place)
        except (pictures.PictureError, FaceError, OSError) as error:
            return key, place, str(error)


@dataclass(frozen=True)
class _ReadPicture:
    records: Sequence[Record]
    resolution: int
    crop: str
    cell: int

    def __call__(self, place: tuple[int, bool]) -> tuple[Tensor, Tensor]:
        index, flip = place
        pixels, mask = read_picture(self.records[index], self.resolution, self.crop, self.cell)
        return (pixels.flip(-1), mask.flip(-1)) if flip else (pixels, mask)


class _ReadFace:
    """Keeps the photo it opened last: the variants of a crop come one after the other."""

    def __init__(self, references: References, size: int) -> None:
        self.references, self.size = references, size
        self._path: Path | None = None
        self._photo: Any = None

    def __call__(self, place: Reference) -> Tensor:
        record = self.references.records[place.index]
        return read_reference(record, self.size, place.flip, self.references.augmentation(place), self._open)

    def _open(self, path: Path) -> Any:
        if path != self._path:
            self._photo, self._path = pictures.open_photo(path), path
        return self._photo


class CacheMaker:
    """Computes the features that are missing.

    Args:
        config: the settings.
        records: all photos.
        base: with its autoencoder and text part.
        encoder: of the faces.
        process, processes: this one computes its share of the features.
    """

    def __init__(
        self,
        config: Config,
        records: Sequence[Record],
        base: Base,
        encoder: FaceEncoder,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        if config.data.cache is None:
            raise CacheError("data.cache is null: give the folder of the cache, such as data.cache=dataset/cache")
        self.folder = Path(config.data.cache).expanduser()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"data.cache {self.folder}: cannot be made ({error.strerror})") from error
        self.config, self.records, self.base, self.encoder = config, records, base, encoder
        self.process, self.processes = process, processes
        hashes = FileHashes(self.folder / "files.json")
        self.keys = Keys(config, records, base, encoder, hashes)
        self.wanted = self.keys.all()
        if process == 0:
            hashes.save()
        self.stores = {kind: FeatureStore(self.folder, kind) for kind in KINDS}
        self.missing = {kind: self.stores[kind].missing(self.wanted[kind]) for kind in KINDS}
        self.summary = CacheSummary({}, {}, [], [], {})

    def run(self, progress: bool = True) -> CacheSummary:
        """Compute and write everything that is missing.

        Raises:
            CacheError: if the disk is full.
        """
        from tqdm import tqdm

        for kind, keys in self.missing.items():
            self.summary.computed[kind] = len(keys)
            self.summary.found[kind] = len(self.wanted[kind]) - len(keys)
            # By the key itself: processes that start at different times see different features missing.
            mine = [key for key in keys if int(key[:8], 16) % self.processes == self.process]
            encode = {"picture": self._pictures, "text": self._texts, "face": self._faces}[kind]
            with tqdm(total=len(mine), desc=kind, disable=None if progress and mine else True) as bar:
                for count in encode([(key, self.wanted[kind][key]) for key in mine]):
                    bar.update(count)
            self.stores[kind].flush(self.keys.about[kind])
        return self.summary

    def stale(self) -> list[Path]:
        """Shards that hold nothing of this run, read anew: other processes have written since."""
        return [path for kind in KINDS for path in FeatureStore(self.folder, kind).unused(self.wanted[kind])]

    def _loader(self, places: Sequence[Any], read: Callable[[Any], Any]) -> DataLoader:
        from torch.utils.data import DataLoader

        data = self.config.data
        return DataLoader(
            _Sources(places, read), data.cache_batch, num_workers=data.workers if places else 0, collate_fn=list
        )

    def _readable(self, batch: Sequence[Any]) -> list[Any]:
        for _, place, content in batch:
            if isinstance(content, str):
                self.summary.unreadable[self.records[place[0]].id] = content
        return [entry for entry in batch if not isinstance(entry[2], str)]

    def _pictures(self, places: Sequence[Any]) -> Iterator[int]:
        data = self.config.data
        read = _ReadPicture(self.records, data.resolution, data.crop, self.base.cell)
        for batch in self._loader(places, read):
            sound = self._readable(batch)
            if sound:
                moments = self.base.encode_pixels(torch.stack([pixels for _, _, (pixels, _) in sound])).cpu()
            for row, (key, (index, flip), (_, mask)) in enumerate(sound):
                if not flip:
                    self._note_mask(self.records[index].id, mask)
                tensors = {"moments": moments[row], "mask": mask}
                self.stores["picture"].add(key, tensors, self.keys.about["picture"])
            yield len(batch)

    def _note_mask(self, name: str, mask: Tensor) -> None:
        if mask.max() == 0:
            self.summary.empty_masks.append(name)
        elif mask.min() == 1:
            self.summary.full_masks.append(name)

    def _texts(self, places: Sequence[Any]) -> Iterator[int]:
        size = self.config.data.cache_batch
        for start in range(0, len(places), size):
            part = places[start : start + size]
            states = self.base.encode_text([caption for _, (caption,) in part])
            for row, (key, _) in enumerate(part):
                # In the host's number format, in which it reads them: that loses nothing, and takes half the room.
                tensors = {name: tensor[row].to(self.base.dtype) for name, tensor in states.items()}
                self.stores["text"].add(key, tensors, self.keys.about["text"])
            yield len(part)

    def _faces(self, places: Sequence[Any]) -> Iterator[int]:
        for batch in self._loader(places, _ReadFace(self.keys.references, self.encoder.config.image_size)):
            sound = self._readable(batch)
            if sound:
                crops = torch.stack([crop for _, _, crop in sound])  # (N, S, S, 3)
                hidden = self.encoder.encode(crops.to(self.base.device)).cpu()
            for row, (key, _, _) in enumerate(sound):
                self.stores["face"].add(key, {"hidden": hidden[row]}, self.keys.about["face"])
            yield len(batch)


def report(summary: CacheSummary, folder: Path, stale: Sequence[Path] = ()) -> str:
    """The summary as lines."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    lines = [f"{kind:<8} {summary.computed[kind]:>8} computed {summary.found[kind]:>8} found" for kind in KINDS]
    lines.append(f"{folder}: {size / 2**20:.1f} MiB")
    for what, names in (("empty", summary.empty_masks), ("full", summary.full_masks)):
        if names:
            lines.append(f"{len(names)} photo(s) with an {what} mask, trained as without one: {', '.join(names[:3])}")
    if stale:
        unused = sum(path.stat().st_size for path in stale)
        lines.append(f"{len(stale)} shard(s), {unused / 2**20:.1f} MiB, belong to other settings; --prune deletes them")
    return "\n".join(lines)


def make_cache(config: Config, prune: bool = False, progress: bool = True) -> CacheSummary:
    """Load the frozen models and compute what is missing, in each process of ``accelerate launch``.

    Raises:
        ManifestError, BaseError, EncoderError: for what is missing.
        CacheError: for photos that cannot be read, after all others are done; or if the disk is full.
    """
    from accelerate import PartialState

    # Without being told so, accelerate runs several processes on the CPU as if each were alone.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=process_timeout(config))
    records, dropped = read_manifest(config.data.manifest, config.data.root, config.data.drop_missing)
    for line in dropped[:_SHOWN]:
        logger.warning("left out: %s", line)
    base = load_base(config.model, state.device, parts=("autoencoder", "text"))
    encoder = load_face_encoder(config.adapter.encoder, state.device, config.model.allow_hub)
    maker = CacheMaker(config, records, base, encoder, state.process_index, state.num_processes)
    state.wait_for_everyone()
    summary = maker.run(progress and state.is_main_process)
    state.wait_for_everyone()
    if state.is_main_process:
        stale = maker.stale()
        while prune and stale:
            stale.pop().unlink(missing_ok=True)
        print(report(summary, maker.folder, stale))
    if summary.unreadable:
        raise CacheError(
            f"{len(summary.unreadable)} photo(s) or masks cannot be read; take them out of the manifest:\n  "
            + "\n  ".join(f"{name}: {reason}" for name, reason in list(summary.unreadable.items())[:_SHOWN])
        )
    return summary


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
    try:
        make_cache(Config.load(options.config, options.settings), options.prune)
    except (TrainerError, ManifestError, BaseError, EncoderError, CacheError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
