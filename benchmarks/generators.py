"""What sampling costs beside bare network passes, and what the fast path saves: `python -m benchmarks.generators`.

Guided sampling of a batch of B needs, at every velocity call, the network with and without compound. It is compared
with just that: as many bare passes of the same network on a batch of B, taken in turn; CPU time of one thread (wall
time on a GPU), best of `--repeats`. The bar: at most 1.1 times. Two networks: the bundled mini CellFlux at 48 px, and
one of the published width (mult 2,2,2 of 128, one block a level) at 16 px.

The fast path (bfloat16, channels_last, torch.compile) is timed by images a second of guided sampling, with the largest
difference of its images from the plain ones in 8-bit levels. `--compile` takes minutes of compiling on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import generators
from generators.base import evaluating, seeded, to_range
from generators.cellflux import CellFlux
from generators.solvers import Solver

RESULTS = Path(__file__).parent / "results" / "generators.json"


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of CPU time, or wall time on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    work()
    return time.process_time() - start


def overhead(model: CellFlux, side: int, batch: int, repeats: int) -> dict[str, Any]:
    """Guided sampling against its bare passes."""
    names = (model.compounds or []) * batch
    control = torch.rand(batch, model.capabilities.channels, side, side, generator=torch.Generator().manual_seed(0))
    control = control.to(model.device)
    x = to_range(control, (-1.0, 1.0))
    condition = model.embed(names[:batch])
    t = torch.full((batch,), 0.5, device=model.device)
    calls = model.solver.calls()

    def sampling() -> None:
        model.sample(control, names[:batch], generator=seeded(range(batch)))

    def passes() -> None:
        with evaluating(model.net):
            for _ in range(calls):
                model.net(x, t, condition)
                model.net(x, t, None)

    sampling(), passes()
    times = [(timed(sampling, model.device), timed(passes, model.device)) for _ in range(repeats)]
    sampled, bare = (min(column) for column in zip(*times, strict=True))
    return {
        "parameters": sum(p.numel() for p in model.net.parameters()), "side": side, "batch": batch, "passes": 2 * calls,
        "sampling_s": round(sampled, 4), "passes_s": round(bare, 4), "ratio": round(sampled / bare, 4),
    }  # fmt: skip


def fast_paths(model: CellFlux, side: int, batch: int, repeats: int, compiled: bool) -> list[dict[str, Any]]:
    """Images a second of guided sampling, plain and fast, in turn."""
    names = ((model.compounds or []) * batch)[:batch]
    control = torch.rand(batch, model.capabilities.channels, side, side, generator=torch.Generator().manual_seed(0))
    paths = {"plain": {}, "channels_last": {"channels_last": True}, "bfloat16": {"bfloat16": True},
             "both": {"bfloat16": True, "channels_last": True}}  # fmt: skip
    if compiled:
        paths |= {"compile": {"compile": True}, "all": {"bfloat16": True, "channels_last": True, "compile": True}}
    models = {}
    for name, options in paths.items():
        net = copy.deepcopy(model.net)
        models[name] = CellFlux(net, table=model.table, noise_level=model.noise_level, guidance=model.guidance,
                                solver=model.solver, **options)  # fmt: skip
    images = {name: m.sample(control, names, generator=seeded(range(batch))) for name, m in models.items()}
    best = dict.fromkeys(models, float("inf"))
    for _ in range(repeats):
        for name, m in models.items():
            work = timed(lambda m=m: m.sample(control, names, generator=seeded(range(batch))), m.device)
            best[name] = min(best[name], work)
    return [
        {
            "path": name, "images_per_s": round(batch / best[name], 2), "gain": round(best["plain"] / best[name], 3),
            "largest_difference_levels": round(255 * float((images[name] - images["plain"]).abs().max()), 3),
            "mean_difference_levels": round(255 * float((images[name] - images["plain"]).abs().mean()), 4),
        }
        for name in models
    ]  # fmt: skip


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path, help=f"also write, e.g. {RESULTS.name}")
    args = parser.parse_args()
    torch.set_num_threads(1)
    mini = generators.load("cellflux", generators.MINI_CELLFLUX, solver="heun2", grid="edm", steps=3)
    assert isinstance(mini, CellFlux)
    torch.manual_seed(0)
    wide = CellFlux.create(compounds=list("ab"), width=128, mult=(2, 2, 2), blocks=1, attention=(2,), guidance=0.2,
                           solver=Solver("heun2", "edm", 2))  # fmt: skip
    found: dict[str, Any] = {
        "guided sampling / bare passes": [
            {"network": name, **overhead(model.to(args.device), side, batch, args.repeats)}
            for name, model, side, batch in (("mini", mini, 48, args.batch), ("published width", wide, 16, 2))
        ],
        "fast path": fast_paths(mini, 48, args.batch, args.repeats, args.compile),
        "machine": {"device": args.device, "processor": processor(), "torch": torch.__version__,
                    "load": os.getloadavg()[0]},
    }  # fmt: skip
    text = json.dumps(found, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


def processor() -> str:
    """Its name, flags that matter after it."""
    name, flags = platform.processor() or platform.machine(), ""
    if os.path.exists("/proc/cpuinfo"):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), name)
        flags = " with avx512_bf16" if "avx512_bf16" in text else ""
    return name + flags


if __name__ == "__main__":
    main()
