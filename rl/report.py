"""Curves and grids of a run: PNG files beside it and one HTML page that opens anywhere."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from PIL import Image, ImageDraw
from torch import Tensor

from biorewards import __version__
from biorewards.io.tables import atomic
from biorewards.report.crops import composite
from biorewards.report.figures import ticks
from biorewards.report.wording import number, plain, wording

if TYPE_CHECKING:
    from biorewards.assay import Assay
    from rl.evaluation import Drawn, Evaluation
    from rl.rewards import Judge

SAMPLES, REPORT = "samples", "report.html"
#: Compounds and images a compound in a grid; px a side of an image, of a gap and of the column of names.
ROWS, COLUMNS, SIDE, GAP, NAMES = 12, 3, 96, 2, 150
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 330, 150, 46, 8, 8, 22

Line = dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """One quantity over steps, in SVG units. path: of the evaluations; rules: (y, name) of base and real."""

    title: str
    path: str
    points: list[tuple[float, float, str]]
    rules: list[tuple[float, str]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def curve(title: str, points: list[tuple[int, float]], rules: dict[str, float]) -> Curve | None:
    """Draw (step, value) points and horizontal rules; None where nothing is finite."""
    points = [(x, y) for x, y in points if math.isfinite(y)]
    rules = {name: y for name, y in rules.items() if math.isfinite(y)}
    if not points:
        return None
    values = [y for _, y in points] + list(rules.values())
    low, high = min(values), max(values)
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 0.5
    low, high, end = low - pad, high + pad, max(points[-1][0], 1)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            round(LEFT + x / end * (WIDTH - LEFT - RIGHT), 1),
            round(TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM), 1),
        )

    placed = [(*at(x, y), f"step {x}: {number(y)}") for x, y in points]
    return Curve(
        title,
        "M" + " L".join(f"{x},{y}" for x, y, _ in placed),
        placed,
        [(at(0, y)[1], name) for name, y in rules.items()],
        [(at(x, low)[0], f"{x:g}") for x in ticks(0, end, 4)],
        [(at(0, y)[1], number(y)) for y in ticks(low, high, 3)],
    )


def write_grid(out: Path, step: int, evaluation: Evaluation, base: Drawn, now: Drawn) -> None:
    """samples/step_STEP.png: a row a compound: control, base, then images of now from the same source, one real."""
    data, assay = evaluation.data, evaluation.judge.assay
    picture_rows, names = [], []
    for k, name in list(enumerate(data.test.compounds))[:ROWS]:
        mine = np.flatnonzero(now.compound == k)
        shown = [data.test.controls[int(now.control[mine[0]])], base.images[int(mine[0])]]
        shown += [now.images[int(i)] for i in mine[:COLUMNS]]
        real = np.flatnonzero(data.real.target.numpy() == data.test.targets[k])
        shown += [data.real.images[int(real[0])]] if len(real) else []
        picture_rows.append([tile(image, assay) for image in shown])
        names.append(name)
    widest = max(len(row) for row in picture_rows)
    sheet = np.full((SIDE + GAP, NAMES + widest * (SIDE + GAP), 3), 255, np.uint8)
    canvas = Image.fromarray(np.concatenate([sheet] * len(picture_rows)))
    draw = ImageDraw.Draw(canvas)
    for i, (name, row) in enumerate(zip(names, picture_rows, strict=True)):
        draw.text((4, i * (SIDE + GAP) + SIDE // 2 - 6), name[:24], fill="black")
        for j, image in enumerate(row):
            canvas.paste(Image.fromarray(image), (NAMES + j * (SIDE + GAP), i * (SIDE + GAP)))
    path = out / SAMPLES / f"step_{step:06d}.png"
    with atomic(path) as (temporary,):
        canvas.save(temporary, format="PNG")


def tile(image: Tensor, assay: Assay) -> npt.NDArray[np.uint8]:
    """(C, H, W) in [0, 1] as (SIDE, SIDE, 3) uint8, actin red, tubulin green, DNA blue."""
    small = Image.fromarray(composite(image.numpy(), assay)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(small, np.uint8)


def write_report(out: Path, lines: list[Line], judge: Judge, about: dict[str, Any]) -> None:
    """report.html from a run's log: what changed, curves, grids, settings."""
    evaluated = [line for line in lines if line["kind"] == "eval"]
    trained = [line for line in lines if line["kind"] == "train"]
    real, own = (next((line for line in lines if line["kind"] == kind), {}) for kind in ("real", "own"))
    if not evaluated:
        return
    first, last = evaluated[0], evaluated[-1]
    keys = ["total", *(f"reward/{name}" for name in judge.names)]
    watched = [k for k in last if k.startswith(("spread/", "held_out/"))] + [
        "distance", "diversity", "class_entropy", "dark", "nothing_found",
    ]  # fmt: skip
    inner = ["kl", "drift_old", "gradient", "r_sd", "useful_groups", "unscored", "samples_per_s", "score_share"]
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("rl", "."), PackageLoader("biorewards.report", ".")]),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["number"] = number
    grids = sorted((out / SAMPLES).glob("step_*.png"))
    page = environment.get_template("report.html.j2").render(
        title=str(about.get("generator", "Post-training")),
        facts=[f"{last['step']} steps", f"{last['images']} evaluation images", f"assay {judge.assay.name}",
               f"fingerprint {judge.fingerprint}"],
        words=sentences(first, last, real, judge),
        rows=[{"title": title(key, judge), "key": key.removeprefix("reward/"), "base": first.get(key, math.nan),
               "now": last.get(key, math.nan), "real": real.get(key, math.nan),
               "own": own.get(key, math.nan), "group": group}
              for group, names in (("Rewards", keys), ("Not rewarded", watched)) for key in names],
        sections=[
            ("Rewards", "Averaged weights on held-out controls, the same noise at every evaluation.",
             _curves(evaluated, keys, judge, first, real)),
            ("Not rewarded", "Signs of images that get worse while rewards rise.",
             _curves(evaluated, watched, judge, first, real)),
            ("Inside the training", "Every step, on the rollouts that were trained on.",
             _curves(trained, inner, judge, {}, {})),
            ("Share of the variance within groups", "Which reward decides who is better in a group.",
             _curves(trained, [f"share/{name}" for name in judge.names], judge, {}, {})),
        ],
        grids=[(path.stem.replace("_", " "), base64.b64encode(path.read_bytes()).decode())
               for path in ([grids[0], grids[-1]] if len(grids) > 1 else grids)],
        made=[("biorewards", __version__), *((k.replace("_", " ").capitalize(), plain(v)) for k, v in about.items())],
    )  # fmt: skip
    with atomic(out / REPORT) as (temporary,):
        temporary.write_text(page, encoding="utf-8")


def title(key: str, judge: Judge) -> str:
    """A metric in words."""
    kind, _, name = key.rpartition("/")
    known = {
        "total": "Total", "distance": "Distance to real images", "diversity": "Diversity within a group",
        "class_entropy": "Entropy of the classes seen, nats", "dark": "Dark pixels",
        "kl": "Velocity, drift from the base",
        "nothing_found": "Images without nucleus or cell", "drift_old": "Velocity, drift from the lagged policy",
        "gradient": "Gradient norm before the clip", "r_sd": "Spread of r", "useful_groups": "Useful groups",
        "unscored": "Rollouts without a score", "samples_per_s": "Images a second", "score_share": "Time spent scoring",
    }  # fmt: skip
    if not kind:
        return known.get(name, name)
    if kind == "held_out":
        return f"Held out: {name}"
    text = wording(name, judge.assay.pixel_size).title
    return {"spread": f"Spread ratio, {text.lower()}", "share": text, "reward": text}[kind]


def sentences(first: Line, last: Line, real: Line, judge: Judge) -> list[tuple[str, str]]:
    """("", text) or ("warn", text): what a reader must know."""
    if first["step"] == last["step"]:
        return [("", "Only the base has been evaluated so far.")]
    text = f"Total on held-out controls: {number(first['total'])} before, {number(last['total'])} now"
    words = [("", text + (f"; real images score {number(real['total'])}." if real else "."))]
    names = [(title(f"reward/{n}", judge), f"reward/{n}") for n in judge.names]
    up = [t for t, key in names if last[key] > first[key]]
    words.append(("", f"{len(up)} of {len(names)} rewards rose" + (f": {', '.join(up)}." if up else ".")))
    words += [("warn", f"Not rewarded: {alarm}.") for alarm in last["alarms"]]
    narrow = [title(k, judge) for k, v in last.items() if k.startswith("spread/") and v < 0.7]
    if narrow:
        words.append(("warn", f"Below 0.7 of the spread of real images: {', '.join(narrow)}. −z² pays for that; "
                              "the distribution preset does not."))  # fmt: skip
    better = [t for t, key in names if real and last[key] > real[key] + 0.05 * max(1.0, abs(real[key]))]
    if better:
        words.append(("warn", f"Better than real images: {', '.join(better)}. That is a warning, not a success."))
    return words


def _curves(lines: list[Line], keys: list[str], judge: Judge, first: Line, real: Line) -> list[Curve]:
    found = []
    for key in keys:
        points = [(line["step"], line.get(key, math.nan)) for line in lines]
        rules = {name: one[key] for name, one in (("base", first), ("real", real)) if key in one}
        if (drawn := curve(title(key, judge), points, rules)) is not None:
            found.append(drawn)
    return found
