"""The pictures of a run on our disk, and the summary of all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from feedface_core.errors import FeedFaceError
from feedface_core.files.provenance import mark
from tools.comfy_client import ComfyClient
from tools.queue.files import write_whole
from tools.queue.journal import DONE, FAILED, Entry
from tools.queue.plan import Job
from tools.queue.workflow import numbered, title_of


def save_pictures(
    client: ComfyClient, outputs: Mapping[str, Any], job: Job, folder: Path, kind: str | None = None
) -> dict[str, Any]:
    """Fetch what a run saved; names of the files, texts that nodes showed.

    A single picture is called like the job; several lie in a folder of that name, by the titles of their nodes.
    A picture of Save Image holds the workflow and :attr:`Job.metadata`; the mark is added to what the server wrote.

    Args:
        kind: what the pictures are marked as, a key of ``SOURCE_TYPES``; None leaves the files as they are.

    Raises:
        ServerError: the server does not hand them out.
        OSError: they cannot be written.
    """
    saved = list(files_of(outputs))
    nodes = list(dict.fromkeys(node for node, _ in saved))
    names: list[str] = []
    for node in nodes:
        files = [file for owner, file in saved if owner == node]
        for number, file in enumerate(files, 1):
            suffix = PurePosixPath(file["filename"]).suffix
            title = [slug(title_of(job.workflow, node))] if len(nodes) > 1 else []
            inside = "_".join([*title, *([str(number)] if len(files) > 1 else [])])
            name = unused(f"{job.name}/{inside}" if inside else job.name, suffix, names)
            (folder / name).parent.mkdir(exist_ok=True)
            content = client.request("GET", "/view", params=file).content
            write_whole(folder / name, mark(content, kind) if kind else content)
            names.append(name)
    return {"files": names, "texts": texts_of(outputs, job)}


def files_of(outputs: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, str]]]:
    """(node, file) of what was saved; previews only where nothing was."""
    found = [
        (node, {key: entry.get(key, "") for key in ("filename", "subfolder", "type")})
        for node in sorted(outputs, key=numbered)
        for entries in outputs[node].values()
        if isinstance(entries, list)
        for entry in entries
        if isinstance(entry, dict) and "filename" in entry
    ]
    kept = [one for one in found if one[1]["type"] == "output"]
    return iter(kept or found)


def texts_of(outputs: Mapping[str, Any], job: Job) -> dict[str, str]:
    """Texts that nodes showed, by title."""
    return {
        title_of(job.workflow, node): "\n".join(map(str, outputs[node]["text"]))
        for node in sorted(outputs, key=numbered)
        if outputs[node].get("text") and node in job.workflow
    }


def slug(title: str) -> str:
    return re.sub(r"[^\w]+", "-", title).strip("-").lower() or "picture"


def unused(name: str, suffix: str, names: Sequence[str]) -> str:
    """Two nodes may have one title."""
    number, free = 1, f"{name}{suffix}"
    while free in names:
        number += 1
        free = f"{name}_{number}{suffix}"
    return free


def write_summary(folder: Path, jobs: Sequence[Job], entries: Mapping[str, Entry]) -> dict[str, Any]:
    """``summary.json`` and ``summary.md``; what the first holds. Raises ``FeedFaceError`` if they cannot be written."""
    made = [summary_of(job, entries.get(job.name)) for job in jobs]
    counts = {state: sum(one["state"] == state for one in made) for state in (DONE, FAILED, "left")}
    summary = {**counts, "jobs": made}
    try:
        write_whole(folder / "summary.json", (json.dumps(summary, indent=1, ensure_ascii=False) + "\n").encode())
        write_whole(folder / "summary.md", table(summary).encode())
    except OSError as problem:
        raise unwritable(problem, folder) from problem
    return summary


def unwritable(problem: OSError, folder: Path) -> FeedFaceError:
    """A disk that is full, most often."""
    return FeedFaceError(
        f"{folder}: cannot be written: {problem.strerror or problem}. Free space there, then run the same command "
        "again: it goes on where it stopped"
    )


def summary_of(job: Job, entry: Entry | None) -> dict[str, Any]:
    ended = entry is not None and entry.state in (DONE, FAILED) and entry.digest == job.digest
    told = (
        {"state": entry.state, "server": entry.server, "sent": entry.sent, **entry.result}
        if ended
        else {"state": "left"}
    )
    return {**job.metadata, "from": job.task.where, **told}


def table(summary: Mapping[str, Any]) -> str:
    """The summary to read: a row a job, in Markdown."""
    lines = [
        f"{summary[DONE]} done, {summary[FAILED]} failed, {summary['left']} left",
        "",
        "| id | person | prompt | seed | state | s | pictures, or what went wrong |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for job in summary["jobs"]:
        what = ", ".join(f"[{name}](pictures/{name.replace(' ', '%20')})" for name in job.get("files", []))
        seconds = f"{job['seconds']:.1f}" if "seconds" in job else ""
        cells = [job["id"], job.get("person", ""), job.get("prompt", ""), job.get("seed", ""), job["state"], seconds]
        lines.append("| " + " | ".join([*map(cell, cells), what or cell(job.get("error", ""))]) + " |")
    return "\n".join(lines) + "\n"


def cell(value: Any) -> str:
    text = " ".join(str(value).split()).replace("|", "\\|")
    return text if len(text) <= 200 else f"{text[:199]}…"
