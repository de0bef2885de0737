"""CellFlux (Zhang et al. 2025): flow matching from control cells to treated cells.

The velocity network takes the state x, the time t and the compound's embedding c. Guided velocity with weight w:
(1 + w) v(x, t, c) - w v(x, t, no condition). Images inside are in [-1, 1].
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from generators.adm import GROUPS, AdmConfig, AdmNet
from generators.base import (
    Capabilities,
    Perturbation,
    Randomness,
    check_images,
    digest,
    evaluating,
    names_of,
    normal,
    to_range,
    to_unit,
    uniform,
)
from generators.cellflux_files import SOURCES, TABLE, Origin, read, resolve, write_official
from generators.checkpoints import locate, write_own
from generators.embeddings import KINDS, CompoundTable, kind_of
from generators.solvers import Solver

#: Bits that a binary fingerprint given as a tensor must have before it is told from counts that happen to be 0 and 1.
TELLING_BITS = 20


class CellFlux:
    """A velocity network with a source, a solver and a compound table. Fulfils `FlowGenerator`.

    source_mode: where the flow starts: "noise" (standard normal), "control", or "control_plus_noise" (control +
        noise_level * normal). guidance: w, 0 = one network pass per velocity.
    fingerprints: what the network was trained on ("counts", "binary", "real", "any"); other tables are refused.
    dequantise: add the uniform noise below one 8-bit step that the official code adds to every image it reads.
    channels_last, bfloat16 (autocast), compile: the fast path; off by default, so that numbers are float32 everywhere.
    """

    name = "cellflux"

    def __init__(
        self, net: AdmNet, *, table: CompoundTable | None = None, source_mode: str = "control_plus_noise",
        noise_level: float = 1.0, guidance: float = 0.2, solver: Solver | None = None, fingerprints: str = "any",
        dequantise: bool = False, channels_last: bool = False, bfloat16: bool = False, compile: bool = False,
        origin: Origin | None = None, checkpoint: str = "", weights: str = "raw",
    ) -> None:  # fmt: skip
        if source_mode not in SOURCES:
            raise ValueError(f"source={source_mode!r}: one of {', '.join(SOURCES)}")
        if not 0 <= noise_level < float("inf"):
            raise ValueError(f"noise_level={noise_level}: a finite number, 0 or more")
        if not abs(guidance) < float("inf"):
            raise ValueError(f"guidance={guidance}: a finite number, 0 = none")
        if fingerprints not in KINDS:
            raise ValueError(f"fingerprints={fingerprints!r}: one of {', '.join(KINDS)}")
        self.net = net
        self.table = table
        self.source_mode, self.noise_level, self.guidance = source_mode, noise_level, guidance
        self.solver = solver or Solver()
        self.fingerprints, self.dequantise = fingerprints, dequantise
        self.channels_last, self.bfloat16, self.compile = channels_last, bfloat16, compile
        self.origin, self.checkpoint, self.weights = origin or Origin(), checkpoint, weights
        #: Guidance as one batch of 2 B; None: on an accelerator, where it is quicker. On a CPU it is 1.1 x slower.
        self.doubled: bool | None = None
        if table is not None:
            if table.dim != net.config.condition:
                raise ValueError(
                    f"{table.source} has {table.dim} columns a compound; the network takes {net.config.condition}"
                )
            table.expect_kind(fingerprints, "this network")
        if channels_last:
            net.to(memory_format=torch.channels_last)
        if compile:
            net.compile()

    @classmethod
    def create(
        cls, *, compounds: Sequence[str] | CompoundTable, channels: int = 3, width: int = 32,
        mult: tuple[int, ...] = (1, 2, 3), blocks: int = 2, attention: tuple[int, ...] = (4,), dropout: float = 0.0,
        source: str = "control_plus_noise", noise_level: float = 1.0, guidance: float = 0.2,
        solver: Solver | None = None,
    ) -> Self:  # fmt: skip
        """A fresh network to train; it returns velocity 0 until then. Draw its weights under `torch.manual_seed`.

        compounds: a table, or names, each of which then gets a learned embedding of its own (a one-hot row; the
        network's first layer is the embedding). Groups of normalisation: width / 4, at most 32 (from width 128 on).
        """
        table = (
            compounds
            if isinstance(compounds, CompoundTable)
            else CompoundTable(list(compounds), torch.eye(len(compounds)), "the list of compounds")
        )
        groups = max(1, min(GROUPS, width // 4))
        net = AdmNet(AdmConfig(channels, table.dim, width, tuple(mult), blocks, tuple(attention), dropout, groups))
        return cls(
            net, table=table, source_mode=source, noise_level=noise_level, guidance=guidance, solver=solver,
            fingerprints=table.kind,
        )  # fmt: skip

    # ---- what it is --------------------------------------------------------------------------------------------

    @property
    def capabilities(self) -> Capabilities:
        """Channels and size multiple of the network; stochastic unless it starts from the control itself."""
        config = self.net.config
        return Capabilities(
            post_trainable=True, stochastic=self.source_mode != "control" or self.dequantise,
            uses_control=self.source_mode != "noise", channels=config.channels, size_multiple=config.size_multiple,
            floors=True,
        )  # fmt: skip

    @property
    def compounds(self) -> list[str] | None:
        """Names in the table; None without one."""
        return None if self.table is None else list(self.table.names)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.net.mol_embed_transform.weight.device

    def to(self, device: torch.device | str) -> Self:
        """Move the network, in place."""
        self.net.to(device)
        return self

    def describe(self) -> dict[str, Any]:
        """Everything that decides an image, as JSON."""
        return {
            "generator": self.name, "checkpoint": self.checkpoint, "weights": self.weights, "digest": digest(self.net),
            **self._sampling(), "dequantise": self.dequantise, "bfloat16": self.bfloat16, "compile": self.compile,
        }  # fmt: skip

    def _sampling(self) -> dict[str, Any]:
        s = self.solver
        return {
            "source": self.source_mode, "noise_level": self.noise_level, "guidance": self.guidance, "solver": s.method,
            "grid": s.grid, "steps": s.steps if s.step_size is None else None, "step_size": s.step_size,
        }  # fmt: skip

    # ---- the flow ----------------------------------------------------------------------------------------------

    def source(self, control: Tensor, generator: Randomness = None) -> Tensor:
        """Start of the flow, float32 (B, C, H, W), from controls in [-1, 1]."""
        if self.source_mode == "control":
            return control
        noise = normal(control.shape, control.device, generator)
        return noise if self.source_mode == "noise" else control + self.noise_level * noise

    def embed(self, perturbation: Perturbation) -> Tensor | None:
        """Names -> rows (N, D) of the table, on the network's device; a tensor (N, D) as float32; None as None.

        Raises ValueError for unknown names, names without a table, and rows of another width.
        """
        if perturbation is None:
            return None
        if not isinstance(perturbation, Tensor):
            names = names_of(perturbation, len(perturbation)) or []
            if self.table is None:
                raise ValueError(
                    "this checkpoint has no compound table: load it with embeddings=CSV (for BBBC021 emb_fp.csv of the "
                    "IMPA archive), or give embedding rows (N, D)"
                )
            return self.table.rows(names).to(self.device)
        if perturbation.ndim != 2 or perturbation.shape[1] != self.net.config.condition:
            raise ValueError(
                f"embedding rows of shape {tuple(perturbation.shape)}; wanted (N, {self.net.config.condition})"
            )
        return perturbation.to(self.device, torch.float32)

    def velocity(
        self, x: Tensor, t: Tensor | float, perturbation: Perturbation, *, drop: Tensor | None = None
    ) -> Tensor:
        """One pass of the network, float32 (B, C, H, W), without guidance; gradients flow where autograd is on.

        t: scalar or (B,) in [0, 1]. drop: bool (B,), True leaves the condition of that image out.
        """
        t = torch.as_tensor(t, dtype=torch.float32, device=x.device)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with self._precision():
            out: Tensor = self.net(x, t, self.embed(perturbation), drop)
        return out.float()

    def _precision(self) -> AbstractContextManager[Any]:
        # Not autocast(enabled=False): that would switch off a trainer's own autocast.
        return torch.autocast(self.device.type, torch.bfloat16) if self.bfloat16 else nullcontext()

    def guided_velocity(self, x: Tensor, t: Tensor | float, perturbation: Perturbation) -> Tensor:
        """The velocity that `sample` follows: with guidance, both passes as one batch of 2 B where memory allows.

        After one failure for want of memory, and on a CPU, two passes of B.
        """
        condition, w = self.embed(perturbation), self.guidance
        if condition is None or w == 0:
            return self.velocity(x, t, condition)
        t = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))
        if self.doubled or (self.doubled is None and x.device.type != "cpu"):
            drop = torch.arange(2 * len(x), device=x.device) >= len(x)
            try:
                both = self.velocity(torch.cat([x, x]), torch.cat([t, t]), torch.cat([condition, condition]), drop=drop)
            except torch.OutOfMemoryError:
                self.doubled = False
            else:
                conditional, null = both.chunk(2)
                return (1 + w) * conditional - w * null
        return (1 + w) * self.velocity(x, t, condition) - w * self.velocity(x, t, None)

    def sample(
        self, control: Tensor, perturbation: Perturbation, *, steps: int | None = None, generator: Randomness = None
    ) -> Tensor:
        """Treated images float32 (B, C, H, W) in [0, 1] from controls; see `Generator.sample`."""
        check_images(control, self.capabilities, self.name)
        condition = self._checked(perturbation, len(control))
        x = to_range(self._dequantised(control.to(self.device, torch.float32), generator), self.capabilities.range)
        with evaluating(self.net):
            y = self.solver(lambda x, t: self.guided_velocity(x, t, condition), self.source(x, generator), steps)
        return to_unit(y, self.capabilities.range)

    def _dequantised(self, images: Tensor, generator: Randomness) -> Tensor:
        return images + uniform(images.shape, images.device, generator) / 255 if self.dequantise else images

    def _checked(self, perturbation: Perturbation, count: int) -> Tensor | None:
        names_of(perturbation, count)
        rows = self.embed(perturbation)
        if rows is None:
            return None
        if len(rows) != count:
            raise ValueError(f"{len(rows)} embedding rows for {count} images: give one row per image")
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("an embedding row holds NaN or infinity")
        if (
            isinstance(perturbation, Tensor)
            and self.fingerprints == "counts"
            and kind_of(rows) == "binary"
            and bool((rows.sum(1) >= TELLING_BITS).any())
        ):
            CompoundTable([str(i) for i in range(count)], rows, "the tensor").expect_kind("counts", "this network")
        return rows

    # ---- files -------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], *, raw: Mapping[str, Tensor] | None = None) -> None:
        """Write the network: NAME.safetensors (and NAME.json) with table and settings, or NAME.pth as CellFlux does.

        raw: raw weights beside the averaged ones of `net`, for .pth only. Raises ValueError for another suffix.
        """
        path = Path(path)
        if path.suffix in (".pth", ".pt"):
            write_official(path, self.net, raw, self.origin)
            return
        if raw is not None:
            raise ValueError(f"{path}: only the .pth layout holds raw weights beside the average")
        tensors = dict(self.net.state_dict())
        config = {
            "net": asdict(self.net.config), "sampling": self._sampling(), "dequantise": self.dequantise,
            "weights": self.weights, "fingerprints": self.fingerprints, "origin": asdict(self.origin),
        }  # fmt: skip
        if self.table is not None:
            tensors[TABLE] = self.table.values
            config["compounds"] = self.table.names
        write_own(path, tensors, self.name, config)


def load(
    checkpoint: str | os.PathLike[str], *, embeddings: str | os.PathLike[str] | CompoundTable | None = None,
    weights: str | None = None, source: str | None = None, noise_level: float | None = None,
    guidance: float | None = None, solver: str | None = None, grid: str | None = None, steps: int | None = None,
    step_size: float | None = None, fingerprints: str | None = None, dequantise: bool | None = None,
    channels_last: bool = False, bfloat16: bool = False, compile: bool = False,
) -> CellFlux:  # fmt: skip
    """CellFlux from an official checkpoint (.pth), or from NAME.safetensors with NAME.json beside it.

    The network's shape is inferred from the weights; the settings of sampling are the file's own where it has them
    (`args`), else those of the published evaluation, and options override both.

    embeddings: CSV of compounds (name, then D numbers), or a table; replaces that of a .safetensors file.
    weights: "ema" or "raw" (.pth); default: the average where the file has one.
    The other options are described at `CellFlux` and `Solver`. Raises CheckpointError, ValueError, OSError.
    """
    if weights not in (None, "ema", "raw"):
        raise ValueError(f"weights={weights!r}: 'ema' or 'raw'")
    for name, flag in (
        ("dequantise", dequantise), ("channels_last", channels_last), ("bfloat16", bfloat16), ("compile", compile),
    ):  # fmt: skip
        if flag not in (None, True, False):
            raise ValueError(f"{name}={flag!r}: true or false")
    path = locate(checkpoint)
    net, table, kept = read(path, weights)
    chosen = {
        "source": source, "noise_level": noise_level, "guidance": guidance, "solver": solver, "grid": grid,
        "steps": steps, "step_size": step_size,
    }  # fmt: skip
    sampling = resolve(kept.pop("sampling"), chosen, path)
    if embeddings is not None:
        table = embeddings if isinstance(embeddings, CompoundTable) else CompoundTable.read_csv(locate(embeddings))
    kept |= {k: v for k, v in (("fingerprints", fingerprints), ("dequantise", dequantise)) if v is not None}
    return CellFlux(
        net, table=table, checkpoint=os.fspath(checkpoint), channels_last=channels_last, bfloat16=bfloat16,
        compile=compile, **sampling, **kept,
    )  # fmt: skip
