"""Cellpose 1-3 networks: loading, outputs and masks against Cellpose 3.1.1.3's own; and segmenters by name."""

import csv
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from biorewards.segmentation import NAMES, load_segmenter, normalise, percentile_range
from biorewards.segmentation.cpnet import (
    CPnet,
    CPnetSegmenter,
    cellpose_normalise,
    licence_notice,
    load_cpnet,
    network_output,
)

GOLDEN = Path(__file__).resolve().parents[2] / "shared/golden/cellpose3_cpnet"
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"Cellpose's outputs are not at {GOLDEN}")
MODELS = ["cells", "nuclei"]


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "expected.npz"))


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "inputs.npz"))


def channels(inputs: dict[str, np.ndarray], model: str) -> torch.Tensor:
    """(24, 2, 96, 96) raw intensities in the network's order."""
    cytoplasm, nucleus = torch.from_numpy(inputs["images"].astype(np.float32)).unbind(3)
    return torch.stack([cytoplasm, nucleus] if model == "cells" else [nucleus, torch.zeros_like(nucleus)], 1)


@golden
@pytest.mark.parametrize("model", MODELS)
def test_network_output_equals_cellpose(expected: dict[str, np.ndarray], model: str) -> None:
    net = load_cpnet(GOLDEN / f"cpnet_{model}.pth")
    with torch.inference_mode():
        output, style = net(torch.from_numpy(expected[f"{model}_net_in"]))
    torch.testing.assert_close(output, torch.from_numpy(expected[f"{model}_net_out"]), atol=1e-4, rtol=0)
    torch.testing.assert_close(style, torch.from_numpy(expected[f"{model}_net_style"]), atol=1e-5, rtol=0)


@golden
@pytest.mark.parametrize("model", MODELS)
def test_scaling_equals_cellpose(expected: dict[str, np.ndarray], inputs: dict[str, np.ndarray], model: str) -> None:
    scaled = cellpose_normalise(channels(inputs, model))
    assert torch.equal(scaled.permute(0, 2, 3, 1), torch.from_numpy(expected[f"{model}_norm"]))


@golden
@pytest.mark.parametrize("model", MODELS)
def test_crops_with_their_own_scale_equal_cellpose(
    expected: dict[str, np.ndarray], inputs: dict[str, np.ndarray], model: str
) -> None:
    """Case B: resized to the network's scale, outputs resized back, masks; every crop has another diameter."""
    net = load_cpnet(GOLDEN / f"cpnet_{model}.pth")
    segmenter = CPnetSegmenter(cells=net, max_size_fraction=0.4)
    images = channels(inputs, model)
    scaled = cellpose_normalise(images)
    for i in range(2, 24):  # 0 and 1 are empty
        diameter = float(inputs[f"diameter_{model}_B"][i])
        flows, logit = network_output(net, scaled[i : i + 1], diameter)
        torch.testing.assert_close(flows[0], torch.from_numpy(expected[f"{model}_B_dP"][i]), atol=1e-4, rtol=0)
        torch.testing.assert_close(logit[0], torch.from_numpy(expected[f"{model}_B_cellprob"][i]), atol=1e-4, rtol=0)
        masks = segmenter.masks(net, images[i : i + 1], diameter)[0]
        assert torch.equal(masks, torch.from_numpy(expected[f"{model}_B_masks_ft04"][i])), i


@golden
def test_a_batch_through_the_protocol_equals_cellpose(
    expected: dict[str, np.ndarray], inputs: dict[str, np.ndarray]
) -> None:
    """Case A: both networks at their own scale, all crops in one call, from two files named on the command line."""
    segmenter = load_segmenter(f"{GOLDEN / 'cpnet_nuclei.pth'},{GOLDEN / 'cpnet_cells.pth'}")
    assert isinstance(segmenter, CPnetSegmenter)
    segmenter.max_size_fraction = 0.4
    cytoplasm, nucleus = channels(inputs, "cells").unbind(1)
    masks = segmenter(nucleus, cytoplasm[:, None], 17.0)
    for name, found in (("nuclei", masks.nuclei), ("cells", masks.cells)):
        truth = torch.from_numpy(expected[f"{name}_A_masks_ft04"])
        assert sum(torch.equal(a, b) for a, b in zip(found, truth, strict=True)) >= 23


@golden
@pytest.mark.parametrize(("model", "has"), [("cells", "cells"), ("nuclei", "nuclei")])
def test_one_file_tells_what_it_finds(inputs: dict[str, np.ndarray], model: str, has: str) -> None:
    segmenter = load_segmenter(GOLDEN / f"cpnet_{model}.pth")
    cytoplasm, nucleus = channels(inputs, "cells")[9:11].unbind(1)
    masks = segmenter(nucleus, cytoplasm[:, None], 17.0)
    assert {name for name in MODELS if getattr(masks, name).any()} == {has}


@golden
def test_large_images_are_tiled_without_seams(inputs: dict[str, np.ndarray]) -> None:
    net = load_cpnet(GOLDEN / "cpnet_nuclei.pth")
    crops = cellpose_normalise(channels(inputs, "nuclei"))[9:18]
    mosaic = crops.view(3, 3, 2, 96, 96).permute(2, 0, 3, 1, 4).reshape(1, 2, 288, 288)
    _, logit = network_output(net, mosaic, 17.0)  # 304 px with padding: 2 x 2 tiles of 224
    alone = network_output(net, crops, 17.0)[1].view(3, 3, 96, 96).permute(0, 2, 1, 3).reshape(288, 288)
    inner = torch.zeros(96, 96, dtype=torch.bool)
    inner[16:-16, 16:-16] = True
    same = ((logit[0] > 0) == (alone > 0))[inner.repeat(3, 3)]
    assert logit.shape == (1, 288, 288) and same.float().mean() > 0.995


def official() -> dict[str, torch.Tensor]:
    """A full-size state dict of the official names and shapes, with seeded values."""
    generator = torch.Generator().manual_seed(0)
    with (GOLDEN / "official_state_dict.csv").open() as file:
        rows = list(csv.DictReader(file))
    state = {}
    for row in rows:
        shape = () if row["shape"] == "scalar" else tuple(int(n) for n in row["shape"].split("x"))
        value = torch.rand(shape, generator=generator) * 0.1 + 0.5
        state[row["name"]] = value.to(getattr(torch, row["dtype"]))
    return state | {"diam_mean": torch.tensor([17.0]), "diam_labels": torch.tensor([16.0])}


@golden
def test_official_state_dict_loads(tmp_path: Path) -> None:
    torch.save(official(), tmp_path / "nuclei")
    net = load_cpnet(tmp_path / "nuclei")
    assert sum(p.numel() for p in net.parameters()) == 6_600_845
    assert len(net.state_dict()) == 313
    assert float(net.diam_mean) == 17.0
    with torch.inference_mode():
        output, style = net(torch.rand(1, 2, 32, 32))
    assert output.shape == (1, 3, 32, 32) and style.shape == (1, 256)


@golden
def test_files_without_diameters_go_by_their_name(tmp_path: Path) -> None:
    state = {key: value for key, value in CPnet((2, 4, 8)).state_dict().items() if not key.startswith("diam")}
    for name, diameter in (("nucleitorch_0", 17.0), ("cytotorch_0", 30.0)):
        torch.save(state, tmp_path / name)
        assert float(load_cpnet(tmp_path / name).diam_mean) == diameter


def spoil(state: dict[str, torch.Tensor], how: str) -> object:
    key = "upsample.up.res_up_1.conv.conv_2.full.weight"
    match how:
        case "missing":
            return {k: v for k, v in state.items() if k != key}
        case "extra":
            return state | {"another.weight": torch.zeros(1)}
        case "shape":
            return state | {key: torch.zeros(2, 2)}
        case "outputs":
            return state | {"output.2.weight": torch.zeros(5, 4, 1, 1), "output.2.bias": torch.zeros(5)}
        case "four":
            return {"W2": torch.zeros(1), "encoder.pos_embed": torch.zeros(1)}
        case "other":
            return {"conv1.weight": torch.zeros(1)}
    return [state]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"missing upsample\.up\.res_up_1\.conv\.conv_2\.full\.weight$"),
        ("extra", r"unexpected another\.weight$"),
        ("shape", r"conv_2\.full\.weight has shape \(2, 2\), expected \(8, 8\)$"),
        ("outputs", r"output\.2\.\w+ has shape \(5,.*expected \(3,"),
        ("four", "a Cellpose 4 network"),
        ("other", r"missing downsample.*; it has conv1\.weight"),
        ("list", "holds no state dict"),
    ],
)
def test_files_that_do_not_fit_are_one_clear_error(tmp_path: Path, how: str, message: str) -> None:
    path = tmp_path / "weights"
    torch.save(spoil(CPnet((2, 4, 8)).state_dict(), how), path)
    with pytest.raises(ValueError, match=message) as error:
        load_cpnet(path)
    assert str(path) in str(error.value)


def test_text_is_no_weight_file(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("hello")
    with pytest.raises(ValueError, match="is not a PyTorch weight file"):
        load_cpnet(tmp_path / "weights")


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    torch.save(Hostile(), tmp_path / "weights")
    with pytest.raises(ValueError, match="is not a PyTorch weight file"):
        load_cpnet(tmp_path / "weights")
    assert not (tmp_path / "ran").exists()


def test_unknown_names_list_what_exists() -> None:
    with pytest.raises(ValueError, match="cyto9.*" + ", ".join(NAMES)):
        load_segmenter("cyto9")


def test_flow_threshold_is_handed_on(tmp_path: Path) -> None:
    torch.save(CPnet((2, 4, 8)).state_dict(), tmp_path / "weights")
    segmenter = load_segmenter(tmp_path / "weights", flow_threshold=0.7)
    assert isinstance(segmenter, CPnetSegmenter) and segmenter.flow_threshold == 0.7
    with pytest.raises(ValueError, match="classical has no flow check"):
        load_segmenter("classical", flow_threshold=0.7)


def test_licence_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(CPnet((2, 4, 8)).state_dict(), tmp_path / "weights")
    licence_notice.cache_clear()
    with caplog.at_level(logging.WARNING):
        load_cpnet(tmp_path / "weights")
        load_cpnet(tmp_path / "weights")
    assert sum("CC-BY-NC" in record.message for record in caplog.records) == 1


def test_fingerprint_names_weights_and_settings() -> None:
    torch.manual_seed(0)
    first, second = CPnet((2, 4, 8)), CPnet((2, 4, 8))
    prints = {
        CPnetSegmenter(nuclei=first).fingerprint,
        CPnetSegmenter(nuclei=second).fingerprint,
        CPnetSegmenter(cells=first).fingerprint,
        CPnetSegmenter(cells=first, flow_threshold=0).fingerprint,
        CPnetSegmenter(cells=first, max_size_fraction=0.4).fingerprint,
    }
    assert len(prints) == 5
    assert CPnetSegmenter(nuclei=first).fingerprint in prints


def test_bad_calls_are_refused() -> None:
    segmenter = CPnetSegmenter(cells=CPnet((2, 4, 8)).eval())
    with pytest.raises(ValueError, match="nucleus channel, a cytoplasm channel or both"):
        segmenter(None, None, 20.0)
    with pytest.raises(ValueError, match="diameter is nan"):
        segmenter(None, torch.zeros(1, 1, 32, 32), float("nan"))
    with pytest.raises(ValueError, match="shrinks images of 32 x 32 px to nothing"):
        segmenter(None, torch.zeros(1, 1, 32, 32), 1e4)
    with pytest.raises(ValueError, match="a nuclei network, a cells network or both"):
        CPnetSegmenter()


@pytest.mark.parametrize("q", [0.0, 1.0, 37.3, 50.0, 99.8, 100.0])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (96, 96)])
def test_percentiles_equal_numpy(q: float, size: tuple[int, int]) -> None:
    images = torch.randn(3, 2, *size, generator=torch.Generator().manual_seed(0))
    low, high = percentile_range(images, q, 100)
    np.testing.assert_allclose(low, np.percentile(images.numpy(), q, axis=(2, 3)), rtol=1e-5, atol=1e-6)
    assert high.tolist() == images.amax((2, 3)).tolist()


def test_normalise() -> None:
    images = torch.tensor([[[[0.2, 0.6]], [[3.0, 3.0]]]])
    assert normalise(images, 0.2, 0.6)[0, 0].tolist() == [[0, 1]]
    per_channel = normalise(images, torch.tensor([0.1, 3.0]), torch.tensor([0.6, 3.0]))
    torch.testing.assert_close(per_channel[0, 0], torch.tensor([[0.2, 1.0]]))
    assert per_channel[0, 1].tolist() == [[0, 0]]  # no range
    assert normalise(images, 0.0, 0.3).max() == 10  # not clipped
