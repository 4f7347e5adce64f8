"""What is connected to what, for each feature with several people."""

from __future__ import annotations

from tools.templates.bases import SMALL, Base
from tools.templates.graph import Graph, Node
from tools.templates.parts import apply, detect, empty, encode, picture, prompts, sample


def two_people(g: Graph, base: Base) -> None:
    """A prompt for the scene, and one with a face of its own for each half."""
    model, clip, vae = base.load(g)
    adapter = base.adapter(g)
    photos = [
        g.add("LoadImage", 0, title=f"{side} person", image=base.photo(person))
        for person, side in ((1, "Left"), (2, "Right"))
    ]
    title = "FeedFace Apply Adapter: no face"
    faced = apply(g, base, adapter, None, model, 0, title=title, collapsed=True)
    negative = base.negative(g, clip, 0)
    prompt, given = None, []
    for side, photo, x, text in zip(("Left", "Right"), photos, (0.0, 0.5), base.two[1:], strict=True):
        column = 1 if side == "Left" else 2
        crops = detect(g, base, adapter, photo, column, title=f"{side} person: Detect Faces")
        face = encode(g, adapter, crops, column, f"{side} face", collapsed=True)
        own = g.add("CLIPTextEncode", column, title=f"{side} prompt", clip=clip, text=text)
        area = g.add(
            "ConditioningSetAreaPercentage",
            column,
            title=f"{side} half: Set Area",
            collapsed=True,
            conditioning=own[0],
            width=0.5,
            height=1.0,
            x=x,
            y=0.0,
            strength=1.0,
        )
        given.append(
            g.add(
                "FeedFaceSetFace",
                3,
                title=f"{side} half: Set Face",
                conditioning=area[0],
                face=face[0],
                strength=base.strength,
            )
        )
    prompt = g.add("CLIPTextEncode", 1, title="Scene", clip=clip, text=base.two[0])
    for title, half in zip(("Scene + left", "Scene + left + right"), given, strict=True):
        both = {"conditioning_1": prompt[0], "conditioning_2": half[0]}
        prompt = g.add("ConditioningCombine", 2, title=title, collapsed=True, **both)
    latent = empty(g, base, 2, width=2)
    picture(g, base, sample(g, base, faced[0], (prompt, negative), latent[0]), vae, "two_people")


def several_people(g: Graph, base: Base) -> None:
    """One prompt for the whole picture, which is cut into columns with a face each."""
    model, clip, vae = base.load(g)
    adapter = base.adapter(g)
    photos = [
        g.add("LoadImage", 0 if person < 3 else 1, title=f"Person {person}", image=base.photo(person))
        for person in (1, 2, 3)
    ]
    faces = {}
    for person, photo in enumerate(photos, 1):
        title, column = f"Person {person}: Detect Faces", 1 if person == 1 else 2
        crops = detect(g, base, adapter, photo, column, title=title, collapsed=person > 1)
        faces[f"face_{person}"] = encode(g, adapter, crops, column, f"Face {person}", collapsed=True)[0]
    wide = 3 if base is SMALL else 2  # the small model knows no smaller faces than its own picture's
    width, height = base.size * wide, base.size
    together = g.add("FeedFaceRegions", 2, node_height=660, width=width, height=height, **faces)
    faced = apply(g, base, adapter, together, model)
    pair = prompts(g, base, clip, 3, base.group)
    latent = empty(g, base, 1, width=wide)
    sampled = sample(g, base, faced[0], pair, latent[0], seed=5)  # with which the small model draws three people
    picture(g, base, sampled, vae, "several_people")


def blend(g: Graph, base: Base) -> None:
    model, clip, vae = base.load(g)
    adapter = base.adapter(g)
    faces = []
    photos = [g.add("LoadImage", 0, title=f"Person {'AB'[n]}", image=base.photo(n + 1)) for n in (0, 1)]
    for n, photo in enumerate(photos):
        crops = detect(g, base, adapter, photo, n + 1, title=f"Person {'AB'[n]}: Detect Faces")
        faces.append(encode(g, adapter, crops, n + 1, f"Face {'AB'[n]}", collapsed=True))
    face = g.add("FeedFaceCombineFaces", 1, face_a=faces[0][0], face_b=faces[1][0], share_b=0.5)
    pair = prompts(g, base, clip)
    faced = apply(g, base, adapter, face, model, 3)
    latent = empty(g, base, 1)
    picture(g, base, sample(g, base, faced[0], pair, latent[0]), vae, "blend")


def between(g: Graph, base: Base) -> None:
    """The faces on the way from one person to another, a picture for each."""
    model, clip, vae = base.load(g)
    adapter = base.adapter(g)
    faces = {}
    photos = [
        g.add("LoadImage", 0, title=f"Person {letter}", image=base.photo(n)) for n, letter in ((1, "A"), (2, "B"))
    ]
    for column, (letter, photo) in enumerate(zip("AB", photos, strict=True), 1):
        crops = detect(g, base, adapter, photo, column, title=f"Person {letter}: Detect Faces")
        faces[f"face_{letter.lower()}"] = encode(g, adapter, crops, column, f"Face {letter}", collapsed=True)[0]
    face = g.add("FeedFaceInterpolateFaces", 1, steps=5, **faces)
    pair = prompts(g, base, clip)
    faced = apply(g, base, adapter, face, model, 3)
    latent = empty(g, base, 1)
    picture(g, base, sample(g, base, faced[0], pair, latent[0]), vae, "between")


def batch(g: Graph, base: Base) -> None:
    model, clip, vae = base.load(g)
    adapter = base.adapter(g)
    photos: Node | None = None
    for person in (1, 2, 3):
        photo = g.add("LoadImage", 0 if person < 3 else 1, title=f"Person {person}", image=base.photo(person))
        photos = g.add("ImageBatch", 1, collapsed=True, image1=photos[0], image2=photo[0]) if photos else photo
    one_by_one = g.add("RebatchImages", 1, title="One photo at a time", collapsed=True, images=photos[0], batch_size=1)
    crops = detect(g, base, adapter, one_by_one, 2, height=860)  # with a report for each photo
    face = encode(g, adapter, crops, 2)
    pair = prompts(g, base, clip, 1)
    faced = apply(g, base, adapter, face, model, 3)
    latent = empty(g, base, 1)
    picture(g, base, sample(g, base, faced[0], pair, latent[0]), vae, "batch")
