"""UniDiffuser denoises a CLIP image token together with the picture; ComfyUI's latents have no place for it.

Inside a sampling run the token rides in extra channels of the state, so that any sampler moves it along. Nobody
else sees it: while ComfyUI evaluates the conditionings, their areas and masks and the wrappers of other nodes
get the ordinary four channels; latents that go in and come out, noise masks and previews have four as well.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.samplers
import torch
from torch import Tensor
from torch.nn import functional

from ...feedface_core.errors import FeedFaceError

#: Key of ``transformer_options`` under which the model finds the token of the evaluation at hand.
TOKEN_KEY = "unidiffuser_token"
#: Model evaluations that bring the token to the noise level at which a run from an image starts.
WARM_UP_STEPS = 6


def pack(picture: Tensor, token: Tensor) -> Tensor:
    """``(B, C, H, W)`` and ``(B, 1, D)`` → ``(B, C + ⌈D / HW⌉, H, W)``, the rest of the last channel zero."""
    cells = picture.shape[2] * picture.shape[3]
    channels = -(-token.shape[-1] // cells)
    flat = functional.pad(token.flatten(1), (0, channels * cells - token.shape[-1]))  # (B, channels * HW)
    return torch.cat([picture, flat.view(-1, channels, *picture.shape[2:]).to(picture)], dim=1)


def unpack(state: Tensor, channels: int, width: int) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`pack`: picture ``(B, channels, H, W)`` and token ``(B, 1, width)``."""
    return state[:, :channels], state[:, channels:].flatten(1)[:, None, :width]


def token_noise(noise: Tensor, width: int) -> Tensor:
    """Standard normal token ``(B, 1, width)`` for each row, seeded by the row's own picture noise.

    So a row gets the same token wherever it stands in a batch and whatever made its noise.
    """
    rows = [torch.randn(1, width, generator=torch.Generator().manual_seed(_seed(row))) for row in noise]
    return torch.stack(rows).to(noise)


def _seed(values: Tensor) -> int:
    return zlib.crc32(values.detach().float().cpu().contiguous().numpy().tobytes())


@dataclass(eq=False)
class TokenOfStep:
    """The token of one evaluation of the conditionings, and what the model predicted for it.

    Args:
        value: ``(B, 1, D)`` noisy token of each row of the batch.
        predictions: uuid of a conditioning, index of the list it belongs to, denoised token ``(B, 1, D)``.
    """

    value: Tensor
    predictions: list[tuple[Any, int, Tensor]] = field(default_factory=list)

    def rows(self, count: int) -> Tensor:
        """The token for ``count`` rows: ComfyUI stacks the conditionings' batches one after the other."""
        batch = self.value.shape[0]
        if count % batch:
            raise FeedFaceError(
                f"UniDiffuser was called with {count} rows for a batch of {batch}: another node "
                "changes the batch inside the model, which cannot be combined with this model"
            )
        return self.value.repeat(count // batch, 1, 1)

    def record(self, predicted: Tensor, options: dict[str, Any]) -> None:
        """Files ``(chunks · B, 1, D)`` under the conditionings that ComfyUI stacked into this call."""
        indices = options["cond_or_uncond"]
        uuids = options.get("uuids") or [None] * len(indices)
        for uuid, index, part in zip(uuids, indices, predicted.chunk(len(indices)), strict=True):
            self.predictions.append((uuid, index, part))

    def combined(self, index: int, conds: Sequence[dict] | None, shape: torch.Size) -> Tensor:
        """Prediction ``(B, 1, D)`` for one list of conditionings, weighted by their strength and area."""
        shares = {cond.get("uuid"): _share(cond, shape) for cond in conds or ()}
        total, weight = torch.zeros_like(self.value), 1e-37
        for uuid, owner, predicted in self.predictions:
            if owner == index:
                share = shares.get(uuid, 1.0)
                total, weight = total + predicted * share, weight + share
        return total / weight


def _share(cond: dict, shape: torch.Size) -> float | Tensor:
    share = cond.get("strength", 1.0)
    area = cond.get("area")
    if area is not None:
        covered = [min(side, whole) for side, whole in zip(area[: len(area) // 2], shape[2:], strict=False)]
        share = share * math.prod(covered) / math.prod(shape[2:])
    mask = cond.get("mask")
    if mask is not None:  # stays on the device: no wait for the GPU
        share = share * mask.float().mean() * cond.get("mask_strength", 1.0)
    return share


class UnfinishedLatent(Tensor):
    """A picture latent of a run that stopped before the noise was gone, with the token ``(B, 1, D)`` it stopped at.

    A second KSampler (Advanced) or the second half of split sigmas goes on from both. To everything else it is an
    ordinary latent: what only moves or casts it keeps the token, anything that makes another picture of it drops it.
    """

    token: Tensor
    _KEPT_BY = frozenset(
        {Tensor.to, Tensor.cpu, Tensor.float, Tensor.half, Tensor.clone, Tensor.contiguous, Tensor.detach}
    )

    @classmethod
    def of(cls, picture: Tensor, token: Tensor) -> UnfinishedLatent:
        latent = picture.as_subclass(cls)
        latent.token = token.detach().float().cpu()
        return latent

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            out = function(*args, **(kwargs or {}))
            return cls.of(out, args[0].token) if function in cls._KEPT_BY else out


@dataclass(frozen=True)
class JointSampling:
    """The two wrappers around ComfyUI's sampling that carry the token.

    Args:
        channels: of the picture latent.
        width: D of the token.
    """

    channels: int
    width: int

    def outer_sample(self, executor: Callable, noise: Tensor, latent_image: Tensor, sampler, *args, **kwargs) -> Tensor:
        """Wrapper of OUTER_SAMPLE: the sampler gets the token beside the picture; a run that stops early keeps it."""
        unfinished = isinstance(latent_image, UnfinishedLatent)
        joint = JointSampler(sampler, self.channels, self.width, latent_image.token if unfinished else None)
        if unfinished:
            latent_image = latent_image.as_subclass(Tensor)
        picture = executor(noise, latent_image, joint, *args, **kwargs)
        return picture if joint.left is None else UnfinishedLatent.of(picture, joint.left)

    def calc_cond_batch(
        self, executor: Callable, model, conds: list, x_in: Tensor, timestep: Tensor, model_options: dict
    ) -> list[Tensor]:
        """Wrapper of CALC_COND_BATCH: the conditionings see the picture alone, the results are whole states."""
        if x_in.shape[1] == self.channels:
            return executor(model, conds, x_in, timestep, model_options)
        picture, token = unpack(x_in, self.channels, self.width)
        step = TokenOfStep(token)
        options = {**model_options.get("transformer_options", {}), TOKEN_KEY: step}
        results = executor(model, conds, picture, timestep, {**model_options, "transformer_options": options})
        return [pack(result, step.combined(index, conds[index], picture.shape)) for index, result in enumerate(results)]


class JointSampler(comfy.samplers.Sampler):
    """A sampler of ComfyUI that moves the token along with the picture, for one run.

    Args:
        sampler: what samples.
        channels, width: as in :class:`JointSampling`.
        token: ``(B, 1, D)`` where an earlier run stopped, or None.

    Attributes:
        left: the token at the end of a run that stopped before the noise was gone, else None.
    """

    def __init__(self, sampler: comfy.samplers.Sampler, channels: int, width: int, token: Tensor | None = None):
        self.sampler, self.channels, self.width, self.token = sampler, channels, width, token
        self.left: Tensor | None = None

    def sample(
        self,
        model_wrap,
        sigmas: Tensor,
        extra_args: dict,
        callback: Callable | None,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """Widens what goes into the sampler and narrows what comes out; shapes are those of the picture."""
        latent = torch.zeros_like(noise) if latent_image is None else latent_image
        token, token_latent = self._start(model_wrap, sigmas, extra_args, noise, latent)
        if denoise_mask is not None:  # the token describes the whole picture, so it is never held back
            mask = denoise_mask.expand(-1, self.channels, -1, -1)
            denoise_mask = pack(mask, mask.new_ones(mask.shape[0], 1, self.width))
        result = self.sampler.sample(
            model_wrap,
            sigmas,
            extra_args,
            self._narrow(callback),
            pack(noise, token),
            pack(latent, token_latent),
            denoise_mask,
            disable_pbar,
        )
        picture, token = unpack(result, self.channels, self.width)
        self.left = token if float(sigmas[-1]) > 0 else None
        return picture

    def _narrow(self, callback: Callable | None) -> Callable | None:
        if callback is None:
            return None

        def narrowed(step: int, denoised: Tensor, x: Tensor, total: int):
            return callback(step, denoised[:, : self.channels], x[:, : self.channels], total)

        return narrowed

    def _start(
        self, model_wrap, sigmas: Tensor, extra_args: dict, noise: Tensor, latent: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Noise and latent ``(B, 1, D)`` of the token at the start of a run."""
        fresh = token_noise(noise, self.width)
        if self.token is not None:
            return (fresh if noise.any() else torch.zeros_like(fresh)), self.token.to(fresh)
        first, largest = float(sigmas[0]), float(model_wrap.inner_model.model_sampling.sigma_max)
        if first >= largest * (1.0 - 1e-4):
            return fresh, torch.zeros_like(fresh)
        token = self.warm_up(model_wrap, first, largest, extra_args, noise * first + latent, fresh)
        return torch.zeros_like(fresh), token

    def warm_up(
        self, model_wrap, first: float, largest: float, extra_args: dict, picture: Tensor, fresh: Tensor
    ) -> Tensor:
        """The token ``(B, 1, D)`` that goes with a half-noised picture, at the noise level ``first``.

        A run from an image knows where the picture starts, but not the token. So the token is denoised alone, in
        a few Euler steps from pure noise, while the picture is held: at each level it gets the noise it lacks.
        """
        ends = (math.log10(largest), math.log10(max(first, 1e-3)))
        levels = torch.logspace(*ends, WARM_UP_STEPS + 1).tolist()
        missing = [torch.randn(row.shape, generator=torch.Generator().manual_seed(_seed(row))) for row in picture]
        missing = torch.stack(missing).to(picture)
        token = fresh * math.sqrt(1.0 + largest**2)
        for level, following in zip(levels, levels[1:], strict=False):
            held = picture + math.sqrt(max(level**2 - first**2, 0.0)) * missing
            denoised = model_wrap(
                pack(held, token),
                picture.new_full((picture.shape[0],), level),
                model_options=extra_args.get("model_options", {}),
                seed=extra_args.get("seed"),
            )
            target = unpack(denoised, self.channels, self.width)[1]
            token = target + (token - target) * (following / level)
        return token
