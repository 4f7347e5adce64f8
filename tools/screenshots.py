"""Pictures of the nodes and graphs for the help pages and the documentation, taken in a real browser.

    python -m tools.screenshots                    every node and docs/images
    python -m tools.screenshots FeedFaceRegions    only the nodes that are named

writes ``web/docs/<node>/node.png`` and ``docs/images``. Needs Chromium and Playwright. Each picture of a node holds the
names that it shows, so that a test can tell whether the node has changed since.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tools.browser import Frontend, open_browser
from tools.comfyui import installed_comfyui
from tools.find_comfyui import ROOT
from tools.server import PACK_FOLDER, ComfyServer
from tools.templates import LIST, Template
from tools.templates.__main__ import PEOPLE
from tools.templates.bases import CAPTION_DECODER, UVIT
from tools.templates.graph import Graph
from tools.workflow_format import Workflow, inputs_of

PAGES, IMAGES = ROOT / "web/docs", ROOT / "docs/images"
#: Graphs for the documentation: file, template.
GRAPHS = (("portrait_graph", "portrait"), ("two_people_graph", "two_people"), ("guider_graph", "guider"))
#: Where each node is shown: feature, base, whether it is run first.
NODES = {
    "FeedFaceSmallModel": ("portrait", "small", True),
    "FeedFaceLoadAdapter": ("portrait", "small", True),
    "FeedFaceDetectFaces": ("portrait", "small", True),
    "FeedFaceEncodeFaces": ("portrait", "small", True),
    "FeedFaceApply": ("portrait", "small", True),
    "FeedFaceGuider": ("guider", "small", True),
    "FeedFaceSetFace": ("two_people", "small", True),
    "FeedFaceRegions": ("several_people", "small", True),
    "FeedFaceSaveFace": ("save_face", "small", True),
    "FeedFaceSaveImage": ("portrait", "small", True),
    "FeedFaceLoadFace": ("load_face", "small", True),
    "FeedFaceCombineFaces": ("blend", "small", True),
    "FeedFaceInterpolateFaces": ("between", "small", True),
    "FeedFaceSchedule": ("schedule", "small", True),
    "FeedFaceScore": ("likeness", "small", True),
    "FeedFaceBestOf": ("best_of", "small", True),
    "FeedFaceIdentityGuidance": ("identity_guidance", "small", True),
    "FeedFaceRandomFace": ("random_person", "small", True),
    "FeedFacePairs": ("mixer", "small", True),
    "FeedFaceGrid": ("mixer", "small", True),
    "FeedFaceLoadUniDiffuser": ("portrait", "released", False),
    "FeedFaceUniDiffuserUnconditional": ("portrait", "released", False),
}
#: Long reports are shown from their end: the beginning names the file, which lies elsewhere for everybody.
TO_THE_END = """(number) => {
  for (const one of document.querySelectorAll(`[data-node-id="${number}"] *`)) one.scrollTop = one.scrollHeight;
}"""
INFO = "FeedFaceAdapterInfo"
ALONE = ("FeedFaceVaryFace", "FeedFaceAddDifference", "FeedFaceFaceFromVector", "FeedFaceEncodeBackground")
STAMP = "node"
"""Key of the names in a picture's file."""


def template(feature: str, base: str = "small") -> Template:
    (found,) = (one for one in LIST if (one.feature.key, one.base.name) == (feature, base))
    return found


def names_of(node: dict[str, Any]) -> dict[str, Any]:
    """What a picture of a node shows: its name, its inputs and outputs in their order, and the defaults.

    Args:
        node: of ``/object_info``.
    """
    inputs = [[name, options.get("default")] for name, _, options, _ in inputs_of(node)]
    return {"name": node["display_name"], "inputs": inputs, "outputs": node["output_name"]}


def stamp(path: Path, node: dict[str, Any]) -> None:
    """Write into a picture what node it shows."""
    text = PngInfo()
    text.add_text(STAMP, json.dumps(names_of(node)))
    with Image.open(path) as picture:
        picture.load()
    picture.save(path, pnginfo=text, optimize=True)


def stamped(path: Path) -> dict[str, Any] | None:
    """What node a picture shows, as :func:`names_of` has it; None when nothing in it says."""
    with Image.open(path) as picture:
        text = picture.info.get(STAMP)
    return json.loads(text) if text else None


def without_template(server: ComfyServer) -> Workflow:
    """The nodes that no template has unfolded and that show nothing of a run, :data:`ALONE`."""
    graph = Graph(server.object_info())
    for column, kind in enumerate(ALONE):
        graph.add(kind, column)
    return graph.to_file()


def adapter_info(server: ComfyServer) -> Workflow:
    """The one node without a template that says something when it was run."""
    graph = Graph(server.object_info())
    adapter = graph.add("FeedFaceLoadAdapter", 0, adapter_name="feedface_small.safetensors", face_encoder="auto")
    graph.add(INFO, 1, adapter=adapter[0])
    return graph.to_file()


def lay_out_models(server: ComfyServer) -> None:
    """Empty files under the names of the released model's, so that loaders list them; nothing loads them here."""
    for model in (UVIT, CAPTION_DECODER):
        path = server.base / "models" / model["directory"] / model["name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def take_node(page: Frontend, kind: str, path: Path) -> None:
    """A picture of the first node of a kind, in Nodes 2.0."""
    number = page.page.evaluate(
        """(kind) => {
          const node = app.graph.nodes.find((one) => one.type === kind);
          Object.assign(app.canvas.ds, { scale: Math.min(1.3, 740 / (node.size[1] + 60)) });  // all of it on the page
          app.canvas.ds.offset[0] = 120 - node.pos[0];
          app.canvas.ds.offset[1] = 110 - node.pos[1];
          app.canvas.setDirty(true, true);
          return node.id;
        }""",
        kind,
    )
    page.settle(900)
    page.page.evaluate(TO_THE_END, number)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.page.locator(f'[data-node-id="{number}"]').first.screenshot(path=path)
    stamp(path, page.server.object_info()[kind])


def take_nodes(page: Frontend, kinds: Collection[str]) -> None:
    """Each kind where it is shown, in Nodes 2.0."""
    opened = None
    for kind, (feature, base, run) in NODES.items():
        if kind not in kinds:
            continue
        if opened != (feature, base):
            page.open_template(template(feature, base).title)
            page.command("Comfy.RefreshNodeDefinitions")  # a template may load what the one before has saved
            page.settle(1500)
            if run:
                page.run()
                page.settle(1500)
            opened = feature, base
        take_node(page, kind, PAGES / kind / "node.png")
    if INFO in kinds:
        page.open_graph(adapter_info(page.server))
        page.run()
        page.settle(1500)
        take_node(page, INFO, PAGES / INFO / "node.png")
    if set(ALONE) & set(kinds):
        page.open_graph(without_template(page.server))
        page.settle(1500)
        for kind in ALONE:
            if kind in kinds:
                take_node(page, kind, PAGES / kind / "node.png")


def take_graphs(page: Frontend) -> None:
    """Whole graphs and the list of templates, on the canvas, which draws text at every zoom here."""
    page.page.evaluate("app.extensionManager.setting.set('LiteGraph.Canvas.MinFontSizeForLOD', 0)")
    for name, feature in GRAPHS:
        page.open_template(template(feature).title)
        page.run()
        page.settle(1500)
        page.screenshot(IMAGES / f"{name}.png")
    page.page.reload()  # without the tabs and messages of these
    page.page.wait_for_function("window.app?.graph && window.app?.extensionManager?.workflow")
    page.settle(3000)
    page.command("Comfy.BrowseTemplates")
    page.click(PACK_FOLDER)
    page.settle(4000)
    page.page.screenshot(path=IMAGES / "templates.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nodes", nargs="*", help="all, and docs/images, when none is named", metavar="node")
    named = parser.parse_args().nodes
    if unknown := sorted(set(named) - {*NODES, *ALONE, INFO}):
        parser.error(f"no such node: {', '.join(unknown)}; there are {', '.join([*NODES, *ALONE, INFO])}")
    with ComfyServer(installed_comfyui("demo")) as server, open_browser() as browser:
        for path in PEOPLE.glob("*.png"):  # as the user's photos
            for person, number in ((1, 1), (2, 1), (3, 1)):
                if path.name == f"feedface_person{person}_3.png":
                    server.upload(path, f"person_{person}_photo_{number}.png")
        lay_out_models(server)
        page = Frontend(browser, server, vue=True)
        take_nodes(page, named or [*NODES, *ALONE, INFO])
        page.page.close()
        if not named:
            take_graphs(Frontend(browser, server))


if __name__ == "__main__":
    main()
