"""What pages and cards say: checks in words, the context of use of each reward, and its known limits."""

from __future__ import annotations

import math

from biorewards.report.wording import number, percent
from biorewards.validate.check import Finding

#: check -> title, the question that it asks
CHECK_WORDS = {
    "oracle": ("Oracle against null", "Do real images win against wrong labels, copied controls, noise and blanks?"),
    "invariance": ("Nuisance invariance", "Do flips, shifts, gain, noise, blur, 8 bits, JPEG leave the reward alone?"),
    "dose_response": ("Dose-response", "Does the reward fall with its own lesion, more at a higher dose?"),
    "shape_and_size": ("Shape without size", "Does the roundness of one shape stay the same at every size?"),
    "specificity": ("Specificity", "Does the reward answer to its own lesion and hardly to others?"),
    "noise_floor": ("Noise floor", "How far apart do replicate sites and repeated draws lie?"),
    "counting": ("Counting law", "Do counts follow a dilution series in proportion (as in ISO 20391-2)?"),
    "plates": ("Plate against treatment", "Does the reward read the treatment, or the plate?"),
    "splits": ("Held-out compounds and batches", "Does the classifier hold beyond the compounds and plates it knows?"),
    "redundancy": ("Redundancy", "How many independent things do the rewards measure?"),
    "pressure": ("Best-of-N pressure", "From which N on does selection by one judge stop pleasing another?"),
    "attack": ("Random-search attack", "How far can aimless search push the reward without biology?"),
    "missing_biology": ("Missing biology", "Is anything gained by leaving nuclei, cytoplasm or everything out?"),
    "variance_collapse": ("Variance collapse", "Is anything gained by showing only the average cell?"),
    "calibration": ("Calibration", "Do probabilities come true, and do real images lie where the reference says?"),
}  # fmt: skip

USE = (
    "Compares and ranks generated or real fluorescence crops of one assay: same stain, magnification, crop size and "
    "intensity range as the real images behind its reference. Read as means over tens of images, beside the real row "
    "and the spread ratio; as a reward in post-training only together with the other rewards. Not for diagnosis, not "
    "for single cells, not across assays."
)
#: reward -> limits that no figure below shows
LIMITS = {
    "moa": (
        "It follows whatever the classifier learned, batch style included; its class list is closed, and a crop of an "
        "unknown mechanism still gets probabilities that sum to 1.",
        "Reads the whole picture: damage to nuclei or cells moves it, too.",
    ),
    "nucleus_in_cytoplasm": (
        "Is 1 for a cell mask that fills the crop: it asks that cells are under the nuclei, not that they look right.",
        "Does not depend on the label: a perfect value says nothing about the treatment.",
    ),
    "nucleus_roundness": (
        "Crofton's perimeter on a pixel grid: for one nucleus, form factors closer than about 0.05 are the same.",
        "Nuclei cut by the border count only where every one is cut.",
    ),
    "nucleus_size": ("Takes the largest nucleus: two that are taken for one look like a large one.",),
    "cytoplasm_size": (
        "Takes the largest cell, and most cells of a crop are cut by its border: it sees what the crop shows of them.",
        "Which cell a pixel belongs to is drawn between nuclei: where cells touch, areas are a matter of convention.",
    ),
    "nucleus_count": ("Sees a crop of fixed size, not the density of a culture; slivers at the border are left out.",),
    "cytoplasm_count": (
        "Cells that touch are told apart by their nuclei, so extra nuclei read as extra cells.",
        "Sees a crop of fixed size, not the density of a culture; slivers at the border are left out.",
    ),
}
#: Of every reward that is −z².
POINTWISE = (
    "Its best value is the average real cell, so a generator without variety beats real images (see variance collapse)."
)


def title(check: str) -> str:
    """Name of a check for a reader."""
    return CHECK_WORDS.get(check, (check.replace("_", " ").capitalize(), ""))[0]


def verdict(finding: Finding) -> str:
    """pass, fail, or not judged."""
    return {True: "pass", False: "fail", None: "not judged"}[finding.passed]


def figure(finding: Finding) -> str:
    """The value with its interval, or a dash."""
    if finding.value is None or math.isnan(finding.value):
        return "–"
    text = number_of(finding.value)
    if finding.interval is None or any(math.isnan(end) for end in finding.interval):
        return text
    return f"{text} ({number_of(finding.interval[0])} to {number_of(finding.interval[1])})"


def number_of(value: float) -> str:
    """Three digits after the point below 1, which most thresholds are; three significant ones above."""
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return number(value) if abs(value) >= 1 else f"{value:.3f}".replace("-0.000", "0.000").replace("-", "−")


def lesion_title(name: str) -> str:
    """Name of a lesion for a reader."""
    return name.replace("_", " ").replace("dna", "DNA")


def sentence(failed: int, passed: int, open_: int) -> str:
    """Counts of verdicts in words."""
    total = failed + passed
    judged = f"{passed} of {total} figures pass ({percent(passed / total if total else None)})"
    return judged + (f"; {open_} could not be judged" if open_ else "") + "."


def limits(reward: str, squared: bool) -> list[str]:
    """Known limits of a reward, the common one of −z² rewards included."""
    return [*LIMITS.get(reward, ()), *([POINTWISE] if squared else [])]
