"""Adapters of other kinds."""

from __future__ import annotations

from tools.templates import kinds
from tools.templates.feature import Feature

FEATURES = (
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
        "face0",
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
        "face0",
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
        "mixer",
    ),
)
