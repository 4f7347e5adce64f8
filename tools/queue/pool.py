"""Several servers at work on one list of jobs."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from feedface_core.errors import FeedFaceError
from tools.comfy_client import ComfyClient
from tools.queue.journal import Entry, Journal, Rest
from tools.queue.plan import Job
from tools.queue.worker import Limits, Worker

LAST_WORDS = 10.0  # seconds for a worker to write down what it has, once it is to stop


class Pool:
    """Shares out jobs. A job that a server may still have goes to that server; any other to the next that is free.

    Args:
        say: takes a line for the user.
        report: takes what happened: a job that ended (server, job, state, result).
        step: takes the progress of a job: (server, title of the node, steps done, all steps).
        mark: what the pictures are marked as, a key of ``SOURCE_TYPES``; None leaves them as the server wrote them.
    """

    def __init__(
        self,
        rest: Rest,
        clients: Sequence[ComfyClient],
        journal: Journal,
        pictures: Path,
        limits: Limits,
        say: Callable[[str], None],
        report: Callable[[str, Job, str, dict[str, Any]], None],
        step: Callable[[str, str, int, int], None],
        mark: str | None = None,
    ) -> None:
        self.say, self._report, self._step = say, report, step
        self.workers = [Worker(client, self, journal, pictures, limits, mark) for client in clients]
        self.stopping = threading.Event()
        self._change = threading.Condition()
        self._waiting = deque(rest.new)
        self._sent: dict[str, deque[tuple[Job, Entry]]] = {client.address: deque() for client in clients}
        for job, entry in rest.sent:
            if entry.server in self._sent:
                self._sent[entry.server].append((job, entry))
            else:
                say(f"{job.name} was sent to {entry.server}, which is not among the servers: it is made anew")
                self._waiting.append(job)
        self._running = self._alive = 0
        self._problem: BaseException | None = None
        self._gone: list[str] = []

    def run(self) -> None:
        """Until every job has ended.

        Raises:
            FeedFaceError: it cannot go on: no server is left, or nothing can be written.
        """
        self._alive = len(self.workers)
        for worker in self.workers:
            threading.Thread(target=self._work, args=(worker,), daemon=True).start()
        try:
            self._wait(None)
        finally:
            self.stop()
            self._wait(LAST_WORDS)
        if self._problem:
            raise self._problem
        if self._waiting:
            left = "\n".join(self._gone)
            raise FeedFaceError(
                f"{left}\nNo server is left for {len(self._waiting)} jobs. Start one, then run the same command again: "
                "it goes on where it stopped"
            )

    def _wait(self, seconds: float | None) -> None:
        """For the end of the workers. ``Thread.join`` interrupted by Ctrl-C takes the thread for ended."""
        deadline = time.monotonic() + (seconds or float("inf"))
        with self._change:
            while self._alive and time.monotonic() < deadline:
                self._change.wait(0.2)  # a wait without end would not hear Ctrl-C on Windows

    def stop(self) -> None:
        self.stopping.set()
        with self._change:
            self._change.notify_all()

    def _work(self, worker: Worker) -> None:
        try:
            worker.run()
        except BaseException as problem:
            self._problem = self._problem or problem
            self.stop()
        finally:
            with self._change:
                self._alive -= 1
                self._change.notify_all()

    def take(self, worker: Worker) -> tuple[Job, Entry | None] | None:
        """The next job for a worker, which waits while others may give theirs back; None when all have ended."""
        with self._change:
            while not self.stopping.is_set():
                sent = self._sent[worker.client.address]
                if sent or self._waiting:
                    self._running += 1
                    return sent.popleft() if sent else (self._waiting.popleft(), None)
                if not self._running and not any(self._sent.values()):
                    break
                self._change.wait(1)
            return None

    def give_back(self, job: Job) -> None:
        with self._change:
            self._running -= 1
            self._waiting.appendleft(job)
            self._change.notify_all()

    def ended(self, worker: Worker, job: Job, state: str, result: dict[str, Any]) -> None:
        self._report(worker.client.address, job, state, result)
        with self._change:
            self._running -= 1
            self._change.notify_all()

    def leaves(self, worker: Worker, reason: str) -> None:
        """A server is gone: what it may still have goes to the others."""
        self.say(reason)
        with self._change:
            self._gone.append(reason)
            self._waiting.extend(job for job, _ in self._sent[worker.client.address])
            self._sent[worker.client.address].clear()
            self._change.notify_all()

    def progress(self, worker: Worker, title: str, value: int, maximum: int) -> None:
        self._step(worker.client.address, title, value, maximum)
