"""The nodes of FeedFace. The only code of this pack that imports ComfyUI."""

from __future__ import annotations

from .version import check_version

check_version()  # before the imports that an older ComfyUI fails at

from comfy_api.latest import ComfyExtension, io  # noqa: E402

from ..feedface_core.errors import FeedFaceError  # noqa: E402
from . import folders  # noqa: E402

folders.register()  # before the nodes' schemas list the files

from . import (  # noqa: E402
    apply,
    arithmetic,
    background,
    detect,
    encode,
    grid,
    guider,
    identity_guidance,
    likeness,
    load,
    regions,
    save,
    schedule,
    small_model,
)
from .unidiffuser import load as load_unidiffuser  # noqa: E402

# ComfyUI writes the module of an error's class before the message unless the class is built in, and calls a pack's
# modules by their absolute path, which fills the pop-up. Only ComfyUI's copy of the classes changes.
for _error in (FeedFaceError, *FeedFaceError.__subclasses__()):
    _error.__module__ = "builtins"

NODES: list[type[io.ComfyNode]] = [
    *load.NODES,
    *detect.NODES,
    *encode.NODES,
    *background.NODES,
    *apply.NODES,
    *regions.NODES,
    *arithmetic.NODES,
    *guider.NODES,
    *identity_guidance.NODES,
    *grid.NODES,
    *likeness.NODES,
    *schedule.NODES,
    *load_unidiffuser.NODES,
    *small_model.NODES,
    *save.NODES,
]


class FeedFaceExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> FeedFaceExtension:
    return FeedFaceExtension()
