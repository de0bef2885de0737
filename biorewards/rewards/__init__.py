"""The seven verifiers of CellFluxRL and the suite made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from biorewards.assay import Assay
from biorewards.reward import Reward, Suite
from biorewards.rewards.containment import NucleusInCytoplasm
from biorewards.rewards.moa import MechanismOfAction
from biorewards.rewards.reference import MEASURES, ReferenceReward

#: Weights of the paper (CellFluxRL, section 3): R = 5 MoA + 2 containment + 1 for each other.
PAPER_WEIGHTS: dict[str, float] = {
    "moa": 5.0,
    "nucleus_in_cytoplasm": 2.0,
    "nucleus_roundness": 1.0,
    "nucleus_size": 1.0,
    "cytoplasm_size": 1.0,
    "nucleus_count": 1.0,
    "cytoplasm_count": 1.0,
}


def suite(assay: Assay, names: Iterable[str] | None = None, weights: Mapping[str, float] | None = None) -> Suite:
    """The paper's seven rewards for an assay, or those in `names`; `weights` override the paper's.

    Raises ValueError for a name that is none of the seven.
    """
    wanted = list(PAPER_WEIGHTS) if names is None else list(names)
    if unknown := sorted((set(wanted) | set(weights or {})) - set(PAPER_WEIGHTS)):
        raise ValueError(f"unknown rewards {unknown}; choose from {list(PAPER_WEIGHTS)}")
    rewards: list[Reward] = []
    for name in wanted:
        if name == "moa":
            rewards.append(MechanismOfAction())
        elif name == "nucleus_in_cytoplasm":
            rewards.append(NucleusInCytoplasm())
        else:
            rewards.append(ReferenceReward(name))
    chosen = {name: weight for name, weight in (PAPER_WEIGHTS | dict(weights or {})).items() if name in wanted}
    return Suite(rewards, chosen, assay.fingerprint)


__all__ = ["MEASURES", "PAPER_WEIGHTS", "MechanismOfAction", "NucleusInCytoplasm", "ReferenceReward", "suite"]
