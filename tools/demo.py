"""The face at work in a real ComfyUI server: ``python run.py demo``.

As it is, with the small model that comes with the pack: people it has never seen, each prompt without and with the
face, on one sheet. With ``--checkpoint`` and ``--adapter``: your model, and a photograph.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from tools.comfyui import device_arguments, installed_comfyui
from tools.demo_small import run as draw_people
from tools.find_comfyui import version_of
from tools.server import ComfyServer, Run, ServerError

PLAIN, FACE, REPORT = "plain", "face", "report"  # ids of the output nodes


def portrait(
    checkpoint: str, adapter: str, photo: str, prompt: str, size: int, steps: int, seed: int = 1, strength: float = 1.0
) -> dict[str, Any]:
    """The workflow, in API format: the same prompt and seed without and with the face."""

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    def sampler(model: list) -> dict[str, Any]:
        return node(
            "KSampler",
            model=model,
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            seed=seed,
            steps=steps,
            cfg=6.0,
            sampler_name="dpmpp_2m",
            scheduler="karras",
            denoise=1.0,
        )

    return {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "positive": node("CLIPTextEncode", clip=["checkpoint", 1], text=prompt),
        "negative": node("CLIPTextEncode", clip=["checkpoint", 1], text=""),
        "latent": node("EmptyLatentImage", width=size, height=size, batch_size=1),
        "photo": node("LoadImage", image=photo),
        "adapter": node("FeedFaceLoadAdapter", adapter_name=adapter),
        "crops": node("FeedFaceDetectFaces", image=["photo", 0], **DETECTION),
        "encoded": node("FeedFaceEncodeFaces", adapter=["adapter", 0], crops=["crops", 0]),
        "apply": node(
            "FeedFaceApply",
            model=["checkpoint", 0],
            adapter=["adapter", 0],
            face=["encoded", 0],
            strength=strength,
            start=0.0,
            end=1.0,
        ),
        "sample_plain": sampler(["checkpoint", 0]),
        "sample_face": sampler(["apply", 0]),
        "decode_plain": node("VAEDecode", samples=["sample_plain", 0], vae=["checkpoint", 2]),
        "decode_face": node("VAEDecode", samples=["sample_face", 0], vae=["checkpoint", 2]),
        REPORT: node("PreviewAny", source=["crops", 3]),
        PLAIN: node("SaveImage", images=["decode_plain", 0], filename_prefix="plain"),
        FACE: node("SaveImage", images=["decode_face", 0], filename_prefix="face"),
    }


DETECTION = {
    "detector": "auto",
    "order": "size",
    "indexes": "0",
    "min_size": 32,
    "when_none": "error",
    "crop_scale": 1.1,
    "crop_size": 224,
}


class Steps:
    """Prints a numbered line for each step, with the time since the one before."""

    def __init__(self) -> None:
        self.number, self.last = 0, time.monotonic()

    def done(self, text: str) -> None:
        self.number += 1
        now = time.monotonic()
        print(f"{self.number}. {text}  ({now - self.last:.1f} s)", flush=True)
        self.last = now


def difference(plain: numpy.ndarray, face: numpy.ndarray) -> numpy.ndarray:
    """Absolute difference of two ``(H, W, 3)`` uint8 pictures, brightened so that its largest value is white."""
    apart = numpy.abs(plain.astype(numpy.float32) - face.astype(numpy.float32))
    return (apart * (255 / max(float(apart.max()), 1))).astype(numpy.uint8)


def place(file: Path, folder: Path) -> str:
    """Make a model file available in a model folder, without a copy where the system allows; its name there."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (folder / file.name).symlink_to(file.resolve())
    except OSError:
        shutil.copy2(file, folder / file.name)
    return file.name


def default_photo(folder: Path) -> Path:
    from skimage.data import astronaut

    path = folder / "photo.png"
    Image.fromarray(astronaut()).save(path)
    return path


def run_portrait(options: argparse.Namespace) -> None:
    """One photograph, a checkpoint and an adapter of the user's: the same prompt and seed without and with the face.

    Raises:
        ServerError: a file is missing, there is no ComfyUI, or the graph failed.
    """
    if options.checkpoint is None or options.adapter is None:
        raise ServerError("a photograph needs a model: give --checkpoint and --adapter, or nothing for the small model")
    for file in filter(None, (options.photo, options.checkpoint, options.adapter)):
        if not file.is_file():
            raise ServerError(f"there is no file {file}")
    comfyui = installed_comfyui("demo")
    options.output.mkdir(parents=True, exist_ok=True)
    steps = Steps()
    photo = options.photo or default_photo(options.output)
    server = ComfyServer(comfyui, arguments=device_arguments())
    checkpoint = place(options.checkpoint, server.base / "models/checkpoints")
    adapter = place(options.adapter, server.base / "models/feedface")
    steps.done(f"photograph {photo}, checkpoint {checkpoint}, adapter {adapter}")
    with server:
        steps.done(f"ComfyUI {version_of(comfyui)} with FeedFace runs at {server.address}")
        name = server.upload(photo)
        workflow = portrait(checkpoint, adapter, name, options.prompt, options.size, options.steps, options.seed)
        result = server.run(workflow, timeout=3600)
        report = "; ".join("".join(result.outputs[REPORT]["text"]).split("\n"))
        steps.done(f"one workflow, two pictures. {report}")
        save(server, result, options.output)
    steps.done(f"pictures in {options.output}: plain.png, face.png, difference.png")


def save(server: ComfyServer, result: Run, output: Path) -> None:
    plain, face = (server.pictures(result, node)[0] for node in (PLAIN, FACE))
    apart = numpy.abs(plain.astype(int) - face.astype(int)).mean()
    if not apart:
        raise ServerError("the picture with the face is the same as without it")
    pictures = {"plain": plain, "face": face, "difference": difference(plain, face)}
    for name, picture in pictures.items():
        Image.fromarray(picture).save(output / f"{name}.png")
    print(f"   the face changes a pixel by {apart:.1f} of 255 on average", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="run.py demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the pictures")
    parser.add_argument("--seed", type=int, default=1)
    own = parser.add_argument_group("with models of your own")
    own.add_argument("--checkpoint", type=Path, help="a Stable Diffusion checkpoint")
    own.add_argument("--adapter", type=Path, help="a FeedFace adapter for it")
    own.add_argument("--photo", type=Path, help="a photograph of a person (default: a public-domain portrait)")
    own.add_argument("--prompt", default="a portrait of a person on a beach, golden hour")
    own.add_argument("--size", type=int, default=512, help="side of the pictures in pixels (default 512)")
    own.add_argument("--steps", type=int, default=25, help="of the sampler (default 25)")
    options = parser.parse_args()
    try:
        if options.checkpoint or options.adapter or options.photo:
            run_portrait(options)
        else:
            print(f"the sheet: {draw_people(options.output, options.seed)}")
    except (ServerError, FileNotFoundError) as problem:
        sys.exit(f"FeedFace: {problem}")


if __name__ == "__main__":
    main()
