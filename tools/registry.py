"""The addresses in pyproject.toml and mkdocs.yml that depend on where the repository lies.

    python -m tools.registry                     writes them for REPOSITORY
    python -m tools.registry https://github.com/OWNER/ComfyUI-FeedFace --publisher OWNER

The Comfy registry shows icon and banner from their raw addresses; a path in the repository is not enough for it.
"""

from __future__ import annotations

import argparse
import re

from tools.find_comfyui import ROOT

#: Where the repository is published: the owner changes this one line, and runs this module.
REPOSITORY = "https://github.com/feedface/ComfyUI-FeedFace"
BRANCH = "main"


def addresses(repository: str, branch: str = BRANCH) -> dict[str, str]:
    """Every address by its key in pyproject.toml."""
    raw = repository.replace("https://github.com/", "https://raw.githubusercontent.com/") + f"/{branch}"
    return {
        "Homepage": repository,
        "Repository": repository,
        "Documentation": f"{repository}/tree/{branch}/docs",
        "Changelog": f"{repository}/blob/{branch}/CHANGELOG.md",
        "Bug Tracker": f"{repository}/issues",
        "Icon": f"{raw}/assets/icon.svg",
        "Banner": f"{raw}/assets/banner.png",
    }


def rewritten(text: str, repository: str, publisher: str | None = None) -> str:
    """The text of pyproject.toml with the addresses of a repository.

    Raises:
        ValueError: an address has no line in it.
    """
    values = addresses(repository) | ({"PublisherId": publisher} if publisher else {})
    for key, value in values.items():
        name = f'"{key}"' if " " in key else key
        text, count = re.subn(rf'(?m)^{re.escape(name)} = ".*"$', f'{name} = "{value}"', text)
        if count != 1:
            raise ValueError(f"pyproject.toml: {count} lines {name} = …, expected one")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", nargs="?", default=REPOSITORY)
    parser.add_argument("--publisher", help="the publisher's id in the Comfy registry")
    options = parser.parse_args()
    path = ROOT / "pyproject.toml"
    path.write_text(rewritten(path.read_text("utf-8"), options.repository, options.publisher), encoding="utf-8")
    site = ROOT / "mkdocs.yml"
    site.write_text(re.sub(r"(?m)^repo_url: .*$", f"repo_url: {options.repository}", site.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
