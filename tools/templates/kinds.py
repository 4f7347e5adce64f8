"""What is connected to what, for adapters of other kinds: a face in the text, a face and a background."""

from __future__ import annotations

from tools.templates.bases import Base
from tools.templates.graph import Graph
from tools.templates.parts import apply, detect, empty, encode, encode_photo, enlarged, picture, prompts, sample, save


def face_in_text(g: Graph, base: Base) -> None:
    """Face0: three tokens of the text are the face."""
    model, clip, vae = base.load(g)
    adapter = base.adapter(g, kind="face0")
    face = encode_photo(g, base, adapter)
    pair = prompts(g, base, clip)
    faced = apply(g, base, adapter, face, model)
    latent = empty(g, base)
    picture(g, base, sample(g, base, faced[0], pair, latent[0]), vae, "face_in_text")


def random_person(g: Graph, base: Base) -> None:
    """Nobody's photo: a face drawn by a seed."""
    model, clip, vae = base.load(g)
    adapter = base.adapter(g, kind="face0")
    face = g.add("FeedFaceRandomFace", 1, adapter=adapter[0], seed=7, variety=1.0)
    pair = prompts(g, base, clip, 1)
    faced = apply(g, base, adapter, face, model, 1)
    latent = empty(g, base, 0)
    picture(g, base, sample(g, base, faced[0], pair, latent[0], 2), vae, "random_person", column=2)


def mixer(g: Graph, base: Base) -> None:
    """Face Mixer: the faces of two photos with the backgrounds of two others, as a grid."""
    model, clip, vae = base.load(g)
    adapter = base.adapter(g, kind="mixer")
    faces, backgrounds = [], []
    for number in (1, 2):
        photo = g.add("LoadImage", 0, title=f"Face {number}", image=base.photo(number))
        crops = detect(g, base, adapter, photo, 1, title=f"Face {number}: Detect Faces", collapsed=True)
        faces.append(encode(g, adapter, crops, 1, f"Face {number}: Encode Faces", collapsed=True))
        other = g.add("LoadImage", 1, title=f"Background {number}", image=base.photo(3, number))
        found = detect(g, base, adapter, other, 1, title=f"Background {number}: Detect Faces", collapsed=True)
        without = g.add(
            "FeedFaceEncodeBackground",
            2,
            title=f"Background {number}: Encode Background",
            collapsed=True,  # unfolded, it shows a picture
            adapter=adapter[0],
            image=other[0],
            boxes=found[1],
        )
        backgrounds.append(without)
    sockets = {f"face_{number}": face[0] for number, face in enumerate(faces, 1)}
    sockets |= {f"background_{number}": one[0] for number, one in enumerate(backgrounds, 1)}
    pairs = g.add("FeedFacePairs", 2, **sockets)
    pair = prompts(g, base, clip, 2, text="")
    faced = apply(g, base, adapter, pairs, model, 3, background=pairs[1], background_strength=1.0)
    latent = empty(g, base, 2)
    sampled = sample(g, base, faced[0], pair, latent[0])
    images = enlarged(g, base, sampled, vae)
    labels = {"row_labels": "face 1, face 2", "column_labels": "background 1, background 2"}
    grid = g.add("FeedFaceGrid", 3, node_height=420, images=images[0], columns=pairs[2], **labels)
    save(g, grid, "mixer")
