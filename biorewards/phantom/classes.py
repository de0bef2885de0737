"""The phantom's classes: what each effect does to a cell, and the BBBC021 mechanism it mirrors.

`PROFILE` holds what real wells do: the median, over the wells of a mechanism, of (well / median DMSO well of the
same plate), from the 632 well profiles of Ljosa et al. 2013 (J. Biomol. Screen.). Ratios are taken within a plate
because stain and seeding differ from plate to plate by more than some effects. tests/test_phantom.py computes
them afresh from the profiles and measures rendered fields against them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

#: Untreated cells, in px of 0.32 um: nucleus area, cell area before neighbours cut it, area of field behind one cell.
#: They give the 989 and 3901 px of the real DMSO wells once cells meet and overlap.
NUCLEUS_AREA = 1050.0
CELL_AREA = 7400.0
AREA_PER_CELL = 5600.0


@dataclass(frozen=True)
class Effect:
    """What an affected cell looks like. The defaults are an untreated cell; areas and intensities are in its units.

    Numbers interpolate between an untreated and an affected cell with the strength of the effect; `nuclei` gives
    the shares of affected cells whose nucleus (and, for the rounded ones, whole cell) takes another form.
    """

    mirrors: str = "DMSO"
    affected: float = 1.0  # share of cells that respond at the middle dose; the rest look untreated
    density: float = 1.0  # cells per area
    nucleus_area: float = 1.0
    nucleus_elongation: float = 0.13  # log amplitude of the second harmonic of the outline
    nucleus_irregular: float = 0.018  # log amplitude of harmonics 3 to 6
    cell_area: float = 1.0
    cell_elongation: float = 0.16
    cell_irregular: float = 0.10
    cell_concave: float = 0.16  # depth of the arcs between the points where a cell holds on
    dapi: float = 1.0
    chromatin: float = 0.13  # contrast of the chromatin texture
    nucleoli: float = 0.35  # depth of the dark nucleoli
    actin: float = 1.0
    cortex: float = 1.0  # actin along the outline
    fibres: float = 0.5  # stress fibres
    puncta: float = 0.3  # small actin dots
    clumps: float = 0.0  # actin aggregates
    actin_over_nucleus: float = 0.35  # how much dimmer actin is there
    tubulin: float = 1.0
    filaments: float = 1.0  # microtubules
    diffuse: float = 0.33  # soluble tubulin
    bundles: float = 0.0  # thick bundles, mostly peripheral
    perinuclear: float = 0.5  # brightness round the nucleus
    aggresome: float = 0.0  # one bright spot beside the nucleus
    tubulin_over_nucleus: float = 0.42
    nuclei: dict[str, float] = field(default_factory=lambda: {"mitotic": 0.025, "binucleate": 0.02, "floating": 0.03})


#: Fields of `Effect` that interpolate, in order; textures and shapes look them up by name.
NUMBERS = [f.name for f in fields(Effect) if f.name not in ("mirrors", "affected", "density", "nuclei")]
#: Forms a nucleus can take; "smooth" is the rest. The last four round the whole cell up.
FORMS = ["smooth", "binucleate", "lobed", "honeycomb", "mitotic", "monopolar", "pyknotic", "floating"]
ROUNDED = ("mitotic", "monopolar", "pyknotic", "floating")


def numbers(effect: Effect) -> NDArray[np.float32]:
    """The interpolating numbers of an effect, (len(NUMBERS),) float32."""
    return np.array([getattr(effect, name) for name in NUMBERS], np.float32)


def form_shares(effect: Effect) -> NDArray[np.float64]:
    """Probability of each of `FORMS`, (8,) float64, sums to 1."""
    shares = np.array([effect.nuclei.get(form, 0.0) for form in FORMS])
    shares[0] = 1 - shares.sum()
    return shares


# fmt: off
CLASSES: dict[str, Effect] = {
    "DMSO": Effect(),
    # Actin gone from cortex and fibres into bright aggregates; cells contract round the nucleus, arms retract.
    "actin_collapse": Effect(
        "Actin disruptors", 0.92, 0.66, nucleus_area=0.95, nucleus_irregular=0.08, nucleus_elongation=0.16,
        cell_area=0.3, cell_concave=0.42, cell_irregular=0.2, dapi=1.19, chromatin=0.25, actin=1.44, cortex=0.35,
        fibres=0.0, puncta=1.2, clumps=1.6, tubulin=1.83, diffuse=0.7, perinuclear=0.8,
        nuclei={"binucleate": 0.14, "lobed": 0.06, "mitotic": 0.02, "floating": 0.05},
    ),
    # Division fails, DNA is copied on: giant lobed nuclei in giant cells.
    "polyploid_giant": Effect(
        "Aurora kinase inhibitors", 0.92, 0.56, nucleus_area=1.66, nucleus_irregular=0.05, nucleus_elongation=0.15,
        cell_area=2.52, dapi=1.08, chromatin=0.22, actin=0.93, tubulin=0.85,
        nuclei={"lobed": 0.6, "binucleate": 0.08, "mitotic": 0.02, "floating": 0.02},
    ),
    # Cells shrink to spindles with long thin arms, small bright nuclei.
    "spindle_retraction": Effect(
        "Cholesterol-lowering", 0.92, 0.66, nucleus_area=0.72, nucleus_elongation=0.17, cell_area=0.37,
        cell_elongation=0.42, cell_concave=0.55, dapi=1.15, chromatin=0.2, nucleoli=0.2, actin=1.34, cortex=0.9,
        puncta=0.5, tubulin=1.45, filaments=0.8, bundles=0.35, diffuse=0.6, perinuclear=0.7,
        nuclei={"mitotic": 0.02, "pyknotic": 0.03, "floating": 0.05},
    ),
    # Cycle halts before division: large smooth round nuclei, large flat cells, visible nucleoli.
    "enlarged_flat": Effect(
        "DNA damage", 0.92, 0.69, nucleus_area=1.22, nucleus_elongation=0.08, nucleus_irregular=0.015, cell_area=1.58,
        cell_concave=0.08, dapi=0.97, chromatin=0.09, nucleoli=0.9, actin=1.02, fibres=1.8, puncta=0.05, tubulin=1.07,
        perinuclear=0.15, nuclei={"binucleate": 0.01, "floating": 0.02},
    ),
    # Few cells left, large nuclei with grainy chromatin, ragged large cells with gaps between.
    "sparse_ragged": Effect(
        "DNA replication", 0.92, 0.56, nucleus_area=1.18, nucleus_irregular=0.024, cell_area=1.59, cell_concave=0.3,
        cell_irregular=0.2, dapi=0.86, chromatin=0.42, nucleoli=0.15, actin=1.03, cortex=1.4, puncta=0.7,
        tubulin=0.94, filaments=1.1, nuclei={"binucleate": 0.01, "floating": 0.05},
    ),
    # Half-spindles: chromosomes in a rosette round one pole, cells round and bright.
    "monopolar_arrest": Effect(
        "Eg5 inhibitors", 0.92, 0.42, nucleus_area=1.51, nucleus_irregular=0.05, cell_area=1.42, dapi=1.24,
        chromatin=0.24, actin=1.55, cortex=1.1, tubulin=1.6,
        nuclei={"monopolar": 0.42, "lobed": 0.2, "honeycomb": 0.06, "pyknotic": 0.03, "floating": 0.04},
    ),
    # Tight colonies of small cells, actin drawn to the junctions.
    "tight_colony": Effect(
        "Epithelial", 0.93, 1.0, nucleus_area=0.96, nucleus_elongation=0.17, nucleus_irregular=0.045, cell_area=0.51,
        cell_concave=0.08, cell_irregular=0.07, dapi=1.02, actin=1.31, cortex=2.2, fibres=0.1, puncta=0.15,
        tubulin=1.25, filaments=0.75, diffuse=0.6, perinuclear=0.2, nuclei={"mitotic": 0.03, "floating": 0.05},
    ),
    # Widely spread, pale cells with stress fibres and long straight microtubules.
    "spread_pale": Effect(
        "Kinase inhibitors", 0.92, 0.62, nucleus_area=1.1, nucleus_elongation=0.09, nucleus_irregular=0.016,
        cell_area=1.95, cell_concave=0.1, dapi=0.88, chromatin=0.15, actin=0.94, cortex=0.5, fibres=0.9,
        tubulin=0.91, filaments=1.6, diffuse=0.12, perinuclear=1.0, nuclei={"mitotic": 0.01, "floating": 0.01},
    ),
    # Microtubules dissolved into a haze; nuclei burst into many micronuclei (one honeycomb nucleus each).
    "honeycomb_nuclei": Effect(
        "Microtubule destabilizers", 0.92, 0.42, nucleus_area=1.34, nucleus_irregular=0.04, cell_area=0.89,
        cell_concave=0.3, cell_irregular=0.15, dapi=1.13, actin=1.67, cortex=1.1, fibres=0.9, puncta=0.5, tubulin=0.51,
        filaments=0.05, diffuse=1.6, perinuclear=0.1, tubulin_over_nucleus=0.6,
        nuclei={"honeycomb": 0.55, "lobed": 0.08, "mitotic": 0.06, "pyknotic": 0.04, "floating": 0.1},
    ),
    # Microtubules in thick bright bundles; lobed and multi-micronucleated nuclei.
    "bundled_tubulin": Effect(
        "Microtubule stabilizers", 0.92, 0.42, nucleus_area=1.07, nucleus_irregular=0.06, cell_area=0.75,
        cell_concave=0.3, cell_irregular=0.15, dapi=0.98, actin=1.76, cortex=1.1, tubulin=1.64, filaments=0.4,
        diffuse=0.5, bundles=2.2, perinuclear=0.5,
        nuclei={"lobed": 0.42, "honeycomb": 0.3, "mitotic": 0.05, "pyknotic": 0.03, "floating": 0.07},
    ),
    # Waste gathers in one bright spot beside an indented nucleus.
    "perinuclear_aggregate": Effect(
        "Protein degradation", 0.92, 0.57, nucleus_area=1.11, nucleus_elongation=0.15, nucleus_irregular=0.032,
        cell_area=1.06, cell_concave=0.3, cell_irregular=0.15, dapi=0.92, nucleoli=0.6, actin=1.23, puncta=0.9,
        tubulin=0.97, filaments=0.7, diffuse=0.6, aggresome=1.6,
        nuclei={"mitotic": 0.05, "pyknotic": 0.03, "floating": 0.06},
    ),
    # Small cells with bright stain everywhere, nuclei creased, nucleoli gone.
    "bright_shrunken": Effect(
        "Protein synthesis", 0.92, 0.47, nucleus_area=1.06, nucleus_elongation=0.24, nucleus_irregular=0.065,
        cell_area=0.46, cell_concave=0.2, dapi=1.12, chromatin=0.3, nucleoli=0.0, actin=1.83, cortex=1.4, puncta=0.3,
        tubulin=1.69, filaments=1.0, diffuse=0.7, perinuclear=0.5,
        nuclei={"pyknotic": 0.05, "floating": 0.05},
    ),
}
# fmt: on

#: CellProfiler feature behind each column of `PROFILE`.
PROFILE_FEATURES = {
    "nucleus_area": "Nuclei_AreaShape_Area",
    "form_factor": "Nuclei_AreaShape_FormFactor",
    "cell_area": "Cells_AreaShape_Area",
    "neighbours": "Cells_Neighbors_NumberOfNeighbors_10",
    "dapi": "Nuclei_Intensity_MeanIntensity_CorrDAPI",
    "actin": "Cells_Intensity_MeanIntensity_CorrActin",
    "tubulin": "Cells_Intensity_MeanIntensity_CorrTub",
}
#: Class -> what real wells of the mirrored mechanism do (see above), in the order of `PROFILE_FEATURES`.
PROFILE: dict[str, tuple[float, ...]] = {
    "DMSO": (1.000, 1.000, 1.000, 1.000, 1.000, 1.000, 1.000),
    "actin_collapse": (0.860, 0.898, 0.596, 0.577, 1.258, 1.255, 2.039),
    "polyploid_giant": (1.499, 0.899, 1.898, 0.941, 1.006, 0.927, 0.926),
    "spindle_retraction": (0.762, 0.976, 0.617, 0.756, 1.192, 1.229, 1.629),
    "enlarged_flat": (1.222, 1.000, 1.444, 0.956, 0.936, 1.007, 0.953),
    "sparse_ragged": (1.174, 0.996, 1.479, 0.765, 0.890, 1.038, 0.988),
    "monopolar_arrest": (1.177, 0.932, 1.094, 0.572, 1.194, 1.749, 1.829),
    "tight_colony": (0.943, 0.949, 0.675, 0.952, 1.056, 1.360, 1.322),
    "spread_pale": (1.121, 1.029, 1.676, 0.989, 0.899, 0.901, 1.037),
    "honeycomb_nuclei": (1.246, 0.877, 1.096, 0.530, 0.971, 1.571, 1.111),
    "bundled_tubulin": (1.046, 0.853, 0.968, 0.544, 0.898, 1.627, 2.059),
    "perinuclear_aggregate": (1.068, 0.970, 1.165, 0.711, 0.953, 1.193, 1.216),
    "bright_shrunken": (1.028, 0.897, 0.711, 0.468, 1.203, 1.607, 1.934),
}


@dataclass(frozen=True)
class Compound:
    """A treatment: its class, doses (uM) and how strong it is beside the class's typical compound."""

    effect: str
    doses: tuple[float, float, float]
    strength: float = 1.0


#: Invented names. Eight classes have two compounds, so that a held-out-compound split can be made.
COMPOUNDS: dict[str, Compound] = {
    "DMSO": Compound("DMSO", (0.0, 0.0, 0.0)),
    "velorin": Compound("actin_collapse", (0.3, 1.0, 3.0), 1.05),
    "tasumide": Compound("actin_collapse", (1.0, 3.0, 10.0), 0.92),
    "orpanib": Compound("polyploid_giant", (0.1, 0.3, 1.0), 1.05),
    "quelanib": Compound("polyploid_giant", (0.3, 1.0, 3.0), 0.92),
    "mistatol": Compound("spindle_retraction", (2.0, 5.0, 15.0)),
    "carboxen": Compound("enlarged_flat", (1.0, 3.0, 10.0), 1.05),
    "plativar": Compound("enlarged_flat", (3.0, 10.0, 30.0), 0.92),
    "fludarol": Compound("sparse_ragged", (0.3, 1.0, 3.0), 1.05),
    "tecanine": Compound("sparse_ragged", (0.01, 0.03, 0.1), 0.92),
    "kinespar": Compound("monopolar_arrest", (0.03, 0.1, 0.3)),
    "juncotib": Compound("tight_colony", (1.0, 3.0, 10.0)),
    "spredolin": Compound("spread_pale", (1.0, 3.0, 10.0)),
    "noduxine": Compound("honeycomb_nuclei", (0.1, 0.3, 1.0), 1.05),
    "colvamer": Compound("honeycomb_nuclei", (0.03, 0.1, 0.3), 0.92),
    "paxelone": Compound("bundled_tubulin", (0.1, 0.3, 1.0), 1.05),
    "epotasel": Compound("bundled_tubulin", (0.03, 0.1, 0.3), 0.92),
    "protazomib": Compound("perinuclear_aggregate", (0.1, 0.3, 1.0), 1.05),
    "lactevin": Compound("perinuclear_aggregate", (1.0, 3.0, 10.0), 0.92),
    "emetasol": Compound("bright_shrunken", (0.1, 0.3, 1.0), 1.05),
    "ribostane": Compound("bright_shrunken", (1.0, 3.0, 10.0), 0.92),
}
#: Strength of the three doses.
DOSE_STRENGTH = (0.82, 1.0, 1.12)
