"""How long an audit takes: python -m benchmarks.audit --work timing --images 10000 --models 4 --json FILE

Draws phantom crops (96 px; kept in the work folder), a set of its own for every model, and times `biorewards audit`
over them as a user would start it: a process of its own, from nothing scored to the written page. The minutes that the
processors spent on it stand beside, for a machine that is not quiet.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch

from biorewards.phantom import write_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--images", type=int, default=10_000, help="of each model")
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--reals", type=int, default=3000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--draw-only", action="store_true", help="leave the timing to a quieter moment")
    args = parser.parse_args()
    names = [f"model-{k}" for k in range(1, args.models + 1)]
    for seed, name in enumerate(["real", *names], start=31):
        if not (args.work / name / "index.csv").exists():
            print(f"drawing {name}", file=sys.stderr, flush=True)
            write_dataset(args.work / name, args.reals if name == "real" else args.images, 96, seed)
    if args.draw_only:
        return
    out = args.work / "audit"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "cli.main", "audit", "--assay", "phantom", "--real", args.work / "real"]
    command += [part for name in names for part in ("--model", f"{name}={args.work / name}")] + ["--out", out]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = {
        "machine": {"processor": platform.machine(), "cores": psutil.cpu_count(), "torch": torch.__version__},
        "models": args.models, "images_of_each": args.images, "real_images": args.reals,
        "minutes": round((time.perf_counter() - began) / 60, 2),
        "processor_minutes": round((used.ru_utime + used.ru_stime) / 60, 2),
        "most_resident_mb": round(used.ru_maxrss / 1024),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
