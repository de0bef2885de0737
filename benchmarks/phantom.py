"""Phantom crops per second on one core: `python benchmarks/phantom.py [--n 4000] [--crops 1000]`.

Takes the first `--crops` of a data set of `--n`, since the cost of a crop depends on how many of a field are used.
CPU time, best of three, numpy held to one thread; the clock includes everything but writing files.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import time

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"


def main() -> None:
    """Print one JSON line a size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=4000)
    parser.add_argument("--crops", type=int, default=1000)
    args = parser.parse_args()
    import numpy as np
    import scipy

    from biorewards.phantom import PIXEL_SIZE_UM, iterate

    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    machine = {"cpu": model, "cores": os.cpu_count(), "numpy": np.__version__, "scipy": scipy.__version__}
    for size in PIXEL_SIZE_UM:
        seconds = []
        for _ in range(3):
            start = time.process_time()
            count = sum(1 for _ in itertools.islice(iterate(args.n, size), args.crops))
            seconds.append(time.process_time() - start)
        load = os.getloadavg()[0]
        print(
            json.dumps(
                {
                    "size": size,
                    "n": args.n,
                    "crops": count,
                    "crops_per_core_second": round(count / min(seconds), 1),
                    "load": load,
                }
                | machine
            )
        )


if __name__ == "__main__":
    main()
