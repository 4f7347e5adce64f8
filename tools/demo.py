"""The face at work in a real ComfyUI server: ``python run.py demo``.

As it is, with the small model that comes with the pack: people it has never seen, each prompt without and with the
face, on one sheet. With ``--checkpoint`` and ``--adapter``: your model, and a photograph.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from feedface_core.errors import FeedFaceError
from feedface_core.files.provenance import mark_file
from tools.comfyui import device_arguments, installed_comfyui
from tools.demo_graph import REPORT, comparison_graph, node
from tools.demo_small import draw_people
from tools.find_comfyui import version_of
from tools.options import whole
from tools.queue.files import write_whole
from tools.server import ComfyServer, ServerError

OUTPUTS = "people.png", "plain.png", "face.png", "difference.png", "photo.png"
PLAIN, FACE = "plain0", "face0"  # ids of the output nodes
DETECTION = {"detector": "auto", "order": "size", "min_size": 32, "crop_scale": 1.1, "crop_size": 224}


def portrait(
    checkpoint: str, adapter: str, photo: str, prompt: str, size: int, steps: int, seed: int = 1, strength: float = 1.0
) -> dict[str, Any]:
    """The graph, in API format: the same prompt and seed without and with the face."""
    loader = node("CheckpointLoaderSimple", ckpt_name=checkpoint)
    sampler = {"steps": steps, "cfg": 6.0, "sampler_name": "dpmpp_2m", "scheduler": "karras"}
    return comparison_graph(loader, adapter, [photo], [prompt], DETECTION, sampler, size, seed, strength)


def difference(plain: numpy.ndarray, face: numpy.ndarray) -> numpy.ndarray:
    """Absolute difference of two ``(H, W, 3)`` uint8 pictures, brightened so that its largest value is white."""
    apart = numpy.abs(plain.astype(numpy.float32) - face.astype(numpy.float32))
    return (apart * (255 / max(float(apart.max()), 1))).astype(numpy.uint8)


def link_file(file: Path, folder: Path) -> str:
    """Make a model file available in a model folder, without a copy where the system allows; its name there."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (folder / file.name).symlink_to(file.resolve())
    except OSError:
        shutil.copy2(file, folder / file.name)
    return file.name


def make_output(folder: Path) -> None:
    """Raises ``ServerError`` if no pictures can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / ".try", b"try")
        (folder / ".try").unlink()
    except (OSError, ValueError) as problem:
        why = getattr(problem, "strerror", None) or problem
        raise ServerError(f"--output {str(folder)[:400]!r}: cannot be written: {why}") from problem
    for name in OUTPUTS:
        if (folder / name).exists() and not (folder / name).is_file():
            raise ServerError(
                f"--output {str(folder)[:400]!r}: {name} is there and no file, expected room for a picture"
            )


def default_photo(folder: Path) -> Path:
    from skimage.data import astronaut

    path = folder / "photo.png"
    Image.fromarray(astronaut()).save(path)
    return path


def draw_portrait(options: argparse.Namespace) -> None:
    """One photograph, a checkpoint and an adapter of the user's: the same prompt and seed without and with the face.

    Raises:
        ServerError: a file is missing, there is no ComfyUI, the graph failed, or the face changed nothing.
    """
    if options.checkpoint is None or options.adapter is None:
        raise ServerError("a photograph needs a model: give --checkpoint and --adapter, or nothing for the small model")
    for file in filter(None, (options.photo, options.checkpoint, options.adapter)):
        if not os.path.isfile(file):
            raise ServerError(f"there is no file {str(file)[:400]}")
    comfyui, began = installed_comfyui("demo"), time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)

    output = options.output
    photo = options.photo or default_photo(output)
    server = ComfyServer(comfyui, arguments=device_arguments())
    checkpoint = link_file(options.checkpoint, server.base / "models/checkpoints")
    adapter = link_file(options.adapter, server.base / "models/feedface")
    say(f"photograph {photo}, checkpoint {checkpoint}, adapter {adapter}")
    with server:
        say(f"ComfyUI {version_of(comfyui)} with FeedFace runs at {server.address}")
        name = server.upload(photo)
        graph = portrait(checkpoint, adapter, name, options.prompt, options.size, options.steps, options.seed)
        run = server.run(graph, timeout=3600)
        say("one workflow, two pictures. " + "; ".join("".join(run.outputs[REPORT]["text"]).split("\n")))
        plain, face = (server.pictures(run, output_node)[0] for output_node in (PLAIN, FACE))
    changed = numpy.abs(plain.astype(int) - face.astype(int)).mean()
    if not changed:
        raise ServerError("the picture with the face is the same as without it")
    for name, picture in (("plain", plain), ("face", face), ("difference", difference(plain, face))):
        Image.fromarray(picture).save(output / f"{name}.png")
        if options.mark:
            mark_file(output / f"{name}.png")
    say(f"the face changes a pixel by {changed:.1f} of 255 on average")
    say(f"pictures in {output}: plain.png, face.png, difference.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="run.py demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the pictures")
    parser.add_argument("--seed", type=whole(0, 2**64 - 1), default=1)
    parser.add_argument(
        "--no-mark", dest="mark", action="store_false", help="do not mark the pictures as generated in their XMP"
    )
    own = parser.add_argument_group("with models of your own")
    own.add_argument("--checkpoint", type=Path, help="a Stable Diffusion checkpoint")
    own.add_argument("--adapter", type=Path, help="a FeedFace adapter for it")
    own.add_argument("--photo", type=Path, help="a photograph of a person (default: a public-domain portrait)")
    own.add_argument("--prompt", default="a portrait of a person on a beach, golden hour")
    own.add_argument("--size", type=whole(64, 4096), default=512, help="side of the pictures in pixels (default 512)")
    own.add_argument("--steps", type=whole(1, 10_000), default=25, help="of the sampler (default 25)")
    options = parser.parse_args()
    try:
        make_output(options.output)
        if options.checkpoint or options.adapter or options.photo:
            draw_portrait(options)
        else:
            print(f"the sheet: {draw_people(options.output, options.seed, options.mark)}")
    except (ServerError, FeedFaceError) as problem:
        sys.exit(f"FeedFace: {problem}")


if __name__ == "__main__":
    main()
