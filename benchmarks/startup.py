"""How long ComfyUI waits for this pack when it starts, beyond torch, transformers and its own modules.

    python run.py bench startup [--rounds 5]

Each round is a fresh process that has imported ComfyUI as its server does before it loads custom nodes. The last line
is one JSON object: the median seconds of the pack's import and of making all nodes' schemas, and the third-party
modules that it brings in.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from tools.options import whole

ROOT = Path(__file__).resolve().parents[1]
PROBE = """
import importlib.util, json, sys, time
root, sys.argv = sys.argv[1], [sys.argv[0], "--cpu"]
import torch, transformers
import comfy.options
comfy.options.enable_args_parsing()
import comfy.samplers, comfy.sd, comfy_api.latest, folder_paths, nodes
before, started = set(sys.modules), time.perf_counter()
spec = importlib.util.spec_from_file_location("feedface_pack", f"{root}/__init__.py", submodule_search_locations=[root])
pack = importlib.util.module_from_spec(spec)
sys.modules["feedface_pack"] = pack
spec.loader.exec_module(pack)
imported = time.perf_counter()
from feedface_pack.nodes import NODES
for node in NODES:
    node.GET_SCHEMA()
done = time.perf_counter()
modules = sorted({name.split(".")[0] for name in set(sys.modules) - before} - {"feedface_pack"})
print(json.dumps({"import_s": imported - started, "schemas_s": done - imported, "modules": modules}))
"""


def probe(comfyui: str) -> dict[str, float | list[str]]:
    """One fresh start, in the ComfyUI of a folder: seconds of import and schemas, and the modules brought in."""
    command = [sys.executable, "-B", "-c", PROBE, str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": comfyui}
    done = subprocess.run(command, cwd=comfyui, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: the pack does not load in {comfyui}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python run.py bench startup", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=whole(1), default=5, help="fresh processes (default 5)")
    rounds = parser.parse_args(arguments).rounds
    found = [probe(os.environ["COMFYUI_PATH"]) for _ in range(rounds)]
    result = {key: round(statistics.median(one[key] for one in found), 3) for key in ("import_s", "schemas_s")}
    print(json.dumps({**result, "rounds": rounds, "modules": found[0]["modules"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
