"""MiT (microscopy-flow-matching, Jones et al. 2026, arXiv 2603.26790): flow matching from noise on pixels.

The velocity network takes the state x, the time t and three labels: perturbation (compound and dose), experiment and
cell type. Controls do not enter; batch effects come in through the experiment. Guided velocity with weight w:
v(no perturbation) + w (v(perturbation) - v(no perturbation)), so w = 1 is none, and CellFlux's w is this one minus 1.

There are no published weights; a checkpoint holds no names and no sizes. Sizes are read off the shapes (all but the
number of heads, where the width is not a published one), names come from the user.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor

from generators.adaptive import Dopri5, choose
from generators.base import (
    Capabilities,
    Perturbation,
    Randomness,
    check_images,
    digest,
    evaluating,
    names_of,
    normal,
    to_unit,
)
from generators.checkpoints import locate, write_own
from generators.embeddings import unknown_compound
from generators.mit_files import read
from generators.mit_net import AdmMiTNet, FingerprintEmbedder, MiTNet
from generators.names import Names, read_names
from generators.solvers import Solver

#: One label for all images, one per image (B,) int64, or None: no label.
Label: TypeAlias = int | Tensor | None


class MiT:
    """A velocity network with labels and a solver. Fulfils `FlowGenerator`.

    compounds: names of the perturbation labels 0, 1, ... experiment, cell_type: the labels that images get where a call
    names no other; None is the trained "no label". guidance: w, 1 = one network pass per velocity; other values need a
    label table, which the fine-tuned variant (fingerprints) does not have. bfloat16: autocast, as on GPUs officially.
    """

    name = "mit"

    def __init__(
        self, net: MiTNet | AdmMiTNet, *, compounds: list[str], experiment: int | None = None,
        cell_type: int | None = None, guidance: float = 1.0, solver: Solver | Dopri5 | None = None,
        bfloat16: bool = False, compile: bool = False, checkpoint: str = "", weights: str = "ema",
    ) -> None:  # fmt: skip
        if not abs(guidance) < float("inf"):
            raise ValueError(f"guidance={guidance}: a finite number, 1 = none")
        self.net = net
        self._compounds, self._label = compounds, {name: i for i, name in enumerate(compounds)}
        self.experiment, self.cell_type, self.guidance = experiment, cell_type, guidance
        self.solver = solver or Dopri5()
        self.bfloat16, self.compile, self.checkpoint, self.weights = bfloat16, compile, checkpoint, weights
        self._doubled = True
        adaptor = net.adaptor
        self._check("experiment", experiment, adaptor.e_embedder.labels)
        self._check("cell_type", cell_type, adaptor.c_embedder.labels)
        if guidance != 1:
            self._null_row()
        if compile:
            net.compile()

    # ---- what it is --------------------------------------------------------------------------------------------

    @property
    def capabilities(self) -> Capabilities:
        """From noise; the transformer draws one size only."""
        if isinstance(self.net, AdmMiTNet):
            config = self.net.adm.config
            return Capabilities(True, True, False, config.channels, size_multiple=config.size_multiple)
        return Capabilities(True, True, False, self.net.dit.channels, size=self.net.dit.side)

    @property
    def compounds(self) -> list[str]:
        """Names of the perturbation labels, in label order."""
        return list(self._compounds)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.net.adaptor.e_embedder.embedding_table.weight.device

    def to(self, device: torch.device | str) -> Self:
        """Move the network, in place."""
        self.net.to(device)
        return self

    def describe(self) -> dict[str, Any]:
        """Everything that decides an image, as JSON."""
        return {
            "generator": self.name, "checkpoint": self.checkpoint, "weights": self.weights, "digest": digest(self.net),
            "experiment": self.experiment, "cell_type": self.cell_type, "guidance": self.guidance,
            **self._solving(), "bfloat16": self.bfloat16, "compile": self.compile,
        }  # fmt: skip

    def _solving(self) -> dict[str, Any]:
        s = self.solver
        if isinstance(s, Dopri5):
            return {"solver": s.method, "rtol": s.rtol, "atol": s.atol}
        steps = s.steps if s.step_size is None else None
        return {"solver": s.method, "grid": s.grid, "steps": steps, "step_size": s.step_size}

    # ---- labels ------------------------------------------------------------------------------------------------

    def embed(self, perturbation: Perturbation) -> Tensor | None:
        """Names -> labels int64 (B,) on the network's device. Tensors pass: labels int64 (B,), or condition rows float
        (B, width) as `embed_fingerprints` makes them; None passes.

        Raises ValueError for unknown names, labels that the table lacks, and rows of another width.
        """
        if perturbation is None:
            return None
        embedder = self.net.adaptor.y_embedder
        if not isinstance(perturbation, Tensor):
            names = names_of(perturbation, len(perturbation)) or []
            for name in names:
                if name not in self._label:
                    raise ValueError(unknown_compound(name, self._compounds, self.checkpoint or "this generator"))
            return torch.tensor([self._label[name] for name in names], dtype=torch.int64, device=self.device)
        given = perturbation.to(self.device)
        if given.is_floating_point():
            width = self.net.adaptor.e_embedder.embedding_table.embedding_dim
            if given.ndim != 2 or given.shape[1] != width:
                raise ValueError(
                    f"condition rows of shape {tuple(given.shape)}; wanted (B, {width}), or labels int64 (B,)"
                )
            return given.float()
        self._check("perturbation", given, embedder.labels)
        return given.long()

    def embed_fingerprints(self, fingerprints: Tensor, doses: Tensor) -> Tensor:
        """Condition rows (B, width) for compounds that the checkpoint does not have (fine-tuned variant only).

        fingerprints: (B, D), Morgan of D = 2048 bits as trained. doses: (B,), scaled to [0, 1] as `dose_array` is.
        """
        embedder = self.net.adaptor.y_embedder
        if not isinstance(embedder, FingerprintEmbedder):
            raise ValueError("this checkpoint has a table of labels, no fingerprint embedder (fine-tuned variant)")
        bits = embedder.embs_array.shape[1]
        if fingerprints.shape != (len(doses), bits) or doses.ndim != 1:
            raise ValueError(
                f"fingerprints {tuple(fingerprints.shape)} and doses {tuple(doses.shape)}: wanted (B, {bits}) and (B,)"
            )
        return embedder.embed(fingerprints.to(self.device, torch.float32), doses.to(self.device, torch.float32))

    @staticmethod
    def _check(what: str, label: Label, count: int) -> None:
        if isinstance(label, Tensor) and (label.ndim != 1 or label.is_floating_point() or label.is_complex()):
            raise ValueError(f"{what} labels {label.dtype} {tuple(label.shape)}: wanted int64 (B,)")
        values = label.tolist() if isinstance(label, Tensor) else [] if label is None else [label]
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
                raise ValueError(f"{what}={value}: this checkpoint has the labels 0 to {count - 1}")

    def _null_row(self) -> Tensor:
        embedder = self.net.adaptor.y_embedder
        if isinstance(embedder, FingerprintEmbedder):
            raise ValueError(
                "this checkpoint embeds fingerprints (fine-tuned variant) and has no row 'no perturbation': name a "
                "compound for every image, and use guidance=1"
            )
        return embedder.embedding_table.weight[embedder.labels]

    def _labels(self, what: str, label: Label, default: int | None, count: int) -> Tensor:
        """Labels int64 (B,) of experiment or cell type; "no label" is the table's last row."""
        label = default if label is None else label
        table = self.net.adaptor.e_embedder if what == "experiment" else self.net.adaptor.c_embedder
        self._check(what, label, table.labels)
        if isinstance(label, Tensor):
            if len(label) != count:
                raise ValueError(f"{len(label)} {what} labels for {count} images: give one per image, or one for all")
            return label.to(self.device, torch.int64)
        return torch.full((count,), table.labels if label is None else label, device=self.device)

    # ---- the flow ----------------------------------------------------------------------------------------------

    def source(self, control: Tensor, generator: Randomness = None) -> Tensor:
        """Start of the flow: standard normal of the control's shape."""
        return normal(control.shape, control.device, generator)

    def velocity(
        self, x: Tensor, t: Tensor | float, perturbation: Perturbation, *, drop: Tensor | None = None,
        experiment: Label = None, cell_type: Label = None,
    ) -> Tensor:  # fmt: skip
        """One pass of the network, float32 (B, C, H, W), without guidance; gradients flow where autograd is on.

        t: scalar or (B,). drop: bool (B,), True leaves the perturbation of that image out; experiment and cell type
        stay. Those are the generator's own where None.
        """
        count = len(x)
        t = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(count)
        y = self.embed(perturbation)
        if y is None:
            rows = self._null_row().expand(count, -1)
        else:
            if len(y) != count:
                raise ValueError(f"{len(y)} perturbations for {count} images: give one per image")
            rows = y if y.is_floating_point() else self.net.adaptor.y_embedder(y)
            if drop is not None:
                rows = torch.where(drop.to(x.device)[:, None], self._null_row(), rows)
        e = self._labels("experiment", experiment, self.experiment, count)
        c = self._labels("cell_type", cell_type, self.cell_type, count)
        with self._precision():
            out: Tensor = self.net(x, t, rows, e, c)
        return out.float()

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bfloat16 else nullcontext()

    def guided_velocity(
        self, x: Tensor, t: Tensor | float, perturbation: Perturbation, *, experiment: Label = None,
        cell_type: Label = None,
    ) -> Tensor:  # fmt: skip
        """The velocity that `sample` follows: with guidance, both passes as one batch of 2 B where memory allows."""
        y, w, count = self.embed(perturbation), self.guidance, len(x)
        if y is None or w in (0, 1):
            return self.velocity(x, t, None if w == 0 else y, experiment=experiment, cell_type=cell_type)
        if self._doubled:
            times = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(count).repeat(2)
            drop = torch.arange(2 * count, device=x.device) >= count
            try:
                both = self.velocity(
                    torch.cat([x, x]), times, torch.cat([y, y]), drop=drop, experiment=_twice(experiment),
                    cell_type=_twice(cell_type),
                )  # fmt: skip
            except torch.OutOfMemoryError:
                self._doubled = False
            else:
                conditional, null = both.chunk(2)
                return null + w * (conditional - null)
        conditional, null = (
            self.velocity(x, t, labels, experiment=experiment, cell_type=cell_type) for labels in (y, None)
        )
        return null + w * (conditional - null)

    def sample(
        self, control: Tensor, perturbation: Perturbation, *, steps: int | None = None, generator: Randomness = None,
        experiment: Label = None, cell_type: Label = None,
    ) -> Tensor:  # fmt: skip
        """Images float32 (B, C, H, W) in [0, 1]; of the controls only number and size matter. See `Generator.sample`.

        steps: for a fixed-step solver. experiment, cell_type: labels, one or one per image; None: the generator's own.
        """
        check_images(control, self.capabilities, self.name)
        names_of(perturbation, len(control))
        y = self.embed(perturbation)
        x = self.source(control.to(self.device, torch.float32), generator)
        with evaluating(self.net):
            x = self.solver(
                lambda x, t: self.guided_velocity(x, t, y, experiment=experiment, cell_type=cell_type), x, steps
            )
        return to_unit(x, self.capabilities.range)

    # ---- files -------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write NAME.safetensors and NAME.json with names and settings, which `load` reads."""
        heads = self.net.dit.heads if isinstance(self.net, MiTNet) else None
        settings = {
            "experiment": self.experiment,
            "cell_type": self.cell_type,
            "guidance": self.guidance,
        } | self._solving()
        config = {"heads": heads, "compounds": self._compounds, "weights": self.weights, "sampling": settings}
        write_own(Path(path), self.net.state_dict(), self.name, config)


def _twice(label: Label) -> Label:
    return torch.cat([label, label]) if isinstance(label, Tensor) else label


def load(
    checkpoint: str | os.PathLike[str], *, compounds: Names | None = None, heads: int | None = None,
    weights: str | None = None, experiment: int | None = None, cell_type: int | None = None,
    guidance: float | None = None, solver: str | None = None, rtol: float | None = None, atol: float | None = None,
    grid: str | None = None, steps: int | None = None, step_size: float | None = None, bfloat16: bool = False,
    compile: bool = False,
) -> MiT:  # fmt: skip
    """MiT from `checkpoints/step_<n>.ckpt` of microscopy-flow-matching, or from what `save` wrote.

    compounds: names of the perturbation labels (compound and dose) in label order, a list or a text file with one a
        line; fewer than the table has rows is fine. Without names labels are called "0", "1", ...
    heads: attention heads, where the width is none of 384, 768, 1024, 1152.
    weights: "ema" (default, as the official evaluation) or "raw".
    experiment, cell_type: labels of the images to draw; default none, and cell type 0 where there is only that one.
    guidance: w, 1 (default) = none, as the official sampler.
    solver: "dopri5" (default, official) with rtol and atol (1e-5), or "euler", "midpoint", "heun2" with steps (50) or
        step_size on the grid "uniform" (default) or "edm".
    Raises CheckpointError, ValueError, OSError, ImportError (torchdiffeq for dopri5).
    """
    path = locate(checkpoint)
    net, kept = read(path, weights, heads)
    adaptor = net.adaptor
    labels = read_names(
        kept["compounds"] if compounds is None else compounds, adaptor.y_embedder.labels, str(path), exact=False
    )
    own = kept["sampling"]
    if cell_type is None:
        cell_type = own.get("cell_type", 0 if adaptor.c_embedder.labels == 1 else None)
    return MiT(
        net, compounds=labels, cell_type=cell_type, bfloat16=bfloat16, compile=compile,
        checkpoint=os.fspath(checkpoint), experiment=own.get("experiment") if experiment is None else experiment,
        guidance=own.get("guidance", 1.0) if guidance is None else guidance, weights=kept["weights"],
        solver=choose(
            own if solver is None else {"solver": solver},
            {"rtol": rtol, "atol": atol, "grid": grid, "steps": steps, "step_size": step_size},
        ),
    )  # fmt: skip
