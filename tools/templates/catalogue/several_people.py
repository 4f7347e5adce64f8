"""Several people in one picture."""

from __future__ import annotations

from tools.templates import people
from tools.templates.feature import ALL, Feature

FEATURES = (
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
)
