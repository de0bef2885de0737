"""Results of a scoring run as arrays while it lasts, and as tables at its end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from biorewards.assay import Assay
from biorewards.regions import Regions
from biorewards.reward import Reason, Suite, SuiteScore

#: Columns of `Part.objects`, and the measures among them as CellProfiler calls them.
OBJECT_FIELDS = ("image", "kind", "label", "border")
OBJECT_MEASURES = {
    "area": "AreaShape_Area",
    "perimeter": "AreaShape_Perimeter",
    "form_factor": "AreaShape_FormFactor",
    "eccentricity": "AreaShape_Eccentricity",
    "centroid_x": "Location_Center_X",
    "centroid_y": "Location_Center_Y",
}
KINDS = ("Nuclei", "Cells")


class Part(NamedTuple):
    """Results of some rows, in the order in which they were judged.

    rows: (n,) int64. errors: (n,) text, "" for a file that was read. values: (n, K) float32, columns as
    `value_columns`; reasons by their number. objects: (m, 10) float64, `OBJECT_FIELDS` (image = table row) and
    `OBJECT_MEASURES`; m = 0 when objects are not collected. features: (n, D) float32, what `score_folder` was asked to
    keep of every image; D = 0 for nothing, NaN for a file that was not read.
    """

    rows: npt.NDArray[np.int64]
    errors: npt.NDArray[np.str_]
    values: npt.NDArray[np.float32]
    objects: npt.NDArray[np.float64]
    features: npt.NDArray[np.float32]


def join(parts: Iterable[Part]) -> Part:
    """One part of several, in their order."""
    return Part(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def value_columns(suite: Suite) -> list[str]:
    """Reward_<name> and the totals, then Reason_<name>, then Measure_<name>."""
    names = list(suite.rewards)
    rewards = [f"Reward_{name}" for name in (*names, "total", "total_label_free")]
    return [*rewards, *(f"Reason_{name}" for name in names), *(f"Measure_{name}" for name in names)]


def value_array(result: SuiteScore, n: int) -> npt.NDArray[np.float32]:
    """(n, K) float32: the first n images of a batch's result, in one transfer from its device."""
    scores = result.scores.values()
    rewards = [*(score.value for score in scores), result.total, result.total_label_free]
    columns = [*rewards, *(score.reason.float() for score in scores), *(score.measure for score in scores)]
    array: npt.NDArray[np.float32] = torch.stack(columns, 1)[:n].float().cpu().numpy()
    return array


def object_array(regions: tuple[Regions, Regions], rows: Tensor) -> npt.NDArray[np.float64]:
    """(m, 10) float64 of the nuclei and the cells in the first len(rows) images of a batch."""
    arrays = []
    for kind, found in enumerate(regions):
        wanted = found.image < len(rows)
        image = rows.to(found.image.device)[found.image[wanted]]
        fields = [image, torch.full_like(image, kind), found.label[wanted], found.touches_border[wanted]]
        fields += [getattr(found, name)[wanted] for name in OBJECT_MEASURES]
        arrays.append(torch.stack([one.double() for one in fields], 1).cpu().numpy())
    return np.concatenate(arrays)


def no_objects() -> npt.NDArray[np.float64]:
    """(0, 10): no object."""
    return np.zeros((0, len(OBJECT_FIELDS) + len(OBJECT_MEASURES)))


def unread(row: int, message: str, suite: Suite, width: int = 0) -> Part:
    """The part of one row whose file cannot be used."""
    values = [float(Reason.BAD_IMAGE) if name.startswith("Reason_") else np.nan for name in value_columns(suite)]
    nothing = np.full((1, width), np.nan, dtype=np.float32)
    return Part(np.array([row]), np.array([message]), np.array([values], dtype=np.float32), no_objects(), nothing)


def score_table(known: pd.DataFrame, found: Part, assay: Assay, suite: Suite) -> pd.DataFrame:
    """`Metadata_*` of every row, then the columns of `value_columns`, in input order."""
    order = np.argsort(found.rows, kind="stable")
    table = known.reset_index(drop=True)
    table["Metadata_Error"] = found.errors[order].astype(object)
    table["Metadata_Assay"] = assay.name
    table["Metadata_Suite"] = suite.fingerprint
    names = {int(reason): reason.name for reason in Reason}
    values = found.values[order]
    columns: dict[str, object] = {}
    for k, name in enumerate(value_columns(suite)):
        is_reason = name.startswith("Reason_")
        columns[name] = [names[int(code)] for code in values[:, k]] if is_reason else values[:, k]
    return pd.concat([table, pd.DataFrame(columns)], axis="columns")


def object_table(known: pd.DataFrame, objects: npt.NDArray[np.float64]) -> pd.DataFrame:
    """One row an object, by image, nuclei before cells; names as CellProfiler's.

    ImageNumber is the row of the score table counted from 1, ObjectNumber the label in the mask. Lengths are px,
    areas px^2 of the image as judged (after resampling). Measures of the other kind of object are missing.
    """
    image, kind, label, border = objects.T[: len(OBJECT_FIELDS)]
    order = np.lexsort((label, kind, image))
    row = image[order].astype(np.int64)
    columns: dict[str, object] = {
        "ImageNumber": row + 1,
        "ObjectNumber": label[order].astype(np.int64),
        "Metadata_Object": [KINDS[int(number)] for number in kind[order]],
        "Metadata_File": known["Metadata_File"].to_numpy()[row],
        "Metadata_TouchesBorder": border[order].astype(bool),
    }
    for number, prefix in enumerate(KINDS):
        of_kind = kind[order] == number
        for place, name in enumerate(OBJECT_MEASURES.values(), start=len(OBJECT_FIELDS)):
            columns[f"{prefix}_{name}"] = np.where(of_kind, objects[order, place], np.nan).astype(np.float32)
    return pd.DataFrame(columns)


def bad_rows(scores: pd.DataFrame) -> pd.DataFrame:
    """Rows whose file cannot be used or whose label is unknown: Metadata_File and problem, by row number."""
    reasons = scores[[str(name) for name in scores if str(name).startswith("Reason_")]]
    unreadable = (reasons == Reason.BAD_IMAGE.name).any(axis="columns")
    unknown = (reasons == Reason.UNKNOWN_TARGET.name).any(axis="columns")
    label = scores["Metadata_MoA"].where(scores["Metadata_MoA"] != "", scores["Metadata_Compound"])
    problem = scores["Metadata_Error"].where(unreadable, "unknown label " + label)
    return pd.DataFrame({"Metadata_File": scores["Metadata_File"], "problem": problem})[unreadable | unknown]
