"""A server that speaks ComfyUI's API in this process, draws one colour, and fails as it is told."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from aiohttp import WSMsgType, web
from PIL import Image

from tools.server import HOST, free_port

#: A loader, a prompt, a sampler, an output: enough of each for the queue to fill.
OBJECT_INFO: dict[str, Any] = {
    "LoadImage": {"input": {"required": {"image": [["example.png"], {"image_upload": True}]}}, "output": ["IMAGE"]},
    "CLIPTextEncode": {"input": {"required": {"text": ["STRING", {}]}}, "output": ["CONDITIONING"]},
    "KSampler": {
        "input": {
            "required": {
                "seed": ["INT", {"min": 0, "max": 2**64 - 1, "control_after_generate": True}],
                "steps": ["INT", {"min": 1, "max": 10000}],
                "cfg": ["FLOAT", {"min": 0.0, "max": 100.0}],
                "sampler_name": [["euler", "dpmpp_2m"], {}],
                "positive": ["CONDITIONING", {}],
                "image": ["IMAGE", {}],
            }
        },
        "output": ["LATENT"],
    },
    "SaveImage": {"input": {"required": {"images": ["LATENT", {}]}}, "output": [], "output_node": True},
}
WORKFLOW: dict[str, Any] = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "example.png"}, "_meta": {"title": "Photo"}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a person"}, "_meta": {"title": "Positive prompt"}},
    "3": {
        "class_type": "KSampler",
        "inputs": {"seed": 1, "steps": 4, "cfg": 6.0, "sampler_name": "euler", "positive": ["2", 0], "image": ["1", 0]},
        "_meta": {"title": "KSampler"},
    },
    "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0]}, "_meta": {"title": "Save Image"}},
}

DONE = "done"
OUT_OF_MEMORY = "out of memory"
RAISES = "a node raises"
CRASH = "the server ends"
DEAF = "the websocket breaks"
GOODBYE = "the websocket is closed"
LOST = "the job is lost"
HANGS = "the job never ends"
STUBBORN = "the job never ends, and cannot be stopped"
REFUSED = "the workflow is refused"
UNHEARD = "the answer to the prompt is lost"


class FakeComfyUI:
    """A server from ``with`` to the end of its block; :meth:`end` and :meth:`start` restart it without its memory.

    Args:
        fate: what becomes of a job, given its prompt's text and how often it was received; ``DONE`` by default.
        seconds: that a job takes.

    Attributes:
        made: the texts whose pictures were drawn, in order.
        received: the texts of the prompts that were queued, in order.
        uploads: content of each uploaded file, by name.
    """

    def __init__(self, fate: Callable[[str, int], str] = lambda text, count: DONE, seconds: float = 0.02) -> None:
        self.port, self.fate, self.seconds = free_port(), fate, seconds
        self.address = f"http://{HOST}:{self.port}"
        self.object_info: dict[str, Any] = json.loads(json.dumps(OBJECT_INFO))
        self.made: list[str] = []
        self.received: list[str] = []
        self.metadata: list[dict[str, Any]] = []
        self.uploads: dict[str, bytes] = {}
        self.freed = 0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> FakeComfyUI:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def start(self) -> None:
        self.history: dict[str, Any] = {}
        self.waiting: dict[str, tuple[str, dict[str, Any], str]] = {}
        self.interrupted: set[str] = set()
        self.pictures: dict[str, bytes] = {}
        self.sockets: dict[str, web.WebSocketResponse] = {}
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), daemon=True)
        self._thread.start()
        assert ready.wait(10)

    def end(self) -> None:
        """As ``kill -9`` does: connections break, and queue, history and pictures are gone."""
        if self._thread and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._over.set)
            self._thread.join(10)

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._over, self._work = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        application = web.Application()
        application.add_routes(
            [
                web.get("/object_info", self._object_info),
                web.post("/upload/image", self._upload),
                web.post("/prompt", self._prompt),
                web.get("/queue", self._queue),
                web.get("/history/{id}", self._history),
                web.get("/view", self._view),
                web.post("/free", self._free),
                web.post("/queue", self._accept),
                web.post("/interrupt", self._interrupt),
                web.get("/ws", self._socket),
            ]
        )
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, HOST, self.port).start()
        drawing = asyncio.create_task(self._draw())
        ready.set()
        await self._over.wait()
        drawing.cancel()
        for socket in self.sockets.values():
            if socket._req.transport:
                socket._req.transport.abort()
        await runner.cleanup()

    async def _object_info(self, _: web.Request) -> web.Response:
        return web.json_response(self.object_info)

    async def _view(self, request: web.Request) -> web.Response:
        content = self.pictures.get(request.query["filename"])
        return web.Response(status=404) if content is None else web.Response(body=content)

    async def _free(self, _: web.Request) -> web.Response:
        self.freed += 1
        return web.Response()

    async def _accept(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _interrupt(self, request: web.Request) -> web.Response:
        self.interrupted.add((await request.json())["prompt_id"])
        return web.Response()

    async def _upload(self, request: web.Request) -> web.Response:
        form = await request.post()
        name = form["image"].filename
        self.uploads[f"{form['subfolder']}/{name}"] = form["image"].file.read()
        return web.json_response({"name": name, "subfolder": form["subfolder"], "type": "input"})

    async def _prompt(self, request: web.Request) -> web.Response:
        body = await request.json()
        text = body["prompt"]["2"]["inputs"]["text"]
        self.received.append(text)
        fate = self.fate(text, self.received.count(text))
        if fate == REFUSED:
            error = {"message": "Prompt outputs failed validation", "details": "no such file"}
            return web.json_response({"error": error, "node_errors": {}}, status=400)
        if fate != LOST:
            self.metadata.append(body["extra_data"]["extra_pnginfo"]["feedface_queue"])
            self.waiting[body["prompt_id"]] = (body["client_id"], body["prompt"], fate)
            self._work.set()
        if fate == UNHEARD:
            request.transport.abort()
        return web.json_response({"prompt_id": body["prompt_id"], "node_errors": {}})

    async def _queue(self, _: web.Request) -> web.Response:
        return web.json_response({"queue_running": [], "queue_pending": [[0, name] for name in self.waiting]})

    async def _history(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        return web.json_response({name: self.history[name]} if name in self.history else {})

    async def _socket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.sockets[request.query["clientId"]] = socket
        async for message in socket:
            if message.type == WSMsgType.ERROR:
                break
        return socket

    async def _tell(self, client: str, kind: str, data: dict[str, Any]) -> None:
        socket = self.sockets.get(client)
        if socket is not None and not socket.closed:
            with suppress(ConnectionError):  # a client that was killed is not known to be closed yet
                await socket.send_json({"type": kind, "data": data})

    async def _draw(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            for name in list(self.waiting):
                await self._carry_out(name)

    async def _carry_out(self, name: str) -> None:
        client, prompt, fate = self.waiting[name]
        text = prompt["2"]["inputs"]["text"]
        await self._tell(client, "progress", {"node": "3", "value": 1, "max": 4, "prompt_id": name})
        await asyncio.sleep(self.seconds)
        if fate == CRASH:
            self._over.set()
            await asyncio.sleep(60)
        while fate == STUBBORN or (fate == HANGS and name not in self.interrupted):
            await self._tell(client, "progress", {"node": "3", "value": 2, "max": 4, "prompt_id": name})
            await asyncio.sleep(0.02)
        if fate == GOODBYE:
            await self.sockets.pop(client).close()
        if fate == DEAF:
            self.sockets.pop(client)._req.transport.abort()
        messages: list[Any] = [["execution_start", {"timestamp": 1000}]]
        if fate in (OUT_OF_MEMORY, RAISES):
            kind = "torch.OutOfMemoryError" if fate == OUT_OF_MEMORY else "NoFaceError"
            error = {"exception_type": kind, "exception_message": "no room", "node_id": "3", "node_type": "KSampler"}
            messages.append(["execution_error", error])
            outputs = {}
        elif fate == HANGS:
            messages.append(["execution_interrupted", {}])
            outputs = {}
        else:
            self.made.append(text)
            picture, file = io.BytesIO(), f"{name}.png"
            Image.new("RGB", (8, 8), "red").save(picture, "PNG")
            self.pictures[file] = picture.getvalue()
            outputs = {"4": {"images": [{"filename": file, "subfolder": "", "type": "output"}]}}
            messages.append(["execution_success", {"timestamp": 1500}])
        self.history[name] = {"outputs": outputs, "status": {"messages": messages}}
        del self.waiting[name]
        await self._tell(client, "executing", {"node": None, "prompt_id": name})
