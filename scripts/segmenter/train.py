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

import numpy as np
import sources
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from biorewards.segmentation.flow_targets import flows_from_masks
from biorewards.segmentation.network import CompactNet

CROP = 96
#: Median nucleus of a training crop before scale augmentation, px: the scale `CompactSegmenter` works at.
WORKING_DIAMETER = 16.0
#: Share of each source in a nucleus batch and in a joint batch (nuclei and cells).
NUCLEUS_MIX = {"dsb2018": 0.6, "mnfinder": 0.2, "composite": 0.2}
JOINT_MIX = {"phantom": 0.56, "drawn": 0.2, "jump": 0.09, "pediatric": 0.03, "mef": 0.05, "noise": 0.07}


def pack(sample: sources.Sample) -> Tensor:
    """(11, H, W) float16: actin, tubulin, DNA; then foreground, flow Y, flow X, weight for nuclei and for cells."""
    planes = [torch.from_numpy(sample.image)]
    for labels, weight in ((sample.nuclei, sample.nucleus_weight), (sample.cells, sample.cell_weight)):
        tensor = torch.from_numpy(labels.astype(np.int32))[None]
        flow = flows_from_masks(tensor)[0].float()
        contact = torch.from_numpy(1.0 + 3.0 * contacts(labels)) * torch.from_numpy(weight)
        planes += [(tensor > 0).float(), flow, contact[None]]
    return torch.cat([p if p.ndim == 3 else p[None] for p in planes]).half()


def contacts(labels: np.ndarray) -> np.ndarray:
    """Pixels within 2 px of two different objects: where instances are won or lost."""
    from scipy import ndimage

    high = ndimage.maximum_filter(labels, 5)
    low = -ndimage.maximum_filter(np.where(labels > 0, -labels, -(10**6)), 5)
    return ((high != low) & (low < 10**6) & (high > 0)).astype(np.float32)


def prepare(data: Path, cache: Path, seed: int, n_phantoms: int) -> None:
    """Make every training sample once; `cache/samples.pt` holds kind -> list of packed tensors."""
    cache.mkdir(parents=True, exist_ok=True)
    real = [*sources.dsb2018(data, "train"), *sources.mnfinder(data, "train")]
    rng = np.random.default_rng(seed)
    samples = [*real, *sources.cell_bodies(data, "train")]
    samples += [sources.draw_bodies(rng, s) for s in real for _ in range(2) if min(s.nuclei.shape) >= 40]
    donors = [s for s in real if len(np.unique(s.nuclei)) > 4]
    samples += [sources.composite(rng, donors) for _ in range(600)]
    samples += [sources.noise(rng) for _ in range(80)]
    print(f"{len(samples)} samples; {n_phantoms} phantoms next", flush=True)
    packed: dict[str, list[Tensor]] = {}
    for i, sample in enumerate([*samples, *sources.phantoms(seed, n_phantoms)]):
        packed.setdefault(sample.kind, []).append(pack(sample))
        if i % 100 == 0:
            print(i, sample.kind, flush=True)
    torch.save(packed, cache / "samples.pt")
    print({kind: len(items) for kind, items in packed.items()})


def draw_crop(sample: Tensor, rng: np.random.Generator) -> Tensor:
    """A random window, turned, flipped and scaled: (11, CROP, CROP) float32, weight 0 outside the sample."""
    height, width = sample.shape[-2:]
    scale = float(np.clip(rng.lognormal(0, 0.3), 0.5, 2.0)) * WORKING_DIAMETER / sources.DIAMETER
    angle, flip = rng.uniform(0, 2 * math.pi), 1.0 if rng.random() < 0.5 else -1.0
    c, s = math.cos(angle) / scale, math.sin(angle) / scale
    # Source pixel = centre + M (output pixel - middle); columns of M are x then y.
    m = np.array([[c * flip, -s], [s * flip, c]])
    reach = CROP / 2 / scale
    cx = rng.uniform(min(reach, width / 2), max(width - reach, width / 2))
    cy = rng.uniform(min(reach, height / 2), max(height - reach, height / 2))
    # Only the window that the turned crop can touch is converted: half its diagonal, and 2 px for interpolation.
    half = math.ceil(reach * math.sqrt(2)) + 2
    y0, y1 = max(0, math.floor(cy) - half), min(height, math.ceil(cy) + half)
    x0, x1 = max(0, math.floor(cx) - half), min(width, math.ceil(cx) + half)
    wide, high = x1 - x0, y1 - y0
    theta = np.array(
        [
            [m[0, 0] * CROP / wide, m[0, 1] * CROP / wide, 2 * (cx - x0) / wide - 1],
            [m[1, 0] * CROP / high, m[1, 1] * CROP / high, 2 * (cy - y0) / high - 1],
        ]
    )
    grid = F.affine_grid(torch.from_numpy(theta).float()[None], [1, 1, CROP, CROP], align_corners=False)
    source = sample[None, :, y0:y1, x0:x1].float()
    image = F.grid_sample(source[:, :3], grid, mode="bilinear", padding_mode="border", align_corners=False)[0]
    target = F.grid_sample(source[:, 3:], grid, mode="nearest", padding_mode="zeros", align_corners=False)[0]
    # A flow is a displacement in source pixels: turn it back into output pixels (inverse of M, length kept).
    inverse = np.linalg.inv(m)
    inverse = torch.from_numpy(inverse / np.sqrt(abs(np.linalg.det(inverse)))).float()
    for k in (1, 5):
        y, x = target[k].clone(), target[k + 1].clone()
        target[k] = inverse[1, 0] * x + inverse[1, 1] * y
        target[k + 1] = inverse[0, 0] * x + inverse[0, 1] * y
    return torch.cat([image, target])


def disturb(crops: Tensor, rng: np.random.Generator, joint: bool) -> Tensor:
    """Photometric changes and lost channels, in place, for (B, 11, CROP, CROP)."""
    b = len(crops)
    random = torch.Generator().manual_seed(int(rng.integers(2**31)))
    image = crops[:, :3]
    pick = lambda p: torch.from_numpy(rng.random(b) < p)  # noqa: E731
    gain = torch.from_numpy(rng.lognormal(0, 0.3, (b, 3, 1, 1))).float()
    gamma = torch.from_numpy(rng.lognormal(0, 0.2, (b, 3, 1, 1))).float()
    offset = torch.from_numpy(rng.normal(0, 0.04, (b, 3, 1, 1))).float()
    image = torch.where(image > 0, image.clamp_min(1e-6) ** gamma, image) * gain + offset
    ramp = torch.linspace(-1, 1, CROP)
    tilt = torch.from_numpy(rng.normal(0, 0.08, (b, 3, 2))).float()
    image = image * (1 + tilt[..., :1, None] * ramp[:, None] + tilt[..., 1:, None] * ramp)
    if (blurred := pick(0.3)).any():
        sigma = rng.uniform(0.4, 1.3)
        taps = torch.exp(-(torch.arange(-4, 5).float() ** 2) / (2 * sigma**2))
        taps = taps / taps.sum()
        soft = F.conv2d(image[blurred].flatten(0, 1)[:, None], taps.view(1, 1, 9, 1), padding=(4, 0))
        soft = F.conv2d(soft, taps.view(1, 1, 1, 9), padding=(0, 4))
        image[blurred] = soft.view(-1, 3, CROP, CROP)
    noisy = torch.from_numpy(np.where(rng.random((b, 3)) < 0.6, rng.exponential(0.03, (b, 3)), 0)).float()[
        ..., None, None
    ]
    image = image + noisy * torch.randn(image.shape, generator=random)
    if joint:
        swap = pick(0.3)
        image[swap] = image[swap][:, [1, 0, 2]]
        lone = pick(0.12)  # one cytoplasm channel only, in the first place
        image[lone, 1] = 0
        none = pick(0.06)  # a nucleus without cytoplasm evidence is no cell
        image[none, :2] = 0.02 * torch.randn(image[none, :2].shape, generator=random)
        crops[none, 7:10] = 0
        crops[none, 10] = crops[none, 10].clamp(max=1)
        lost = pick(0.12) & ~none  # no DNA: cells must be told apart by the cytoplasm
        image[lost, 2] = 0.0
        crops[lost, 3:6] = 0
        moved = pick(0.05) & ~none & ~lost  # DNA that belongs to other cells: the cell foreground stays what it is
        turned = [2, 3, 4, 5, 6]
        crops[:, :3] = image
        crops[moved] = crops[moved].index_copy(
            1, torch.tensor(turned), torch.roll(crops[moved][:, turned], (CROP // 2, CROP // 3), (2, 3))
        )
        crops[moved, 8:10] = float("nan")  # to whom the pixels belong is unknown: no flow loss
        image = crops[:, :3].clone()
    crops[:, :3] = image
    return crops


def make_batch(samples: dict[str, list[Tensor]], step: int, seed: int, joint: bool, size: int) -> Tensor:
    """The batch of a step: a pure function of (seed, step), so that a resumed run sees the same crops."""
    rng = np.random.default_rng([seed, step])
    mix = {k: p for k, p in (JOINT_MIX if joint else NUCLEUS_MIX).items() if samples.get(k)}
    kinds = rng.choice(list(mix), size, p=np.array(list(mix.values())) / sum(mix.values()))
    return disturb(
        torch.stack([draw_crop(samples[k][int(rng.integers(len(samples[k])))], rng) for k in kinds]), rng, joint
    )


def losses(flow: Tensor, logit: Tensor, target: Tensor) -> Tensor:
    """Cellpose's loss with weights: MSE to 5 x flow (halved) and binary cross-entropy. target (B, 4, H, W)."""
    weight = target[:, 3]
    wanted = 5 * target[:, 1:3]
    known = ~torch.isnan(wanted).any(1)
    square = torch.where(known, (flow - wanted.nan_to_num()).square().sum(1), torch.zeros(())) / 2
    entropy = F.binary_cross_entropy_with_logits(logit, target[:, 0], reduction="none")
    return (weight * (square / 2 + entropy)).sum() / weight.sum().clamp_min(1)


def fit(
    cache: Path, steps: int, seed: int, out: Path, rate: float, sizes: tuple[int, int], begin_with: Path | None
) -> None:
    samples = torch.load(cache / "samples.pt", weights_only=True)
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

    batches: queue.Queue[Tensor] = queue.Queue(4)

    def produce() -> None:
        for step in range(begin, steps):
            joint = step % 2 == 1
            batches.put(make_batch(samples, step, seed, joint, sizes[joint]))

    threading.Thread(target=produce, daemon=True).start()
    log, running, clock = out.with_suffix(".log.jsonl").open("a"), {"nucleus": [], "joint": []}, time.time()
    net.train()
    for step in range(begin, steps):
        batch = batches.get().to(memory_format=torch.channels_last)
        joint = step % 2 == 1
        with torch.autocast("cpu", torch.bfloat16):
            if joint:
                out_ = net(batch[:, 2:3], batch[:, :2])
            else:
                nucleus_flow, nucleus_logit = net.nuclei(batch[:, 2:3])
        if joint:
            loss = losses(out_.nucleus_flow, out_.nucleus_logit, batch[:, 3:7]) + losses(
                out_.cell_flow, out_.cell_logit, batch[:, 7:11]
            )
        else:
            loss = losses(nucleus_flow, nucleus_logit, batch[:, 3:7])
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
        fit(args.cache, args.steps, args.seed, args.out, args.rate, (20, 14), args.begin_with)
