"""How good the mini CellFlux is: python scripts/mini_cellflux_quality.py --work mini [--checkpoint FILE] [--curve]

Draws samples from controls of the phantom's test plates, which no training saw, and audits them with the phantom assay
(`biorewards audit`): MoA accuracy, Frechet and kernel distance in the classifier's features, and all seven rewards,
beside held-out real images and copies of controls, over all images and class by class. Crops of 48 px are resampled to
the assay's pixel, as `biorewards score` does. `--work` is the folder of scripts/mini_cellflux.py, whose images are the
real ones. Writes scripts/mini_cellflux/quality.json and docs/mini_cellflux.png.

--curve: MoA accuracy of every snapshot of the run on validation plates, to scripts/mini_cellflux/curve.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import generators
from biorewards.assay import Assay
from biorewards.audit.results import table
from biorewards.audit.run import audit_folders
from biorewards.audit.samples import subset, thin
from biorewards.io.images import resize
from biorewards.io.manifest import Manifest, read_manifest
from biorewards.io.reading import plan_reading
from biorewards.rewards import suite
from generators.base import seeded
from generators.generation import generate, make_plan
from generators.pairs import read_pairs, read_rows, state_of
from generators.pictures import mosaic, write_picture
from generators.pretrain import LOG, SNAPSHOTS

RESULTS = Path(__file__).parent / "mini_cellflux"
PICTURE = Path(__file__).parents[1] / "docs" / "mini_cellflux.png"
REFERENCE, HELD = 2000, 600


def accuracy(assay: Assay, images: torch.Tensor, compounds: list[str]) -> tuple[float, float]:
    """Share of images (N, C, 48, 48) that the assay's classifier puts into their compound's class; its mean p."""
    classifier = assay.classifier
    assert classifier is not None
    large = torch.from_numpy(np.stack([resize(image.numpy(), 2) for image in images]))
    with torch.inference_mode():
        p = torch.cat([classifier(assay.normalised(part)) for part in large.split(100)])
    wanted = torch.tensor([classifier.classes.index(assay.compounds[name]) for name in compounds])
    return float((p.argmax(1) == wanted).float().mean()), float(p.gather(1, wanted[:, None]).mean())


def curve(work: Path, assay: Assay, each: int, steps: int) -> list[dict[str, float]]:
    """MoA accuracy of every snapshot on validation plates: the same controls and seeds for all."""
    pairs = read_pairs(work / "phantom", split="val")
    names = pairs.names * each
    rng = np.random.default_rng(1)
    wanted = [np.flatnonzero(np.array(pairs.compounds, dtype=object) == name) for name in names]
    items = np.array([rng.choice(rows) for rows in wanted])
    controls = np.array([rng.choice(pairs.controls[pairs.group[item]]) for item in items])
    images, real = (read_rows(pairs.manifest, rows, 3) for rows in (controls, pairs.treated[items]))
    points = []
    for what, found in (("real", real), ("copy-control", images)):
        share, p = accuracy(assay, found, names)
        print(f"{what}: MoA accuracy {share:.3f}, mean p {p:.3f}", flush=True)
        points.append({"row": what, "moa_accuracy": share, "moa": p})
    log = [json.loads(line) for line in (work / "run" / LOG).read_text(encoding="utf-8").splitlines()]
    losses = {line["step"]: line["validation_loss"] for line in log if "validation_loss" in line}
    for path in sorted((work / "run" / SNAPSHOTS).glob("*.safetensors")):
        generator = generators.load("cellflux", path)
        drawn = [
            generator.sample(
                images[i : i + 40], names[i : i + 40], steps=steps, generator=seeded(range(i, min(i + 40, len(names))))
            )
            for i in range(0, len(names), 40)
        ]
        share, p = accuracy(assay, torch.cat(drawn), names)
        step = int(path.stem)
        points.append({"step": step, "validation_loss": losses.get(step), "moa_accuracy": share, "moa": p})
        print(f"step {step}: validation loss {losses.get(step)}, MoA accuracy {share:.3f}, mean p {p:.3f}", flush=True)
    return points


def real_images(data: Manifest, assay: Assay, seed: int = 0) -> tuple[Manifest, Manifest]:
    """Treated rows of training (reference) and test plates (held out) in one manifest; controls of test plates."""
    state, split = state_of(data), data.table["Metadata_Split"].to_numpy(object)
    label = np.array([assay.classes.index(name) for name in data.table["Metadata_MoA"]], dtype=np.int64)
    rows = [
        thin(label, np.flatnonzero((state == "treated") & (split == part)), most, seed)
        for part, most in (("train", REFERENCE), ("test", HELD))
    ]
    return subset(data, np.concatenate(rows)), subset(data, np.flatnonzero((state == "control") & (split == "test")))


def picture(work: Path, samples: Path, real: Manifest, each: int = 4) -> None:
    """A row a class: a control, real images of test plates, samples."""
    drawn = read_manifest(samples)
    rows = []
    for name in sorted(set(drawn.table["Metadata_MoA"])):
        mine = np.flatnonzero((drawn.table["Metadata_MoA"] == name).to_numpy())[:: max(1, len(drawn) // 200)][:each]
        there = (real.table["Metadata_MoA"] == name) & (real.table["Metadata_Split"] == "test")
        rows.append(torch.cat([
            read_rows(real, np.flatnonzero(there.to_numpy())[5 : 5 + each], 3), read_rows(drawn, mine, 3),
        ]))  # fmt: skip
        print(f"picture row: {name}")
    write_picture(PICTURE, mosaic(rows, gap_after=each))


def main() -> None:
    """Draw, audit, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, default=generators.MINI_CELLFLUX)
    parser.add_argument("--n", type=int, default=25, help="samples of each of the 20 compounds")
    parser.add_argument("--curve", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    assay = Assay.load("phantom")
    RESULTS.mkdir(exist_ok=True)
    if args.curve:
        points = curve(args.work, assay, each=6, steps=6)
        (RESULTS / "curve.json").write_text(json.dumps(points, indent=1) + "\n")
        return

    data = read_manifest(args.work / "phantom")
    generator = generators.load("cellflux", args.checkpoint)
    plan = make_plan(generator, data, None, args.n, seed=0, split="test")
    samples = args.work / "samples"
    generate(generator, plan, samples, seed=0, batch=40, progress=lambda done, of: print(f"drawn {done} of {of}"))
    real, controls = real_images(data, assay)
    picture(args.work, samples, real)
    audited = audit_folders(
        assay, suite(assay), real, {"mini-cellflux": read_manifest(samples)}, controls=controls,
        folder=args.work / "audit", plan=lambda manifest: plan_reading(manifest, assay),
        progress=lambda what, done, of: print(f"{what} {done} of {of}", flush=True) if done in (of, of // 2) else None,
    )  # fmt: skip
    report(table(audited.audit), audited.about)


def report(found: Any, about: dict[str, Any]) -> None:
    """Print the figures against the bars, and write them."""
    order = ["real", "mini-cellflux", "copy-control"]
    whole = found[found.scope == "all"].pivot(index="metric", columns="row", values="value")[order]
    keep = [name for name in whole.index if not name.startswith(("spread", "worst"))]
    print(whole.loc[keep].round(3).to_string())
    accuracy_of = whole.loc["moa_accuracy"]
    half = (accuracy_of["mini-cellflux"] - accuracy_of["copy-control"]) / (
        accuracy_of["real"] - accuracy_of["copy-control"]
    )
    print(f"\nMoA accuracy lies {100 * half:.0f} % of the way from copies of controls to real images (bar: 50 %)")
    classes = found[found.scope == "class"]
    per_class = {}
    for metric in ("moa_accuracy", "frechet", "kernel"):
        part = classes[classes.metric == metric].pivot(index="group", columns="row", values="value")[order]
        print(f"\n{metric} by class\n{part.round(3).to_string()}")
        per_class[metric] = part.round(4).to_dict("index")
        if metric != "moa_accuracy":
            nearer = part["mini-cellflux"] - part["real"] < 0.5 * (part["copy-control"] - part["real"])
            measured = int(part["mini-cellflux"].notna().sum())
            print(
                f"less than half as far as copies: {int(nearer.sum())} of {measured} classes (others: too few images)"
            )
    result = {
        "about": about,
        "all": whole.round(4).to_dict("index"),
        "class": per_class,
        "way_to_real": round(float(half), 4),
    }
    (RESULTS / "quality.json").write_text(json.dumps(result, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
