"""Where the time of the segmentation networks goes: part by part, with the arithmetic that each part does.

    python benchmarks/profile_network.py --json benchmarks/results/profile_network.json

Every part is run alone on a batch of 16 working images of 48 px (96 px crops of the phantom assay), one thread, float32
and bfloat16 in turn; figures are the least of `--repeats` runs, in processor time a crop. GFLOP/s: 2 x multiply-adds
of its convolutions over its time. What a part costs above its convolutions shows beside `bare`: the same convolutions
called one after the other on ready inputs.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from biorewards.memory import keep_freed_memory
from biorewards.segmentation.compact import CompactSegmenter
from biorewards.segmentation.network import CompactNet, compress, plus_enlarged, pooled

BATCH, SIDE = 16, 48
Run = Callable[[], Any]


def parts(net: CompactNet, x: Tensor) -> dict[str, Run]:
    """What a pass is made of, by name, each with inputs of its own that stay as they are."""
    dna, bodies, quarters = compress(x[:, :4].mean(1, keepdim=True)), compress(x[:, 4:]), compress(x[:, :4])
    everything = torch.cat([bodies, dna], 1)
    found: dict[str, Run] = {
        "input: logarithms": lambda: (compress(x[:, :4].mean(1, keepdim=True)), compress(x[:, 4:]), compress(x[:, :4]))
    }
    trunks: dict[str, tuple[Any, Tensor]] = {
        "nucleus": (net.nucleus_trunk, dna), "evidence": (net.evidence_trunk, bodies),
    }  # fmt: skip
    if not net.cell_widths:
        trunks["cell"] = (net.cell_trunk, everything)
    for name, (trunk, given) in trunks.items():
        levels: list[Tensor] = []
        for i, block in enumerate(trunk.down):
            source = levels[-1] if i else given
            found[f"{name} trunk, 1/{2**i}, down"] = (
                (lambda b=block, s=source: b(pooled(s))) if i else (lambda b=block, s=source: b(s))
            )
            levels.append(block(pooled(source) if i else source))
        for i in range(len(trunk.up) - 1, -1, -1):

            def rise(t: Any = trunk, i: int = i, fine: Tensor = levels[i], coarse: Tensor = levels[i + 1]) -> Tensor:
                return t.up[i](plus_enlarged(fine.clone(), t.reduce[i](coarse)))  # type: ignore[no-any-return]

            found[f"{name} trunk, 1/{2**i}, up"] = rise
            levels[i] = rise()
    nuclear, body = net.nucleus_trunk.pyramid(dna), net.evidence_trunk.pyramid(bodies)
    found["nucleus head"] = lambda: net.nucleus_head(nuclear[0])
    found["outline head"] = lambda: net.outline_head(torch.cat([nuclear[0], quarters], 1))
    found["evidence head"] = lambda: net.evidence_head(body[0])
    if net.cell_widths:
        found["shared cells"] = lambda: net.shared_cells(everything, nuclear, body)
    else:
        found["cell head"] = lambda: net.cell_head(torch.cat([nuclear[0], nuclear[0]], 1))
    found["whole pass"] = lambda: net(x[:, :4], x[:, 4:])
    return found


def convolutions(net: nn.Module, run: Run) -> list[tuple[nn.Conv2d, Tensor]]:
    """The convolutions that a run calls, with their inputs."""
    seen: list[tuple[nn.Conv2d, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda m, given: seen.append((m, given[0].clone())))
        for module in net.modules()
        if isinstance(module, nn.Conv2d)
    ]
    run()
    for hook in hooks:
        hook.remove()
    return seen


def operations(seen: list[tuple[nn.Conv2d, Tensor]]) -> float:
    """2 x multiply-adds a crop."""
    total = 0
    for conv, x in seen:
        pixels = x.shape[-2] * x.shape[-1] // (conv.stride[0] * conv.stride[1])
        total += 2 * pixels * conv.weight.numel()
    return float(total)


def least(run: Run, repeats: int) -> float:
    """Milliseconds of processor time a crop."""
    times = []
    for _ in range(repeats + 2):
        clock = time.process_time()
        run()
        times.append(time.process_time() - clock)
    return 1000 * min(times[2:]) / BATCH


def measure(net: CompactNet, repeats: int) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for precision in ("float32", "bfloat16"):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            x = torch.rand(BATCH, 6, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
            for name, run in parts(net, x.contiguous(memory_format=torch.channels_last)).items():
                seen = convolutions(net, run)
                row = rows.setdefault(name, {"part": name, "mflop": round(operations(seen) / 1e6, 2)})
                ms = least(run, repeats)
                row[precision] = {
                    "ms": round(ms, 3),
                    "bare_ms": round(least(lambda s=seen: [conv(given) for conv, given in s], repeats), 3),
                    "gflop_per_s": round(operations(seen) / ms / 1e6, 1),
                }
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="of a compact network other than the bundled one")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    segmenter = CompactSegmenter.load(args.weights) if args.weights else CompactSegmenter.bundled()
    rows = measure(segmenter.net, args.repeats)
    print("| part | MFLOP | ms | bare convolutions | GFLOP/s | bfloat16 ms | bare | GFLOP/s |\n" + "|---" * 8 + "|")
    for row in rows:
        figures = " | ".join("{ms:.2f} | {bare_ms:.2f} | {gflop_per_s:.0f}".format(**row[p]) for p in list(row)[2:])
        print(f"| {row['part']} | {row['mflop']:.1f} | {figures} |")
    machine = {"processor": platform.machine(), "threads": 1, "torch": torch.__version__}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps({"machine": machine, "segmenter": segmenter.fingerprint, "parts": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
