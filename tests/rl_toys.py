"""Small things that are known exactly: a flow whose velocity is one number a compound, a reward, an assay, data."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from biorewards.assay import Assay
from biorewards.batch import Batch
from biorewards.reward import Reason, Score
from rl.nft import Learner, Settings
from rl.pool import Data, Pool, Real
from rl.rewards import Judge

COMPOUNDS = ["one", "two"]
#: Brightness that `Near` likes best, and that of the controls: the best shift is their difference.
WANTED, CONTROL = 0.7, 0.3


class Shift(nn.Module):
    """v = shift of the compound, wherever and whenever."""

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.full((len(COMPOUNDS),), start))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.by[index].view(-1, 1, 1, 1).expand_as(x)


class Line:
    """A flow policy in [0, 1] whose image is the source plus the compound's shift, exactly, for any number of steps."""

    name = "line"

    def __init__(self, start: float = 0.0, noise: float = 0.1) -> None:
        self.net: nn.Module = Shift(start)
        self.noise = noise
        self.capabilities = SimpleNamespace(range=(0.0, 1.0), post_trainable=True, stochastic=True, uses_control=True)

    def source(self, control: Tensor, generator: Any = None) -> Tensor:
        noise = torch.stack([torch.randn(1, 1, 1, generator=g) for g in generator])
        return control + self.noise * noise

    def velocity(self, x: Tensor, t: Tensor | float, perturbation: Any) -> Tensor:
        out: Tensor = self.net(x, torch.tensor([COMPOUNDS.index(name) for name in perturbation]))
        return out

    def sample(self, control: Tensor, perturbation: Any, *, steps: int | None = None, generator: Any = None) -> Tensor:
        x = self.source(control, generator)
        with torch.no_grad():
            return (x + self.velocity(x, 0.0, perturbation)).clamp(0, 1)

    def save(self, path: Path) -> None:
        save_file({k: v.contiguous() for k, v in self.net.state_dict().items()}, path)


class Near:
    """sign * -(brightness - WANTED)^2; NaN for the classes in `silent`, one value for all where sign is 0."""

    name = "near"

    def __init__(self, sign: float = 1.0, silent: tuple[int, ...] = ()) -> None:
        self.sign, self.silent = sign, silent

    def __call__(self, batch: Batch) -> Score:
        measure = batch.images.mean((1, 2, 3))
        value = -self.sign * (measure - WANTED).square()
        mute = torch.isin(batch.target, torch.tensor(self.silent, dtype=torch.int64))
        value = torch.where(mute, torch.nan, value)
        return Score(value, measure, torch.where(mute, int(Reason.NO_REFERENCE), 0).to(torch.uint8))

    def __repr__(self) -> str:
        return f"Near({self.sign}, {self.silent})"


def assay() -> Assay:
    """One channel, two treated classes, no networks."""
    columns = ["class", "measure", "mean", "sd", "n", "origin", "q05", "q25", "q50", "q75", "q95"]
    return Assay(
        name="toy", channels={"dna": 0}, pixel_size=None, crop_size=None, intensity={"dna": (0.0, 1.0)},
        classes=["DMSO", "a", "b"], compounds={"DMSO": "DMSO", "one": "a", "two": "b"}, nucleus_diameter=4.0,
        statistics=pd.DataFrame(columns=columns), fingerprint="toy",
    )  # fmt: skip


def data(count: int = 6, size: int = 4) -> Data:
    """Controls of one brightness (+- a little) on two plates; real images of the brightness that is wanted."""
    stream = torch.Generator().manual_seed(9)
    controls = CONTROL + 0.02 * torch.rand(count, 1, size, size, generator=stream)
    plates = np.arange(count) % 2
    pool = Pool(controls, plates, list(COMPOUNDS), np.array([1, 2]))
    real = Real(
        WANTED + 0.05 * torch.randn(24, 1, size, size, generator=stream).clamp(-2, 2), torch.tensor([1, 2] * 12)
    )
    return Data(pool, pool, real, real, 1.0, [], [])


def judge(sign: float = 1.0, silent: tuple[int, ...] = ()) -> Judge:
    return Judge(Near(sign, silent), assay())


def settings(**options: Any) -> Settings:
    """Quick ones: no decay of weights, so that what has no gradient does not move."""
    chosen = {
        "steps": 3, "groups": 4, "rollouts": 6, "rollout_steps": 1, "learning_rate": 0.02, "weight_decay": 0.0,
        "kl_weight": 0.0, "micro_batch": 16,
    }  # fmt: skip
    return Settings(**{**chosen, **options})


def learner(policy: Any = None, sign: float = 1.0, silent: tuple[int, ...] = (), **options: Any) -> Learner:
    made = settings(**options)
    return Learner(policy or Line(), judge(sign, silent), data().train, made, Accelerator(cpu=True))


def shifts(policy: Any) -> list[float]:
    found: list[float] = policy.net.by.detach().tolist()
    return found
