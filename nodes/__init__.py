"""The nodes of FeedFace. The only code of this pack that imports ComfyUI."""

from __future__ import annotations

from .version import check_version

check_version()  # before the imports that an older ComfyUI fails at

from comfy_api.latest import ComfyExtension, io  # noqa: E402

from . import folders  # noqa: E402

folders.register()  # before the nodes' schemas list the files

from . import apply, detect, encode, errors, guider, load, small_model  # noqa: E402
from .unidiffuser import load as load_unidiffuser  # noqa: E402

errors.show_by_name()  # once every module with an error of its own has been imported

NODES: list[type[io.ComfyNode]] = [
    *load.NODES,
    *detect.NODES,
    *encode.NODES,
    *apply.NODES,
    *guider.NODES,
    *load_unidiffuser.NODES,
    *(small_model.NODES if small_model.is_trained() else []),
]


class FeedFaceExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> FeedFaceExtension:
    return FeedFaceExtension()
