"""A run's folder says what it is: README.txt, its settings, and a line for each start."""

from __future__ import annotations

import json
import os
import platform
import shlex
import socket
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from feedface_core.files.atomic import replacing

from ..config import Config

README, SETTINGS, STARTS = "README.txt", "config.yaml", "starts.jsonl"
PACKAGES = ("accelerate", "diffusers", "safetensors", "torch", "transformers")

_TEXT = """A training run of a FeedFace adapter.

  config.yaml          its settings, defaults included
  starts.jsonl         a line for each start: when, where, the command, the step it went on from, versions
  checkpoint-<step>/   weights, optimiser, moving average; latest names the newest whole one
  log.jsonl, logs/     losses and speed by step; TensorBoard: tensorboard --logdir {output}/logs
  validation/          pictures made amid the run
  run.lock, run.owner  keep a second run out while one is going on

Go on       the last command of starts.jsonl, again: it goes on from the newest checkpoint
Start anew  another train.output
Adapter     python -m trainer.export {output}

Trained: {what}, {sites} sites, on {base}
Data:    {manifest} ({photos})
"""


def versions() -> dict[str, str]:
    """Of Python and the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # on a path, not installed
            found[name] = "unknown"
    return found | {"torch": torch.__version__}  # with what it was built for


def describe_run(output: Path, config: Config, sites: int, data: dict[str, Any], step: int, processes: int) -> None:
    """Write README.txt and config.yaml anew, and add a line to starts.jsonl.

    Args:
        output: the run's folder.
        sites: number of branches.
        data: what checkpoints say of the data.
        step: that this start goes on from.
        processes: how many train.
    """
    manifest = config.data.manifest
    text = _TEXT.format(
        output=shlex.quote(str(output)),
        what=config.adapter.title or "an adapter without a title",
        sites=sites,
        base=config.model.base,
        manifest=manifest if isinstance(manifest, str) else ", ".join(manifest),
        photos=f"{data.get('photos', '?')} photos, fingerprint {data.get('fingerprint', '?')}",
    )
    settings = yaml.safe_dump(json.loads(config.to_json()), sort_keys=False, allow_unicode=True)
    for name, content in ((README, text), (SETTINGS, settings)):
        with replacing(output / name) as partial:
            partial.write_text(content, encoding="utf-8")
    start = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "folder": os.getcwd(),
        "command": shlex.join(sys.orig_argv),
        "step": step,
        "processes": processes,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "versions": versions(),
    }
    with open(output / STARTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(start) + "\n")
