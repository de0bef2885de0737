"""What every piece of the reproduction shares: phantom crops, prompts on test plates, judges, judges held out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.reproduction.sizes import Size
from biorewards.assay import Assay
from biorewards.audit.opinion_classifier import BACKBONE
from biorewards.audit.samples import subset
from biorewards.classifier import Classifier, Recipe, calibrate, predict, train
from biorewards.io.manifest import Manifest, read_manifest
from biorewards.io.reading import plan_reading
from biorewards.io.tables import write_text
from biorewards.phantom import write_dataset
from biorewards.rewards import PAPER_WEIGHTS, suite
from biorewards.segmentation import load_segmenter
from generators.pairs import read_rows, state_of
from rl.best_of_n import Prompts
from rl.policy import flow, streams, to_range, to_unit
from rl.pool import Data, Real, read_data
from rl.rewards import Judge, fitted, matched
from rl.sentinels import Yardstick

#: Of the phantoms that policies are trained and chosen on, that everything is tested on (plates of its own: intervals
#: are over plates, and the few test plates of the first say little), and that the second classifier learns from.
SEED, TEST_SEED, OTHER_SEED = 4242, 4243, 1717
#: Images of each compound by which `teachable` decides, and the purpose of their random streams.
ASKED, ASKING = 16, 78
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Where:
    """Plate and control of each of P images: what intervals are resampled by."""

    plate: Rows
    control: Rows


@dataclass(frozen=True)
class Setting:
    """data: training plates, with validation plates to evaluate on. judge: the seven, by which is trained and selected.
    classical, second: judges that nothing is trained on. prompts: on test plates; where, index: plate and control of
    each, and its row in the manifest. real: treated images of test plates, of the compounds of the prompts."""

    size: Size
    work: Path
    data: Data
    assay: Assay
    judge: Judge
    classical: Judge
    second: Classifier
    second_accuracy: float
    prompts: Prompts
    where: Where
    real: Prompts
    real_where: Where
    reference: Tensor
    yardstick: Yardstick
    notes: list[str]


def prepare(size: Size, work: Path, generator: Any, policy: Any, assay_name: str, tell: Any) -> Setting:
    """Draw, read, measure, and train the second classifier; what takes long is kept in `work`.

    policy: the generator as it rolls out (`cli.rl.load_policy`)."""
    for name, seed in (("phantom", SEED), ("tested", TEST_SEED)):
        if not (work / name / "index.csv").exists():
            tell(f"drawing {size.images} phantom crops")
            write_dataset(work / name, size.images, size.pixels, seed)
    found, tested = read_manifest(work / "phantom"), read_manifest(work / "tested")
    split, state = found.table["Metadata_Split"].to_numpy(object), state_of(found)
    tell("measuring real images")
    assay = Assay.load(assay_name)
    seen = subset(found, np.flatnonzero(split != "test"))
    data = read_data(seen, plan_reading(seen, assay), assay, list(generator.compounds))
    assay, notes = fitted(assay, data.real, data.scale)
    other, _ = matched(assay.with_segmenter(load_segmenter("classical")), data.real, data.scale)
    judge = Judge(suite(assay), assay, scale=data.scale)
    six = [name for name in PAPER_WEIGHTS if name != "moa"]
    compounds = teachable(size, work / "compounds.json", policy, data, judge, tell)
    yardstick = Yardstick.of(assay, judge.names, data.real, judge(*data.real))
    # Statistics are of all classes; what is trained on, drawn and compared is of these.
    data = data._replace(train=data.train.only(compounds), test=data.test.only(compounds))
    asked = torch.from_numpy(data.test.targets)
    data = data._replace(**{
        key: Real(one.images[kept], one.target[kept])
        for key, one in (("real", data.real), ("real_test", data.real_test))
        for kept in [torch.isin(one.target, asked)]
    })  # fmt: skip
    second = second_classifier(size, work / "second", assay, tell)
    untreated = state_of(tested) == "control"
    prompts, where = prompts_of(tested, np.flatnonzero(untreated), data, size.prompts)
    real, real_where = real_of(tested, np.flatnonzero(~untreated), prompts, data)
    right = second_probability(second, assay, real.control, real.target)[1]
    asked_for = found.table["Metadata_Compound"].isin(compounds).to_numpy(bool)
    trained = np.flatnonzero((split == "train") & (state != "control") & asked_for)
    chosen = np.random.default_rng(3).permutation(trained)[: size.reference]
    return Setting(
        size, work, data, assay, judge, Judge(suite(other, six), other, scale=data.scale), second, float(right.mean()),
        prompts, where, real, real_where, read_rows(found, np.sort(chosen), 3),
        yardstick, [*data.notes, *notes],
    )  # fmt: skip


@torch.no_grad()
def teachable(size: Size, path: Path, policy: Any, data: Data, judge: Judge, tell: Any) -> list[str]:
    """As many compounds as the size says, of different classes: those whose class the base hits about every other time
    on validation plates (mean probability nearest to 1/2). Where it always or never does, the rollouts of a group are
    alike in MoA and nothing can be learned from it."""
    names = data.test.compounds
    if not size.compounds:
        return names
    if not path.exists():
        tell("asking which compounds can be told from the base's rollouts")
        rows = [(c, k) for c in range(len(names)) for k in range(ASKED)]
        values = []
        for start in range(0, len(rows), size.groups * size.rollouts):
            part = rows[start : start + size.groups * size.rollouts]
            controls = data.test.controls[[k % len(data.test.controls) for _, k in part]]
            source = policy.source(to_range(controls, policy), streams((0, ASKING, *pair) for pair in part))
            with torch.autocast("cpu", torch.bfloat16, enabled=size.precision == "bf16"):
                images = to_unit(flow(policy, source, [names[c] for c, _ in part], size.rollout_steps), policy)
            values.append(judge(images.float(), torch.from_numpy(data.test.targets[[c for c, _ in part]])).value)
        mean = torch.cat(values)[:, judge.names.index("moa")].view(len(names), ASKED).nanmean(1).tolist()
        found = {name: round(p, 4) for name, p in zip(names, mean, strict=True)}
        write_text(path, json.dumps(found, indent=1) + "\n")
    told: dict[str, float] = json.loads(path.read_text())
    best: dict[int, str] = {}
    for name in sorted(told, key=lambda name: abs(told[name] - 0.5)):
        best.setdefault(int(data.test.targets[names.index(name)]), name)
    return sorted(list(best.values())[: size.compounds])


def prompts_of(found: Manifest, controls: Rows, data: Data, count: int) -> tuple[Prompts, Where]:
    """Every compound from every control, so that none has plates of its own; controls plate by plate in turn."""
    plate = found.table["Metadata_Plate"].to_numpy(object)[controls]
    rng = np.random.default_rng(1)
    order = rng.permutation(len(controls))
    rank = np.zeros(len(order), dtype=np.int64)
    for name in sorted(set(plate)):
        mine = order[plate[order] == name]
        rank[mine] = np.arange(len(mine))
    row, index = np.divmod(np.arange(count), len(data.test.compounds))
    chosen = controls[np.lexsort((plate, rank))][row % len(controls)]
    names = [data.test.compounds[k] for k in index]
    images = read_rows(found, chosen, 3)
    return Prompts(images, names, torch.from_numpy(data.test.targets[index])), where_of(found, chosen)


def real_of(found: Manifest, treated: Rows, prompts: Prompts, data: Data) -> tuple[Prompts, Where]:
    """Real images of the same compounds, as many of each as there are prompts, where so many are there."""
    compound = found.table["Metadata_Compound"].to_numpy(object)[treated]
    rng = np.random.default_rng(2)
    chosen = []
    for name in data.test.compounds:
        mine = rng.permutation(treated[compound == name])
        chosen.append(mine[: prompts.compounds.count(name)])
    rows = np.concatenate(chosen)
    names = found.table["Metadata_Compound"].to_numpy(object)[rows].tolist()
    target = torch.tensor([int(data.test.targets[data.test.compounds.index(name)]) for name in names])
    return Prompts(read_rows(found, rows, 3), names, target), where_of(found, rows)


def where_of(found: Manifest, rows: Rows) -> Where:
    """Plates by number; an image is its own control."""
    plates = found.table["Metadata_Plate"].to_numpy(object)
    number = {name: k for k, name in enumerate(sorted(set(plates)))}
    return Where(np.array([number[plates[row]] for row in rows]), np.asarray(rows, dtype=np.int64))


def second_classifier(size: Size, folder: Path, assay: Assay, tell: Any) -> Classifier:
    """A MoA classifier of another architecture and seed, trained at the generator's own pixel size on other plates."""
    path = folder / "classifier.safetensors"
    if path.exists():
        return Classifier.load(path)
    tell(f"training the second classifier ({BACKBONE[0]}) on {size.other} crops of other plates")
    if not (folder / "index.csv").exists():
        write_dataset(folder, size.other, size.pixels, OTHER_SEED)
    found = read_manifest(folder)
    images = assay.normalised(read_rows(found, np.arange(len(found)), 3)).half()
    labels = torch.tensor([assay.classes.index(name) for name in found.table["Metadata_MoA"]])
    held = torch.from_numpy((found.table["Metadata_Split"] == "val").to_numpy(bool))
    recipe = Recipe(images_seen=size.shown, seed=OTHER_SEED)
    made = train(images[~held], labels[~held], assay.classes, recipe, None, BACKBONE)
    calibrate(made, images[held], labels[held])
    made.save(path)
    return Classifier.load(path)


def second_probability(
    second: Classifier, assay: Assay, images: Tensor, target: Tensor
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """(N,) the second classifier's probability of the true class, and whether it is the highest."""
    p = predict(second, assay.normalised(images.cpu()))
    return p.gather(1, target[:, None])[:, 0].double().numpy(), (p.argmax(1) == target).numpy()
