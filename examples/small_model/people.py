"""Synthetic people: drawn faces with an identity that stays and everything else that varies, each with caption, mask
and box.

An *identity* is every feature a person keeps: head, skin, hair, eyes, nose, ears, beard, lines. A *scene* is what
changes from picture to picture: expression, glasses, hat or headband, clothes, background, framing, place and angle.
Captions name only the scene, never the identity, so a model that knows the caption still has to be told who it is.

All choices are made here, from seeds; ``render/render.mjs`` (facesjs, resvg) only draws. Identity ``i`` of a split
and its picture ``j`` depend on the settings and ``(seed, split, i, j)`` alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from .settings import PeopleSettings

CANVAS = 128  # units of the drawing's side, whatever its size in pixels

COLORS = {
    "red": "#d03a34",
    "orange": "#e8923a",
    "yellow": "#f0d848",
    "green": "#4c9c50",
    "blue": "#3f6fc4",
    "purple": "#8a4fae",
    "white": "#f2f2f2",
    "black": "#2c2c30",
}
PATTERNS = ("plain", "striped", "dotted")
EXPRESSIONS = {
    "smiling": ("smile", "smile2", "smile3"),
    "serious": ("straight", "closed"),
    "angry": ("angry",),
    "surprised": ("mouth7", "mouth8"),
}
CLOTHES = {"shirt": ("football", "football2", "hockey2"), "vest": ("jersey", "jersey2", "jersey4")}
HEADWEAR = {"none": ("none",), "headband": ("headband",), "cap": ("hat2",), "santa hat": ("santa-hat",)}
GLASSES = ("glasses1-primary", "glasses2-black")
FRAMINGS = ("portrait", "close-up")

HEAD_SIZE = (300.0, 400.0)  # units of the drawing; every head of facesjs fills this box, narrowed by `fatness`
EYES = ((140.0, 310.0), (260.0, 310.0))  # units of the drawing
FEATURES = ("skin", "hair color", "hair", "beard", "head", "eyes", "brows", "nose")
"""What a person is told by, for :func:`features`."""
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "expression": tuple(EXPRESSIONS),
    "glasses": ("none", "glasses"),
    "headwear": tuple(HEADWEAR),
    "clothes": tuple(CLOTHES),
    "clothes_color": tuple(COLORS),
    "background": PATTERNS,
    "background_color": tuple(COLORS),
    "framing": tuple(FRAMINGS),
}
Scene = Mapping[str, str]
"""What changes from one picture of a person to the next and captions say: a value for each of ATTRIBUTES."""


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(scene: Scene, rng: np.random.Generator | None = None, keep: float = 1.0) -> str:
    """A scene in words; with ``rng`` each part is named with probability ``keep``."""

    def named() -> bool:
        return rng is None or rng.random() < keep

    who = f"{_article(scene['expression'])} person" if named() else "a person"
    words = f"a {scene['framing']} of {who}" if named() else who
    worn = [
        "glasses" if scene["glasses"] == "glasses" and named() else "",
        _article(scene["headwear"]) if scene["headwear"] != "none" and named() else "",
        _article(f"{scene['clothes_color']} {scene['clothes']}") if named() else "",
    ]
    if any(worn):
        words += " wearing " + " and ".join(filter(None, worn))
    return words + (f", {scene['background']} {scene['background_color']} background" if named() else "")


def _rgb(color: str) -> np.ndarray:
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)], float)


def _jitter(color: str, rng: np.random.Generator, amount: float) -> str:
    """A colour moved by up to ``amount`` of 255 in each channel."""
    rgb = _rgb(color) + rng.uniform(-amount, amount, 3)
    return "#" + "".join(f"{int(v):02x}" for v in rgb.clip(0, 255))


def identity(parts: dict, settings: PeopleSettings, split: str, index: int) -> dict:
    """The lasting features of a person, as a facesjs configuration without clothes, expression and accessories.

    Args:
        parts: what the renderer can draw (:func:`examples.small_model.drawing.parts_of`).
    """
    chosen = settings.splits[split]
    rng = np.random.default_rng([settings.seed, chosen.number, index])
    gender = ("female", "male")[rng.integers(2)]
    male = gender == "male"

    def pick(part: str) -> str:
        drawable = zip(parts["ids"][part], parts["genders"][part], strict=True)
        suits = [name for name, whose in drawable if whose in ("both", gender) and name != "none"]
        return str(suits[rng.integers(len(suits))])

    def uniform(low: float, high: float) -> float:
        return round(float(rng.uniform(low, high)), 3)

    def maybe(part: str, probability: float) -> str:
        name = pick(part)
        return name if rng.random() < probability else "none"

    complexion = tuple(settings.complexions.values())[rng.integers(len(settings.complexions))]
    skin = _jitter(str(rng.choice(complexion.skin)), rng, settings.skin_jitter)
    hair = _jitter(str(rng.choice(complexion.hair)), rng, settings.hair_jitter)
    if chosen.equal_colors:
        skin, hair = chosen.equal_colors
    shave = uniform(0, 0.2) if male and rng.random() < 0.25 else 0
    return {
        "fatness": uniform(0, 1) if male else uniform(0, 0.6),
        "teamColors": ["#000000"] * 3,
        "hairBg": {"id": maybe("hairBg", 0.1 if male else 0.9)},
        "body": {"id": pick("body"), "color": skin, "size": uniform(0.95, 1.05) if male else uniform(0.8, 0.9)},
        "jersey": {"id": "none"},
        "ear": {"id": pick("ear"), "size": uniform(0.5, 1.5) if male else uniform(0.5, 1)},
        "head": {"id": pick("head"), "shave": f"rgba(0,0,0,{shave})"},
        "eyeLine": {"id": maybe("eyeLine", 0.75) if male else "none"},
        "smileLine": {"id": maybe("smileLine", 0.75 if male else 0.1), "size": uniform(0.25, 2.25)},
        "miscLine": {"id": maybe("miscLine", 0.5)},
        "facialHair": {"id": maybe("facialHair", 0.5) if male else "none"},
        "eye": {"id": pick("eye"), "angle": int(rng.integers(-10, 16))},
        "eyebrow": {"id": pick("eyebrow"), "angle": int(rng.integers(-15, 21))},
        "hair": {"id": pick("hair"), "color": hair, "flip": bool(rng.integers(2))},
        "mouth": {"id": "straight", "flip": False},
        "nose": {"id": pick("nose"), "flip": bool(rng.integers(2)), "size": uniform(0.5, 1.25 if male else 1)},
        "glasses": {"id": "none"},
        "accessories": {"id": "none"},
    }


def features(person: dict, settings: PeopleSettings) -> dict[str, str]:
    """The value of each of :data:`FEATURES` of an :func:`identity`; of colours the nearest one of the palettes."""
    shape = {"hair": "hair", "beard": "facialHair", "head": "head", "eyes": "eye", "brows": "eyebrow", "nose": "nose"}
    known = settings.complexions.values()
    return {
        "skin": _nearest(person["body"]["color"], [color for one in known for color in one.skin]),
        "hair color": _nearest(person["hair"]["color"], [color for one in known for color in one.hair]),
        **{name: person[part]["id"] for name, part in shape.items()},
    }


def _nearest(color: str, palette: Sequence[str]) -> str:
    return min(palette, key=lambda other: float(((_rgb(color) - _rgb(other)) ** 2).sum()))


def place_of(point: tuple[float, float], spec: dict) -> tuple[float, float]:
    """Where a point of the drawing of a face lies on the canvas."""
    turn = np.radians(spec["angle"])
    x, y = (point[0] - 200) * spec["scale"], (point[1] - 300) * spec["scale"]  # (200, 300): the middle of the head
    return spec["x"] + x * np.cos(turn) - y * np.sin(turn), spec["y"] + x * np.sin(turn) + y * np.cos(turn)


def scene_of(rng: np.random.Generator) -> Scene:
    """A random scene; clothes and background never have the same colour."""

    def choose(names, p=None) -> str:
        return str(rng.choice(list(names), p=p))

    clothes_color = choose(COLORS)
    return {
        "expression": choose(EXPRESSIONS, [0.4, 0.3, 0.15, 0.15]),
        "glasses": choose(("none", "glasses"), [0.7, 0.3]),
        "headwear": choose(HEADWEAR, [0.64, 0.14, 0.12, 0.10]),
        "clothes": choose(CLOTHES),
        "clothes_color": clothes_color,
        "background": choose(PATTERNS, [0.5, 0.25, 0.25]),
        "background_color": choose(c for c in COLORS if c != clothes_color),
        "framing": choose(FRAMINGS),
    }


def _background(scene: Scene, rng: np.random.Generator) -> str:
    """The background as SVG: a field of the named colour, with a pattern in a neighbouring shade."""
    base = _jitter(COLORS[scene["background_color"]], rng, 12)
    rgb = _rgb(base)
    # towards black on light colours, towards white on dark ones, so that the pattern shows and the name still holds
    target = np.zeros(3) if rgb.mean() > 150 else np.full(3, 255.0)
    shade = "#" + "".join(f"{int(v):02x}" for v in rgb + (target - rgb) * 0.35)
    field = f'<rect width="{CANVAS}" height="{CANVAS}" fill="{base}"/>'
    if scene["background"] == "plain":
        return field
    step = int(rng.integers(26, 35))
    turn = int(rng.choice([0, 45, 90])) if scene["background"] == "striped" else 0
    shapes = {
        "striped": f'<rect width="{step / 2}" height="{step}" fill="{shade}"/>',
        "dotted": f'<circle cx="{step / 2}" cy="{step / 2}" r="{step / 4}" fill="{shade}"/>',
    }
    return (
        f'{field}<defs><pattern id="p" width="{step}" height="{step}" patternUnits="userSpaceOnUse" '
        f'patternTransform="translate({rng.integers(step)} {rng.integers(step)}) rotate({turn})">'
        f'{shapes[scene["background"]]}</pattern></defs><rect width="{CANVAS}" height="{CANVAS}" fill="url(#p)"/>'
    )


def detector_box(box: list[float]) -> list[float]:
    """The box that a face detector draws for a head: MTCNN's begins a quarter lower, below the hair."""
    x0, y0, x1, y1 = box
    width, height = x1 - x0, y1 - y0
    return [x0 + 0.05 * width, y0 + 0.24 * height, x1 - 0.03 * width, y1 + 0.02 * height]


def picture(person: dict, scene: Scene, settings: PeopleSettings, rng: np.random.Generator) -> tuple[dict, list[float]]:
    """The renderer's input for a person in a scene but for its size, and the box of the head, ``[x0, y0, x1, y1]``."""
    face = json.loads(json.dumps(person))
    cloth = _jitter(COLORS[scene["clothes_color"]], rng, 12)
    trim = "#2c2c30" if scene["clothes_color"] in ("white", "yellow") else "#f2f2f2"
    face["teamColors"] = [cloth, cloth if scene["clothes"] == "vest" else trim, trim]
    face["jersey"] = {"id": str(rng.choice(CLOTHES[scene["clothes"]]))}
    face["mouth"] = {"id": str(rng.choice(EXPRESSIONS[scene["expression"]])), "flip": bool(rng.integers(2))}
    face["glasses"] = {"id": str(rng.choice(GLASSES)) if scene["glasses"] == "glasses" else "none"}
    face["accessories"] = {"id": HEADWEAR[scene["headwear"]][0]}
    scale = float(rng.uniform(*settings.framings[scene["framing"]]))
    x = CANVAS / 2 + float(rng.uniform(-12, 12))
    y = CANVAS - settings.bottom * scale + float(rng.uniform(2, 10))
    worn = _jitter(COLORS[str(rng.choice(list(COLORS)))], rng, 12)
    half_width = HEAD_SIZE[0] * (0.8 + 0.2 * person["fatness"]) * scale / 2
    half_height = HEAD_SIZE[1] * scale / 2
    spec = {
        "canvas": CANVAS,
        "background": _background(scene, rng),
        "face": face,
        "accessory_colors": [worn, "#f2f2f2", worn],
        "mouth_scale": settings.mouth_scale,
        "x": round(x, 3),
        "y": round(y, 3),
        "scale": round(scale, 4),
        "angle": round(float(rng.uniform(-6, 6)), 2),
    }
    return spec, [x - half_width, y - half_height, x + half_width, y + half_height]


def specs_of(parts: dict, settings: PeopleSettings, split: str, index: int) -> Iterator[tuple[dict, dict]]:
    """For each picture of identity ``index``: the renderer's input and what is known about it: ``id``, ``identity``,
    ``caption``, ``box`` of the head and middles of the ``eyes`` in pixels, pixels for each ``unit`` of the drawing, the
    scene, and :func:`features`."""
    person, chosen = identity(parts, settings, split, index), settings.splits[split]
    for j in range(chosen.pictures):
        rng = np.random.default_rng([settings.seed, chosen.number, index, 1 + j])
        scene = scene_of(rng)
        drawn, place = _drawn(person, scene, settings, rng)
        record = {
            "id": f"{split}-{index:05d}-{j:02d}",
            "identity": f"{split}-{index:05d}",
            "caption": caption(scene, rng, 0.85),
            "box": place.pop("box"),
            **scene,
            "features": features(person, settings),
            **place,
        }
        yield drawn, record


def pair_specs_of(
    parts: dict, settings: PeopleSettings, index: int, pictures: int
) -> Iterator[tuple[tuple[dict, dict], dict]]:
    """For each picture of the people ``2 index`` and ``2 index + 1`` of the split ``train`` in one scene: what the
    renderer takes for its halves, and what is known about it: ``id``, ``identities``, ``caption``, ``boxes`` of the
    heads in pixels of the whole, and the scene."""
    chosen = settings.splits["train"]
    who = [identity(parts, settings, "train", 2 * index + side) for side in (0, 1)]
    for j in range(pictures):
        rng = np.random.default_rng([settings.seed, chosen.number, index, 1 + j, 2])
        scene = scene_of(rng)
        halves = [_drawn(person, scene, settings, rng) for person in who]
        halves[1][0]["background"] = halves[0][0]["background"]
        boxes = [place["box"] for _, place in halves]
        record = {
            "id": f"pair-{index:05d}-{j:02d}",
            "identities": [f"train-{2 * index + side:05d}" for side in (0, 1)],
            "caption": caption(scene, rng, 0.85),
            "boxes": [boxes[0], [boxes[1][0] + settings.size, boxes[1][1], boxes[1][2] + settings.size, boxes[1][3]]],
            **scene,
        }
        yield (halves[0][0], halves[1][0]), record


def _drawn(person: dict, scene: Scene, settings: PeopleSettings, rng: np.random.Generator) -> tuple[dict, dict]:
    """The renderer's input for a person in a scene, and where it is drawn: ``box``, ``eyes`` and ``unit`` in pixels."""
    spec, box = picture(person, scene, settings, rng)
    pixels = settings.size / CANVAS
    return spec | {"size": 2 * settings.size, "mask_size": settings.size}, {
        "box": [round(v * pixels, 2) for v in box],
        "eyes": [[round(v * pixels, 2) for v in place_of(point, spec)] for point in EYES],
        "unit": round(spec["scale"] * pixels, 5),
    }
