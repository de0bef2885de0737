"""Segmenters: the bundled networks, Cellpose 1-4 with the user's weights, and a classical one.

`load_segmenter("compact")(nucleus, cytoplasm, diameter)` gives the masks of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from biorewards.segmentation.segmenter import Masks, Segmenter, normalise, percentile_range

__all__ = ["NAMES", "Masks", "Segmenter", "load_segmenter", "normalise", "percentile_range"]


def _compact() -> Segmenter:
    from biorewards.segmentation.compact import CompactSegmenter

    return CompactSegmenter.bundled()


def _classical() -> Segmenter:
    from biorewards.segmentation.classical import ClassicalSegmenter

    return ClassicalSegmenter()


def _cellpose4(name: str) -> Callable[[], Segmenter]:
    def make() -> Segmenter:
        from biorewards.segmentation.cellpose4 import Cellpose4Segmenter

        return Cellpose4Segmenter.load(name)

    return make


#: A new segmenter is one file and one entry here.
NAMES: dict[str, Callable[[], Segmenter]] = {
    "compact": _compact,
    "classical": _classical,
    **{name: _cellpose4(name) for name in ("cpsam_v2", "cpsam", "cpdino", "cpdino-vitb")},
}


def load_segmenter(name_or_path: str | Path, *, flow_threshold: float | None = None) -> Segmenter:
    """A segmenter by name, or from weight files.

    name_or_path: one of `NAMES`; or a weight file: `.safetensors` as the training script writes it, a Cellpose 4
    file, or a Cellpose 1-3 file (nuclei or cells, told by the diameter in it), or two of these as "NUCLEI,CELLS".

    flow_threshold: see `masks_from_flows`; None = the segmenter's own (Cellpose: 0.4).

    Raises ValueError for an unknown name, listing what exists, for a file that does not fit, and for a flow threshold
    where there is no flow check; for Cellpose 4 ImportError and FileNotFoundError as `Cellpose4Segmenter.load` does.
    Never returns another segmenter than the one asked for.
    """
    segmenter = _load(str(name_or_path))
    if flow_threshold is not None:
        if not hasattr(segmenter, "flow_threshold"):
            raise ValueError(f"segmenter {segmenter.name} has no flow check; leave the flow threshold out")
        segmenter.flow_threshold = flow_threshold
    return segmenter


def _load(name: str) -> Segmenter:
    if name in NAMES:
        return NAMES[name]()
    files = [Path(part) for part in name.split(",")]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise ValueError(f"no segmenter {', '.join(missing)!r}: neither a file nor one of {', '.join(NAMES)}")
    if files[0].suffix == ".safetensors":
        from biorewards.segmentation.compact import CompactSegmenter

        if len(files) > 1:
            raise ValueError(f"{name}: a .safetensors file holds both networks; give one")
        return CompactSegmenter.load(files[0])
    from biorewards.segmentation.cellpose4 import Cellpose4Segmenter, holds_cellpose4
    from biorewards.segmentation.cpnet import CPnetSegmenter

    if len(files) == 1 and holds_cellpose4(files[0]):
        return Cellpose4Segmenter.load(files[0])
    return CPnetSegmenter.load(*files)
