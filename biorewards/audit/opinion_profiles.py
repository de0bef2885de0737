"""The opinion of CellProfiler's features: is an image retrieved with real ones of its class from other plates?

cp-measure takes CellProfiler's features of nuclei and cells; copairs asks of every image whether real images of the
same mechanism, on other plates, are more like it than those of other mechanisms (average precision; Kalinin et al.
2025). No network is involved, and the masks are those of the classical segmenter.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from biorewards.assay import Assay
from biorewards.audit.columns import Yardstick
from biorewards.audit.models import Audit
from biorewards.audit.opinion import Draws, NoOpinion, Opinion, asked, held_against, means
from biorewards.audit.samples import REFERENCE, Rows, Sample, Scorer, thin
from biorewards.io.tables import read_info, read_table, write_table
from biorewards.segmentation import load_segmenter

Floats = npt.NDArray[np.float64]
#: Images of a sample, and reference images that they are looked for among: a profile takes about a tenth of a second.
ASKED, LIBRARY = 130, 400
#: Controls that a feature is standardised by; with fewer, all reference images.
CONTROLS = 20
#: Standardised features are limited to this many robust standard deviations.
LIMIT = 10.0
#: Classes count as retrieved below this p (permutations; Benjamini-Hochberg over classes), from this many draws.
LEVEL, NULL = 0.05, 2_000
MISSING = "CellProfiler's features were not asked: pip install 'biorewards[profiles]' (cp-measure and copairs)"
#: Files that are kept of a sample are written after each such number of images.
_SAVED = 50


def available() -> bool:
    """cp-measure and copairs are installed."""
    return all(importlib.util.find_spec(name) for name in ("cp_measure", "copairs"))


def by_profiles(
    scorer: Scorer, samples: dict[str, Sample], reference: Sample, yard: Yardstick, first: Audit
) -> Opinion:
    """Mean average precision of every sample; models are ranked by its distance from that of real images."""
    assay = scorer.assay.with_segmenter(load_segmenter("classical"))
    label = reference.scores["Metadata_MoA"]
    known = np.flatnonzero((yard.conditions.number[REFERENCE] >= 0) & reference.readable)
    codes = np.array(label.astype("category").cat.codes, np.int64)
    rows = thin(codes, known, LIBRARY, yard.seed)
    library = _profiles(scorer, assay, reference, rows)
    space = Space.of(library, (label.iloc[rows] == assay.classes[0]).to_numpy())
    draws: Draws = {}
    n, retrieved = {}, []
    for sample in samples.values():
        chosen = asked(yard, sample.name, ASKED)
        own = _profiles(scorer, assay, sample, chosen)
        precision, share, of = retrieval(_about(sample, chosen), space(own), _about(reference, rows), space(library))
        values = {"map": precision, "nothing found": np.asarray(own.isna().all(axis=1), np.float64)}
        draws[sample.name], n[sample.name] = means(yard, sample, chosen, values), len(chosen)
        retrieved.append(f"{sample.name} {share} of {of}")
    about = [
        f"{len(space.columns)} features of nuclei and cells (cp-measure {importlib.metadata.version('cp-measure')}, "
        "classical masks), medians over the objects of an image, standardised by "
        f"{'controls' if space.by_controls else 'all reference images'}. Mean average precision (copairs "
        f"{importlib.metadata.version('copairs')}): among {len(rows)} reference images of other plates, those of the "
        "same class before those of others. Images in which nothing is found count 0.",
        f"Classes retrieved beyond chance (p < {LEVEL}, corrected): {', '.join(retrieved)}.",
    ]
    return held_against("CellProfiler features", about, n, draws, first, [("map", "gap"), ("map", "moa")])


def _about(sample: Sample, rows: Rows) -> pd.DataFrame:
    """class and plate of rows. A generated image without a plate is of none of the real ones."""
    table = sample.scores.iloc[rows]
    plate = table["Metadata_Plate"].astype(str).str.strip()
    return pd.DataFrame({
        "moa": table["Metadata_MoA"].to_numpy(object),
        "plate": plate.where(plate != "", f"({sample.kind})").to_numpy(object),
    })  # fmt: skip


@dataclass(frozen=True)
class Space:
    """Features standardised by a library: columns, and their (robust) centre and spread."""

    columns: list[str]
    centre: Floats
    spread: Floats
    by_controls: bool

    @classmethod
    def of(cls, library: pd.DataFrame, controls: npt.NDArray[np.bool_]) -> Space:
        """Features that nearly all images of the library have, and that vary among its controls."""
        by_controls = int((controls & library.notna().any(axis=1).to_numpy()).sum()) >= CONTROLS
        base = library[controls] if by_controls else library
        centre = base.median()
        spread = 1.4826 * (base - centre).abs().median()
        kept = (library.notna().mean() > 0.9) & (spread > 1e-9 * (1 + centre.abs()))
        columns = [str(name) for name in library.columns[kept]]
        return cls(columns, centre[columns].to_numpy(float), spread[columns].to_numpy(float), by_controls)

    def __call__(self, profiles: pd.DataFrame) -> Floats:
        """(n, len(columns)); a missing feature is put at the centre, an image without any is all NaN."""
        found = profiles.reindex(columns=self.columns).to_numpy(np.float64)
        scaled = np.clip((found - self.centre) / self.spread, -LIMIT, LIMIT)
        empty = np.isnan(found).all(1)
        return np.where(empty[:, None], np.nan, np.nan_to_num(scaled))


def retrieval(queries: pd.DataFrame, profiles: Floats, among: pd.DataFrame, library: Floats) -> tuple[Floats, int, int]:
    """Average precision of each query, and how many classes, of how many, are retrieved beyond chance.

    queries, among: moa and plate of each row. Pairs are of one query and one row of the library, never of one plate;
    positive where the mechanism is the same. NaN where there is no such pair; 0 for a profile of NaN. Raises NoOpinion
    where nothing can be paired.
    """
    from copairs.map import average_precision, mean_average_precision
    from copairs.matching import UnpairedException

    here, there = ~np.isnan(profiles).any(1), ~np.isnan(library).any(1)
    meta = pd.concat([queries[here].assign(side="query"), among[there].assign(side="library")], ignore_index=True)
    features = np.concatenate([profiles[here], library[there]])
    try:
        found = average_precision(
            meta, features, pos_sameby=["moa"], pos_diffby=["plate", "side"], neg_sameby=[],
            neg_diffby=["moa", "plate", "side"], progress_bar=False,
        )  # fmt: skip
    except UnpairedException as error:
        raise NoOpinion(
            "no retrieval: it needs reference images of two classes, of other plates than the rest"
        ) from error
    found = found[found["side"] == "query"]
    precision = np.where(here, np.nan, 0.0)
    precision[here] = found["average_precision"].to_numpy(np.float64)
    by_class = mean_average_precision(
        found, ["moa"], null_size=NULL, threshold=LEVEL, seed=0, progress_bar=False, max_workers=1
    )
    return precision, int(by_class["below_corrected_p"].sum()), len(by_class)


def _profiles(scorer: Scorer, assay: Assay, sample: Sample, rows: Rows) -> pd.DataFrame:
    """One row an image; measured, or as an earlier run with the same images and settings left it."""
    version = importlib.metadata.version("cp-measure")
    files = [str(sample.manifest.files[row]) for row in rows]
    about = "\0".join([version, assay.fingerprint, str(scorer.plan(sample.manifest).settings()), *files])
    key = hashlib.sha256(about.encode("utf-8", "replace")).hexdigest()
    path = scorer.folder / "profiles" / f"{sample.name}.parquet"
    done = read_table(path) if path.is_file() and read_info(path).get("key") == key else pd.DataFrame()
    for start in range(len(done), len(rows), 10):
        part = [profile(sample.read(int(row)), assay) for row in rows[start : start + 10]]
        done = pd.concat([done, pd.DataFrame(part)], ignore_index=True)
        if len(done) == len(rows) or len(done) % _SAVED == 0:
            write_table(path, done, {"key": key})
        if scorer.progress is not None:
            scorer.progress(f"profiles of {sample.name}", len(done), len(rows))
    return done


def profile(image: npt.NDArray[np.float32], assay: Assay) -> dict[str, float]:
    """CellProfiler's features of a (C, H, W) image: medians over its nuclei and over its cells; NaN without any."""
    from cp_measure.featurizer import featurize, make_featurizer_config

    pixels = torch.from_numpy(image)[None]
    masks = assay.segment(pixels)
    roles = list(assay.channels)
    planes = assay.normalised(pixels)[:, list(assay.channels.values())].clamp(0, 1).numpy()
    labels = np.stack([masks.nuclei.numpy(), masks.cells.numpy()], 1)
    config = make_featurizer_config(
        roles, objects=["Nuclei", "Cells"], granularity=False, radial_zernikes=False, correlation_costes=False
    )
    found = {"Image_Count_Nuclei": np.nan, "Image_Count_Cells": np.nan}
    if not labels.any():
        return found
    with warnings.catch_warnings():
        # An object of a few px has no texture: its features, and medians of none, are NaN here without a word.
        warnings.simplefilter("ignore")
        data, columns, rows = featurize(planes, labels, config)
        kind = np.array([name for _, name, _ in rows], dtype=object)
        for name in ("Nuclei", "Cells"):
            own = data[kind == name]
            if len(own):
                found[f"Image_Count_{name}"] = float(len(own))
                medians = np.nanmedian(np.where(np.isfinite(own), own, np.nan), axis=0)
                found |= {f"{name}_{column}": float(value) for column, value in zip(columns, medians, strict=True)}
    return found
