"""Checkpoints: found on disk or on the Hugging Face Hub, read without running code, kept as safetensors + JSON.

A pickle is read with `weights_only=True` and a list of a few harmless classes; there is no way round it. What is not
on the list makes an error. Own files are a pair NAME.safetensors (weights) and NAME.json (what they mean, and the
SHA-256 of the weights).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import pickle
import re
import types
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from biorewards.io.tables import atomic

FORMAT = 1
#: Classes that training scripts put beside the weights: their options and paths. Data only, no code runs. Paths come
#: back as pure ones, so that a file from another system can be read; Python 3.13 calls their module pathlib._local.
ALLOWED: list[Any] = [
    argparse.Namespace,
    types.SimpleNamespace,
    *(
        (pure, f"{module}.{kind}")
        for module in ("pathlib", "pathlib._local")
        for kind, pure in (
            ("PosixPath", pathlib.PurePosixPath),
            ("WindowsPath", pathlib.PureWindowsPath),
            ("PurePosixPath", pathlib.PurePosixPath),
            ("PureWindowsPath", pathlib.PureWindowsPath),
        )
    ),
]
_HUB = re.compile(
    r"hf://(?P<repo>[\w.-]+/[\w.-]+)/(?P<path>[^@#]+)@(?P<revision>[^@#]+)(#sha256=(?P<sha>[0-9a-fA-F]{64}))?"
)
#: What torch and safetensors raise for a file that is not as it should be. The file was opened before, so an OSError
#: is no missing file.
_DAMAGE = (
    pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError,
    TypeError, AssertionError, MemoryError, OverflowError, zipfile.BadZipFile,
)  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, what is wrong and what to do."""


# ---- finding ----------------------------------------------------------------------------------------------------


def locate(source: str | os.PathLike[str], files: Iterable[str] = (), optional: Iterable[str] = ()) -> Path:
    """A local path for a checkpoint: the file or folder itself, or a downloaded and cached copy.

    source: a path, or `hf://owner/repo/path@revision`, `#sha256=HEX` after it to check the file. A full commit hash as
        revision is a pin; a branch or tag can move.
    files: names below `source` that are wanted where it is a folder (none: it is one file). optional: names in the
        same folder (beside the file where it is one) that are taken along where they exist.
    Raises FileNotFoundError, CheckpointError (form, checksum), OSError (offline, no such repository).
    """
    if not isinstance(source, str | os.PathLike):
        raise CheckpointError(f"{source!r}: wanted a path, or hf://owner/repo/path@revision")
    text = os.fspath(source)
    if not text.startswith("hf:"):
        local = Path(text).expanduser()
        for wanted in [local / name for name in files] or [local]:
            if not wanted.exists():
                raise FileNotFoundError(f"{wanted}: no such file")
        return local
    match = _HUB.fullmatch(text)
    if match is None:
        raise CheckpointError(f"{text}: write hf://owner/repo/path@revision, with a commit hash (or tag) as revision")
    path, sha = match["path"].strip("/"), match["sha"]
    if ".." in path.split("/"):
        raise CheckpointError(f"{text}: '..' in a path of a repository")
    wanted_files = list(files)
    if sha and wanted_files:
        raise CheckpointError(f"{text}: #sha256= checks one file, this is a folder; pin it by a commit hash")
    folder = path if wanted_files else path.rpartition("/")[0]
    join = (folder + "/") if folder else ""
    got = [_download(match["repo"], f"{join}{name}", match["revision"], text) for name in wanted_files]
    if not wanted_files:
        got = [_download(match["repo"], path, match["revision"], text)]
        if sha and (found := sha256(got[0])) != sha.lower():
            raise CheckpointError(f"{text}: the file has SHA-256 {found}; it is not the one asked for")
    if path.endswith(".safetensors"):
        optional = [*optional, sidecar(Path(path)).name]
    for name in optional:
        try:
            _download(match["repo"], f"{join}{name}", match["revision"], text)
        except FileNotFoundError:
            continue
    return _up(got[0], wanted_files[0]) if wanted_files else got[0]


def _up(path: Path, name: str) -> Path:
    """The folder that holds `name`, from the path of that file."""
    return path.parents[len(pathlib.PurePosixPath(name).parts) - 1]


def _download(repo: str, path: str, revision: str, source: str) -> Path:
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(repo, path, revision=revision))
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{source}: {repo} has no revision {revision!r}") from None
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{source}: {repo} asks for consent; accept on its page, then log in: hf auth login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{source}: no public repository {repo} (a private one needs a login: hf auth login)"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise OSError(
            f"{source}: not in the local cache, and the hub cannot be reached; connect once to fetch it, or download "
            f"{path} elsewhere and give its path ({type(error).__name__})"
        ) from None
    except errors.EntryNotFoundError:
        raise FileNotFoundError(f"{source}: {repo} at {revision} has no file {path}") from None
    except errors.HFValidationError as error:
        raise CheckpointError(f"{source}: {error}") from None
    except (errors.HfHubHTTPError, OSError) as error:
        raise OSError(f"{source}: the download failed: {str(error).splitlines()[0]}") from None


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ---- reading ----------------------------------------------------------------------------------------------------


def read_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a `torch.save` file, tensors on the CPU and mapped from the file, so only what is used is read.

    Raises CheckpointError for a file that is damaged, no checkpoint, or holds anything but data.
    """
    _refuse_placeholders(path)
    try:
        with torch.serialization.safe_globals(ALLOWED), warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except _DAMAGE as error:
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{path}: not read, because it holds more than data: {found[1]}. Such a file can run code when it is "
                "opened. Save the weights alone (state dicts of tensors) on the machine that trained them"
            ) from None
        reason = str(error).partition("WeightsUnpickler error:")[2] or str(error)
        raise CheckpointError(
            f"{path}: damaged, cut short or no torch checkpoint ({path.stat().st_size:,} bytes): "
            f"{_first_line(reason)}; fetch it again"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dictionary of weights")
    return content


def _first_line(reason: str) -> str:
    return (reason.strip() or "no reason given").splitlines()[0][:200]


def _refuse_placeholders(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(f"{path}: a folder; give the checkpoint file in it")
    with path.open("rb") as stream:
        head = stream.read(64)
    if not head:
        raise CheckpointError(f"{path}: empty")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: a Git LFS pointer, not the weights; fetch them with: git lfs pull")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise CheckpointError(f"{path}: a web page, not a checkpoint; download the file itself")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped from it. Raises CheckpointError for a damaged one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _refuse_placeholders(path)
    try:
        return load_file(path)
    except (SafetensorError, *_DAMAGE) as error:
        raise CheckpointError(f"{path}: no whole safetensors file: {_first_line(str(error))}") from None


def sidecar(path: Path) -> Path:
    """NAME.json beside NAME.safetensors."""
    return path.with_suffix(".json")


def read_own(path: Path, generator: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and settings of a pair that `write_own` wrote for `generator` ("cellflux").

    Raises CheckpointError where the JSON is missing, of another generator or format, or of other weights.
    """
    meta_path = sidecar(path)
    try:
        meta = json.loads(meta_path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: {meta_path.name} is missing beside it; the two files belong together") from None
    except ValueError as error:
        raise CheckpointError(f"{meta_path}: no JSON: {error}") from None
    if not isinstance(meta, dict) or not isinstance(meta.get("config"), dict):
        raise CheckpointError(f"{meta_path}: not written by biorewards (no config)")
    if meta.get("generator") != generator:
        raise CheckpointError(f"{meta_path}: weights of {meta.get('generator')!r}, not of {generator!r}")
    if meta.get("format") != FORMAT:
        raise CheckpointError(f"{meta_path}: format {meta.get('format')!r}; this version reads {FORMAT}")
    tensors = read_safetensors(path)
    if meta.get("sha256") != sha256(path):
        raise CheckpointError(f"{path}: not the weights that {meta_path.name} was written for (SHA-256 differs)")
    return tensors, meta["config"]


def write_own(path: Path, tensors: Mapping[str, Tensor], generator: str, config: Mapping[str, Any]) -> None:
    """Write NAME.safetensors and NAME.json, both or none. Raises ValueError for another suffix."""
    from safetensors.torch import save_file

    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: weights are written as NAME.safetensors")
    with atomic(path, sidecar(path)) as (weights, meta):
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, weights)
        text = {"format": FORMAT, "generator": generator, "sha256": sha256(weights), "config": dict(config)}
        meta.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")


# ---- checking ---------------------------------------------------------------------------------------------------


def shapes_of(state: Mapping[str, Any], path: Path | str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a state dict. Raises CheckpointError for one that claims more than the file holds.

    A tensor can repeat one stored number (stride 0); a network made to its shape would fill the memory.
    """
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    for key, value in tensors.items():
        plain = value.layout is torch.strided and value.device.type == "cpu"
        if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: {key} is no plain tensor of {tuple(value.shape)} stored numbers")
    return {key: tuple(value.shape) for key, value in tensors.items()}


def fill(net: nn.Module, state: Mapping[str, Any], path: Path | str) -> None:
    """Copy `state` into `net`, every tensor and nothing else. Raises CheckpointError naming the first key that is off.

    Accepts any floating type (float16 files, too) for a float32 net; refuses values that are not finite.
    """
    wanted = net.state_dict()
    if missing := [key for key in wanted if key not in state]:
        raise CheckpointError(f"{path}: {missing[0]} is missing ({len(missing)} of {len(wanted)} tensors are)")
    if extra := [key for key in state if key not in wanted]:
        raise CheckpointError(f"{path}: {extra[0]} does not belong to this network ({len(extra)} such keys)")
    for key, want in wanted.items():
        value = state[key]
        if not isinstance(value, Tensor) or value.shape != want.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(f"{path}: {key} is {got}, wanted {tuple(want.shape)}")
        if value.is_floating_point() != want.is_floating_point():
            raise CheckpointError(f"{path}: {key} is {value.dtype}, wanted {want.dtype}")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{path}: {key} holds NaN or infinity; the training run broke down or the file did")
        with torch.no_grad():
            want.copy_(value)
