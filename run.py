"""FeedFace's commands. Python's standard library only; Linux, macOS and Windows.

    python run.py test [pytest arguments]       the tests, those against a real ComfyUI included
    python run.py test --oldest [...]           the same inside the oldest ComfyUI we support
    python run.py test --browser [...]          the templates in a real browser (needs Chromium)
    python run.py demo [arguments]              people drawn by the small model in a real ComfyUI; or your photo
    python run.py comfyui [ComfyUI arguments]   start ComfyUI with this pack loaded, and print its address
    python run.py queue TASKS [arguments]       prompts × people on a ComfyUI that runs already, or several
    python run.py bench NAME [arguments]        a benchmark: benchmarks/NAME.py
    python run.py COMMAND --help                what a command takes

Every command makes or reuses a virtual environment, installs what is missing in it, and finds ComfyUI or
fetches a release; queue installs a few small packages alone. Settings, all optional, are environment variables:

    FEEDFACE_VENV             the virtual environment (default: .venv beside this file)
    FEEDFACE_TORCH            pip arguments that install torch, torchvision and torchaudio where they are
                              missing (default: versions tested together, built for CUDA where there is an
                              NVIDIA GPU and for the CPU elsewhere; for another GPU see pytorch.org)
    COMFYUI_PATH              the ComfyUI to use (default: the one this pack is installed in, comfy-cli's
                              workspace, a release in our cache folder)
    COMFYUI_OLDEST_PATH       the oldest supported ComfyUI (default: a folder ComfyUI-0.3.75 beside ComfyUI)
    COMFYUI_OLDEST_PYTHON     its interpreter (default: the one in its .venv, which is made when missing)
    FEEDFACE_REQUIRE_COMFYUI  1: a missing ComfyUI, newest or oldest, fails the tests instead of skipping some
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036 — whoever runs this may have an older one
    sys.exit(f"FeedFace needs Python 3.10 or newer; this is {sys.version.split()[0]}.")

from tools.environment import Environment, environment_folder, prepare, prepare_oldest, prepare_queue
from tools.find_comfyui import COMFYUI_OLDEST, ROOT, Stop, fetch_comfyui, find_comfyui, say, version_of

PROCESSES = 2  # of the whole test suite: each has servers of its own, 8 GB with everything


def benchmarks() -> list[str]:
    return sorted(path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py"))


def run_module(python: Path, module: str, arguments: list[str], comfyui: dict[str, str]) -> int:
    """Run a module of ours where the user stands: relative paths among the arguments keep their meaning."""
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [str(python), "-m", module, *arguments]
    return hand_over(command, os.environ | comfyui | {"PYTHONPATH": search})


def hand_over(command: list[str], environment: dict[str, str]) -> int:
    """Become the command, so that signals and the exit code are its own; Windows can only wait for it."""
    if os.name != "nt":
        os.execve(command[0], command, environment)
    return subprocess.call(command, env=environment)


def module_of(command: str, rest: list[str]) -> str | None:
    """The module that a command runs; None for the tests, and for a benchmark that was not named."""
    if command == "bench":
        return f"benchmarks.{rest[0]}" if rest and rest[0] in benchmarks() else None
    return {"demo": "tools.demo", "comfyui": "tools.comfyui", "queue": "tools.queue.__main__"}.get(command)


def show_help(command: str, module: str | None) -> int:
    """What a command does and takes, without making an environment for it."""
    environment = Environment(environment_folder())
    if module is None:
        print(__doc__)
        if command == "bench":
            print(f"Benchmarks: {', '.join(benchmarks())}")
        return 0
    if command == "comfyui":  # needs nothing but Python, like ComfyUI's own help
        return run_module(Path(sys.executable), module, ["--help"], {})
    if environment.stamps():
        return run_module(environment.python, module, ["--help"], {})
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    print(ast.get_docstring(ast.parse(source)), "Its options are listed here once it has run.", sep="\n\n")
    return 0


def command_test(arguments: list[str], environment: Environment, comfyui: dict[str, str]) -> int:
    python = environment.python
    if "--browser" in arguments:
        arguments = ["-m", "browser", "tests/browser", *(word for word in arguments if word != "--browser")]
        comfyui = comfyui | {"FEEDFACE_REQUIRE_BROWSER": "1"}
    if "--oldest" in arguments:
        arguments = [word for word in arguments if word != "--oldest"]
        if "COMFYUI_OLDEST_PATH" not in comfyui:
            raise Stop(f"--oldest needs ComfyUI {COMFYUI_OLDEST}: put it beside ComfyUI or set COMFYUI_OLDEST_PATH.")
        python = Path(comfyui["COMFYUI_OLDEST_PYTHON"])
        comfyui = comfyui | {"COMFYUI_PATH": comfyui["COMFYUI_OLDEST_PATH"]}
    if not arguments:  # a file stays in one process, with what its tests share
        count = min(PROCESSES, os.cpu_count() or 1)
        arguments = ["-n", str(count), "--dist", "loadfile", "--no-loadscope-reorder"]
        threads = str(max(1, (os.cpu_count() or 1) // count))  # else each takes all cores, and waits for the others'
        comfyui = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads), **comfyui}
    # From the root: the tests' import path depends on it (see pyproject.toml).
    os.chdir(ROOT)
    return hand_over([str(python), "-m", "pytest", *arguments], os.environ | comfyui)


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(__doc__)
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in ("test", "demo", "comfyui", "queue", "bench"):
        raise Stop(f"unknown command {command!r}: expected test, demo, comfyui, queue or bench (python run.py --help).")
    module = module_of(command, rest)
    if {"-h", "--help"} & set(rest):
        return show_help(command, module)
    if command == "bench" and module is None:
        asked = f"no benchmark {rest[0]!r}" if rest else "which benchmark?"
        raise Stop(f"{asked}: there are {', '.join(benchmarks()) or 'none'} (python run.py bench NAME).")

    if command == "queue":
        return run_module(prepare_queue().python, module, rest, {})
    comfyui = find_comfyui()
    if comfyui is None:
        try:
            comfyui = fetch_comfyui()
        except Stop as problem:
            if command in ("demo", "comfyui") or os.environ.get("FEEDFACE_REQUIRE_COMFYUI") == "1":
                raise
            say(f"{problem}\nGoing on without it.")
    environment, facts = prepare(comfyui)
    using = f"Python {facts['python']} in {environment.folder}, torch {facts['torch']['torch']}"
    variables = {}
    if comfyui:
        using += f", ComfyUI {version_of(comfyui)} in {comfyui}"
        variables["COMFYUI_PATH"] = str(comfyui)
        oldest = prepare_oldest(comfyui, environment, facts) if command == "test" else None
        if oldest:
            using += f" and {version_of(oldest[0])} in {oldest[0]}"
            variables |= {"COMFYUI_OLDEST_PATH": str(oldest[0]), "COMFYUI_OLDEST_PYTHON": str(oldest[1])}
    say(using)

    if command == "test":
        return command_test(rest, environment, variables)
    return run_module(environment.python, module, rest[1:] if command == "bench" else rest, variables)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Stop as problem:
        sys.exit(f"FeedFace: {problem}")
    except KeyboardInterrupt:
        sys.exit(130)
