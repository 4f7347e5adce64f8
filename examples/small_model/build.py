"""Makes the small model from nothing: ``python -m examples.small_model.build [stage …] [name=value …]``.

Stages, each seeded and resumable, each done in a moment when its result is there::

    people       draws the synthetic people (needs Node.js)
    autoencoder  trains the autoencoder
    unet         encodes every picture, then trains the U-Net and the text encoder on captions, on pictures of one
                 person and of two side by side
    encoder      trains the face encoder
    recogniser   trains the networks that only judge, on people of their own
    adapter      trains the FeedFace adapter with ``trainer.train``
    kinds        trains adapters of other kinds for the templates: Face0, Face Mixer, several people
    publish      copies the finished model to ``models/feedface_small``
    published    takes the model of ``--output`` instead of training all of it; only when asked for
    variants     trains the other adapters that ``bench identity`` compares; only when asked for
    words        says how much a wrong word raises the U-Net's loss so far; only when asked for
    preview      draws 48 pictures with the U-Net so far; only when asked for

With names of stages only those run. Settings come from ``small.yaml`` or another ``--settings``. Everything between
the stages lives in ``--work``; the finished model goes to ``--output``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from feedface_core.files.atomic import replacing
from trainer.config import load_config
from trainer.data.manifest import write_rows
from trainer.errors import TrainerError
from trainer.export import export
from trainer.models.precision import fastest_precision
from trainer.training.checkpoint import load_latest
from trainer.training.stopping import Interrupted

from . import autoencoder, denoiser, examiner, identity, settings, system, text
from .drawing import People, draw, draw_pairs
from .showcase import write_sheet, write_showcase
from .summary import LOGS, write_readme
from .variants import CACHES, IN_TEXT, STREAMS, VARIANTS, overrides_of, steps_of_files

WORK = Path.home() / ".cache" / "feedface" / "small"
CONFIG = Path(__file__).with_name("adapter.yaml")
DATE = "2026-11-24T00:00:00Z"  # in the adapters, whenever they are made: training again writes the same files


class Build:
    """The stages, with what they hand to each other.

    Args:
        work: data and checkpoints.
        target: where the finished model goes.
        chosen: the settings.
        only: names of :data:`VARIANTS` to train; none means all of them.
    """

    def __init__(self, work: Path, target: Path, chosen: settings.SmallModelSettings, only: Sequence[str] = ()):
        self.work, self.output, self.target = work.resolve(), work.resolve() / "output", target
        self.settings, self.only = chosen, only

    def run(self, name: str) -> None:
        """One stage, and a line in ``stages.jsonl`` with the time it took."""
        began = time.monotonic()
        getattr(self, name)()
        with (self.work / "stages.jsonl").open("a") as file:
            file.write(json.dumps({"stage": name, "seconds": round(time.monotonic() - began, 1)}) + "\n")

    def load_people(self, split: str = "train") -> People:
        return People.load(self.work / "people", split)

    def people(self) -> None:
        draw(self.work / "people", self.settings.people)
        if self.settings.pairs:
            draw_pairs(self.work / "people", self.settings.people, self.settings.pairs)

    def autoencoder(self) -> AutoencoderKL:
        people, stage = self.load_people(), self.settings.autoencoder
        return autoencoder.train_autoencoder(people, self.work / "autoencoder", stage, self.start())

    def start(self) -> AutoencoderKL | None:
        """The autoencoder whose encoder stays, standardised for the pictures; None where both halves are trained."""
        folder = self.work / "start"
        if self.settings.autoencoder.start is None:
            return None
        if not folder.is_dir():
            model = autoencoder.start_from(Path(self.settings.autoencoder.start), self.load_people())
            unfinished = folder.with_suffix(".writing")
            model.save_pretrained(unfinished)
            unfinished.rename(folder)
        return AutoencoderKL.from_pretrained(folder).eval()

    def encoded(self, people: People, folder: str) -> dict[str, Tensor]:
        """What the U-Net learns from, which needs the autoencoder's encoder only."""
        return autoencoder.encode_all(lambda: self.start() or self.autoencoder(), people, self.work / folder)

    def unet(self) -> None:
        people = self.load_people().first(self.settings.pictures)
        pictures, pairs = denoiser.Pictures(people, self.encoded(people, "latents")), None
        if self.settings.pairs is not None:
            beside = self.load_people("pairs")
            pairs = denoiser.Pictures(beside, self.encoded(beside, "pair-latents"))
        model = denoiser.train_denoiser(pictures, pairs, self.untrained(), self.work / "unet", self.settings.unet)
        system.save_pipeline(self.output, self.autoencoder(), model.unet, model.text_encoder, self.settings.people)

    def untrained(self) -> denoiser.TextToImage:
        """What the training of the U-Net begins with."""
        stage = self.settings.unet
        if stage.start is not None:
            return system.load_text_to_image(Path(stage.start))
        return denoiser.TextToImage(text.write_tokenizer(self.work / "text"), self.settings.people.size, stage.widths)

    def encoder(self) -> None:
        folder, stage, start = self.work / "encoder", self.settings.encoder, None
        if stage.start is not None:
            start = system.encoder_of(Path(stage.start) / system.ADAPTER).state_dict()
        encoder = identity.train_encoder(self.load_people(), folder, stage, self.settings.crop, start)
        system.save_encoder(self.output, encoder)

    def recogniser(self) -> None:
        people = self.load_people("examiner")
        masks = examiner.train_mask_reader(people, self.work / "masks", self.settings.masks)
        eyes = examiner.train_eye_reader(people, self.work / "eyes", self.settings.eyes)
        judge = examiner.train_examiner(people, self.work / "recogniser", self.settings.recogniser)
        system.save_examiner(self.output, judge, masks, eyes)

    def adapter(self) -> None:
        self.train_adapter("full")
        (self.output / system.ADAPTER).parent.mkdir(exist_ok=True)
        shutil.copyfile(self.work / "adapters" / "full-100.safetensors", self.output / system.ADAPTER)

    def kinds(self) -> None:
        for variant in ("face0", "mixer-text", *(["several"] if self.settings.pairs else [])):
            steps = self.train_adapter(variant)
            options = {"statistics": 1000} if variant in IN_TEXT else {}
            self.export(variant, steps, self.output / system.PUBLISHED[variant], **options)

    def publish(self) -> None:
        write_showcase(self.load_people("heldout"), self.output)
        write_sheet(self.output, self.output / "sheet.png")
        write_readme(self.work, self.output)
        (self.output / "training").mkdir(exist_ok=True)
        for stage, folder in LOGS.items():
            shutil.copyfile(self.work / folder / "log.jsonl", self.output / "training" / f"{stage}.jsonl")
        # the adapter carries the face encoder, so a second copy would only be weight
        shutil.copytree(self.output, self.target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("face_encoder"))

    def words(self) -> None:
        """Whether the U-Net heeds its captions so far: how much a wrong word raises the loss, for each attribute."""
        people = self.load_people("heldout").first(512)
        model, step = self.unet_so_far()
        costs = denoiser.cost_of_wrong_words(model, people, self.encoded(people, "words"))
        with (self.work / "words.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **costs}) + "\n")
        for name, (loss, rise, error) in costs.items():
            print(f"step {step}, {name}: loss {loss:.4f}, a wrong word {rise:+.5f} ± {error:.5f}")

    def preview(self) -> None:
        """``preview/sheet.png``: the first 48 pictures that the U-Net so far draws of the benchmark's prompts."""
        model, step = self.unet_so_far()
        folder = self.work / "preview"
        vae = self.start() or self.autoencoder()
        system.save_pipeline(folder, vae, model.unet, model.text_encoder, self.settings.people)
        write_sheet(folder, folder / "sheet.png")
        print(f"step {step}: {folder / 'sheet.png'}")

    def unet_so_far(self) -> tuple[denoiser.TextToImage, int]:
        """The averaged weights of the newest checkpoint, and its step."""
        checkpoint = load_latest(self.work / "unet") if (self.work / "unet").is_dir() else None
        if checkpoint is None:
            raise TrainerError(f"no checkpoint in {self.work / 'unet'}: `python -m examples.small_model.build unet`")
        model = self.untrained()
        model.load_state_dict(checkpoint.weights())
        return model.eval(), checkpoint.step

    def published(self) -> None:
        """The published model as if its stages had run here, so that other adapters can be trained for it."""
        shutil.copytree(self.target, self.output, dirs_exist_ok=True)
        system.save_encoder(self.output, system.encoder_of(self.output / system.ADAPTER))

    def variants(self) -> None:
        for training in range(self.settings.trainings):
            for name in self.only or ("full", *VARIANTS, *STREAMS):
                self.train_adapter(name, training)

    def train_adapter(self, variant: str, training: int = 0) -> int:
        """One adapter, and its files along its training, ``adapters/<name>-<per cent>.safetensors``; the name of a
        training after the first is ``<variant>-seed<number>``.

        Paths are relative to the working folder, since the trainer writes its settings into the adapter.
        """
        manifest = "people/train/adapter.jsonl"
        if variant == "several":
            manifest = "people/pairs/manifest.jsonl"
        else:
            write_rows(self.work / manifest, self.load_people().first(self.settings.pictures).records)
        name = system.adapter_name(variant, training)
        unet = denoiser.create(self.settings.people.size, self.settings.unet.widths)
        values = [
            "model.base=output",
            f"model.precision={fastest_precision()}",
            "adapter.encoder.path=output/face_encoder",
            f"adapter.encoder.image_size={self.settings.crop}",
            f"data.manifest={manifest}",
            f"data.cache=adapters/{CACHES.get(variant, 'cache')}",
            f"train.output=adapters/{name}",
            *overrides_of(variant, unet, self.settings.people.size),
            *([f"train.seed={training}"] if training else []),
            *self.start_of(name),
            *self.settings.variants.get(variant, self.settings.adapter),
        ]
        parts = steps_of_files(variant, load_config(CONFIG, values).train)
        environment = os.environ | {"PYTHONPATH": str(CONFIG.parents[2])}
        for command in ("trainer.cache", "trainer.train"):
            arguments = [sys.executable, "-m", command, str(CONFIG), *values]
            subprocess.run(arguments, check=True, cwd=self.work, env=environment)
        for percent, step in parts.items():
            self.export(name, step, self.work / "adapters" / f"{name}-{percent}.safetensors")
        return parts[100]

    def start_of(self, name: str) -> list[str]:
        """The override that lets an adapter go on from the published one of its kind."""
        # "several" goes on from the adapter of this model
        if self.settings.adapter_start is None or name not in system.PUBLISHED or name == "several":
            return []
        file = self.work / "adapters" / f"{name}-start.safetensors"
        if not file.is_file():
            with replacing(file) as unfinished:
                shutil.copyfile(Path(self.settings.adapter_start) / system.PUBLISHED[name], unfinished)
        return [f"adapter.init=adapters/{file.name}"]

    def export(self, name: str, step: int, file: Path, **options: Any) -> None:
        """A step of an adapter's training as a file; the paths in its settings are relative to the working folder."""
        source, encoder, before = self.work / "adapters" / name, str(self.output / "face_encoder"), Path.cwd()
        os.chdir(self.work)
        try:
            metadata = {"modelspec.date": DATE}
            export(source / f"checkpoint-{step:08d}", file, encoder_path=encoder, more_metadata=metadata, **options)
        finally:
            os.chdir(before)


STAGES = ("people", "autoencoder", "unet", "encoder", "recogniser", "adapter", "kinds", "publish")


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    known = (*STAGES, "published", "variants", "words", "preview")
    parser = argparse.ArgumentParser(prog="python -m examples.small_model.build", description=__doc__.split("\n")[0])
    parser.add_argument(
        "stages", nargs="*", metavar="stage", help=f"any of {', '.join(known)}; default all up to publish"
    )
    parser.add_argument("--work", type=Path, default=WORK, help=f"data and checkpoints (default {WORK})")
    parser.add_argument("--settings", type=Path, default=settings.FILE, help="the recipe (default small.yaml)")
    parser.add_argument("--output", type=Path, default=system.FOLDER, help="where publish puts the finished model")
    names = ("full", *VARIANTS, *STREAMS)
    listed = ", ".join(names)
    parser.add_argument("--only", nargs="+", default=(), choices=names, help=f"of the variants: {listed}")
    parser.add_argument("--quick", action="store_true", help="a few people and steps; needs a --work of its own")
    parser.add_argument("--threads", type=int, default=1, help="for models this small one is fastest (default 1)")
    options = parser.parse_args(arguments)
    stages = [word for word in options.stages if "=" not in word]
    unknown = [stage for stage in stages if stage not in known]
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(known)}")
    if options.quick and options.work == WORK:
        parser.error("--quick needs a --work of its own, such as --work small-quick")
    torch.set_num_threads(options.threads)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    options.work.mkdir(parents=True, exist_ok=True)
    overrides = [*(settings.QUICK if options.quick else ()), *(word for word in options.stages if "=" in word)]
    try:
        chosen = settings.load(overrides, options.settings)
        build = Build(options.work, options.output, chosen, options.only)
        for stage in stages or STAGES:
            build.run(stage)
    except TrainerError as problem:
        sys.exit(f"error: {problem}")
    except Interrupted as stopped:
        sys.exit(str(stopped))


if __name__ == "__main__":
    main()
