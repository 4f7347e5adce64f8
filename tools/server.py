"""A real ComfyUI server as its own process, with this pack loaded: started, driven over its API, stopped.

    with ComfyServer(comfyui, python) as server:
        name = server.upload("portrait.jpg")
        run = server.run(json.load(open("workflows/api/feedface_portrait.json")))
        picture = server.pictures(run)[0]  # (H, W, 3) uint8

The user's ComfyUI is only read: models, inputs, outputs, user data and the link to this pack live in a base
directory of their own.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tools.find_comfyui import ROOT, WINDOWS

if TYPE_CHECKING:
    import numpy

HOST = "127.0.0.1"
PACK_FOLDER = "ComfyUI-FeedFace"
FOLDERS = ("custom_nodes", "input", "output", "temp", "user", "models/checkpoints", "models/feedface/faces")
LOG_TAIL = 40  # lines of the server's log in an error


class ServerError(RuntimeError):
    """The server did not start, refused a prompt, or failed while running it."""


@dataclass
class Run:
    """What happened to one prompt.

    Attributes:
        outputs: of every output node, by node id, as in ComfyUI's history.
        executed: ids of the nodes that ran, in order.
        cached: ids of the nodes answered from the server's cache.
        progress: each report as (node id, value, maximum).
        interrupted: it was stopped before its end.
        seconds: from queueing to the end.
    """

    prompt_id: str
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    executed: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    progress: list[tuple[str, int, int]] = field(default_factory=list)
    interrupted: bool = False
    seconds: float = 0.0


class ComfyServer:
    """ComfyUI as a process of its own, from ``with`` to the end of its block.

    Args:
        comfyui: folder with ComfyUI's ``main.py``.
        python: interpreter that has its requirements.
        base: base directory, kept; None makes a temporary one and removes it.
        arguments: further arguments of ``main.py``, such as ``--cpu``.
        packs: folders to load as custom nodes, this pack by default.
        model_folders: a folder like ComfyUI's ``models`` to read models from as well.
        listen: addresses separated by commas, as ``main.py`` takes them.
        port: None takes a free one.
        start_seconds: how long starting may take.

    Raises:
        ServerError: the port is taken, or it ended or was not ready in time; the message holds the end of its log.
    """

    def __init__(
        self,
        comfyui: Path,
        python: Path | str = sys.executable,
        base: Path | None = None,
        arguments: Sequence[str] = ("--cpu",),
        packs: Sequence[Path] = (ROOT,),
        model_folders: Path | None = None,
        listen: str = HOST,
        port: int | None = None,
        start_seconds: float = 180,
    ) -> None:
        self.comfyui, self.python = Path(comfyui), Path(python)
        self.keep = base is not None
        self.base = Path(base) if base else Path(tempfile.mkdtemp(prefix="feedface-comfyui-"))
        self.arguments, self.packs, self.model_folders = list(arguments), list(packs), model_folders
        self.listen, self.port = listen, port or free_port()
        self.start_seconds = start_seconds
        self.process: subprocess.Popen[bytes] | None = None
        self.client = uuid.uuid4().hex

    # --- life

    def __enter__(self) -> ComfyServer:
        if listens(self.host, self.port):
            raise ServerError(f"port {self.port} of {self.host} is taken: end what uses it, or choose another --port")
        for name in FOLDERS:
            (self.base / name).mkdir(parents=True, exist_ok=True)
        for pack in self.packs:
            link(pack, self.base / "custom_nodes" / (PACK_FOLDER if pack == ROOT else pack.name))
        command = [str(self.python), str(self.comfyui / "main.py"), "--listen", self.listen, "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--disable-auto-launch", "--disable-api-nodes"]
        # ComfyUI would otherwise keep its database inside its own folder.
        command += ["--database-url", f"sqlite:///{(self.base / 'user/comfyui.db').as_posix()}"]
        if self.model_folders:
            config = self.base / "model_folders.yaml"
            folders = {p.name: str(p) for p in sorted(self.model_folders.iterdir()) if p.is_dir()}
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
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None):
        self.stop()

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.start_seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerError(f"ComfyUI ended with code {self.process.returncode} while starting.\n{self.tail()}")
            if listens(self.host, self.port):
                return
            time.sleep(0.2)
        raise ServerError(f"ComfyUI was not ready after {self.start_seconds:.0f} s.\n{self.tail()}")

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

    # --- what it says

    @property
    def host(self) -> str:
        """Where this machine reaches it: the first address it listens on, or a local one for "every address"."""
        first = self.listen.split(",")[0].strip()
        return {"0.0.0.0": HOST, "::": "::1"}.get(first, first)

    @property
    def address(self) -> str:
        scheme = "https" if "--tls-keyfile" in self.arguments else "http"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{self.port}"

    @property
    def log_file(self) -> Path:
        return self.base / "comfyui.log"

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def tail(self) -> str:
        lines = self.log.splitlines()[-LOG_TAIL:]
        return f"The end of its log ({self.comfyui}):\n" + "\n".join(f"    {line}" for line in lines)

    # --- its API

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.address + path, timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    def object_info(self) -> dict[str, Any]:
        """Every node the server knows, by id."""
        return self.get("/object_info")

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def free(self) -> None:
        """Have the server unload its models and drop its cache (it does so between two prompts)."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    def upload(self, picture: Path | str | bytes, name: str | None = None) -> str:
        """Put a picture into the server's input folder; what it is called there, for a LoadImage node."""
        data = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
        name = name or ("picture.png" if isinstance(picture, bytes) else Path(picture).name)
        boundary = uuid.uuid4().hex
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n'
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        body = head.encode() + data + f"\r\n--{boundary}--\r\n".encode()
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        request = urllib.request.Request(self.address + "/upload/image", body, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            stored = json.load(answer)
        return "/".join(filter(None, [stored["subfolder"], stored["name"]]))

    def view(self, picture: dict[str, str]) -> numpy.ndarray:
        """A picture of a run's outputs (``filename``, ``subfolder``, ``type``) as ``(H, W, 3)`` uint8."""
        import numpy
        from PIL import Image

        with urllib.request.urlopen(f"{self.address}/view?{urllib.parse.urlencode(picture)}", timeout=60) as answer:
            return numpy.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB"))

    def pictures(self, run: Run, node: str | None = None) -> list[numpy.ndarray]:
        """The pictures of a run, of one node or of all output nodes in the order of their ids."""
        nodes = [node] if node else sorted(run.outputs, key=lambda name: (len(name), name))
        return [self.view(picture) for name in nodes for picture in run.outputs[name].get("images", [])]

    def run(
        self,
        prompt: dict[str, Any],
        on_event: Callable[[str, dict[str, Any]], None] | None = None,
        timeout: float = 600,
    ) -> Run:
        """Queue a workflow in API format and follow it on the websocket to its end.

        Args:
            on_event: called with each message, (type, data); may interrupt the run.
            timeout: seconds, for all of it.

        Raises:
            ServerError: the workflow was refused, a node raised, the server ended or the time was up.
        """
        from websocket import WebSocketException, WebSocketTimeoutException, create_connection

        start = time.monotonic()
        socket_address = f"{self.address.replace('http', 'ws', 1)}/ws?clientId={self.client}"
        connection = create_connection(socket_address, timeout=timeout)
        try:
            run = Run(self.queue(prompt))
            failure = None
            while True:
                connection.settimeout(max(0.1, timeout - (time.monotonic() - start)))
                message = connection.recv()
                if not isinstance(message, str):
                    continue  # a preview picture
                message = json.loads(message)
                kind, data = message["type"], message.get("data") or {}
                if data.get("prompt_id") not in (None, run.prompt_id):
                    continue
                if on_event:
                    on_event(kind, data)
                if kind == "progress":
                    run.progress.append((data["node"], data["value"], data["max"]))
                elif kind == "executing" and data["node"]:
                    run.executed.append(data["node"])
                elif kind == "execution_cached":
                    run.cached += data["nodes"]
                elif kind == "execution_interrupted":
                    run.interrupted = True
                elif kind == "execution_error":
                    failure = data
                elif kind == "executing" and data.get("prompt_id"):
                    break  # sent once the history holds the outputs
        except WebSocketTimeoutException as problem:
            self.interrupt()
            raise ServerError(f"the workflow did not end within {timeout:.0f} s.\n{self.tail()}") from problem
        except WebSocketException as problem:
            raise ServerError(f"the server closed the connection: {problem}\n{self.tail()}") from problem
        finally:
            connection.close()
        if failure:
            raise ServerError(
                f"node {failure['node_id']} ({failure['node_type']}) failed: {failure['exception_type']}: "
                f"{failure['exception_message'].strip()}\n{''.join(failure['traceback'])}"
            )
        run.outputs = self.get(f"/history/{run.prompt_id}").get(run.prompt_id, {}).get("outputs", {})
        run.seconds = time.monotonic() - start
        return run

    def queue(self, prompt: dict[str, Any]) -> str:
        """Queue a workflow; its id.

        Raises:
            ServerError: the server found it invalid; the message names the nodes and what is wrong with them.
        """
        try:
            return self.post("/prompt", {"prompt": prompt, "client_id": self.client})["prompt_id"]
        except urllib.error.HTTPError as problem:
            answer = json.loads(problem.read())
            lines = [f"the server refused the workflow: {answer['error']['message']} {answer['error']['details']}"]
            for node, wrong in (answer.get("node_errors") or {}).items():
                details = "; ".join(f"{error['message']}: {error['details']}" for error in wrong["errors"])
                lines.append(f"node {node} ({wrong['class_type']}): {details}")
            raise ServerError("\n".join(lines)) from None


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


def link(target: Path, place: Path) -> None:
    """Make ``place`` lead to the folder ``target``, on Windows with a junction, which needs no special right."""
    if place.exists() or place.is_symlink():
        if place.resolve() == target.resolve():
            return
        place.unlink()
    if WINDOWS:
        import _winapi

        _winapi.CreateJunction(str(target), str(place))
    else:
        place.symlink_to(target, target_is_directory=True)


def server_environment() -> dict[str, str]:
    """Ours, less the pack's root on the import path: in ComfyUI the pack must do without."""
    search = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != ROOT]
    rest = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return rest | ({"PYTHONPATH": os.pathsep.join(search)} if search else {}) | {"PYTHONUNBUFFERED": "1"}
