"""Killed with ``kill -9``, the queue or a real server, and started again: every picture is made exactly once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.fake_comfyui import FakeComfyUI
from support.launching import take_interrupts

from tools.server import ComfyServer, free_port

ROOT = Path(__file__).resolve().parents[3]
PROMPTS = [f"a portrait of a person, picture number {i}" for i in range(4)]


class Command:
    """``python -m tools.queue`` as a process of its own, in a group that is killed with it."""

    def __init__(self, desk: Any, tasks: Path, server: Any, *words: str) -> None:
        self.log = desk.folder / f"queue_{time.monotonic_ns()}.txt"
        line = [sys.executable, "-m", "tools.queue", str(tasks), "--workflow", str(desk.workflow)]
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [*line, "--output", str(desk.output), "--server", server.address, *words],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=take_interrupts if os.name != "nt" else None,
            )

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def said(self) -> str:
        return self.log.read_text("utf-8")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def until(self, what: Callable[[], object], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)

    def wait(self, seconds: float = 240) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"not within {seconds} s:\n{self.said}")


def test_killed_at_any_moment(desk: Any) -> None:
    """The server goes on meanwhile; it draws each picture once and is sent none twice."""
    moments, tasks = random.Random(0), desk.tasks(24)
    with FakeComfyUI(seconds=0.1) as server:
        killed = 0
        while len(server.received) < 20:
            with Command(desk, tasks, server) as queue:
                before = len(server.received)
                queue.until(lambda: len(server.received) > before)  # noqa: B023
                time.sleep(moments.uniform(0, 0.25))
                queue.kill()
            killed += 1
        assert killed >= 3
        with Command(desk, tasks, server) as queue:
            assert queue.wait() == 0, queue.said
        expected = Counter(f"prompt {i + 1}" for i in range(24))
        assert Counter(server.made) == Counter(server.received) == expected
    assert desk.pictures == [f"anna_{i + 1:02d}.png" for i in range(24)]
    assert desk.summary["done"] == 24


def test_two_queues_in_one_folder(desk: Any, refused: Callable[..., str]) -> None:
    with FakeComfyUI(seconds=1) as server, Command(desk, desk.tasks(3), server) as queue:
        queue.until(lambda: server.received)
        assert "another queue works in this folder" in refused(desk.tasks(3), server)
        queue.kill()  # its lock goes with it
        assert desk.run(desk.tasks(3), server) == 0
        assert Counter(server.received) == Counter(f"prompt {i + 1}" for i in range(3))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for another process")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_hand(desk: Any, number: int) -> None:
    with FakeComfyUI(seconds=1.0) as server:
        with Command(desk, desk.tasks(4), server) as queue:
            queue.until(lambda: desk.pictures)
            queue.process.send_signal(number)
            assert queue.wait(20) == 130
            assert "stopped; the same command goes on where it stopped" in queue.said
            assert "Traceback" not in queue.said and desk.summary["done"] >= 1
        with Command(desk, desk.tasks(4), server) as queue:
            assert queue.wait() == 0, queue.said
        assert Counter(server.received) == Counter(f"prompt {i + 1}" for i in range(4))


def node(kind: str, title: str = "", **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": title or kind}}


def portrait(steps: int = 10) -> dict[str, Any]:
    """The whole way from a photo to a picture, for the tiny models."""
    sampling = {"steps": steps, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0, "seed": 1}
    detection = {"detector": "whole image", "order": "size", "indexes": "0", "min_size": 16, "when_none": "error"}
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny_sd1.safetensors"),
        "2": node("FeedFaceLoadAdapter", adapter_name="tiny_sd1.safetensors", face_encoder="auto"),
        "3": node("LoadImage", "Photo", image="none.png"),
        "4": node("FeedFaceDetectFaces", image=["3", 0], crop_scale=1.1, crop_size=224, boxes="", **detection),
        "5": node(
            "FeedFaceEncodeFaces",
            adapter=["2", 0],
            crops=["4", 0],
            weights="",
            combination="adapter's default",
            max_references=5,
        ),
        "6": node("FeedFaceApply", model=["1", 0], adapter=["2", 0], face=["5", 0], strength=1.0, start=0.0, end=1.0),
        "7": node("CLIPTextEncode", "Positive prompt", clip=["1", 1], text=""),
        "8": node("CLIPTextEncode", "Negative prompt", clip=["1", 1], text="blurry"),
        "9": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "10": node("KSampler", model=["6", 0], positive=["7", 0], negative=["8", 0], latent_image=["9", 0], **sampling),
        "11": node("VAEDecode", samples=["10", 0], vae=["1", 2]),
        "12": node("SaveImage", images=["11", 0], filename_prefix="queue"),
    }


def made_by(server: ComfyServer) -> Counter[str]:
    """How often the server saved a picture for each job, told by what is written in the pictures."""
    told = []
    for path in (server.base / "output").glob("*.png"):
        try:
            told.append(json.loads(Image.open(path).text["feedface_queue"])["id"])
        except (OSError, SyntaxError, KeyError):
            continue  # cut off by the kill
    return Counter(told)


@pytest.fixture
def restartable(
    any_comfyui: Any, tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], ComfyServer]]:
    """Starts a real server, always at the same address and in the same folder."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # tiny models: more threads would wait for one another
    port, started = free_port(), []

    def start() -> ComfyServer:
        server = ComfyServer(
            any_comfyui.path, any_comfyui.python, base=tmp_path / "comfyui", model_folders=tiny_models, port=port
        )
        started.append(server)
        return server.__enter__()

    yield start
    for server in started:
        server.stop()


@pytest.mark.slow
def test_a_real_server_and_the_queue_killed_midway(desk: Any, restartable: Callable[[], ComfyServer]) -> None:
    desk.workflow.write_text(json.dumps(portrait()))
    people = [{"id": "anna", "photos": ["anna_1.png", "anna_2.png"]}, {"id": "ben", "photos": ["ben.png"]}]
    tasks = desk.write("tasks.json", {"people": people, "prompts": PROMPTS})
    names = [f"{person['id']}_{i + 1:02d}" for person in people for i in range(len(PROMPTS))]

    server = restartable()
    with Command(desk, tasks, server) as queue:
        queue.until(lambda: len(desk.pictures) >= 2 and server.get("/queue")["queue_running"])
        server.process.kill()
        server.process.wait()
        queue.until(lambda: "trying again" in queue.said)
        there = len(desk.pictures)
        server = restartable()
        queue.until(lambda: len(desk.pictures) >= there + 2 and server.get("/queue")["queue_running"])
        queue.kill()
    assert len(desk.pictures) < len(names), "killed too late to show anything"
    with Command(desk, tasks, server) as queue:
        assert queue.wait() == 0, f"{queue.said}\n{server.tail()}"

    assert desk.pictures == [f"{name}.png" for name in names]
    assert (desk.summary["done"], desk.summary["left"]) == (8, 0)
    saved = made_by(server)
    # What runs when a server is killed may have been saved before it could be fetched.
    twice = [name for name, count in saved.items() if count > 1]
    assert set(saved) == set(names) and max(saved.values()) <= 2 and len(twice) <= 1, saved
    assert sum(job["sent"] for job in desk.summary["jobs"]) == len(names) + 1
    pixels = set()
    for job in desk.summary["jobs"]:
        with Image.open(desk.output / "pictures" / job["files"][0]) as picture:
            told, prompt = json.loads(picture.text["feedface_queue"]), json.loads(picture.text["prompt"])
            pixels.add(picture.tobytes())
        assert told["id"] == job["id"] and told["prompt"] == job["prompt"] == prompt["7"]["inputs"]["text"]
        photos = [one["inputs"]["image"] for one in prompt.values() if one["class_type"] == "LoadImage"]
        assert len(photos) == len(told["photos"]) == (2 if job["person"] == "anna" else 1)
    assert len(pixels) == len(names)
