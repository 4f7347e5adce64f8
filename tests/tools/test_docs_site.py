"""The documentation as a site: every link leads somewhere, and every page is in the navigation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.docs_site import HELP, ROOT, node_names
from tools.registry import REPOSITORY

pytest.importorskip("material")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    settings = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "not included in the" not in done.stderr, done.stderr  # a page that no link of the navigation leads to
    return folder


def test_every_page_and_picture_is_there(site: Path) -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / page.stem / "index.html").is_file(), page.name
    for key, title in node_names().items():
        html = (site / "nodes" / key / "index.html").read_text("utf-8")
        assert (
            f"{title}</h1>" in html.replace(f'{title}<a class="headerlink"', f"{title}</h1><a") and "node.png" in html
        )
        assert (site / "nodes" / key / "node.png").read_bytes() == (HELP / key / "node.png").read_bytes()
    assert {page.parent.name for page in HELP.glob("*/en.md")} == set(node_names())


def test_first_page_is_the_readme(site: Path) -> None:
    html = (site / "index.html").read_text("utf-8")
    assert "FeedFace for ComfyUI" in html and 'src="images/people.png"' in html
    assert f'href="{REPOSITORY}/blob/main/CONTRIBUTING.md"' in html and 'href="docs/' not in html


def test_links_inside_pages_lead_somewhere(site: Path) -> None:
    for page in site.rglob("index.html"):
        for target in re.findall(r'(?:src|href)="([^":?#]+)[^":]*"', page.read_text("utf-8")):
            there = (site / target.lstrip("/")) if target.startswith("/") else page.parent / target
            assert there.exists() or target.startswith("/"), f"{page.relative_to(site)}: {target}"


def test_links_out_of_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", text):
        assert not target or (ROOT / target).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", (ROOT / (target or "README.md")).read_text("utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}
            assert anchor[1:] in slugs, anchor
