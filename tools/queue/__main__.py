"""Many pictures from a workflow: prompts × people, on one ComfyUI or several, each picture once.

    python -m tools.queue people.json --workflow workflows/api/feedface_portrait.json --output pictures

Stopped at any moment, by Ctrl-C, a crash or a lost server, the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from feedface_core.errors import FeedFaceError
from feedface_core.files.provenance import SOURCE_TYPES
from feedface_core.files.tasks import LARGEST_SEED
from tools.comfy_client import ServerError
from tools.options import number, whole
from tools.queue.run import Order, run_queue
from tools.queue.worker import Limits

ADDRESS = "http://127.0.0.1:8188"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run.py queue", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "tasks",
        type=Path,
        nargs="+",
        help="what to make: .json, .jsonl, .csv, .tsv, or folders of such files (docs/queue.md)",
    )
    parser.add_argument("--workflow", type=Path, required=True, help="in API format: File, Export (API)")
    parser.add_argument("--output", type=Path, default=Path("queue_output"), help="folder (default queue_output)")
    parser.add_argument("--server", action="append", metavar="URL", help=f"may be repeated (default {ADDRESS})")
    parser.add_argument("--photos", type=Path, help="folder of the photos (default: that of each file)")
    parser.add_argument(
        "--seeds",
        type=whole(0, LARGEST_SEED),
        nargs="+",
        default=[],
        help="each task that names no seed once with each",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="TITLE.INPUT=VALUE", help="for every task; may be repeated"
    )
    where = parser.add_argument_group("where things go in the workflow, if the graph does not show it")
    where.add_argument("--prompt-node", metavar="TITLE.INPUT")
    where.add_argument("--photo-node", metavar="TITLE.INPUT", action="append", default=[], help="may be repeated")
    where.add_argument("--seed-node", metavar="TITLE.INPUT", action="append", default=[], help="may be repeated")
    parser.add_argument("--attempts", type=whole(1), default=3, help="how often a picture is tried (default 3)")
    parser.add_argument(
        "--patience", type=number(0, 1e9), default=300, help="seconds that a server may be away (default 300)"
    )
    parser.add_argument(
        "--timeout", type=number(0, 1e9, above=True), help="seconds for a picture, others' work on the server included"
    )
    parser.add_argument(
        "--mark",
        choices=(*SOURCE_TYPES, "none"),
        default="generated",
        help="what the pictures are marked as in their XMP (default generated)",
    )
    parser.add_argument(
        "--remake", action="store_true", help="make pictures anew whose prompt, photo or seed has changed"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, show the plan, queue nothing")
    return parser.parse_args(arguments)


def order_of(options: argparse.Namespace) -> Order:
    settings = {}
    for text in options.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise FeedFaceError(f"--set {text[:80]}: expected TITLE.INPUT=VALUE, such as KSampler.steps=20")
        if name.strip() in settings:
            raise FeedFaceError(f"--set {text[:80]}: {name.strip()[:80]} is given twice: keep one")
        settings[name.strip()] = value
    for option in ("prompt_node", "photo_node", "seed_node"):
        given = getattr(options, option)
        if given is not None and not all(name.strip() for name in ([given] if isinstance(given, str) else given)):
            raise FeedFaceError(f"--{option.replace('_', '-')}: empty, expected TITLE.INPUT, such as KSampler.seed")
    names: dict[str, Any] = {"text": options.prompt_node, "photos": options.photo_node, "seed": options.seed_node}
    return Order(
        tasks=options.tasks,
        workflow=options.workflow,
        output=options.output,
        servers=[address.rstrip("/") for address in options.server or [ADDRESS]],
        photos=options.photos,
        seeds=options.seeds,
        settings=settings,
        names=names,
        limits=Limits(options.attempts, options.patience, options.timeout),
        mark=None if options.mark == "none" else options.mark,
        remake=options.remake,
        dry_run=options.dry_run,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every picture is there, 1 if some failed or something was refused, 130 after Ctrl-C."""
    try:
        return run_queue(order_of(parse(arguments)))
    except (FeedFaceError, ServerError) as problem:
        print(f"FeedFace: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("FeedFace: stopped; the same command goes on where it stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
