"""ComfyUI in a real browser, for tests and screenshots.

    with ComfyServer(comfyui) as server, open_browser() as browser:
        page = Frontend(browser, server, vue=True)
        page.open_template("02 Portrait (small)")
        page.run()

Needs Chromium: Debian's ``chromium``, or the file that ``FEEDFACE_CHROMIUM`` names.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.find_comfyui import COMFYUI_OLDEST
from tools.server import PACK_FOLDER, ComfyServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
VIEW = {"width": 1440, "height": 900}  # pixels: a laptop
REMOTE = ("https://", "Error fetching file size")  # in messages about what is not this server's
START, RUN = 120, 240  # seconds at most, on a busy machine

#: Of each node: id, kind, box in units (with its title) on the canvas, or in Nodes 2.0 that of its element.
BOXES = """() => {
  const { scale, offset } = app.canvas.ds;
  const canvas = app.canvas.canvas.getBoundingClientRect();
  return app.graph.nodes.map((node) => {
    const element = document.querySelector(`[data-node-id="${node.id}"]`);
    if (element) {
      const box = element.getBoundingClientRect();
      return [node.id, node.type, (box.x - canvas.x) / scale - offset[0], (box.y - canvas.y) / scale - offset[1],
              box.width / scale, box.height / scale];
    }
    const height = node.flags.collapsed ? 0 : Math.max(node.size[1], node.computeSize()[1]);
    return [node.id, node.type, node.pos[0], node.pos[1] - 30, node.size[0], height + 30];
  });
}"""
DROP = """async ([name, type, data]) => {
  const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type }));
  const canvas = app.canvas.canvas;
  const box = canvas.getBoundingClientRect();
  const where = { clientX: box.x + 40, clientY: box.y + box.height / 2 };
  for (const kind of ["dragenter", "dragover", "drop"]) {
    canvas.dispatchEvent(new DragEvent(kind, { ...where, dataTransfer: transfer, bubbles: true, cancelable: true }));
  }
}"""


def find_chromium() -> str | None:
    """Path of the browser, or None."""
    return os.environ.get("FEEDFACE_CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM)), None)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Chromium without a window.

    Raises:
        FileNotFoundError: there is none.
    """
    from playwright.sync_api import sync_playwright

    path = find_chromium()
    if path is None:
        raise FileNotFoundError("no Chromium: install it (apt-get install chromium) or set FEEDFACE_CHROMIUM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            yield browser
        finally:
            browser.close()


class Frontend:
    """A tab with ComfyUI, ready for use.

    Args:
        vue: nodes drawn in Nodes 2.0 instead of on the canvas.
        language: of names and tooltips.

    Attributes:
        errors: what the console reported since the page was ready, but for the answers of hosts that are not this one.
    """

    def __init__(self, browser: Browser, server: ComfyServer, vue: bool = False, language: str = "en") -> None:
        self.server, self.vue, self.errors = server, vue, []
        settings = {
            "Comfy.VueNodes.Enabled": vue,
            "Comfy.VueNodes.AutoScaleLayout": False,
            "Comfy.TutorialCompleted": True,
            "Comfy.UseNewMenu": "Top",
            "Comfy.Workflow.Persist": False,
            "Comfy.Minimap.Visible": False,
            "Comfy.RightSidePanel.IsOpen": False,  # an error opens it, and the server remembers
            "Comfy.Locale": language,
        }
        server.post("/settings", settings)
        self.page = browser.new_page(viewport=VIEW)
        self.page.set_default_timeout(START * 1000)
        self.page.goto(server.address)
        self.page.wait_for_function("window.app?.graph && window.app?.extensionManager?.workflow")
        self.page.wait_for_timeout(3000)
        self.page.on("console", self.note)
        self.page.on("pageerror", lambda problem: self.errors.append(str(problem)))

    @property
    def newest(self) -> bool:
        """Whether this is a newer ComfyUI than the oldest that we support."""
        return self.server.get("/system_stats")["system"]["comfyui_version"] != COMFYUI_OLDEST

    def note(self, message: Any) -> None:
        """The frontend asks remote addresses for the sizes of missing models, and they may be out of reach."""
        if message.type == "error" and not any(words in message.text for words in REMOTE):
            self.errors.append(f"{message.text} ({message.location.get('url', '')})")

    def command(self, name: str) -> None:
        self.page.evaluate("(name) => app.extensionManager.command.execute(name)", name)

    def settle(self, milliseconds: int = 400) -> None:
        self.page.wait_for_timeout(milliseconds)

    def open_graph(self, graph: dict[str, Any]) -> None:
        self.page.evaluate("(graph) => app.loadGraphData(graph)", graph)
        self.settle()

    def open_template(self, name: str) -> None:
        """Open a template as the list of templates does: fetched from the server."""
        address = f"/api/workflow_templates/{PACK_FOLDER}/{urllib.parse.quote(name)}.json"
        self.page.evaluate(
            "async ([address, name]) => app.loadGraphData(await (await fetch(address)).json(), true, true, name)",
            [address, name],
        )
        self.settle()

    def click(self, text: str) -> None:
        """Click what shows a text, wherever it is scrolled to."""
        self.page.get_by_text(text).first.evaluate("(element) => element.click()")

    def texts(self, part: str) -> list[str]:
        """Every text on the page that contains a part."""
        script = """(part) => {
          const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
          while (walker.nextNode()) found.push(walker.currentNode.textContent.trim());
          return found.filter((text) => text.includes(part));
        }"""
        return self.page.evaluate(script, part)

    def missing(self) -> list[str]:
        """Kinds of nodes in the graph that the server does not know."""
        return self.page.evaluate(
            "app.graph.nodes.map(n => n.type).filter(t => !(t in LiteGraph.registered_node_types))"
        )

    def boxes(self) -> list[tuple[int, str, float, float, float, float]]:
        return [tuple(box) for box in self.page.evaluate(BOXES)]

    def collisions(self) -> list[str]:
        """Pairs of nodes that lie over one another, by at least a unit."""
        boxes, found = self.boxes(), []
        for index, (one, kind, x, y, w, h) in enumerate(boxes):
            for other, second, a, b, c, d in boxes[index + 1 :]:
                if max(a - x - w, x - a - c, b - y - h, y - b - d) < -1:
                    found.append(f"{kind} {one} over {second} {other}")
        return found

    def run(self) -> dict[str, Any]:
        """Queue the graph as the Run button does; its outputs by node, once it ended.

        Raises:
            TimeoutError: it did not end in time.
            RuntimeError: it failed; the message is the server's.
        """
        before = set(self.server.get("/history"))
        self.page.evaluate("app.queuePrompt(0, 1)")
        deadline = time.monotonic() + RUN
        while time.monotonic() < deadline:
            new = {key: entry for key, entry in self.server.get("/history").items() if key not in before}
            for entry in new.values():
                if entry["status"]["status_str"] == "error":
                    raise RuntimeError(json.dumps(entry["status"]["messages"][-1]))
                self.settle()
                return entry["outputs"]
            self.settle(150)
        raise TimeoutError(f"the graph did not end within {RUN} s")

    def drop(self, path: Path, kind: str) -> None:
        """Drop a file with a graph onto the empty canvas, and wait for the graph, which a busy machine reads slowly."""
        import base64

        self.page.evaluate(DROP, [path.name, kind, base64.b64encode(path.read_bytes()).decode()])
        self.page.wait_for_function("app.graph.nodes.length > 0")
        self.settle(1500)

    def reports(self) -> dict[str, str]:
        """What the nodes say about their run, by the node's id."""
        script = """Object.fromEntries(app.graph.nodes.map((node) =>
          [node.id, node.widgets?.find((one) => one.name === "feedface_report")?.value]).filter((one) => one[1]))"""
        return self.page.evaluate(script)

    def screenshot(self, path: Path, fit: bool = True) -> None:
        if fit:
            self.command("Comfy.Canvas.FitView")
            self.settle(1200)
        self.page.screenshot(path=path)
