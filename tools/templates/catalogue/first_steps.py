"""One person: the first look, the portrait, several photos, two scales."""

from __future__ import annotations

from tools.templates import features
from tools.templates.feature import ALL, Feature

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
3. Take another person's photos: **feedface_person2_1.png** to **feedface_person3_4.png**.
""",
        ("1 Model and photos", "2 Face", "3 Prompt", "4 Pictures"),
        ("small",),
        pictures=2,
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
)
