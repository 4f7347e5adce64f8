"""Makes the small system from nothing: ``python -m examples.small_model.build``.

Stages, each seeded and resumable, each skipped when its result is there::

    people       draws the synthetic people (needs Node.js)
    autoencoder  trains the autoencoder, then encodes every picture
    text         writes the tokenizer
    unet         trains the U-Net and the text encoder on captions
    encoder      trains the face encoder
    recogniser   trains the examiner, which only judges
    adapter      writes the training set and trains the FeedFace adapter with ``trainer.train``
    publish      copies the finished parts to ``models/feedface_small``
    variants     trains the other adapters that ``bench identity`` compares; only when asked for

With names of stages only those run. Everything between the stages lives in ``--work``; the finished parts go to
``--output``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from trainer.config import load_config
from trainer.export import export

from . import autoencoder, denoiser, identity, system, text
from .dataset import write_dataset
from .drawing import People
from .drawing import build as draw_people
from .loop import LoopConfig
from .people import PeopleConfig
from .showcase import write_showcase
from .summary import LOGS, write_readme

WORK = Path.home() / ".cache" / "feedface" / "small"
PICTURES = 18_000  # of 3,000 people: what the U-Net and the adapter are trained on; the other networks see all
CONFIG = Path(__file__).with_name("adapter.yaml")

DATE = "2026-11-24T00:00:00Z"  # in the adapters, whenever they are made: training again writes the same files

QUICK_PEOPLE = PeopleConfig(train_identities=12, heldout_identities=32)
QUICK_TRAINING = ("train.steps=8", "train.batch_size=4", "train.checkpoint_every=2")


class Build:
    """The stages, with what they hand to each other."""

    def __init__(
        self,
        work: Path,
        target: Path = system.FOLDER,
        quick: bool = False,
        log: Callable[[str], None] = print,
        only: Sequence[str] = (),
    ):
        self.work, self.output, self.target, self.log = work.resolve(), work.resolve() / "output", target, log
        self.people_config = QUICK_PEOPLE if quick else PeopleConfig()
        self.overrides = QUICK_TRAINING if quick else ()
        self.quick, self.only = quick, only

    def loop(self, config: LoopConfig) -> LoopConfig:
        """The length of a stage, a few steps when it is only to see that it works."""
        return dataclasses.replace(config, steps=6, batch=4, warmup=2) if self.quick else config

    def run(self, name: str) -> None:
        """One stage, and a line in ``stages.jsonl`` with the time it took."""
        began = time.monotonic()
        getattr(self, name)()
        with (self.work / "stages.jsonl").open("a") as file:
            file.write(json.dumps({"stage": name, "seconds": round(time.monotonic() - began, 1)}) + "\n")

    def people(self) -> None:
        draw_people(self.work / "people", self.people_config, log=self.log)

    def autoencoder(self) -> None:
        people = People.load(self.work / "people", "train")
        done = self.work / "autoencoder" / "result"
        if not done.is_dir():
            model = autoencoder.train_autoencoder(
                people, self.work / "autoencoder", self.loop(autoencoder.LOOP), log=self.log
            )
            model.save_pretrained(done)
        model = AutoencoderKL.from_pretrained(done).eval()
        autoencoder.encode_all(model, people.first(PICTURES), self.work / "autoencoder" / "latents.npy", log=self.log)

    def text(self) -> None:
        text.write_tokenizer(self.work / "tokenizer")

    def unet(self) -> None:
        people = People.load(self.work / "people", "train").first(PICTURES)
        tokenizer = text.CLIPTokenizer.from_pretrained(self.work / "tokenizer")
        latents = autoencoder.encode_all(
            AutoencoderKL.from_pretrained(self.work / "autoencoder" / "result").eval(),
            people,
            self.work / "autoencoder" / "latents.npy",
            log=self.log,
        )
        model = denoiser.train_denoiser(
            people, latents, tokenizer, self.work / "denoiser", self.loop(denoiser.LOOP), log=self.log
        )
        vae = AutoencoderKL.from_pretrained(self.work / "autoencoder" / "result")
        system.save_pipeline(self.output, vae, model.unet, model.text_encoder)

    def encoder(self) -> None:
        people = People.load(self.work / "people", "train")
        loop = self.loop(identity.ENCODER_LOOP)
        system.save_encoder(self.output, identity.train_encoder(people, self.work / "encoder", loop, log=self.log))

    def recogniser(self) -> None:
        people = People.load(self.work / "people", "train")
        folder = self.work / "examiner"
        masks = identity.train_mask_reader(people, folder, self.loop(identity.MASK_LOOP), log=self.log)
        examiner = identity.train_examiner(people, folder, self.loop(identity.EXAMINER_LOOP), log=self.log)
        system.save_examiner(self.output, examiner, masks)

    def adapter(self) -> None:
        people = People.load(self.work / "people", "train").first(PICTURES)
        write_dataset(people, self.work / "dataset", log=self.log)
        self.train_adapter("full")
        (self.output / system.ADAPTER).parent.mkdir(exist_ok=True)
        shutil.copyfile(self.work / "adapters" / "full-100.safetensors", self.output / system.ADAPTER)

    def publish(self) -> None:
        write_showcase(People.load(self.work / "people", "heldout"), self.output)
        write_readme(self.work, self.output)
        (self.output / "training").mkdir(exist_ok=True)
        for stage, (folder, name) in (LOGS | {"mask_reader": ("examiner", "mask_reader")}).items():
            shutil.copyfile(self.work / folder / f"{name}.jsonl", self.output / "training" / f"{stage}.jsonl")
        # the adapter carries the face encoder, so a second copy would only be weight
        shutil.copytree(self.output, self.target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("face_encoder"))

    def variants(self) -> None:
        for name in self.only or VARIANTS:
            self.train_adapter(name)

    def train_adapter(self, name: str) -> None:
        """One adapter, and its file at every quarter of its training, ``adapters/<name>-<per cent>.safetensors``.

        Paths are relative to the working folder, since the trainer writes its settings into the adapter.
        """
        settings = [
            "model.base=output",
            "adapter.encoder.path=output/face_encoder",
            "data.manifest=dataset/manifest.jsonl",
            "data.cache=dataset/cache",
            f"train.output=adapters/{name}",
            *VARIANTS.get(name, ()),
            *self.overrides,
        ]
        environment = os.environ | {"PYTHONPATH": str(CONFIG.parents[2])}
        for command in ("trainer.cache", "trainer.train"):
            subprocess.run(
                [sys.executable, "-m", command, str(CONFIG), *settings], check=True, cwd=self.work, env=environment
            )
        steps = load_config(CONFIG, settings).train.steps
        for part in (25, 50, 100):
            export(
                self.work / "adapters" / name / f"checkpoint-{steps * part // 100:08d}",
                self.work / "adapters" / f"{name}-{part}.safetensors",
                encoder_path=str(self.output / "face_encoder"),
                more_metadata={"modelspec.date": DATE},
            )


SITES = [
    "input_blocks.1.1.transformer_blocks.0",
    "input_blocks.3.1.transformer_blocks.0",
    "middle_block.1.transformer_blocks.0",
    "output_blocks.0.1.transformer_blocks.0",
    "output_blocks.1.1.transformer_blocks.0",
    "output_blocks.2.1.transformer_blocks.0",
    "output_blocks.3.1.transformer_blocks.0",
]
VARIANTS = {
    "standard-loss": ["loss.kind=standard"],
    "mask-loss": ["loss.kind=mask"],
    "no-retrieval": ["data.retrieval=false", "data.augment_variants=0"],
    "no-self-attention": ["adapter.self_attention=false"],
    "every-second-site": [f"adapter.sites={json.dumps(SITES[::2])}"],
    "one-a-resolution": [f"adapter.sites={json.dumps([SITES[2], SITES[6]])}"],
}
STAGES = ("people", "autoencoder", "text", "unet", "encoder", "recogniser", "adapter", "publish")
EXTRA = ("variants",)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m examples.small_model.build", description=__doc__.split("\n")[0])
    parser.add_argument(
        "stages", nargs="*", metavar="stage", help=f"any of {', '.join(STAGES + EXTRA)}; by default all but the last"
    )
    parser.add_argument("--work", type=Path, default=WORK, help=f"data and checkpoints (default {WORK})")
    parser.add_argument("--output", type=Path, default=system.FOLDER, help="where publish puts the finished parts")
    parser.add_argument(
        "--only",
        nargs="+",
        default=(),
        metavar="NAME",
        choices=list(VARIANTS),
        help=f"of the variants just these: {', '.join(VARIANTS)}",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few people and steps, to see that it works; needs a --work of its own"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="for models this small one is fastest; run other stages beside it instead",
    )
    options = parser.parse_args(arguments)
    unknown = [s for s in options.stages if s not in STAGES + EXTRA]
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES + EXTRA)}")
    if options.quick and options.work == WORK:
        parser.error("--quick needs a --work of its own, such as --work small-quick")
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    build = Build(options.work, options.output, options.quick, lambda line: print(line, flush=True), options.only)
    for stage in options.stages or STAGES:
        build.run(stage)


if __name__ == "__main__":
    main()
