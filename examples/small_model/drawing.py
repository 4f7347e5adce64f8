"""Drawing the synthetic people with Node.js, and reading them back."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .people import ATTRIBUTES, CANVAS, SIZE, SPLITS, PeopleConfig, Scene, specs_of


def install_renderer(folder: Path) -> Path:
    """Puts the renderer and its pinned packages into ``folder`` with npm, once.

    Raises:
        RuntimeError: node or npm is missing, or the installation failed.
    """
    source = Path(__file__).parent / "render"
    for tool in ("node", "npm"):
        if shutil.which(tool) is None:
            raise RuntimeError(
                f"{tool} is not on PATH; drawing the synthetic people needs Node.js 18 or newer with npm"
            )
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("render.mjs", "package.json", "package-lock.json"):
        shutil.copyfile(source / name, folder / name)
    if not (folder / "node_modules" / "facesjs").is_dir():
        done = subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"npm ci failed in {folder}:\n{done.stderr[-2000:]}")
    return folder


def parts_of(renderer: Path) -> dict:
    """What facesjs can draw: ``{"ids": {part: [names]}, "genders": {part: [genders]}}``."""
    return json.loads(
        subprocess.run(["node", "render.mjs", "--parts"], cwd=renderer, capture_output=True, check=True).stdout
    )


def render(renderer: Path, specs: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Draws scenes.

    Returns:
        Pictures ``(N, SIZE, SIZE, 3)`` and masks ``(N, SIZE, SIZE)``, unsigned bytes; head and hair are 255.
    """
    lines = "\n".join(json.dumps(s) for s in specs).encode()
    done = subprocess.run(["node", "render.mjs"], cwd=renderer, input=lines, capture_output=True)
    each = CANVAS * CANVAS * 3 + SIZE * SIZE
    if done.returncode or len(done.stdout) != each * len(specs):
        raise RuntimeError(
            f"the renderer gave {len(done.stdout)} bytes for {len(specs)} pictures, expected {each * len(specs)}: "
            f"{done.stderr.decode()[-2000:]}"
        )
    raw = np.frombuffer(done.stdout, np.uint8).reshape(len(specs), each)
    drawn = raw[:, : CANVAS * CANVAS * 3].reshape(-1, SIZE, CANVAS // SIZE, SIZE, CANVAS // SIZE, 3)
    pictures = (drawn.astype(np.float32).mean((2, 4)) + 0.5).astype(np.uint8)
    return pictures, raw[:, CANVAS * CANVAS * 3 :].reshape(-1, SIZE, SIZE)


def build(root: Path, config: PeopleConfig, shard: int = 100, log=print, splits: Iterable[str] = tuple(SPLITS)) -> None:
    """Draws the splits into ``root/<split>/{pictures,masks}.npy`` and ``records.jsonl``, in shards of ``shard``
    identities.

    A shard that is already there is left alone, so an interrupted build goes on where it stopped.
    """
    renderer = install_renderer(root / "renderer")
    parts = parts_of(renderer)
    for split in splits:
        identities, pictures = config.count(split)
        folder = root / split
        folder.mkdir(parents=True, exist_ok=True)
        state = folder / "config.json"
        wanted = json.dumps(asdict(config))
        if state.is_file() and state.read_text() != wanted:
            raise RuntimeError(
                f"{folder} was drawn with {state.read_text()}, now asked for {wanted}; remove it to draw it anew"
            )
        state.write_text(wanted)
        shape = (identities * pictures, SIZE, SIZE, 3)
        arrays = [_open(folder / "pictures.npy", shape), _open(folder / "masks.npy", shape[:3])]
        progress = folder / "shards.txt"
        done = len(progress.read_text().split()) if progress.is_file() else 0
        for start in range(done * shard, identities, shard):
            pairs = [p for i in range(start, min(start + shard, identities)) for p in specs_of(parts, config, split, i)]
            at = slice(start * pictures, start * pictures + len(pairs))
            for array, drawn in zip(arrays, render(renderer, [spec for spec, _ in pairs]), strict=True):
                array[at] = drawn
                array.flush()
            with progress.open("a") as file:
                file.write(f"{start}\n")
            log(f"people {split}: {start + shard} of {identities} identities")
        records = (r for i in range(identities) for _, r in specs_of(parts, config, split, i))
        if not (folder / "records.jsonl").is_file():
            text = "".join(json.dumps(r) + "\n" for r in records)
            (folder / "records.tmp").write_text(text)
            (folder / "records.tmp").replace(folder / "records.jsonl")


def _open(path: Path, shape: tuple[int, ...]) -> np.memmap:
    return np.lib.format.open_memmap(path, mode="r+" if path.is_file() else "w+", dtype=np.uint8, shape=shape)


@dataclass(frozen=True)
class People:
    """A drawn split, read from disk: pictures ``(N, 64, 64, 3)``, masks ``(N, 64, 64)`` and one record a picture."""

    pictures: np.ndarray
    masks: np.ndarray
    records: list[dict]

    @classmethod
    def load(cls, root: Path, split: str) -> People:
        """Opens ``root/<split>``.

        Raises:
            FileNotFoundError: the split has not been drawn.
        """
        folder = root / split
        if not (folder / "records.jsonl").is_file():
            raise FileNotFoundError(
                f"no drawn people in {folder}; first run `python -m examples.small_model.build people`"
            )
        records = [json.loads(line) for line in (folder / "records.jsonl").open()]
        return cls(
            np.load(folder / "pictures.npy", mmap_mode="r"), np.load(folder / "masks.npy", mmap_mode="r"), records
        )

    def first(self, count: int) -> People:
        """The first ``count`` pictures."""
        return People(self.pictures[:count], self.masks[:count], self.records[:count])

    def identities(self) -> np.ndarray:
        """Which person each picture shows, as ``(N,)`` numbers from 0."""
        names = {name: i for i, name in enumerate(sorted({r["identity"] for r in self.records}))}
        return np.array([names[r["identity"]] for r in self.records])

    def labels(self) -> dict[str, np.ndarray]:
        """For each attribute of :data:`ATTRIBUTES` the number of its value in each picture, ``(N,)``."""
        return {a: np.array([values.index(r[a]) for r in self.records]) for a, values in ATTRIBUTES.items()}

    def words(self, index: int, rng: np.random.Generator, keep: float = 0.85) -> str:
        """A caption of picture ``index``, anew each time, with parts left out at random."""
        return Scene(**{a: self.records[index][a] for a in ATTRIBUTES}).caption(rng, keep)
