"""ComfyUI as a process of its own, with this pack loaded: started, driven over its API, stopped.

    with ComfyServer(comfyui, python) as server:
        name = server.upload("portrait.jpg")
        run = server.run(json.load(open("workflows/api/feedface_portrait.json")))
        picture = server.pictures(run)[0]  # (H, W, 3) uint8

The user's ComfyUI is only read: models, inputs, outputs, user data and the link to this pack live in a base
directory of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tools.comfy_client import ComfyClient, ServerError
from tools.find_comfyui import ROOT, WINDOWS

HOST = "127.0.0.1"
PACK_FOLDER = "ComfyUI-FeedFace"
FOLDERS = ("custom_nodes", "input", "output", "temp", "user", "models/checkpoints", "models/feedface/faces")
LOG_TAIL = 40  # lines of the server's log in an error
START_SECONDS = 180


class ComfyServer(ComfyClient):
    """ComfyUI as a process of its own, from ``with`` to the end of its block.

    Args:
        comfyui: folder with ComfyUI's ``main.py``.
        python: interpreter that has its requirements.
        base: base directory, kept; None makes a temporary one and removes it.
        arguments: further arguments of ``main.py``, such as ``--cpu``.
        model_folders: a folder like ComfyUI's ``models`` to read models from as well.
        listen: addresses separated by commas, as ``main.py`` takes them.
        port: None takes a free one.

    Raises:
        ServerError: the port is taken, or it ended or was not ready in time; the message holds the end of its log.
    """

    def __init__(
        self,
        comfyui: Path,
        python: Path | str = sys.executable,
        base: Path | None = None,
        arguments: Sequence[str] = ("--cpu",),
        model_folders: Path | None = None,
        listen: str = HOST,
        port: int | None = None,
    ) -> None:
        self.comfyui, self.python = Path(comfyui), Path(python)
        self.keep = base is not None
        self.base = Path(base) if base else Path(tempfile.mkdtemp(prefix="feedface-comfyui-"))
        self.arguments, self.model_folders = list(arguments), model_folders
        self.listen, self.port = listen, port or free_port()
        # Where this machine reaches it: the first address it listens on, or a local one for "every address".
        first = listen.split(",")[0].strip()
        self.host = {"0.0.0.0": HOST, "::": "::1"}.get(first, first)
        scheme = "https" if "--tls-keyfile" in self.arguments else "http"
        super().__init__(f"{scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}")
        self.log_file = self.base / "comfyui.log"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ComfyServer:
        if listens(self.host, self.port):
            raise ServerError(f"port {self.port} of {self.host} is taken: end what uses it, or choose another --port")
        for name in FOLDERS:
            (self.base / name).mkdir(parents=True, exist_ok=True)
        link_folder(ROOT, self.base / "custom_nodes" / PACK_FOLDER)
        command = [str(self.python), str(self.comfyui / "main.py"), "--listen", self.listen, "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--disable-auto-launch", "--disable-api-nodes"]
        # ComfyUI would otherwise keep its database inside its own folder.
        command += ["--database-url", f"sqlite:///{(self.base / 'user/comfyui.db').as_posix()}"]
        if self.model_folders:
            config = self.base / "model_folders.yaml"
            folders = {path.name: str(path) for path in sorted(self.model_folders.iterdir()) if path.is_dir()}
            config.write_text(json.dumps({"comfyui": folders}), encoding="utf-8")  # JSON is YAML
            command += ["--extra-model-paths-config", str(config)]
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *self.arguments],
                cwd=self.base,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=server_environment(),
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not listens(self.host, self.port):
            if self.process.poll() is not None:
                raise ServerError(f"ComfyUI ended with code {self.process.returncode} while starting.\n{self.tail()}")
            if time.monotonic() > deadline:
                raise ServerError(f"ComfyUI was not ready after {START_SECONDS} s.\n{self.tail()}")
            time.sleep(0.2)

    def stop(self) -> None:
        """End the process and remove a temporary base directory; safe to call twice."""
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if not self.keep:
            shutil.rmtree(self.base, ignore_errors=True)

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def tail(self) -> str:
        lines = self.log.splitlines()[-LOG_TAIL:]
        return f"The end of its log ({self.comfyui}):\n" + "\n".join(f"    {line}" for line in lines)


def listens(host: str, port: int) -> bool:
    """Whether anything answers there. ComfyUI opens its port once all nodes are loaded."""
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def link_folder(target: Path, path: Path) -> None:
    """Make ``path`` lead to the folder ``target``, on Windows with a junction, which needs no special right."""
    if path.exists() or path.is_symlink():
        if path.resolve() == target.resolve():
            return
        path.unlink()
    if WINDOWS:
        import _winapi

        _winapi.CreateJunction(str(target), str(path))
    else:
        path.symlink_to(target, target_is_directory=True)


def server_environment() -> dict[str, str]:
    """Ours, less the pack's root on the import path: in ComfyUI the pack must do without."""
    search = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != ROOT]
    rest = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return rest | ({"PYTHONPATH": os.pathsep.join(search)} if search else {}) | {"PYTHONUNBUFFERED": "1"}
