"""Pools: the same prompts drawn M times by a policy, judged by everything. Every table is made of these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.reproduction.setting import Setting, second_probability
from biorewards.audit.pixels import pixel_features
from biorewards.io.tables import atomic
from biorewards.resample import resample
from rl.policy import flow, streams, to_range, to_unit

#: Purpose of the random streams; those of training are others.
POOL = 77
BATCH = 32
Arrays = dict[str, npt.NDArray[Any]]


def judged(setting: Setting, images: Tensor, target: Tensor, device: str) -> Arrays:
    """Everything that is known of N images: value, measure (N, 7), nothing, correct (N,), classical (N, 6), second,
    second_correct (N,), features (N, D) of the assay's encoder, pixels (N, d)."""
    found = setting.judge(images.to(device), target)
    classes = setting.assay.classifier.classes  # type: ignore[union-attr]
    wanted = torch.tensor([classes.index(setting.assay.classes[int(k)]) for k in target])
    second, right = second_probability(setting.second, setting.assay, images, target)
    return {
        "value": found.value.double().numpy(),
        "measure": found.measure.double().numpy(),
        "nothing": found.nothing.numpy(),
        "correct": (found.probabilities.argmax(1) == wanted).numpy(),
        "classical": setting.classical(images.to(device), target).value.double().numpy(),
        "second": second,
        "second_correct": right,
        "features": encoded(setting, images, device),
        "pixels": pixel_features(images.cpu()).double().numpy(),
    }


def bare(setting: Setting, images: Tensor, device: str) -> Arrays:
    """What distances are taken to: features and pixels, (N, 1, ...)."""
    pixels = pixel_features(images).double().numpy()
    return {"features": encoded(setting, images, device)[:, None], "pixels": pixels[:, None]}


@torch.inference_mode()
def encoded(setting: Setting, images: Tensor, device: str) -> npt.NDArray[np.float64]:
    """(N, D) features of the assay's classifier, at the assay's pixel size."""
    classifier = setting.assay.classifier
    assert classifier is not None
    parts = [
        classifier.embed(setting.assay.normalised(resample(part.to(device), setting.data.scale)))
        for part in torch.split(images, BATCH)
    ]
    return torch.cat(parts).double().cpu().numpy()


@torch.no_grad()
def drawn(setting: Setting, sampler: Any, size: int, device: str, *, steps: int | None, tell: Any) -> Arrays:
    """The pool (P, M, ...) of a policy: prompt p, sample k from the noise of (p, k), whoever draws.

    steps: Euler steps without guidance; None: `sampler.sample`, its own solver and guidance.
    """
    prompts = setting.prompts
    pairs = [(p, k) for p in range(len(prompts.compounds)) for k in range(size)]
    sampler.to(device)
    found: list[Arrays] = []
    for start in range(0, len(pairs), BATCH):
        part = pairs[start : start + BATCH]
        rows = [p for p, _ in part]
        control, names = prompts.control[rows].to(device), [prompts.compounds[p] for p in rows]
        chance = streams((0, POOL, *pair) for pair in part)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=setting.size.precision == "bf16"):
            if steps is None:
                images = sampler.sample(control, names, generator=chance).cpu()
            else:
                source = sampler.source(to_range(control, sampler), chance)
                images = to_unit(flow(sampler, source, names, steps), sampler).cpu()
        found.append(judged(setting, images, prompts.target[rows], device))
        tell(f"{start + len(part)} of {len(pairs)} images")
    return {key: np.concatenate([one[key] for one in found]).reshape(-1, size, *found[0][key].shape[1:])
            for key in found[0]}  # fmt: skip


def given(setting: Setting, images: Tensor, target: Tensor, device: str) -> Arrays:
    """The pool (P, 1, ...) of images that are there already."""
    return {key: value[:, None] for key, value in judged(setting, images, target, device).items()}


def save(path: Path, pool: Arrays) -> None:
    """Write a pool, whole or not at all."""
    with atomic(path) as (temporary,), temporary.open("wb") as stream:
        np.savez(stream, **{k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in pool.items()})


def load(path: Path) -> Arrays:
    """Read what `save` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return {k: file[k].astype(np.float64) if file[k].dtype == np.float32 else file[k] for k in file.files}
