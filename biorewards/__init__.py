"""Biological verifiers for cell images: evaluator, reward function and selector in one.

The names below are the public interface. They are loaded when first used, so that `import biorewards` costs
milliseconds and the command line answers before torch is there.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from biorewards.assay import Assay
    from biorewards.batch import Batch
    from biorewards.regions import Regions, measure_regions
    from biorewards.report import write_report
    from biorewards.reward import UNSCORED, Reason, Reward, Score, Suite, SuiteScore
    from biorewards.rewards import suite
    from biorewards.scoring import score_folder
    from biorewards.segmentation import load_segmenter
    from biorewards.segmentation.segmenter import Masks, Segmenter

_HOME = {
    "Assay": "biorewards.assay",
    "Batch": "biorewards.batch",
    "Masks": "biorewards.segmentation.segmenter",
    "Reason": "biorewards.reward",
    "Regions": "biorewards.regions",
    "Reward": "biorewards.reward",
    "Score": "biorewards.reward",
    "Segmenter": "biorewards.segmentation.segmenter",
    "Suite": "biorewards.reward",
    "SuiteScore": "biorewards.reward",
    "UNSCORED": "biorewards.reward",
    "load_segmenter": "biorewards.segmentation",
    "measure_regions": "biorewards.regions",
    "score_folder": "biorewards.scoring",
    "suite": "biorewards.rewards",
    "write_report": "biorewards.report",
}

__all__ = [
    "UNSCORED",
    "Assay",
    "Batch",
    "Masks",
    "Reason",
    "Regions",
    "Reward",
    "Score",
    "Segmenter",
    "Suite",
    "SuiteScore",
    "load_segmenter",
    "measure_regions",
    "score_folder",
    "suite",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'biorewards' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
