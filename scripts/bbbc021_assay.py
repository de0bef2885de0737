"""Make the bundled assay `bbbc021` from what can honestly be had, and print how far each number can be trusted.

    python scripts/bbbc021_assay.py --data ../shared/data --out biorewards/assets/assays/bbbc021

Real 96 px crops exist for DMSO and for one microtubule destabilizer (colchicine); their statistics are measured with
the bundled segmenter. For the other eleven mechanisms only well profiles exist (Ljosa et al. 2013: means over whole
cells in whole fields). A crop sees something else: it cuts most cells at its border, and takes the largest of those it
sees. So a profile is carried over as a ratio to DMSO, damped by what cropping does to such a ratio:

    mean(MoA, crop) = mean(DMSO, crop) * ratio ^ e,    ratio = MoA / DMSO of the wells, taken within plates.

The exponent e of each measure is fitted on the phantom, where crops and whole cells are known exactly for twelve
classes that move as these wells do (least squares of log ratio on log ratio through the origin). Its error is
the leave-one-class-out error there, and it is checked on the real mechanisms that have crops. The spread is DMSO's:
the same coefficient of variation for sizes and form factor, sd proportional to the root of the mean for counts.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from skimage import io
from torch import Tensor

from biorewards.assay import Assay
from biorewards.batch import Batch
from biorewards.fitting import measure_images, reference_statistics
from biorewards.phantom import CLASSES, render_dataset
from biorewards.rewards import MEASURES
from biorewards.segmentation import load_segmenter
from biorewards.segmentation.diameter import estimate_diameter
from biorewards.segmentation.segmenter import Masks, percentile_range

CHANNELS = {"actin": 0, "tubulin": 1, "dna": 2}
#: Measure -> how its profile ratio is made from the wells' features.
PROFILES = {
    "nucleus_roundness": lambda w: w.Nuclei_AreaShape_FormFactor,
    "nucleus_size": lambda w: w.Nuclei_AreaShape_Area,
    "cytoplasm_size": lambda w: w.Cells_AreaShape_Area,
    # Cells per area goes with one over the square of the distance to the nearest neighbour.
    "nucleus_count": lambda w: 1 / w.Nuclei_Neighbors_FirstClosestDistance_20**2,
    "cytoplasm_count": lambda w: 1 / w.Nuclei_Neighbors_FirstClosestDistance_20**2,
}


def well_ratios(wells: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """(MoA x measure) median over wells of the ratio to the plate's median DMSO well; wells per MoA."""
    features = pd.DataFrame({name: of(wells) for name, of in PROFILES.items()})
    control = features[wells.moa == "DMSO"].groupby(wells.plate).median()
    ratio = features / control.reindex(wells.plate).to_numpy()
    return ratio.groupby(wells.moa).median(), wells.moa.value_counts()


class ExactMasks:
    """The phantom's own masks, handed out in order."""

    name = fingerprint = "exact"

    def __init__(self, nuclei: Tensor, cells: Tensor) -> None:
        self.nuclei, self.cells, self.at = nuclei, cells, 0

    def __call__(self, nucleus: Tensor | None, cytoplasm: Tensor | None, diameter: float) -> Masks:
        assert nucleus is not None
        part = slice(self.at, self.at + len(nucleus))
        self.at += len(nucleus)
        return Masks(self.nuclei[part], self.cells[part])


def phantom_ratios(draft: Assay, n: int, seed: int) -> pd.DataFrame:
    """(mirrored MoA x measure): mean of the class / mean of DMSO over phantom crops, measured on exact masks."""
    crops = render_dataset(n, 96, seed)
    images = torch.from_numpy(np.moveaxis(crops.images, -1, 1).copy()).float() / 255
    exact = replace(draft, segmenter=ExactMasks(torch.from_numpy(crops.nuclei), torch.from_numpy(crops.cells)))
    measures = measure_images(exact, images, lambda what, done, total: None)[list(MEASURES)]
    means = measures.groupby(crops.rows["ANNOT"].to_numpy()).mean()
    ratios = means / means.loc["DMSO"]
    return ratios.drop("DMSO").rename(index={name: effect.mirrors for name, effect in CLASSES.items()})


def exponents(crop: pd.DataFrame, well: pd.DataFrame) -> dict[str, float]:
    """Slope through the origin of log crop ratio on log well ratio, per measure."""
    x, y = np.log(well.loc[crop.index, list(MEASURES)]), np.log(crop[list(MEASURES)])
    return {m: float((x[m] * y[m]).sum() / (x[m] ** 2).sum()) for m in MEASURES}


def leave_one_out(crop: pd.DataFrame, well: pd.DataFrame) -> pd.DataFrame:
    """Relative error of the carried-over mean of each class when its own numbers are left out of the fit."""
    rows = {}
    for name in crop.index:
        rest = exponents(crop.drop(name), well)
        rows[name] = {m: well.loc[name, m] ** rest[m] / crop.loc[name, m] - 1 for m in MEASURES}
    return pd.DataFrame(rows).T


def pairs96(data: Path) -> tuple[Tensor, np.ndarray]:
    """Real 96 px crops (actin, tubulin, DNA) and their MoA; figure panels with blacked corners are left out."""
    table = pd.read_csv(data / "bbbc021_pairs96" / "crops.csv")
    table = table[(table.corners_masked == 0) & table.moa.notna()]
    stack = np.stack([io.imread(data / "bbbc021_pairs96" / f) for f in table.file])
    return torch.from_numpy(np.moveaxis(stack[..., ::-1], -1, 1).copy()).float() / 255, table.moa.to_numpy()


def crops68(data: Path) -> tuple[Tensor, np.ndarray]:
    """Real 68 px crops (actin, tubulin, DNA), 12 bit brought to [0, 1], and their MoA."""
    table = pd.read_csv(data / "bbbc021_crops68" / "crops.csv")
    strips = {f: io.imread(data / "bbbc021_crops68" / f) for f in table.file.unique()}
    stack = np.stack(
        [strips[f].reshape(3, 68, -1, 68)[:, :, i] for f, i in zip(table.file, table["index"], strict=True)]
    )
    return torch.from_numpy(stack[:, ::-1].astype(np.float32).copy()) / 4095, table.moa.to_numpy()


def intensity(images: Tensor) -> dict[str, tuple[float, float]]:
    low, high = (t.median(0).values for t in percentile_range(images, 1.0, 99.8))
    return {role: (round(float(low[i]), 5), round(float(high[i]), 5)) for role, i in CHANNELS.items()}


def diameter_of(draft: Assay, images: Tensor) -> float:
    assert draft.segmenter is not None
    return round(estimate_diameter(draft.segmenter, draft.normalised(images)[:, 2], None), 2)


def carried(dmso: pd.DataFrame, ratios: pd.DataFrame, wells: pd.Series, slopes: dict[str, float]) -> pd.DataFrame:
    rows = []
    for moa in ratios.index.drop("DMSO"):
        for m in MEASURES:
            base = dmso.loc[m]
            factor = ratios.loc[moa, m] ** slopes[m]
            spread = base.sd * (np.sqrt(factor) if m.endswith("_count") else factor)
            row = {
                "class": moa,
                "measure": m,
                "mean": base["mean"] * factor,
                "sd": spread,
                "n": int(wells[moa]),
                "origin": "wells",
            }
            rows.append(row | dict.fromkeys(("q05", "q25", "q50", "q75", "q95"), np.nan))
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("biorewards/assets/assays/bbbc021"))
    parser.add_argument("--phantoms", type=int, default=3900)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pd.set_option("display.width", 160)
    folder = args.data / "bbbc021_profiles"
    wells = pd.read_csv(folder / "wells.csv.gz")
    listed = pd.read_csv(folder / "moa.csv")
    ratios, counts = well_ratios(wells)
    real, moa = pairs96(args.data)
    draft = Assay(
        name="bbbc021", channels=CHANNELS, pixel_size=None, crop_size=None, intensity=intensity(real),
        classes=["DMSO", *sorted(set(listed.moa) - {"DMSO"})],
        compounds=dict(zip(listed.compound, listed.moa, strict=True)),
        nucleus_diameter=1.0, statistics=pd.DataFrame(), segmenter=load_segmenter("compact"),
    )  # fmt: skip
    draft = replace(draft, nucleus_diameter=diameter_of(draft, real[moa == "DMSO"]))
    silent = lambda what, done, total: None  # noqa: E731
    measured = measure_images(draft, real, silent)
    direct = reference_statistics(measured, moa, draft.classes)
    direct = direct[(direct["class"] != "(treated)") & (direct.n >= 20)]
    dmso = direct[direct["class"] == "DMSO"].set_index("measure")

    crop = phantom_ratios(draft, args.phantoms, 21)
    slopes, errors = exponents(crop, ratios), leave_one_out(crop, ratios)
    print("exponents:", {k: round(v, 3) for k, v in slopes.items()})
    print("leave-one-class-out relative error on the phantom (median, 90th percentile of |error|):")
    print(pd.DataFrame({"median": errors.abs().median(), "p90": errors.abs().quantile(0.9)}).round(3).to_string())

    small, label = crops68(args.data)
    check68 = replace(draft, intensity=intensity(small))
    check68 = replace(check68, nucleus_diameter=diameter_of(check68, small[label == "DMSO"]))
    seen68 = measure_images(check68, small, silent)[list(MEASURES)].groupby(label).mean()
    seen96 = measured[list(MEASURES)].groupby(moa).mean()
    drug = "Microtubule destabilizers"
    checks = pd.DataFrame({
        "Protein synthesis, carried over": [ratios.loc["Protein synthesis", m] ** slopes[m] for m in MEASURES],
        "seen in 68 px crops": (seen68.loc["Protein synthesis"] / seen68.loc["DMSO"])[list(MEASURES)].to_numpy(),
        f"{drug}, carried over": [ratios.loc[drug, m] ** slopes[m] for m in MEASURES],
        "seen in 96 px crops": (seen96.loc[drug] / seen96.loc["DMSO"])[list(MEASURES)].to_numpy(),
    }, index=list(MEASURES))  # fmt: skip
    print("ratio to DMSO, carried over and seen in real crops:")
    print(checks.round(3).to_string())

    statistics = pd.concat([direct, carried(dmso, ratios, counts, slopes)], ignore_index=True)
    statistics = statistics[statistics.measure.isin([*MEASURES, "nucleus_in_cytoplasm"])]
    statistics = statistics.drop_duplicates(["class", "measure"], keep="first")  # crops before wells
    values = measured.nucleus_in_cytoplasm[moa == "DMSO"].dropna()
    card = {
        "sources": {
            "images": "BBBC021v1 (Caie et al. 2010), 96 px crops of DMSO and colchicine wells",
            "wells": "632 well profiles of BBBC021 (Ljosa et al. 2013), ratios to DMSO carried over to crops",
        },
        "images_per_class": {"all": pd.Series(moa).value_counts().to_dict()},
        "wells_per_class": counts.to_dict(),
        "crop_size": 96,
        "rule": "mean(MoA) = mean(DMSO crops) * well ratio ** exponent",
        "exponents": slopes,
        "leave_one_out_error": {"median": errors.abs().median().to_dict(), "p90": errors.abs().quantile(0.9).to_dict()},
        "check_on_real_crops": checks.to_dict(),
        "classifier": None,
        "real_scores": {
            "nucleus_in_cytoplasm": {"mean": float(values.mean()), "sd": float(values.std()), "n": len(values)}
        },
        "not_covered": "no MoA classifier: real images of 2 of 12 mechanisms are not enough; fit your own",
    }
    assay = replace(draft, statistics=statistics.reset_index(drop=True), card=card)
    card["real_scores"] |= control_scores(assay, real, moa)
    assay.save(args.out)
    print(statistics.pivot(index="class", columns="measure", values="mean").round(3).to_string())
    print(f"written to {args.out}")


def control_scores(assay: Assay, real: Tensor, moa: np.ndarray) -> dict[str, dict[str, float]]:
    """What the real crops score on the rewards that have a reference from crops (the images behind it: optimistic)."""
    from biorewards.rewards import suite

    keep = np.isin(moa, ["DMSO", "Microtubule destabilizers"])
    target = torch.tensor([assay.classes.index(m) for m in moa[keep]])
    result = suite(assay)(Batch(real[torch.from_numpy(keep)], target, assay))
    values = {name: s.value[~s.value.isnan()] for name, s in result.scores.items() if name in MEASURES}
    return {name: {"mean": float(v.mean()), "sd": float(v.std()), "n": len(v)} for name, v in values.items()}


if __name__ == "__main__":
    main()
