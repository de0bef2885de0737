"""What a check of the verifiers works with: real images, the rewards on trial, and one way to score anything.

A check is a function of a `Bench`. In short:

    def my_check(bench: Bench) -> list[Finding]:
        rows = bench.some(bench.n)                      # (k,) numbers of real images, classes evenly, by the seed
        images = bench.images(rows)                     # (k, C, H, W) float32 in [0, 1], read now
        masks = bench.masks(rows)                       # nuclei and cells, (k, H, W) int32 each; exact where known
        target = bench.target[rows]                     # (k,) int64, index into bench.assay.classes
        harmed = apply("blur", images, masks, 2.0, channels=bench.assay.channels, seed=bench.seed).images
        before, after = bench.real(rows), bench.score(harmed, target)
        drop = before.value["moa"] - after.value["moa"]         # pandas columns, one a reward; NaN where unscored
        low, high = bench.interval(drop.to_numpy())             # 95 % of the mean
        return [Finding("my_check", "moa", "...", drop.mean(), (low, high), "<= 0.05", bool(drop.mean() <= 0.05), len(rows))]

`bench.rows` is a table of all real images that may be used (class, compound, dose, plate, batch, well, site, split,
file; "" where unknown); `bench.treated` and `bench.controls` are row numbers. Every image is scored once, whoever asks:
results are remembered by pixels and target, in memory and in `folder`. So score what you need when you need it.

The rewards on trial are `bench.suite.rewards` (name -> Reward), by default the seven of the assay. Any others may
stand trial, such as positive controls: `Bench.build(assay, manifest, rewards={"mine": Mine()})`. Its `repr` must say
everything that moves its numbers: it is part of the fingerprint. Checks name no reward unless the check is about that
one; they loop over `bench.suite.rewards` and read what a reward says about itself (`label_free`, `worst`).

`bench.judged_by(assay, rewards)` is the same images before other judges (another segmenter, another classifier).
`bench.rng("my_check")` is the check's own random generator. Where something is missing (plates, a classifier, several
compounds) a check returns `not_judged(...)` with the reason instead of raising.
"""  # noqa: E501

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from biorewards.assay import RELATIVE_FLOOR, Assay
from biorewards.audit.bootstrap import bounded, resample
from biorewards.audit.encoder import Encoder
from biorewards.audit.samples import thin
from biorewards.batch import Batch
from biorewards.io.images import ImageError
from biorewards.io.manifest import Manifest, ManifestError
from biorewards.io.reading import Reader, plan_reading
from biorewards.io.tables import atomic
from biorewards.io.targets import assign_targets
from biorewards.reward import Reason, Reward, Suite
from biorewards.rewards import suite
from biorewards.segmentation.segmenter import Masks
from biorewards.validate.scores import MISSING, Scores

Rows = npt.NDArray[np.intp]
__all__ = ["MISSING", "POOL", "Bench", "N", "Rows", "Scores"]

#: Images that a check damages or repeats at many doses, and real images that all checks draw from.
N, POOL = 40, 800
#: Resamples behind an interval of a check: the ends of 95 % intervals move by a twentieth of their width with these.
RESAMPLES = 500
#: Metadata that `Bench.rows` has, where a manifest knows them.
COLUMNS = ("Compound", "Dose", "Plate", "Batch", "Well", "Site", "Split", "State", "File")


@dataclass(frozen=True)
class Bench:
    """Real images and the rewards on trial. Made by `Bench.build`; see the module's text for its use.

    rows: one row a real image. target: (N,) int64, its class in `assay.classes`. source: its row in `manifest`.
    n: images that a check should damage or repeat; seed: of everything drawn. notes: what was left out, and why.
    folder: where scores are kept for a rerun, None for memory alone. tell: called with the number of images judged.
    """

    assay: Assay
    suite: Suite
    manifest: Manifest
    reader: Reader
    rows: pd.DataFrame
    target: npt.NDArray[np.int64]
    source: Rows
    n: int = N
    seed: int = 0
    batch_size: int = 16
    device: str = "cpu"
    folder: Path | None = None
    notes: tuple[str, ...] = ()
    tell: Callable[[int], None] | None = None
    _known: dict[bytes, npt.NDArray[np.float32]] = field(default_factory=dict, repr=False)
    _made: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls, assay: Assay, manifest: Manifest, rewards: Mapping[str, Reward] | Suite | None = None, *,
        reader: Reader | None = None, n: int = N, pool: int = POOL, seed: int = 0, batch_size: int = 16,
        device: str = "cpu", folder: Path | None = None, tell: Callable[[int], None] | None = None,
    ) -> Bench:  # fmt: skip
        """Take at most `pool` labelled, readable real images, the classes thinned alike.

        rewards: instead of the assay's seven, name -> reward (weights 1), or a suite. Raises ManifestError without
        labelled, readable images.
        """
        reader = plan_reading(manifest, assay) if reader is None else reader
        targets = assign_targets(manifest.table, assay.classes, assay.compounds)
        labelled = np.flatnonzero(targets.target >= 0)
        notes = [*manifest.notes, *targets.notes]
        if left := len(targets.target) - len(labelled):
            notes.append(f"{left} of {len(targets.target)} images have no label that the assay knows and are left out")
        source, problem = _readable(reader, thin(targets.target, labelled, pool, seed), notes)
        if not len(source):
            raise ManifestError(f"{manifest.root}: no labelled real image can be read{problem}")
        table = targets.table.iloc[source].reset_index(drop=True)
        rows = pd.DataFrame({"class": table["Metadata_MoA"]})
        for name in COLUMNS:
            rows[name.lower()] = table[f"Metadata_{name}"].astype(str) if f"Metadata_{name}" in table else ""
        assay.to(device)
        bench = cls(
            assay, _judge(assay, rewards), manifest, reader, rows, targets.target[source], source, n, seed, batch_size,
            device, folder, tuple(notes), tell,
        )  # fmt: skip
        bench._recall()
        return bench

    def judged_by(self, assay: Assay, rewards: Mapping[str, Reward] | None = None) -> Bench:
        """The same real images before other judges, weights by name as here; nothing remembered is shared."""
        weights = {name: weight for name, weight in self.suite.weights.items() if rewards and name in rewards}
        judge = suite(assay) if rewards is None else Suite(list(rewards.values()), weights, assay.fingerprint)
        assay.to(self.device)
        other = replace(self, assay=assay, suite=judge, _known={}, _made={})
        other._recall()
        return other

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def treated(self) -> Rows:
        """Numbers of the real images that do not show the control class."""
        return np.flatnonzero(self.target != 0)

    @property
    def controls(self) -> Rows:
        """Numbers of the real images that show the control class."""
        return np.flatnonzero(self.target == 0)

    @cached_property
    def fingerprint(self) -> str:
        """Hash over everything that moves a finding: judges, images, labels, n and seed."""
        stated = [self.suite.fingerprint, self.reader.settings(), self.n, self.seed, self.target.tolist()]
        files = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for k in self.source for f in self.manifest.files[k]]
        return hashlib.sha256(repr((stated, files)).encode("utf-8", "replace")).hexdigest()[:16]

    def rng(self, check: str) -> np.random.Generator:
        """The random generator of a check, the same whichever checks ran before."""
        return np.random.default_rng([self.seed, *hashlib.sha256(check.encode()).digest()[:4]])

    def once(self, what: str, compute: Callable[[], Any]) -> Any:
        """What several checks need and is dear to make: computed when it is first asked for, then kept."""
        if what not in self._made:
            self._made[what] = compute()
        return self._made[what]

    def some(self, most: int, among: Rows | None = None) -> Rows:
        """At most `most` of the real images (`among` them), the classes thinned alike; the same ones each time."""
        return thin(self.target, np.arange(len(self)) if among is None else among, most, self.seed)

    def images(self, rows: Sequence[int] | Rows) -> Tensor:
        """(k, C, H, W) float32 in [0, 1], read from their files."""
        return torch.from_numpy(np.stack([self.reader(int(self.source[row])).pixels for row in rows]))

    @cached_property
    def exact_masks(self) -> bool:
        """Whether true masks lie beside the images, as `biorewards phantom` writes them."""
        return self._mask_file(0).is_file()

    def masks(self, rows: Sequence[int] | Rows) -> Masks:
        """Nuclei and cells of real images, (k, H, W) int32 each: exact ones where they are known, else segmented."""
        if self.exact_masks:
            files = [np.load(self._mask_file(int(row)), allow_pickle=False) for row in rows]
            return Masks(*(torch.from_numpy(np.stack([f[name] for f in files]).astype(np.int32))
                           for name in ("nuclei", "cells")))  # fmt: skip
        parts = []
        with torch.inference_mode():
            for images, _ in self._batches(self.images(rows), np.full(len(rows), -1)):
                parts.append(Batch(images, None, self.assay).masks)
        return Masks(*(torch.cat(part)[: len(rows)].cpu().int() for part in zip(*parts, strict=True)))

    def real(self, rows: Sequence[int] | Rows | None = None) -> Scores:
        """Scores of real images, judged by their own labels; all of them by default."""
        chosen = np.arange(len(self)) if rows is None else np.asarray(rows)
        seen: dict[int, npt.NDArray[np.float32]] = self.once("real", dict)
        new = np.array([row for row in dict.fromkeys(chosen.tolist()) if row not in seen], np.intp)
        for part in (new[k : k + 256] for k in range(0, len(new), 256)):
            seen.update(zip(part.tolist(), self._scored(self.images(part), self.target[part]), strict=True))
        return self._unpack(np.stack([seen[row] for row in chosen.tolist()]))

    def spread(self, reward: str) -> float:
        """Standard deviation of a reward over real images: the unit of what checks measure. NaN where there is none.

        At least 2 % of what lies between its worst value and 0 or 1 (as an assay floors its standard deviations): a
        reward that is 1.000 in nearly every real image would otherwise fall by hundreds of units at a scratch.
        """
        value = self.real().value[reward]
        worst = getattr(self.suite.rewards[reward], "worst", None)
        floor = 0.0 if worst is None else RELATIVE_FLOOR * (1.0 if worst == 0 else abs(worst))
        found = max(float(value.std()), floor) if value.notna().any() else float("nan")
        return found if found > 0 else float("nan")

    def score(self, images: Tensor, target: npt.ArrayLike) -> Scores:
        """Scores of any images (B, C, H, W) float32, judged as if each were of the class in target (B,)."""
        return self._unpack(self._scored(images, np.broadcast_to(np.asarray(target, np.int64), len(images))))

    def interval(self, values: npt.ArrayLike) -> tuple[float, float]:
        """95 % confidence interval of the mean of (N,) values of images; NaN counts as absent."""
        column = np.asarray(values, np.float64)
        sums = resample(column[:, None], np.zeros(len(column), np.intp), 1, seed=self.seed, resamples=RESAMPLES)
        return bounded(sums.mean[:, 0, 0])

    def interval_of(
        self, statistic: Callable[[Rows], float], n: int, resamples: int = RESAMPLES
    ) -> tuple[float, float, float]:
        """(value, low, high) of a statistic of n images, given as a function of the row numbers that are drawn.

        Percentiles of the draws: correlations, ranks and ratios have ends that other intervals run over.
        """
        rng = np.random.default_rng(self.seed)
        draws = np.array([statistic(rng.integers(n, size=n)) for _ in range(resamples)], np.float64)
        found = draws[np.isfinite(draws)]
        if 2 * len(found) < resamples:
            return statistic(np.arange(n)), float("nan"), float("nan")
        low, high = np.quantile(found, [0.025, 0.975])
        return statistic(np.arange(n)), float(low), float(high)

    def _mask_file(self, row: int) -> Path:
        file = self.manifest.files[self.source[row]][0]
        inside = Path(*file.parts[len(self.manifest.root.parts) :])
        return (self.manifest.root / "masks" / inside).with_suffix(".npz")

    def _batches(self, images: Tensor, target: npt.NDArray[np.int64]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of one size, the last filled up with zeros, so that an image's numbers do not depend on others."""
        for start in range(0, len(images), self.batch_size):
            part = torch.zeros(self.batch_size, *images.shape[1:])
            label = torch.full((self.batch_size,), -1)
            here = images[start : start + self.batch_size]
            part[: len(here)] = here
            label[: len(here)] = torch.from_numpy(target[start : start + self.batch_size].copy())
            yield part.to(self.device), label.to(self.device)

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.assay)

    def _scored(self, images: Tensor, target: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """(B, 3 R + D): values, measures, reasons and features; only of images that were never seen before."""
        images = images.cpu()
        pixels = images.contiguous().numpy()
        keys = [hashlib.blake2b(p.tobytes() + t.tobytes()).digest() for p, t in zip(pixels, target, strict=True)]
        first = {key: place for place, key in reversed(list(enumerate(keys)))}
        new = [place for key, place in first.items() if key not in self._known]
        found = []
        with torch.inference_mode():
            for part, label in self._batches(images[new], target[new]):
                batch = Batch(part, label, self.assay)
                features = self._encoder(batch)
                scores = self.suite(batch).scores.values()
                columns = [
                    torch.stack([getattr(s, what).float() for s in scores], 1)
                    for what in ("value", "measure", "reason")
                ]
                found.append(torch.cat([*columns, features], 1).float().cpu().numpy())
                if self.tell is not None:
                    self.tell(min(self.batch_size, len(new) - self.batch_size * (len(found) - 1)))
        if new:
            table = np.concatenate(found)[: len(new)]
            self._known.update(zip((keys[place] for place in new), table, strict=True))
            self._keep([keys[place] for place in new], table)
        return np.stack([self._known[key] for key in keys])

    def _unpack(self, table: npt.NDArray[np.float32]) -> Scores:
        names = list(self.suite.rewards)
        value, measure, reason, features = np.split(table, [len(names) * k for k in (1, 2, 3)], axis=1)
        text = np.array([one.name for one in Reason], dtype=object)[reason.astype(int)]
        first, second, third = (
            pd.DataFrame(p, columns=names) for p in (value.astype(float), measure.astype(float), text)
        )
        return Scores(first, second, third, self._encoder.split(features))

    @property
    def _shelf(self) -> Path | None:
        """Folder of remembered scores of exactly these judges."""
        what = f"{self.suite.fingerprint}-{self._encoder.fingerprint}-{self.batch_size}-{self.device}".replace(":", "")
        return None if self.folder is None else self.folder / what

    def _keep(self, keys: list[bytes], table: npt.NDArray[np.float32]) -> None:
        if self._shelf is None:
            return
        name = hashlib.sha256(b"".join(keys)).hexdigest()[:16]
        with atomic(self._shelf / f"{name}.npz") as (temporary,), temporary.open("wb") as stream:
            np.savez(stream, keys=np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1), table=table)

    def _recall(self) -> None:
        for path in sorted(self._shelf.glob("*.npz")) if self._shelf is not None else ():
            with np.load(path, allow_pickle=False) as file:
                self._known.update(zip((key.tobytes() for key in file["keys"]), file["table"], strict=True))


def _judge(assay: Assay, rewards: Mapping[str, Reward] | Suite | None) -> Suite:
    if isinstance(rewards, Suite):
        return rewards
    return suite(assay) if rewards is None else Suite(list(rewards.values()), None, assay.fingerprint)


def _readable(reader: Reader, rows: Rows, notes: list[str]) -> tuple[Rows, str]:
    """The rows that can be read and have the commonest size; what is wrong with the first of the others."""
    sizes: dict[int, tuple[int, ...]] = {}
    problem = ""
    for row in rows:
        try:
            sizes[int(row)] = reader(int(row)).pixels.shape
        except ImageError as error:
            problem = problem or f"; the first: {error}"
    if unread := len(rows) - len(sizes):
        notes.append(f"{unread} of {len(rows)} real images cannot be read and are left out{problem}")
    shapes = list(sizes.values())
    common = max(set(shapes), key=shapes.count) if shapes else None
    kept = [row for row, shape in sizes.items() if shape == common]
    if other := len(sizes) - len(kept):
        notes.append(f"{other} real images are of another size than {common} and are left out")
    return np.array(kept, dtype=np.intp), problem
