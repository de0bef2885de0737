"""The mechanism-of-action classifier: a timm backbone with a calibrated softmax."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

#: A timm network and its options.
Backbone = tuple[str, dict[str, Any]]
#: Small enough to train on a CPU and to ship (1.2 M parameters): timm's resnet10t at half its widths.
BACKBONE: Backbone = ("resnet10t", {"channels": (32, 64, 128, 256), "stem_width": 16})


class Classifier:
    """p(class | crop): (B, C, H, W) float32, normalised by the assay, to (B, n) probabilities.

    `temperature` divides the logits (Guo et al. 2017, "On calibration of modern neural networks"), fitted on
    plates that the network was not trained on. `settings` is what rebuilds the network; `fingerprint` is the hash
    of the weights.
    """

    #: `net` with its BatchNorms folded, made when first needed.
    _folded: nn.Module | None = None

    def __init__(
        self, net: nn.Module, classes: list[str], temperature: float, settings: dict[str, Any], fingerprint: str = ""
    ) -> None:
        self.net = net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.classes = classes
        self.temperature = temperature
        self.settings = settings
        self.fingerprint = fingerprint

    def __call__(self, images: Tensor) -> Tensor:
        return self.judge(self.embed(images))

    def embed(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to the (B, D) pooled features that the last layer decides by."""
        if self._folded is None:
            self._folded = folded(self.net, int(self.settings["channels"]))
        maps = self._folded.forward_features(images.contiguous(memory_format=torch.channels_last))  # type: ignore[operator]
        pooled: Tensor = self._folded.forward_head(maps, pre_logits=True)  # type: ignore[operator]
        return pooled

    def judge(self, embedding: Tensor) -> Tensor:
        """(B, D) of `embed` to (B, n) probabilities."""
        logits: Tensor = self.net.get_classifier()(embedding).float()  # type: ignore[operator]
        return torch.softmax(logits / self.temperature, 1)

    def to(self, device: torch.device | str) -> Classifier:
        self.net.to(device)
        self._folded = None
        return self

    def save(self, path: Path) -> None:
        """float16 weights and their settings in one safetensors file."""
        state = {k: v.detach().cpu().contiguous() for k, v in self.net.state_dict().items()}
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
        metadata = {"classes": self.classes, "temperature": self.temperature, **self.settings}
        save_file(state, str(path), metadata={"classifier": json.dumps(metadata, sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote. Raises ValueError when the file holds no classifier or its names do not fit."""
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("classifier")
            if text is None:
                raise ValueError(f"{path} holds no classifier; `biorewards fit` writes one")
            settings = json.loads(text)
            state = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
        classes, temperature = settings.pop("classes"), settings.pop("temperature")
        net = build(settings["backbone"], settings["options"], settings["channels"], len(classes))
        net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
        return cls(net, classes, temperature, settings, hashlib.sha256(path.read_bytes()).hexdigest()[:12])


def build(backbone: str, options: dict[str, Any], channels: int, classes: int) -> nn.Module:
    """A timm network without pretrained weights (none can be had offline)."""
    return timm.create_model(backbone, pretrained=False, in_chans=channels, num_classes=classes, **options)


@torch.inference_mode(False)
@torch.no_grad()
def folded(net: nn.Module, channels: int) -> nn.Module:
    """A copy of an evaluation-mode network with every BatchNorm that comes right after a convolution folded into it.

    Right after means in the order in which modules were registered, in which timm's networks run, too. One pass over
    noise makes sure; where it does not give the same, the network is handed back as it is.
    """
    short = copy.deepcopy(net)
    for module in short.modules():
        for (_, before), (name, norm) in pairwise(list(module.named_children())):
            conv = before[-1] if isinstance(before, nn.Sequential) and len(before) else before
            if isinstance(norm, nn.BatchNorm2d) and isinstance(conv, nn.Conv2d):
                if conv.out_channels != norm.num_features or conv.bias is not None:
                    return net
                fused = torch.nn.utils.fuse_conv_bn_eval(conv, norm)
                conv.weight, conv.bias = fused.weight, fused.bias
                setattr(module, name, nn.Identity())
    device = next(net.parameters()).device
    noise = torch.rand(2, channels, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.autocast(device.type, enabled=False):
        same = torch.allclose(short(noise), net(noise), rtol=1e-3, atol=1e-3)
    return short.to(memory_format=torch.channels_last) if same else net


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained. `images_seen` counts crops over the whole training, so that a class-balanced
    epoch has no need of a definition."""

    images_seen: int = 150_000
    batch: int = 64
    rate: float = 2e-3
    weight_decay: float = 0.02
    smoothing: float = 0.05
    seed: int = 0


def train(
    images: Tensor,
    labels: Tensor,
    classes: list[str],
    recipe: Recipe,
    report: Callable[[int, int, float], None] | None = None,
    backbone: Backbone = BACKBONE,
) -> Classifier:
    """Train on (N, C, H, W) float16 or float32 normalised crops, labels (N,) int64 into `classes`.

    Every batch draws its classes uniformly, so rare classes count as much as common ones. Augmentation is what
    leaves a cell's class alone: flips, quarter turns, gain and offset of each channel, a little blur and noise.
    `report(step, steps, loss)` is called every 20 steps. Deterministic by `recipe.seed` and thread count.
    """
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    name, options = backbone
    net = build(name, options, images.shape[1], len(classes)).to(memory_format=torch.channels_last)
    steps = max(1, recipe.images_seen // recipe.batch)
    # A short training would end with an average that still holds the first weights.
    decay = max(0.0, min(0.99, 1 - 10 / steps))
    average = torch.optim.swa_utils.AveragedModel(
        net,
        multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay),  # type: ignore[no-untyped-call]
        use_buffers=True,
    )
    optimiser = torch.optim.AdamW(net.parameters(), lr=recipe.rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.rate, total_steps=steps, pct_start=0.15)
    members = [torch.nonzero(labels == k)[:, 0].numpy() for k in range(len(classes))]
    if empty := [classes[k] for k, m in enumerate(members) if len(m) == 0]:
        raise ValueError(f"no training images of {', '.join(empty)}; leave the class out or add images")
    net.train()
    for step in range(steps):
        chosen = rng.integers(len(classes), size=recipe.batch)
        index = np.array([members[k][rng.integers(len(members[k]))] for k in chosen])
        batch = augment(images[torch.from_numpy(index)].float(), rng).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(batch)
        loss = F.cross_entropy(logits.float(), torch.from_numpy(chosen), label_smoothing=recipe.smoothing)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        average.update_parameters(net)
        if report is not None and (step % 20 == 0 or step + 1 == steps):
            report(step + 1, steps, float(loss.detach()))
    settings = {"backbone": name, "options": options, "channels": int(images.shape[1])}
    return Classifier(average.module, classes, 1.0, settings)


def augment(batch: Tensor, rng: np.random.Generator) -> Tensor:
    """Flip and turn each crop, then change gain, offset and noise of each channel; (B, C, H, W), H = W."""
    b, c = batch.shape[:2]
    turned = []
    for crop, turn, flip in zip(batch, rng.integers(4, size=b), rng.random(b) < 0.5, strict=True):
        crop = torch.rot90(crop, int(turn), (1, 2))
        turned.append(crop.flip(2) if flip else crop)
    gain = torch.from_numpy(rng.lognormal(0, 0.15, (b, c, 1, 1))).float()
    offset = torch.from_numpy(rng.normal(0, 0.02, (b, c, 1, 1))).float()
    noise = torch.from_numpy(rng.standard_normal(batch.shape, dtype=np.float32)) * float(rng.uniform(0, 0.03))
    return torch.stack(turned) * gain + offset + noise


def predict(classifier: Classifier, images: Tensor, batch: int = 128) -> Tensor:
    """(N, n) probabilities of (N, C, H, W) crops."""
    with torch.inference_mode():
        return torch.cat([classifier(part.float()) for part in _parts(images, batch)])


def calibrate(classifier: Classifier, images: Tensor, labels: Tensor) -> None:
    """Set the temperature that minimises the class-balanced negative log-likelihood on held-out crops."""
    with torch.inference_mode():
        logits = torch.cat(
            [
                classifier.net(p.float().contiguous(memory_format=torch.channels_last)).float()
                for p in _parts(images, 128)
            ]
        )
    logits = logits.clone()
    count = torch.bincount(labels, minlength=len(classifier.classes)).clamp_min(1)
    weight = (1.0 / count)[labels]
    log_t = torch.zeros(1, requires_grad=True)
    optimiser = torch.optim.LBFGS([log_t], lr=0.1, max_iter=100)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = (weight * F.cross_entropy(logits / log_t.exp(), labels, reduction="none")).sum() / weight.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    classifier.temperature = round(float(log_t.exp()), 4)


def expected_calibration_error(probabilities: npt.NDArray[Any], labels: npt.NDArray[Any], bins: int = 15) -> float:
    """ECE of the top class over equal-width confidence bins (Guo et al. 2017, equation 3). (N, n), (N,) -> [0, 1]."""
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    error = 0.0
    for k in np.unique(which):
        inside = which == k
        error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return float(error)


def _parts(images: Tensor, batch: int) -> Iterator[Tensor]:
    yield from (images[i : i + batch] for i in range(0, len(images), batch))
