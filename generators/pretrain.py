"""Flow-matching pre-training of CellFlux: from a control of the same batch to a treated cell.

x_t = (1 - t) x_0 + t x_1 with x_1 the treated image and x_0 the source; the network learns x_1 - x_0 (Lipman et al.
2023; CellFlux: Zhang et al. 2025). Other than the official code, the noise of the source, and whether the compound is
left out, are drawn for every image and not for a whole batch.

Everything random in a step follows from (seed, step), so nothing but weights, average, optimiser and step has to be
kept, and a run that was killed and resumed ends, on a CPU, bit for bit where the uninterrupted one does. A step's
images are drawn for all processes alike and divided over them: the run does not depend on their number but for the
order of sums.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from biorewards.io.tables import atomic
from generators.base import digest, evaluating, seeded, to_range
from generators.cellflux import CellFlux
from generators.checkpoints import CheckpointError, fill, read_safetensors
from generators.pairs import Pairs, read_rows
from generators.pictures import mosaic, write_picture
from generators.steps import Draw, Drawn, Settings, seed_of

#: Files of a run's folder.
STATE, WEIGHTS, LOG, PICTURES, SNAPSHOTS = (
    "state.safetensors",
    "generator.safetensors",
    "log.jsonl",
    "pictures",
    "snapshots",
)
#: Images whose loss is measured on validation, with the same noise and times at every step.
VALIDATED = 256
#: Compounds in a picture.
ROWS = 24


class Run:
    """A pre-training run in a folder: `Run(...).train()`. It goes on where the folder's state left off.

    out: `generator.safetensors` (+ .json; the average: what `generators.load("cellflux", ...)` takes),
    `state.safetensors` (all that a resumed run needs), `log.jsonl` (a line every `every` steps and each validation),
    `pictures/` (a grid of samples at each validation) and, with `snapshots`, the average at each validation.

    accelerator: of `accelerate`, made by the caller. Raises CheckpointError where the state in `out` is of other
    settings or data, ImageError for a file that cannot be read.
    """

    def __init__(
        self, generator: CellFlux, pairs: Pairs, validation: Pairs | None, settings: Settings, out: Path,
        accelerator: Any, *, every: int = 20, validate: int = 500, save: int = 500, snapshots: bool = False,
        steps: int | None = None,
    ) -> None:  # fmt: skip
        self.generator, self.settings, self.out, self.accelerator = generator, settings, out, accelerator
        self.every, self.validate, self.save, self.snapshots = every, validate, save, snapshots
        first = read_rows(pairs.manifest, pairs.treated[:1], generator.capabilities.channels)
        channels, size = first.shape[1], (first.shape[2], first.shape[3])
        multiple = generator.capabilities.size_multiple
        if size[0] % multiple or size[1] % multiple:
            raise ValueError(f"the images are {size[0]} x {size[1]} px; this network wants multiples of {multiple}")
        generator.embed(pairs.names)  # raises for a compound that its table lacks
        if settings.batch % accelerator.num_processes:
            raise ValueError(f"batch={settings.batch}: {accelerator.num_processes} processes must share it evenly")
        self.draw = Draw(pairs, settings, channels, size, generator.dequantise)
        # Noise, times and images of validation are the same at every step; every source has its noise, as in sampling.
        fixed = replace(settings, drop=0.0, noise=1.0, augment=0.0, seed=0)
        self.validation = None if validation is None else Draw(validation, fixed, channels, size, generator.dequantise)
        self.fingerprint = _fingerprint(settings, generator, pairs)
        self.net: nn.Module = generator.net.to(accelerator.device)
        self.average = copy.deepcopy(generator.net).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), settings.rate, betas=settings.betas, weight_decay=settings.weight_decay
        )
        self.step, self.sampler_steps = 0, steps
        hints = pairs.manifest.hints
        known = {"pixel_size_um": hints.pixel_size, "channels": hints.channels}
        generator.origin.args |= {key: value for key, value in known.items() if value is not None}
        if (out / STATE).exists():
            self._restore()
        elif out.exists() and any(out.iterdir()):
            raise FileExistsError(f"{out} is not empty and holds no {STATE}; choose another folder")
        self.trained, self.optimizer = accelerator.prepare(self.net, self.optimizer)

    # ---- the loop ----------------------------------------------------------------------------------------------

    def train(self, progress: Callable[[int, dict[str, float]], None] | None = None) -> CellFlux:
        """Train to the last step and return the generator with the averaged weights. Interrupting loses no more than
        the steps since the last save."""
        s, began, since = self.settings, time.perf_counter(), self.step
        losses: list[float] = []
        self._cut_log()
        for step, drawn in self._ahead():
            loss, norm = self._update(step, drawn)
            losses.append(loss)
            self.step = step + 1
            last = self.step == s.steps
            if self.step % self.every == 0 or last:
                speed = (self.step - since) * s.batch / (time.perf_counter() - began)
                line = {
                    "step": self.step, "loss": sum(losses) / len(losses), "gradient": norm, "rate": s.rate_at(step),
                    "images_per_s": round(speed, 2),
                }  # fmt: skip
                self._log(line)
                losses.clear()
                if progress is not None:
                    progress(self.step, line)
            if self.step % self.validate == 0 or last:
                self._validate()
            if self.step % self.save == 0 or last:
                self._save()
        return self.result()

    def result(self) -> CellFlux:
        """The generator of the averaged weights."""
        made = copy.copy(self.generator)
        made.net, made.weights = self.average.eval(), "ema"
        return made

    def _ahead(self) -> Iterator[tuple[int, Drawn]]:
        """The steps that are left with what each sees, read one step ahead."""
        with ThreadPoolExecutor(1, thread_name_prefix="read") as pool:
            waiting = pool.submit(self.draw, self.step)
            for step in range(self.step, self.settings.steps):
                drawn = waiting.result()
                if step + 1 < self.settings.steps:
                    waiting = pool.submit(self.draw, step + 1)
                yield step, drawn

    def _update(self, step: int, drawn: Drawn) -> tuple[float, float]:
        s = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = s.rate_at(step)
        # Dropout draws from the global stream.
        torch.manual_seed(seed_of(s.seed, step, self.accelerator.process_index))
        self.trained.train()
        loss = self._loss(self.trained, _share(drawn, self.accelerator.process_index, self.accelerator.num_processes))
        self.accelerator.backward(loss)
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), s.clip or math.inf)
        if not bool(torch.isfinite(norm)):
            raise ValueError(
                f"step {step + 1}: the gradient is {float(norm)}; the run in {self.out} is kept as it was last saved. "
                "Start again with a lower rate, warm-up or clipping"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = s.decay_at(step + 1)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.net.parameters()), 1 - decay)
        return float(self.accelerator.reduce(loss.detach(), reduction="mean")), float(norm)

    def _loss(self, net: nn.Module, drawn: Drawn) -> Tensor:
        """Mean squared error of the velocity over all pixels."""
        generator, device = self.generator, self.accelerator.device
        bounds = generator.capabilities.range
        x1 = to_range(drawn.treated.to(device), bounds)
        control, noise = to_range(drawn.control.to(device), bounds), drawn.noise.to(device)
        if generator.source_mode == "control_plus_noise":
            x0 = control + generator.noise_level * noise * _each(drawn.noisy.to(device))
        else:
            x0 = noise if generator.source_mode == "noise" else control
        t = drawn.t.to(device)
        x = torch.lerp(x0, x1, _each(t))
        condition = generator.embed(drawn.compounds)
        with self.accelerator.autocast():
            velocity = net(x, t, condition, drawn.drop.to(device))
        error: Tensor = (velocity.float() - (x1 - x0)).square().mean()
        return error

    # ---- on the way --------------------------------------------------------------------------------------------

    def _validate(self) -> None:
        """Loss of the average on fixed validation images, and a picture of samples."""
        if not self.accelerator.is_main_process:
            return
        if self.validation is not None:
            with evaluating(self.average):
                rounds = range(max(1, VALIDATED // self.settings.batch))
                found = [float(self._loss(self.average, self.validation(i))) for i in rounds]
            self._log({"step": self.step, "validation_loss": sum(found) / len(found)})
        draw = self.validation or self.draw
        write_picture(self.out / PICTURES / f"{self.step:07d}.png", _picture(self.result(), draw, self.sampler_steps))
        if self.snapshots:
            self.result().save(self.out / SNAPSHOTS / f"{self.step:07d}.safetensors")

    def _log(self, line: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            with (self.out / LOG).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")

    def _cut_log(self) -> None:
        """Take out what was logged after the state that the run goes on from."""
        if not self.accelerator.is_main_process:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / LOG
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= self.step]
            with atomic(path) as (temporary,):
                temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    # ---- state -------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        from safetensors.torch import save_file

        tensors = {f"net.{key}": value for key, value in self.net.state_dict().items()}
        tensors |= {f"average.{key}": value for key, value in self.average.state_dict().items()}
        state = self.optimizer.state_dict()["state"]
        tensors |= {f"optimizer.{i}.{key}": value for i, kept in state.items() for key, value in kept.items()}
        with atomic(self.out / STATE) as (temporary,):
            whole = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
            save_file(whole, temporary, {"step": str(self.step), "run": json.dumps(self.fingerprint, sort_keys=True)})
        self.result().save(self.out / WEIGHTS)

    def _restore(self) -> None:
        from safetensors import safe_open

        path = self.out / STATE
        tensors = read_safetensors(path)
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
        try:
            step, kept = int(meta["step"]), json.loads(meta["run"])
        except (KeyError, ValueError):
            raise CheckpointError(f"{path}: no state of a pre-training run") from None
        for key, value in self.fingerprint.items():
            if kept.get(key) != value:
                raise CheckpointError(
                    f"{path}: this run was started with {key} {kept.get(key)!r}, now it is {value!r}; give what it was "
                    "started with, or another folder"
                )
        fill(self.net, _part(tensors, "net."), path)
        fill(self.average, _part(tensors, "average."), path)
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in _part(tensors, "optimizer.").items():
            number, _, name = key.partition(".")
            state.setdefault(int(number), {})[name] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.step = step


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _each(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _share(drawn: Drawn, index: int, of: int) -> Drawn:
    """Every `of`-th image, from `index` on."""
    d, mine = drawn, slice(index, None, of)
    return Drawn(
        d.treated[mine], d.control[mine], d.compounds[mine], d.noise[mine], d.noisy[mine], d.t[mine], d.drop[mine]
    )


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line that was cut off when the run was killed


def _fingerprint(settings: Settings, generator: CellFlux, pairs: Pairs) -> dict[str, Any]:
    """What a resumed run must share with the one that it goes on with. Not the number of steps: a run may be longer."""
    files = hashlib.sha256()
    table = pairs.manifest.table
    for row, compound, group in zip(pairs.treated, pairs.compounds, pairs.group, strict=True):
        files.update(f"{table['Metadata_File'].iat[int(row)]}\0{compound}\0{group}\n".encode())
    for group, rows in enumerate(pairs.controls):
        files.update("".join(f"{group} {table['Metadata_File'].iat[int(row)]}\n" for row in rows).encode())
    about = {
        **{key: value for key, value in asdict(settings).items() if key != "steps"},
        "network": asdict(generator.net.config), "source": generator.source_mode, "noise_level": generator.noise_level,
        "dequantise": generator.dequantise, "compounds": generator.compounds, "start": digest(generator.net),
        "images": files.hexdigest()[:16],
    }  # fmt: skip
    found: dict[str, Any] = json.loads(json.dumps(about))  # tuples become lists, as in the file
    return found


def _picture(generator: CellFlux, draw: Draw, steps: int | None) -> Any:
    """A row a compound: a control, two treated images, three samples from controls of the same batch."""
    pairs, rows = draw.pairs, []
    for number, compound in enumerate(pairs.names[:ROWS]):
        items = np.flatnonzero(np.array(pairs.compounds, dtype=object) == compound)
        rng = np.random.default_rng([number, 3])
        real = rng.choice(items, 2)
        control = np.array([rng.choice(pairs.controls[pairs.group[item]]) for item in (*real, *real)][:3])
        read = [read_rows(pairs.manifest, rows_, draw.channels, draw.size) for rows_ in (control, pairs.treated[real])]
        drawn = generator.sample(
            read[0].to(generator.device),
            [compound] * 3,
            steps=steps,
            generator=seeded(range(3 * number, 3 * number + 3)),
        )
        rows.append(torch.cat([read[0][:1], read[1], drawn.cpu()]))
    return mosaic(rows)


def accelerator_of(settings: Settings, cpu: bool = False) -> Any:
    """The `Accelerator` of a run: one process or, under `accelerate launch`, one a GPU. Raises ImportError."""
    try:
        from accelerate import Accelerator
    except ImportError:
        raise ImportError(
            'pre-training needs accelerate, which is not installed: python -m pip install "biorewards[train]"'
        ) from None
    return Accelerator(cpu=cpu, mixed_precision="bf16" if settings.bfloat16 else "no")
