"""The frozen text-to-image models that adapters are trained on, behind one abstract class.

A frozen model is everything of a released model that training does not change: the denoiser (the *host* that control
branches attach to), the autoencoder and the text encoders. Training step, cache and validation know nothing else.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

from feedface_core.conditioning import Rows
from feedface_core.config import SiteConfig
from feedface_core.hosts.hooks import BranchHooks
from feedface_core.modules.adapter import FaceAdapter

from ..config import ModelSettings
from ..errors import TrainerError
from .precision import warn_of_slow

Text = dict[str, Tensor]
Component = Literal["host", "autoencoder", "text"]
COMPONENTS: tuple[Component, ...] = ("host", "autoencoder", "text")


class FrozenModel(ABC):
    """A frozen text-to-image model: evaluation mode, no gradients; the host in the number format of
    ``model.precision``, the encoders in float32, as they are where the adapter is used.

    Latents are whatever :meth:`sample_latents` returns, of the shape that :meth:`latent_shape` names: a model that
    denoises more than a picture packs it into that tensor.

    Args:
        name: shown in messages.
        modules: of the components that are loaded. A component is one module, or several: ``text.0``, ``text.1``.
        scheduler: noise schedule, and what the host predicts.
        dtype: number format of the host.

    Attributes:
        family: host family, a key of ``feedface_core.config.HOSTS``.
        device: where the host is; encoders follow it when they are used.
        cell: side of one latent cell in pixels.
        context_width: width of the text states the host attends to, the default width of the face tokens.
    """

    family: str
    cell: int
    context_width: int

    def __init__(
        self, name: str, modules: Mapping[str, nn.Module], scheduler: DDPMScheduler, dtype: torch.dtype
    ) -> None:
        self.name, self.scheduler, self.dtype, self.device = name, scheduler, dtype, torch.device("cpu")
        self.modules = {key: freeze(one, dtype if key == "host" else torch.float32) for key, one in modules.items()}
        self._null_text: Text | None = None
        self._hooks: BranchHooks | None = None
        self._rows: Rows | None = None

    def component(self, name: Component) -> list[nn.Module]:
        """The modules of a component. Raises ``TrainerError`` if it was not loaded, or has been released."""
        found = [module for key, module in self.modules.items() if key.split(".")[0] == name]
        if not found:
            raise TrainerError(f"{self.name}: the {name} component was not loaded, or has been released")
        return found

    @property
    def host(self) -> nn.Module:
        """The frozen denoiser."""
        return self.component("host")[0]

    def to(self, device: torch.device | str) -> Self:
        """Move the model; the encoders follow when they are used."""
        self.device = torch.device(device)
        if "host" in self.modules:
            self.modules["host"].to(self.device)
        return self

    def release(self, *components: Component) -> None:
        """Free components that are no longer needed; the text states of the empty caption are kept."""
        if "text" in components and any(key.startswith("text") for key in self.modules):
            self.null_text()
        self.modules = {key: module for key, module in self.modules.items() if key.split(".")[0] not in components}

    def fingerprint(self, components: Iterable[Component] = COMPONENTS) -> str:
        """A short hash of the weights and number format of these components, for caches and checkpoints."""
        modules = {module for name in components for module in self.component(name)}
        return weights_fingerprint({key: module for key, module in self.modules.items() if module in modules})

    # --- pictures and text -------------------------------------------------------------------------------

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the latents (and of the noise) of one picture of that size in pixels."""

    @abstractmethod
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """``(B, 3, H, W)`` in −1…1 → moments ``(B, …)`` in float32: mean and log variance of the latents."""

    @abstractmethod
    def sample_latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Moments → scaled latents ``(B, *latent_shape)`` in float32; no noise gives the mean."""

    @abstractmethod
    def decode(self, latents: Tensor, gradient: bool = False) -> Tensor:
        """Scaled latents → pixels ``(B, 3, H, W)`` in −1…1, float32; not clamped with a gradient."""

    @abstractmethod
    def token_ids(self, captions: Sequence[str]) -> Tensor:
        """Captions → all that the text encoders read of them, ``(B, N)`` int64."""

    @abstractmethod
    def encode_text(self, captions: Sequence[str]) -> Text:
        """Captions → named text states, each ``(B, …)`` in float32."""

    def null_text(self) -> Text:
        """The text states of the empty caption, each ``(1, …)``; computed once."""
        if self._null_text is None:
            self._null_text = self.encode_text([""])
        return self._null_text

    # --- prediction and loss -----------------------------------------------------------------------------

    @abstractmethod
    def predict(self, noisy: Tensor, timesteps: Tensor, text: Text, rows: Rows | None = None) -> Tensor:
        """The host's prediction in float32, of the noisy latents' shape.

        Args:
            noisy: ``(B, *latent_shape)``.
            timesteps: ``(B,)`` integers, counted from 0.
            text: as from :meth:`encode_text`, for B captions.
            rows: which rows carry which face; None is no face.
        """

    @property
    def prediction(self) -> Literal["epsilon", "v"]:
        """What the host predicts: the noise ε, or the velocity ``v = √ᾱ·ε − √(1 − ᾱ)·x`` (Salimans and Ho 2022)."""
        return "v" if self.scheduler.config.prediction_type == "v_prediction" else "epsilon"

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the host should predict, of the latents' shape."""
        return noise if self.prediction == "epsilon" else self.scheduler.get_velocity(latents, noise, timesteps)

    def clean(self, noisy: Tensor, prediction: Tensor, timesteps: Tensor) -> Tensor:
        """The clean latents that a prediction amounts to, of the latents' shape: ``(x − √(1 − ᾱ)·ε) / √ᾱ``, or
        ``√ᾱ·x − √(1 − ᾱ)·v``."""
        level = self.scheduler.alphas_cumprod.to(noisy.device)[timesteps].view(-1, *[1] * (noisy.dim() - 1))
        if self.prediction == "v":
            return level.sqrt() * noisy - (1.0 - level).sqrt() * prediction
        return (noisy - (1.0 - level).sqrt() * prediction) / level.sqrt()

    def loss_weights(self, mask: Tensor, latents: Tensor) -> Tensor:
        """A mask ``(B, 1, h, w)`` over latent cells → weights that broadcast to the latents' shape."""
        return mask.to(latents.device, torch.float32)

    def importance(self, latents: Tensor, image_token: float) -> Tensor | None:
        """How much each value counts in a loss, broadcasting to the latents, where those of a CLIP image token count
        ``image_token`` times; None where all count the same."""
        return None

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Within it, predictions are those of sampling, where the host is trained with other inputs."""
        yield

    # --- adapter -----------------------------------------------------------------------------------------

    @abstractmethod
    def list_sites(self) -> tuple[list[SiteConfig], list[str]]:
        """All sites of the host with the heads that a branch gets there, and the names of the default ones."""

    def sites(self, which: Literal["default", "all"] | Sequence[str], heads: int | None = None) -> list[SiteConfig]:
        """The sites that a new adapter gets, in order.

        Args:
            heads: attention heads of every branch; None takes those that :meth:`list_sites` says.

        Raises:
            TrainerError: for a name that is no site of this host, or heads that do not divide its width.
        """
        known, default = self.list_sites()
        by_name = {site.name: site for site in known}
        chosen = []
        for name in by_name if which == "all" else default if which == "default" else which:
            if name not in by_name:
                raise TrainerError(f"adapter.sites: {self.name} has no site {name!r}; it has {', '.join(by_name)}")
            site = by_name[name]
            if site.width % (heads or 1):
                raise TrainerError(f"adapter.heads: {heads} does not divide the width {site.width} of {name}")
            chosen.append(site if heads is None else SiteConfig(name, site.width, heads, site.width // heads))
        return chosen

    def attach(self, adapter: FaceAdapter) -> None:
        """Put an adapter's branches beside the host's blocks, one adapter at a time. Raises ``ValueError`` if it was
        made for another model."""
        self.detach()
        self._hooks = BranchHooks(self.host, adapter)

    def detach(self) -> None:
        """Take the branches away again."""
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None

    @contextmanager
    def faces(self, rows: Rows | None) -> Iterator[None]:
        """Within it, the host's forward passes add the faces of these rows."""
        if rows is None:
            yield
            return
        if self._hooks is None:
            raise TrainerError("faces were given, but no adapter is attached")
        previous, self._rows = self._rows, rows
        try:
            with self._hooks.faces(rows):
                yield
        finally:
            self._rows = previous

    @abstractmethod
    def enable_gradient_checkpointing(self) -> None:
        """Recompute the host's activations in the backward pass, block by block."""

    def recompute(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """``function(*inputs)``, which the backward pass runs again; with the faces of this forward pass, which by then
        have been taken off."""
        if not torch.is_grad_enabled():
            return function(*inputs)
        rows = self._rows

        def run(*inputs: Any) -> Any:
            with self.faces(rows):
                return function(*inputs)

        return checkpoint(run, *inputs, use_reentrant=False)


def freeze(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Evaluation mode and no gradients, so that a frozen module takes no gradient memory for weights."""
    return module.eval().requires_grad_(False).to(dtype)


def weights_fingerprint(modules: Mapping[str, nn.Module], values_each: int = 4096) -> str:
    """Sixteen hex digits over names, shapes, formats and up to ``values_each`` evenly spaced values of each tensor.

    Under a second for a large model, and any training or merge changes nearly every tensor.
    """
    digest = hashlib.sha256()
    for key, module in sorted(modules.items()):
        for name, tensor in sorted(module.state_dict().items()):
            flat = tensor.detach().flatten()
            sample = flat[:: max(1, -(-flat.numel() // values_each))].to("cpu", torch.float32)
            digest.update(f"{key}.{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def load_frozen_model(
    settings: ModelSettings, device: torch.device | str = "cpu", components: Iterable[Component] = COMPONENTS
) -> FrozenModel:
    """Load the frozen model that the settings name.

    Args:
        device: where the host goes.
        components: what to load; the cache needs no host, training on a cache needs no encoders.

    Raises:
        TrainerError: a path that is missing, a file that is no such model or lacks components, or a model of another
            family than the settings say.
    """
    from .stable_diffusion import StableDiffusion
    from .unidiffuser import UniDiffuser
    from .unidiffuser_files import is_unidiffuser

    path = Path(settings.base).expanduser()
    if not path.exists() and not settings.allow_hub:
        raise TrainerError(
            f"model.base: {settings.base} does not exist (looked in {path.absolute().parent}). Give the path of a "
            "checkpoint (.safetensors, .ckpt) or of a diffusers folder; names on the Hugging Face hub are only looked "
            "up with model.allow_hub=true"
        )
    if "host" in components:
        warn_of_slow(settings.precision, device)
    uvit = settings.family == "unidiffuser" or (settings.family == "auto" and is_unidiffuser(path))
    return (UniDiffuser if uvit else StableDiffusion).load(settings, device, tuple(components))
