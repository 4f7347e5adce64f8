"""Writing shards: photos are read, hashed and encoded once, shard by shard; nothing is kept for every photo.

Started again, only shards whose photos, settings or models changed are written again; features that the folder
``data.cache`` holds are taken from there.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from feedface_core.files.atomic import replacing, write_safetensors

from ..config import Config, DataSettings
from ..data import pictures
from ..data.feature_store import FileHashes, key_of
from ..data.manifest import Record
from ..data.manifest_index import IndexedRecords, write_index
from ..data.records import People
from ..data.references import References
from ..data.shards import FORMAT, HEADER, PLACES, Folder, ShardedFeatures, read_header, shard_name
from ..errors import TrainerError, first_of
from .face_encoder import FaceEncoder
from .feature_cache import FeatureCache
from .features import Features
from .frozen_model import FrozenModel

logger = logging.getLogger(__name__)

PHOTOS = 256
"""Of a shard: with Stable Diffusion's autoencoder at 512 pixels and CLIP-L, some 200 MB."""


def arrange(people: People, count: int, photos: int = PHOTOS) -> tuple[np.ndarray, list[int]]:
    """Which photo lies in which shard.

    Args:
        people: who is in which photo.
        count: of all photos.
        photos: the most in one shard; only somebody with more of them lies in several.

    Returns:
        The photos ``(count,)`` in their order in the shards, and where in it shards begin, and the last one ends.
    """
    alone = np.setdiff1d(np.arange(count), people.order, assume_unique=True)
    order = np.concatenate([people.order, alone])
    # Where in the order each photo's person begins.
    begins = np.concatenate([people.start[people.order], np.arange(len(people.order), count)])
    borders = [0]
    while borders[-1] < count:
        end = borders[-1] + photos
        if end >= count:
            end = count
        elif begins[end] > borders[-1]:
            end = int(begins[end])
        borders.append(end)
    return order, borders


def drawn(settings: DataSettings) -> dict[str, Any]:
    """The settings that say which features there are."""
    return {
        "flip": settings.flip,
        "flip_references": settings.mirrors_references,
        **settings.model_dump(include={"augment_variants", "retrieval", "duplicate_distance"}),
    }


class Packer:
    """Writes the shards of a run.

    Args:
        config: of the training.
        records: all photos.
        base, encoder: the frozen models.
        folder: of the shards.
        photos: the most in one shard.
    """

    def __init__(
        self,
        config: Config,
        records: IndexedRecords,
        base: FrozenModel,
        encoder: FaceEncoder,
        folder: Path,
        photos: int = PHOTOS,
    ) -> None:
        self.config, self.records, self.base, self.encoder, self.folder = config, records, base, encoder, folder
        cache = None if config.data.cache is None else Path(config.data.cache).expanduser()
        self.features = FeatureCache(config, [], base, encoder, cache or folder / "none")
        self.references = References(records, config.data)
        self.order, self.borders = arrange(records.people, len(records), photos)
        self.count = len(self.borders) - 1
        (folder / "files").mkdir(parents=True, exist_ok=True)

    def settings(self) -> dict[str, Any]:
        """What all shards depend on."""
        return {kind: features.settings for kind, features in self.features.items()} | {
            "drawn": drawn(self.config.data)
        }

    def write(self, number: int) -> tuple[bool, dict[str, str], list[tuple[Features, Any, Mapping[str, Tensor]]]]:
        """Write one shard unless it is there as it should be.

        Returns:
            Whether it was written; the photos that cannot be read, by id, with the reason: then there is no shard;
            and the pictures that were encoded.

        Raises:
            TrainerError: a frozen model that gives no numbers, or a disk that is full.
        """
        indices = self.order[self.borders[number] : self.borders[number + 1]].tolist()
        own: list[Record] = [self.records[index] for index in indices]
        faces = [[one._replace(index=j) for one in self.references.of_photo(i)] for j, i in enumerate(indices)]
        hashes = FileHashes(self.folder / "files" / f"{number:06d}.json")
        hash_of, flat, unreadable = hashes.asked_once(), [*chain.from_iterable(faces)], {}
        try:
            parts = {kind: one.of(own, flat, self.base, hash_of) for kind, one in self.features.items()}
        except TrainerError as error:  # a file that cannot be read for its hash
            (self.folder / shard_name(number)).unlink(missing_ok=True)
            return False, {f"shard {number}": str(error)}, []
        hashes.save()
        texts = list(dict.fromkeys(parts["text"].keys.values()))
        first_faces = np.cumsum([0, *map(len, faces)])[:-1]
        place = {"photo": indices, "face": first_faces.tolist()}
        place["text"] = [texts.index(parts["text"].keys[record.caption]) for record in own]
        keys = {kind: list(part.keys.values()) for kind, part in parts.items()}
        digest = key_of(self.settings(), keys, place)
        path = self.folder / shard_name(number)
        if _digest(path) == digest:
            return False, {}, []
        path.unlink(missing_ok=True)
        found, pictures_made = {}, []
        for kind, part in parts.items():
            missing = part.missing()
            found[kind] = {key: part.get(item) for item, key in part.keys.items() if key not in missing}
            for key, item, tensors, reason in part.encode_all(missing, self.config.data, self.base, self.encoder):
                if tensors is None:
                    unreadable[part.name(item)] = reason
                    continue
                part.require_finite(key, tensors)
                found[kind][key] = tensors
                if kind == "picture":
                    pictures_made.append((part, item, tensors))
        if not unreadable:
            rows = [*(("", found[kind], keys[kind]) for kind in ("picture", "face")), ("text.", found["text"], texts)]
            if "background" in found:
                rows.append(("background.", found["background"], keys["background"]))
            tensors = {
                prefix + name: torch.stack([group[key][name] for key in wanted])
                for prefix, group, wanted in rows
                for name in group[wanted[0]]
            }
            save_shard(path, tensors, place, {"format": FORMAT, "digest": digest, "about": json.dumps(self.settings())})
        return not unreadable, unreadable, pictures_made

    def finish(self) -> None:
        """Write the index and the header, once all shards are there; shards of an earlier set are deleted.

        Raises:
            TrainerError: a shard that is missing or not whole.
        """
        places = {name: np.full(len(self.records), -1, np.int32) for name in PLACES}
        digests, texts = [], []
        for number in range(self.count):
            path = self.folder / shard_name(number)
            try:
                with safe_open(path, "pt") as file:
                    digests.append(file.metadata()["digest"])
                    photos = file.get_tensor("place.photo").numpy()
                    for name in ("text", "face"):
                        places[name][photos] = file.get_tensor(f"place.{name}").numpy()
                    texts = sorted(name for name in file.keys() if name.startswith("text."))  # noqa: SIM118
            except (SafetensorError, OSError, KeyError, TypeError, IndexError) as error:
                raise TrainerError(f"{path}: no whole shard ({error}); run the command again") from error
            places["shard"][photos], places["row"][photos] = number, np.arange(len(photos))
        if any((column < 0).any() for column in places.values()):
            raise TrainerError(f"{self.folder}: its shards are not those of the manifest; run the command again")
        (self.folder / HEADER).unlink(missing_ok=True)
        rows = (_with_size(record) for record in self.records)
        index = write_index(self.folder / "index", {"shards": key_of(digests)}, rows, False)
        write_places(index.folder / "places.arrow", places)
        for path in self.folder.glob("shard-*.safetensors"):
            if int(path.stem.partition("-")[2]) >= self.count:
                path.unlink()
        header = {"format": FORMAT, "made with": self.settings(), "texts": texts}
        header |= {"model": self.config.model.base, "encoder": self.config.adapter.encoder.path}
        header |= {"photos": len(self.records), "shards": self.count, "digest": key_of(digests)}
        header |= {"fingerprint": index.fingerprint}
        with replacing(self.folder / HEADER) as partial:
            partial.write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")


def _digest(path: Path) -> str | None:
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("digest")
    except (SafetensorError, OSError):
        return None


def save_shard(
    path: Path, tensors: dict[str, Tensor], place: Mapping[str, Sequence[int]], metadata: Mapping[str, str]
) -> None:
    """Write a shard in one piece, with a check sum for each row.

    Args:
        path: of the shard.
        tensors: ``(rows, …)`` each.
        place: ``photo``, ``text`` and ``face``: number of each photo, row of its caption, first row of its face.
        metadata: texts by name.

    Raises:
        TrainerError: it cannot be written.
    """
    checks = {}
    for name, tensor in tensors.items():
        rows = tensor.contiguous().view(len(tensor), -1).view(torch.uint8).numpy()
        checks[f"crc.{name}"] = torch.tensor([zlib.crc32(row) for row in rows])
    places = {f"place.{name}": torch.tensor(values) for name, values in place.items()}
    try:
        write_safetensors(path, tensors | checks | places, metadata)
    except (OSError, SafetensorError) as error:
        raise TrainerError(f"{path}: cannot be written: {error}. What was written before is kept") from error


def _with_size(record: Record) -> Record:
    """With the photo's size: where the shards are read, there may be no photo."""
    size = None if record.width and record.height else pictures.size_of(record.path)
    return record if size is None else replace(record, width=size[0], height=size[1])


def write_places(path: Path, places: Mapping[str, np.ndarray]) -> None:
    """Write ``places.arrow``: for each of :data:`~trainer.data.shards.PLACES` a number a photo, ``(N,)`` int32."""
    import pyarrow as pa

    batch = pa.record_batch(dict(places))
    with replacing(path) as partial, pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, batch.schema) as own:
        own.write_batch(batch)


def open_shards(config: Config, records: IndexedRecords, base: FrozenModel, encoder: FaceEncoder) -> ShardedFeatures:
    """The features of a run from its shards.

    Args:
        config: ``data.shards`` is their address.
        records: what :func:`~trainer.data.shards.open_records` returned.
        base, encoder: the frozen models of the run.

    Raises:
        TrainerError: shards of other models, another tokenizer, crop or code, or without features that the run needs.
    """
    folder = Folder(config.data.shards)
    header, wrong = read_header(folder), []
    wanted = {kind: one.settings for kind, one in FeatureCache(config, [], base, encoder, records.folder).items()}
    for kind, settings in wanted.items():
        found = header["made with"].get(kind, {})
        wrong += [f"{kind}: {n} is {v}, in the shards {found.get(n)}" for n, v in settings.items() if found.get(n) != v]
    has, needs = header["made with"]["drawn"], drawn(config.data)
    for name, value in needs.items():
        # Mirrored pictures that nobody asks for do no harm.
        if has.get(name) != value and not (name.startswith("flip") and has.get(name)):
            wrong.append(f"data.{name} is {value}, in the shards {has.get(name)}")
    if header.get("fingerprint") != records.fingerprint:
        wrong.append("their index is of other records")
    if wrong:
        raise TrainerError(
            f"data.shards {config.data.shards} do not belong to this run:{first_of(wrong)}\nMake them with python -m "
            "trainer.cache CONFIG --shards FOLDER and the same settings"
        )
    return ShardedFeatures(folder, records.folder, header)
