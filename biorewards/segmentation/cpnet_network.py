"""The network of Cellpose 1 to 3 (Stringer et al. 2021), with a shorter way through it at inference.

A U-Net of residual blocks with pre-activation units; module names are those of the official weight files. At inference
a BatchNorm right after a convolution, or right before one of 1x1, is folded into it, and sums and ReLUs are taken in
place: the same outputs to rounding, in less memory traffic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biorewards.segmentation.network import pooled

#: Diameters that the official networks were trained at, px.
NUCLEUS_DIAMETER, CELL_DIAMETER = 17.0, 30.0


class _Weights(NamedTuple):
    """Of a convolution, channels last."""

    weight: Tensor
    bias: Tensor


def _unit(inputs: int, outputs: int, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2))


def _projection(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 1))


def _scale(norm: Any) -> tuple[Tensor, Tensor]:
    """A BatchNorm as x * scale + shift, (C,) each."""
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


def _weights(conv: Any, *, before: Any = None, after: Any = None) -> _Weights:
    """A convolution with the BatchNorm before it (kernel 1x1 only: padding would see it) or after it folded in."""
    weight, bias = conv.weight, conv.bias
    if before is not None:
        scale, shift = _scale(before)
        bias = bias + weight[:, :, 0, 0] @ shift
        weight = weight * scale[:, None, None]
    if after is not None:
        scale, shift = _scale(after)
        weight, bias = weight * scale[:, None, None, None], bias * scale + shift
    return _Weights(weight.contiguous(memory_format=torch.channels_last), bias)


def _conv(x: Tensor, by: _Weights) -> Tensor:
    return F.conv2d(x, by.weight, by.bias, padding=by.weight.shape[-1] // 2)


def _active(x: Tensor, norm: Any) -> Tensor:
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps).relu_()


class _StyledUnit(nn.Module):
    def __init__(self, width: int, style: int) -> None:
        super().__init__()
        self.full = nn.Linear(style, width)
        self.conv = _unit(width, width)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        return self.conv(x + self.full(style)[:, :, None, None])  # type: ignore[no-any-return]


class _Block(nn.Module):
    """What both kinds of block share: weights for the short way, made when first needed."""

    _short: dict[str, _Weights] | None = None

    def short(self) -> dict[str, _Weights]:
        if self._short is None:
            with torch.inference_mode(False), torch.no_grad():
                self._short = self.fold()
        return self._short

    def fold(self) -> dict[str, _Weights]:
        """Weights by name, BatchNorms folded in; every part says how."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._short = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._short = None
        super()._load_from_state_dict(*args, **kwargs)


class _Down(_Block):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.ModuleDict({f"conv_{t}": _unit(outputs if t else inputs, outputs) for t in range(4)})
        self.proj = _projection(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x) + self.conv["conv_1"](self.conv["conv_0"](x))
        return x + self.conv["conv_3"](self.conv["conv_2"](x))  # type: ignore[no-any-return]

    def fold(self) -> dict[str, _Weights]:
        units: list[Any] = list(self.conv.values())
        proj: Any = self.proj
        convs = {f"conv_{t}": _weights(units[t][2], after=None if t % 2 else units[t + 1][0]) for t in range(4)}
        return {"proj": _weights(proj[1], before=proj[0]), **convs}

    def infer(self, x: Tensor) -> Tensor:
        w = self.short()
        units: list[Any] = list(self.conv.values())
        y = _conv(_conv(_active(x, units[0][0]), w["conv_0"]).relu_(), w["conv_1"]).add_(_conv(x, w["proj"]))
        return _conv(_conv(_active(y, units[2][0]), w["conv_2"]).relu_(), w["conv_3"]).add_(y)


class _Up(_Block):
    def __init__(self, inputs: int, outputs: int, style: int) -> None:
        super().__init__()
        styled = {f"conv_{t}": _StyledUnit(outputs, style) for t in (1, 2, 3)}
        self.conv = nn.ModuleDict({"conv_0": _unit(inputs, outputs), **styled})
        self.proj = _projection(inputs, outputs)

    def forward(self, x: Tensor, skip: Tensor, style: Tensor) -> Tensor:
        x = self.proj(x) + self.conv["conv_1"](self.conv["conv_0"](x) + skip, style)
        return x + self.conv["conv_3"](self.conv["conv_2"](x, style), style)  # type: ignore[no-any-return]

    def fold(self) -> dict[str, _Weights]:
        units: list[Any] = list(self.conv.values())
        first, one, two, three = units
        proj: Any = self.proj
        scale, _ = _scale(three.conv[0])
        return {
            "proj": _weights(proj[1], before=proj[0]),
            "conv_0": _weights(first[2]),
            "conv_1": _weights(one.conv[2]),
            "conv_2": _weights(two.conv[2], after=three.conv[0]),
            # The style is added between convolution and BatchNorm: scaled like the rest; the shift is in conv_2.
            "style": _Weights(three.full.weight * scale[:, None], three.full.bias * scale),
            "conv_3": _weights(three.conv[2]),
        }

    def infer(self, x: Tensor, skip: Tensor, style: Tensor) -> Tensor:
        w = self.short()
        units: list[Any] = list(self.conv.values())
        first, one, two, _ = units
        y = _conv(_active(x, first[0]), w["conv_0"]).add_(skip).add_(one.full(style)[:, :, None, None])
        y = _conv(_active(y, one.conv[0]), w["conv_1"]).add_(_conv(x, w["proj"]))
        z = _active(y + two.full(style)[:, :, None, None], two.conv[0])
        z = _conv(z, w["conv_2"]).add_(F.linear(style, *w["style"])[:, :, None, None]).relu_()
        return _conv(z, w["conv_3"]).add_(y)


class CPnet(nn.Module):
    """The Cellpose 1-3 network. widths: channels of the input and of each level, official (2, 32, 64, 128, 256).

    Module names are those of the official files. `diam_mean`: object diameter the network works at, px;
    `diam_labels`: mean diameter of its training objects, px; (1,) each.
    """

    def __init__(self, widths: tuple[int, ...] = (2, 32, 64, 128, 256)) -> None:
        super().__init__()
        levels = len(widths) - 1
        ups = [*widths[1:], widths[-1]]
        self.stride = 2 ** (levels - 1)
        downs = {f"res_down_{n}": _Down(widths[n], widths[n + 1]) for n in range(levels)}
        self.downsample = nn.ModuleDict({"down": nn.ModuleDict(downs)})
        blocks = {f"res_up_{n}": _Up(ups[n + 1], ups[n], widths[-1]) for n in range(levels)}
        self.upsample = nn.ModuleDict({"up": nn.ModuleDict(blocks)})
        self.output = _unit(widths[1], 3, 1)
        self.diam_mean = nn.Parameter(torch.full((1,), CELL_DIAMETER), requires_grad=False)
        self.diam_labels = nn.Parameter(torch.full((1,), CELL_DIAMETER), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 2, H, W) float32, sides multiples of `stride` -> (B, 3, H, W) flow Y, flow X, logit; (B, S) style."""
        short = not (self.training or torch.is_grad_enabled())
        skips: list[Tensor] = []
        for block in self.downsample["down"].values():  # type: ignore[operator]
            x = pooled(skips[-1]) if skips else x
            skips.append(block.infer(x) if short else block(x))
        style = F.normalize(skips[-1].mean((2, 3)))
        x = skips[-1]
        for n in reversed(range(len(skips))):
            if n < len(skips) - 1:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
            up = self.upsample["up"][f"res_up_{n}"]  # type: ignore[index]
            x = up.infer(x, skips[n], style) if short else up(x, skips[n], style)
        return self.output(x), style
