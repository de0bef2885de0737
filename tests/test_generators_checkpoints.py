"""Reading foreign files without running them; own files that belong together; the hub, with a hub of our own."""

from __future__ import annotations

import argparse
import builtins
import hashlib
import json
import os
import pathlib
import pickle
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import nn

from generators.checkpoints import (
    CheckpointError,
    fill,
    locate,
    read_own,
    read_pickle,
    read_safetensors,
    shapes_of,
    sidecar,
    write_own,
)
from tests.foreign import Call, touches

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


# ---- pickles ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("depth", ["top", "nested", "args"])
def test_code_in_a_file_is_not_run(tmp_path: Path, legacy: bool, depth: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "hostile.pth"
    bad = touches(marker)
    content = {
        "top": bad, "nested": {"model": {"w": torch.ones(2), "x": [bad]}},
        "args": {"model": {"w": torch.ones(2)}, "args": types.SimpleNamespace(seed=bad)},
    }[depth]  # fmt: skip
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"hostile\.pth: not read, .*(posix|nt)\.system.*Save the weights alone"):
        read_pickle(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "call",
    [
        Call(builtins.eval, "1+1"),
        Call(builtins.getattr, dict, "update"),
        Call(subprocess.check_output, ["true"]),
        Call(torch.load, "other.pth"),
        Call(pathlib.Path.write_text, pathlib.PurePosixPath("x"), "y"),
        Call(exec, "1"),
    ],
    ids=lambda call: call.function.__name__,
)
def test_no_call_outside_the_list(tmp_path: Path, call: Call) -> None:
    path = tmp_path / "hostile.pth"
    torch.save({"model": {"w": torch.ones(2)}, "x": call}, path)
    with pytest.raises(CheckpointError, match="more than data"):
        read_pickle(path)


def test_the_probe_would_run_in_an_unsafe_reader(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(touches(marker)))  # what read_pickle must never do
    assert marker.exists()


def test_a_plain_pickle_and_a_joblib_like_file_are_refused(tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "plain.pkl"
    path.write_bytes(pickle.dumps({"model": touches(marker)}))
    with pytest.raises(CheckpointError):
        read_pickle(path)
    assert not marker.exists()


@pytest.mark.parametrize("kind", [argparse.Namespace, types.SimpleNamespace])
def test_options_and_paths_are_read_as_data(tmp_path: Path, kind: type) -> None:
    args = kind(seed=3, job_dir=pathlib.PosixPath("runs/a"), ood=["taxol"], options={"nfe": 50})
    torch.save({"model": {"w": torch.ones(2)}, "args": args}, tmp_path / "a.pth")
    read = read_pickle(tmp_path / "a.pth")["args"]
    assert isinstance(read, kind)
    assert vars(read) == {**vars(args), "job_dir": pathlib.PurePosixPath("runs/a")}


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
@pytest.mark.parametrize("name", ["PosixPath", "WindowsPath"])
def test_paths_of_other_systems_and_pythons_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    """Python 3.13 writes pathlib._local.PosixPath; a Windows machine writes WindowsPath. Neither can be made here."""
    stand_in = types.new_class(name, exec_body=lambda space: space.update(__module__=module))
    there = types.ModuleType(module)
    there.__dict__.update(vars(pathlib), **{name: stand_in})
    monkeypatch.setitem(sys.modules, module, there)
    torch.save({"dir": Call(stand_in, "runs", "a")}, tmp_path / "a.pth")
    monkeypatch.undo()
    assert read_pickle(tmp_path / "a.pth")["dir"].parts == ("runs", "a")


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "whole.pth"
    torch.save({"model": {"w": torch.randn(64, 64)}}, path)
    return path


@pytest.mark.parametrize("part", [0.01, 0.3, 0.6, 0.95, 0.999])
def test_a_file_cut_short_is_named_so(whole: Path, part: float) -> None:
    data = whole.read_bytes()
    whole.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(CheckpointError, match=r"whole\.pth: damaged, cut short"):
        read_pickle(whole)


@pytest.mark.parametrize("at", range(0, 1200, 37))
def test_flipped_bytes_never_end_in_a_traceback(whole: Path, at: int) -> None:
    data = bytearray(whole.read_bytes())
    data[at] ^= 0xFF
    whole.write_bytes(bytes(data))
    try:
        read_pickle(whole)
    except CheckpointError as error:
        assert "whole.pth" in str(error)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
        (b"\x00" * 500, "damaged"),
        (b"just some text, no checkpoint at all", "damaged"),
        (b"PK\x03\x04" + b"\x00" * 100, "damaged"),
    ],
)
def test_other_files_are_named(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "file.pth"
    path.write_bytes(data)
    for reader in (read_pickle, read_safetensors) if says != "damaged" else (read_pickle,):
        with pytest.raises(CheckpointError, match=says):
            reader(path)


def test_folders_and_lists_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a folder"):
        read_pickle(tmp_path)
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list"):
        read_pickle(tmp_path / "list.pth")


# ---- into a network ---------------------------------------------------------------------------------------------


def state() -> dict[str, torch.Tensor]:
    return {"weight": torch.randn(3, 2), "bias": torch.randn(3)}


def test_fill_takes_half_precision_and_copies() -> None:
    net, values = nn.Linear(2, 3), state()
    fill(net, {key: value.half() for key, value in values.items()}, "f")
    assert torch.equal(net.weight, values["weight"].half().float())
    fill(net, values, "f")
    values["weight"].zero_()
    assert bool(net.weight.any())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("bias"), r"bias is missing \(1 of 2"),
        (lambda s: s.update(extra=torch.ones(1)), "extra does not belong"),
        (lambda s: s.update(weight=torch.ones(2, 3)), r"weight is \(2, 3\), wanted \(3, 2\)"),
        (lambda s: s.update(weight=[1, 2]), "weight is list"),
        (lambda s: s.update(bias=torch.ones(3, dtype=torch.int64)), r"bias is torch\.int64"),
        (lambda s: s["bias"].fill_(float("nan")), "bias holds NaN"),
        (lambda s: s["weight"][0].fill_(float("inf")), "weight holds NaN or infinity"),
    ],
)
def test_fill_names_the_key_that_is_off(change, says: str) -> None:
    values = state()
    change(values)
    with pytest.raises(CheckpointError, match=rf"file\.pth: {says}"):
        fill(nn.Linear(2, 3), values, "file.pth")


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "big.pth")
    assert (tmp_path / "big.pth").stat().st_size < 10_000
    with pytest.raises(CheckpointError, match="w is no plain tensor"):
        shapes_of(read_pickle(tmp_path / "big.pth"), "big.pth")
    assert shapes_of({"a": torch.ones(2, 3).T, "n": 1}, "f") == {"a": (3, 2)}


# ---- own files --------------------------------------------------------------------------------------------------


def test_own_pair_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "net.safetensors"
    values = state()
    write_own(path, values, "cellflux", {"a": [1, "x"]})
    tensors, config = read_own(path, "cellflux")
    assert config == {"a": [1, "x"]}
    assert all(torch.equal(tensors[key], values[key]) for key in values)
    assert sorted(p.name for p in path.parent.iterdir()) == ["net.json", "net.safetensors"]


def _edit(path: Path, **change: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: sidecar(p).unlink(), r"net\.json is missing beside it"),
        (lambda p: sidecar(p).write_text("{"), "no JSON"),
        (lambda p: sidecar(p).write_text("[1]"), "not written by biorewards"),
        (lambda p: _edit(sidecar(p), generator="impa"), "weights of 'impa', not of 'cellflux'"),
        (lambda p: _edit(sidecar(p), format=99), "format 99"),
        (lambda p: write_own(p.with_name("b.safetensors"), state(), "cellflux", {}) or
            p.write_bytes(p.with_name("b.safetensors").read_bytes()), "SHA-256 differs"),
        (lambda p: p.write_bytes(p.read_bytes()[:-5]), "no whole safetensors file"),
        (lambda p: p.write_bytes(b"\xff" * 100), "no whole safetensors file"),
    ],
)  # fmt: skip
def test_a_pair_that_does_not_fit_is_named(tmp_path: Path, change, says: str) -> None:
    path = tmp_path / "net.safetensors"
    write_own(path, state(), "cellflux", {})
    change(path)
    with pytest.raises(CheckpointError, match=says):
        read_own(path, "cellflux")


def test_own_files_have_one_suffix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"NAME\.safetensors"):
        write_own(tmp_path / "net.bin", state(), "cellflux", {})
    assert list(tmp_path.iterdir()) == []


# ---- finding ----------------------------------------------------------------------------------------------------


def test_local_paths(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").touch()
    assert locate(tmp_path, files=["unet/config.json"]) == tmp_path
    assert locate(str(tmp_path / "unet" / "config.json")).name == "config.json"
    with pytest.raises(FileNotFoundError, match=r"none\.pth: no such file"):
        locate(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match=r"scheduler"):
        locate(tmp_path, files=["unet/config.json", "scheduler/x.json"])
    with pytest.raises(CheckpointError, match="wanted a path"):
        locate(5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "source",
    ["hf://owner/repo/file.pth", "hf://owner/file.pth@main", "hf://owner/repo@main", "hf:/owner/repo/f@main",
     "hf://owner/repo/f@main#sha256=12", "hf://owner/repo/../f@main", "hf://o w/repo/f@main"],
)  # fmt: skip
def test_hub_addresses_need_every_part(source: str) -> None:
    with pytest.raises(CheckpointError, match=r"hf://owner/repo/path@revision|'\.\.' in a path"):
        locate(source)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download asks for: HEAD and GET of /owner/repo/resolve/revision/path."""

    files: dict[str, bytes]
    asked: list[str]

    def log_message(self, *args: object) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        owner, repo, _, revision, *path = (*self.path.split("?")[0].strip("/").split("/"), "", "", "", "")
        name = "/".join(path).strip("/")
        fault = (
            "RepoNotFound" if f"{owner}/{repo}" != "lab/models"
            else "RevisionNotFound" if revision not in (COMMIT, "main")
            else "EntryNotFound" if name not in self.files
            else None
        )  # fmt: skip
        if fault:
            self.send_response(404)
            self.send_header("X-Error-Code", fault)
            self.end_headers()
            return
        body = self.files[name]
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.asked.append(name)
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[type[Hub], dict[str, str]]]:
    """A hub on this machine, and the environment that makes huggingface_hub use it, with an empty cache."""
    kind = type("Served", (Hub,), {"files": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    env = {key: value for key, value in os.environ.items() if "proxy" not in key.lower() and not key.startswith("HF_")}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf")}
    yield kind, env
    server.shutdown()
    server.server_close()


FETCH = """
import sys, json
from generators.checkpoints import locate
for source, files, optional in json.loads(sys.argv[1]):
    try:
        path = locate(source, files, optional)
        names = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.name
        beside = sorted(p.name for p in path.parent.iterdir()) if path.is_file() else []
        print(json.dumps(["ok", names, beside]))
    except Exception as error:
        print(json.dumps([type(error).__name__, str(error), []]))
"""


def fetch(env: dict[str, str], *asks: tuple[str, list[str], list[str]]) -> list[list[object]]:
    """What `locate` gives or raises for each (source, files, optional), in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", FETCH, json.dumps(asks)], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_hub(hub: tuple[type[Hub], dict[str, str]]) -> None:
    served, env = hub
    body = b"weights"
    served.files = {
        "a/net.pth": body, "own/net.safetensors": b"s", "own/net.json": b"{}", "pipe/unet/config.json": b"{}",
        "pipe/scheduler/s.json": b"{}", "pipe/more.txt": b"", "top.pth": b"t",
    }  # fmt: skip
    right, wrong = hashlib.sha256(body).hexdigest(), "0" * 64
    at = f"hf://lab/models/a/net.pth@{COMMIT}"
    asks = [
        (at, [], []),
        (f"{at}#sha256={right}", [], []),
        (f"{at}#sha256={wrong}", [], []),
        (f"hf://lab/models/own/net.safetensors@{COMMIT}", [], []),
        (f"hf://lab/models/pipe@{COMMIT}", ["unet/config.json", "scheduler/s.json"], ["more.txt", "none.txt"]),
        ("hf://lab/models/top.pth@main", [], []),
        (f"hf://lab/models/a/none.pth@{COMMIT}", [], []),
        ("hf://lab/models/a/net.pth@v9", [], []),
        (f"hf://lab/none/a/net.pth@{COMMIT}", [], []),
        (f"hf://lab/models/pipe@{COMMIT}#sha256={right}", ["unet/config.json"], []),
    ]
    got = fetch(env, *asks)
    assert got[0][:2] == got[1][:2] == ["ok", "net.pth"]
    assert got[2][0] == "CheckpointError"
    assert right in got[2][1]
    assert got[3] == ["ok", "net.safetensors", ["net.json", "net.safetensors"]]
    assert got[4][:2] == ["ok", ["more.txt", "scheduler/s.json", "unet/config.json"]]
    assert got[5][:2] == ["ok", "top.pth"]
    assert got[6] == ["FileNotFoundError", f"{asks[6][0]}: lab/models at {COMMIT} has no file a/none.pth", []]
    assert got[7][0] == "CheckpointError"
    assert "has no revision 'v9'" in got[7][1]
    assert "no public repository lab/none" in got[8][1]
    assert "#sha256= checks one file" in got[9][1]
    assert served.asked.count("a/net.pth") == 1, "a pinned file is fetched once"

    # Offline: what was fetched is used, what was not has an error that says what to do.
    offline = {**env, "HF_HUB_OFFLINE": "1"}
    cached, missing = fetch(offline, asks[0], (f"hf://lab/models/b.pth@{COMMIT}", [], []))
    assert cached[:2] == ["ok", "net.pth"]
    assert missing[0] == "OSError"
    assert "connect once to fetch it, or download b.pth elsewhere and give its path" in missing[1]
