"""MiT's files: `step_<n>.ckpt` (global_step, ddp = raw weights, ema, opt), and our own pair. No sizes are stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from generators.adm import AdmNet, infer_config
from generators.checkpoints import CheckpointError, fill, read_own, read_pickle, shapes_of
from generators.mit_net import Adaptor, AdmMiTNet, FingerprintEmbedder, LabelEmbedder, MiTNet, Transformer
from generators.names import stored_names, stored_settings
from generators.shapes import Shapes

#: Width -> attention heads of the published variants S, B, L, XL: the one size that no shape tells.
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
#: Our names for the two sets of weights -> the file's.
WEIGHTS = {"ema": "ema", "raw": "ddp"}
WHAT = "a MiT checkpoint"
#: Settings that our own files keep -> what they may be, None aside.
KEPT = {
    "experiment": int, "cell_type": int, "guidance": int | float, "solver": str, "rtol": int | float,
    "atol": int | float, "grid": str, "steps": int, "step_size": int | float,
}  # fmt: skip


def read(path: Path, weights: str | None, heads: int | None) -> tuple[MiTNet | AdmMiTNet, dict[str, Any]]:
    """(network, settings: `compounds`, `weights`, `sampling`). Raises CheckpointError naming what is off."""
    if weights not in (None, *WEIGHTS):
        raise ValueError(f"weights={weights!r}: 'ema' or 'raw'")
    if path.suffix == ".safetensors":
        state, config = read_own(path, "mit")
        try:
            kept = {key: config[key] for key in ("compounds", "weights", "sampling", "heads")}
        except KeyError as error:
            raise CheckpointError(f"{path}: its JSON is not whole ({error.args[0]} is missing)") from None
        kept["sampling"] = stored_settings(kept["sampling"], KEPT, path)
        kept["compounds"] = stored_names(kept["compounds"], path)
        if weights not in (None, kept["weights"]):
            raise CheckpointError(
                f"{path}: holds the weights {kept['weights']!r}; convert the original with {weights!r}"
            )
        return build(state, path, kept.pop("heads") if heads is None else heads), kept
    weights = weights or "ema"
    state = _official(path, WEIGHTS[weights])
    return build(state, path, heads), {"compounds": None, "weights": weights, "sampling": {}}


def _official(path: Path, key: str) -> dict[str, Any]:
    content = read_pickle(path)
    held = content.get(key)
    if not isinstance(held, Mapping):
        some = ", ".join(repr(key) for key in list(content)[:6])
        raise CheckpointError(f"{path}: {key} is missing (it has {some}); give MiT's checkpoints/step_<n>.ckpt")
    # One prefix of the distributed wrapper, as the official code writes it.
    return {str(name).removeprefix("module."): value for name, value in held.items()}


def build(state: Mapping[str, Tensor], path: Path, heads: int | None) -> MiTNet | AdmMiTNet:
    """The network whose sizes the shapes tell, filled, in evaluation mode. Raises CheckpointError."""
    shape = Shapes(state, path, WHAT)
    with torch.device("meta"):
        if "adm.input_blocks.0.0.weight" in shape:
            net: MiTNet | AdmMiTNet = AdmMiTNet(_adm(state, path), _adaptor(shape))
        else:
            net = MiTNet(_transformer(shape, path, heads), _adaptor(shape))
    fill(net.to_empty(device="cpu"), state, path)
    return net.eval()


def _adm(state: Mapping[str, Tensor], path: Path) -> AdmNet:
    shapes = {key.removeprefix("adm."): s for key, s in shapes_of(state, path).items() if key.startswith("adm.")}
    try:
        return AdmNet(infer_config(shapes))
    except ValueError as error:
        raise CheckpointError(f"{path}: adm is no network of CellFlux's kind: {error}") from None


def _transformer(shape: Shapes, path: Path, heads: int | None) -> Transformer:
    _, tokens, width = shape("dit.pos_embed", 3)
    _, channels, patch, _ = shape("dit.x_embedder.proj.weight", 4)
    depth = shape.count("dit.blocks")
    hidden = shape("dit.blocks.0.mlp.fc1.weight", 2)[0]
    grid = math.isqrt(tokens)
    if grid * grid != tokens or width % 4:
        raise CheckpointError(f"{path}: dit.pos_embed has {tokens} places of width {width}: no square grid, or no MiT")
    if depth % 2:
        raise CheckpointError(f"{path}: dit.blocks has {depth} blocks, wanted an even number (long skips)")
    heads = HEADS.get(width) if heads is None else heads
    if heads is None:
        raise CheckpointError(
            f"{path}: the width {width} is none of {', '.join(map(str, HEADS))}; give the number of heads: heads="
        )
    if heads < 1 or width % heads:
        raise ValueError(f"heads={heads}: the width {width} of {path} cannot be divided by it")
    return Transformer(channels, grid * patch, patch, width, depth, heads, hidden)


def _adaptor(shape: Shapes) -> Adaptor:
    width, frequencies = shape("adaptor.t_embedder.mlp.0.weight", 2)
    prefix = "adaptor.y_embedder"
    if f"{prefix}.embs_array" in shape:
        rows, bits = shape(f"{prefix}.embs_array", 2)
        hidden = shape(f"{prefix}.blocks.0.mlp.fc1.weight", 2)[0]
        dose = shape(f"{prefix}.dose_embedder.mlp.0.weight", 2)[1]
        y: LabelEmbedder | FingerprintEmbedder = FingerprintEmbedder(
            rows, bits, width, hidden, shape.count(f"{prefix}.blocks"), dose
        )
    else:
        y = LabelEmbedder(shape(f"{prefix}.embedding_table.weight", 2)[0], width)
    e, c = (shape(f"adaptor.{name}_embedder.embedding_table.weight", 2)[0] for name in "ec")
    return Adaptor(width, frequencies, y, e, c)
