"""The Cellpose 4 adapter: refusals always, the network itself where cellpose 4 is installed (with random weights)."""

import importlib.util
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from biorewards.segmentation import cellpose4, load_segmenter
from biorewards.segmentation.cellpose4 import Cellpose4Segmenter, holds_cellpose4
from biorewards.segmentation.flows import masks_from_flows

VERSION = metadata.version("cellpose") if importlib.util.find_spec("cellpose") else "0"
needs_cellpose4 = pytest.mark.skipif(int(VERSION.split(".")[0]) < 4, reason="cellpose 4 is not installed")


@pytest.mark.parametrize("version", [None, "3.1.1.3"])
def test_missing_or_old_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    spec = None if version is None else SimpleNamespace()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(metadata, "version", lambda name: version)
    with pytest.raises(ImportError, match=r'pip install "biorewards\[cellpose4\]"'):
        load_segmenter("cpsam_v2")


def test_missing_weights_name_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cellpose4, "_models", lambda: SimpleNamespace(MODEL_DIR=tmp_path))
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "cpdino-vitb")):
        load_segmenter("cpdino-vitb")


def test_a_file_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cellpose4, "_models", lambda: SimpleNamespace(MODEL_DIR=tmp_path))
    torch.save({"output.2.weight": torch.zeros(3)}, tmp_path / "cpsam")
    with pytest.raises(ValueError, match="no entry 'W2'"):
        load_segmenter("cpsam")


def test_file_kinds_are_told_apart(tmp_path: Path) -> None:
    torch.save({"W2": torch.zeros(3)}, tmp_path / "four")
    torch.save({"output.2.weight": torch.zeros(3)}, tmp_path / "three")
    (tmp_path / "text").write_text("not weights")
    assert holds_cellpose4(tmp_path / "four")
    assert not any(holds_cellpose4(tmp_path / name) for name in ("three", "text", "absent"))


@pytest.fixture
def small_sam(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The package's own CPSAM with a two-block encoder instead of ViT-L, saved as cpsam_v2 in its model folder."""
    from cellpose import models, vit
    from segment_anything.modeling import ImageEncoderViT

    encoder = {"depth": 2, "embed_dim": 32, "num_heads": 2, "use_rel_pos": True, "window_size": 14, "img_size": 1024}
    build = lambda checkpoint: SimpleNamespace(image_encoder=ImageEncoderViT(**encoder))  # noqa: E731
    monkeypatch.setattr(vit, "sam_model_registry", {"vit_l": build})
    monkeypatch.setattr(models, "MODEL_DIR", tmp_path)
    torch.manual_seed(0)
    net = vit.CPSAM()
    net.out.weight.data *= 20  # random outputs of a size that gives foreground and flows
    net.save_model(tmp_path / "cpsam_v2")
    return tmp_path / "cpsam_v2"


@needs_cellpose4
def test_masks_are_those_of_the_packages_own_outputs(small_sam: Path) -> None:
    segmenter = load_segmenter("cpsam_v2")
    segmenter.flow_threshold = 0.0  # no mask of random weights passes the flow check
    images = torch.rand(3, 2, 96, 80, generator=torch.Generator().manual_seed(1))
    masks = segmenter(images[:, 0], images[:, 1:], 20.0)
    assert masks.nuclei.shape == masks.cells.shape == (3, 96, 80)
    assert masks.nuclei.dtype == torch.int32 and masks.cells.amax() > 0

    diameter = 20.0 * 30 / 17
    stack = torch.stack([images[:, 1], images[:, 0], torch.zeros(3, 96, 80)], 3).numpy()
    for image, cells in zip(stack, masks.cells, strict=True):
        _, (_, flows, logit), _ = segmenter.model.eval(image, channel_axis=-1, diameter=diameter, compute_masks=False)
        expected = masks_from_flows(
            torch.from_numpy(np.array(flows))[None],
            torch.from_numpy(np.array(logit))[None],
            steps=int(200 / (30 / diameter)),
        )
        assert torch.equal(cells, expected[0])


@needs_cellpose4
def test_one_image_and_batches_agree(small_sam: Path) -> None:
    segmenter = Cellpose4Segmenter.load(small_sam)
    segmenter.flow_threshold = 0.0
    images = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1))
    images[1] = 0.5  # constant: must stay so whatever lies beside it
    together = segmenter(images, None, 20.0).nuclei
    for image, labels in zip(images, together, strict=True):
        assert torch.equal(segmenter(image[None], None, 20.0).nuclei[0], labels)
    assert together[0].any()
    assert not segmenter(images, None, 20.0).cells.any()


@needs_cellpose4
def test_weights_that_do_not_fit_are_refused(small_sam: Path) -> None:
    state = torch.load(small_sam, weights_only=True)
    torch.save({k: v for k, v in state.items() if k != "encoder.blocks.1.mlp.lin1.weight"}, small_sam)
    with pytest.raises(ValueError, match=r"encoder\.blocks\.1\.mlp\.lin1\.weight"):
        load_segmenter("cpsam_v2")


@needs_cellpose4
def test_fingerprint_names_weights_and_settings(small_sam: Path) -> None:
    segmenter = load_segmenter("cpsam_v2")
    before = segmenter.fingerprint
    segmenter.flow_threshold = 0.0
    assert before.startswith("cpsam_v2-") and segmenter.fingerprint != before
