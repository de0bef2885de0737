"""What a generator is: two protocols, its capabilities, and the few things that every adapter does alike.

Images outside a generator are float32 (B, C, H, W) in [0, 1]; inside they are in its own range (`Capabilities.range`).
A perturbation is a list of compound names, an embedding tensor (B, D), or None (unconditional).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

Perturbation: TypeAlias = Sequence[str] | Tensor | None
#: One random stream for a batch, or one per image (an image then never depends on its neighbours); None: torch's own.
Randomness: TypeAlias = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class Capabilities:
    """What a generator can do and what it takes.

    post_trainable: has a velocity that RL can train; best-of-N works for every stochastic generator.
    stochastic: another random stream gives another image.
    uses_control: the image starts from the control; otherwise only its size and device matter.
    channels: C of its images. size_multiple: H and W are multiples of it. size: H = W, None for any.
    range: the values that mean 0 and 1 inside the generator. floors: its own images are made 8-bit by floor(255 x);
    False: to the nearest level.
    """

    post_trainable: bool
    stochastic: bool
    uses_control: bool
    channels: int
    size_multiple: int = 1
    size: int | None = None
    range: tuple[float, float] = (-1.0, 1.0)
    floors: bool = False


@runtime_checkable
class Generator(Protocol):
    """Draws treated cells. Loaded by `generators.load`, or any object with these members."""

    name: str
    net: nn.Module

    @property
    def capabilities(self) -> Capabilities:
        """What it can do."""
        ...

    @property
    def compounds(self) -> list[str] | None:
        """Names it knows, in table order; None without a table (embedding tensors only)."""
        ...

    def sample(
        self, control: Tensor, perturbation: Perturbation, *, steps: int | None = None, generator: Randomness = None
    ) -> Tensor:
        """Treated images float32 (B, C, H, W) in [0, 1] from controls of the same shape and range.

        steps: of the solver; None is the generator's default. No gradient. Raises ValueError for images or
        perturbations that do not fit.
        """
        ...

    def to(self, device: torch.device | str) -> Self:
        """Move the networks to a device, in place."""
        ...

    def save(self, path: Path) -> None:
        """Write NAME.safetensors and NAME.json, which `generators.load` reads back as the same generator."""
        ...

    def describe(self) -> dict[str, Any]:
        """Everything that decides an image, as JSON: name, checkpoint, digest of the weights, settings."""
        ...


@runtime_checkable
class FlowGenerator(Generator, Protocol):
    """A generator that integrates a velocity from t = 0 (source) to t = 1 (image); tensors in its own range.

    All its trained weights are in `net`: `copy.copy(generator)` with another `net` is the generator of those weights.
    """

    def source(self, control: Tensor, generator: Randomness = None) -> Tensor:
        """Start of the flow, (B, C, H, W) in the generator's range, from controls in that range."""
        ...

    def embed(self, perturbation: Perturbation) -> Tensor | None:
        """Names -> embedding rows (B, D) on the network's device; tensors and None pass."""
        ...

    def velocity(
        self, x: Tensor, t: Tensor | float, perturbation: Perturbation, *, drop: Tensor | None = None
    ) -> Tensor:
        """One pass of `net`, without guidance, with gradient where autograd is on.

        x: (B, C, H, W). t: scalar or (B,) in [0, 1]. drop: bool (B,), True leaves the condition of that image out.
        """
        ...


def check_images(images: Tensor, capabilities: Capabilities, name: str) -> None:
    """Raise ValueError, naming what is wrong and what is wanted, unless images fit: float (B, C, H, W) in [0, 1]."""
    c = capabilities
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"{name} takes float images (B, C, H, W) in [0, 1]; these are {images.dtype} {tuple(images.shape)}"
        )
    if images.shape[1] != c.channels:
        raise ValueError(f"{name} was trained on {c.channels} channels; these images have {images.shape[1]}")
    height, width = images.shape[2:]
    if c.size is not None and (height, width) != (c.size, c.size):
        raise ValueError(f"{name} draws {c.size}x{c.size} px only; these images are {height}x{width} (resize or crop)")
    if min(height, width) < 1 or height % c.size_multiple or width % c.size_multiple:
        raise ValueError(
            f"{name} needs sides that are multiples of {c.size_multiple} px; these images are {height}x{width}: "
            f"crop or pad to {_near(height, c.size_multiple)}x{_near(width, c.size_multiple)}"
        )
    if images.numel():
        low, high = (float(v) for v in torch.aminmax(images.detach()))
        if not (low >= 0 and high <= 1):  # written so that NaN fails, too
            raise ValueError(
                f"{name} takes images in [0, 1]; these hold {low:g} to {high:g} (8-bit images: divide by 255)"
            )


def _near(side: int, multiple: int) -> int:
    return max(multiple, side // multiple * multiple)


def to_range(images: Tensor, bounds: tuple[float, float]) -> Tensor:
    """[0, 1] -> the generator's range."""
    low, high = bounds
    return images * (high - low) + low


def to_unit(images: Tensor, bounds: tuple[float, float]) -> Tensor:
    """The generator's range -> [0, 1], clamped, float32."""
    low, high = bounds
    return ((images.float() - low) / (high - low)).clamp(0, 1)


def normal(shape: Sequence[int], device: torch.device, generator: Randomness = None) -> Tensor:
    """Standard normal float32 of `shape` (B, ...), drawn where the stream lives (a CPU stream: equal numbers anywhere).

    One stream per image where a sequence of B is given. Raises ValueError for a sequence of another length.
    """
    return _draw(torch.randn, shape, device, generator)


def uniform(shape: Sequence[int], device: torch.device, generator: Randomness = None) -> Tensor:
    """Uniform [0, 1) float32; see `normal`."""
    return _draw(torch.rand, shape, device, generator)


def _draw(draw: Any, shape: Sequence[int], device: torch.device, generator: Randomness) -> Tensor:
    if generator is None or isinstance(generator, torch.Generator):
        where = device if generator is None else generator.device
        out: Tensor = draw(tuple(shape), generator=generator, device=where)
        return out.to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} random streams for {shape[0]} images: give one per image, or one for all")
    return torch.stack([draw(tuple(shape[1:]), generator=g, device=g.device).to(device) for g in generator])


def seeded(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU stream per seed: image i then depends on seeds[i] only, whatever shares its batch."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def names_of(perturbation: Perturbation, count: int) -> list[str] | None:
    """The names as a list, checked to be one per image; None where `perturbation` is a tensor or None."""
    if perturbation is None or isinstance(perturbation, Tensor):
        return None
    if isinstance(perturbation, str):
        raise ValueError(f"perturbation is one name, {perturbation!r}; give a list with one name per image")
    if len(perturbation) != count:
        raise ValueError(f"{len(perturbation)} compounds for {count} images: give one name per image")
    return list(perturbation)


def to_uint8(images: Tensor, floors: bool = True) -> Tensor:
    """[0, 1] -> uint8: floor(255 x) as CellFlux writes its images, or to the nearest level (IMPA, PhenDiff, MiT)."""
    return (images * 255 + (0.0 if floors else 0.5)).floor().to(torch.uint8)


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradient inside; each module has its own mode again afterwards."""
    training = [module for module in net.modules() if module.training]
    net.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def digest(net: nn.Module) -> str:
    """16 hex digits of the SHA-256 over names, types, shapes and bytes of a network's tensors."""
    sha = hashlib.sha256()
    for key, tensor in net.state_dict().items():
        value = tensor.detach().cpu().contiguous()
        sha.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        sha.update(memoryview(value.reshape(-1).view(torch.uint8).numpy()))
    return sha.hexdigest()[:16]
