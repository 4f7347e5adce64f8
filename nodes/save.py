"""A node that saves pictures with a note of what made them."""

from __future__ import annotations

import io as bytes_io
import json
from pathlib import Path
from typing import Any

import folder_paths
from comfy.cli_args import args
from comfy_api.latest import io
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..feedface_core.errors import FeedFaceError, shorten
from ..feedface_core.files.atomic import replacing
from ..feedface_core.files.provenance import SOURCE_TYPES, mark
from .checks import checked
from .types import make_schema

_UNMARKED = "none"
_FORMATS = {"png": "png", "jpeg": "jpg", "webp": "webp"}
_MODEL, _MAKE = 0x0110, 0x010F  # Exif tags, in which ComfyUI keeps prompt and workflow of a WebP
_LARGEST_SEGMENT = 65533 - 6  # bytes of Exif in a JPEG


class SaveImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            "FeedFaceSaveImage",
            inputs=[
                io.Image.Input("images"),
                io.String.Input("filename_prefix", default="feedface/picture"),
                io.Combo.Input("mark", options=[*SOURCE_TYPES, _UNMARKED], default=next(iter(SOURCE_TYPES))),
                io.Combo.Input("format", options=list(_FORMATS), default="png", optional=True),
                io.Int.Input("quality", default=92, min=1, max=100, optional=True),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            search_aliases=["save image", "save jpeg", "save webp", "content credentials", "ai label", "metadata"],
            is_output_node=True,
            advanced=("format", "quality"),
        )

    @classmethod
    @checked
    def execute(
        cls, images: Tensor, filename_prefix: str, mark: str, format: str = "png", quality: int = 92
    ) -> io.NodeOutput:
        texts = {} if args.disable_metadata or not cls.hidden else _workflow(cls.hidden)
        height, width = images.shape[1:3]
        try:
            place = folder_paths.get_save_image_path(
                filename_prefix, folder_paths.get_output_directory(), width, height
            )
        except Exception as error:  # ComfyUI raises its bare class
            raise FeedFaceError(
                f"filename_prefix {shorten(filename_prefix)}: {shorten(error)}; give a name inside the output folder"
            ) from error
        folder, name, counter, subfolder, _ = place
        saved, complete = [], True
        for number, picture in enumerate(images):
            data, whole = encode(picture, format, quality, texts)
            complete &= whole
            file = f"{name.replace('%batch_num%', str(number))}_{counter + number:05}_.{_FORMATS[format]}"
            write(Path(folder) / file, data, mark)
            saved.append({"filename": file, "subfolder": subfolder, "type": "output"})
        shown: dict[str, Any] = {"images": saved}
        if not complete:
            shown["text"] = ("The workflow is too large for a JPEG file and was left out; png and webp hold it.",)
        return io.NodeOutput(ui=shown)


def _workflow(hidden: Any) -> dict[str, str]:
    """What ComfyUI writes into a picture, as JSON by name: ``prompt``, ``workflow`` and what was queued with them."""
    texts = {} if hidden.prompt is None else {"prompt": json.dumps(hidden.prompt)}
    return texts | {name: json.dumps(value) for name, value in (hidden.extra_pnginfo or {}).items()}


def encode(picture: Tensor, kind: str, quality: int, texts: dict[str, str]) -> tuple[bytes, bool]:
    """A picture ``(H, W, C)``, C 1, 3 or 4, as the bytes of a file, and whether it holds all the texts.

    The texts are where ComfyUI's own nodes put them and its frontend looks: in chunks of a PNG, in Exif of a WebP.
    """
    channels = picture.shape[-1]
    pixels = picture.expand(-1, -1, 3) if channels == 1 else picture[..., :3] if kind == "jpeg" else picture
    image = Image.fromarray((pixels.cpu().float().clamp(0, 1) * 255).byte().numpy())
    file, whole = bytes_io.BytesIO(), True
    if kind == "png":
        info = PngInfo()
        for name, text in texts.items():
            info.add_text(name, text)
        image.save(file, "PNG", pnginfo=info, compress_level=4)
        return file.getvalue(), whole
    exif = image.getexif()
    rest = [name for name in texts if name != "prompt"]
    tags = {_MODEL: "prompt"} | {_MAKE - number: name for number, name in enumerate(rest)}
    for tag, name in tags.items():
        if name in texts:
            exif[tag] = f"{name}:{texts[name]}"
    if kind == "jpeg" and len(exif.tobytes()) > _LARGEST_SEGMENT:
        exif, whole = Image.Exif(), False
    image.save(file, kind.upper(), quality=quality, exif=exif)
    return file.getvalue(), whole


def write(path: Path, data: bytes, kind: str) -> None:
    """Write a file in one piece, marked unless ``kind`` is none. Raises :class:`FeedFaceError`."""
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(data if kind == _UNMARKED else mark(data, kind))
    except (OSError, ValueError) as error:
        raise FeedFaceError(f"{str(path)[:400]}: cannot be written ({shorten(error)})") from error


NODES = [SaveImage]
