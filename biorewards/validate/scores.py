"""What the rewards on trial say of some images, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from biorewards.audit.encoder import Encoded
from biorewards.reward import UNSCORED, Reason

Floats = npt.NDArray[np.float64]
#: Reasons with which a crop shows no cell, hence its worst value.
MISSING = (Reason.NO_NUCLEUS, Reason.NO_CELL, Reason.BLANK)


@dataclass(frozen=True)
class Scores:
    """What the rewards say of N images.

    value, measure: one column a reward, float64, NaN where there is none. reason: the same, `Reason` names.
    encoded: features (N, D) and class probabilities (N, n) of the assay's classifier, thumbnails; see `Encoded`.
    """

    value: pd.DataFrame
    measure: pd.DataFrame
    reason: pd.DataFrame
    encoded: Encoded

    def __len__(self) -> int:
        return len(self.value)

    def scored(self, reward: str) -> npt.NDArray[np.bool_]:
        """(N,) the question could be asked: the value is a number."""
        return ~self.reason[reward].isin([one.name for one in UNSCORED]).to_numpy()

    def total(self, weights: Mapping[str, float]) -> Floats:
        """(N,) weighted sum; NaN where a part is missing."""
        parts = [weight * self.value[name].to_numpy() for name, weight in weights.items()]
        return np.asarray(np.sum(parts, axis=0), np.float64)

    def valid(self, reward: str) -> npt.NDArray[np.bool_]:
        """(N,) the value rests on something that was seen: no missing nucleus, cell or contrast."""
        return self.scored(reward) & ~self.reason[reward].isin([one.name for one in MISSING]).to_numpy()
