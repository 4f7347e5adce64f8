"""Every template opened, measured and, where it needs no download, run in a browser."""

from __future__ import annotations

import io
import re
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.browser import Frontend
from tools.server import PACK_FOLDER
from tools.templates import LIST, Template

pytestmark = pytest.mark.browser
SMALL = [one for one in LIST if one.base.name == "small"]


def saved(frontend: Frontend, outputs: dict) -> list[dict[str, str]]:
    return [one for output in outputs.values() for one in output.get("images", []) if one["type"] == "output"]


#: What covers the middle of a heading, or the note, when a template was just opened: nothing but the graph itself.
COVERED = """() => {
  const { scale, offset } = app.canvas.ds, found = [];
  const box = app.canvas.canvas.getBoundingClientRect();
  const note = app.graph.nodes.find((node) => node.type === "MarkdownNote");
  const points = [[note.pos[0] + 4, note.pos[1] - 15], [note.pos[0] + 4, note.pos[1] + 60]];
  for (const { pos: [x, y], size: [width] } of app.graph.groups) points.push([x + 4, y + 4], [x + width - 4, y + 4]);
  for (const [x, y] of points) {
    const over = document.elementFromPoint(box.x + (x + offset[0]) * scale, box.y + (y + offset[1]) * scale);
    if (over === app.canvas.canvas || over?.closest("[data-node-id], .dom-widget")) continue;
    found.push(over?.className ?? "outside");
  }
  return found;
}"""


@pytest.mark.parametrize("feature", ["compare", "identity_guidance"])  # first: no other test has opened a panel yet
def test_menus_cover_nothing_of_an_opened_template(frontend: Frontend, feature: str) -> None:
    frontend.open_template(next(one for one in SMALL if one.feature.key == feature).title)
    frontend.settle(800)
    assert frontend.page.evaluate(COVERED) == []


@pytest.mark.parametrize("template", LIST, ids=lambda one: one.key)
def test_template_opens(frontend: Frontend, template: Template) -> None:
    frontend.open_template(template.title)
    assert frontend.missing() == []
    expected = {node["type"] for node in template.build(frontend.server.object_info())["nodes"]}
    boxes = frontend.boxes()
    assert {kind for _, kind, *_ in boxes} == expected
    assert frontend.collisions() == []
    assert max(x + w for _, _, x, _, w, _ in boxes) - min(x for _, _, x, *_ in boxes) <= 1700


@pytest.mark.parametrize("template", SMALL, ids=lambda one: one.key)
def test_small_template_runs(frontend: Frontend, template: Template) -> None:
    """As a new user does it: open, Run, look at the picture."""
    if frontend.newest != frontend.vue:
        pytest.skip("each version in its own way of drawing: the run is the server's, and takes most of the time")
    frontend.open_template(template.title)
    pictures = saved(frontend, frontend.run())
    assert len(pictures) == template.feature.pictures
    for one in pictures:
        picture = frontend.server.view(one).astype(int)
        assert min(picture.shape[:2]) >= 256 and picture.std() > 20
    if template.feature.key in ("compare", "batch"):
        first, second, *_ = (frontend.server.view(one).astype(int) for one in pictures)
        assert np.abs(first - second).mean() > 5, "two people look the same"
    assert frontend.collisions() == []


def test_tile_opens_its_template(frontend: Frontend) -> None:
    """Templates → this pack → a tile."""
    frontend.command("Comfy.BrowseTemplates")
    frontend.click(PACK_FOLDER)
    frontend.click("02 Portrait (small)")
    frontend.page.wait_for_function("app.graph.nodes.some((node) => node.type === 'FeedFaceSmallModel')")
    frontend.settle(1000)
    assert frontend.missing() == []


def test_templates_are_listed_in_the_order_of_learning(frontend: Frontend) -> None:
    """And not in that of the disk: first those that need no download."""
    frontend.command("Comfy.BrowseTemplates")
    frontend.click(PACK_FOLDER)
    frontend.page.get_by_role("dialog").get_by_text(SMALL[0].title).first.wait_for()
    titles = {one.title for one in LIST}
    lines = frontend.page.get_by_role("dialog").last.inner_text().splitlines()  # the tabs have such names too
    shown = [line for line in dict.fromkeys(map(str.strip, lines)) if line in titles]
    assert len(shown) >= 8 and shown[:8] == [one.title for one in SMALL][:8]
    frontend.page.keyboard.press("Escape")


def test_photos_come_with_the_template(frontend: Frontend) -> None:
    """Into an input folder that has none of them."""
    folder = frontend.server.base / "input"
    for path in folder.glob("feedface_*.png"):
        path.unlink()
    frontend.open_template("05 Two people (small)")
    assert len(list(folder.glob("feedface_*.png"))) == 13
    values = frontend.page.evaluate(
        "app.graph.nodes.filter(n => n.type === 'LoadImage').map(({ widgets: [w] }) => [w.value, w.options.values])"
    )
    assert len(values) == 2
    for value, choices in values:
        assert value in choices and (folder / value).is_file()


def test_dropped_graph_and_dropped_picture_open(frontend: Frontend, tmp_path: Path) -> None:
    """A file of workflows/graphs, and a picture that the browser made."""
    template = next(one for one in SMALL if one.feature.key == "load_face")
    frontend.open_graph({"nodes": [], "links": [], "version": 0.4})
    frontend.drop(template.graph, "application/json")
    kinds = sorted(kind for _, kind, *_ in frontend.boxes())
    assert "FeedFaceLoadFace" in kinds

    portrait = next(one for one in SMALL if one.feature.key == "portrait")
    frontend.open_template(portrait.title)
    kinds = sorted(kind for _, kind, *_ in frontend.boxes())
    (made,) = saved(frontend, frontend.run()) or [None]
    address = f"{frontend.server.address}/view?{urllib.parse.urlencode(made)}"
    (tmp_path / "made.png").write_bytes(urllib.request.urlopen(address, timeout=60).read())
    assert "workflow" in Image.open(io.BytesIO((tmp_path / "made.png").read_bytes())).info
    frontend.open_graph({"nodes": [], "links": [], "version": 0.4})
    frontend.drop(tmp_path / "made.png", "image/png")
    assert sorted(kind for _, kind, *_ in frontend.boxes()) == kinds


def test_error_begins_with_its_message(frontend: Frontend) -> None:
    """Not with the path of a module of this pack."""
    portrait = next(one for one in SMALL if one.feature.key == "portrait")
    graph = portrait.build(frontend.server.object_info())
    for node in graph["nodes"]:
        if node["type"] == "FeedFaceDetectFaces":
            node["widgets_values"][2] = "7"
    frontend.open_graph(graph)
    with pytest.raises(RuntimeError, match="face 7 was asked for"):
        frontend.run()
    if frontend.newest:
        frontend.click("View details")
    frontend.page.get_by_text("face 7 was asked for").first.wait_for(state="attached")
    texts = frontend.texts("face 7 was asked for")
    begins = r"(^|Exception Message:\*\* )(FeedFaceError: )?FeedFace Detect Faces: image: face 7 was asked for"
    assert any(re.search(begins, text) for text in texts), texts
    frontend.page.keyboard.press("Escape")


def test_report_survives_another_tab(frontend: Frontend) -> None:
    portrait = next(one for one in SMALL if one.feature.key == "portrait")
    frontend.open_template(portrait.title)
    frontend.run()
    before = frontend.reports()
    assert any("taken: 0" in text for text in before.values())
    frontend.command("Comfy.NewBlankWorkflow")
    frontend.settle(800)
    assert frontend.reports() == {}
    frontend.command("Workspace.PreviousOpenedWorkflow")
    frontend.settle(1200)
    assert frontend.reports() == before
