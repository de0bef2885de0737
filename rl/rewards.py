"""From images to what the loss needs: the suite of `biorewards score`, and advantages within groups of rollouts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from biorewards.assay import MIN_IMAGES, TREATED, Assay
from biorewards.batch import Batch
from biorewards.fitting import BATCH, measure_images, reference_statistics
from biorewards.memory import choose_batch_size
from biorewards.resample import resample
from biorewards.reward import Reason, Reward, Suite
from rl.policy import digest_of

if TYPE_CHECKING:
    from rl.pool import Real

#: Added to a standard deviation before it divides (DiffusionNFT).
EPSILON = 1e-4
#: A group whose totals differ by less, relative to their size, tells nothing.
NO_SPREAD = 1e-6
MODES = ("total", "per-reward")


class Judged(NamedTuple):
    """Scores of B images, CPU: value, measure (B, R) float32, reason (B, R) uint8; probabilities (B, n), n = 0
    without a classifier."""

    value: Tensor
    measure: Tensor
    reason: Tensor
    probabilities: Tensor

    @property
    def nothing(self) -> Tensor:
        """(B,) bool: no nucleus, no cell, or blank."""
        worst = torch.tensor([Reason.NO_NUCLEUS, Reason.NO_CELL, Reason.BLANK], dtype=torch.uint8)
        return torch.isin(self.reason, worst).any(1)


class Judge:
    """Scores images of a generator with the rewards of an assay, at the assay's pixel size.

    rewards: a `Suite`, or any `Reward` or list of them. scale: assay pixels a pixel of the images. `weights` (R,).
    """

    def __init__(
        self, rewards: Suite | Reward | list[Reward], assay: Assay, *, scale: float = 1.0, batch_size: int | None = None
    ) -> None:
        if not isinstance(rewards, Suite):
            rewards = Suite(rewards if isinstance(rewards, list) else [rewards], fingerprint=assay.fingerprint)
        self.suite, self.assay, self.scale, self.batch_size = rewards, assay, scale, batch_size
        self.names = list(rewards.rewards)
        self.weights = torch.tensor([rewards.weights[name] for name in self.names])

    @property
    def fingerprint(self) -> str:
        """Hash over everything that moves a score."""
        return digest_of(self.suite.fingerprint, repr(self.scale))

    @torch.inference_mode()
    def __call__(self, images: Tensor, target: Tensor) -> Judged:
        """images: (B, C, H, W) float32 in [0, 1], any device; target: (B,) int64. ValueError for a wrong size."""
        size = images.shape[2] * self.scale, images.shape[3] * self.scale
        if (crop := self.assay.crop_size) is not None and any(round(side) != crop for side in size):
            raise ValueError(
                f"images are {images.shape[2]} x {images.shape[3]} px, {size[0]:.4g} x {size[1]:.4g} at the pixel size "
                f"of assay {self.assay.name}, which wants {crop} x {crop}: largest objects and counts would not compare"
            )
        step = self.batch_size or choose_batch_size(images.device, round(size[0] * size[1]))
        parts = [self._part(images[k : k + step], target[k : k + step]) for k in range(0, len(images), step)]
        if not parts:
            none = torch.zeros(0, len(self.names))
            return Judged(none, none, none.to(torch.uint8), torch.zeros(0, 0))
        return Judged(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _part(self, images: Tensor, target: Tensor) -> Judged:
        batch = Batch(resample(images, self.scale), target, self.assay)
        scores = self.suite(batch).scores.values()
        # Another reward may never have asked for them; sentinels watch the classes in any case.
        probabilities = batch.class_probabilities
        none = torch.zeros(len(batch), 0)
        return Judged(
            torch.stack([s.value.float() for s in scores], 1).cpu(),
            torch.stack([s.measure.float() for s in scores], 1).cpu(),
            torch.stack([s.reason for s in scores], 1).cpu(),
            none if probabilities is None else probabilities.float().cpu(),
        )

    def total(self, value: Tensor) -> Tensor:
        """(...,) weighted sum of (..., R) values, as the suite's total: NaN where a part is missing."""
        return (value * self.weights).sum(-1)


def fitted(assay: Assay, real: Real, scale: float) -> tuple[Assay, list[str]]:
    """The assay that images of another pixel size are judged by, and notes about it: `matched` where they are resampled
    and real images are there, else the assay as it is. Whoever trains and whoever selects judges by this one."""
    if scale == 1:
        return assay, []
    if max(real.target.bincount(minlength=len(assay.classes)).tolist()) < MIN_IMAGES:
        return assay, [
            f"images are resampled by {scale:g} for assay {assay.name}, and there are no real images to measure its "
            "statistics anew at that pixel size: some targets may be out of reach"
        ]
    changed, short = matched(assay, real, scale)
    return changed, [
        f"images are resampled by {scale:g} for assay {assay.name}: its statistics were measured anew on "
        "real training images, resampled alike" + (f", but not of {', '.join(short)}" if short else "")
    ]


def matched(assay: Assay, real: Real, scale: float) -> tuple[Assay, list[str]]:
    """The assay with its statistics measured anew on real images at the generator's pixel size, and the classes that
    keep the assay's own because fewer than 20 images are there.

    Resampling moves measures: nuclei drawn at twice the pixel are rounder, and the mean of finer images would be a
    wrong target. Its fingerprint is another one.
    """
    labels = np.array([assay.classes[int(k)] for k in real.target], dtype=object)
    with torch.inference_mode():
        parts = torch.split(real.images, BATCH)
        measures = pd.concat([measure_images(assay, resample(part, scale), _silent) for part in parts])
    table = reference_statistics(measures.reset_index(drop=True), labels, assay.classes)
    enough = {name for name in assay.classes if (labels == name).sum() >= MIN_IMAGES}
    kept = assay.statistics[~assay.statistics["class"].isin({*enough, TREATED})]
    table = pd.concat([table[table["class"].isin({*enough, TREATED})], kept], ignore_index=True)
    changed = replace(assay, statistics=table, fingerprint=digest_of(assay.fingerprint, table.to_csv()))
    return changed, [name for name in assay.classes[1:] if name not in enough]


def _silent(what: str, done: int, total: int) -> None:
    """No progress is told."""


class Advantage(NamedTuple):
    """Of G groups of K rollouts. r: (G, K) optimality in [0, 1], 1/2 where nothing is known. advantage: (G, K).
    valid: (G, K) bool, all weighted rewards are there. useful: (G,) bool, two rollouts or more that differ.
    variance: (G, R) of each weighted reward within the group, over its valid rollouts.
    """

    r: Tensor
    advantage: Tensor
    valid: Tensor
    useful: Tensor
    variance: Tensor

    @property
    def counts(self) -> Tensor:
        """(G, K) bool: rollouts that carry gradient."""
        return self.valid & self.useful[:, None]


def advantages(value: Tensor, weights: Tensor, mode: str = "total", limit: float = 5.0) -> Advantage:
    """Group-normalised, clipped advantages (DiffusionNFT, arXiv 2509.16117) of values (G, K, R) with weights (R,).

    total: A = (R - mean) / (sd + 1e-4) within the group, R the weighted sum. per-reward: each reward is standardised
    within the group before the weights, then their sum is; a reward of small spread then counts as much as its weight
    says. r = clip(clip(A, -C, C) / 2C + 1/2, 0, 1) with C = `limit`. A rollout without a score is left out of its
    group's mean and has no advantage. Raises ValueError for another mode.
    """
    if mode not in MODES:
        raise ValueError(f"advantage={mode!r}: one of {', '.join(MODES)}")
    used = weights != 0
    value, weights = value[..., used].double(), weights[used].double()
    valid = torch.isfinite(value).all(-1)
    value = torch.where(valid[..., None], value, 0.0)
    weighted = value * weights
    variance = torch.zeros(len(value), len(used))
    variance[:, used] = _moments(weighted, valid)[1].square().float()
    total = weighted.sum(-1, keepdim=True)
    spread = torch.where(valid, total[..., 0], -torch.inf).amax(1) - torch.where(valid, total[..., 0], torch.inf).amin(
        1
    )
    useful = (valid.sum(1) > 1) & (spread > NO_SPREAD * total[..., 0].abs().amax(1).clamp(min=1.0))
    if mode == "per-reward":
        mean, sd = _moments(value, valid)
        total = (weights * (value - mean[:, None]) / (sd[:, None] + EPSILON)).sum(-1, keepdim=True)
    mean, sd = _moments(total, valid)
    advantage = ((total - mean[:, None]) / (sd[:, None] + EPSILON))[..., 0]
    advantage = torch.where(valid & useful[:, None], advantage, 0.0)
    r = (advantage.clamp(-limit, limit) / limit / 2 + 0.5).clamp(0, 1)
    return Advantage(r.float(), advantage.float(), valid, useful, variance)


def _moments(value: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation (G, R) over the valid rollouts of each group."""
    w = valid[..., None].double()
    n = w.sum(1).clamp(min=1)
    mean = (value * w).sum(1) / n
    return mean, (((value - mean[:, None]) * w).square().sum(1) / n).sqrt()
