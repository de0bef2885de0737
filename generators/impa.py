"""IMPA: a control image drawn again in the style of a perturbation (conditional GAN, one pass, no velocity).

    generator = generators.load("impa", "checkpoint/000200_nets.ckpt", embeddings="emb_fp.csv")
    images = generator.sample(control, ["taxol"] * 8, generator=torch.Generator().manual_seed(0))

All sizes are read off the files. What the files lack: the names of the embedding rows (`compounds`, or `embeddings`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

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
from generators.checkpoints import write_own
from generators.embeddings import CompoundTable, kind_of, unknown_compound
from generators.impa_files import TABLE, build, find, read, tables
from generators.impa_net import IMPANet
from generators.names import Names

#: How the noise of a style is made: one normal draw (official evaluation), the mean of 100 (the tutorials of
#: bbbc021_six and rxrx1: standard deviation 0.1), or zeros (no randomness in the style).
Z_MODES = ("draw", "mean", "zero")
Z_DRAWS = 100
#: Ones in a binary fingerprint from which on it is told from counts that happen to be 0 and 1.
TELLING = 20


class IMPA:
    """`Generator` for IMPA checkpoints. Not post-trainable: a GAN has no velocity.

    tables: the compounds of each modality, in the checkpoint's order. modalities: their names, which tell apart a name
    that several of them have ("ORF:TP53"). z: one of `Z_MODES`. dequantise: add the uniform noise below one 8-bit step
    that the official code adds to every image it reads, in evaluation, too.
    """

    name = "impa"

    def __init__(
        self,
        net: IMPANet,
        tables: list[CompoundTable],
        *,
        modalities: list[str],
        z: str = "draw",
        dequantise: bool = False,
        checkpoint: str = "",
    ) -> None:
        if z not in Z_MODES:
            raise ValueError(f"z={z!r}: one of {', '.join(Z_MODES)}")
        self.net = net.eval().requires_grad_(False)
        self.tables, self.modalities = tables, modalities
        self.z, self.dequantise, self.checkpoint = z, dequantise, checkpoint
        places: dict[str, list[tuple[int, int]]] = {}
        for m, table in enumerate(tables):
            for row, compound in enumerate(table.names):
                places.setdefault(compound, []).append((m, row))
        self._rows = {  # what a name stands for: (modality, row of its table)
            compound if len(where) == 1 else f"{modalities[m]}:{compound}": (m, row)
            for compound, where in places.items()
            for m, row in where
        }
        self._aliases = {f"{modalities[m]}:{tables[m].names[row]}": (m, row) for m, row in self._rows.values()}

    @property
    def capabilities(self) -> Capabilities:
        """One pass of a convolutional network, any size from two pixels of the encoder's code upwards."""
        return Capabilities(
            post_trainable=False,
            stochastic=self.dequantise or self.z != "zero",
            uses_control=True,
            channels=self.net.generator.from_rgb.in_channels,
            size_multiple=2**self.net.generator.levels,
        )

    @property
    def compounds(self) -> list[str]:
        """Names of all modalities; "modality:name" for a name that several of them have."""
        return list(self._rows)

    def parts(self, perturbation: Perturbation, count: int) -> list[tuple[Tensor, int, Tensor]]:
        """(images, modality, embedding rows (n, D) of that modality) for each modality in a batch of `count`.

        Raises ValueError for None (IMPA has no unconditional pass), unknown names and vectors of another length.
        """
        device = self.net.generator.from_rgb.weight.device
        if perturbation is None:
            raise ValueError("IMPA has no unconditional pass: name a compound for every image")
        if isinstance(perturbation, Tensor):
            fits = [m for m, table in enumerate(self.tables) if perturbation.shape == (count, table.dim)]
            if len(fits) != 1:
                widths = ", ".join(f"{m}: {t.dim}" for m, t in zip(self.modalities, self.tables, strict=True))
                problem = "several modalities have rows of this length; give names" if fits else "wanted (B, D)"
                raise ValueError(
                    f"embedding rows of shape {tuple(perturbation.shape)} for {count} images: {problem} (D {widths})"
                )
            if not bool(torch.isfinite(perturbation).all()):
                raise ValueError("an embedding row holds NaN or infinity")
            given = perturbation.to(device, torch.float32)
            if (
                kind_of(given) == "binary"
                and self.tables[fits[0]].kind == "counts"
                and float(given.sum(1).max()) >= TELLING
            ):
                raise ValueError("these rows are binary fingerprints; this network was trained on fingerprint counts")
            return [(torch.arange(count, device=device), fits[0], given)]
        rows = [self._find(compound) for compound in names_of(perturbation, count) or []]
        parts = []
        for m in sorted({m for m, _ in rows}):
            images = [i for i, (modality, _) in enumerate(rows) if modality == m]
            vectors = self.tables[m].values[[rows[i][1] for i in images]]
            parts.append((torch.tensor(images, device=device), m, vectors.to(device)))
        return parts

    def _find(self, compound: str) -> tuple[int, int]:
        place = self._rows.get(compound) or self._aliases.get(compound)
        if place is None:
            if several := [alias for alias in self._aliases if alias.partition(":")[2] == compound]:
                raise ValueError(f"{compound!r} is in several modalities; write {' or '.join(map(repr, several))}")
            raise ValueError(unknown_compound(compound, self.compounds, self.tables[0].source))
        return place

    def noise(self, count: int, generator: Randomness = None) -> Tensor:
        """z (B, length) float32 in the mode of this generator."""
        device = self.net.generator.from_rgb.weight.device
        if self.z == "zero":
            return torch.zeros(count, self.net.z, device=device)
        if self.z == "mean":
            return normal((count, Z_DRAWS, self.net.z), device, generator).mean(1)
        return normal((count, self.net.z), device, generator)

    def style(self, perturbation: Perturbation, z: Tensor) -> Tensor:
        """Styles (B, S) of a perturbation and noise z (B, length)."""
        parts = self.parts(perturbation, len(z))
        styles = [self.net.mapping_network[m](vectors, z[images]) for images, m, vectors in parts]
        order = torch.cat([images for images, _, _ in parts]).argsort()
        return torch.cat(styles)[order]

    def sample(
        self, control: Tensor, perturbation: Perturbation, *, steps: int | None = None, generator: Randomness = None
    ) -> Tensor:
        """Treated images float32 (B, C, H, W) in [0, 1] from controls of the same shape and range; see `Generator`.

        steps: there are none; anything but None and 1 is refused. From `generator` come first the noise on the pixels,
        then z.
        """
        if steps not in (None, 1):
            raise ValueError(f"steps={steps}: IMPA draws in one pass; leave it out")
        x = self.pixels(control, generator)
        with evaluating(self.net):
            styles = self.style(perturbation, self.noise(len(control), generator))
            return to_unit(self.net.generator(x, styles), self.capabilities.range)

    def reconstruct(self, images: Tensor, *, generator: Randomness = None) -> Tensor:
        """Images in [0, 1] drawn again in their own style, [0, 1]: what the network loses without any perturbation."""
        if self.net.style_encoder is None:
            raise ValueError(f"{self.checkpoint} has no style_encoder, which reconstruction needs")
        x = self.pixels(images, generator)
        with evaluating(self.net):
            return to_unit(self.net.generator(x, self.net.style_encoder(x)), self.capabilities.range)

    def pixels(self, images: Tensor, generator: Randomness = None) -> Tensor:
        """[0, 1] -> the network's range and device, with the noise of dequantisation: (255 v + u) / 255 * 2 - 1."""
        check_images(images, self.capabilities, self.name)
        least = 2 * self.capabilities.size_multiple
        if min(images.shape[2:]) < least:
            raise ValueError(f"impa needs at least {least}x{least} px; these images are {tuple(images.shape[2:])}")
        x = images.to(self.net.generator.from_rgb.weight.device, torch.float32)
        if self.dequantise:
            x = (x * 255 + uniform(x.shape, x.device, generator)) / 255
        return to_range(x, self.capabilities.range)

    def to(self, device: torch.device | str) -> Self:
        """Move the networks to a device, in place."""
        self.net.to(device)
        return self

    def describe(self) -> dict[str, Any]:
        """Everything that decides an image, as JSON."""
        settings = {"modalities": self.modalities, "z": self.z, "dequantise": self.dequantise}
        return {"generator": self.name, "checkpoint": self.checkpoint, "digest": digest(self.net), **settings}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write networks, tables and settings as NAME.safetensors and NAME.json, which `load` reads."""
        tensors = dict(self.net.state_dict())
        tensors |= {f"{TABLE}.{m}.weight": table.values for m, table in enumerate(self.tables)}
        names = [table.names for table in self.tables]
        sampling = {"z": self.z, "dequantise": self.dequantise}
        config = {"modalities": self.modalities, "compounds": names, "sampling": sampling}
        write_own(Path(path), tensors, self.name, config)


def load(
    checkpoint: str | os.PathLike[str],
    *,
    embeddings: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    compounds: Names | Sequence[Names] | None = None,
    modalities: Sequence[str] | None = None,
    z: str | None = None,
    dequantise: bool | None = None,
) -> IMPA:
    """An IMPA model from `<step>_nets.ckpt` (its `<step>_embeddings.ckpt` beside it), a folder of them (the last step),
    a Lightning checkpoint, or what `save` wrote.

    compounds: names of the checkpoint's embedding rows in order (= sorted training perturbations), a list or a text
        file with one a line. Without names rows are called "0", "1", ...
    embeddings: a CSV table of names and vectors (emb_fp.csv), which names the rows and adds compounds that were not
        trained on. Every row of the checkpoint must be in it.
    Both are given once per modality, in the checkpoint's order, where there are several. modalities: their names.
    z, dequantise: see `IMPA`; default "draw" and False, or what `save` kept.
    Raises CheckpointError for a file that is no such checkpoint, ValueError for names and tables that do not fit it.
    """
    path = find(checkpoint)
    state, kept = read(path)
    net = build(state, path)
    count = len(net.mapping_network)
    labels = list(modalities or kept.get("modalities") or map(str, range(count)))
    if len(labels) != count or len(set(labels)) != count:
        raise ValueError(f"modalities={labels}: {path} has {count}, each with a name of its own")
    held = tables(state, count, kept.get("compounds") if compounds is None else compounds, embeddings, path)
    given = {key: value for key, value in (("z", z), ("dequantise", dequantise)) if value is not None}
    return IMPA(net, held, modalities=labels, checkpoint=os.fspath(checkpoint), **kept.get("sampling", {}) | given)
