"""What a renderer could draw, so that people can be made up without Node.js."""

from __future__ import annotations

DRAWN = "hairBg body ear head eyeLine smileLine miscLine facialHair eye eyebrow hair nose".split()
PARTS = {
    "ids": {part: [f"{part}1", f"{part}2", "none"] for part in DRAWN},
    "genders": {part: ["male", "female", "both"] for part in DRAWN},
}
