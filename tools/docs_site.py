"""Hooks of ``mkdocs.yml``: the README as the first page, the nodes' help pages, links into the repository."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HELP, NODES = ROOT / "web/docs", "nodes"
_LINK = re.compile(r"(!?\[[^\]]*\]\()(?!https?:|#|mailto:)([^)\s]+)(\))")


def node_names() -> dict[str, str]:
    """Title of each node by its id, in the order of the texts."""
    texts = json.loads((ROOT / "locales/en/nodeDefs.json").read_text("utf-8"))
    return {key: node["display_name"] for key, node in texts.items() if (HELP / key / "en.md").is_file()}


def rest_of_docs(nav: list[Any]) -> set[str]:
    """The pages that a navigation names."""
    found: set[str] = set()
    for entry in nav:
        target = next(iter(entry.values())) if isinstance(entry, dict) else entry
        found |= rest_of_docs(target) if isinstance(target, list) else {target}
    return found


def on_config(config: Any) -> Any:
    """Fills in the nodes, and adds pages that the navigation does not name yet to its last section."""
    pages = [{name: f"{NODES}/{key}.md"} for key, name in node_names().items()]
    for entry in config["nav"]:
        if "Nodes" in entry:
            entry["Nodes"] = pages
    named = rest_of_docs(config["nav"])
    more = sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name not in named)
    if more:
        config["nav"].append({"More": more})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds what lies outside ``docs``: the README, the help pages with their pictures, the icon."""
    from mkdocs.structure.files import File

    def add(name: str, source: Path | None = None, text: str | None = None) -> None:
        content = {"content": text} if source is None else {"abs_src_path": str(source)}
        files.append(File.generated(config, name, **content))

    add("index.md", text=(ROOT / "README.md").read_text("utf-8").replace("](docs/", "]("))
    add("images/icon.svg", ROOT / "assets/icon.svg")
    for key in node_names():
        for picture in sorted((HELP / key).glob("*.png")):
            add(f"{NODES}/{key}/{picture.name}", picture)
        add(
            f"{NODES}/{key}.md",
            text=(HELP / key / "en.md").read_text("utf-8").replace("](node.png)", f"]({key}/node.png)"),
        )
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turns links that leave ``docs`` into addresses of the repository's files."""

    def address(match: re.Match[str]) -> str:
        target = match[2].split("#")[0]
        top = page.file.src_uri == "index.md"
        leaves = target.startswith("../") and not page.file.src_uri.startswith(NODES)
        if target and (leaves or (top and files.get_file_from_path(target) is None)):
            path = match[2].removeprefix("../")
            if not (ROOT / path.split("#")[0]).exists():
                return match[0]  # mkdocs warns
            return f"{match[1]}{config['repo_url']}/blob/main/{path}{match[3]}"
        return match[0]

    return _LINK.sub(address, markdown)
