"""What the templates are made with: the small model that comes along, the released model, Stable Diffusion.

Each base adds its loaders to a graph and says which sizes, settings, prompts and photos go with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tools.templates.graph import Graph, Node, Output

HUGGING_FACE = "https://huggingface.co/{repository}/resolve/main/{name}"


def model(name: str, repository: str, directory: str, path: str | None = None) -> dict[str, str]:
    """A file with a public home, as ``properties.models`` has it."""
    return {"name": name, "url": HUGGING_FACE.format(repository=repository, name=path or name), "directory": directory}


CHECKPOINT = model("v1-5-pruned-emaonly-fp16.safetensors", "Comfy-Org/stable-diffusion-v1-5-archive", "checkpoints")
UVIT = model("uvit_v1.pth", "thu-ml/unidiffuser-v1", "diffusion_models")
CAPTION_DECODER = model("caption_decoder.pth", "thu-ml/unidiffuser-v1", "text_encoders")
RELEASED_ADAPTER = model("feed-4800000.pt", "Xiang-cd/FeedFace", "feedface")
CONTROLNET = model(
    "control_v11p_sd15_canny_fp16.safetensors", "comfyanonymous/ControlNet-v1-1_fp16_safetensors", "controlnet"
)
LORA = model(
    "lcm-lora-sdv1-5.safetensors", "latent-consistency/lcm-lora-sdv1-5", "loras", "pytorch_lora_weights.safetensors"
)

SMALL_NOTE = """
### Files
None to fetch: **ADAPTER** and the model come with FeedFace, and the photos are put into the input
folder when the template opens.

The model draws cartoon people of 64 × 64 pixels in seconds on a CPU. It knows the words of its captions only: a
*portrait* or *close-up* of a *smiling, serious, angry, surprised* person wearing *glasses*, a *headband, cap, santa
hat*, a *shirt* or *vest* in *red, orange, yellow, green, blue, purple, white, black*, before a *plain, striped, dotted*
background of such a color.
"""
RELEASED_NOTE = """
### Files
The frontend lists what is missing, with its address:

- **uvit_v1.pth** → **models/diffusion_models**
- **caption_decoder.pth** → **models/text_encoders**
- **ADAPTER** → **models/feedface**
- **v1-5-pruned-emaonly-fp16.safetensors** → **models/checkpoints**; of any Stable Diffusion 1.x only CLIP
  and VAE are used

Press **R** after copying a file. Settings are those of the release: strength 0.8, cfg 6, 40 steps.
"""
SD_NOTE = """
### Files
- **v1-5-pruned-emaonly-fp16.safetensors** → **models/checkpoints**; any Stable Diffusion 1.5 will do
- **ADAPTER** → **models/feedface**: an adapter that you trained. None is public for Stable Diffusion; the
  templates of the released model need no training.

Press **R** after copying a file.
"""


@dataclass(frozen=True)
class Base:
    """A model family with its adapter.

    Args:
        name: in code.
        title: on the tile, in brackets.
        suffix: of file names for the shell.
        note: Markdown about its files, with ``ADAPTER`` for the adapter's.
        adapter_name: file of the adapter; one of another kind has the kind behind its stem.
        size: pixels, side of a picture.
        strength: of FeedFace Apply Adapter.
        detection: what FeedFace Detect Faces needs.
        sampling: of a KSampler.
        guidance: text and face scale of FeedFace Guider.
        prompt: for one person.
        two: prompts for a scene with two people: all of it, left, right.
        group: prompt for a picture with three people.
        changed: prompt for a picture that is made anew.
        around: prompt for the picture that a face is put into.
        recogniser: of FeedFace Score.
        masked: a picture whose face is painted over: its transparent part.
        photos: file names by person and number.
    """

    name: str
    title: str
    suffix: str
    note: str
    adapter_name: str
    size: int
    strength: float
    detection: Mapping[str, Any]
    sampling: Mapping[str, Any]
    guidance: tuple[float, float]
    prompt: str
    two: Sequence[str]
    group: str
    changed: str
    around: str
    recogniser: str = "auto"
    masked: str = "picture_with_mask.png"
    photos: Mapping[int, Sequence[str]] = field(default_factory=dict)

    def photo(self, person: int, number: int = 1) -> str:
        return self.photos[person][number - 1]

    def adapter_file(self, kind: str = "") -> str:
        return self.adapter_name.replace(".safetensors", f"_{kind}.safetensors") if kind else self.adapter_name

    def note_about(self, kind: str = "") -> str:
        """The note, with the name of the adapter that a template loads."""
        return self.note.strip().replace("ADAPTER", self.adapter_file(kind))

    def load(self, g: Graph, column: int = 0) -> tuple[Output, Output, Output]:
        """Model, CLIP and VAE."""
        if self.name == "small":
            small = g.add("FeedFaceSmallModel", column)
            return small[0], small[1], small[2]
        loaded = g.add("CheckpointLoaderSimple", column, models=[CHECKPOINT], ckpt_name=CHECKPOINT["name"])
        if self.name == "sd15":
            return loaded[0], loaded[1], loaded[2]
        files = [UVIT, CAPTION_DECODER]
        uvit = g.add("FeedFaceLoadUniDiffuser", column, models=files, uvit=UVIT["name"], caption_decoder="auto")
        return uvit[0], loaded[1], loaded[2]

    def adapter(self, g: Graph, column: int = 0, kind: str = "") -> Node:
        """The adapter, or one of another kind: ``face0``, ``mixer``."""
        models = [RELEASED_ADAPTER] if self.name == "released" else []
        name = self.adapter_file(kind)
        return g.add("FeedFaceLoadAdapter", column, models=models, adapter_name=name, face_encoder="auto")

    def negative(self, g: Graph, clip: Output, column: int) -> Node:
        """The negative prompt: UniDiffuser has a node that says there is no text."""
        if self.name == "released":
            return g.add("FeedFaceUniDiffuserUnconditional", column, seed=0)
        text = "blurry, deformed, text, watermark" if self.name == "sd15" else ""
        title = "Negative prompt" if text else "Negative prompt: empty"
        return g.add("CLIPTextEncode", column, title=title, collapsed=not text, clip=clip, text=text)


def mine(*people: int, count: int = 3) -> dict[int, list[str]]:
    """Names for photos of the user's own."""
    return {person: [f"person_{person}_photo_{n}.png" for n in range(1, count + 1)] for person in people}


REAL = "portrait photo of a person in a red coat on a beach, golden hour, soft light"
REAL_TWO = (
    "photo of two people sitting in a street café, afternoon light",
    "photo of a person in a blue shirt, street café",
    "photo of a person in a yellow dress, street café",
)
REAL_GROUP = "photo of three people standing side by side in a park, summer, daylight"
MASKED = "feedface_masked.png"
DETECTION = {"detector": "auto", "order": "size", "indexes": "0"}

SMALL = Base(
    name="small",
    title="small",
    suffix="small",
    note=SMALL_NOTE,
    adapter_name="feedface_small.safetensors",
    size=64,
    strength=1.0,
    detection={"detector": "mtcnn", "order": "confidence", "indexes": "0", "min_size": 16},
    sampling={"steps": 20, "cfg": 3.0, "sampler_name": "dpmpp_2m", "scheduler": "normal", "seed": 3},
    guidance=(3.0, 3.0),
    prompt="a close-up of a smiling person wearing a red shirt, plain blue background",
    two=(
        "a close-up of a serious person wearing a white shirt, plain green background",
        "a close-up of a serious person wearing a blue shirt, plain green background",
        "a close-up of a smiling person wearing a yellow shirt, plain green background",
    ),
    group="a close-up of a smiling person wearing a blue shirt, plain yellow background",
    changed="a close-up of a smiling person wearing glasses and a green vest, dotted orange background",
    around="a close-up of a smiling person wearing a purple shirt, plain white background",
    recogniser="adapter's encoder",  # the others were made for photographs
    masked=MASKED,
    photos={
        1: ["feedface_person1_4.png", "feedface_person1_2.png", "feedface_person1_3.png"],
        2: ["feedface_person2_3.png", "feedface_person2_1.png", "feedface_person2_2.png"],
        3: ["feedface_person3_4.png", "feedface_person3_2.png", "feedface_person3_3.png"],
    },
)
RELEASED = Base(
    name="released",
    title="released",
    suffix="unidiffuser",
    note=RELEASED_NOTE,
    adapter_name=RELEASED_ADAPTER["name"],
    size=512,
    strength=0.8,
    detection=DETECTION,
    sampling={"steps": 40, "cfg": 6.0, "sampler_name": "dpmpp_2m", "scheduler": "normal", "seed": 1},
    guidance=(5.0, 4.0),
    prompt="a photo of a person in a garden, looking at the camera",
    two=REAL_TWO,
    group=REAL_GROUP,
    changed="oil painting of a person in a green coat, autumn forest",
    around="photo of a person in a kitchen, daylight",
    photos=mine(1, 2, 3),
)
STABLE_DIFFUSION = Base(
    name="sd15",
    title="SD 1.5",
    suffix="",
    note=SD_NOTE,
    adapter_name="feedface_sd15.safetensors",
    size=512,
    strength=1.0,
    detection=DETECTION,
    sampling={"steps": 30, "cfg": 6.0, "sampler_name": "dpmpp_2m", "scheduler": "karras", "seed": 1},
    guidance=(6.0, 4.0),
    prompt=REAL,
    two=REAL_TWO,
    group=REAL_GROUP,
    changed="oil painting of a person in a green coat, autumn forest",
    around="photo of a person in a kitchen, daylight",
    photos=mine(1, 2, 3),
)
BASES = {base.name: base for base in (SMALL, RELEASED, STABLE_DIFFUSION)}
