"""The README does what it says: its `bash` and `python` blocks run, top to bottom, in one empty folder.

Blocks tagged `console` or without a tag show something and are not run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_blocks_are_found() -> None:
    tags = [tag for tag, _ in BLOCK.findall(README)]
    assert {"bash", "python", "console"} <= set(tags)


def test_blocks_run(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    # The checkout's own command, whether or not it is installed.
    command = tools / "biorewards"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cli.main "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    place = tmp_path / "work"
    place.mkdir()
    env = os.environ | {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": os.environ.get("BIOREWARDS_TEST_THREADS", "1"),
    }
    program = ""
    for tag, code in BLOCK.findall(README):
        if tag == "python":
            # Later blocks go on where earlier ones stopped, as a reader would.
            program += code
            _run([sys.executable, "-c", program], code, place, env)
        elif tag == "bash":
            _run(["sh", "-e", "-c", code], code, place, env)
    assert (place / "report.html").is_file()
    assert len((place / "scores.csv").read_text(encoding="utf-8").splitlines()) == 61
    assert len(list((place / "masks").rglob("*_nuclei.tif"))) == 60


def _run(command: list[str], code: str, place: Path, env: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        pytest.fail(f"this README block failed:\n{code}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
