"""``python -m trainer.export RUN``: write the adapter of a checkpoint as one file that the nodes load."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field, TypeAdapter

from feedface_core.arithmetic import FaceStatistics
from feedface_core.config import AdapterConfig
from feedface_core.errors import located, typed
from feedface_core.faces.recognisers import LICENCES
from feedface_core.files.adapter_file import UNET_FILE, UNET_KIND, expected_shapes, save_adapter
from feedface_core.files.atomic import write_safetensors
from feedface_core.state_dict import check_tensors

from .config import Config, EncoderSettings, stated_licence
from .config.fields import as_path
from .data.manifest import read_manifest
from .data.reading import read_crop
from .errors import TrainerError, exit_code
from .models.face_encoder import FaceEncoder, load_face_encoder
from .models.precision import DTYPES
from .models.unet import split, unet_file
from .training.checkpoint import MANIFEST, Checkpoint, CheckpointError, load_checkpoint, load_latest


class UnetState(BaseModel, strict=True):
    """What a state says of a U-Net that was trained; see :class:`trainer.models.unet.TrainedUnet`."""

    kind: Literal["lora", "full"]
    rank: Annotated[int, Field(ge=1)] = 1
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


class _State(BaseModel, strict=True):
    """What a state of adapter training holds beside its step."""

    samples: Annotated[int, Field(ge=0, le=10**15)]
    base: str
    config: str
    adapter: str
    unet: UnetState | None = None


_STATE = TypeAdapter(_State)


def find_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint's folder, or the newest sound one of a run.

    Raises:
        CheckpointError: when there is none, or the one that was named is broken.
    """
    found = load_checkpoint(path) if (path / MANIFEST).is_file() else load_latest(path)
    if found is None:
        raise CheckpointError(f"{path} holds no checkpoint; give a train.output folder, or a checkpoint in it")
    return found


def export(
    source: Path,
    target: Path | None = None,
    weights: Literal["auto", "ema", "raw"] = "auto",
    precision: str = "fp16",
    title: str | None = None,
    encoder_path: str | None = None,
    more_metadata: Mapping[str, str] | None = None,
    licence: str | None = None,
    statistics: int = 0,
) -> Path:
    """Write an adapter file, and beside it what was trained of the U-Net: ``<name>_lora.safetensors`` for ComfyUI's
    Load LoRA, or ``<name>_unet.safetensors`` for Load Diffusion Model.

    Args:
        source: a run's folder or a checkpoint in it.
        target: the file; None puts ``<run>/<run's name>-<step>.safetensors`` beside the checkpoints.
        weights: the moving average, the raw weights, or the average where there is one.
        precision: number format of the file: fp32, fp16 or bf16.
        title: None keeps that of the configuration.
        encoder_path: the encoder's folder, where it has moved since training.
        more_metadata: goes into the file's metadata, before anything of the same key.
        licence: of the adapter; None keeps that of the configuration.
        statistics: faces of the manifest whose mean and components go into the file, for random faces; 0 for none.

    Raises:
        TrainerError: for a checkpoint or an encoder that is missing, or that do not belong together.
    """
    checkpoint = find_checkpoint(as_path(source, "source"))
    with located(checkpoint.path):
        state = typed(_STATE, checkpoint.state)
        config, adapter = Config.from_json(state.config), AdapterConfig.from_json(state.adapter)
        averaged = weights != "raw" and "ema" in checkpoint.tensors
        stored = {"weights": checkpoint.weights(weights), **checkpoint.tensors}
        unet = {}
        if state.unet is not None:
            unet = split(stored["weights"])[1]
            stored = {name: split(one)[0] for name, one in stored.items()}
        tensors, raw, shapes = stored["weights"], stored["trainables"], expected_shapes(adapter)
        check_tensors("trainables", shapes, raw)
        if averaged:  # of what is trained; a dropped face that is a crop of zeros is not
            trained = {name: shape for name, shape in shapes.items() if not name.endswith("null_hidden")}
            check_tensors("ema", trained, stored["ema"])
    if title is not None:
        adapter = dataclasses.replace(adapter, title=title)
    run = checkpoint.path.parent
    encoder_tensors = faces = None
    if adapter.encoder.included or statistics:
        settings = config.adapter.encoder
        if encoder_path is not None:
            settings = settings.model_copy(update={"path": encoder_path})
        encoder = load_face_encoder(settings, allow_hub=config.model.allow_hub)
        if encoder.config.fingerprint != adapter.encoder.fingerprint:
            raise TrainerError(
                f"{settings.path} is not the encoder of this run: fingerprint {encoder.config.fingerprint}, expected "
                f"{adapter.encoder.fingerprint}"
            )
        encoder_tensors = encoder.tensors() if adapter.encoder.included else None
        faces = face_statistics(config, encoder, statistics) if statistics else None
    licences = {
        "modelspec.license": config.licence.adapter if licence is None else licence,
        "license.base": config.licence.base or stated_licence(config.model.base),
        "license.encoder": config.licence.encoder or encoder_licence(config.adapter.encoder, encoder_path),
    }
    metadata = {
        **{key: text for key, text in licences.items() if text},
        "modelspec.resolution": f"{config.data.resolution}x{config.data.resolution}",
        "modelspec.description": f"Face adapter, {checkpoint.step} steps of {config.train.batch_size} samples"
        f" ({'moving average' if averaged else 'raw weights'})",
        "training.config": state.config,
        "training.step": str(checkpoint.step),
        "training.samples": str(state.samples),
        "training.base": json.dumps({"name": Path(config.model.base).name, "fingerprint": state.base}),
        "training.weights": "ema" if averaged else "raw",
        **(more_metadata or {}),
    }
    target = Path(target or run / f"{run.name}-{checkpoint.step}.safetensors")
    if state.unet is not None:
        beside = unet_path(target, state.unet.kind)
        text = f"What {target.name} trained of the U-Net ({state.unet.kind})"
        described = metadata | {"format": "pt", "modelspec.description": text}
        found = unet_file(state.unet.model_dump(), unet)
        kind = DTYPES[precision]
        write_safetensors(beside, {name: one.to(kind).contiguous() for name, one in found.items()}, described)
        metadata |= {UNET_KIND: state.unet.kind, UNET_FILE: beside.name}
    return save_adapter(target, adapter, tensors, encoder_tensors, metadata, DTYPES[precision], faces)


def unet_path(target: Path, kind: Literal["lora", "full"]) -> Path:
    """Where what was trained of the U-Net goes, beside an adapter."""
    return target.with_name(f"{target.stem}_{'lora' if kind == 'lora' else 'unet'}.safetensors")


def encoder_licence(settings: EncoderSettings, moved_to: str | None) -> str:
    """What is known of the licence of a run's encoder."""
    return LICENCES[settings.recogniser] if settings.recogniser else stated_licence(moved_to or settings.path)


def face_statistics(config: Config, encoder: FaceEncoder, count: int) -> FaceStatistics:
    """The statistics of at most ``count`` faces of a run, evenly spaced over its manifest.

    Raises:
        TrainerError: a manifest or photos that cannot be read, or fewer than two faces.
    """
    records, _ = read_manifest(config.data.manifest, config.data.root, config.data.drop_missing)
    chosen = [records[len(records) * place // count] for place in range(count)] if count < len(records) else records
    if len(chosen) < 2:
        raise TrainerError(f"statistics of {len(chosen)} face(s) say nothing; give a run of more, or --statistics 0")
    hidden = []
    for start in range(0, len(chosen), config.data.cache_batch):
        group = chosen[start : start + config.data.cache_batch]
        hidden.append(encoder.encode(torch.stack([read_crop(one, encoder.config.image_size) for one in group])))
    return FaceStatistics.of(torch.cat(hidden))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 when written, 1 for an error of the input."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.export", description="Write the adapter of a checkpoint as one file."
    )
    parser.add_argument("source", type=Path, help="a run's folder (train.output), or a checkpoint in it")
    parser.add_argument("-o", "--output", type=Path, help="the .safetensors file; by default in the run's folder")
    parser.add_argument(
        "--weights",
        choices=("auto", "ema", "raw"),
        default="auto",
        help="moving average or raw weights; auto takes the average where there is one",
    )
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp16")
    parser.add_argument("--title")
    parser.add_argument("--licence", help="of the adapter, such as an SPDX identifier")
    parser.add_argument("--encoder", help="the face encoder's folder, if it has moved since training")
    parser.add_argument(
        "--statistics", type=int, default=0, metavar="N", help="with the statistics of N faces, for random faces"
    )
    options = parser.parse_args(arguments)
    if not 0 <= options.statistics <= 100_000:
        parser.error(f"--statistics: expected 0 to 100000, found {options.statistics}")

    def run() -> None:
        path = export(
            options.source,
            options.output,
            options.weights,
            options.precision,
            options.title,
            options.encoder,
            statistics=options.statistics,
            licence=options.licence,
        )
        beside = [own for own in (unet_path(path, "lora"), unet_path(path, "full")) if own.is_file()]
        for written in (path, *beside):
            print(f"wrote {written} ({written.stat().st_size / 2**20:.1f} MB)")

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
