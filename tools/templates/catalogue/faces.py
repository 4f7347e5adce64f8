"""Faces: kept as files, blended, in a row."""

from __future__ import annotations

from tools.templates import features, people
from tools.templates.feature import Feature

FEATURES = (
    Feature(
        "save_face",
        "Save a face",
        features.save_face,
        """
**FeedFace Save Face** keeps the encoded face in **models/feedface/faces**, a small file without the photos. The next
template loads it.

### Steps
1. Choose the photo, or connect several to FeedFace Encode Faces.
2. Type a *name*; **family/anna** makes a folder.
3. **Run**. The node says what was saved.
""",
        ("1 Model and photo", "2 Face", "3 Save and apply", "4 Picture"),
    ),
    Feature(
        "load_face",
        "Load a face",
        features.load_face,
        """
Needs a saved face: run the template **Save a face** first. It writes **FACE.safetensors**; press **R**, so that
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
        pictures=5,
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
        pictures=3,
    ),
)
