"""PhenDiff (Bourou et al. 2024): a class-conditional diffusion model that turns images of one class into another.

Three starts. "inversion" (DDIB, Su et al. 2023): the control is run backwards to its noise under its own class, then
denoised under the target class. "noised_control": the control is noised part of the way (SDEdit). "noise": no control.
Network and schedulers are those of diffusers (extra `generators`), on which PhenDiff is built; the rule of its inverse
scheduler has changed between versions, so `describe` states the version. Images inside are in [-1, 1].
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from generators.base import (
    Capabilities,
    Perturbation,
    Randomness,
    check_images,
    digest,
    evaluating,
    names_of,
    normal,
    to_range,
    to_unit,
)
from generators.checkpoints import write_own
from generators.embeddings import unknown_compound
from generators.names import Names, read_names
from generators.phendiff_files import KEPT, PhenDiffNet, diffusers, find, inverse_of, network, read, scheduler

STARTS = ("inversion", "noised_control", "noise")
#: Form of guidance -> the weight that means none, the weight of the published runs from noise or a noised control.
#: imagen: u + w (c - u). cfg: c + w (c - u), the same at w - 1. (c with the class, u without.)
FORMS = {"imagen": (1.0, 2.5), "cfg": (0.0, 1.5)}


class PhenDiff:
    """A denoiser, its noise schedule and class names. Fulfils `Generator`; not post-trainable (no velocity of a flow).

    classes: names of the classes in label order. start: one of `STARTS`. control_class: name of the class that controls
    are of (inversion only); with two classes and None it is the one that is not the target, as published.
    guidance: w in the form `guidance_form`; inversion is published without. steps: of the whole schedule. skip: the
    fraction of the schedule, from its noisy end, that "noised_control" leaves out.
    """

    name = "phendiff"

    def __init__(
        self, net: PhenDiffNet, schedule: Any, *, classes: list[str], start: str = "inversion",
        control_class: str | None = None, guidance: float | None = None, guidance_form: str = "imagen",
        steps: int = 100, skip: float = 0.5, checkpoint: str = "",
    ) -> None:  # fmt: skip
        if start not in STARTS:
            raise ValueError(f"start={start!r}: one of {', '.join(STARTS)}")
        if guidance_form not in FORMS:
            raise ValueError(f"guidance_form={guidance_form!r}: one of {', '.join(FORMS)}")
        none, published = FORMS[guidance_form]
        if guidance is None:
            guidance = none if start == "inversion" else published
        if not none <= guidance < float("inf"):
            raise ValueError(f"guidance={guidance}: {none:g} (none) or more in the form {guidance_form!r}")
        self.net = net.eval().requires_grad_(False)
        self.schedule = schedule
        self.classes, self._label = classes, {name: i for i, name in enumerate(classes)}
        self.start, self.control_class, self.steps, self.skip = start, control_class, steps, skip
        self.guidance, self.guidance_form, self.checkpoint = guidance, guidance_form, checkpoint
        if control_class is not None:
            control_class = str(control_class)  # a numbered class may come as a number
            self._labels([control_class])
        self.times(steps)

    # ---- what it is --------------------------------------------------------------------------------------------

    @property
    def capabilities(self) -> Capabilities:
        """Any size that halves as often as the network does; trained on one size, which other sizes are not."""
        config = self.net.config
        return Capabilities(
            post_trainable=False, stochastic=self.start != "inversion", uses_control=self.start != "noise",
            channels=config["in_channels"], size_multiple=2 ** (len(config["block_out_channels"]) - 1),
        )  # fmt: skip

    @property
    def compounds(self) -> list[str]:
        """Names of the classes, in label order."""
        return list(self.classes)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.net.class_embedding.weight.device

    def to(self, device: torch.device | str) -> Self:
        """Move the network, in place."""
        self.net.to(device)
        return self

    def describe(self) -> dict[str, Any]:
        """Everything that decides an image, as JSON."""
        return {
            "generator": self.name, "checkpoint": self.checkpoint, "digest": digest(self.net), "start": self.start,
            "control_class": self.control_class, "guidance": self.guidance, "guidance_form": self.guidance_form,
            "steps": self.steps, "skip": self.skip if self.start == "noised_control" else None,
            "schedule": _plain(self.schedule.config), "diffusers": diffusers().__version__,
        }  # fmt: skip

    # ---- classes -----------------------------------------------------------------------------------------------

    def embed(self, perturbation: Perturbation) -> Tensor | None:
        """Class vectors float32 (B, D) of names or labels int64 (B,); vectors (B, D) and None pass.

        Raises ValueError for unknown names, labels out of range and vectors of another width.
        """
        if perturbation is None:
            return None
        if isinstance(perturbation, Tensor) and perturbation.is_floating_point():
            width = self.net.class_embedding.embedding_dim
            if perturbation.ndim != 2 or perturbation.shape[1] != width:
                raise ValueError(f"class vectors of shape {tuple(perturbation.shape)}; wanted (B, {width})")
            if not bool(torch.isfinite(perturbation).all()):
                raise ValueError("a class vector holds NaN or infinity")
            return perturbation.to(self.device, torch.float32)
        rows: Tensor = self.net.class_embedding(self._labels(perturbation).to(self.device))
        return rows

    def _labels(self, perturbation: Any) -> Tensor:
        if isinstance(perturbation, Tensor):
            count = len(self.classes)
            if perturbation.ndim != 1:
                raise ValueError(f"labels of shape {tuple(perturbation.shape)}: wanted (B,)")
            if wrong := [label for label in perturbation.tolist() if not 0 <= label < count]:
                raise ValueError(f"label {wrong[0]}: this checkpoint has the classes 0 to {count - 1}")
            return perturbation.long()
        names = names_of(perturbation, len(perturbation)) or []
        for name in names:
            if name not in self._label:
                raise ValueError(unknown_compound(name, self.classes, self.checkpoint or "this generator"))
        return torch.tensor([self._label[name] for name in names], dtype=torch.int64)

    def _control_vectors(self, perturbation: Perturbation, count: int) -> Tensor:
        """Class vectors (B, D) of the controls."""
        if self.control_class is not None:
            labels = self._labels([self.control_class]).expand(count)
        elif len(self.classes) == 2 and perturbation is not None and not _is_vectors(perturbation):
            labels = 1 - self._labels(perturbation)
        else:
            raise ValueError(
                f"inversion needs the class of the controls: load with control_class= one of {', '.join(self.classes)}"
            )
        rows: Tensor = self.net.class_embedding(labels.to(self.device))
        return rows

    # ---- diffusion ---------------------------------------------------------------------------------------------

    def times(self, steps: int) -> list[int]:
        """Training times that denoising visits, falling; from the noised control those from skip on only.

        Raises ValueError for a number of steps that the schedule does not have, or a `skip` that leaves none.
        """
        total = self.schedule.config.num_train_timesteps
        if not 1 <= steps <= total:
            raise ValueError(f"steps={steps}: from 1 to {total}, the steps of this schedule")
        if not 0 <= self.skip < 1:
            raise ValueError(f"skip={self.skip}: a fraction, at least 0 and below 1")
        self.schedule.set_timesteps(steps)
        times: list[int] = self.schedule.timesteps.tolist()
        if self.start == "noised_control":
            times = [t for t in times if t <= (1 - self.skip) * total]
            if not times:
                raise ValueError(f"skip={self.skip} of {steps} steps leaves none; take more steps or skip less")
        return times

    def denoiser(self, x: Tensor, t: int, classes: Tensor | None) -> Tensor:
        """One pass: the network's prediction (B, C, H, W) at training time t; classes: vectors (B, D), None = zeros."""
        if classes is None:
            classes = x.new_zeros(len(x), self.net.class_embedding.embedding_dim)
        # One memory layout (that of 8-bit images), so that the last bits do not depend on where the images come from.
        out: Tensor = self.net(x.contiguous(memory_format=torch.channels_last), t, classes)
        return out

    def guided(self, x: Tensor, t: int, classes: Tensor | None) -> Tensor:
        """The prediction that denoising follows."""
        conditional = self.denoiser(x, t, classes)
        if classes is None or self.guidance == FORMS[self.guidance_form][0]:
            return conditional
        null = self.denoiser(x, t, None)
        return (null if self.guidance_form == "imagen" else conditional) + self.guidance * (conditional - null)

    def invert(self, x: Tensor, classes: Tensor, steps: int) -> Tensor:
        """The noise (B, C, H, W) of images x in [-1, 1] by DDIM run backwards under their own class vectors (B, D)."""
        inverse = inverse_of(self.schedule)
        inverse.set_timesteps(steps)
        for t in inverse.timesteps.tolist():
            x = inverse.step(self.denoiser(x, t, classes), t, x).prev_sample
        return x

    def denoise(self, x: Tensor, classes: Tensor | None, steps: int) -> Tensor:
        """Images in about [-1, 1] from x at the first of `times`, by DDIM without added noise."""
        for t in self.times(steps):
            x = self.schedule.step(self.guided(x, t, classes), t, x).prev_sample
        return x

    def noised(self, x: Tensor, noise: Tensor, steps: int) -> Tensor:
        """Images x in [-1, 1] noised to the first of `times`."""
        out: Tensor = self.schedule.add_noise(x, noise, torch.tensor(self.times(steps)[:1], device=x.device))
        return out

    def sample(
        self, control: Tensor, perturbation: Perturbation, *, steps: int | None = None, generator: Randomness = None
    ) -> Tensor:
        """Images float32 (B, C, H, W) in [0, 1] from controls; see `Generator.sample`. None is a zero class vector."""
        steps = self.steps if steps is None else steps
        check_images(control, self.capabilities, self.name)
        names_of(perturbation, len(control))
        self.times(steps)
        with evaluating(self.net):
            classes = self.embed(perturbation)
            if classes is not None and len(classes) != len(control):
                raise ValueError(f"{len(classes)} classes for {len(control)} images: give one per image")
            x = to_range(control.to(self.device, torch.float32), self.capabilities.range)
            if self.start == "inversion":
                x = self.invert(x, self._control_vectors(perturbation, len(x)), steps)
            else:
                noise = normal(x.shape, x.device, generator)
                x = noise if self.start == "noise" else self.noised(x, noise, steps)
            return to_unit(self.denoise(x, classes, steps), self.capabilities.range)

    # ---- files -------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write NAME.safetensors and NAME.json with configurations, class names and settings, which `load` reads."""
        config = {
            "unet": self.net.config, "scheduler": _plain(self.schedule.config), "compounds": self.classes,
            "sampling": {key: getattr(self, key) for key in KEPT},
        }  # fmt: skip
        write_own(Path(path), self.net.official(), self.name, config)


def _is_vectors(perturbation: Perturbation) -> bool:
    return isinstance(perturbation, Tensor) and perturbation.is_floating_point()


def _plain(config: Any) -> dict[str, Any]:
    return {key: value for key, value in dict(config).items() if not key.startswith("_")}


def load(
    checkpoint: str | os.PathLike[str], *, compounds: Names | None = None, start: str | None = None,
    control_class: str | None = None, guidance: float | None = None, guidance_form: str | None = None,
    steps: int | None = None, skip: float | None = None,
) -> PhenDiff:  # fmt: skip
    """PhenDiff from its folder (`unet/` and `scheduler/` as diffusers writes them), or from what `save` wrote.

    compounds: names of the classes in label order (sorted names of the training folders), a list or a text file with
        one a line; "0", "1", ... without.
    The other options are described at `PhenDiff`; without them its defaults, or what `save` kept.
    Raises CheckpointError, ValueError, OSError, ImportError (diffusers).
    """
    path = find(checkpoint)
    parts = read(path)
    net = network(parts)
    names = read_names(
        parts.compounds if compounds is None else compounds, net.class_embedding.num_embeddings, str(path)
    )
    given = {
        "start": start, "control_class": control_class, "guidance": guidance, "guidance_form": guidance_form,
        "steps": steps, "skip": skip,
    }  # fmt: skip
    given = {key: value for key, value in given.items() if value is not None}
    kept = dict(parts.sampling)
    if {"start", "guidance_form"} & set(given):
        kept.pop("guidance", None)  # that of another start or form
    return PhenDiff(net, scheduler(parts), classes=names, checkpoint=os.fspath(checkpoint), **kept | given)
