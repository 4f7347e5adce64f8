"""The list of features, in the order of learning, with their notes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tools.templates import features, kinds, people
from tools.templates.bases import Base
from tools.templates.graph import Graph

ALL, SMALL_AND_RELEASED = ("small", "released", "sd15"), ("small", "released")


@dataclass(frozen=True)
class Feature:
    """One thing that the nodes do.

    Args:
        key: for file names.
        title: of the tile.
        build: adds the nodes.
        note: Markdown, for all bases.
        columns: headings.
        bases: names of the bases that it is shown on.
    """

    key: str
    title: str
    build: Callable[[Graph, Base], None]
    note: str
    columns: tuple[str, ...]
    bases: tuple[str, ...] = SMALL_AND_RELEASED


FEATURES = (
    Feature(
        "compare",
        "First look",
        features.compare,
        """
The same prompt and seed twice: left the model alone, right with the face of the two photos.

### Steps
1. **Run**.
2. Change the **prompt**: who it is comes from the photos, everything else from the text.
3. Take another person's photos: `feedface_person2_1.png` to `feedface_person3_4.png`.
""",
        ("1 Model and photos", "2 Face", "3 Prompt", "4 Pictures"),
        ("small",),
    ),
    Feature(
        "portrait",
        "Portrait",
        features.portrait,
        """
### Steps
1. **Load Image**: a photo of the person.
2. **FeedFace Detect Faces** shows the faces it found, numbered from 0. Type the number you want into *indexes*.
3. Write the **prompt**: what the person wears and does, and where. No need to describe the face.
4. **Run**.

### What to change
- *strength* of **FeedFace Apply Adapter**: lower if the picture copies the photo, higher if the likeness is weak. 0 is
  the model without a face.
- *start* of **FeedFace Apply Adapter**: 0.2 leaves the composition to the prompt.
- Another photo costs one encode: nothing is loaded again.
""",
        ("1 Model and photo", "2 Face", "3 Prompt and strength", "4 Picture"),
        ALL,
    ),
    Feature(
        "references",
        "Several photos",
        features.references,
        """
### Steps
1. Load photos of **one** person. Sharp ones, in varied light and from varied sides, work best.
2. **FeedFace Detect Faces**: check in each preview that the right face has the box.
3. **FeedFace Encode Faces** makes one face of them. *weights* has a number for each photo in the order of the inputs:
   here the third counts half. 0 leaves a photo out, an empty field counts all the same.

### What to change
- *combination*: **concat** lets the model look at all the photos at once, **average** is cheaper and smoother.
- One more photo: a further Load Image and FeedFace Detect Faces on *crops_4*, and a fourth weight.
- Fewer: disconnect its crops and take its weight away.
""",
        ("1 Model and photos", "2 Faces found", "3 One face", "4 Picture"),
        ALL,
    ),
    Feature(
        "guider",
        "Face scale",
        features.guider,
        """
**FeedFace Guider** weighs text and face apart, with *SamplerCustomAdvanced*.

### What to change
- The prompt is followed but the likeness is weak: a higher *face_scale*.
- The face is right but the scene is ignored: a lower *face_scale* or a higher *text_scale*.
- *form*: **text, then face** adds the face to what the text says; **face, then text** is the mirror image; **three
  weights** has text, face and both apart; **joint** is the published form with one scale.
- Different scales cost three predictions a step instead of two; a scale of 0 costs none.
""",
        ("1 Model and photo", "2 Face", "3 Prompt and scales", "4 Picture"),
        ALL,
    ),
    Feature(
        "two_people",
        "Two people",
        people.two_people,
        """
Three prompts make the picture: the **scene**, without a face, and one for each half (*Set Area*), with a face of its
own (**FeedFace Set Face**). FeedFace Apply Adapter has no face here: it brings the adapter, and a prompt without
FeedFace Set Face stays without a face, so the faces cannot mix.

### Steps
1. Load a photo of each person. One photo of both works too: load it twice, set *order* to left to right and *indexes*
   to 0 and 1.
2. Describe each person in the prompt of that half: hair, clothes, pose.
3. **Run**.

### What to change
- *strength* of each **FeedFace Set Face**.
- *x* and *width* of each **Set Area**: shares of the picture.
- FeedFace Set Face also takes a **mask**, and a saved face.
""",
        ("1 Model and photos", "2 Left half", "3 Right half", "4 Faces and picture"),
        ALL,
    ),
    Feature(
        "several_people",
        "Several people",
        people.several_people,
        """
One prompt and one pass for all of them: **FeedFace Regions** gives each person a column of the picture, and each part
of the picture sees the face of its own column only.

### Steps
1. Load a photo of each person, in their order from left to right.
2. Say in the **prompt** how many people there are.
3. **Run**. FeedFace Regions shows who is where. How many heads there are, and where, is the model's choice: try another
   *seed* where one is missing or stands between two columns.

### What to change
- More people: up to *face_6*. Fewer: disconnect a face.
- Another size: the same *width* and *height* in **FeedFace Regions** and **Empty Latent Image**.
- *regions*: **boxes** takes *face_boxes* of a FeedFace Detect Faces on a first picture, **masks** a mask for each face.
- A prompt of their own for each person: the template **Two people**.
""",
        ("1 Model and photos", "2 Faces", "3 Regions", "4 Prompt and picture"),
        ALL,
    ),
    Feature(
        "save_face",
        "Save a face",
        features.save_face,
        """
**FeedFace Save Face** keeps the encoded face in `models/feedface/faces`, a small file without the photos. The next
template loads it.

### Steps
1. Choose the photo, or connect several to FeedFace Encode Faces.
2. Type a *name*; `family/anna` makes a folder.
3. **Run**. The node says what was saved.
""",
        ("1 Model and photo", "2 Face", "3 Save and apply", "4 Picture"),
    ),
    Feature(
        "load_face",
        "Load a face",
        features.load_face,
        """
Needs a saved face: run the template **Save a face** first. It writes `FACE.safetensors`; press **R**, so that
FeedFace Load Face lists it.

No photo, no detector and no encoder are needed any more.
""",
        ("1 Model", "2 Face and prompt", "3 Sample", "4 Picture"),
    ),
    Feature(
        "blend",
        "Blend two people",
        people.blend,
        """
**FeedFace Combine Faces** makes one face of two: *share_b* 0 is person A alone, 1 is person B alone. Move it in steps
of 0.1 for a morph.

*combination* **concat** instead lets the model look at both; use it for two sets of photos of one person.
""",
        ("1 Model and person A", "2 Person B", "3 Blend", "4 Picture"),
    ),
    Feature(
        "between",
        "Between two people",
        people.between,
        """
**FeedFace Interpolate Faces** makes a list of faces from person A to person B, and everything behind it runs once for
each: one Run, a picture for each step with the same prompt and seed.

### What to change
- *steps*: how many pictures, both people among them.
- *first* and *last*: the share of person B at both ends. Below 0 and above 1 exaggerate what tells the two apart.
- *path*: **spherical** keeps the strength of the face on the way, **linear** weakens it in the middle.
""",
        ("1 Model and photos", "2 Person A", "3 Person B", "4 Pictures"),
    ),
    Feature(
        "batch",
        "Batch of people",
        people.batch,
        """
**RebatchImages** hands the photos on one at a time, and everything behind it runs once for each: one Run, a picture for
every person with the same prompt and seed.

Add a Load Image and an ImageBatch for each further person. Photos of different sizes are scaled to the first one's
shape, so crop them alike.
""",
        ("1 Model and photos", "2 All photos", "3 Face by face", "4 Pictures"),
    ),
    Feature(
        "image_to_image",
        "Image to image",
        features.image_to_image,
        """
Image to image: the picture below is the start, the person comes from the photo.

### What to change
- *denoise* of the **KSampler**: 0.5 keeps most of the picture, 0.8 keeps its rough layout only.
""",
        ("1 Model and pictures", "2 Face", "3 Prompt and start", "4 Picture"),
    ),
    Feature(
        "inpaint",
        "Inpainting",
        features.inpaint,
        """
Inpainting: only what the mask covers is drawn anew, with the person of the photo.

### Steps
1. Load the picture, right click it, **Open in MaskEditor**, paint over head and hair.
2. Describe the whole picture in the prompt.
3. **Run**.
""",
        ("1 Model and pictures", "2 Face", "3 Prompt and mask", "4 Picture"),
    ),
    Feature(
        "beside",
        "Other model patches",
        features.beside,
        """
The face is put in behind everything else that changes the model, and stays out of its way: LoRA, ControlNet, Perturbed
Attention Guidance, RescaleCFG and so on.

FeedFace Apply Adapter comes last; its weights are its own, so a LoRA finds the model's names unchanged.
""",
        ("1 Model and photo", "2 Face", "3 Other changes", "4 Picture"),
        ("small", "sd15"),
    ),
    Feature(
        "face_in_text",
        "Face in the text",
        kinds.face_in_text,
        """
A lighter kind of adapter (Face0): the face is a vector, and a small network makes three of the prompt's tokens of it.
No block of the model is patched, so it costs nothing at sampling.

The model itself is frozen here, so the likeness is weaker than with branches. A mask means nothing to it: text acts on
the whole picture. *strength* below 1 leaves a share of the prompt's own tokens.
""",
        ("1 Model and photo", "2 Face", "3 Prompt and strength", "4 Picture"),
        ("small", "sd15"),
    ),
    Feature(
        "random_person",
        "Random person",
        kinds.random_person,
        """
A person who does not exist, drawn from what the adapter has seen of faces. The same **seed** is the same person in
every picture: change the prompt and keep the seed. *variety* 0 is the mean of all faces, 1 is as varied as they are.
""",
        ("1 Model", "2 Person and prompt", "3 Picture"),
        ("small", "sd15"),
    ),
    Feature(
        "mixer",
        "Face mixer grid",
        kinds.mixer,
        """
An adapter with two streams (Face Mixer): the face from one photo, everything around it from another. **FeedFace Pairs**
makes every pair, **FeedFace Grid** shows them: faces down, backgrounds across. The prompt is empty: what it says goes
before the photo's background, whose colors the small model follows only roughly.
- *background_strength* of **FeedFace Apply Adapter**: 0 leaves the background to the prompt.
- Unfold **FeedFace Encode Background** to look at what it sees: a photo with a grey square.
- **FeedFace Guider**, form *text, face, background*, has a scale for each of the three.
""",
        ("1 Model and faces", "2 Backgrounds", "3 Pairs", "4 Grid"),
        ("small", "sd15"),
    ),
)
