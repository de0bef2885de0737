"""How large a reproduction is, and which settings are tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Size:
    """images: phantom crops of the experiment (plates: 5 below 3,000, 10 below 8,000, then 20). compounds: how many are
    trained on (`setting.teachable`), 0 = all. other, shown: crops that the second classifier is drawn from and shown.
    steps, groups, rollouts, rollout_steps, times: of a main run, as `rl.nft.Settings` names them. choice, sweep,
    single: steps of a run that settings are chosen by, of a point of a sweep, of a run with one reward. prompts:
    (control, compound) pairs of test plates. pool: samples of each. reference: real images that distances are taken
    to."""

    images: int
    compounds: int
    other: int
    shown: int
    steps: int
    groups: int
    rollouts: int
    rollout_steps: int
    times: int
    choice: int
    sweep: int
    single: int
    prompts: int
    pool: int
    evaluated: int
    reference: int
    pixels: int = 48
    precision: str = "bf16"


SIZES = {
    # Shows that everything runs: minutes of one core. Its figures mean nothing.
    "tiny": Size(700, 2, 400, 640, 2, 2, 4, 2, 1, 1, 1, 1, 20, 4, 20, 120),
    # Some three hours of one core.
    "small": Size(8000, 4, 3000, 24_000, 80, 8, 12, 4, 1, 20, 20, 20, 120, 8, 120, 600),
    # Several hours of two cores.
    "medium": Size(8000, 0, 8000, 80_000, 100, 16, 12, 6, 2, 20, 40, 40, 240, 16, 96, 2000),
    # For a GPU, with a generator of 96 px (--checkpoint).
    "large": Size(12_000, 0, 12_000, 150_000, 300, 48, 24, 10, 4, 60, 100, 100, 600, 64, 240, 4000, pixels=96),
}

#: Tried for `choice` steps; the best total on validation plates is taken for everything else.
CANDIDATES: dict[str, dict[str, Any]] = {
    "total, 3e-4": {"learning_rate": 3e-4},
    "per-reward, 3e-4": {"advantage": "per-reward", "learning_rate": 3e-4},
}
KL_WEIGHTS = (0.0, 0.01, 0.1, 1.0)
MIX_BETAS = (0.1, 0.3, 1.0)
#: Euler steps that the base is also drawn with.
SOLVER_STEPS = (3, 12, 24)

#: Table 1 of CellFluxRL (arXiv 2603.21743) as digests give it: CellFlux, CellFluxRL, CellFluxRL + best-of-4.
PAPER = {
    "moa": (0.26, 0.34, 0.56),
    "nucleus_in_cytoplasm": (0.88, 0.96, 0.97),
    "nucleus_roundness": (-0.34, -0.26, -0.19),
    "total": (-2.44, 0.46, 3.15),
    "moa_accuracy": (0.61, 0.66, None),
    "frechet": (20.36, 24.01, 23.19),
    "kernel": (0.015, 0.014, 0.016),
}
