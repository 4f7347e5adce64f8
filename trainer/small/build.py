"""Makes the small system from nothing: ``python -m trainer.small.build``.

Stages, each seeded and resumable, each skipped when its result is there::

    people       draws the synthetic people (needs Node.js)
    autoencoder  trains the autoencoder, then encodes every picture
    text         writes the tokenizer
    unet         trains the U-Net and the text encoder on captions
    encoder      trains the face encoder
    recogniser   trains the examiner, which only judges
    adapter      writes the training set and trains the FeedFace adapter with ``trainer.train``

With names of stages only those run. Everything between the stages lives in ``--work``; the finished parts go to
``--output``. """

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from . import autoencoder, denoiser, identity, system, text
from .dataset import write_dataset
from .people import People, PeopleConfig
from .people import build as draw_people

WORK = Path.home() / ".cache" / "feedface" / "small"
PICTURES = 18_000  # of 3,000 people: what the U-Net and the adapter are trained on; the other networks see all
CONFIG = Path(__file__).parents[1] / "configs" / "small.yaml"


class Build:
    """The stages, with what they hand to each other."""

    def __init__(self, work: Path, output: Path, log: Callable[[str], None] = print):
        self.work, self.output, self.log = work, output, log

    def run(self, name: str) -> None:
        """One stage, and a line in ``stages.jsonl`` with the time it took."""
        began = time.monotonic()
        getattr(self, name)()
        with (self.work / "stages.jsonl").open("a") as file:
            file.write(json.dumps({"stage": name, "seconds": round(time.monotonic() - began, 1)}) + "\n")

    def people(self) -> None:
        draw_people(self.work / "people", PeopleConfig(), log=self.log)

    def autoencoder(self) -> None:
        people = People.load(self.work / "people", "train")
        done = self.work / "autoencoder" / "result"
        if not done.is_dir():
            autoencoder.train_autoencoder(people, self.work / "autoencoder", log=self.log).save_pretrained(done)
        model = AutoencoderKL.from_pretrained(done).eval()
        autoencoder.encode_all(model, people.first(PICTURES), self.work / "autoencoder" / "latents.npy", log=self.log)

    def text(self) -> None:
        text.write_tokenizer(self.work / "tokenizer")

    def unet(self) -> None:
        people = People.load(self.work / "people", "train").first(PICTURES)
        tokenizer = text.CLIPTokenizer.from_pretrained(self.work / "tokenizer")
        latents = autoencoder.encode_all(
            AutoencoderKL.from_pretrained(self.work / "autoencoder" / "result").eval(), people,
            self.work / "autoencoder" / "latents.npy", log=self.log,
        )  # fmt: skip
        model = denoiser.train_denoiser(people, latents, tokenizer, self.work / "denoiser", log=self.log)
        vae = AutoencoderKL.from_pretrained(self.work / "autoencoder" / "result")
        system.save_pipeline(self.output, vae, model.unet, model.text_encoder, tokenizer)

    def encoder(self) -> None:
        people = People.load(self.work / "people", "train")
        system.save_encoder(self.output, identity.train_encoder(people, self.work / "encoder", log=self.log))

    def recogniser(self) -> None:
        people = People.load(self.work / "people", "train")
        system.save_examiner(self.output, identity.train_examiner(people, self.work / "examiner", log=self.log))

    def adapter(self) -> None:
        people = People.load(self.work / "people", "train").first(PICTURES)
        manifest = write_dataset(people, self.work / "dataset", log=self.log)
        settings = [
            str(CONFIG), f"model.base={self.output}", f"adapter.encoder.path={self.output / 'face_encoder'}",
            f"data.manifest={manifest}", f"data.cache={self.work / 'dataset' / 'cache'}",
            f"train.output={self.work / 'adapter'}",
        ]  # fmt: skip
        for command in ("trainer.cache", "trainer.train"):
            subprocess.run([sys.executable, "-m", command, *settings], check=True)


STAGES = ("people", "autoencoder", "text", "unet", "encoder", "recogniser", "adapter")


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m trainer.small.build", description=__doc__.split("\n")[0])
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"any of {', '.join(STAGES)}; all by default")
    parser.add_argument("--work", type=Path, default=WORK, help=f"data and checkpoints (default {WORK})")
    parser.add_argument(
        "--output", type=Path, default=system.FOLDER, help="the finished parts (default models/feedface_small)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    unknown = [s for s in options.stages if s not in STAGES]
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    build = Build(options.work, options.output, lambda line: print(line, flush=True))
    for stage in options.stages or STAGES:
        build.run(stage)


if __name__ == "__main__":
    main()
