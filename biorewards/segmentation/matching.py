"""How well two label images agree, object by object."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import optimize, sparse


class Match(NamedTuple):
    """Counts over one image: objects that agree, objects only in the prediction, objects only in the truth."""

    true_positive: int
    false_positive: int
    false_negative: int

    @property
    def f1(self) -> float:
        """2 TP / (2 TP + FP + FN); NaN when there is nothing on either side."""
        total = 2 * self.true_positive + self.false_positive + self.false_negative
        return 2 * self.true_positive / total if total else float("nan")


def iou_matrix(truth: npt.NDArray[Any], predicted: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(n_truth, n_predicted) intersection over union of two (H, W) label images (0 = background, ids may be gapped)."""
    _, t = np.unique(truth.ravel(), return_inverse=True)
    _, p = np.unique(predicted.ravel(), return_inverse=True)
    t, p = t + (0 if (truth == 0).any() else 1), p + (0 if (predicted == 0).any() else 1)
    overlap = sparse.coo_array((np.ones(t.size), (t, p)), shape=(t.max() + 1, p.max() + 1)).toarray()
    union = overlap.sum(1)[:, None] + overlap.sum(0)[None] - overlap
    return np.asarray((overlap / np.maximum(union, 1))[1:, 1:])


def match(truth: npt.NDArray[Any], predicted: npt.NDArray[Any], iou: float = 0.5) -> Match:
    """Pair objects one to one (largest summed IoU) and count the pairs with an IoU above `iou`."""
    matrix = iou_matrix(truth, predicted)
    n_truth, n_predicted = matrix.shape
    rows, columns = optimize.linear_sum_assignment(-np.where(matrix > iou, matrix, 0))
    hits = int((matrix[rows, columns] > iou).sum())
    return Match(hits, n_predicted - hits, n_truth - hits)
