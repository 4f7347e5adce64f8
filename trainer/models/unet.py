"""Training the U-Net along with an adapter, as Face0 does (section 3): a LoRA on it (Hu et al. 2021), or all of it.

What comes out are files that ComfyUI's own nodes read: a LoRA by kohya's names (Load LoRA), or a U-Net by the names of
the original release (Load Diffusion Model).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from feedface_core.errors import FeedFaceError, shorten
from feedface_core.modules.adapter import FaceAdapter
from feedface_core.state_dict import read_state_dict

from ..config import Config, LoraSettings
from ..config.fields import as_path
from ..errors import TrainerError
from .frozen_model import FrozenModel
from .ldm_names import ldm_names

LORA, LDM = "lora_unet_", "model.diffusion_model."
DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"


class TrainedUnet:
    """The U-Net of a run that trains it.

    Args:
        host: the U-Net; its weights that require a gradient are trained.
        described: what checkpoints say of it: ``kind``, and for a LoRA ``rank``, ``alpha`` and ``targets``.
        released: fingerprint of the U-Net before it was changed; empty where nobody asks for it.
    """

    def __init__(self, host: nn.Module, described: Mapping[str, Any], released: str = "") -> None:
        self.host, self.described, self.released = host, dict(described), released

    @property
    def lora(self) -> bool:
        """Whether a LoRA is trained; else all weights are."""
        return self.described["kind"] == "lora"

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: value for name, value in self.host.named_parameters() if value.requires_grad}

    @contextmanager
    def as_released(self) -> Iterator[None]:
        """Within it, the U-Net predicts as it did before training; of a LoRA only."""
        from peft.helpers import rescale_adapter_scale

        with rescale_adapter_scale(self.host, 0.0):
            yield


class AdapterAndUnet(nn.Module):
    """What a run trains that trains the U-Net as well. Its state dict leaves out what is frozen of the U-Net.

    Args:
        adapter, unet: of the run.
    """

    def __init__(self, adapter: FaceAdapter, unet: TrainedUnet) -> None:
        super().__init__()
        self.adapter, self.unet, self._trained = adapter, unet.host, unet.trained()

    def state_dict(self, *_, **__) -> dict[str, Tensor]:
        """``adapter.…`` and ``unet.…``."""
        adapter = {f"adapter.{name}": value for name, value in self.adapter.state_dict().items()}
        return adapter | {f"unet.{name}": value.detach() for name, value in self._trained.items()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor], *_, **__) -> None:
        """Raises ``RuntimeError`` for other names or shapes."""
        adapter, unet = split(state_dict)
        if odd := sorted(unet.keys() ^ self._trained.keys()):
            raise RuntimeError(f"it holds other weights of the U-Net: {', '.join(odd[:3])}")
        self.adapter.load_state_dict(adapter)
        for name, value in self._trained.items():
            if value.shape != unet[name].shape:
                raise RuntimeError(f"unet.{name} is {tuple(unet[name].shape)}, expected {tuple(value.shape)}")
            value.copy_(unet[name])


def split(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of :class:`AdapterAndUnet` → those of the adapter and those of the U-Net, each by its own names."""
    adapter, unet = (
        {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}
        for start in ("adapter.", "unet.")
    )
    return adapter, unet


def describe_unet(config: Config) -> dict[str, Any] | None:
    """What checkpoints say of the U-Net; None where it stays as it is."""
    if config.train.unet == "frozen":
        return None
    if config.train.unet == "full":
        return {"kind": "full"}
    settings = config.adapter.lora or LoraSettings()
    return {
        "kind": "lora",
        "rank": settings.rank,
        "alpha": settings.alpha or float(settings.rank),
        "targets": list(settings.targets),
    }


def train_unet(config: Config, frozen: FrozenModel, released: str = "") -> TrainedUnet | None:
    """Makes the U-Net of a run trainable as ``train.unet`` says; None where it stays frozen.

    A LoRA starts as nothing, drawn from ``train.seed``; all weights are trained in single precision.

    Raises:
        TrainerError: the base is no U-Net, or a LoRA has nothing to go on.
    """
    described = describe_unet(config)
    if described is None:
        return None
    host = frozen.host
    if not isinstance(host, UNet2DConditionModel):
        raise TrainerError(
            f"train.unet={config.train.unet}: {frozen.name} is UniDiffuser, whose U-ViT is no U-Net; set "
            "train.unet=frozen"
        )
    if described["kind"] == "full":
        host.float().requires_grad_(True)
        frozen.dtype = torch.float32
    else:
        _add_lora(host, described, config.train.seed)
    return TrainedUnet(host, described, released)


def _add_lora(host: nn.Module, described: Mapping[str, Any], seed: int) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise TrainerError(f"train.unet=lora needs the package peft ({shorten(error)}); pip install peft") from error
    layers = [name for name, module in host.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    for target in described["targets"]:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            known = sorted({_last(name) for name in layers})
            raise TrainerError(
                f"adapter.lora.targets: the U-Net has no linear or convolution {shorten(target)}; it has "
                f"{', '.join(known)}"
            )
    options = LoraConfig(r=described["rank"], lora_alpha=described["alpha"], target_modules=list(described["targets"]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(options, host)
    for name, value in host.named_parameters():
        value.requires_grad_(name.endswith((DOWN, UP)))
        if value.requires_grad:
            value.data = value.data.float()


def _last(name: str) -> str:
    """The last part of a module's name that is no number, with the number behind it: ``to_out.0``."""
    *_, last = name.split(".")
    return ".".join(name.split(".")[-2:]) if last.isdecimal() else last


# --- files ---------------------------------------------------------------------------------------------------


def unet_file(described: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file with what was trained of a U-Net.

    Args:
        described: of the checkpoint.
        weights: by the names of :meth:`TrainedUnet.trained`.

    Raises:
        TrainerError: weights that are not what the checkpoint says.
    """
    if described["kind"] == "full":
        names = ldm_names(weights)
        return {LDM + names[name]: value for name, value in weights.items()}
    tensors: dict[str, Tensor] = {}
    for name, value in weights.items():
        path, end = (name.removesuffix(DOWN), "down") if name.endswith(DOWN) else (name.removesuffix(UP), "up")
        if path == name:
            raise TrainerError(f"{shorten(name)} is no weight of a LoRA")
        tensors[f"{kohya(path)}.lora_{end}.weight"] = value
        tensors[f"{kohya(path)}.alpha"] = torch.tensor(float(described["alpha"]))
    return tensors


def kohya(path: str) -> str:
    """A module of the U-Net, by its name in a LoRA of kohya's kind."""
    return LORA + path.replace(".", "_")


@torch.no_grad()
def use_unet_file(host: nn.Module, file: str | Path, setting: str = "model.unet") -> None:
    """Merges a LoRA into a U-Net, or gives it the weights of a file; of what :func:`unet_file` makes.

    Raises:
        TrainerError: the file is neither, or is of another U-Net.
    """
    path = as_path(file, setting)
    try:
        tensors, _ = read_state_dict(path)
    except (FeedFaceError, OSError) as error:
        raise TrainerError(f"{setting}: {error}") from error
    if any(name.startswith(LORA) for name in tensors):
        _merge(host, tensors, f"{setting}: {path}")
        return
    own = host.state_dict()
    wanted = {LDM + ldm: name for name, ldm in ldm_names(own).items()}
    odd = sorted(wanted.keys() ^ tensors.keys())
    odd += [name for name, given in tensors.items() if name in wanted and given.shape != own[wanted[name]].shape]
    if odd:
        raise TrainerError(
            f"{setting}: {path} is neither a LoRA (its names start with {LORA}) nor the weights of this U-Net: "
            f"{len(odd)} names or shapes differ, such as {shorten(odd[0])}"
        )
    for name, given in tensors.items():
        own[wanted[name]].copy_(given)


@contextmanager
def changed_by(host: nn.Module, file: Path | None) -> Iterator[None]:
    """Within it, a U-Net is as a file makes it (:func:`use_unet_file`); None leaves it."""
    if file is None:
        yield
        return
    kept = {name: value.clone() for name, value in host.state_dict().items()}
    try:
        use_unet_file(host, file)
        yield
    finally:
        host.load_state_dict(kept)


def _merge(host: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """``W += alpha / rank · up · down`` for every module that a LoRA names."""
    left = dict(tensors)
    for path, module in host.named_modules():
        key = kohya(path)
        if f"{key}.lora_up.weight" not in left:
            continue
        up, down = (left.pop(f"{key}.lora_{end}.weight", torch.zeros(0)).float() for end in ("up", "down"))
        rank, alpha = down.shape[0], left.pop(f"{key}.alpha", None)
        try:
            change = (up.flatten(1) @ down.flatten(1)).reshape(module.weight.shape)
        except (RuntimeError, IndexError) as error:
            raise TrainerError(
                f"{where}: {key} does not fit the U-Net: {tuple(up.shape)} and {tuple(down.shape)} for "
                f"{tuple(module.weight.shape)}"
            ) from error
        scale = 1.0 if alpha is None else float(alpha) / rank
        module.weight.copy_(module.weight.float() + scale * change.to(module.weight.device))
    if left:
        raise TrainerError(f"{where}: this U-Net has no place for {len(left)} tensors, such as {shorten(min(left))}")


def released(unet: TrainedUnet | None) -> Any:
    """Within it, the U-Net is as it was before training, trained or not."""
    return nullcontext() if unet is None else unet.as_released()
