"""A folder with photos, tasks and a workflow, and the queue run on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.fake_comfyui import WORKFLOW

from tools.queue.__main__ import main


class Desk:
    """What a user has: photos, a workflow, and the command."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "out"
        for name in ("anna_1.png", "anna_2.png", "ben.png"):
            Image.new("RGB", (16, 16), (len(name), sum(name.encode()) % 256, 0)).save(folder / name)
        self.workflow = self.write("workflow.json", WORKFLOW)

    def write(self, name: str, content: Any) -> Path:
        path = self.folder / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    def tasks(self, count: int, name: str = "tasks.json") -> Path:
        """One person and so many prompts, ``prompt 1`` the first."""
        person = {"id": "anna", "photos": ["anna_1.png"]}
        return self.write(name, {"people": [person], "prompts": [f"prompt {i + 1}" for i in range(count)]})

    def run(self, tasks: Path, *servers: Any, **options: Any) -> int:
        words = [str(tasks), "--workflow", str(self.workflow), "--output", str(self.output)]
        for server in servers:
            words += ["--server", getattr(server, "address", server)]
        for name, value in options.items():
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        return main(words)

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.output / "summary.json").read_text("utf-8"))

    @property
    def pictures(self) -> list[str]:
        folder = self.output / "pictures"
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("[!.]*") if path.is_file())


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture
def refused(desk: Desk, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a run says that is refused."""

    def run(tasks: Path, *servers: Any, **options: Any) -> str:
        assert desk.run(tasks, *servers, **options) == 1
        return capsys.readouterr().err

    return run
