"""A likeness measured, the best of several pictures, strength over a run, guidance towards a face."""

from __future__ import annotations

from tools.templates import control
from tools.templates.feature import ALL, Feature

FEATURES = (
    Feature(
        "schedule",
        "Strength curve",
        control.schedule,
        """
**FeedFace Schedule** multiplies the strength of **FeedFace Apply Adapter**: with a curve over the steps, and with a
factor for each part of the model. It draws both. Here the face begins at half its strength, so that the prompt lays out
the picture.

### What to change
- *curve*, *first*, *last*: from which factor to which. **peak** goes up to *last* and back.
- *points*: a curve of your own in their place, such as **0:0, 0.3:0, 0.3:1, 1:0.6**.
- *sites*: a factor for each block by the beginning of its name. A factor of 0 costs nothing.
""",
        ("1 Model and photo", "2 Face", "3 Curve and prompt", "4 Picture"),
        ALL,
    ),
    Feature(
        "likeness",
        "Likeness",
        control.likeness,
        """
**FeedFace Score** says how alike the person in a picture is to photos of somebody: here for a picture without the face
and one with it, against another photo than the one that was encoded.

### How to read it
- 1 is the same, 0 is anybody; −1 means that no face was found. The node names the recogniser: compare only numbers of
  the same one.
- **adapter's encoder** goes by looks as much as by who it is. It is the only one for drawn people; for photographs take
  **insightface** or **dlib** once they are installed: the node's help page says how.
""",
        ("1 Model and photos", "2 Face", "3 Prompt and model alone", "4 Scores and pictures"),
        ALL,
        pictures=2,
    ),
    Feature(
        "best_of",
        "Best of several",
        control.best_of,
        """
Six pictures of one prompt, and **FeedFace Best Of** keeps the one that is most like another photo of the person.

### What to change
- *batch_size* of **Empty Latent Image**: how many are drawn. *count* of **FeedFace Best Of**: how many are kept.
- *minimum*: pictures below it do not pass; read the scores of a run first. *when_none* says what then becomes of the
  run.
- Connect the sampler's latents to *latents* and *kept_latents* to a second sampler, to enlarge the best one only.
""",
        ("1 Model and photos", "2 Face", "3 Six pictures", "4 The best one"),
        ALL,
    ),
    Feature(
        "identity_guidance",
        "Identity guidance",
        control.identity_guidance,
        """
**FeedFace Identity Guidance** looks at the face while it is drawn and pulls it towards the photo, on top of the
adapter's branches, or without them. The two pictures have the same seed; **FeedFace Score** says which is more alike.
Expect a finishing touch: the adapter does the work.

### What to change
- *scale*: how far a pull goes. Too much makes the picture worse and not more alike.
- *start*, *end*, *every*: when it pulls. Each pull takes the time of several steps.
- *boxes*: where the face is, in pixels; empty lets a detector look.
""",
        ("1 Model and photo", "2 Face", "3 Prompt and guidance", "4 Pictures"),
        ALL,
        pictures=2,
    ),
)
