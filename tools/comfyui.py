"""ComfyUI in the foreground, with this pack and the models of that ComfyUI: ``python run.py comfyui``.

Inputs, outputs and settings lie in the folder .comfyui of this pack. Any argument of ComfyUI may follow; without
--port it takes 8188, or a free port when that one is taken, and --cpu is added where torch sees no accelerator.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tools.find_comfyui import ROOT, find_comfyui
from tools.server import HOST, ComfyServer, ServerError, listens

USUAL_PORT = 8188


def device_arguments() -> list[str]:
    """``--cpu`` where torch sees no accelerator: ComfyUI stops without it."""
    import torch

    return (
        [] if torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available() else ["--cpu"]
    )


def installed_comfyui(command: str) -> Path:
    """ComfyUI's folder. Raises ``ServerError``, which names the command that fetches one, when there is none."""
    comfyui = find_comfyui()
    if comfyui is None:
        raise ServerError(f"no ComfyUI found: start this with `python run.py {command}`, which fetches one")
    return comfyui


def show_help() -> int:
    """What the command does and, where there is a ComfyUI, what that one takes. Needs no package."""
    comfyui = find_comfyui()
    print(__doc__)
    if comfyui is None:
        print("ComfyUI's own arguments can be listed once one is there.")
        return 0
    print(f"The arguments of {comfyui}:", flush=True)
    return subprocess.call([sys.executable, str(comfyui / "main.py"), "--help"])


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        return show_help()
    parser = argparse.ArgumentParser(prog="run.py comfyui", add_help=False)
    parser.add_argument("--port", type=int)
    parser.add_argument("--listen", nargs="?", default=HOST, const="0.0.0.0,::")  # as ComfyUI declares it
    parser.add_argument("--base-directory")
    options, arguments = parser.parse_known_args(arguments)
    if options.base_directory:
        raise ServerError("--base-directory: this command has its own, .comfyui; for another one start ComfyUI itself")
    comfyui = installed_comfyui("comfyui")
    base = ROOT / ".comfyui"
    lay_out_people(base / "input")
    given = set(arguments)
    chosen = arguments + ([] if given & {"--cpu", "--directml", "--cuda-device"} else device_arguments())
    with ComfyServer(
        comfyui,
        base=base,
        arguments=chosen,
        model_folders=comfyui / "models",
        listen=options.listen,
        port=options.port or (None if listens(HOST, USUAL_PORT) else USUAL_PORT),
    ) as server:
        print(
            f"ComfyUI with FeedFace is at {server.address}  (its folders: {server.base}; Ctrl-C ends it)\n"
            "To see it work at once: Templates, ComfyUI-FeedFace, 01 First look; then Run.",
            flush=True,
        )
        with server.log_file.open(encoding="utf-8", errors="replace") as log:
            while server.process.poll() is None:
                print(log.read(), end="", flush=True)
                time.sleep(0.3)
            print(log.read(), end="", flush=True)
        return server.process.returncode


def lay_out_people(folder: Path) -> None:
    """The small model's reference pictures where Load Image finds them, for graphs queued over the API."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in sorted((ROOT / "models/feedface_small/people").glob("*.png")):
        shutil.copyfile(picture, folder / picture.name)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the server ends with us
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(0)
    except ServerError as problem:
        sys.exit(f"FeedFace: {problem}")
