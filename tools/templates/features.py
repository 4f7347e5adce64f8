"""What is connected to what, for each feature with one person: one function each, on any base."""

from __future__ import annotations

from tools.templates.bases import CONTROLNET, LORA, SMALL, Base
from tools.templates.graph import Graph
from tools.templates.parts import apply, detect, empty, encode, encode_photo, picture, prompts, sample


def compare(g: Graph, base: Base) -> None:
    model, clip, vae = base.load(g)
    adapter = base.adapter(g, 1)
    photos = [g.add("LoadImage", 0, title=f"Photo {n}", image=base.photo(1, n)) for n in (1, 2)]
    both = g.add("ImageBatch", 1, title="Both photos", collapsed=True, image1=photos[0][0], image2=photos[1][0])
    crops = detect(g, base, adapter, both, 1, height=700)  # a report on two photos
    face = encode(g, adapter, crops, 1, collapsed=True)
    # Low columns: opened from its tile, the graph is shown whole, and below 57 % the canvas draws no text.
    positive = g.add("CLIPTextEncode", 2, title="Positive prompt", clip=clip, text=base.prompt)
    pair = positive, base.negative(g, clip, 3)
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


def image_to_image(g: Graph, base: Base) -> None:
    model, clip, vae = base.load(g)
    adapter = base.adapter(g)
    face = encode_photo(g, base, adapter)
    pair = prompts(g, base, clip, text=base.changed)
    faced = apply(g, base, adapter, face, model)
    start = g.add("LoadImage", 0, title="Picture to change", image=base.photo(3))
    latent = g.add("VAEEncode", 2, collapsed=True, pixels=start[0], vae=vae)
    sampled = sample(g, base, faced[0], pair, latent[0], denoise=0.7)
    picture(g, base, sampled, vae, "image_to_image", mark="edited photo")


def inpaint(g: Graph, base: Base) -> None:
    model, clip, vae = base.load(g)
    adapter = base.adapter(g)
    face = encode_photo(g, base, adapter)
    pair = prompts(g, base, clip, text=base.around)
    faced = apply(g, base, adapter, face, model)
    start = g.add("LoadImage", 0, title="Picture with the face painted over", image=base.masked)
    encoded = g.add("VAEEncode", 2, collapsed=True, pixels=start[0], vae=vae)
    latent = g.add("SetLatentNoiseMask", 2, collapsed=True, samples=encoded[0], mask=start[1])
    picture(g, base, sample(g, base, faced[0], pair, latent[0]), vae, "inpaint", mark="edited photo")


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
