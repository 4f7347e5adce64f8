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
from pydantic import TypeAdapter, ValidationError

from feedface_core.errors import problems
from tools.comfy_answers import HISTORY, OBJECTS, QUEUE, QUEUED, STORED, Answer, receive, refusal, wrong_nodes

if TYPE_CHECKING:
    import numpy

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

    def request(self, method: str, path: str, **options: Any) -> Answer:
        """The answer to an HTTP request.

        Raises:
            Unreachable: there is none, or one without an end.
            ServerError: its status is an error; the message holds what the server says.
        """
        try:
            answer = receive(self.session, method, self.address + path, **options)
        except (requests.RequestException, ValueError) as problem:  # ValueError: what is no address
            told = f"{self.address[:200]}{path}: no answer: {str(problem)[:400]}"
            raise Unreachable(f"{told}\n{self.tail()}") from problem
        if not answer.ok:
            kind = Unreachable if answer.status_code in GATEWAY_ERRORS else ServerError
            raise kind(f"{self.address}{path}: {answer.status_code} {answer.reason}: {refusal(answer)}")
        return answer

    def get(self, path: str, kind: TypeAdapter | None = None) -> Any:
        """An answer in JSON, of the kind that is expected. Raises ``ServerError`` for another."""
        return self._read(self.request("GET", path), path, kind)

    def post(self, path: str, body: dict[str, Any], kind: TypeAdapter | None = None) -> Any:
        """The same for what is sent; None for an empty answer where no kind is expected."""
        answer = self.request("POST", path, json=body)
        return self._read(answer, path, kind) if answer.content or kind else None

    def _read(self, answer: Answer, path: str, kind: TypeAdapter | None) -> Any:
        try:
            value = answer.json()
            return value if kind is None else kind.validate_python(value)
        except ValidationError as problem:
            other = f"not as ComfyUI has it ({problems(problem)[:400]})"
        except ValueError:
            other = "no JSON"
        raise ServerError(f"{self.address}{path}: the answer is {other}: is this ComfyUI?")

    def object_info(self) -> dict[str, Any]:
        """Every node the server knows, by id."""
        return self.get("/object_info", OBJECTS)

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def cancel(self, prompt_id: str) -> None:
        """Take a prompt out of the queue, or stop it if it runs."""
        self.post("/queue", {"delete": [prompt_id]})
        self.post("/interrupt", {"prompt_id": prompt_id})

    def waits(self, prompt_id: str) -> bool:
        """Whether a prompt is in the queue or runs. To be asked before :meth:`history`, where it moves at its end."""
        queue = self.get("/queue", QUEUE)
        return any(prompt_id == item[1] for item in queue["queue_running"] + queue["queue_pending"])

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """What became of a prompt that has ended; None if the server does not know it (any more)."""
        return self.get(f"/history/{prompt_id}", HISTORY).get(prompt_id)

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
        path, files = "/upload/image", {"image": (name or "picture.png", picture)}
        stored = self._read(self.request("POST", path, data=options, files=files), path, STORED)
        return "/".join(filter(None, [stored.get("subfolder"), stored["name"]]))

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
            errors = self.post("/prompt", body, QUEUED).get("node_errors")
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
    while not (kind == "executing" and data.get("node", "") is None and data.get("prompt_id")):
        connection.settimeout(max(0.1, deadline - time.monotonic()))
        message = connection.recv()
        if message == "":  # what a server says last when it ends of itself
            raise websocket.WebSocketConnectionClosedException("closed by the server")
        if not isinstance(message, str):
            continue  # a preview picture
        try:
            message = json.loads(message)
            kind, data = str(message["type"]), dict(message.get("data") or {})
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            continue  # of another pack
        if data.get("prompt_id") in (None, prompt_id):
            yield kind, data
        else:
            kind = ""
