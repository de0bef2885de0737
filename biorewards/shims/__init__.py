"""The verifiers in the forms that other tools ask for: a torchmetrics metric, a reward of TRL, Flow-GRPO, Flow-Factory.

Each is a few lines round `Judge`. None imports its tool before it is used; `biorewards.shims.flow_factory` is named in
Flow-Factory's own configuration.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from biorewards.assay import Assay
from biorewards.reward import Suite
from biorewards.shims.flow_grpo import as_flow_grpo
from biorewards.shims.judge import Judge
from biorewards.shims.trl import as_trl

if TYPE_CHECKING:
    from biorewards.shims.metric import BiologicalRewards

__all__ = ["Judge", "as_flow_grpo", "as_metric", "as_trl"]


def as_metric(suite: Suite, assay: Assay, **settings: Any) -> BiologicalRewards:
    """A `torchmetrics.Metric`: `update(images, labels)`, then `compute()` gives the mean of every reward and the total.

    settings: handed to `torchmetrics.Metric`. Raises ImportError where torchmetrics is not installed.
    """
    try:
        from biorewards.shims.metric import BiologicalRewards
    except ModuleNotFoundError as error:
        raise ImportError("as_metric needs torchmetrics: pip install torchmetrics") from error
    return BiologicalRewards(suite, assay, **settings)
