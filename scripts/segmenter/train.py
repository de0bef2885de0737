"""Train the bundled segmenter (`biorewards/assets/compact.safetensors`).

    python scripts/segmenter/train.py prepare --data ../shared/data --cache build/segmenter   # ~10 min, once
    python scripts/segmenter/train.py fit --cache build/segmenter --steps 6000                # resumable

`fit` may be stopped at any time and run again: weights, optimiser, averages and random states are saved every
250 steps. The log (`log.jsonl` in the cache) holds the loss; `evaluate.py` gives the scores.
"""

from __future__ import annotations

import argparse
import json
import math
import queue
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sources
import torch
from crops import EXACT, Crops, Packed, disturb, draw, pack
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from biorewards.segmentation.flow_targets import flows_from_masks
from biorewards.segmentation.network import CompactNet

#: Share of each source in a nucleus batch and in a joint batch (nuclei and cells).
NUCLEUS_MIX = {"dsb2018": 0.54, "mnfinder": 0.18, "composite": 0.28}
JOINT_MIX = {"phantom": 0.6, "drawn": 0.17, "jump": 0.09, "pediatric": 0.02, "mef": 0.05, "noise": 0.07}


class Target(NamedTuple):
    """What one head is held against: fine (B, S, S) foreground; then at the working scale foreground (B, CROP, CROP),
    flow (B, 2, CROP, CROP), NaN where unknown, and weight (B, CROP, CROP)."""

    fine: Tensor
    foreground: Tensor
    flow: Tensor
    weight: Tensor


def target_of(crops: Crops, which: int) -> Target:
    """Targets of the nuclei (0) or cells (1), made from the labels of the crop.

    An object cut by the crop's border flows to the centre of what is left of it: a centre beyond the border would have
    its pixels end in several places along the border, each of them an object.
    """
    fine = (crops.labels[:, which] > 0).float()
    labels = crops.labels[:, which, ::2, ::2]
    flow = flows_from_masks(labels.int())
    # A piece that the border has cut off from its object has no flow.
    lost = (labels > 0) & (flow == 0).all(1)
    if which == 1:
        lost = lost | crops.moved[:, None, None]
    flow = torch.where(lost[:, None], torch.nan, flow)
    weight = F.avg_pool2d(crops.weight[:, which], 2) * (1 + 3 * contacts(labels))
    return Target(fine, F.avg_pool2d(fine, 2), flow, weight)


def contacts(labels: Tensor) -> Tensor:
    """Pixels within 2 px of two different objects: where instances are won or lost. (B, H, W) float32."""
    high = F.max_pool2d(labels, 5, 1, 2)
    low = -F.max_pool2d(torch.where(labels > 0, -labels, -1e6), 5, 1, 2)
    return ((high != low) & (high > 0)).float()


def prepare(data: Path, cache: Path, seed: int, n_phantoms: int) -> None:
    """Make every training sample once; `cache/samples.pt` holds kind -> list of `Packed`."""
    cache.mkdir(parents=True, exist_ok=True)
    real = [*sources.dsb2018(data, "train"), *sources.mnfinder(data, "train")]
    rng = np.random.default_rng(seed)
    samples = [*real, *sources.cell_bodies(data, "train")]
    samples += [sources.draw_bodies(rng, s) for s in real for _ in range(2) if min(s.nuclei.shape) >= 40]
    donors = [s for s in real if len(np.unique(s.nuclei)) > 4]
    samples += [sources.composite(rng, donors) for _ in range(600)]
    samples += [sources.noise(rng) for _ in range(80)]
    print(f"{len(samples)} samples; {n_phantoms} phantoms next", flush=True)
    packed: dict[str, list[Packed]] = {}
    for i, sample in enumerate([*samples, *sources.phantoms(seed, n_phantoms)]):
        packed.setdefault(sample.kind, []).append(pack(sample))
        if i % 100 == 0:
            print(i, sample.kind, flush=True)
    torch.save({kind: [tuple(p) for p in items] for kind, items in packed.items()}, cache / "samples.pt")
    print({kind: len(items) for kind, items in packed.items()})


def make_batch(samples: dict[str, list[Packed]], step: int, seed: int, joint: bool, size: int) -> list[Tensor]:
    """The batch of a step: the image (B, 3, S, S), then the fields of one `Target` for nuclei, of another for cells.

    A pure function of (seed, step), so that a resumed run sees the same crops.
    """
    rng = np.random.default_rng([seed, step])
    mix = {k: p for k, p in (JOINT_MIX if joint else NUCLEUS_MIX).items() if samples.get(k)}
    kinds = rng.choice(list(mix), size, p=np.array(list(mix.values())) / sum(mix.values()))
    drawn = [draw(k, samples[k], rng, EXACT) for k in kinds]
    image, labels, weight = (torch.stack(planes) for planes in zip(*drawn, strict=True))
    crops = disturb(Crops(image, labels, weight, torch.zeros(size, dtype=torch.bool)), rng, joint)
    targets = [target_of(crops, which) for which in ((0, 1) if joint else (0,))]
    return [crops.image, *(field for target in targets for field in target)]


def losses(flow: Tensor, logit: Tensor, target: Target, outline: Tensor | None = None) -> Tensor:
    """Cellpose's loss with weights: MSE to 5 x flow (halved) and binary cross-entropy, at the fine scale as well.

    outline: (B, 4, CROP, CROP), logits of the quarters of each pixel.
    """
    wanted = 5 * target.flow
    known = ~torch.isnan(wanted).any(1)
    square = torch.where(known, (flow - wanted.nan_to_num()).square().sum(1), torch.zeros(())) / 2
    entropy = F.binary_cross_entropy_with_logits(logit, target.foreground, reduction="none")
    if outline is not None:
        quarters = F.pixel_unshuffle(target.fine[:, None], 2)
        entropy = entropy + F.binary_cross_entropy_with_logits(outline, quarters, reduction="none").mean(1)
    return (target.weight * (square / 2 + entropy)).sum() / target.weight.sum().clamp_min(1)


def fit(
    cache: Path, steps: int, seed: int, out: Path, rate: float, sizes: tuple[int, int], begin_with: Path | None
) -> None:
    stored = torch.load(cache / "samples.pt", weights_only=True, mmap=True)
    samples = {kind: [Packed(*item) for item in items] for kind, items in stored.items()}
    torch.manual_seed(seed)
    net = CompactNet().to(memory_format=torch.channels_last)
    if begin_with is not None:
        weights = load_file(begin_with)
        net.load_state_dict({k: weights[k].float() if k in weights else v for k, v in net.state_dict().items()})
    average = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998), use_buffers=True
    )
    optimiser = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min(1, (s + 1) / 100) * 0.5 * (1 + math.cos(math.pi * min(1, s / steps))) + 1e-3
    )
    begin, checkpoint = 0, out.with_suffix(".state.pt")
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for item, key in ((net, "net"), (average, "average"), (optimiser, "optimiser"), (schedule, "schedule")):
            item.load_state_dict(state[key])
        begin = state["step"]
        print(f"resuming at step {begin}", flush=True)

    batches: queue.Queue[list[Tensor]] = queue.Queue(4)

    def produce() -> None:
        for step in range(begin, steps):
            joint = step % 2 > 0
            batches.put(make_batch(samples, step, seed, joint, sizes[joint]))

    threading.Thread(target=produce, daemon=True).start()
    log, running, clock = out.with_suffix(".log.jsonl").open("a"), {"nucleus": [], "joint": []}, time.time()
    net.train()
    for step in range(begin, steps):
        image, *planes = batches.get()
        joint = step % 2 > 0
        nucleus = F.pixel_unshuffle(image[:, 2:], 2).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            if joint:
                bodies = F.avg_pool2d(image[:, :2], 2).to(memory_format=torch.channels_last)
                n_flow, n_logit, n_outline, c_flow, c_logit = net(nucleus, bodies)
            else:
                n_flow, n_logit, n_outline = net.nuclei(nucleus)
        loss = losses(n_flow, n_logit, Target(*planes[:4]), n_outline)
        if joint:
            loss = loss + losses(c_flow, c_logit, Target(*planes[4:]))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimiser.step()
        schedule.step()
        average.update_parameters(net)
        running["joint" if joint else "nucleus"].append(float(loss.detach()))
        if (step + 1) % 100 == 0:
            row = {
                "step": step + 1,
                **{k: round(float(np.mean(v)), 4) for k, v in running.items()},
                "seconds": round(time.time() - clock, 1),
            }
            print(row, flush=True)
            log.write(json.dumps(row) + "\n")
            log.flush()
            running = {"nucleus": [], "joint": []}
        if (step + 1) % 250 == 0 or step + 1 == steps:
            state = {
                "net": net.state_dict(),
                "average": average.state_dict(),
                "optimiser": optimiser.state_dict(),
                "schedule": schedule.state_dict(),
                "step": step + 1,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            save(average.module, out)


def save(net: CompactNet, out: Path) -> None:
    """float16 halves the file; the outputs move by less than 0.02 on values up to 9."""
    state = {
        k: v.detach().contiguous().half() for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")
    }
    save_file(
        state,
        str(out),
        metadata={"widths": ",".join(map(str, net.widths)), "evidence_widths": ",".join(map(str, net.evidence_widths))},
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("prepare", "fit"):
        sub = commands.add_parser(name)
        sub.add_argument("--cache", type=Path, default=Path("build/segmenter"))
        sub.add_argument("--seed", type=int, default=7)
    commands.choices["prepare"].add_argument("--data", type=Path, default=Path("../shared/data"))
    commands.choices["prepare"].add_argument("--phantoms", type=int, default=520)
    commands.choices["fit"].add_argument("--steps", type=int, default=6000)
    commands.choices["fit"].add_argument("--rate", type=float, default=3e-3)
    commands.choices["fit"].add_argument("--begin-with", type=Path, help="weights of an earlier round")
    commands.choices["fit"].add_argument("--threads", type=int, default=2)
    commands.choices["fit"].add_argument("--out", type=Path, default=Path("biorewards/assets/compact.safetensors"))
    args = parser.parse_args()
    if args.command == "prepare":
        prepare(args.data, args.cache, args.seed, args.phantoms)
    else:
        torch.set_num_threads(args.threads)
        fit(args.cache, args.steps, args.seed, args.out, args.rate, (40, 28), args.begin_with)
