"""The entry point: quick help, unknown commands, and errors as one line."""

from __future__ import annotations

import resource
import subprocess
import sys
import types
from pathlib import Path

import click
import pytest

from biorewards import __version__
from cli import main as entry

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "torchvision", "timm", "numpy", "scipy", "skimage", "pandas", "pyarrow", "PIL", "tifffile")


def after(*args: str) -> set[str]:
    """Heavy modules loaded after one command line, in a fresh interpreter."""
    code = (
        "import sys; from cli.main import run; status = run(sys.argv[1:]); "
        f"print('LOADED', status, *(name for name in {HEAVY!r} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, check=True)
    _, status, *loaded = done.stdout.splitlines()[-1].split()
    assert status == "0", done.stderr
    return set(loaded)


@pytest.mark.parametrize("args", [("--help",), ("--version",), *((name, "--help") for name in entry.COMMANDS)])
def test_help_loads_nothing_heavy(args: tuple[str, ...]) -> None:
    assert after(*args) == set()


def test_the_probe_sees_a_heavy_import() -> None:
    code = f"import numpy, sys; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "numpy" in done.stdout.split()


def test_help_is_quick() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "cli.main", "--help"], cwd=ROOT, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time, not wall time: other work on the machine must not fail the test.
    assert (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime) < 0.5


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.run(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in entry.COMMANDS)


@pytest.mark.parametrize("name", entry.COMMANDS)
def test_every_command_exists(name: str) -> None:
    command = entry.commands.get_command(click.Context(entry.commands), name)
    assert isinstance(command, click.Command)
    assert command.help


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.run(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(("given", "hint"), [("scor", "'score'"), ("segmnet", "'segment'"), ("zzzz", "There are:")])
def test_unknown_command_names_the_nearest(given: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.run([given]) == 2
    text = capsys.readouterr().err
    assert given in text
    assert hint in text


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> dict[str, BaseException | None]:
    """A command `fail` that raises what the dictionary holds, and exits with 1 where that is None."""
    box: dict[str, BaseException | None] = {"raise": None}

    @click.command()
    @click.pass_context
    def command(ctx: click.Context) -> None:
        if box["raise"] is not None:
            raise box["raise"]
        ctx.exit(1)

    module = types.ModuleType("failing_command")
    module.command = command  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "failing_command", module)
    monkeypatch.setitem(entry.COMMANDS, "fail", ("failing_command", "Fails."))
    monkeypatch.delenv("BIOREWARDS_DEBUG", raising=False)
    return box


@pytest.mark.parametrize("error", [ValueError("a.csv: no column 'file'"), FileNotFoundError(2, "gone", "a.png")])
def test_errors_are_one_line(
    error: Exception, failing: dict[str, BaseException | None], capsys: pytest.CaptureFixture[str]
) -> None:
    failing["raise"] = error
    assert entry.run(["fail"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"error: {error}"
    assert "Traceback" not in "".join(lines)


def test_debug_shows_the_traceback(failing: dict[str, BaseException | None], monkeypatch: pytest.MonkeyPatch) -> None:
    failing["raise"] = ValueError("wrong")
    monkeypatch.setenv("BIOREWARDS_DEBUG", "1")
    with pytest.raises(ValueError, match="wrong"):
        entry.run(["fail"])
    monkeypatch.setenv("BIOREWARDS_DEBUG", "0")
    assert entry.run(["fail"]) == 2
    with pytest.raises(ValueError, match="wrong"):
        entry.run(["--debug", "fail"])


def test_a_bug_is_not_dressed_up(failing: dict[str, BaseException | None]) -> None:
    failing["raise"] = TypeError("a bug")
    with pytest.raises(TypeError):
        entry.run(["fail"])


def test_interrupt_and_exit_status(failing: dict[str, BaseException | None]) -> None:
    failing["raise"] = KeyboardInterrupt()
    assert entry.run(["fail"]) == 130
    failing["raise"] = None
    assert entry.run(["fail"]) == 1
