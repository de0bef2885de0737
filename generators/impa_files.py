"""IMPA's files: `<step>_nets.ckpt` with `<step>_embeddings.ckpt` beside it, Lightning checkpoints, and our own pair."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from generators.checkpoints import CheckpointError, fill, locate, read_own, read_pickle
from generators.embeddings import CompoundTable, kind_of
from generators.impa_net import IMPANet, StyleEncoder, StyleGenerator, StyleMapping
from generators.names import Names, read_names, stored_names, stored_settings
from generators.shapes import Shapes

#: The parts of a checkpoint that a prediction needs (the discriminator is left out).
NETS = ("generator", "mapping_network", "style_encoder")
TABLE = "embedding_matrix"
#: Rows of a CSV table and of a checkpoint are the same when no value differs by more.
SAME = 1e-5


def find(checkpoint: str | os.PathLike[str]) -> Path:
    """The networks' file: of a folder the one of the last step. Raises FileNotFoundError, CheckpointError, OSError."""
    text = os.fspath(checkpoint)
    name = Path(text.rpartition("@")[0] if text.startswith("hf:") else text).name
    if name.endswith("_nets.ckpt"):
        step = name.removesuffix("nets.ckpt")
        return locate(checkpoint, optional=[f"{step}embeddings.ckpt", f"{step}condition_embeddings.ckpt"])
    path = locate(checkpoint)
    if not path.is_dir():
        return path
    if not (steps := sorted(path.glob("*_nets.ckpt"))):
        raise FileNotFoundError(f"{path}: no file <step>_nets.ckpt in it; give IMPA's folder `checkpoint`")
    return steps[-1]


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, settings). All tensors under one naming, `<part>.<key>`, mappings and embeddings numbered by modality:
    `mapping_network.0.layers.0.weight`, `embedding_matrix.0.weight`. Settings are {} for a foreign file.
    """
    if path.suffix == ".safetensors":
        state, config = read_own(path, "impa")
        for key in ("modalities", "compounds"):
            if not isinstance(config.get(key), list):
                raise CheckpointError(f"{path}: its JSON is not whole ({key} is no list)")
        return state, {
            "modalities": stored_names(config["modalities"], path),
            "compounds": [stored_names(names, path) for names in config["compounds"]],
            "sampling": stored_settings(config.get("sampling"), {"z": str, "dequantise": bool}, path),
        }
    content = read_pickle(path)
    if isinstance(content.get("state_dict"), Mapping):  # Lightning: all parts in one
        flat = {str(key): value for key, value in content["state_dict"].items()}
    elif isinstance(content.get("generator"), Mapping):
        flat = {f"{part}.{key}": value for part in NETS for key, value in _part(content, part, path).items()}
        flat |= _embeddings(path)
    else:
        some = ", ".join(repr(key) for key in list(content)[:6])
        raise CheckpointError(f"{path}: generator is missing (it has {some}); give IMPA's <step>_nets.ckpt")
    state = {}
    for key, value in flat.items():
        part, _, rest = key.partition(".")
        if part.startswith("condition"):
            raise CheckpointError(f"{path}: {key}: models with condition embeddings are not supported")
        rest = rest.removeprefix("module.").removeprefix("mapping_network.")
        if part in ("mapping_network", TABLE) and not rest[:1].isdigit():
            rest = f"0.{rest}"
        if part in (*NETS, TABLE):
            state[f"{part}.{rest}"] = value
    return state, {}


def _part(content: Mapping[str, Any], part: str, path: Path) -> Mapping[str, Any]:
    found = content.get(part, {} if part == "style_encoder" else None)
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path}: {part} is missing: no whole IMPA checkpoint")
    return found


def _embeddings(nets: Path) -> dict[str, Any]:
    """The embedding rows, which the official code writes in a file beside the networks."""
    if not nets.name.endswith("_nets.ckpt"):
        raise CheckpointError(
            f"{nets}: its embedding rows cannot be found by this name; call the two files as IMPA does, "
            "<step>_nets.ckpt and <step>_embeddings.ckpt, in one folder"
        )
    stem = nets.name.removesuffix("nets.ckpt")
    if (extra := nets.with_name(f"{stem}condition_embeddings.ckpt")).exists():
        raise CheckpointError(f"{extra}: models with condition embeddings are not supported")
    path = nets.with_name(f"{stem}embeddings.ckpt")
    if not path.exists():
        raise FileNotFoundError(f"{path}: missing; it holds the embedding rows that {nets.name} was trained with")
    return {f"{TABLE}.{key}": value for key, value in _part(read_pickle(path), TABLE, path).items()}


def build(state: Mapping[str, Tensor], path: Path) -> IMPANet:
    """The networks whose sizes the shapes tell, filled. Raises CheckpointError naming the first key that is off."""
    shape = Shapes(state, path, "an IMPA checkpoint")

    def widths(prefix: str, first: str) -> list[int]:
        return [
            shape(first, 4)[0],
            *(shape(f"{prefix}.{i}.conv2.weight", 4)[0] for i in shape.numbers(prefix, "conv2")),
        ]

    blocks = shape.count("generator.encode", "conv1")
    if blocks < 2:
        raise CheckpointError(f"{path}: generator.encode.1 is missing: the last two blocks of an encoder do not pool")
    channels = shape("generator.from_rgb.weight", 4)[1]
    style = shape("generator.decode.0.norm1.fc.weight", 2)[1]
    mappings, noise = [], set()
    modalities = shape.count("mapping_network")
    if (held := len(shape.numbers(TABLE))) != modalities:
        raise CheckpointError(f"{path}: {modalities} mapping networks and {held} embedding tables; one each is wanted")
    for m in range(modalities):
        prefix = f"mapping_network.{m}.layers"
        layers = [shape(f"{prefix}.{i}.weight", 2) for i in shape.numbers(prefix)]
        if not layers:
            raise CheckpointError(f"{path}: {prefix}.0.weight is missing: not an IMPA checkpoint")
        mappings.append([layers[0][1], *(layer[0] for layer in layers)])
        noise.add(layers[0][1] - shape(f"{TABLE}.{m}.weight", 2)[1])
    if len(noise) > 1 or min(noise) < 0:
        raise CheckpointError(
            f"{path}: mapping_network takes {', '.join(str(w[0]) for w in mappings)} numbers, the embedding rows have "
            f"{', '.join(str(state[f'{TABLE}.{m}.weight'].shape[1]) for m in range(modalities))}: the two files do not "
            "belong together"
        )
    wanted = {key: value for key, value in state.items() if not key.startswith(TABLE)}
    with torch.device("meta"):
        encoder = None
        if "style_encoder.conv.0.weight" in shape:
            trunk = widths("style_encoder.conv", "style_encoder.conv.0.weight")
            kernel = shape(f"style_encoder.conv.{len(trunk) + 1}.weight", 4)[2]
            encoder = StyleEncoder(channels, trunk, style, kernel)
        generator = StyleGenerator(channels, widths("generator.encode", "generator.from_rgb.weight"), style)
        net = IMPANet(generator, [StyleMapping(w) for w in mappings], encoder, noise.pop())
    fill(net.to_empty(device="cpu"), wanted, path)
    return net


def tables(
    state: Mapping[str, Tensor], count: int, names: Names | Sequence[Names] | None,
    csvs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None, path: Path,
) -> list[CompoundTable]:  # fmt: skip
    """The compounds of each of `count` modalities; see `impa.load` for `names` and `csvs`."""
    return [
        _table(state[f"{TABLE}.{m}.weight"].float(), m, name, csv, path)
        for m, (name, csv) in enumerate(
            zip(_each(names, count, "compounds", path), _each(csvs, count, "embeddings", path), strict=True)
        )
    ]


def _each(values: Any, count: int, option: str, path: Path) -> list[Any]:
    """One value per modality; with a single modality the value may come without a list round it."""
    if values is None:
        return [None] * count
    alone = isinstance(values, str | os.PathLike) or (option == "compounds" and all(isinstance(v, str) for v in values))
    if alone and count == 1:
        return [values]
    if alone or len(values) != count:
        raise ValueError(f"{option}: {path} has {count} modalities; give a list with one entry for each, in its order")
    return list(values)


def _table(stored: Tensor, modality: int, names: Names | None, csv: Any, path: Path) -> CompoundTable:
    where = f"{TABLE}.{modality} of {path}"
    rows = None if names is None else read_names(names, len(stored), where)
    if csv is None:
        source = str(path) if rows else f"{path} (its rows are numbered: give compounds= or embeddings= to name them)"
        return CompoundTable(rows or read_names(None, len(stored), where), stored, source)
    table = CompoundTable.read_csv(locate(csv))
    if table.dim != stored.shape[1]:
        raise ValueError(f"{csv}: {table.dim} numbers a compound; {where} has {stored.shape[1]}")
    candidates = table.rows(rows)[:, None] if rows else table.values.expand(len(stored), -1, -1)
    for i, (row, own) in enumerate(zip(stored, candidates, strict=True)):
        if float((own - row).abs().amax(1).min()) > SAME:
            what = f"the row of {rows[i]!r} is not" if rows else "no row is"
            raise ValueError(
                f"{csv}: {what} row {i} of {where}, so this is not the table it was trained with "
                f"(the table holds {table.kind} values, the checkpoint {kind_of(stored)})"
            )
    return table
