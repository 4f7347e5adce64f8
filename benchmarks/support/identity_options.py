"""What the identity benchmark is given, looked at before anything is drawn."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from safetensors import SafetensorError

from benchmarks.support.identity_rows import all_rows, site_rows
from examples.small_model import system
from tools.find_comfyui import ROOT
from trainer.config.fields import as_path, make_folder
from trainer.errors import TrainerError

OF_NO_ROWS = ("regions", "chain")


def known_groups(quick: bool) -> list[str]:
    """Names for ``--groups``."""
    rows = [*all_rows(quick), *(() if quick else site_rows(["a site"]))]
    return list(dict.fromkeys([*(row.group for row in rows), *OF_NO_ROWS]))


def check_options(options: Namespace) -> None:
    """Raises ``TrainerError``, which names the option, for a model that is none, a folder that cannot be written, or a
    group of rows that is not there."""
    _check_groups(options.groups or (), options.quick)
    options.model = as_path(options.model, "--model")
    if not (options.model / "model_index.json").is_file():
        found = "a folder without model_index.json" if options.model.is_dir() else "no folder"
        raise TrainerError(
            f"--model {options.model}: {found}, expected the folder of a small model: "
            "`python -m examples.small_model.build` makes one"
        )
    try:
        system.people_settings(options.model)
        system.load_examiner(options.model)
    except TrainerError as error:
        raise TrainerError(f"--model {options.model}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        why = str(error).strip().partition("\n")[0][:300]
        raise TrainerError(
            f"--model {options.model}: its people or its examiner cannot be read ({why}), expected what "
            "`python -m examples.small_model.build` writes"
        ) from error
    options.work = make_folder(options.work, "--work")
    make_folder(options.work / "people", "--work")
    own = [options.model / system.ADAPTER, options.work / "adapters" / "full-100.safetensors"]
    if not options.quick and not any(file.is_file() for file in own):
        raise TrainerError(f"--model {options.model}: no adapter, looked for {own[0]} and {own[1]}")
    if options.report or not options.quick:
        options.report = make_folder(options.report or ROOT / "docs", "--report")


def _check_groups(groups: Sequence[str], quick: bool) -> None:
    known = known_groups(quick)
    if unknown := [name for name in groups if name not in known]:
        more = " (without --quick there are more)" if quick else ""
        raise TrainerError(f"--groups: found {unknown[0][:100]!r}, expected some of {', '.join(known)}{more}")
