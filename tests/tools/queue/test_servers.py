"""Servers that end, lose jobs, go deaf or refuse: each picture is made once, and tries are bounded."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from support.fake_comfyui import (
    CRASH,
    DEAF,
    DONE,
    GOODBYE,
    HANGS,
    LOST,
    OUT_OF_MEMORY,
    RAISES,
    REFUSED,
    STUBBORN,
    UNHEARD,
    FakeComfyUI,
)

from feedface_core.files.provenance import SOURCE_TYPES, source_type
from tools.queue import results, run, worker
from tools.queue.journal import Journal
from tools.server import HOST, free_port

Refusal = Callable[..., str]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "ASK", 0.3)
    monkeypatch.setattr(worker, "LISTEN", 0.1)


def first(fate: str, times: int = 1) -> Callable[[str, int], str]:
    """A fate for the second prompt when it comes for the first time or times."""
    return lambda text, count: fate if text == "prompt 2" and count <= times else DONE


def test_pictures_and_summary(desk: Any) -> None:
    with FakeComfyUI() as server:
        assert desk.run(desk.tasks(3), server) == 0
        assert desk.pictures == ["anna_01.png", "anna_02.png", "anna_03.png"]
        assert server.received == ["prompt 1", "prompt 2", "prompt 3"]
        (name,) = server.uploads
        assert server.uploads[name] == (desk.folder / "anna_1.png").read_bytes()
        told = {"id": "anna_02", "person": "anna", "prompt": "prompt 2", "seed": 1, "photos": ["anna_1.png"]}
        assert server.metadata[1] == told
    assert (desk.summary["done"], desk.summary["failed"], desk.summary["left"]) == (3, 0, 0)
    job = desk.summary["jobs"][1]
    assert job.items() >= (told | {"state": "done", "sent": 1, "seconds": 0.5, "files": ["anna_02.png"]}).items()
    table = (desk.output / "summary.md").read_text("utf-8")
    assert "| anna_02 | anna | prompt 2 | 1 | done | 0.5 | [anna_02.png](pictures/anna_02.png) |" in table


@pytest.mark.parametrize("kind", ["generated", "edited photo", "none"])
def test_pictures_are_marked(desk: Any, kind: str) -> None:
    with FakeComfyUI() as server:
        assert desk.run(desk.tasks(1), server, **({} if kind == "generated" else {"mark": kind})) == 0
        (written,) = server.pictures.values()
    (name,) = desk.pictures
    saved = (desk.output / "pictures" / name).read_bytes()
    assert source_type(saved) == SOURCE_TYPES.get(kind)
    assert (saved == written) == (kind == "none")


def test_again_makes_nothing_and_a_deleted_picture_alone(desk: Any) -> None:
    with FakeComfyUI() as server:
        for _ in range(2):
            assert desk.run(desk.tasks(3), server) == 0
        assert len(server.received) == 3
        (desk.output / "pictures/anna_02.png").unlink()
        assert desk.run(desk.tasks(3), server) == 0
        assert server.received[3:] == ["prompt 2"]
        assert desk.run(desk.tasks(4), server) == 0
        assert server.received[4:] == ["prompt 4"]


@pytest.mark.parametrize(
    ("fate", "sent", "made"),
    [
        (OUT_OF_MEMORY, 2, 1),  # after the models were unloaded
        (DEAF, 1, 1),  # the picture is found by asking
        (GOODBYE, 1, 1),
        (LOST, 2, 1),
        (UNHEARD, 1, 1),  # the server has it, though it could not say so
    ],
)
def test_a_fault_costs_no_picture_and_makes_none_twice(desk: Any, fate: str, sent: int, made: int) -> None:
    with FakeComfyUI(first(fate)) as server:
        assert desk.run(desk.tasks(3), server) == 0
        assert server.received.count("prompt 2") == sent
        assert [server.made.count(f"prompt {i}") for i in (1, 2, 3)] == [1, made, 1]
        assert server.freed == (fate == OUT_OF_MEMORY)
    assert desk.pictures == ["anna_01.png", "anna_02.png", "anna_03.png"]


@pytest.mark.parametrize(
    ("fate", "sent", "said"),
    [
        (LOST, 3, "took it out of the queue"),
        (OUT_OF_MEMORY, 3, "KSampler: torch.OutOfMemoryError: no room"),
        (RAISES, 1, "KSampler: NoFaceError: no room"),  # it would raise again
        (REFUSED, 1, "the server refused the workflow"),
    ],
)
def test_tries_are_bounded_and_the_others_go_on(desk: Any, fate: str, sent: int, said: str) -> None:
    with FakeComfyUI(first(fate, 99)) as server:
        assert desk.run(desk.tasks(3), server) == 1
        assert server.received.count("prompt 2") == sent
        assert desk.pictures == ["anna_01.png", "anna_03.png"]
        failed = desk.summary["jobs"][1]
        assert failed["state"] == "failed" and said in failed["error"] and "tasks.json" in failed["from"]
        server.fate = lambda text, count: DONE  # mended: the same command makes what failed, and nothing else
        assert desk.run(desk.tasks(3), server) == 0
        assert server.received[-1] == "prompt 2" and len(server.received) == 3 + sent
    assert desk.summary["failed"] == 0


def test_a_workflow_refused_at_once_stops_everything(desk: Any, refused: Refusal) -> None:
    with FakeComfyUI(lambda text, count: REFUSED) as server:
        said = refused(desk.tasks(50), server)
        assert "tasks.json: person anna, prompts[0]" in said and "no such file" in said
        assert len(server.received) == 1


def test_restarted_server(desk: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends while drawing, with all its memory, and is there again a little later."""
    with FakeComfyUI(first(CRASH)) as server:

        def restart() -> None:
            server._thread.join(20)
            time.sleep(0.5)
            server.start()

        threading.Thread(target=restart, daemon=True).start()
        assert desk.run(desk.tasks(3), server) == 0
        assert server.made == ["prompt 1", "prompt 2", "prompt 3"]
        assert len(server.uploads) == 1
    assert "answers again" in capsys.readouterr().out


def test_a_job_that_ends_the_server_each_time_is_given_up(desk: Any) -> None:
    with FakeComfyUI(first(CRASH, 99)) as server:
        over = threading.Event()

        def keep_alive() -> None:
            while not over.is_set():
                server._thread.join(0.05)
                if not server._thread.is_alive() and not over.is_set():
                    server.start()

        thread = threading.Thread(target=keep_alive, daemon=True)
        thread.start()
        try:
            assert desk.run(desk.tasks(3), server, attempts=2) == 1
        finally:
            over.set()
            thread.join()
        assert server.received.count("prompt 2") == 2
    assert desk.pictures == ["anna_01.png", "anna_03.png"]


def test_a_server_that_stays_away_ends_the_run(desk: Any, refused: Refusal) -> None:
    with FakeComfyUI(first(CRASH)) as server:
        said = refused(desk.tasks(3), server, patience=1)
        assert "did not answer for 1 s" in said and "No server is left for 2 jobs" in said
        assert desk.summary["left"] == 2
        server.start()
        assert desk.run(desk.tasks(3), server) == 0
        assert server.made == ["prompt 1", "prompt 2", "prompt 3"]


@pytest.mark.parametrize("times", [1, 99])
def test_a_job_that_hangs_is_stopped_and_tried_again(desk: Any, times: int) -> None:
    with FakeComfyUI(first(HANGS, times)) as server:
        assert desk.run(desk.tasks(3), server, timeout=0.5, attempts=2) == int(times > 1)
        assert server.received.count("prompt 2") == 2 and len(server.interrupted) == min(times, 2)
    job = desk.summary["jobs"][1]
    assert job["state"] == "done" if times == 1 else "took longer than 0.5 s" in job["error"]


def test_a_server_that_cannot_stop_a_job_leaves_the_pool(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "GRACE", 0.5)
    with FakeComfyUI(lambda text, count: STUBBORN) as hangs, FakeComfyUI() as works:
        assert desk.run(desk.tasks(4), hangs, works, timeout=0.5) == 0
        assert len(hangs.received) == 1 and sorted(works.made) == [f"prompt {i + 1}" for i in range(4)]


def test_pool_shares_the_jobs(desk: Any) -> None:
    with FakeComfyUI(seconds=0.1) as one, FakeComfyUI(seconds=0.1) as two:
        assert desk.run(desk.tasks(10), one, two) == 0
        assert sorted(one.made + two.made) == sorted(f"prompt {i + 1}" for i in range(10))
        assert one.made and two.made
    assert {job["server"] for job in desk.summary["jobs"]} == {one.address, two.address}


def test_another_server_takes_over(desk: Any) -> None:
    with FakeComfyUI(lambda text, count: CRASH) as ends, FakeComfyUI(seconds=0.1) as stays:
        assert desk.run(desk.tasks(5), ends, stays, patience=1) == 0
        assert len(ends.received) == 1 and sorted(stays.made) == [f"prompt {i + 1}" for i in range(5)]


def test_a_job_is_found_where_the_last_queue_left_it(desk: Any) -> None:
    """The queue ended after sending: the job waits, or is done, or is unknown to a server that was restarted."""
    with FakeComfyUI() as server:
        for state in ("done", "unknown"):
            assert desk.run(desk.tasks(2), server) == 0
            journal = Journal(desk.output)
            journal._database.execute("UPDATE job SET state = 'sent', result = '{}' WHERE name = 'anna_02'")
            journal.close()
            (desk.output / "pictures/anna_02.png").unlink()
            if state == "unknown":
                server.end()
                server.start()
            assert desk.run(desk.tasks(2), server) == 0
            assert server.received.count("prompt 2") == (1 if state == "done" else 2)
            assert desk.pictures == ["anna_01.png", "anna_02.png"]


def test_a_full_disk_stops_and_goes_on_later(desk: Any, refused: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Any, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    with FakeComfyUI() as server:
        with monkeypatch.context() as patch:
            patch.setattr(results, "write_whole", full)
            said = refused(desk.tasks(2), server)  # nor can the summary be written
            assert "pictures: cannot be written: No space left on device. Free space there, then run" in said
        assert desk.run(desk.tasks(2), server) == 0
        assert server.made == ["prompt 1", "prompt 2"]


def test_little_space_is_refused_before_anything_is_sent(
    desk: Any, refused: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(desk.folder)._replace(free=5 * 2**20)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: usage)
    with FakeComfyUI() as server:
        assert "5 MB free, expected at least 100: free space, or choose another --output" in refused(
            desk.tasks(2), server
        )
        assert server.received == [] and server.uploads == {}


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (f"http://{HOST}:{free_port()}", "no answer.*Is ComfyUI running there"),
        ("127.0.0.1:8188", "expected an address such as http://127.0.0.1:8188"),
    ],
    ids=["nobody listens", "no scheme"],
)
def test_an_unreachable_server_is_refused(desk: Any, refused: Refusal, address: str, said: str) -> None:
    import re

    with FakeComfyUI() as server:  # even where another one answers
        assert re.search(said, refused(desk.tasks(2), server, address), re.S)
        assert server.received == []


def test_a_server_without_the_nodes_is_refused(desk: Any, refused: Refusal) -> None:
    with FakeComfyUI() as server:
        del server.object_info["LoadImage"]
        assert "has no node LoadImage: install the pack" in refused(desk.tasks(1), server)


def test_a_changed_prompt_is_refused_or_made_anew(desk: Any, refused: Refusal) -> None:
    with FakeComfyUI() as server:
        assert desk.run(desk.tasks(2), server) == 0
        text = desk.tasks(2).read_text("utf-8").replace("prompt 2", "another")
        changed = desk.write("tasks.json", json.loads(text))
        said = refused(changed, server)
        assert "prompts[1]: anna_02 was made from another prompt" in said and "--remake" in said
        assert len(server.received) == 2
        assert desk.run(changed, server, remake=True) == 0
        assert server.received[2:] == ["another"]


def test_dry_run_sends_nothing(desk: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeComfyUI() as server:
        assert desk.run(desk.tasks(2), server, dry_run=True) == 0
        assert server.received == [] and server.uploads == {} and not desk.output.exists()
    assert "2 pictures; nothing was queued" in capsys.readouterr().out
