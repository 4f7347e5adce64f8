"""Who may import whom, by rule and by the drawing in docs/architecture.md, and how long a file may be."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from setuptools import find_namespace_packages

from tools.find_comfyui import COMFYUI_OLDEST

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("feedface_core", "nodes", "trainer", "examples", "benchmarks", "tools", "tests")
LONGEST_FILE, LONGEST_TEST = 300, 400
COMFYUI = {"comfy", "comfy_api", "comfy_api_nodes", "comfy_execution", "comfy_extras", "folder_paths", "nodes"}
COMFYUI |= {"node_helpers", "latent_preview", "execution", "server"}
CORE_AT_IMPORT = {"torch", "safetensors", "numpy", "pydantic"}
#: Packages whose rooms the drawing of docs/architecture.md shows, and those it shows as a whole.
OPENED, CLOSED = ("nodes", "trainer", "feedface_core"), {"benchmarks", "tools", "examples"}
ROOM = re.compile(r"\b(?:nodes|trainer|feedface_core|benchmarks|tools|examples)(?:\.[a-z_]+)?\b")
STANDARD_ONLY = {"run.py", "tools/environment.py", "tools/find_comfyui.py"}


def imports(tree: ast.Module, package: tuple[str, ...]) -> Iterator[tuple[int, str, bool, bool]]:
    """Each import as (line, dotted name, is it relative, does it run when the module is imported)."""

    def walk(node: ast.AST, at_import: bool) -> Iterator[tuple[int, str, bool, bool]]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, False, at_import
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            outside = node.level > len(package) + 1
            for alias in node.names:
                name = ".".join([*base, *filter(None, [node.module]), alias.name])
                yield node.lineno, "outside" if outside else name, bool(node.level), at_import
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            at_import = False
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            at_import = False
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_import)

    yield from walk(tree, True)


def violations(path: str, source: str) -> list[str]:
    """What is wrong with the imports of one file, a sentence for each."""
    folders = tuple(Path(path).parts[:-1])
    part = folders[0] if folders else ""
    wrong = []
    for line, name, relative, at_import in imports(ast.parse(source), folders):
        top = name.split(".")[0]
        ours = top in PARTS and (relative or top != "nodes")
        problem = None
        if path in STANDARD_ONLY:
            if top not in sys.stdlib_module_names and f"{'/'.join(name.split('.')[:2])}.py" not in STANDARD_ONLY:
                problem = "is for Python's standard library only"
        elif part in ("feedface_core", "nodes") and ours and not relative:
            problem = "must use relative imports: it lives inside ComfyUI's pack"
        elif part == "feedface_core":
            if (relative and top != part) or top in COMFYUI | {"diffusers", "accelerate"}:
                problem = "must know neither ComfyUI nor the trainer's libraries nor other parts"
            elif at_import and not relative and top not in CORE_AT_IMPORT | sys.stdlib_module_names:
                problem = "imports only torch, safetensors, numpy and pydantic at import time"
        elif part == "nodes":
            if relative and top not in ("nodes", "feedface_core"):
                problem = "may use feedface_core only"
        elif part == "trainer":
            if (not ours and top in COMFYUI) or (ours and top not in ("trainer", "feedface_core")):
                problem = "may use feedface_core, never ComfyUI, the nodes or the tools"
        elif part == "examples":
            if (not ours and top in COMFYUI) or (ours and top not in ("examples", "trainer", "feedface_core")):
                problem = "may use the trainer and feedface_core, never ComfyUI, the nodes or the tools"
        elif part in ("benchmarks", "tools", "tests"):
            if top in COMFYUI and not relative and at_import:
                problem = "may import ComfyUI only inside a function, once the process is set up for it"
        if problem:
            wrong.append(f"{path}:{line}: imports {name}; {part or path} {problem}")
    return wrong


def files() -> list[Path]:
    return [ROOT / "run.py", *(file for part in PARTS for file in sorted((ROOT / part).rglob("*.py")))]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("feedface_core/a.py", "import comfy.utils"),
        ("feedface_core/a.py", "def f():\n    import folder_paths"),
        ("feedface_core/a.py", "def f():\n    from diffusers import UNet2DConditionModel"),
        ("feedface_core/a.py", "import transformers"),
        ("feedface_core/a.py", "from feedface_core.b import c"),
        ("feedface_core/hosts/a.py", "from ...trainer import losses"),
        ("feedface_core/a.py", "class A:\n    import PIL"),
        ("nodes/a.py", "from feedface_core import adapter"),
        ("nodes/a.py", "from ..trainer import losses"),
        ("trainer/a.py", "def f():\n    import comfy.sd"),
        ("examples/small_model/a.py", "from nodes import x"),
        ("trainer/a.py", "from tools.server import ComfyServer"),
        ("tools/a.py", "import folder_paths"),
        ("tests/a.py", "from comfy import sd"),
        ("run.py", "import torch"),
        ("tools/environment.py", "from tools.server import ComfyServer"),
    ],
)
def test_wrong_arrow_is_found(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("feedface_core/hosts/a.py", "from ..config import AdapterConfig\nimport torch.nn as nn\nimport json"),
        ("feedface_core/a.py", "def f():\n    import transformers"),
        ("feedface_core/a.py", "if TYPE_CHECKING:\n    from PIL import Image"),
        ("nodes/a.py", "import comfy.utils\nfrom ..feedface_core import adapter\nfrom .patches import Patch"),
        (
            "trainer/a.py",
            "import diffusers\nfrom feedface_core.modules.adapter import FaceAdapter\nfrom .data import x",
        ),
        ("tools/a.py", "def f():\n    import comfy.sd"),
        ("run.py", "import json\nfrom tools.environment import prepare"),
    ],
)
def test_right_arrow_passes(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_imports_of_every_file() -> None:
    wrong = [
        line
        for file in files()
        for line in violations(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8"))
    ]
    assert not wrong, "\n".join(wrong)


def drawing() -> dict[str, int]:
    """The rooms of docs/architecture.md by the line of the drawing they stand on."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```text\n")[1].split("```")[0]
    found = [(name, line) for line, row in enumerate(text.splitlines()) for name in ROOM.findall(row)]
    names = [name for name, _ in found]
    assert len(names) == len(set(names)), "a room stands in the drawing twice"
    return dict(found)


def rooms() -> set[str]:
    """Every folder and module of the packages that the drawing opens, and the others as a whole."""
    inside = {
        f"{package}.{path.stem}"
        for package in OPENED
        for path in (ROOT / package).iterdir()
        if path.suffix == ".py" or any(path.glob("*.py"))
    }
    return {name.removesuffix(".__init__") for name in inside} - {"trainer", "feedface_core"} | CLOSED


def room_of(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] in OPENED else 1])


def test_drawing_shows_every_room() -> None:
    assert set(drawing()) == rooms()


def test_imports_go_down_the_drawing() -> None:
    line, wrong = drawing(), []
    for file in files():
        path = file.relative_to(ROOT)
        package = path.parts[:-1]
        home = room_of(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
        if home not in line:
            continue
        for number, name, relative, _ in imports(ast.parse(file.read_text(encoding="utf-8")), package):
            target = room_of(name)
            ours = relative or name.split(".")[0] != "nodes"
            if ours and target in line and target != home and line[target] <= line[home]:
                wrong.append(f"{path}:{number}: {home} imports {target}, which does not stand below it")
    assert not wrong, "\n".join(wrong)


def test_trainer_has_few_rooms() -> None:
    entries = [path for path in (ROOT / "trainer").iterdir() if path.name not in ("__init__.py", "__pycache__")]
    assert len(entries) <= 12


def test_files_stay_short() -> None:
    lengths = {file.relative_to(ROOT).as_posix(): len(file.read_text("utf-8").splitlines()) for file in files()}
    limit = {name: LONGEST_TEST if name.startswith("tests/") else LONGEST_FILE for name in lengths}
    assert {name: length for name, length in lengths.items() if length > limit[name]} == {}


def test_tests_are_not_packages() -> None:
    """An __init__.py below tests/ has pytest import the pack's own root package, outside ComfyUI."""
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_root_exports_one_entry_point() -> None:
    names = {
        node.id for node in ast.walk(ast.parse((ROOT / "__init__.py").read_text("utf-8"))) if isinstance(node, ast.Name)
    }
    assert "NODE_CLASS_MAPPINGS" not in names, "it would switch comfy_entrypoint off"


def test_project_metadata() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    dependencies = re.search(r"^dependencies = \[(.*?)^\]", text, re.S | re.M).group(1)
    light = set((ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines())
    assert set(re.findall(r'"(.+?)"', dependencies)) <= light, "requirements.txt repeats the dependencies"
    assert f'requires-comfyui = ">={COMFYUI_OLDEST}"' in text
    include = re.findall(r'"(.+?)"', re.search(r"^include = \[(.*?)\]", text, re.M).group(1))
    installed = {name.split(".")[0] for name in find_namespace_packages(str(ROOT), include=include)}
    assert installed == {"feedface_core", "trainer"}, "nodes/ would shadow ComfyUI's nodes.py"
