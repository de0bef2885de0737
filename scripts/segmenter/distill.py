"""Train a fast segmenter from a finished one: cells share the nucleus and evidence trunks' features.

    python scripts/segmenter/distill.py --cache build/segmenter --teacher biorewards/assets/compact.safetensors \
        --out build/fast.safetensors --steps 3000                                                   # resumable

Nucleus and evidence trunks and their heads are the teacher's and stay as they are, so nuclei and which pixels are cell
are exactly the teacher's. New is only what says to which cell a pixel belongs (`SharedCells`, in place of a trunk of
its own): it learns the flows of the labels and the teacher's flows, half each, at half the working scale. `fit` of
`train.py` made the teacher; crops, augmentation and mix are that script's. May be stopped at any time and run again.
"""

from __future__ import annotations

import argparse
import json
import math
import queue
import threading
import time
from pathlib import Path

import numpy as np
import torch
from crops import Packed
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from train import Target, make_batch

from biorewards.segmentation.network import CompactNet, compress


def load(path: Path) -> CompactNet:
    """A network in evaluation mode, its BatchNorms not folded, from a file of `train.py`."""
    with safe_open(path, "pt") as file:
        notes = file.metadata()
        state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (not a dict)
    widths = [tuple(int(w) for w in notes[key].split(",")) for key in ("widths", "evidence_widths")]
    net = CompactNet(*widths)
    net.load_state_dict(state | {k: v for k, v in net.state_dict().items() if k.endswith("tracked")})
    return net.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def student_of(teacher: CompactNet, cell_widths: tuple[int, ...]) -> CompactNet:
    net = CompactNet(teacher.widths, teacher.evidence_widths, cell_widths).to(memory_format=torch.channels_last)
    mine = net.state_dict()
    net.load_state_dict(mine | {k: v for k, v in teacher.state_dict().items() if k in mine})
    net.eval().requires_grad_(False)
    net.shared_cells.train().requires_grad_(True)
    return net


def save(net: CompactNet, out: Path) -> None:
    """As `train.save`, with the widths of the shared cells beside the others in the file's metadata."""
    state = {k: v.contiguous().half() for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    widths = {"widths": net.widths, "evidence_widths": net.evidence_widths, "cell_widths": net.cell_widths}
    save_file(state, str(out), metadata={key: ",".join(map(str, value)) for key, value in widths.items()})


def mine(net: CompactNet) -> set[str]:
    return {f"shared_cells.{name}" for name in net.shared_cells.state_dict()}


def half(flow: Tensor) -> tuple[Tensor, Tensor]:
    """5 x flow at half the scale, and where all four of its pixels are known: (B, 2, h, w), (B, h, w) float32."""
    known = F.avg_pool2d((~torch.isnan(flow).any(1)).float(), 2) == 1
    return 5 * F.avg_pool2d(flow.nan_to_num(), 2), known.float()


def loss_of(flow: Tensor, cells: Target, taught: Tensor) -> Tensor:
    """Mean squared distance (halved) to the labels' flow and to the teacher's, weighted as in `train.losses`."""
    wanted, known = half(cells.flow)
    weight = F.avg_pool2d(cells.weight, 2)
    to_labels = (flow - wanted).square().sum(1) * known
    to_teacher = (flow - F.avg_pool2d(taught, 2)).square().sum(1)
    return (weight * (to_labels + to_teacher)).sum() / (4 * weight.sum().clamp_min(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("build/segmenter"))
    parser.add_argument("--teacher", type=Path, default=Path("biorewards/assets/compact.safetensors"))
    parser.add_argument("--cell-widths", type=lambda t: tuple(int(w) for w in t.split(",")), default=(32, 64, 96))
    parser.add_argument("--begin-with", type=Path, help="an earlier student of the same cell widths")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=28)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=51)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    stored = torch.load(args.cache / "samples.pt", weights_only=True, mmap=True)
    samples = {kind: [Packed(*item) for item in items] for kind, items in stored.items()}
    teacher = load(args.teacher)
    net = student_of(teacher, args.cell_widths)
    part = net.shared_cells
    if args.begin_with is not None:
        earlier = {k.partition(".")[2]: v.float() for k, v in load_file(args.begin_with).items() if k in mine(net)}
        part.load_state_dict(part.state_dict() | earlier)
    average = torch.optim.swa_utils.AveragedModel(
        part, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995), use_buffers=True
    )
    optimiser = torch.optim.AdamW(part.parameters(), lr=args.rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min(1, (s + 1) / 100) * 0.5 * (1 + math.cos(math.pi * min(1, s / args.steps))) + 1e-3
    )
    begin, checkpoint = 0, args.out.with_suffix(".state.pt")
    stateful = {"net": part, "average": average, "optimiser": optimiser, "schedule": schedule}
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for key, item in stateful.items():
            item.load_state_dict(state[key])
        begin = state["step"]
        print(f"resuming at step {begin}", flush=True)

    batches: queue.Queue[list[Tensor]] = queue.Queue(4)

    def produce() -> None:
        for step in range(begin, args.steps):
            batches.put(make_batch(samples, step, args.seed, True, args.batch))

    threading.Thread(target=produce, daemon=True).start()
    log, running, clock = args.out.with_suffix(".log.jsonl").open("a"), [], time.time()
    for step in range(begin, args.steps):
        image, *planes = batches.get()
        nucleus = F.pixel_unshuffle(image[:, 2:], 2).to(memory_format=torch.channels_last)
        bodies = F.avg_pool2d(image[:, :2], 2).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                dna, bodies = compress(nucleus.mean(1, keepdim=True)), compress(bodies)
                everything = torch.cat([bodies, dna], 1)
                nuclear, body = teacher.nucleus_trunk.pyramid(dna), teacher.evidence_trunk.pyramid(bodies)
                taught = teacher.cell_head(torch.cat([teacher.cell_trunk(everything), nuclear[0]], 1)).float()
            flow = part(everything, nuclear, body).float()
        loss = loss_of(flow, Target(*planes[4:]), taught)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(part.parameters(), 5.0)
        optimiser.step()
        schedule.step()
        average.update_parameters(part)
        running.append(float(loss.detach()))
        if (step + 1) % 100 == 0:
            row = {"step": step + 1, "loss": round(float(np.mean(running)), 4), "seconds": round(time.time() - clock)}
            print(row, flush=True)
            log.write(json.dumps(row) + "\n")
            log.flush()
            running = []
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            state = {key: item.state_dict() for key, item in stateful.items()} | {"step": step + 1}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            finished = student_of(teacher, args.cell_widths)
            finished.shared_cells.load_state_dict(average.module.state_dict())
            save(finished, args.out)


if __name__ == "__main__":
    main()
