"""Write the shipped templates, their twins in API format, the blueprints and the photos of the small model.

    python -m tools.templates              the files
    python -m tools.templates --pictures   the tiles as well, drawn by the small model

The files depend on nothing but the nodes' schemas, so that a test can tell whether they are up to date.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from tools.comfyui import installed_comfyui
from tools.find_comfyui import ROOT
from tools.server import ComfyServer
from tools.templates import API, GRAPHS, LIST, TEMPLATES
from tools.templates.bases import MASKED, SMALL
from tools.templates.blueprints import FOLDER, blueprints
from tools.workflow_format import ObjectInfo, to_api

PEOPLE, EXAMPLES = ROOT / "models/feedface_small/people", ROOT / "web/examples"


def text_of(content: Any) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def files(object_info: ObjectInfo) -> dict[Path, str]:
    """Every file with its text."""
    written = {}
    for template in LIST:
        graph = template.build(object_info)
        written[template.file] = written[template.graph] = text_of(graph)
        written[template.api] = text_of(to_api(graph, object_info))
    written |= {path: text_of(workflow) for path, workflow in blueprints(object_info).items()}
    return written


def examples() -> dict[Path, bytes]:
    """The photos of the small model's templates where the browser finds them, and the list of their names."""
    made = {EXAMPLES / path.name: path.read_bytes() for path in sorted(PEOPLE.glob("*.png"))}
    made[EXAMPLES / MASKED] = paint_over(PEOPLE / SMALL.photos[2][0])
    made[EXAMPLES / "list.json"] = text_of([path.name for path in made]).encode()
    return made


def paint_over(path: Path) -> bytes:
    """A picture whose head is transparent, as the mask editor saves it."""
    picture = Image.open(path).convert("RGBA")
    alpha = Image.new("L", picture.size, 255)
    ImageDraw.Draw(alpha).ellipse([12, 1, 53, 50], fill=0)
    picture.putalpha(alpha)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()


def write(object_info: ObjectInfo) -> None:
    """Write them, and remove those of former templates."""
    made = files(object_info)
    for folder in (TEMPLATES, GRAPHS, API, FOLDER):
        folder.mkdir(parents=True, exist_ok=True)
        for path in set(folder.glob("*.json")) - made.keys():
            path.unlink()
    for path in set(TEMPLATES.glob("*.jpg")) - {template.picture for template in LIST}:
        path.unlink()
    for path, text in made.items():
        path.write_text(text, encoding="utf-8")
    EXAMPLES.mkdir(exist_ok=True)
    for path, data in examples().items():
        path.write_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", action="store_true")
    options = parser.parse_args()
    with ComfyServer(installed_comfyui("demo")) as server:
        write(server.object_info())
        if options.pictures:
            from tools.templates.pictures import draw

            draw(server)
    print(f"{len(LIST)} templates in {TEMPLATES}")


if __name__ == "__main__":
    main()
