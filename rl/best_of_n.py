"""Selection at test time: of N samples keep the one that the rewards like best. Works for every stochastic generator.

The verifier that selects is the one that scores, so the kept image's score is too good by the winner's curse: judge
kept images by something else, too. Cost is counted in network passes of one image.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from biorewards.audit.selection import selection_weights
from biorewards.scoring_summary import bootstrap
from rl.policy import FlowPolicy, Sampler, streams, to_range
from rl.rewards import Judge

Floats = npt.NDArray[np.float64]
#: Purpose of the random streams, as in `rl.nft`.
SELECTION = 5
METHODS = ("random", "search")
#: tell(done, total) images.
Progress = Callable[[int, int], None]


class Prompts(NamedTuple):
    """What is asked for, P of them: control (P, C, H, W) in [0, 1], CPU; compounds; target (P,) int64, -1 unknown."""

    control: Tensor
    compounds: list[str]
    target: Tensor


class Selected(NamedTuple):
    """image: (P, C, H, W) kept, CPU. place: (P,) which of the N it is; -1 where no sample has a total (the first is
    kept). value: (P, N, R), reason (P, N, R) and total (P, N) of all samples. passes: network passes of one image that
    a kept image cost; NaN where the generator does not call its `net`."""

    image: Tensor
    place: Tensor
    value: Tensor
    reason: Tensor
    total: Tensor
    passes: float


def best_of_n(
    generator: Sampler, judge: Judge, prompts: Prompts, n: int, *, method: str = "random", seed: int = 0,
    steps: int | None = None, batch_size: int = 64, device: torch.device | str = "cpu", rounds: int = 4,
    reach: float = 0.4, progress: Progress | None = None,
) -> Selected:  # fmt: skip
    """The best of n samples of every prompt by the judge's total.

    random: n independent samples. search: zero-order search around the source (Ma et al. 2025, arXiv 2501.09732) at
    the same cost, for flows: `rounds` rounds of n / rounds sources, from the second on round the best so far,
    source' = m + sqrt(1 - reach^2) (best - m) + reach (new - m), m the control (0 where the flow starts without it), so
    that a source keeps its distribution. Sample k of prompt p depends on (seed, p, k), and in a search on what was best
    before; never on its neighbours in a batch. Raises ValueError.
    """
    _check(generator, n, method, rounds, reach)
    count, each = len(prompts.compounds), n // rounds if method == "search" else n
    value = torch.full((count, n, len(judge.names)), torch.nan)
    reason = torch.zeros(count, n, len(judge.names), dtype=torch.uint8)
    image, place = torch.zeros_like(prompts.control), torch.full((count,), -1)
    best = torch.full((count,), -torch.inf)
    pivots: dict[int, Tensor] = {}
    with counted(generator) as passes:
        for first in range(0, n, each):
            pairs = [(p, k) for p in range(count) for k in range(first, first + each)]
            found = dict(pivots)
            for start in range(0, len(pairs), batch_size):
                part = pairs[start : start + batch_size]
                rows = [p for p, _ in part]
                control, names = prompts.control[rows].to(device), [prompts.compounds[p] for p in rows]
                chance = streams((seed, SELECTION, *pair) for pair in part)
                if method == "search":
                    source = _source(generator, control, chance, [pivots.get(p) for p in rows], reach)
                    images = _from(generator, source).sample(control, names, steps=steps)
                else:
                    source = None
                    images = generator.sample(control, names, steps=steps, generator=chance)
                judged = judge(images, prompts.target[rows].to(device))
                for i, ((p, k), total) in enumerate(zip(part, judge.total(judged.value).tolist(), strict=True)):
                    value[p, k], reason[p, k] = judged.value[i], judged.reason[i]
                    if k == 0 or total > best[p]:
                        image[p] = images[i].cpu()
                        if source is not None:
                            found[p] = source[i]
                    if total > best[p]:
                        best[p], place[p] = total, k
                if progress is not None:
                    progress(first * count + start + len(part), n * count)
            pivots = found
    return Selected(image, place, value, reason, judge.total(value), passes() / count)


def _check(generator: Sampler, n: int, method: str, rounds: int, reach: float) -> None:
    if n < 1:
        raise ValueError(f"n={n}: at least 1")
    if method not in METHODS:
        raise ValueError(f"method={method!r}: one of {', '.join(METHODS)}")
    capable = getattr(generator, "capabilities", None)
    if n > 1 and not getattr(capable, "stochastic", True):
        raise ValueError(
            "this generator draws one image a control, so the N samples would be equal: take n=1, or load it with a "
            "source that holds noise"
        )
    if method == "search":
        if not isinstance(generator, FlowPolicy):
            raise ValueError("search moves the source of a flow, and this generator has none; take method=random")
        if rounds < 1 or n % rounds or not n:
            raise ValueError(f"n={n} cannot be divided into {rounds} rounds; take a multiple of {rounds}")
        if not 0 < reach < 1:
            raise ValueError(f"reach={reach}: between 0 and 1")


def _source(
    generator: Any, control: Tensor, chance: list[torch.Generator], pivots: list[Tensor | None], reach: float
) -> Tensor:
    """Sources (B, C, H, W) in the flow's range: new ones, or new ones mixed into the pivot where there is one."""
    inside = to_range(control, generator)
    new: Tensor = generator.source(inside, chance)
    middle = inside if generator.capabilities.uses_control else torch.zeros_like(inside)
    mixed = [
        one if pivot is None else m + math.sqrt(1 - reach**2) * (pivot - m) + reach * (one - m)
        for one, pivot, m in zip(new, pivots, middle, strict=True)
    ]
    return torch.stack(mixed)


def _from(generator: Any, source: Tensor) -> Any:
    """The same flow, started at `source`."""
    made = copy.copy(generator)
    made.source = lambda control, generator=None: source
    return made


@contextmanager
def counted(generator: Any) -> Iterator[Callable[[], float]]:
    """Network passes of one image inside the block; NaN where `generator.net` is no module or is never called."""
    seen = [0]
    net = getattr(generator, "net", None)

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        seen[0] += len(inputs[0]) if inputs and isinstance(inputs[0], Tensor) else 0

    hook = net.register_forward_hook(count) if isinstance(net, nn.Module) else None
    try:
        yield lambda: float(seen[0]) if seen[0] else math.nan
    finally:
        if hook is not None:
            hook.remove()


# ---- N = 1, 2, 4, ... from one pool ------------------------------------------------------------------------------


def curve(
    selected: Selected, names: Sequence[str], *, sizes: Sequence[int] | None = None, unit: Sequence[int] | None = None,
    seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Each reward of the image that best-of-n keeps, for n = 1, 2, 4, ... from one pool of independent samples.

    Columns n, passes (network passes of one image a kept image), images (prompts), then for each reward and the total:
    NAME, NAME_low, NAME_high, the mean over prompts with its 95 % bootstrap interval over `unit` (P,), the control of a
    prompt, say; default: prompts. A pool of a search is no pool of independent samples: use method=random.
    """
    total = selected.total.double().numpy()
    value = np.concatenate([selected.value.double().numpy(), total[..., None]], 2)
    sizes = sizes or [2**k for k in range(total.shape[1].bit_length()) if 2**k <= total.shape[1]]
    columns = [*names, "total"]
    rows = []
    for n in sizes:
        weight = selection_weights(total, n)
        kept = np.where(weight[..., None] > 0, weight[..., None] * np.nan_to_num(value), 0.0).sum(1)
        kept[np.isnan(weight).any(1)] = np.nan
        if unit is not None:
            kept = pd.DataFrame(kept).groupby(np.asarray(unit)).mean().to_numpy()
        low, high = bootstrap(kept, seed)
        row: dict[str, Any] = {"n": n, "passes": selected.passes / total.shape[1] * n, "images": len(total)}
        for k, name in enumerate(columns):
            row |= {name: float(np.nanmean(kept[:, k])), f"{name}_low": low[k], f"{name}_high": high[k]}
        rows.append(row)
    return pd.DataFrame(rows)
