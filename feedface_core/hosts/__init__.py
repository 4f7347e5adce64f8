"""Hosts: the frozen model families, and where in them a branch can attach.

A host is a module of this folder with ``list_sites(model)`` (empty for a model of another family), ``family(model)``
and ``default_sites(model)``.
"""

from __future__ import annotations

from types import ModuleType

from torch import nn

from ..config import HOSTS, AdapterConfig
from ..errors import FeedFaceError
from .site import Site


def find_host(model: nn.Module) -> tuple[ModuleType, list[Site]]:
    """The host module of a diffusion model, and the model's sites. Raises :class:`FeedFaceError` for another model."""
    from . import sd_unet, uvit

    for host in (sd_unet, uvit):
        if sites := host.list_sites(model):
            return host, sites
    known = ", ".join(HOSTS.values())
    raise FeedFaceError(f"{type(model).__name__} is not a model FeedFace can attach to; it knows {known}")


def list_sites(model: nn.Module) -> list[Site]:
    """All sites of a diffusion model, whichever family it is. Raises :class:`FeedFaceError`."""
    return find_host(model)[1]


def family(model: nn.Module) -> str:
    """The key of :data:`~feedface_core.config.HOSTS` for a diffusion model. Raises :class:`FeedFaceError`."""
    return find_host(model)[0].family(model)


def match_sites(config: AdapterConfig, model: nn.Module, adapter_name: str = "the adapter") -> list[Site]:
    """The model's sites for the adapter's branches, in their order.

    Raises:
        FeedFaceError: for a model that is no host, or names both families when the adapter was made for another model.
    """
    host, own = find_host(model)
    sites, found = {site.name: site for site in own}, host.family(model)
    misfits = []
    for wanted in config.sites:
        site = sites.get(wanted.name)
        if site is None:
            misfits.append(f"it has no site {wanted.name}")
        elif site.width != wanted.width:
            misfits.append(f"site {wanted.name} is {site.width} wide, not {wanted.width}")
    if config.host != found or misfits:
        widths, wanted = (sorted({site.width for site in group}) for group in (own, config.sites))
        detail = f" ({'; '.join(misfits[:2])})" if misfits else ""
        raise FeedFaceError(
            f"{adapter_name} was made for {HOSTS[config.host]} with {len(config.sites)} sites of widths {wanted}, but "
            f"this model is {HOSTS[found]} with {len(sites)} sites of widths {widths}{detail}. Load the model the "
            "adapter was trained on, or an adapter for this model."
        )
    return [sites[wanted.name] for wanted in config.sites]
