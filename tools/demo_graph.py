"""The demo's graph in API format: each prompt drawn from the same noise without and with the face."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPORT = "report"  # id of the output node that says which faces were found


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def comparison_graph(
    loader: dict[str, Any],
    adapter: str,
    photos: Sequence[str],
    prompts: Sequence[str],
    detection: dict[str, Any],
    sampler: dict[str, Any],
    size: int,
    seed: int = 1,
    strength: float = 1.0,
) -> dict[str, Any]:
    """The graph, whose output nodes are ``plain0``, ``face0``, ``plain1`` … and :data:`REPORT`.

    Args:
        loader: the node that gives MODEL, CLIP and VAE.
        adapter: file name for FeedFace Load Adapter.
        photos: of one person, as they are called in the server's input folder.
        detection: inputs of FeedFace Detect Faces.
        sampler: inputs of KSampler.
        size: side of the pictures in pixels.
        seed: of the first prompt; each further one has the next.
    """
    graph = {
        "model": loader,
        "negative": node("CLIPTextEncode", clip=["model", 1], text=""),
        "latent": node("EmptyLatentImage", width=size, height=size, batch_size=1),
        "adapter": node("FeedFaceLoadAdapter", adapter_name=adapter),
    }
    image = ["photo0", 0]
    for i, photo in enumerate(photos):
        graph[f"photo{i}"] = node("LoadImage", image=photo)
        if i:
            graph[f"photos{i}"] = node("ImageBatch", image1=image, image2=[f"photo{i}", 0])
            image = [f"photos{i}", 0]
    graph["crops"] = node("FeedFaceDetectFaces", image=image, indexes="0", when_none="error", **detection)
    graph[REPORT] = node("PreviewAny", source=["crops", 3])
    graph["encoded"] = node("FeedFaceEncodeFaces", adapter=["adapter", 0], crops=["crops", 0])
    apply = {"strength": strength, "start": 0.0, "end": 1.0}
    graph["faced"] = node("FeedFaceApply", model=["model", 0], adapter=["adapter", 0], face=["encoded", 0], **apply)
    for i, prompt in enumerate(prompts):
        graph[f"prompt{i}"] = node("CLIPTextEncode", clip=["model", 1], text=prompt)
        inputs = {"positive": [f"prompt{i}", 0], "negative": ["negative", 0], "latent_image": ["latent", 0]}
        inputs |= {"seed": seed + i, "denoise": 1.0, **sampler}
        for name, model in (("plain", "model"), ("face", "faced")):
            graph[f"{name}_latent{i}"] = node("KSampler", model=[model, 0], **inputs)
            graph[f"{name}_picture{i}"] = node("VAEDecode", samples=[f"{name}_latent{i}", 0], vae=["model", 2])
            graph[f"{name}{i}"] = node("SaveImage", images=[f"{name}_picture{i}", 0], filename_prefix=f"{name}{i}")
    return graph
