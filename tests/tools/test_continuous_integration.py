"""What .ci/run does with results and with a missing browser; programs of the system are stood in for."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!{bash}
echo "python $*" >> "$LOG"
case "$*" in *--browser*) echo "5 passed"; exit "$BROWSER";; *) echo "9 passed"; exit "$DEFAULT";; esac
"""
#: apt-get that knows no package before it was updated, and then brings a browser.
APT = """#!{bash}
echo "apt-get $1" >> "$LOG"
case "$1" in
    update) touch "$PATH/updated";;
    install) [ -e "$PATH/updated" ] && [ -n "$OFFERS" ] && {ln} -s "$PATH/id" "$PATH/chromium";;
esac
"""
pytestmark = pytest.mark.skipif(os.name == "nt", reason="a shell script")


@pytest.fixture
def ci(tmp_path):
    """Runs the script where ``programs`` is all there is; returns exit code, output and what was called."""
    bash, programs = shutil.which("bash"), tmp_path / "programs"
    programs.mkdir()

    def program(name: str, text: str) -> None:
        (programs / name).write_text(text.format(bash=bash, ln=shutil.which("ln")))
        (programs / name).chmod(0o755)

    def run(
        default: int = 0, browser: int = 0, has: bool = True, user: int = 1000, apt: bool = False, offers: str = ""
    ):
        program("python3", PYTHON)
        program("id", f"#!{bash}\necho {user}\n")
        for name in ("timeout", "dirname", "touch"):
            (programs / name).unlink(missing_ok=True)
            (programs / name).symlink_to(shutil.which(name))
        if has:
            program("chromium", f"#!{bash}\n")
        if apt:
            program("apt-get", APT)
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        settings = {"PATH": str(programs), "LOG": str(log), "HOME": str(tmp_path), "OFFERS": offers}
        settings |= {"DEFAULT": str(default), "BROWSER": str(browser)}
        done = subprocess.run([bash, ROOT / ".ci/run"], env=settings, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr, log.read_text().splitlines()

    return run


@pytest.mark.parametrize(("default", "browser", "expected"), [(0, 0, 0), (1, 0, 1), (0, 2, 2), (3, 1, 3)])
def test_both_run_in_order_and_either_can_fail(ci, default, browser, expected):
    code, output, called = ci(default, browser)
    assert code == expected
    assert called == ["python run.py test", "python run.py test --browser"]
    assert output.index("9 passed") < output.index("5 passed")


@pytest.mark.parametrize(("user", "apt"), [(1000, True), (0, False)])
def test_missing_browser_is_told_loudly(ci, user, apt):
    code, output, called = ci(has=False, user=user, apt=apt)
    assert code == 0 and called == ["python run.py test"]
    assert "BROWSER TESTS SKIPPED: no Chromium" in output


def test_root_installs_it(ci):
    code, output, called = ci(has=False, user=0, apt=True, offers="chromium")
    assert code == 0 and "SKIPPED" not in output
    assert called == [
        "python run.py test", "apt-get install", "apt-get update", "apt-get install", "python run.py test --browser",
    ]  # fmt: skip
    code, output, called = ci(default=1, has=False, user=0, apt=True)
    assert code == 1


def test_package_that_cannot_be_had_is_no_failure(ci):
    code, output, called = ci(has=False, user=0, apt=True)
    assert code == 0 and "BROWSER TESTS SKIPPED" in output and called[0] == "python run.py test"
