"""Drawing the synthetic people with Node.js, as a data set of the trainer, and reading them back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.data.manifest import read_rows, write_rows
from trainer.errors import TrainerError

from .people import ATTRIBUTES, FEATURES, caption, detector_box, pair_specs_of, specs_of
from .settings import Pairs, PeopleSettings

SHARD = 100  # people drawn at once


def install_renderer(folder: Path) -> Path:
    """Puts the renderer and its pinned packages into ``folder`` with npm, once.

    Raises:
        TrainerError: node or npm is missing, or the installation failed.
    """
    for tool in ("node", "npm"):
        if shutil.which(tool) is None:
            raise TrainerError(
                f"{tool} is not on PATH; drawing the synthetic people needs Node.js 18 or newer with npm"
            )
    shutil.copytree(Path(__file__).parent / "render", folder, dirs_exist_ok=True)
    if not (folder / "node_modules" / "facesjs").is_dir():
        done = subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise TrainerError(f"npm ci failed in {folder}:\n{done.stderr[-2000:]}")
    return folder


def parts_of(renderer: Path) -> dict:
    """What facesjs can draw: ``{"ids": {part: [names]}, "genders": {part: [genders]}}``."""
    command = ["node", "render.mjs", "--parts"]
    return json.loads(subprocess.run(command, cwd=renderer, capture_output=True, check=True).stdout)


def render(renderer: Path, specs: Sequence[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Draws scenes of one size.

    Returns:
        Pictures ``(N, S, S, 3)``, each pixel the mean of 2 × 2 drawn ones, and masks ``(N, S, S)``, unsigned bytes;
        head and hair are 255.
    """
    lines = "\n".join(json.dumps(spec) for spec in specs).encode()
    done = subprocess.run(["node", "render.mjs"], cwd=renderer, input=lines, capture_output=True)
    drawn, side = specs[0]["size"], specs[0]["mask_size"]
    each = drawn * drawn * 3 + side * side
    if done.returncode or len(done.stdout) != each * len(specs):
        raise TrainerError(
            f"the renderer gave {len(done.stdout)} bytes for {len(specs)} pictures, expected {each * len(specs)}: "
            f"{done.stderr.decode()[-2000:]}"
        )
    raw = np.frombuffer(done.stdout, np.uint8).reshape(len(specs), each)
    fine = raw[:, : -side * side].reshape(-1, side, drawn // side, side, drawn // side, 3)
    pictures = (fine.astype(np.float32).mean((2, 4)) + 0.5).astype(np.uint8)
    return pictures, raw[:, -side * side :].reshape(-1, side, side)


def draw(root: Path, settings: PeopleSettings, splits: Iterable[str] = (), log=print) -> None:
    """Draws splits (all of them by default) into ``root/<split>``: a manifest of the trainer, pictures and masks.

    :data:`SHARD` people have a folder, which appears when it is complete: an interrupted drawing goes on behind it.

    Raises:
        TrainerError: the folder holds people of other settings, or the renderer fails.
    """
    renderer = install_renderer(root / "renderer")
    parts = parts_of(renderer)
    for split in splits or settings.splits:

        def specs(index: int, split: str = split) -> Iterable[tuple[tuple[dict, ...], dict]]:
            return (((spec,), record) for spec, record in specs_of(parts, settings, split, index))

        wanted = settings.model_dump_json(exclude={"splits"}) + settings.splits[split].model_dump_json()
        _draw(renderer, root / split, wanted, settings.splits[split].identities, specs, log)


def draw_pairs(root: Path, settings: PeopleSettings, pairs: Pairs, log=print) -> None:
    """Draws two people side by side into ``root/pairs``, as :func:`draw` does one; rows of the manifest have the
    second one among their ``faces``."""
    renderer = install_renderer(root / "renderer")
    parts = parts_of(renderer)
    wanted = settings.model_dump_json(exclude={"splits"}) + pairs.model_dump_json()

    def specs(index: int) -> Iterable[tuple[tuple[dict, ...], dict]]:
        return pair_specs_of(parts, settings, index, pairs.pictures)

    _draw(renderer, root / "pairs", wanted, pairs.identities // 2, specs, log)


def _draw(
    renderer: Path,
    folder: Path,
    wanted: str,
    count: int,
    specs_for: Callable[[int], Iterable[tuple[tuple[dict, ...], dict]]],
    log: Callable[[str], None],
) -> None:
    """Draws what ``specs_for`` gives for 0 … count − 1: of each picture its parts from left to right, and its row."""
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "settings.json"
    if state.is_file() and state.read_text() != wanted:
        raise TrainerError(
            f"{folder} was drawn with {state.read_text()}, now asked for {wanted}; remove it to draw it anew"
        )
    state.write_text(wanted)

    def draw_shard(indices: range) -> tuple[str, int, Sequence[dict]]:
        specs, records = zip(*(pair for i in indices for pair in specs_for(i)), strict=True)
        shard = folder / f"{indices.start:05d}"
        if not shard.is_dir():
            beside = len(specs[0])
            drawn = render(renderer, [part for one in specs for part in one])
            _write_shard(shard, records, *(_side_by_side(one, beside) for one in drawn))
            log(f"people {folder.name}: {indices.stop} of {count}")
        return shard.name, specs[0][0]["mask_size"], records

    rows: list[dict] = []
    shards = [range(first, min(first + SHARD, count)) for first in range(0, count, SHARD)]
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # each waits for a renderer of its own
        for shard, size, records in threads.map(draw_shard, shards):
            rows += [_row(record, shard, len(rows) + i, size) for i, record in enumerate(records)]
    write_rows(folder / "manifest.jsonl", rows)


def _side_by_side(parts: np.ndarray, beside: int) -> np.ndarray:
    """``(N · beside, S, S, …)`` as ``(N, S, beside · S, …)``."""
    return np.concatenate([parts[place::beside] for place in range(beside)], 2)


def _write_shard(shard: Path, records: Sequence[dict], pictures: np.ndarray, masks: np.ndarray) -> None:
    with tempfile.TemporaryDirectory(dir=shard.parent) as folder:
        unfinished = Path(folder) / shard.name
        unfinished.mkdir()
        for record, picture, mask in zip(records, pictures, masks, strict=True):
            Image.fromarray(picture).save(unfinished / f"{record['id']}.png", compress_level=1)
            Image.fromarray(mask).save(unfinished / f"{record['id']}-mask.png", compress_level=1)
        unfinished.rename(shard)


def _row(record: dict, shard: str, index: int, size: int) -> dict:
    path, people = f"{shard}/{record['id']}", len(record.get("boxes", "1"))

    def box_of(box: list[float]) -> list[float]:
        # every second box is like a detector's, so that the adapter learns both kinds of crops
        return [round(v, 2) for v in detector_box(box)] if index % 2 else box

    row = {"path": f"{path}.png", "mask_path": f"{path}-mask.png", "width": people * size, "height": size}
    if people == 1:
        return row | {"bbox": box_of(record["box"]), **record}
    first, *others = ({"bbox": box_of(box)} for box in record["boxes"])
    for face, identity in zip((first, *others), record["identities"], strict=True):
        face["identity"] = identity
    return row | first | {"faces": others} | {k: v for k, v in record.items() if k not in ("boxes", "identities")}


@dataclass(frozen=True)
class People:
    """A drawn split: one row of the manifest for each picture, with the columns of :func:`~.people.specs_of`; or
    ``pairs``, with those of :func:`~.people.pair_specs_of`."""

    folder: Path
    records: list[dict]

    @classmethod
    def load(cls, root: Path, split: str) -> People:
        """Opens ``root/<split>``. Raises ``TrainerError`` where the split has not been drawn."""
        manifest = root / split / "manifest.jsonl"
        if not manifest.is_file():
            raise TrainerError(f"no drawn people in {manifest.parent}: `python -m examples.small_model.build people`")
        return cls(manifest.parent, read_rows(manifest))

    def __len__(self) -> int:
        return len(self.records)

    @property
    def size(self) -> int:
        """Side of a picture of one person in pixels."""
        return self.records[0]["height"]

    def first(self, count: int) -> People:
        """The first ``count`` pictures."""
        return People(self.folder, self.records[:count])

    def pixels(self, index: Iterable[int]) -> Tensor:
        """Pictures as ``(N, 3, S, S)`` floats in −1…1; of pairs ``(N, 3, S, 2 S)``."""
        return to_pixels(np.stack([np.asarray(Image.open(self.folder / self.records[i]["path"])) for i in index]))

    def masks(self, index: Iterable[int]) -> Tensor:
        """Head and hair as ``(N, 1, S, S)`` floats in 0…1."""
        arrays = [np.asarray(Image.open(self.folder / self.records[i]["mask_path"])) for i in index]
        return torch.from_numpy(np.stack(arrays))[:, None].float() / 255

    def identities(self) -> np.ndarray:
        """Which person each picture shows, as ``(N,)`` numbers from 0."""
        return np.unique([record["identity"] for record in self.records], return_inverse=True)[1]

    def pictures_of(self, identities: int) -> np.ndarray:
        """Indices of the pictures of the first people, ``(identities, pictures of each)``."""
        each = len(self) // len(set(self.identities()))
        return np.arange(identities * each).reshape(identities, each)

    def labels(self) -> dict[str, np.ndarray]:
        """For each attribute of :data:`ATTRIBUTES` the number of its value in each picture, ``(N,)``."""
        return {a: np.array([values.index(r[a]) for r in self.records]) for a, values in ATTRIBUTES.items()}

    def features(self) -> tuple[dict[str, list[str]], dict[str, np.ndarray]]:
        """For each of :data:`FEATURES` its values, and the number of its value in each picture, ``(N,)``."""
        shown = {name: [record["features"][name] for record in self.records] for name in FEATURES}
        numbered = {name: np.unique(values, return_inverse=True) for name, values in shown.items()}
        return {n: v.tolist() for n, (v, _) in numbered.items()}, {n: index for n, (_, index) in numbered.items()}

    def words(self, index: int, rng: np.random.Generator, keep: float = 0.85) -> str:
        """A caption of picture ``index``, anew each time, with parts left out at random."""
        return caption(self.records[index], rng, keep)


def to_pixels(pictures: np.ndarray) -> Tensor:
    """Bytes ``(N, H, W, 3)`` as floats ``(N, 3, H, W)`` in −1…1."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
