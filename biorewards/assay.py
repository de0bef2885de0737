"""What real cells look like here: channels, scale, classes, reference statistics, classifier, segmenter.

An assay is a folder: `assay.json`, `statistics.parquet`, and, where it has them, `classifier.safetensors` and
`segmenter.safetensors`. Nothing in it is a pickle. It is data and knows no reward.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from biorewards.classifier import Classifier
from biorewards.io.tables import write_table, write_text
from biorewards.reward import Reason
from biorewards.segmentation import load_segmenter
from biorewards.segmentation.segmenter import Masks, Segmenter, normalise

FORMAT = 1
ASSETS = Path(__file__).resolve().parent / "assets"
#: Assays that ship with the package.
BUNDLED = ("bbbc021", "phantom")
#: The statistic of a class stands on at least this many real images, else all treated classes are pooled.
MIN_IMAGES = 20
#: What networks compute in; see `Assay.with_precision`.
PRECISIONS = ("float32", "bfloat16")
#: Row of `statistics` that pools every class but the control.
TREATED = "(treated)"
#: Floors of the standard deviation: half an object for counts, 2 % of the mean for everything else. A class whose
#: images all have one nucleus would otherwise have sd 0 and punish a second nucleus without limit.
COUNT_FLOOR, RELATIVE_FLOOR = 0.5, 0.02


@dataclass(frozen=True)
class Assay:
    """One kind of experiment.

    channels: role -> index; roles are `actin`, `tubulin`, `dna` (any two-channel cytoplasm evidence and one DNA).
    pixel_size: um per px, None when unknown (areas are then in px^2).
    crop_size: side of a crop, px, None for any.
    intensity: role -> (low, high), in [0, 1] units of the decoded image: the segmenter's 0 and 1. Fixed, never
        taken per image: percentiles of a blank crop turn its noise into cells.
    classes: class 0 is the control. compounds: compound -> class.
    nucleus_diameter: px, the scale handed to the segmenter.
    statistics: one row a (class, measure): mean, sd, n, origin, q05, q25, q50, q75, q95. origin is `images` (n real
        crops) or `wells` (n whole wells, carried over to crops by a rule that the card states).
    card: how good it is and from how much data.
    """

    name: str
    channels: dict[str, int]
    pixel_size: float | None
    crop_size: int | None
    intensity: dict[str, tuple[float, float]]
    classes: list[str]
    compounds: dict[str, str]
    nucleus_diameter: float
    statistics: pd.DataFrame
    segmenter_name: str = "compact"
    card: dict[str, Any] = field(default_factory=dict)
    classifier: Classifier | None = None
    segmenter: Segmenter | None = None
    fingerprint: str = ""
    precision: str = "float32"

    @property
    def n_channels(self) -> int:
        return max(self.channels.values()) + 1

    @property
    def pixel_area(self) -> float:
        """um^2 of a pixel, or 1 (px^2) when the pixel size is unknown."""
        return 1.0 if self.pixel_size is None else self.pixel_size**2

    @property
    def area_unit(self) -> str:
        return "px^2" if self.pixel_size is None else "um^2"

    @cached_property
    def classifier_columns(self) -> Tensor:
        """(n_classes,) int64: the classifier's output for each class, -1 where it does not cover one."""
        known = [] if self.classifier is None else self.classifier.classes
        return torch.tensor([known.index(c) if c in known else -1 for c in self.classes])

    def to(self, device: torch.device | str) -> Assay:
        """Move the networks to a device, in place."""
        for part in (self.segmenter, self.classifier):
            if part is not None:
                part.to(device)
        return self

    def with_segmenter(self, segmenter: Segmenter) -> Assay:
        """The same assay judged by another segmenter; the statistics stay those of the old one, so the card warns."""
        changed = replace(self, segmenter=segmenter, segmenter_name=segmenter.name)
        return replace(changed, fingerprint=_digest([self.fingerprint, segmenter.fingerprint]))

    def with_precision(self, precision: str) -> Assay:
        """The same assay with its networks in "float32" or "bfloat16" (autocast: convolutions only).

        Faster where the processor has it. Scores move a little, so the fingerprint is another. Raises ValueError for
        any other name.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"precision {precision!r}; choose from {', '.join(PRECISIONS)}")
        if precision == self.precision:
            return self
        changed = self.fingerprint.split("-")[0] + ("" if precision == "float32" else f"-{precision}")
        return replace(self, precision=precision, fingerprint=changed)

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context that networks run in."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def normalised(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> the roles' channels on the assay's fixed range (0 background, 1 bright)."""
        low = torch.zeros(self.n_channels, device=images.device)
        high = torch.ones(self.n_channels, device=images.device)
        for role, index in self.channels.items():
            low[index], high[index] = self.intensity[role]
        return normalise(images, low, high)

    def segment(self, images: Tensor) -> Masks:
        """Masks of (B, C, H, W) float32 images in [0, 1]."""
        if self.segmenter is None:
            raise ValueError(
                f"assay {self.name!r} has no segmenter; load it with Assay.load or give one with with_segmenter"
            )
        scaled = self.normalised(images)
        cytoplasm = [self.channels[role] for role in ("actin", "tubulin") if role in self.channels]
        nucleus = scaled[:, self.channels["dna"]] if "dna" in self.channels else None
        with self.autocast(images.device):
            return self.segmenter(nucleus, scaled[:, cytoplasm] if cytoplasm else None, self.nucleus_diameter)

    def class_probabilities(self, images: Tensor) -> Tensor | None:
        """(B, n) calibrated probabilities over the classifier's own classes, or None without a classifier."""
        if self.classifier is None:
            return None
        with self.autocast(images.device):
            return self.classifier(self.normalised(images))

    @cached_property
    def _references(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """measure -> (mean, sd, reason), each (n_classes,)."""
        table = self.statistics.set_index(["measure", "class"])
        tables = {}
        for measure in self.statistics.measure.unique():
            rows = []
            for name in self.classes:
                reason = Reason.OK
                row = table.loc[(measure, name)] if (measure, name) in table.index else None
                if row is not None and row.origin == "wells":
                    reason = Reason.CARRIED_REFERENCE
                if row is None or (row.origin == "images" and row.n < MIN_IMAGES):
                    row, reason = None, Reason.NO_REFERENCE
                    if (
                        (measure, TREATED) in table.index
                        and table.loc[(measure, TREATED)].n >= MIN_IMAGES
                        and name != self.classes[0]
                    ):
                        row, reason = table.loc[(measure, TREATED)], Reason.POOLED_REFERENCE
                if row is None:
                    rows.append((float("nan"), float("nan"), reason))
                else:
                    floor = COUNT_FLOOR if measure.endswith("_count") else RELATIVE_FLOOR * abs(row["mean"])
                    rows.append((float(row["mean"]), max(float(row["sd"]), floor), reason))
            mean, sd, why = zip(*rows, strict=True)
            tables[measure] = (torch.tensor(mean), torch.tensor(sd), torch.tensor(why, dtype=torch.uint8))
        return tables

    def reference(self, measure: str, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, standard deviation (floors applied) and `Reason`, (B,) each, for targets (B,) int64.

        The reason is OK, CARRIED_REFERENCE, POOLED_REFERENCE, NO_REFERENCE, NO_TARGET (-1) or UNKNOWN_TARGET (-2).
        """
        nan = torch.full((len(self.classes),), torch.nan)
        none = torch.full((len(self.classes),), int(Reason.NO_REFERENCE), dtype=torch.uint8)
        mean, sd, reason = (
            t.to(target.device)[target.clamp_min(0)] for t in self._references.get(measure, (nan, nan, none))
        )
        reason[target == -1] = Reason.NO_TARGET
        reason[target < -1] = Reason.UNKNOWN_TARGET
        return mean, sd, reason

    def save(self, folder: Path) -> None:
        """Write the folder; each file appears whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        write_table(folder / "statistics.parquet", self.statistics)
        if self.classifier is not None:
            self.classifier.save(folder / "classifier.safetensors")
        skip = {"statistics", "classifier", "segmenter", "fingerprint", "precision"}
        fields = {
            k: v
            for k, v in asdict(replace(self, statistics=pd.DataFrame(), classifier=None, segmenter=None)).items()
            if k not in skip
        }
        write_text(folder / "assay.json", json.dumps({"format": FORMAT} | fields, indent=1, sort_keys=True) + "\n")

    @classmethod
    def load(cls, source: str | Path) -> Assay:
        """A bundled assay by name (`phantom`, `bbbc021`) or a folder.

        Raises ValueError when there is none of that name, a file is missing or the format is newer than this version.
        """
        folder = ASSETS / "assays" / str(source) if str(source) in BUNDLED else Path(source)
        if not (folder / "assay.json").is_file():
            raise ValueError(
                f"no assay at {source}: bundled ones are {', '.join(BUNDLED)}; a folder must hold assay.json"
            )
        text = (folder / "assay.json").read_text(encoding="utf-8")
        data = json.loads(text)
        if data.pop("format") != FORMAT:
            raise ValueError(
                f"{folder / 'assay.json'} is of another format than {FORMAT}; update biorewards or fit it again"
            )
        data["intensity"] = {role: tuple(pair) for role, pair in data["intensity"].items()}
        weights = folder / "classifier.safetensors"
        classifier = Classifier.load(weights) if weights.is_file() else None
        own = folder / "segmenter.safetensors"
        segmenter = load_segmenter(str(own) if own.is_file() else data["segmenter_name"])
        statistics = pd.read_parquet(folder / "statistics.parquet")
        parts = [text, statistics.to_csv(), segmenter.fingerprint, "" if classifier is None else classifier.fingerprint]
        return cls(
            **data, statistics=statistics, classifier=classifier, segmenter=segmenter, fingerprint=_digest(parts)
        )


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
