"""What loading the pack costs everyone who has it installed: few modules, nothing on disk."""

from __future__ import annotations

from pathlib import Path

from benchmarks.startup import ROOT, probe

#: Beyond what ComfyUI itself has imported by then. No detector, no diffusers, no plotting.
ALLOWED = {
    "_zoneinfo",
    "annotated_types",
    "comfyui_version",
    "pydantic",
    "pydantic_core",
    "typing_inspection",
    "zoneinfo",
}


def files(folder: Path) -> dict[str, tuple[int, int]]:
    stats = {str(path): path.stat() for path in folder.rglob("*") if "__pycache__" not in path.parts}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def test_import_is_light_and_writes_nothing(newest_comfyui) -> None:
    folders = [
        ROOT / "models",
        ROOT / "nodes",
        ROOT / "workflows",
        newest_comfyui.path / "models",
        newest_comfyui.path / "user",
    ]
    before = [files(folder) for folder in folders]
    found = probe(str(newest_comfyui.path))
    assert set(found["modules"]) <= ALLOWED
    assert [files(folder) for folder in folders] == before
