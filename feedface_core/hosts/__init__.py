"""Hosts: the frozen model families, and where in them a branch can attach."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..config import HOSTS, AdapterConfig, SiteConfig
from ..errors import FeedFaceError
from .site import Site


class UnsupportedHost(FeedFaceError):
    """The model has no blocks that FeedFace knows."""


def _modules():
    from . import sd_unet, uvit

    return sd_unet, uvit


def list_sites(model: nn.Module) -> list[Site]:
    """All sites of a diffusion model, whichever family it is. Raises :class:`UnsupportedHost`."""
    for host in _modules():
        sites = host.list_sites(model)
        if sites:
            return sites
    raise UnsupportedHost(
        f"{type(model).__name__} is not a model FeedFace can attach to; it knows {', '.join(HOSTS.values())}"
    )


def family(model: nn.Module) -> str:
    """The key of :data:`~feedface_core.config.HOSTS` for a diffusion model. Raises :class:`UnsupportedHost`."""
    for host in _modules():
        if host.list_sites(model):
            return host.family(model)
    list_sites(model)  # raises with the full message
    raise AssertionError


def match_sites(config: AdapterConfig, model: nn.Module, adapter_name: str = "the adapter") -> list[Site]:
    """The model's sites for the adapter's branches, in their order.

    Raises:
        UnsupportedHost: for a model that is no host.
        ValueError: names both families when the adapter was made for another model.
    """
    sites = {site.name: site for site in list_sites(model)}
    found = family(model)
    misfits = [describe_misfit(wanted, sites.get(wanted.name)) for wanted in config.sites]
    misfits = [text for text in misfits if text]
    if config.host != found or misfits:
        widths = sorted({site.width for site in sites.values()})
        wanted = sorted({site.width for site in config.sites})
        detail = f" ({'; '.join(misfits[:2])})" if misfits else ""
        raise ValueError(
            f"{adapter_name} was made for {HOSTS[config.host]} with {len(config.sites)} sites of widths {wanted}, but "
            f"this model is {HOSTS[found]} with {len(sites)} sites of widths {widths}{detail}. Load the model the "
            "adapter was trained on, or an adapter for this model."
        )
    return [sites[wanted.name] for wanted in config.sites]


def describe_misfit(wanted: SiteConfig, site: Site | None) -> str:
    if site is None:
        return f"it has no site {wanted.name}"
    if site.width != wanted.width:
        return f"site {wanted.name} is {site.width} wide, not {wanted.width}"
    return ""


def site_configs(sites: Sequence[Site]) -> tuple[SiteConfig, ...]:
    return tuple(site.config() for site in sites)
