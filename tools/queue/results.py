"""The pictures of a run on our disk, and the summary of all."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from feedface_core.errors import FeedFaceError, shorten
from feedface_core.files.provenance import mark
from feedface_core.files.tasks import PICTURES
from tools.comfy_client import ComfyClient, ServerError
from tools.queue.files import write_whole
from tools.queue.journal import DONE, FAILED, Entry
from tools.queue.plan import FORBIDDEN, Job
from tools.queue.workflow import numbered, title_of

LONGEST_SUFFIX = 16  # characters


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
            if FORBIDDEN.search(suffix) or len(suffix) > LONGEST_SUFFIX:
                raise ServerError(f"{client.address}: no file can end in {shorten(suffix)}, and one does there")
            title = [slug(title_of(job.workflow, node) if node in job.workflow else node)] if len(nodes) > 1 else []
            inside = "_".join([*title, *([str(number)] if len(files) > 1 else [])])
            name = unused(f"{job.name}/{inside}" if inside else job.name, suffix, names)
            (folder / name).parent.mkdir(exist_ok=True)
            content = client.request("GET", "/view", params=file).content
            if problem := picture_problem(content, suffix):
                raise ServerError(f"{client.address}/view: {shorten(file['filename'])}: {problem}")
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
        if isinstance(entry, dict) and isinstance(entry.get("filename"), str)
    ]
    kept = [one for one in found if one[1]["type"] == "output"]
    return iter(kept or found)


def texts_of(outputs: Mapping[str, Any], job: Job) -> dict[str, str]:
    """Texts that nodes showed, by title."""
    return {
        title_of(job.workflow, node): "\n".join(map(str, text if isinstance(text, list) else [text]))
        for node in sorted(outputs, key=numbered)
        if (text := outputs[node].get("text")) and node in job.workflow
    }


def picture_problem(content: bytes, suffix: str) -> str | None:
    """What is wrong with what should be a picture: a proxy has answers of its own, and a connection may end early."""
    if not content:
        return "the server gives an empty file"
    if suffix.lower() not in PICTURES:
        return None  # a film, or whatever else the workflow saves
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()
    except Exception as problem:  # Pillow raises many types for what is broken
        return f"the server gives no picture ({len(content)} bytes; {str(problem)[:160]})"
    return None


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
