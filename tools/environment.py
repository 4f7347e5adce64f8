"""The virtual environment of run.py: made, filled with what is missing. Python's standard library only."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

from tools.find_comfyui import ROOT, WINDOWS, Stop, environment_python, find_oldest, named_path, say, version_of

TORCH = "torch==2.14.1 torchvision==0.29.1 torchaudio==2.11.0"
TORCH_INDEX = "https://download.pytorch.org/whl"
TORCH_CUDA = "cu130"  # the CUDA build of these versions
DRIVER = Path("/proc/driver/nvidia/gpus")  # Linux: a folder for each GPU
EXTRAS = ("faces", "train", "docs", "dev")

# Run by the environment's own interpreter: where packages go, and which torch is there.
PROBE = """
import importlib.metadata as metadata, json, platform, sysconfig
def version(name):
    try: return metadata.version(name)
    except metadata.PackageNotFoundError: return None
print(json.dumps({"python": platform.python_version(), "site": sysconfig.get_path("purelib"),
                  "torch": {name: version(name) for name in ("torch", "torchvision", "torchaudio")}}))
"""
# tomllib came with Python 3.11; pip carries the same parser for 3.10.
REQUIREMENTS = """
import json, sys
try: import tomllib
except ModuleNotFoundError: from pip._vendor import tomli as tomllib
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
groups = {"dependencies": project["dependencies"], **project["optional-dependencies"]}
print(json.dumps([line for name in sys.argv[2:] for line in groups[name]]))
"""


class Environment:
    """A virtual environment, with a stamp for each group of requirements that was installed into it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.python = folder, environment_python(folder)
        self.stamps_file = folder / "feedface-stamps.json"

    def runs(self) -> bool:
        try:
            return subprocess.run([str(self.python), "-c", "import pip"], stderr=subprocess.DEVNULL).returncode == 0
        except OSError:
            return False

    def create(self) -> None:
        """Make it where it is missing or broken. Raises ``Stop``, also where something else lies: what is in the folder
        of an environment that is made anew is removed."""
        if self.runs():
            return
        if problem := self.in_the_way():
            raise Stop(
                f"{str(self.folder)[:400]} {problem}. For a virtual environment FEEDFACE_VENV has to name one, or an "
                "empty folder, or nothing that is there yet."
            )
        say(f"making the virtual environment {self.folder}")
        # --clear also mends an environment whose interpreter was removed.
        made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(self.folder)])
        if made.returncode or not self.runs():
            raise Stop(
                f"cannot make a virtual environment in {str(self.folder)[:400]}: `{sys.executable} -m venv` failed.\n"
                "On Debian and Ubuntu: sudo apt install python3-venv.\n"
                "Or set FEEDFACE_VENV to an environment you have."
            )

    def in_the_way(self) -> str | None:
        """What lies in the folder and is no virtual environment, or why nobody knows."""
        try:
            if not os.path.lexists(self.folder):
                return None
            names = os.listdir(self.folder)
        except OSError as problem:  # a file, a link to itself, a folder of somebody else
            return f"is no folder for it ({problem.strerror})"
        if not names or "pyvenv.cfg" in names:
            return None
        return f"is a folder of other files ({', '.join(sorted(names)[:3])}), which would be lost"

    def ask(self, script: str, *arguments: str) -> Any:
        """What a short script prints as JSON, run by this environment's interpreter."""
        try:
            return json.loads(subprocess.check_output([str(self.python), "-c", script, *arguments], text=True))
        except (OSError, ValueError, subprocess.CalledProcessError) as problem:
            raise Stop(
                f"the virtual environment {self.folder} does not work ({type(problem).__name__}; what its interpreter "
                "says is above). Delete it, or set FEEDFACE_VENV to another."
            ) from problem

    def pip(
        self, what: str, arguments: list[str], keep: dict[str, str | None] | None = None, into: Path | None = None
    ) -> None:
        """pip install into this environment, or into another without a pip of its own.

        Args:
            what: named in the error.
            arguments: of ``pip install``.
            keep: packages that stay at the version they have.
            into: interpreter of the other environment.

        Raises:
            Stop: pip failed.
        """
        with tempfile.TemporaryDirectory() as folder:
            constraints = Path(folder) / "constraints.txt"
            pins = [f"{name}=={version}\n" for name, version in (keep or {}).items() if version]
            constraints.write_text("".join(pins), encoding="utf-8")
            command = [str(self.python), "-m", "pip", *(["--python", str(into)] if into else []), "install"]
            command += ["--quiet", "--disable-pip-version-check", "-c", str(constraints), *arguments]
            if subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
                raise Stop(
                    f"pip could not install {what} for {into or self.python}; its message is above.\n"
                    "Without a network, set FEEDFACE_VENV to an environment that has it, or retry online."
                )

    def stamps(self) -> dict[str, str]:
        try:
            stamps = json.loads(self.stamps_file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return stamps if isinstance(stamps, dict) else {}

    def stamped(self, group: str, *content: str) -> bool:
        return self.stamps().get(group) == digest(*content)

    def stamp(self, group: str, *content: str) -> None:
        text = json.dumps(self.stamps() | {group: digest(*content)}, indent=2)
        try:
            self.stamps_file.write_text(text, encoding="utf-8")
        except OSError as problem:  # an environment that others keep: it is only slower
            say(f"{self.stamps_file}: cannot be written ({problem.strerror}); the packages are looked at every time")


def digest(*content: str) -> str:
    return hashlib.sha256("\0".join(content).encode()).hexdigest()


def environment_folder() -> Path:
    return named_path("FEEDFACE_VENV", os.environ.get("FEEDFACE_VENV") or str(ROOT / ".venv")).absolute()


def has_nvidia_gpu() -> bool:
    """Whether the driver of an NVIDIA GPU answers."""
    program = shutil.which("nvidia-smi")
    if program is None:  # a container may have the GPU without the program
        return any(DRIVER.glob("*"))
    answer = subprocess.run([program, "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return answer.returncode == 0 and b"GPU" in answer.stdout


def torch_build() -> str:
    """Which of PyTorch's builds this machine needs; empty for the one that the package index has.

    That is CUDA's on Linux, the CPU's on Windows, and the only one on macOS.
    """
    if sys.platform == "darwin" or WINDOWS != has_nvidia_gpu():
        return ""
    return TORCH_CUDA if WINDOWS else "cpu"


def torch_arguments(installed: dict[str, str | None]) -> list[str]:
    """pip's arguments for what is missing of torch, torchvision and torchaudio.

    What is added to a torch is of the same build, which the part of its version after ``+`` names.
    """
    if chosen := os.environ.get("FEEDFACE_TORCH"):
        return chosen.split()
    torch = installed["torch"]
    wanted = [name for name, version in installed.items() if not version] if torch else TORCH.split()
    build = torch.partition("+")[2] if torch else torch_build()
    if not build:
        return wanted
    index = f"{TORCH_INDEX}/{build}"
    try:  # pip would try an index that cannot be reached six times for each package
        urllib.request.urlopen(f"{index}/torch/", timeout=20).close()
    except OSError as problem:
        say(f"{index} cannot be reached ({problem}): taking what the package index has")
        return wanted
    return ["--extra-index-url", index, *wanted]  # 2.14.1+cpu comes before 2.14.1


def prepare(comfyui: Path | None) -> tuple[Environment, dict]:
    """The environment with torch, our requirements and ComfyUI's; fast when nothing is missing."""
    environment = Environment(environment_folder())
    environment.create()
    facts = environment.ask(PROBE)
    if None in facts["torch"].values():
        chosen = torch_arguments(facts["torch"])
        say(f"installing {' '.join(chosen)} (a large download, once; FEEDFACE_TORCH chooses another build)")
        environment.pip("torch", chosen, keep=facts["torch"])
        facts = environment.ask(PROBE)

    project = ROOT / "pyproject.toml"
    content = (project.read_text(encoding="utf-8"), *EXTRAS)
    if not environment.stamped("feedface", *content):
        say("installing what the project needs")
        lines = environment.ask(REQUIREMENTS, str(project), "dependencies", *EXTRAS)
        environment.pip("the requirements of pyproject.toml", lines, keep=facts["torch"])
        environment.stamp("feedface", *content)

    if comfyui:
        requirements = comfyui / "requirements.txt"
        content = read_requirements(requirements)
        if not environment.stamped("comfyui", content):
            say(f"installing what ComfyUI {version_of(comfyui)} needs")
            environment.pip("ComfyUI's requirements", ["-r", str(requirements)], keep=facts["torch"])
            environment.stamp("comfyui", content)
    return environment, facts


def read_requirements(path: Path) -> str:
    """What a ComfyUI needs. Raises ``Stop``."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise Stop(f"{path}: cannot be read ({type(problem).__name__}): is the ComfyUI there whole?") from problem


def prepare_queue() -> Environment:
    """The environment with the few packages that ``tools.queue`` needs; neither torch nor ComfyUI is among them."""
    environment = Environment(environment_folder())
    environment.create()
    project = ROOT / "pyproject.toml"
    content = project.read_text(encoding="utf-8")
    if not (environment.stamped("queue", content) or environment.stamped("feedface", content, *EXTRAS)):
        say("installing what the queue needs")
        environment.pip('the requirements "queue"', environment.ask(REQUIREMENTS, str(project), "queue"))
        environment.stamp("queue", content)
    return environment


def prepare_oldest(comfyui: Path, environment: Environment, facts: dict) -> tuple[Path, Path] | None:
    """Make the oldest ComfyUI's environment where it is missing or broken.

    ComfyUI pins three packages of its own, and an old server does not start with the new ones. So the
    environment holds those three only; a ``.pth`` file takes the rest from the main environment.
    """
    found = find_oldest(comfyui)
    if found is None or "COMFYUI_OLDEST_PYTHON" in os.environ:
        return found
    folder, _ = found
    pins = [line for line in read_requirements(folder / "requirements.txt").splitlines() if "==" in line]
    layered, content = Environment(folder / ".venv"), (*pins, facts["site"], facts["python"])
    if not (layered.stamped("layer", *content) and layered.runs()):
        say(f"making the small environment of ComfyUI {version_of(folder)}")
        subprocess.run([environment.python, "-m", "venv", "--clear", "--without-pip", layered.folder], check=True)
        environment.pip(f"the pins of ComfyUI {version_of(folder)}", ["--no-deps", *pins], into=layered.python)
        pth = Path(layered.ask(PROBE)["site"]) / "feedface-main-environment.pth"
        pth.write_text(facts["site"] + "\n", encoding="utf-8")
        layered.stamp("layer", *content)
    return found
