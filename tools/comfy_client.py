"""The HTTP and websocket API of a running ComfyUI."""

from __future__ import annotations

import io
import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import requests

if TYPE_CHECKING:
    import numpy

HTTP_TIMEOUT = 60  # seconds
GATEWAY_ERRORS = (502, 503, 504)  # what a proxy answers while the server behind it is away


class ServerError(RuntimeError):
    """The server did not start, does not answer, refused a prompt, or failed while running it."""


class Unreachable(ServerError):
    """Nothing answers at the address, or a proxy says that nothing is behind it; it may be there again later."""


class Refused(ServerError):
    """The server found a workflow invalid; the message names the nodes."""


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


class ComfyClient:
    """The API of a running server.

    Args:
        address: such as ``http://127.0.0.1:8188``.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self.client_id = uuid.uuid4().hex
        self.session = requests.Session()

    def tail(self) -> str:
        """The end of the server's log, where it can be read."""
        return ""

    def request(self, method: str, path: str, **options: Any) -> requests.Response:
        """The answer to an HTTP request.

        Raises:
            Unreachable: there is none.
            ServerError: its status is an error; the message holds what the server says.
        """
        try:
            answer = self.session.request(method, self.address + path, timeout=HTTP_TIMEOUT, **options)
        except requests.RequestException as problem:
            raise Unreachable(f"{self.address}{path}: no answer: {problem}\n{self.tail()}") from problem
        if not answer.ok:
            kind = Unreachable if answer.status_code in GATEWAY_ERRORS else ServerError
            raise kind(f"{self.address}{path}: {answer.status_code} {answer.reason}: {refusal(answer)}")
        return answer

    def get(self, path: str) -> Any:
        answer = self.request("GET", path)
        try:
            return answer.json()
        except ValueError as problem:
            raise ServerError(f"{self.address}{path}: the answer is no JSON: is this ComfyUI?") from problem

    def post(self, path: str, body: dict[str, Any]) -> Any:
        answer = self.request("POST", path, json=body)
        return answer.json() if answer.content else None

    def object_info(self) -> dict[str, Any]:
        """Every node the server knows, by id."""
        return self.get("/object_info")

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def cancel(self, prompt_id: str) -> None:
        """Take a prompt out of the queue, or stop it if it runs."""
        self.post("/queue", {"delete": [prompt_id]})
        self.post("/interrupt", {"prompt_id": prompt_id})

    def waits(self, prompt_id: str) -> bool:
        """Whether a prompt is in the queue or runs. To be asked before :meth:`history`, where it moves at its end."""
        queue = self.get("/queue")
        return any(prompt_id == item[1] for item in queue["queue_running"] + queue["queue_pending"])

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """What became of a prompt that has ended; None if the server does not know it (any more)."""
        return self.get(f"/history/{prompt_id}").get(prompt_id)

    def free(self) -> None:
        """Have the server unload its models and drop its cache (it does so between two prompts)."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    def upload(self, picture: Path | str | bytes, name: str = "", folder: str = "") -> str:
        """Put a picture into the server's input folder; what it is called there, for a LoadImage node.

        Args:
            picture: a file, or its content.
            name: on the server; empty for the file's own.
            folder: inside the input folder.
        """
        if not isinstance(picture, bytes):
            name, picture = name or Path(picture).name, Path(picture).read_bytes()
        options = {"overwrite": "true", "subfolder": folder}
        stored = self.request("POST", "/upload/image", data=options, files={"image": (name or "picture.png", picture)})
        return "/".join(filter(None, [stored.json()["subfolder"], stored.json()["name"]]))

    def view(self, file: dict[str, str]) -> numpy.ndarray:
        """One picture, ``(H, W, 3)`` uint8, by filename, subfolder and type, as a run's outputs have them."""
        import numpy
        from PIL import Image

        answer = self.request("GET", "/view", params=file)
        return numpy.asarray(Image.open(io.BytesIO(answer.content)).convert("RGB"))

    def pictures(self, run: Run, node: str | None = None) -> list[numpy.ndarray]:
        """The pictures of a run, as from :meth:`view`, of one node or of all output nodes in the order of their ids."""
        nodes = [node] if node else sorted(run.outputs, key=lambda name: (len(name), name))
        return [self.view(file) for name in nodes for file in run.outputs[name].get("images", [])]

    def queue(self, prompt: dict[str, Any]) -> str:
        """Queue a workflow in API format; its id.

        Raises:
            ServerError: the server found it invalid; the message names the nodes and what is wrong with them.
        """
        return self.post("/prompt", {"prompt": prompt, "client_id": self.client_id})["prompt_id"]

    def queue_whole(self, prompt: dict[str, Any], prompt_id: str, metadata: dict[str, Any]) -> None:
        """Queue a workflow under an id of ours, all its outputs or none.

        Args:
            prompt_id: a UUID with hyphens.
            metadata: what Save Image writes into the picture beside the workflow, by name.

        Raises:
            Refused: an output is invalid. The server alone would run the others.
        """
        body = {"prompt": prompt, "client_id": self.client_id, "prompt_id": prompt_id}
        body |= {"extra_data": {"extra_pnginfo": metadata}}
        try:
            errors = self.post("/prompt", body).get("node_errors")
        except Unreachable:
            raise
        except ServerError as problem:
            raise Refused(str(problem)) from problem
        if errors:
            self.cancel(prompt_id)
            raise Refused(
                "\n".join([f"{self.address}: the server refused a part of the workflow", *wrong_nodes(errors)])
            )

    def connect(self, timeout: float) -> Any:
        """The websocket: messages about what this client queues. Raises ``Unreachable``."""
        import websocket

        address = f"{self.address.replace('http', 'ws', 1)}/ws?clientId={self.client_id}"
        try:
            return websocket.create_connection(address, timeout=timeout)
        except (OSError, websocket.WebSocketException) as problem:
            raise Unreachable(f"{self.address}: no answer on the websocket: {problem}\n{self.tail()}") from problem

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
        import websocket

        start, failure = time.monotonic(), None
        try:
            with closing(self.connect(timeout)) as connection:
                run = Run(self.queue(prompt))
                for kind, data in messages(connection, run.prompt_id, start + timeout):
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
        except websocket.WebSocketTimeoutException as problem:
            self.interrupt()
            raise ServerError(f"the workflow did not end within {timeout:.0f} s.\n{self.tail()}") from problem
        except (ConnectionError, websocket.WebSocketException) as problem:
            raise ServerError(f"the server closed the connection: {problem}\n{self.tail()}") from problem
        if failure:
            raise ServerError(
                f"node {failure['node_id']} ({failure['node_type']}) failed: {failure['exception_type']}: "
                f"{failure['exception_message'].strip()}\n{''.join(failure['traceback'])}"
            )
        run.outputs = (self.history(run.prompt_id) or {}).get("outputs", {})
        run.seconds = time.monotonic() - start
        return run


def messages(connection: Any, prompt_id: str, deadline: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """(type, data) of the websocket's messages about a prompt or about none, to the one that ends it."""
    import websocket

    kind, data = "", {}
    # The last one is sent once the history holds the outputs.
    while not (kind == "executing" and data["node"] is None and data.get("prompt_id")):
        connection.settimeout(max(0.1, deadline - time.monotonic()))
        message = connection.recv()
        if message == "":  # what a server says last when it ends of itself
            raise websocket.WebSocketConnectionClosedException("closed by the server")
        if not isinstance(message, str):
            continue  # a preview picture
        message = json.loads(message)
        if (message.get("data") or {}).get("prompt_id") in (None, prompt_id):
            kind, data = message["type"], message.get("data") or {}
            yield kind, data


def refusal(answer: requests.Response) -> str:
    """What a server says in an answer whose status is an error: a line for each node of a workflow that it refuses."""
    try:
        said = answer.json()
        lines = [f"the server refused the workflow: {said['error']['message']} {said['error']['details']}"]
    except (ValueError, LookupError, TypeError):
        return answer.text[:1000]
    return "\n".join([*lines, *wrong_nodes(said.get("node_errors") or {})])


def wrong_nodes(node_errors: dict[str, Any]) -> list[str]:
    """A line for each node that the server finds invalid."""
    return [
        f"node {node} ({wrong['class_type']}): "
        + "; ".join(f"{error['message']}: {error['details']}" for error in wrong["errors"])
        for node, wrong in node_errors.items()
    ]
