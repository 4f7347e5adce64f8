"""One server: jobs are carried out there one after the other, through lost connections and restarts.

Whether a job has ended is always asked of the server's queue and history; the websocket only wakes us and tells the
progress. So nothing that it misses can be lost or done twice.
"""

from __future__ import annotations

import hashlib
import re
import time
import uuid
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feedface_core.errors import FeedFaceError
from tools.comfy_client import ComfyClient, Refused, ServerError, Unreachable, messages
from tools.queue.journal import DONE, FAILED, Entry, Journal
from tools.queue.plan import Job
from tools.queue.results import save_pictures, unwritable
from tools.queue.workflow import title_of

if TYPE_CHECKING:
    from tools.queue.pool import Pool

UPLOADS = "feedface_queue"  # folder inside the server's input folder
CONNECT = 10.0  # seconds to open the websocket
LISTEN = 1.0  # seconds at the websocket before looking whether we are to stop
ASK = 5.0  # seconds at the websocket before the server is asked about the job
GRACE = 60.0  # seconds for a server to stop a job that takes too long
LONGEST_WAIT = 10.0  # seconds between two tries to reach a server


class Gone(Exception):
    """The server does not come back."""


class Stopped(Exception):
    """The pool is to stop; the job stays as it is."""


@dataclass(frozen=True)
class Limits:
    """How long to be patient.

    Attributes:
        attempts: how often a job is sent at most.
        patience: seconds that a server may be away.
        timeout: seconds from sending a job to its end; None for no limit.
    """

    attempts: int = 3
    patience: float = 300
    timeout: float | None = None


class Worker:
    """Carries out jobs on one server.

    Args:
        pool: where jobs come from; told what happens.
        pictures: folder for the results.
        mark: what they are marked as, a key of ``SOURCE_TYPES``, or None.
    """

    def __init__(
        self, client: ComfyClient, pool: Pool, journal: Journal, pictures: Path, limits: Limits, mark: str | None = None
    ) -> None:
        self.client, self.pool, self.journal, self.pictures, self.limits = client, pool, journal, pictures, limits
        self.mark = mark
        self.uploaded: dict[Path, str] = {}
        self.accepted = False  # whether this server took a job of ours
        self.away_since: float | None = None
        self.sent_at = 0.0
        self.overdue: set[str] = set()

    def run(self) -> None:
        """Until the pool has no more jobs, or the server is gone.

        Raises:
            FeedFaceError: no job can be carried out here, or nothing can be written.
        """
        while (taken := self.pool.take(self)) is not None:
            job, entry = taken
            try:
                state, result = self.carry_out(job, entry)
            except Stopped:
                self.pool.give_back(job)
                return
            except Gone as problem:
                self.pool.give_back(job)
                self.pool.leaves(self, str(problem))
                return
            self.journal.end(job, self.client.address, state, result)
            self.pool.ended(self, job, state, result)

    def carry_out(self, job: Job, entry: Entry | None = None) -> tuple[str, dict[str, Any]]:
        """Send a job until it is done, or failed for good: the state and what to keep of it.

        Args:
            entry: the job was sent here by a queue that ended before us.
        """
        prompt_id, sent = entry.prompt_id if entry else "", 0
        self.sent_at = time.monotonic()
        while True:
            try:
                with closing(self.client.connect(CONNECT)) as connection:
                    while True:
                        waits = self.client.waits(prompt_id)
                        self.is_back()
                        if waits:
                            self.check_time(prompt_id)
                            self.listen(connection, prompt_id, job)
                            continue
                        error, again = "", True
                        if prompt_id:
                            result, error, again = self.outcome(job, prompt_id)
                            if result:
                                return DONE, result
                            if not again or sent >= self.limits.attempts:
                                return FAILED, {"error": error}
                            self.pool.say(f"{job.name} is sent again: {error.splitlines()[0]}")
                        prompt_id = self.send(job)
                        sent += 1
            except Refused as problem:
                if not self.accepted:
                    raise FeedFaceError(f"{job.task.where}: {problem}") from problem
                return FAILED, {"error": str(problem)}
            except Unreachable as problem:
                self.is_away(problem)
            except ServerError as problem:  # of one picture that the server no longer has, for instance
                return FAILED, {"error": str(problem)}

    def send(self, job: Job) -> str:
        """Queue a job; the id it got. The journal knows it before the server does."""
        prompt_id = str(uuid.uuid4())
        for path in dict.fromkeys(job.photos.values()):
            if path not in self.uploaded:
                self.uploaded[path] = self.upload(path)
        self.journal.begin(job, self.client.address, prompt_id)
        self.sent_at = time.monotonic()
        try:
            self.client.queue_whole(job.filled(self.uploaded), prompt_id, {"feedface_queue": job.metadata})
            self.accepted = True
        except Unreachable:
            pass  # it may have arrived: the caller asks by the id, once the server answers
        return prompt_id

    def upload(self, path: Path) -> str:
        """A photo under a name that tells its content: two people may both have a 1.jpg."""
        try:
            content = path.read_bytes()
        except OSError as problem:
            raise FeedFaceError(f"{path}: cannot be read any more: {problem.strerror}") from problem
        stem, digest = re.sub(r"[^A-Za-z0-9_-]+", "_", path.stem)[:60], hashlib.sha256(content).hexdigest()[:16]
        return self.client.upload(content, f"{stem}_{digest}{path.suffix.lower()}", UPLOADS)

    def check_time(self, prompt_id: str) -> None:
        """Stop a job that takes too long. Raises ``Gone`` if the server cannot."""
        if self.limits.timeout is None or (late := time.monotonic() - self.sent_at - self.limits.timeout) < 0:
            return
        if late > GRACE:
            raise Gone(f"{self.client.address} did not stop a job that took longer than {self.limits.timeout:g} s")
        if prompt_id not in self.overdue:
            self.overdue.add(prompt_id)
            self.client.cancel(prompt_id)

    def listen(self, connection: Any, prompt_id: str, job: Job) -> None:
        """Follow a job on the websocket to its end, for at most ``ASK`` seconds; then the server is to be asked."""
        import websocket

        until = time.monotonic() + ASK
        while time.monotonic() < until:
            if self.pool.stopping.is_set():
                raise Stopped
            try:
                for kind, data in messages(connection, prompt_id, time.monotonic() + LISTEN):
                    if kind == "progress" and str(data.get("node")) in job.workflow:
                        title = title_of(job.workflow, str(data["node"]))
                        self.pool.progress(self, title, data.get("value", "?"), data.get("max", "?"))
                    if time.monotonic() > until or self.pool.stopping.is_set():
                        break
                else:
                    return
            except websocket.WebSocketTimeoutException:
                continue
            except (OSError, websocket.WebSocketException) as problem:
                raise Unreachable(f"{self.client.address}: the connection ended: {problem}") from problem

    def outcome(self, job: Job, prompt_id: str) -> tuple[dict[str, Any], str, bool]:
        """What became of a run: its result, or else what went wrong and whether to try again.

        Raises:
            FeedFaceError: the pictures cannot be written.
        """
        ended = self.client.history(prompt_id)
        happened: dict[str, Any] = dict(((ended or {}).get("status") or {}).get("messages") or [])
        if prompt_id in self.overdue and "execution_success" not in happened:
            return {}, f"took longer than {self.limits.timeout:g} s", True
        if ended is None:
            return {}, f"{self.client.address} ended with it, or somebody took it out of the queue", True
        self.accepted = True
        failure = happened.get("execution_error")
        if failure is not None:
            names = ("exception_type", "exception_message", "node_id", "node_type")
            kind, message, node, node_type = (str(failure.get(name, "unknown")) for name in names)
            again = "OutOfMemory" in kind
            if again:
                self.client.free()
            title = title_of(job.workflow, node) if node in job.workflow else node_type
            return {}, f"{title}: {kind}: {message.strip()}", again
        if "execution_interrupted" in happened:
            return {}, "interrupted on the server: run the same command again to make it", False
        try:
            result = save_pictures(self.client, ended["outputs"], job, self.pictures, self.mark)
        except OSError as problem:
            raise unwritable(problem, self.pictures) from problem
        if not result["files"]:
            return {}, "the workflow saved no picture: add a Save Image node", False
        start, end = (happened.get(kind, {}).get("timestamp") for kind in ("execution_start", "execution_success"))
        timed = all(isinstance(moment, (int, float)) for moment in (start, end))
        return result | ({"seconds": (end - start) / 1000} if timed else {}), "", False

    def is_away(self, problem: Exception) -> None:
        """Wait a little for the server. Raises ``Gone`` when it has been away for too long, ``Stopped`` on the way."""
        now = time.monotonic()
        if self.away_since is None:
            self.away_since = now
            reason = str(problem).splitlines()[0]
            self.pool.say(f"{reason}; trying again for {self.limits.patience:.0f} s")
        away = now - self.away_since
        if away >= self.limits.patience:
            raise Gone(f"{self.client.address} did not answer for {away:.0f} s")
        self.uploaded.clear()  # another server may come back at this address
        if self.pool.stopping.wait(min(LONGEST_WAIT, max(0.2, away / 2))):
            raise Stopped

    def is_back(self) -> None:
        if self.away_since is not None:
            self.pool.say(f"{self.client.address} answers again after {time.monotonic() - self.away_since:.0f} s")
            self.away_since = None
