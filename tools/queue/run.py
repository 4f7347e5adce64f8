"""A batch from its files to its summary: everything is checked, then carried out."""

from __future__ import annotations

import shutil
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from feedface_core.errors import FeedFaceError, shorten
from feedface_core.files.tasks import Task, read_tasks
from tools.comfy_client import ComfyClient, ServerError
from tools.queue.files import write_whole
from tools.queue.journal import DONE, FAILED, Journal, Rest, what_is_left
from tools.queue.plan import Job, Photos, make_plan
from tools.queue.pool import Pool
from tools.queue.results import write_summary
from tools.queue.worker import Limits
from tools.queue.workflow import find_targets, missing_nodes, read_workflow, saves
from tools.workflow_format import Prompt

LEAST_SPACE = 100 * 2**20  # bytes free in the output folder before anything is queued
SUMMARY_EVERY = 30.0  # seconds


@dataclass(frozen=True)
class Order:
    """What the user asks for; the names are those of the command's options."""

    tasks: Sequence[Path]
    workflow: Path
    output: Path
    servers: Sequence[str]
    photos: Path | None = None
    seeds: Sequence[int] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    names: dict[str, Any] = field(default_factory=dict)
    limits: Limits = Limits()
    mark: str | None = "generated"
    remake: bool = False
    dry_run: bool = False


def run_queue(order: Order) -> int:
    """Carry out an order: 0 if every picture is there at the end, 1 if some failed.

    Raises:
        FeedFaceError: something given cannot be used, before anything is queued; or it cannot go on.
        ServerError: a server does not answer, before anything is queued.
    """
    workflow = read_workflow(order.workflow)
    tasks = [
        replace(task, settings=order.settings | task.settings) for task in read_tasks(list(order.tasks), order.photos)
    ]
    targets = find_targets(workflow, **order.names)
    clients = [ComfyClient(address) for address in dict.fromkeys(order.servers)]
    jobs, photo_digest = [], Photos().digest
    for client in clients:  # each server may know other nodes and files
        object_info = checked_server(client, workflow)
        common = Task("--set", folder=tasks[0].folder, settings=order.settings)
        make_plan([common], workflow, targets, object_info, (), photo_digest)
        jobs = make_plan(tasks, workflow, targets, object_info, order.seeds, photo_digest)
    tell_left_out(jobs)
    if order.dry_run:
        show_plan(jobs)
        return 0
    pictures = order.output / "pictures"
    check_output(pictures)
    journal = Journal(order.output)
    try:
        rest = what_is_left(jobs, journal, pictures, order.remake)
        for client in clients:  # the same in the next run: the server's messages about a job reach that one too
            client.client_id = uuid.uuid5(uuid.NAMESPACE_URL, f"{order.output.resolve()} {client.address}").hex
        return carry_out(order, jobs, rest, clients, journal, pictures)
    finally:
        journal.close()


def checked_server(client: ComfyClient, workflow: Prompt) -> dict[str, Any]:
    """What the nodes of a server are. Raises ``ServerError``, ``FeedFaceError``."""
    if not client.address.startswith(("http://", "https://")):
        raise FeedFaceError(f"--server {client.address}: expected an address such as http://127.0.0.1:8188")
    try:
        object_info = client.object_info()
    except ServerError as problem:
        raise FeedFaceError(
            f"{str(problem).strip()}\nIs ComfyUI running there? Start it, or give its address with --server."
        ) from problem
    missing = missing_nodes(workflow, object_info)
    if missing:
        raise FeedFaceError(
            f"{client.address} has no node {', '.join(missing)}: install the pack that brings it, then restart it"
        )
    for kind in sorted({node["class_type"] for node in workflow.values()}):
        if not tells_inputs(object_info[kind]):
            told = shorten(object_info[kind])
            raise FeedFaceError(f"{client.address}/object_info: expected the inputs of the node {kind}, found {told}")
    if not saves(workflow, object_info):
        raise FeedFaceError("the workflow saves nothing: add a Save Image node")
    return object_info


def tells_inputs(node_info: Any) -> bool:
    """Whether a server describes a node as ComfyUI does, as far as the queue needs it."""
    declared = node_info.get("input") if isinstance(node_info, dict) else None
    if not isinstance(declared, dict):
        return False
    return all(isinstance(declared.get(group) or {}, dict) for group in ("required", "optional"))


def check_output(pictures: Path) -> None:
    """Raises ``FeedFaceError`` if pictures cannot be written there."""
    try:
        pictures.mkdir(parents=True, exist_ok=True)
        write_whole(pictures / ".try", b"try")
        (pictures / ".try").unlink()
        free = shutil.disk_usage(pictures).free
    except OSError as problem:
        raise FeedFaceError(f"{pictures}: cannot be written: {problem.strerror}: choose another --output") from problem
    if free < LEAST_SPACE:
        raise FeedFaceError(
            f"{pictures}: {free / 2**20:.0f} MB free, expected at least {LEAST_SPACE / 2**20:.0f}: free space, or "
            "choose another --output"
        )


def tell_left_out(jobs: Sequence[Job]) -> None:
    """Say whose photos are more than the workflow takes."""
    left_out = {}
    for job in jobs:
        used = sum(path in job.task.photos for path in job.photos.values())
        if used < len(job.task.photos):
            left_out[job.task.person or job.name] = (used, len(job.task.photos))
    for name, (used, count) in list(left_out.items())[:5]:
        print(f"{name}: the workflow takes {used} of {count} photos, the first ones")
    if len(left_out) > 5:
        print(f"… and so for {len(left_out) - 5} more")


def show_plan(jobs: Sequence[Job], shown: int = 20) -> None:
    for job in jobs[:shown]:
        print(job.name, job.metadata)
    print(
        *([f"… and {len(jobs) - shown} more"] if len(jobs) > shown else []),
        f"{len(jobs)} pictures; nothing was queued",
        sep="\n",
    )


def carry_out(
    order: Order, jobs: Sequence[Job], rest: Rest, clients: Sequence[ComfyClient], journal: Journal, pictures: Path
) -> int:
    bar = tqdm(total=len(jobs), initial=len(rest.done), unit="picture", disable=None, dynamic_ncols=True)
    lock, ended, written = threading.Lock(), len(rest.done), time.monotonic()
    if rest.done:
        print(f"{len(rest.done)} of {len(jobs)} are there already", flush=True)

    def say(text: str) -> None:
        with lock:
            bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def report(server: str, job: Job, state: str, result: dict[str, Any]) -> None:
        nonlocal ended, written
        with lock:
            ended += 1
            bar.update()
            if time.monotonic() - written > SUMMARY_EVERY:
                write_summary(order.output, jobs, journal.entries())
                written = time.monotonic()
        if state == FAILED:
            say(f"{job.name} failed ({job.task.where}): {result['error']}")
        elif bar.disable:
            say(f"{ended}/{len(jobs)} {job.name}: {', '.join(result['files'])} from {server}")

    def step(server: str, title: str, value: int, maximum: int) -> None:
        with lock:
            bar.set_postfix_str(f"{server.partition('://')[2]} {title} {value}/{maximum}")

    try:
        Pool(rest, clients, journal, pictures, order.limits, say, report, step, order.mark).run()
    except BaseException:
        with suppress(FeedFaceError):  # the first problem is the one to tell
            tell_summary(order.output, jobs, journal)
        raise
    finally:
        bar.close()
    return int(tell_summary(order.output, jobs, journal)[DONE] < len(jobs))


def tell_summary(folder: Path, jobs: Sequence[Job], journal: Journal) -> dict[str, Any]:
    summary = write_summary(folder, jobs, journal.entries())
    counts = ", ".join(f"{summary[state]} {state}" for state in (DONE, FAILED, "left"))
    print(f"{counts}: {folder / 'summary.md'}", flush=True)
    return summary
