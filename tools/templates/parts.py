"""Groups of nodes that several features have: a photo to a face, prompts, sampling, the picture."""

from __future__ import annotations

from typing import Any

from tools.templates.bases import SMALL, Base
from tools.templates.graph import Graph, Node, Output


def encode_photo(g: Graph, base: Base, adapter: Node, person: int = 1, column: int = 0, name: str = "") -> Node:
    """Load Image → Detect Faces → Encode Faces: one photo of a person to a face."""
    photo = g.add("LoadImage", column, title=name or "Photo", image=base.photo(person))
    crops = detect(g, base, adapter, photo, column + 1)
    return encode(g, adapter, crops, column + 1)


def encode(
    g: Graph, adapter: Node, crops: Node, column: int, title: str | None = None, collapsed: bool = False
) -> Node:
    return g.add(
        "FeedFaceEncodeFaces",
        column,
        title=title,
        node_height=310,  # what it says after a run included
        collapsed=collapsed,
        adapter=adapter[0],
        crops=crops[0],
    )


def detect(g: Graph, base: Base, adapter: Node, photo: Node, column: int, height: int = 650, **choice: Any) -> Node:
    return g.add(
        "FeedFaceDetectFaces",
        column,
        node_height=height,
        image=photo[0],
        adapter=adapter[0],
        **{**base.detection, **choice},
    )


def apply(g: Graph, base: Base, adapter: Node, face: Node | None, model: Output, column: int = 2, **more: Any) -> Node:
    if face:
        more["face"] = face[0]
    return g.add("FeedFaceApply", column, model=model, adapter=adapter[0], strength=base.strength, **more)


def prompts(g: Graph, base: Base, clip: Output, column: int = 2, text: str | None = None) -> tuple[Node, Node]:
    positive = g.add(
        "CLIPTextEncode", column, title="Positive prompt", clip=clip, text=base.prompt if text is None else text
    )
    return positive, base.negative(g, clip, column)


def sample(g: Graph, base: Base, model: Output, pair: tuple, latent: Output, column: int = 3, **more: Any) -> Node:
    positive, negative = pair
    values = {**base.sampling, **more}
    return g.add(
        "KSampler", column, model=model, positive=positive[0], negative=negative[0], latent_image=latent, **values
    )


def enlarged(g: Graph, base: Base, latent: Node, vae: Output, column: int = 3) -> Node:
    """VAE Decode; the small model's pictures are enlarged behind it."""
    images = g.add("VAEDecode", column, collapsed=True, samples=latent[0], vae=vae)
    if base is SMALL:
        images = g.add("ImageScaleBy", column, collapsed=True, image=images[0], upscale_method="lanczos", scale_by=4.0)
    return images


def save(g: Graph, images: Node, name: str, column: int = 3, title: str | None = None, **more: Any) -> Node:
    """FeedFace Save Marked Image."""
    more |= {"images": images[0], "filename_prefix": f"feedface/{name}"}
    return g.add("FeedFaceSaveImage", column, title=title, node_height=400, **more)


def picture(g: Graph, base: Base, latent: Node, vae: Output, name: str, column: int = 3, **more: Any) -> Node:
    """VAE Decode → FeedFace Save Marked Image."""
    return save(g, enlarged(g, base, latent, vae, column), name, column, **more)


def empty(g: Graph, base: Base, column: int = 2, width: int = 1, count: int = 1) -> Node:
    return g.add("EmptyLatentImage", column, width=base.size * width, height=base.size, batch_size=count)
