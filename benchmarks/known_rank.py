"""Does the audit return a rank that is known? python -m benchmarks.known_rank --work rank [--n 15]

Five models of drawn cells: fresh ones ("real-again"), the bundled mini CellFlux, fresh ones with a lesion at two doses
(a sixth and a third of the nuclei erased along exact masks), and copies of controls. All are 48 px crops asked for the
same compounds. Known beforehand: fresh ones first, the larger dose after the smaller, and last the copies, of which not
one shows what was asked for; lost nuclei show in the rewards of nuclei, copies in MoA. Prints rank, gap with interval,
what each reward loses against fresh images, and flags; `--json` writes them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import generators
from biorewards.assay import Assay
from biorewards.audit import Audited, audit_folders
from biorewards.audit.bootstrap import bounded
from biorewards.audit.lesions import apply
from biorewards.audit.samples import controls_of, subset
from biorewards.io.manifest import read_manifest
from biorewards.io.reading import plan_reading
from biorewards.phantom import write_dataset
from biorewards.rewards import suite
from biorewards.segmentation.segmenter import Masks
from generators.generation import generate, make_plan

CHANNELS = {"actin": 0, "tubulin": 1, "dna": 2}
SIZE, DOSES = 48, {"mild": 1 / 6, "severe": 1 / 3}
ORDER = ("real-again", "mini-cellflux", "mild", "severe", "copies")


def make_models(work: Path, n: int, reals: int, checkpoint: Path) -> list[str]:
    """Write real images, and n images a compound of every model, to `work`; what is there stays. Names of models."""
    if not (work / "real" / "index.csv").exists():
        write_dataset(work / "real", reals, SIZE, 1)
    if not (work / "fresh" / "index.csv").exists():
        write_dataset(work / "fresh", 100 * n, SIZE, 2)
    real, fresh = read_manifest(work / "real"), read_manifest(work / "fresh")
    generator = generators.load("cellflux", checkpoint)
    plan = make_plan(generator, real, None, n, seed=0, split="test")
    generate(generator, plan, work / "mini-cellflux", seed=0, batch=20)
    chosen = fresh.table[fresh.table["Metadata_Compound"].isin(generator.compounds or [])]
    chosen = chosen.groupby("Metadata_Compound").head(n)
    files = [Path(fresh.files[row][0]) for row in chosen.index]
    pixels = np.stack([np.load(file) for file in files])
    inside = [file.relative_to(work / "fresh").with_suffix(".npz") for file in files]
    labels = [np.load(work / "fresh" / "masks" / path) for path in inside]
    masks = Masks(*(torch.from_numpy(np.stack([one[k] for one in labels])) for k in ("nuclei", "cells")))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    table = chosen[["Metadata_Compound", "Metadata_MoA"]].set_axis(["compound", "moa"], axis=1)
    made = {"real-again": images}
    made |= {k: apply("erase_nuclei", images, masks, dose, channels=CHANNELS).images for k, dose in DOSES.items()}
    untreated = controls_of(real, Assay.load("phantom"))
    held = untreated[(real.table["Metadata_Split"].to_numpy()[untreated] == "test")]
    copies = np.stack([np.load(real.files[held[k % len(held)]][0]) for k in range(len(images))])
    made["copies"] = torch.from_numpy(copies).permute(0, 3, 1, 2).float() / 255
    for name, crops in made.items():
        write(work / name, crops, table, (work / "fresh" / "biorewards.json").read_bytes())
    return list(ORDER)


def write(folder: Path, images: torch.Tensor, table: pd.DataFrame, about: bytes) -> None:
    """A model's images as a folder with an index."""
    if (folder / "index.csv").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for k, image in enumerate((images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()):
        np.save(folder / f"{k:05d}.npy", image)
    (folder / "biorewards.json").write_bytes(about)
    table.assign(file=[f"{k:05d}.npy" for k in range(len(table))]).to_csv(folder / "index.csv", index=False)


def audited(work: Path, names: list[str]) -> Audited:
    """The audit of `work`, with what is treated of its real images."""
    assay, data = Assay.load("phantom"), read_manifest(work / "real")
    treated = np.setdiff1d(np.arange(len(data)), controls_of(data, assay))
    return audit_folders(
        assay, suite(assay), subset(data, treated), {name: read_manifest(work / name) for name in names},
        controls=subset(data, controls_of(data, assay)), folder=work / "finished",
        plan=lambda manifest: plan_reading(manifest, assay),
    )  # fmt: skip


def figures(found: Audited) -> dict[str, Any]:
    """What the audit says, in the known order."""
    audit = found.audit
    rewards = [
        m.name for m in audit.metrics if f"Reward_{m.name}" in found.samples["real"].scores and m.name != "total"
    ]
    fresh = audit.rows["real-again"]
    rows: dict[str, Any] = {}
    for name in ORDER:
        row, place = audit.rows[name], audit.places[name]
        rows[name] = {
            "n": row.n, "rank": None if place.best is None else [place.best, place.worst],
            "gap": float(row.draws["gap"][0]), "gap_ci": list(bounded(row.draws["gap"])),
            "lost_against_fresh": {k: float(fresh.draws[k][0] - row.draws[k][0]) for k in rewards},
            "flags": [flag.kind for flag in audit.flags[name]],
        }  # fmt: skip
    return {"gap_by_chance": audit.floor, "models": rows}


def main() -> None:
    """Make, audit, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--n", type=int, default=15, help="images of each of the 20 compounds")
    parser.add_argument("--reals", type=int, default=1500)
    parser.add_argument("--checkpoint", type=Path, default=generators.MINI_CELLFLUX)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = figures(audited(args.work, make_models(args.work, args.n, args.reals, args.checkpoint)))
    print(f"gap that real images show by chance: {result['gap_by_chance']:.2f}")
    for name, row in result["models"].items():
        lost = ", ".join(
            f"{k} {v:+.2f}" for k, v in sorted(row["lost_against_fresh"].items(), key=lambda p: -abs(p[1]))
        )
        gap = f"gap {row['gap']:.2f} {np.round(row['gap_ci'], 2)}"
        print(f"{name:14s} rank {row['rank']} {gap} lost: {lost}; {row['flags']}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
