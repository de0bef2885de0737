"""Judge the judges: checks that a reward must pass before its gains are believed.

`CHECKS` are in the order in which they are reported. Each is a function of a `Bench`; see `biorewards.validate.bench`.
"""

from __future__ import annotations

from biorewards.validate.attack import attack
from biorewards.validate.bench import Bench, Scores
from biorewards.validate.calibration import calibration
from biorewards.validate.check import Check, Finding, not_judged
from biorewards.validate.counting import counting
from biorewards.validate.exploits import missing_biology, variance_collapse
from biorewards.validate.invariance import invariance
from biorewards.validate.lesions_response import dose_response
from biorewards.validate.noise_floor import noise_floor
from biorewards.validate.oracle import oracle
from biorewards.validate.plates import plates
from biorewards.validate.pressure import pressure
from biorewards.validate.redundancy import redundancy
from biorewards.validate.shape_size import shape_and_size
from biorewards.validate.specificity import specificity
from biorewards.validate.splits import splits

#: name -> check, in the order of the report.
CHECKS: dict[str, Check] = {
    "oracle": oracle,  # 1
    "invariance": invariance,  # 2
    "dose_response": dose_response,  # 3
    "shape_and_size": shape_and_size,  # 3, of shape
    "specificity": specificity,  # 4
    "noise_floor": noise_floor,  # 5
    "counting": counting,  # 6
    "plates": plates,  # 7
    "splits": splits,  # 8
    "redundancy": redundancy,  # 9
    "pressure": pressure,  # 10
    "attack": attack,  # 11
    "missing_biology": missing_biology,  # 12
    "variance_collapse": variance_collapse,  # 13
    "calibration": calibration,  # 14
}

__all__ = ["CHECKS", "Bench", "Check", "Finding", "Scores", "not_judged"]
