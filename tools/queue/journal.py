"""What became of each job, in a file that survives the end of any process at any moment."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from feedface_core.errors import FeedFaceError, refuse, shorten
from tools.queue.plan import Job

TABLE = """CREATE TABLE IF NOT EXISTS job (
    name TEXT PRIMARY KEY, digest TEXT NOT NULL, state TEXT NOT NULL, server TEXT NOT NULL, prompt_id TEXT NOT NULL,
    sent INTEGER NOT NULL, result TEXT NOT NULL
) WITHOUT ROWID"""
SENT, DONE, FAILED = "sent", "done", "failed"


@dataclass(frozen=True)
class Entry:
    """The state of a job.

    Attributes:
        sent: how often it was given to a server, in all runs of the queue.
        result: of a job that is done, its files, texts and seconds; of one that failed, the error.
    """

    name: str
    digest: str
    state: str
    server: str
    prompt_id: str
    sent: int
    result: dict[str, Any] = field(default_factory=dict)


class Journal:
    """The jobs of an output folder. One process at a time: the lock goes with the process, however it ends.

    Raises:
        FeedFaceError: another queue works in the folder, or the file cannot be used.
    """

    NAME = "journal.sqlite"

    def __init__(self, folder: Path) -> None:
        self.path = folder / self.NAME
        self._lock = threading.Lock()
        try:
            # No wait for a lock: whoever holds it holds it for hours.
            self._database = sqlite3.connect(self.path, timeout=0, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.execute("BEGIN EXCLUSIVE")
            self._database.execute(TABLE)
            self._database.execute("COMMIT")
            self.entries()
        except ValueError as problem:
            raise self._foreign(problem) from None
        except sqlite3.OperationalError as problem:
            if "locked" in str(problem):
                raise FeedFaceError(
                    f"{folder}: another queue works in this folder: wait for it, or choose another --output"
                ) from None
            if "no such column" in str(problem):
                raise self._foreign(problem) from None
            raise FeedFaceError(
                f"{self.path}: cannot be written: {problem}: free space, or choose another --output"
            ) from None
        except sqlite3.DatabaseError as problem:
            raise self._foreign(problem) from None

    def _foreign(self, problem: Exception) -> FeedFaceError:
        return FeedFaceError(
            f"{self.path}: not a journal of this queue ({shorten(problem)}): choose another --output, or delete the "
            "file to make every picture again"
        )

    def entries(self) -> dict[str, Entry]:
        """By name of the job. Raises ``ValueError`` for a row that this queue did not write."""
        with self._lock:
            rows = self._database.execute(
                "SELECT name, digest, state, server, prompt_id, sent, result FROM job"
            ).fetchall()
        return {row[0]: _entry(row) for row in rows}

    def begin(self, job: Job, server: str, prompt_id: str) -> None:
        """Written before a job is sent, so that whoever comes after us can ask the server about it."""
        self._write(
            "INSERT INTO job VALUES (?, ?, ?, ?, ?, 1, '{}') ON CONFLICT (name) DO UPDATE SET "
            "digest = excluded.digest, state = excluded.state, server = excluded.server, "
            "prompt_id = excluded.prompt_id, sent = sent + 1, result = '{}'",
            (job.name, job.digest, SENT, server, prompt_id),
        )

    def end(self, job: Job, server: str, state: str, result: Mapping[str, Any]) -> None:
        """Also of a job that failed before it was sent, as when the server does not take its photo."""
        text = json.dumps(result, ensure_ascii=False)
        self._write(
            "INSERT INTO job VALUES (?, ?, ?, ?, '', 0, ?) ON CONFLICT (name) DO UPDATE SET "
            "digest = excluded.digest, state = excluded.state, result = excluded.result",
            (job.name, job.digest, state, server, text),
        )

    def _write(self, statement: str, values: Sequence[Any]) -> None:
        try:
            with self._lock:
                self._database.execute(statement, values)
        except sqlite3.Error as problem:
            raise FeedFaceError(
                f"{self.path}: cannot be written: {problem}. Free space there, then run the same command again: "
                "it goes on where it stopped"
            ) from problem

    def close(self) -> None:
        with self._lock:
            self._database.close()


def _entry(row: tuple[Any, ...]) -> Entry:
    *told, result = row
    try:
        result = json.loads(result)
    except (TypeError, RecursionError) as problem:
        raise ValueError(str(problem)) from problem
    files = result.get("files", [] if told[2] != DONE else None) if isinstance(result, dict) else None
    texts = isinstance(files, list) and all(isinstance(text, str) for text in (*told[:5], *files))
    if not texts or told[2] not in (SENT, DONE, FAILED):
        raise ValueError(f"the row of {shorten(told[0])} is not one of this queue")
    return Entry(*told, result)


@dataclass
class Rest:
    """What is left of a plan.

    Attributes:
        new: jobs to send.
        sent: jobs that a server may still have, with where they were sent.
        done: names of those whose pictures are there.
    """

    new: list[Job] = field(default_factory=list)
    sent: list[tuple[Job, Entry]] = field(default_factory=list)
    done: list[str] = field(default_factory=list)


def what_is_left(jobs: Sequence[Job], journal: Journal, pictures: Path, remake: bool = False) -> Rest:
    """Compare a plan with the journal. A job that failed is tried again, and so is one whose pictures were deleted.

    Args:
        remake: a job that has changed since its pictures were made is made again.

    Raises:
        FeedFaceError: jobs have changed, and are not to be made again.
    """
    rest, changed, entries = Rest(), [], journal.entries()
    for job in jobs:
        entry = entries.get(job.name)
        if entry is None or entry.state == FAILED:
            rest.new.append(job)
        elif entry.digest != job.digest:
            if entry.state == DONE and not remake:
                changed.append(f"{job.task.where}: {job.name} was made from another prompt, photo, seed or workflow")
            rest.new.append(job)
        elif entry.state == SENT:
            rest.sent.append((job, entry))
        elif all((pictures / file).is_file() for file in entry.result["files"]):
            rest.done.append(job.name)
        else:
            rest.new.append(job)
    if changed:
        changed[0] += f" in {journal.path.parent}. Choose another --output, or give --remake to make those anew"
    refuse(changed, shown=1)
    return rest
