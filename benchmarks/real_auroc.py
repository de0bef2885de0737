"""Do verifiers tell real crops from the same crops with a lesion of their own? AUROC at each of the six doses.

    python -m benchmarks.real_auroc --data ../shared/data --json benchmarks/results/real_auroc.json

Real BBBC021 crops: 68 px, 12 bit (DMSO, cycloheximide) and 96 px, 8 bit (DMSO, colchicine). Each crop is judged
against statistics of crops of its class that it is not part of: of the other plates (68 px), of the other four fifths
(96 px). Lesions cut along masks of the classical segmenter, which the verifiers do not use (`--masks assay`: along
their own).

auroc: chance that an untouched crop scores higher than a harmed one, whichever crops they are (ties half). A reward of
-z^2 asks whether a value is usual for the class, and one crop of a few cells says little about that. Four figures tell
that limit from blindness: `harmed`, the share of crops that the lesion harmed at all (of a nucleus to be moved out: so
that half of what was to lie outside does, which a crop full of cells has no room for; a share of three nuclei may be
none), with their AUROC as `where_harmed`; `paired`, the share of crops that score lower than they did themselves (ties
half); `of_20`, the AUROC of means of 20 crops, which is how models are compared. Intervals: bootstrap over crops.

MoA is not judged: no classifier can honestly be had from two mechanisms.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from biorewards.assay import Assay
from biorewards.audit.lesions import LESIONS, Lesioned, apply
from biorewards.audit.samples import thin
from biorewards.batch import Batch
from biorewards.fitting import measure_images, reference_statistics
from biorewards.regions import nuclear_containment
from biorewards.rewards import suite
from biorewards.segmentation import load_segmenter
from biorewards.segmentation.diameter import estimate_diameter
from biorewards.segmentation.segmenter import Masks, percentile_range

Floats = npt.NDArray[np.float64]
#: Files are read in the order actin, tubulin, DNA.
CHANNELS = {"actin": 0, "tubulin": 1, "dna": 2}
#: Lesions of what verifiers own; other damage is another question.
OWNED = {name: lesion for name, lesion in LESIONS.items() if lesion.owner not in (None, "moa")}
#: (lesion, reward). Bare nuclei are what containment is there for, whoever else owns the lesion.
ASKED = [(name, str(lesion.owner)) for name, lesion in OWNED.items()] + [("erase_cytoplasm", "nucleus_in_cytoplasm")]
BAR, DRAWS, BATCH, TOGETHER = 0.9, 1000, 50, 20
#: Crops that make an AUROC.
LEAST = 10


def crops68(data: Path) -> tuple[Tensor, list[str], npt.NDArray[np.str_]]:
    """Images in [0, 1], class of each, and the fold that it is judged in: the files' split, which is by plate."""
    table = pd.read_csv(data / "bbbc021_crops68" / "crops.csv", dtype=str)
    strips = {name: np.asarray(Image.open(data / "bbbc021_crops68" / name)) for name in table["file"].unique()}
    crops = [
        strips[name].reshape(3, 68, -1, 68)[::-1, :, int(place)]
        for name, place in zip(table["file"], table["index"], strict=True)
    ]
    return (
        torch.from_numpy(np.stack(crops).astype(np.float32) / 4095),
        table["moa"].tolist(),
        table["split"].to_numpy(str),
    )


def pairs96(data: Path) -> tuple[Tensor, list[str], npt.NDArray[np.str_]]:
    """The same of the 96 px crops of DMSO and colchicine; five folds by chance, no panels with black corners."""
    table = pd.read_csv(data / "bbbc021_pairs96" / "crops.csv", dtype=str, keep_default_na=False)
    table = table[(table["corners_masked"] == "0") & table["moa"].isin(["DMSO", "Microtubule destabilizers"])]
    crops = [np.asarray(Image.open(data / "bbbc021_pairs96" / name).convert("RGB")) for name in table["file"]]
    fold = np.random.default_rng(0).permutation(len(table)) % 5
    images = torch.from_numpy(np.stack(crops)[..., ::-1].transpose(0, 3, 1, 2).astype(np.float32) / 255)
    return images, table["moa"].tolist(), fold.astype(str)


SETS = {"crops68": crops68, "pairs96": pairs96}


def assay_of(images: Tensor, classes: list[str]) -> Assay:
    """The bundled assay with the range and scale of these crops; statistics come from `judges`."""
    assay = Assay.load("bbbc021")
    low, high = (t.median(0).values for t in percentile_range(images, 1.0, 99.8))
    intensity = {role: (float(low[k]), float(high[k])) for role, k in CHANNELS.items()}
    assay = replace(
        assay, channels=CHANNELS, intensity=intensity, classes=classes, compounds={}, pixel_size=None, crop_size=None
    )
    assert assay.segmenter is not None
    return replace(assay, nucleus_diameter=estimate_diameter(assay.segmenter, assay.normalised(images)[:, 2], None))


def judges(assay: Assay, images: Tensor, labels: list[str], fold: npt.NDArray[np.str_]) -> dict[str, Assay]:
    """Fold -> the assay with statistics of all crops outside it."""
    measures = measure_images(assay, images, lambda what, done, of: say(f"{what} {done}/{of}"))
    names = np.array(labels, dtype=object)
    return {
        one: replace(assay, statistics=reference_statistics(measures[fold != one], names[fold != one], assay.classes))
        for one in np.unique(fold)
    }


def scores(judge: dict[str, Assay], reward: str, images: Tensor, target: Tensor, fold: npt.NDArray[np.str_]) -> Floats:
    """(N,) value of a reward, every crop by the judge of its fold."""
    found = np.full(len(images), np.nan)
    for name, assay in judge.items():
        rows = np.flatnonzero(fold == name)
        for part in np.array_split(rows, max(1, -(-len(rows) // BATCH))):
            batch = Batch(images[torch.from_numpy(part)], target[torch.from_numpy(part)], assay)
            found[part] = suite(assay, [reward])(batch).scores[reward].value.numpy()
    return found


def masks_of(assay: Assay, images: Tensor) -> Masks:
    """Masks along which lesions cut."""
    parts = [assay.segment(images[k : k + BATCH]) for k in range(0, len(images), BATCH)]
    return Masks(torch.cat([m.nuclei for m in parts]), torch.cat([m.cells for m in parts]))


def auroc(real: Floats, harmed: Floats, seed: int = 0) -> tuple[float, float, float]:
    """Chance that a real crop scores higher than a harmed one (ties half), and its 95 % bootstrap interval."""
    wins = (real[:, None] > harmed[None]) + 0.5 * (real[:, None] == harmed[None])
    n = len(real)
    rng = np.random.default_rng(seed)
    weight = rng.multinomial(n, np.full(n, 1 / n), DRAWS) / n
    draws = np.einsum("bi,ij,bj->b", weight, wins, weight, optimize=True)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(wins.mean()), float(low), float(high)


def of_means(real: Floats, harmed: Floats, size: int = TOGETHER) -> float:
    """Chance that the mean of `size` real crops is higher than that of `size` harmed ones (drawn with replacement)."""
    rng = np.random.default_rng(0)
    means = [values[rng.integers(len(values), size=(20 * DRAWS, size))].mean(1) for values in (real, harmed)]
    return float(((means[0] > means[1]) + 0.5 * (means[0] == means[1])).mean())


def was_harmed(name: str, dose: float, before: tuple[Tensor, Masks], after: Lesioned) -> npt.NDArray[np.bool_]:
    """(N,) crops in which a lesion did something; see the head of this file."""
    if name == "move_nucleus_out":
        inside = [nuclear_containment(m.nuclei, before[1].cells) for m in (before[1], after.masks)]
        gone = inside[0] - inside[1]
        nuclei = before[1].nuclei.flatten(1).amax(1).clamp(min=1)
        return (gone > 0.5 * dose / nuclei).numpy()
    return (after.images - before[0]).abs().flatten(1).amax(1).gt(0.02).numpy()


def lesioned(
    assay: Assay, judge: dict[str, Assay], images: Tensor, masks: Masks, target: Tensor, fold: npt.NDArray[np.str_]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each lesion with its figures."""
    untouched: dict[str, Floats] = {}
    for name, owner in ASKED:
        lesion = OWNED[name]
        if owner not in untouched:
            untouched[owner] = scores(judge, owner, images, target, fold)
        real = untouched[owner]
        lines = []
        for dose in lesion.doses:
            harmed = apply(name, images, masks, dose, channels=assay.channels)
            value = scores(judge, owner, harmed.images, target, fold)
            area, low, high = auroc(real, value)
            paired = float(((real > value) + 0.5 * (real == value)).mean())
            did = was_harmed(name, dose, (images, masks), harmed)
            there = auroc(real[did], value[did])[0] if did.sum() >= LEAST else None
            lines.append({
                "dose": round(dose, 3), "auroc": area, "interval_95": [low, high], "paired": paired,
                "of_20": of_means(real, value), "harmed": float(did.mean()), "where_harmed": there,
            })  # fmt: skip
            more = ", ".join(f"{key} {lines[-1][key]:.3f}" for key in list(lines[-1])[3:] if lines[-1][key] is not None)
            say(f"{owner}, {name} {dose:.3g} {lesion.unit}: AUROC {area:.3f} [{low:.3f}, {high:.3f}], {more}")
        reached = {key: _from(lines, key) for key in ("auroc", "where_harmed", "of_20")}
        yield f"{name} ({owner})", {"owner": owner, "lesion": name, "unit": lesion.unit, "doses": lines,
                                    "reaches_bar_at": reached}  # fmt: skip


def _from(lines: list[dict[str, Any]], key: str) -> float | None:
    """The dose from which on a figure stays at the bar; None where it does not at the highest."""
    found = None
    for line in reversed(lines):
        if line[key] is None or line[key] < BAR:
            break
        found = line["dose"]
    return found


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def judge_set(name: str, data: Path, n: int, cut_along: str) -> dict[str, Any]:
    """Figures of one set, from at most n of its crops, the classes alike; statistics always come from all of them."""
    images, labels, fold = SETS[name](data)
    classes = sorted(set(labels), key=lambda one: (one != "DMSO", one))
    target = torch.tensor([classes.index(one) for one in labels])
    assay = assay_of(images, classes)
    judge = judges(assay, images, labels, fold)
    rows = thin(target.numpy(), np.arange(len(images)), n, 0)
    chosen = torch.from_numpy(rows)
    cutter = assay if cut_along == "assay" else assay.with_segmenter(load_segmenter("classical"))
    masks = masks_of(cutter, images[chosen])
    found = dict(lesioned(assay, judge, images[chosen], masks, target[chosen], fold[rows]))
    return {"crops": len(rows), "statistics_from": len(images), "classes": classes, "lesions": found}


def best(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Reward -> set and lesion -> doses from which on it stays at the bar, and its highest AUROC."""
    found: dict[str, dict[str, Any]] = {}
    for name, one in results.items():
        for figures in one["lesions"].values():
            top = max(figures["doses"], key=lambda line: line["auroc"])
            found.setdefault(figures["owner"], {})[f"{name}, {figures['lesion']}"] = {
                "reaches_bar_at": figures["reaches_bar_at"], "unit": figures["unit"],
                "highest": round(top["auroc"], 3), "highest_interval_95": [round(x, 3) for x in top["interval_95"]],
            }  # fmt: skip
    return found


def main() -> None:
    """Judge both sets, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--n", type=int, default=150, help="crops of a set that are harmed")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--masks", choices=["classical", "assay"], default="classical")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        results = {name: judge_set(name, args.data, args.n, args.masks) for name in args.sets}
    for name, one in results.items():
        print(f"\n{name}, {one['crops']} crops: AUROC of single crops / of means of {TOGETHER}, by dose")
        for figures in one["lesions"].values():
            line = "  ".join(f"{d['dose']:g}: {d['auroc']:.2f}/{d['of_20']:.2f}" for d in figures["doses"])
            bars = " / ".join("no" if bar is None else f"{bar:g}" for bar in figures["reaches_bar_at"].values())
            print(f"  {figures['owner']:21s} {figures['lesion']:17s} {line}  | {BAR} from {bars}")
    if args.json:
        text = {"masks": args.masks, "bar": BAR, "sets": results, "by_reward": best(results)}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
