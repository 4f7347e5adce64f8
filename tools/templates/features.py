"""What is connected to what, for each feature: one function each, on any base."""

from __future__ import annotations

from typing import Any

from tools.templates.bases import CONTROLNET, LORA, SMALL, Base
from tools.templates.graph import Graph, Node, Output

# --- parts


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
    positive = g.add("CLIPTextEncode", column, title="Positive prompt", clip=clip, text=text or base.prompt)
    return positive, base.negative(g, clip, column)


def sample(g: Graph, base: Base, model: Output, pair: tuple, latent: Output, column: int = 3, **more: Any) -> Node:
    positive, negative = pair
    values = {**base.sampling, **more}
    return g.add(
        "KSampler", column, model=model, positive=positive[0], negative=negative[0], latent_image=latent, **values
    )


def picture(
    g: Graph, base: Base, latent: Node, vae: Output, name: str, column: int = 3, title: str | None = None
) -> Node:
    """VAE Decode → Save Image; the small model's pictures are enlarged between the two."""
    images = g.add("VAEDecode", column, collapsed=True, samples=latent[0], vae=vae)
    if base is SMALL:
        images = g.add("ImageScaleBy", column, collapsed=True, image=images[0], upscale_method="lanczos", scale_by=4.0)
    prefix = f"feedface/{name}"
    return g.add("SaveImage", column, title=title, node_height=290, images=images[0], filename_prefix=prefix)


def empty(g: Graph, base: Base, column: int = 2, width: int = 1) -> Node:
    return g.add("EmptyLatentImage", column, width=base.size * width, height=base.size, batch_size=1)


# --- features


def compare(g: Graph, base: Base) -> None:
    model, clip, vae = base.load(g)
    adapter = base.adapter(g)
    photos = [g.add("LoadImage", 0, title=f"Photo {n}", image=base.photo(1, n)) for n in (1, 2)]
    both = g.add("ImageBatch", 1, title="Both photos", collapsed=True, image1=photos[0][0], image2=photos[1][0])
    crops = detect(g, base, adapter, both, 1)
    face = encode(g, adapter, crops, 1)
    pair = prompts(g, base, clip)
    latent = empty(g, base)
    faced = apply(g, base, adapter, face, model)
    plain = sample(g, base, model, pair, latent[0], 2, title="Without the face")
    with_face = sample(g, base, faced[0], pair, latent[0], title="With the face")
    pictures = g.add("LatentBatch", 3, title="Both pictures", collapsed=True, samples1=plain[0], samples2=with_face[0])
    picture(g, base, pictures, vae, "small", title="Without and with the face")


def portrait(g: Graph, base: Base) -> None:
    model, clip, vae = base.load(g)
    adapter = base.adapter(g)
    face = encode_photo(g, base, adapter)
    pair = prompts(g, base, clip)
    faced = apply(g, base, adapter, face, model)
    latent = empty(g, base)
    picture(g, base, sample(g, base, faced[0], pair, latent[0]), vae, "portrait")


def references(g: Graph, base: Base) -> None:
    model, clip, vae = base.load(g)
    adapter = base.adapter(g)
    crops = {}
    for n, column in ((1, 0), (2, 0), (3, 1)):
        photo = g.add("LoadImage", column, title=f"Photo {n}", image=base.photo(1, n))
        found = detect(g, base, adapter, photo, 1 if n == 1 else 2, title=f"Photo {n}: Detect Faces", collapsed=n > 1)
        crops["crops" if n == 1 else f"crops_{n}"] = found[0]
    weights = "1, 1, 0.5"
    face = g.add("FeedFaceEncodeFaces", 2, node_height=310, adapter=adapter[0], weights=weights, **crops)
    pair = prompts(g, base, clip)
    faced = apply(g, base, adapter, face, model)
    latent = empty(g, base, 3)
    picture(g, base, sample(g, base, faced[0], pair, latent[0]), vae, "references")


def guider(g: Graph, base: Base) -> None:
    model, clip, vae = base.load(g)
    adapter = base.adapter(g)
    face = encode_photo(g, base, adapter)
    pair = prompts(g, base, clip)
    faced = apply(g, base, adapter, face, model)
    text_scale, face_scale = base.guidance
    guided = g.add(
        "FeedFaceGuider",
        2,
        model=faced[0],
        positive=pair[0][0],
        negative=pair[1][0],
        text_scale=text_scale,
        face_scale=face_scale,
        form="text, then face",
    )
    noise = g.add("RandomNoise", 2, noise_seed=base.sampling["seed"])
    sampler = g.add("KSamplerSelect", 2, sampler_name=base.sampling["sampler_name"])
    steps, scheduler = base.sampling["steps"], base.sampling["scheduler"]
    sigmas = g.add("BasicScheduler", 3, model=model, steps=steps, scheduler=scheduler)
    latent = empty(g, base, 3)
    sampled = g.add(
        "SamplerCustomAdvanced",
        3,
        noise=noise[0],
        guider=guided[0],
        sampler=sampler[0],
        sigmas=sigmas[0],
        latent_image=latent[0],
    )
    picture(g, base, sampled, vae, "guider")


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


def save_face(g: Graph, base: Base) -> None:
    model, clip, vae = base.load(g)
    adapter = base.adapter(g)
    encoded = encode_photo(g, base, adapter)
    face = g.add("FeedFaceSaveFace", 2, node_height=200, face=encoded[0], name=saved_face(base), overwrite=True)
    pair = prompts(g, base, clip)
    faced = apply(g, base, adapter, face, model)
    latent = empty(g, base, 2)
    picture(g, base, sample(g, base, faced[0], pair, latent[0]), vae, "save_face")


def saved_face(base: Base) -> str:
    return f"person_{base.name}"


def load_face(g: Graph, base: Base) -> None:
    model, clip, vae = base.load(g)
    adapter = base.adapter(g)
    face = g.add("FeedFaceLoadFace", 1, face_name=f"{saved_face(base)}.safetensors")
    pair = prompts(g, base, clip, 1)
    faced = apply(g, base, adapter, face, model)
    latent = empty(g, base, 0)
    picture(g, base, sample(g, base, faced[0], pair, latent[0], 2), vae, "load_face")


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


def image_to_image(g: Graph, base: Base) -> None:
    model, clip, vae = base.load(g)
    adapter = base.adapter(g)
    face = encode_photo(g, base, adapter)
    pair = prompts(g, base, clip, text=base.changed)
    faced = apply(g, base, adapter, face, model)
    start = g.add("LoadImage", 0, title="Picture to change", image=base.photo(3))
    latent = g.add("VAEEncode", 2, collapsed=True, pixels=start[0], vae=vae)
    sampled = sample(g, base, faced[0], pair, latent[0], denoise=0.7)
    picture(g, base, sampled, vae, "image_to_image")


def inpaint(g: Graph, base: Base) -> None:
    model, clip, vae = base.load(g)
    adapter = base.adapter(g)
    face = encode_photo(g, base, adapter)
    pair = prompts(g, base, clip, text=base.around)
    faced = apply(g, base, adapter, face, model)
    start = g.add("LoadImage", 0, title="Picture with the face painted over", image=base.masked)
    encoded = g.add("VAEEncode", 2, collapsed=True, pixels=start[0], vae=vae)
    latent = g.add("SetLatentNoiseMask", 2, collapsed=True, samples=encoded[0], mask=start[1])
    picture(g, base, sample(g, base, faced[0], pair, latent[0]), vae, "inpaint")


def beside(g: Graph, base: Base) -> None:
    """Other changes of the model: a LoRA and a ControlNet, or what needs no file on the small model."""
    model, clip, vae = base.load(g)
    adapter = base.adapter(g)
    face = encode_photo(g, base, adapter)
    if base is SMALL:
        pair, more = prompts(g, base, clip), {}
        model = g.add("PerturbedAttentionGuidance", 2, model=model, scale=1.0)[0]
        model = g.add("RescaleCFG", 2, model=model, multiplier=0.5)[0]
    else:
        lora = g.add("LoraLoader", 2, models=[LORA], model=model, clip=clip, lora_name=LORA["name"], strength_model=1.0)
        model, clip = lora[0], lora[1]
        positive, negative = prompts(g, base, clip)
        pose = g.add("LoadImage", 0, title="Picture whose outlines to follow", image="composition.png")
        edges = g.add("Canny", 2, collapsed=True, image=pose[0], low_threshold=0.4, high_threshold=0.8)
        net = g.add("ControlNetLoader", 2, models=[CONTROLNET], control_net_name=CONTROLNET["name"])
        controlled = g.add(
            "ControlNetApplyAdvanced",
            3,
            node_height=280,
            positive=positive[0],
            negative=negative[0],
            control_net=net[0],
            image=edges[0],
            strength=0.6,
            end_percent=0.7,
        )
        pair = (controlled[0],), (controlled[1],)
        more = {"steps": 8, "cfg": 2.0, "sampler_name": "lcm", "scheduler": "sgm_uniform"}
    faced = apply(g, base, adapter, face, model)
    latent = empty(g, base, 3)
    picture(g, base, sample(g, base, faced[0], pair, latent[0], **more), vae, "beside")
