"""What RL needs of a generator, and the flow that it rolls out.

`FlowPolicy` is a part of `generators.base.FlowGenerator`; this package imports no generator, so anything with these
members can be trained. Images are float32 (B, C, H, W): in [0, 1] outside, in `capabilities.range` inside.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Sampler(Protocol):
    """Anything that draws treated images from controls: enough for best-of-N."""

    def sample(self, control: Tensor, perturbation: Any, *, steps: int | None = None, generator: Any = None) -> Tensor:
        """(B, C, H, W) in [0, 1] from controls of the same shape and range."""
        ...


@runtime_checkable
class FlowPolicy(Protocol):
    """A generator that integrates a velocity from t = 0 (source) to t = 1 (image).

    `copy.copy(policy)` with another `net` must be the policy of those weights.
    """

    net: nn.Module

    @property
    def capabilities(self) -> Any:
        """Has `range` (low, high): the values that mean 0 and 1 inside."""
        ...

    def source(self, control: Tensor, generator: Any = None) -> Tensor:
        """Start of the flow from controls, both in the policy's range. generator: one random stream an image."""
        ...

    def velocity(self, x: Tensor, t: Tensor | float, perturbation: Any) -> Tensor:
        """One pass of `net`, without guidance, with gradient where autograd is on. t: scalar or (B,)."""
        ...

    def save(self, path: Path) -> None:
        """Write the policy to NAME.safetensors."""
        ...


Policy = TypeVar("Policy", bound=FlowPolicy)


def check_trainable(generator: Any) -> None:
    """Raise ValueError unless RL can train this generator; names what to do instead."""
    name = getattr(generator, "name", type(generator).__name__)
    capable = getattr(generator, "capabilities", None)
    if not isinstance(generator, FlowPolicy) or not getattr(capable, "post_trainable", True):
        raise ValueError(
            f"{name} has no velocity field that RL could train (that takes a flow, such as cellflux). What works with "
            "every generator is selection: biorewards best-of"
        )
    if not getattr(capable, "stochastic", True):
        raise ValueError(
            f"{name} starts at the control itself, so all rollouts of a group are one image and nothing can be learned "
            "from them; load it with source=control_plus_noise"
        )


def twin(policy: Policy, net: nn.Module | None = None) -> Policy:
    """The same policy with another network; by default a frozen copy of its own, in evaluation mode."""
    made = copy.copy(policy)
    made.net = copy.deepcopy(policy.net).eval().requires_grad_(False) if net is None else net
    return made


def to_range(images: Tensor, policy: FlowPolicy) -> Tensor:
    """[0, 1] to the policy's range."""
    low, high = policy.capabilities.range
    inside: Tensor = images * (high - low) + low
    return inside


def to_unit(images: Tensor, policy: FlowPolicy) -> Tensor:
    """The policy's range to [0, 1], clamped."""
    low, high = policy.capabilities.range
    unit: Tensor = ((images.float() - low) / (high - low)).clamp(0, 1)
    return unit


@torch.no_grad()
def blend(kept: nn.Module, new: nn.Module, decay: float) -> None:
    """kept <- decay kept + (1 - decay) new, in place; buffers are copied."""
    if decay == 0:
        torch._foreach_copy_(list(kept.parameters()), list(new.parameters()))
    else:
        torch._foreach_lerp_(list(kept.parameters()), list(new.parameters()), 1 - decay)
    for mine, other in zip(kept.buffers(), new.buffers(), strict=True):
        mine.copy_(other)


@torch.no_grad()
def flow(policy: FlowPolicy, source: Tensor, perturbation: Any, steps: int) -> Tensor:
    """The image (B, C, H, W) in the policy's range that the flow carries `source` to: Euler, `steps` equal steps.

    No guidance and no clamp: these are the samples of the very velocity that is trained.
    """
    x = source
    for k in range(steps):
        x = x + policy.velocity(x, k / steps, perturbation) / steps
    return x


def streams(keys: Iterable[Sequence[int]]) -> list[torch.Generator]:
    """One random stream a key, on the CPU. A stream is a function of its key alone: neither the number of processes nor
    what shares a batch, nor a stop and a resumption in between, changes what it draws."""
    return [torch.Generator().manual_seed(seed_of(*key)) for key in keys]


def seed_of(*key: int) -> int:
    """63 bits of the SHA-256 of the numbers of a key."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def digest_of(*parts: str) -> str:
    """16 hex digits of the SHA-256 of texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def digest_tensors(tensors: Iterable[Tensor]) -> str:
    """16 hex digits of the SHA-256 of types, shapes and bytes."""
    sha = hashlib.sha256()
    for tensor in tensors:
        value = tensor.detach().cpu().contiguous()
        sha.update(f"{value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]
