"""What rewards say of images under every label at once: masks, regions and networks are computed once."""

from __future__ import annotations

import copy
import hashlib

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from biorewards.batch import Batch
from biorewards.validate.bench import Bench, Rows

Floats = npt.NDArray[np.float64]


def under_every_label(bench: Bench, images: Tensor) -> dict[str, Floats]:
    """reward -> (N, K) value of each of N images judged as if it were of each of the assay's K classes.

    images: (N, C, H, W) float32 in [0, 1]. NaN where a reward has no value, as always. Remembered like all scores.
    """
    names, k = list(bench.suite.rewards), len(bench.assay.classes)
    pixels = images.contiguous().numpy()
    keys = [hashlib.blake2b(p.tobytes() + b"every label").digest() for p in pixels]
    known = bench._known
    new = [place for key, place in {key: place for place, key in enumerate(keys)}.items() if key not in known]
    tables = []
    with torch.inference_mode():
        for part, label in bench._batches(images[new], np.full(len(new), -1)):
            batch = Batch(part, label, bench.assay)
            values = []
            for target in range(k):
                # The copy shares what was computed so far; the first one computes it.
                batch = copy.copy(batch)
                batch.target = torch.full_like(label, target)
                values.append(torch.stack([bench.suite.rewards[name](batch).value.float() for name in names], 1))
            tables.append(torch.stack(values, 2).flatten(1).cpu().numpy())
            if bench.tell is not None:
                bench.tell(min(bench.batch_size, len(new) - bench.batch_size * (len(tables) - 1)))
    if new:
        table = np.concatenate(tables)[: len(new)]
        known.update(zip((keys[place] for place in new), table, strict=True))
        bench._keep([keys[place] for place in new], table)
    found = np.stack([known[key] for key in keys]).reshape(len(keys), len(names), k).astype(np.float64)
    return {name: found[:, r] for r, name in enumerate(names)}


def real_under_every_label(bench: Bench, rows: Rows) -> dict[str, Floats]:
    """`under_every_label` of real images."""
    parts = [under_every_label(bench, bench.images(rows[k : k + 256])) for k in range(0, len(rows), 256)]
    return {name: np.concatenate([part[name] for part in parts]) for name in bench.suite.rewards}
