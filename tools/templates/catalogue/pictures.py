"""A picture that exists, and other changes of the model."""

from __future__ import annotations

from tools.templates import features
from tools.templates.feature import Feature

FEATURES = (
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
)
