"""What is connected to what, for features that measure a likeness or steer it: curves, scores, the best of several."""

from __future__ import annotations

from typing import Any

from tools.templates.bases import SMALL, Base
from tools.templates.graph import Graph, Node
from tools.templates.parts import apply, detect, empty, encode, encode_photo, enlarged, picture, prompts, sample, save


def schedule(g: Graph, base: Base) -> None:
    """The strength follows a curve over the steps, and differs from block to block."""
    model, clip, vae = base.load(g)
    adapter = base.adapter(g)
    face = encode_photo(g, base, adapter)
    curve = g.add("FeedFaceSchedule", 2, node_height=480, curve="linear", first=0.5, last=1.0, sites="in: 0.5, out: 1")
    pair = prompts(g, base, clip, text=base.changed)
    faced = apply(g, base, adapter, face, model, schedule=curve[0])
    latent = empty(g, base, 3)
    picture(g, base, sample(g, base, faced[0], pair, latent[0], seed=7), vae, "schedule")


def judged(base: Base, adapter: Node, images: Node, references: Node) -> dict[str, Any]:
    """What Score and Best Of have in common."""
    who = {"recogniser": base.recogniser, "detector": base.detection["detector"], "adapter": adapter[0]}
    return {"image": images[0], "references": references[0], **who}


def likeness(g: Graph, base: Base) -> None:
    """A picture without the face and one with it, each with a number."""
    model, clip, vae = base.load(g)
    adapter = base.adapter(g)
    face = encode_photo(g, base, adapter)
    others = g.add("LoadImage", 0, title="Another photo of the person", image=base.photo(1, 2))
    pair = prompts(g, base, clip)
    latent = empty(g, base)
    faced = apply(g, base, adapter, face, model)
    plain = sample(g, base, model, pair, latent[0], 2, title="Without the face", seed=8)
    with_face = sample(g, base, faced[0], pair, latent[0], title="With the face", seed=8)
    both = g.add("LatentBatch", 3, title="Both pictures", collapsed=True, samples1=plain[0], samples2=with_face[0])
    images = enlarged(g, base, both, vae)
    g.add("FeedFaceScore", 3, node_height=330, **judged(base, adapter, images, others))
    save(g, images, "likeness", title="Without and with the face")


def best_of(g: Graph, base: Base) -> None:
    """Several pictures of one prompt, of which the most similar one is kept."""
    model, clip, vae = base.load(g)
    adapter = base.adapter(g)
    face = encode_photo(g, base, adapter)
    others = g.add("LoadImage", 0, title="Another photo of the person", image=base.photo(1, 2))
    pair = prompts(g, base, clip)
    faced = apply(g, base, adapter, face, model)
    latent = empty(g, base, count=6)
    images = enlarged(g, base, sample(g, base, faced[0], pair, latent[0], 2, seed=8), vae)
    best = g.add("FeedFaceBestOf", 3, node_height=480, count=1, **judged(base, adapter, images, others))
    save(g, best, "best_of", title="The most similar one")
    g.add("PreviewImage", 3, title="All of them", node_height=300, images=images[0])


def identity_guidance(g: Graph, base: Base) -> None:
    """The same picture with the branches alone, and pulled towards the face while it is sampled."""
    model, clip, vae = base.load(g)
    adapter = base.adapter(g)
    photo = g.add("LoadImage", 0, title="Photo", image=base.photo(1))
    face = encode(g, adapter, detect(g, base, adapter, photo, 1), 1)
    pair = prompts(g, base, clip)
    latent = empty(g, base, 0)
    faced = apply(g, base, adapter, face, model)
    where = "[[14, 6, 50, 54]]" if base is SMALL else ""  # a detector sees little in 64 pixels
    steered = {"model": faced[0], "adapter": adapter[0], "face": face[0], "vae": vae, "boxes": where}
    pulled = g.add("FeedFaceIdentityGuidance", 2, **steered)
    plain = sample(g, base, faced[0], pair, latent[0], 2, title="Without guidance", seed=4)
    guided = sample(g, base, pulled[0], pair, latent[0], title="With guidance", seed=4)
    both = g.add("LatentBatch", 3, title="Both pictures", collapsed=True, samples1=plain[0], samples2=guided[0])
    images = enlarged(g, base, both, vae)
    g.add("FeedFaceScore", 3, node_height=330, **judged(base, adapter, images, photo))
    save(g, images, "identity_guidance", title="Without and with guidance")
