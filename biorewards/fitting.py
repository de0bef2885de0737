"""Make an assay from real images: intensity range, nucleus size, reference statistics, MoA classifier, card."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from torch import Tensor

from biorewards.assay import TREATED, Assay
from biorewards.batch import Batch
from biorewards.classifier import Classifier, Recipe, calibrate, expected_calibration_error, predict, train
from biorewards.regions import nuclear_containment
from biorewards.rewards import MEASURES, suite
from biorewards.segmentation import load_segmenter
from biorewards.segmentation.diameter import estimate_diameter
from biorewards.segmentation.segmenter import percentile_range

#: progress(what, done, total)
Progress = Callable[[str, int, int], None]
QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}
#: Crops per batch while measuring: activations of 64 crops of 96 px stay near the processor's cache.
BATCH = 64


def fit_assay(
    images: Tensor,
    rows: pd.DataFrame,
    *,
    name: str,
    channels: dict[str, int],
    pixel_size: float | None,
    control: str,
    segmenter: str = "compact",
    recipe: Recipe | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Assay:
    """Fit everything an assay holds.

    images: (N, C, H, W) float16 in [0, 1]. rows: one row an image with columns `class`, `compound`, `plate`,
    `split` (train, val or test; see `split_by_plate`). recipe None leaves the classifier out.
    Statistics come from the training rows, the calibration from val, every figure on the card from test rows.
    Raises ValueError when the control is missing or no nucleus is found in the training images.
    """
    tell: Progress = progress or (lambda what, done, total: None)
    treated = sorted(c for c in rows["class"].unique() if c != control)
    if control not in set(rows["class"]):
        raise ValueError(f"no image of the control {control!r}; classes here are {treated}; name it with --control")
    classes = [control, *treated]
    labels = torch.tensor([classes.index(c) for c in rows["class"]])
    training = torch.from_numpy((rows.split == "train").to_numpy())
    sample = images[training][:: max(1, int(training.sum()) // 256)].float()
    low, high = (t.median(0).values for t in percentile_range(sample, 1.0, 99.8))
    intensity = {role: (round(float(low[i]), 5), round(float(high[i]), 5)) for role, i in channels.items()}
    draft = Assay(
        name=name, channels=channels, pixel_size=pixel_size, crop_size=images.shape[-1],
        intensity=intensity, classes=classes,
        compounds=dict(zip(rows["compound"], rows["class"], strict=True)), nucleus_diameter=1.0,
        statistics=pd.DataFrame(), segmenter_name=segmenter, segmenter=load_segmenter(segmenter),
    )  # fmt: skip
    scaled = draft.normalised(sample)
    diameter = round(estimate_diameter(draft.segmenter, scaled[:, channels["dna"]], None), 2)  # type: ignore[arg-type]
    draft = replace(draft, nucleus_diameter=diameter)
    measures = measure_images(draft, images, tell)
    table = reference_statistics(measures[training.numpy()], rows["class"][training.numpy()].to_numpy(), classes)
    card: dict[str, Any] = {
        "images_per_class": {
            s: rows[rows.split == s]["class"].value_counts().reindex(classes, fill_value=0).to_dict()
            for s in ("train", "val", "test")
        },
        "plates": {s: sorted(map(str, rows[rows.split == s].plate.unique())) for s in ("train", "val", "test")},
        "seed": seed,
    }
    classifier = None
    if recipe is not None:
        normalised = torch.cat(
            [draft.normalised(images[i : i + 1024].float()).half() for i in range(0, len(images), 1024)]
        )
        classifier, card["classifier"] = fit_classifier(normalised, labels, measures, rows, classes, recipe, seed, tell)
    assay = replace(draft, statistics=table, classifier=classifier, card=card)
    card["real_scores"] = real_scores(assay, images, labels, rows.split.to_numpy(), tell)
    return assay


def batches(n: int) -> Iterator[slice]:
    """Slices of `BATCH` rows that cover n rows."""
    yield from (slice(i, min(i + BATCH, n)) for i in range(0, n, BATCH))


def measure_images(assay: Assay, images: Tensor, tell: Progress) -> pd.DataFrame:
    """The five measures and the containment of every image, in the assay's units; NaN where there is no object."""
    found = []
    for part in batches(len(images)):
        batch = Batch(images[part].float(), None, assay)
        values = {k: m.of(batch) * (assay.pixel_area if m.is_area else 1.0) for k, m in MEASURES.items()}
        values["nucleus_in_cytoplasm"] = nuclear_containment(batch.nuclei, batch.cells)
        found.append(pd.DataFrame({k: v.numpy().astype(np.float64) for k, v in values.items()}))
        tell("measuring", part.stop, len(images))
    return pd.concat(found, ignore_index=True)


def reference_statistics(measures: pd.DataFrame, labels: npt.NDArray[Any], classes: list[str]) -> pd.DataFrame:
    """One row a (class, measure): mean, sd (n - 1), n, quantiles, over images where it could be measured."""
    rows = []
    for name in [*classes, TREATED]:
        chosen = labels != classes[0] if name == TREATED else labels == name
        for measure in measures.columns:
            values = measures.loc[chosen, measure].dropna()
            if len(values) < 2:
                continue
            row = {
                "class": name,
                "measure": measure,
                "mean": values.mean(),
                "sd": values.std(),
                "n": len(values),
                "origin": "images",
            }
            rows.append(row | {q: values.quantile(p) for q, p in QUANTILES.items()})
    return pd.DataFrame(rows)


def fit_classifier(
    images: Tensor,
    labels: Tensor,
    measures: pd.DataFrame,
    rows: pd.DataFrame,
    classes: list[str],
    recipe: Recipe,
    seed: int,
    tell: Progress,
) -> tuple[Classifier, dict[str, Any]]:
    """The shipped classifier, and what a second one, trained without some compounds, says about unseen ones.

    The second one leaves out one compound of every class that has two or more, and a random tenth of the
    rest; so the four splits (random, plate, compound, both) are measured with one training.
    """
    train_rows, test_rows = (rows.split == "train").to_numpy(), (rows.split == "test").to_numpy()
    held = held_out_compounds(rows, classes[0], seed)
    aside = np.random.default_rng(seed).random(len(rows)) < 0.1
    unseen = rows["compound"].isin(held).to_numpy()
    figures: dict[str, Any] = {"held_out_compounds": held}
    keep = train_rows & ~unseen & ~aside
    probe = train(
        images[keep],
        labels[keep],
        classes,
        recipe,
        lambda s, n, _: tell("training the classifier for held-out compounds", s, n),
    )
    splits = {
        "random": train_rows & ~unseen & aside,
        "plate": test_rows & ~unseen,
        "compound": train_rows & unseen,
        "compound_and_plate": test_rows & unseen,
    }
    for split, chosen in splits.items():
        if chosen.any():
            figures[split] = accuracy(predict(probe, images[chosen]).numpy(), labels[chosen].numpy())
    final = train(
        images[train_rows], labels[train_rows], classes, recipe, lambda s, n, _: tell("training the classifier", s, n)
    )
    val = (rows.split == "val").to_numpy()
    calibrate(final, images[val], labels[val])
    probabilities = predict(final, images[test_rows]).numpy()
    truth = labels[test_rows].numpy()
    figures["shipped_on_held_out_plates"] = accuracy(probabilities, truth) | {
        "ece": expected_calibration_error(probabilities, truth)
    }
    figures["temperature"] = final.temperature
    features = measures.drop(columns="nucleus_in_cytoplasm").to_numpy()
    counted = counts_and_sizes(features, labels.numpy(), train_rows, test_rows, len(classes), seed)
    figures["counts_and_sizes_only"] = accuracy(counted, truth)
    figures["control_as_treated"] = control_probability(probabilities, truth, classes)
    return final, figures


def counts_and_sizes(
    measures: npt.NDArray[Any], labels: npt.NDArray[Any], fitted: npt.NDArray[np.bool_], tested: npt.NDArray[np.bool_],
    n_classes: int, seed: int,
) -> npt.NDArray[np.float64]:  # fmt: skip
    """(tested, n_classes) probabilities by a classifier that sees measures only: what cell number and size explain.

    measures: (N, M), NaN where there is none. labels: (N,) class. fitted, tested: (N,) bool, its images and those that
    it is asked about.
    """
    plain = HistGradientBoostingClassifier(class_weight="balanced", random_state=seed, max_iter=150)
    plain.fit(measures[fitted], labels[fitted])
    found = np.zeros((int(tested.sum()), n_classes))
    found[:, plain.classes_] = plain.predict_proba(measures[tested])
    return found


def held_out_compounds(rows: pd.DataFrame, control: str, seed: int) -> list[str]:
    """One compound of every treated class that has at least two."""
    rng = np.random.default_rng(seed)
    groups = rows[rows["class"] != control].groupby("class")["compound"].unique()
    return [str(rng.choice(sorted(names))) for _, names in groups.items() if len(names) > 1]


def accuracy(probabilities: npt.NDArray[Any], truth: npt.NDArray[Any]) -> dict[str, Any]:
    """Share correct, mean of the classes' shares (with 95 % bootstrap interval over images) and n."""
    correct = probabilities.argmax(1) == truth

    def balanced(index: npt.NDArray[Any]) -> float:
        return float(np.mean([correct[index][truth[index] == k].mean() for k in np.unique(truth[index])]))

    rng = np.random.default_rng(0)
    draws = [balanced(rng.integers(len(truth), size=len(truth))) for _ in range(400)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return {
        "accuracy": float(correct.mean()),
        "balanced_accuracy": balanced(np.arange(len(truth))),
        "interval_95": [float(low), float(high)],
        "n": len(truth),
    }


def control_probability(
    probabilities: npt.NDArray[Any], truth: npt.NDArray[Any], classes: list[str]
) -> dict[str, float]:
    """Mean probability that control crops get for a treated class; base rate 1 / classes of balanced training."""
    controls = probabilities[truth == 0]
    return {
        "mean": float(controls[:, 1:].mean()),
        "largest_class": float(controls[:, 1:].mean(0).max()),
        "base_rate": 1.0 / len(classes),
    }


def real_scores(
    assay: Assay, images: Tensor, labels: Tensor, split: npt.NDArray[Any], tell: Progress
) -> dict[str, Any]:
    """What real held-out images score on each reward: the row every table of generated images is read against."""
    index = np.flatnonzero(split == "test") if (split == "test").any() else np.arange(len(images))
    judge = suite(assay)
    values: dict[str, list[npt.NDArray[Any]]] = {}
    for part in batches(len(index)):
        chosen = torch.from_numpy(index[part])
        result = judge(Batch(images[chosen].float(), labels[chosen], assay))
        for name, score in result.scores.items():
            values.setdefault(name, []).append(score.value.numpy())
        tell("scoring held-out real images", part.stop, len(index))
    summary = {}
    for name, parts in values.items():
        value = np.concatenate(parts)
        value = value[~np.isnan(value)]
        if len(value):
            summary[name] = {"mean": float(value.mean()), "sd": float(value.std()), "n": len(value)}
    return summary
