"""What answers at the address of a server and is no ComfyUI, or a broken one: told by address and what it said."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
from support.fake_comfyui import OBJECT_INFO, WORKFLOW
from support.refused import refused

from feedface_core.files.tasks import Task
from tools import comfy_answers
from tools.comfy_client import ComfyClient, Refused, ServerError, Unreachable, messages
from tools.queue.plan import Job
from tools.queue.results import save_pictures
from tools.queue.run import checked_server
from tools.queue.worker import Worker

HTML, DEEP = b"<!DOCTYPE html><title>Sign in</title>", b"[" * 100_000
NO_OBJECT: list[Any] = [HTML, b"", DEEP, None, [], 5, "x"]
CALLS: dict[str, Callable[[ComfyClient], Any]] = {
    "/object_info": lambda client: client.object_info(),
    "/queue": lambda client: client.waits("id"),
    "/history/id": lambda client: client.history("id"),
    "/upload/image": lambda client: client.upload(b"picture", "a.png"),
    "/prompt": lambda client: client.queue_whole({}, "id", {}),
}
ANSWERS: dict[str, list[Any]] = {
    "/object_info": NO_OBJECT,
    "/queue": [
        *NO_OBJECT, {}, {"queue_running": [], "queue_pending": None}, {"queue_running": [1], "queue_pending": []},
        {"queue_running": [[0]], "queue_pending": []},
    ],
    "/history/id": [
        *NO_OBJECT, *({"id": ended} for ended in ("x", [1], {}, {"outputs": None}, {"outputs": []})),
        *({"id": {"outputs": {}, "status": status}} for status in ("x", {"messages": [1]}, {"messages": {"a": 1}})),
        {"id": {"outputs": {}, "status": {"messages": [["execution_error", "x"]]}}}, {"id": {"outputs": {"4": None}}},
    ],
    "/upload/image": [*NO_OBJECT, {}, {"name": 5}, {"name": ""}, {"name": "a", "subfolder": None}],
    "/prompt": [*NO_OBJECT, {"node_errors": "x"}, {"node_errors": {"3": {}}}, {"node_errors": {"3": 5}}],
}  # fmt: skip
STATUS = [(500, b"boom"), (401, HTML), (404, b""), (302, HTML), (400, b'{"error": "x", "node_errors": [1]}')]
STATUS += [(400, b'{"error": {"message": "m", "details": "d"}, "node_errors": {"3": 5}}'), (502, HTML)]
NO_NODE: list[Any] = [None, [], "x", {}, {"input": None}, {"input": []}, {"input": {"required": [1]}}]
#: Declarations of other packs that nobody here knows: such an input is filled without a check.
ODD_INPUTS: list[Any] = [None, [], "INT", ["INT", None], ["INT", [1]], ["INT", {"min": "0"}], [{}, {}], [None, {}]]
#: Messages of the websocket that ComfyUI does not send.
ODD_MESSAGES = [
    "no JSON", "5", "[]", "{}", '{"type": "executing", "data": []}', '{"type": "executing", "data": "x"}',
    '{"type": "executing", "data": {}}', '{"type": null, "data": {}}', "[" * 100_000,
]  # fmt: skip


class Liar(ThreadingHTTPServer):
    """A server that answers everything alike: status and body, or a function of the request."""

    daemon_threads = True
    answer: Any = (200, b"")

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def says(self, body: Any, status: int = 200) -> None:
        self.answer = (status, body if isinstance(body, bytes) else json.dumps(body).encode())


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if callable(self.server.answer):
            self.server.answer(self)
            return
        status, body = self.server.answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 302:
            self.send_header("Location", "http://[no/address")
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET


@pytest.fixture(scope="module")
def liar() -> Iterator[Liar]:
    with Liar(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize(("path", "body"), [(path, body) for path, bodies in ANSWERS.items() for body in bodies])
def test_another_answer(liar: Liar, path: str, body: Any) -> None:
    liar.says(body)
    refused(lambda: CALLS[path](ComfyClient(liar.address)), liar.address, error=ServerError)


@pytest.mark.parametrize("path", CALLS)
@pytest.mark.parametrize("status", STATUS, ids=str)
def test_another_status(liar: Liar, path: str, status: tuple[int, bytes]) -> None:
    liar.says(status[1], status[0])
    refused(lambda: CALLS[path](ComfyClient(liar.address)), liar.address + path, error=ServerError)


@pytest.mark.parametrize(
    "address", ["http:///x", "http://[::1", "http://a b", "http://host:abc", "http://host:99999", "http://x" * 999]
)
def test_no_address(address: str) -> None:
    refused(ComfyClient(address).object_info, address[:100], error=Unreachable)


def half(request: Handler) -> None:
    request.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"a')


def no_http(request: Handler) -> None:
    request.wfile.write(b"SSH-2.0-OpenSSH\r\n")


def endless(request: Handler) -> None:
    request.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
    for _ in range(2000):
        request.wfile.write(b" " * 10_000)


def slow(request: Handler) -> None:
    request.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
    for _ in range(100):
        request.wfile.write(b" ")
        time.sleep(0.02)


@pytest.mark.parametrize("answer", [half, no_http, endless, slow])
def test_half_an_answer_and_one_without_an_end(liar: Liar, monkeypatch, answer: Callable[[Handler], None]) -> None:
    monkeypatch.setattr(comfy_answers, "MOST_BYTES", 10**6)
    monkeypatch.setattr(comfy_answers, "LONGEST_ANSWER", 0.3)
    liar.answer = answer
    refused(ComfyClient(liar.address).object_info, liar.address, "no answer", error=Unreachable)


@pytest.mark.parametrize("node", NO_NODE, ids=str)
def test_a_node_without_inputs(liar: Liar, node: Any) -> None:
    liar.says(OBJECT_INFO | {"KSampler": node})
    refused(lambda: checked_server(ComfyClient(liar.address), WORKFLOW), liar.address, "the node KSampler")


@pytest.mark.parametrize("declared", ODD_INPUTS, ids=str)
def test_inputs_that_nobody_knows_are_filled(declared: Any) -> None:
    from tools.queue.workflow import declared as known
    from tools.queue.workflow import typed

    info = {"KSampler": {"input": {"required": {"seed": declared}, "optional": None}}}
    assert typed(5, known(info, "KSampler", "seed")) == 5


@pytest.mark.parametrize("message", ODD_MESSAGES, ids=lambda text: text[:40])
def test_messages_that_nobody_knows_are_passed_over(message: str) -> None:
    last = '{"type": "executing", "data": {"node": null, "prompt_id": "id"}}'
    connection = SimpleNamespace(settimeout=lambda _: None, recv=iter([message, last]).__next__)
    *_, (kind, data) = messages(connection, "id", time.monotonic() + 5)
    assert kind == "executing" and data["prompt_id"] == "id"


def job() -> Job:
    return Job("mine", Task("tasks.json"), WORKFLOW, {}, {}, "digest")


@pytest.mark.parametrize("content", [b"", HTML, b"\x89PNG\r\n\x1a\n" + b"\0" * 9, b"\xff\xd8\xff\xe0\0\x10JFIF"])
def test_what_is_no_picture_is_not_kept(liar: Liar, tmp_path, content: bytes) -> None:
    liar.says(content)
    outputs = {"4": {"images": [{"filename": "one.png", "type": "output"}]}}
    client = ComfyClient(liar.address)
    refused(
        lambda: save_pictures(client, outputs, job(), tmp_path), f"{liar.address}/view: 'one.png'", error=ServerError
    )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.p\0g", "a." + "b" * 5000, "a.\n"])
def test_what_no_file_can_end_in(liar: Liar, tmp_path, name: str) -> None:
    outputs = {"4": {"images": [{"filename": name, "type": "output"}]}}
    client = ComfyClient(liar.address)
    refused(lambda: save_pictures(client, outputs, job(), tmp_path), liar.address, "no file can end", error=ServerError)


@pytest.mark.parametrize("error", [{}, {"exception_type": None, "node_id": [1]}])
def test_an_error_that_says_nothing_is_one(liar: Liar, tmp_path, error: dict[str, Any]) -> None:
    liar.says({"id": {"outputs": {}, "status": {"messages": [["execution_error", error]]}}})
    worker = Worker(ComfyClient(liar.address), None, None, tmp_path, None)
    result, text, again = worker.outcome(job(), "id")
    assert result == {} and text.startswith("unknown: ") and not again


def test_a_refused_part_is_told(liar: Liar) -> None:
    liar.says({"node_errors": {"3": {"class_type": "KSampler", "errors": [{"message": "m", "details": "d"}]}}})
    with pytest.raises(Refused, match=r"node 3 \(KSampler\): m: d"):
        CALLS["/prompt"](ComfyClient(liar.address))
