"""IMPA against the original's outputs, several modalities, names and tables, and files that are no such checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import generators
from generators.base import FlowGenerator, Generator, seeded
from generators.checkpoints import CheckpointError
from generators.impa import IMPA
from generators.impa_net import StyleEncoder, StyleGenerator, StyleMapping

STYLE, Z = 7, 3
NAMES = ["aspirin", "nocodazole", "taxol"]


def random_state(net: nn.Module, seed: int) -> dict[str, Tensor]:
    """He-like random values for every tensor, biases and norms too."""
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(v.shape, generator=g) / max(v[0].numel(), 1) ** 0.5 for k, v in net.state_dict().items()}


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}


def write(folder: Path, tables: list[Tensor], *, widths: tuple[int, ...] = (4, 6, 8, 8, 8), layers: int = 1) -> Path:
    """A checkpoint in IMPA's own layout: one table a modality; returns the file of the networks."""
    mappings: dict[str, Tensor] = {}
    for m, table in enumerate(tables):
        hidden = [table.shape[1] + Z, *[9] * (layers - 1), STYLE]
        number = "" if len(tables) == 1 else f"{m}."
        mappings |= prefixed(random_state(StyleMapping(hidden), m), f"mapping_network.{number}")
    content = {
        "generator": random_state(StyleGenerator(2, list(widths), STYLE), 10),
        "style_encoder": random_state(StyleEncoder(2, [4, 6, 8], STYLE, 5), 11),
        "discriminator": {"head.weight": torch.zeros(3)},
        "mapping_network": mappings,
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content, folder / "000200_nets.ckpt")
    keys = ["weight"] if len(tables) == 1 else [f"{m}.weight" for m in range(len(tables))]
    torch.save({"embedding_matrix": dict(zip(keys, tables, strict=True))}, folder / "000200_embeddings.ckpt")
    return folder / "000200_nets.ckpt"


def counts(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 5, (rows, width), generator=torch.Generator().manual_seed(seed)).float()


def write_csv(path: Path, names: list[str], values: Tensor) -> Path:
    pd.DataFrame(values.numpy(), index=names).to_csv(path)
    return path


@pytest.fixture
def golden(shared: Path) -> tuple[Path, Any, Any]:
    folder = shared / "golden" / "impa_tiny"
    return folder, np.load(folder / "inputs.npz"), np.load(folder / "expected.npz")


def away(got: Tensor, expected: np.ndarray) -> float:
    """Largest difference, relative to the range of what is expected."""
    assert got.shape == expected.shape
    return float((got - torch.from_numpy(expected)).abs().max()) / float(np.ptp(expected))


def test_outputs_are_the_originals(golden: tuple[Path, Any, Any]) -> None:
    folder, inputs, expected = golden
    model = generators.load("impa", folder / "checkpoint")
    assert isinstance(model, IMPA)
    x, z = torch.from_numpy(inputs["x_ctrl"]), torch.from_numpy(inputs["z"])
    names = [str(row) for row in inputs["pert_id"]]
    net = model.net.generator
    with torch.no_grad():
        assert torch.equal(model.tables[0].rows(names), torch.from_numpy(expected["emb"]))
        noises = {"": z, "_zmean": torch.from_numpy(inputs["z_many"]).mean(1), "_z0": torch.zeros_like(z)}
        for suffix, noise in noises.items():
            style = model.style(names, noise)
            assert away(style, expected[f"style{suffix}"]) < 1e-5
            assert away(net(x, style), expected[f"image{suffix}"]) < 1e-5
        assert away(net.from_rgb(x), expected["from_rgb"]) < 1e-5
        assert away(net.encoded(x), expected["latent"]) < 1e-5
        assert away(net(x, None), expected["image_basal"]) < 1e-5
        encoder = model.net.style_encoder
        assert encoder is not None
        own = encoder(x)
        assert away(own, expected["style_encoder_ctrl"]) < 1e-5
        assert away(encoder(torch.from_numpy(expected["image"])), expected["style_encoder_fake"]) < 1e-5
        assert away(net(x, own), expected["image_recon_own_style"]) < 1e-5


def test_sample_is_the_originals_from_8_bit_images(
    golden: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way: 8-bit controls in [0, 1], the original's noise of dequantisation, [0, 1] at the end."""
    folder, inputs, expected = golden
    model = generators.load("impa", folder / "checkpoint", z="zero", dequantise=True)
    noise = torch.from_numpy(inputs["dequant_noise"])
    monkeypatch.setattr("generators.impa.uniform", lambda shape, device, generator: noise)
    names = [str(row) for row in inputs["pert_id"]]
    got = model.sample(torch.from_numpy(inputs["ctrl_uint8"]).permute(0, 3, 1, 2) / 255, names)
    image = torch.from_numpy(expected["image_z0"])
    assert torch.allclose(got, ((image + 1) / 2).clamp(0, 1), atol=1e-4)


@pytest.mark.parametrize("layers", [1, 3])
def test_each_modality_has_its_table_and_mapping(tmp_path: Path, layers: int) -> None:
    tables = [counts(3, 5, 1), counts(4, 8, 2), counts(2, 5, 3)]
    path = write(tmp_path, tables, layers=layers)
    lists = [NAMES, ["taxol", "TP53", "EGFR", "MYC"], ["TP53", "KRAS"]]
    model = generators.load("impa", path, compounds=lists, modalities=["Compound", "CRISPR", "ORF"])
    assert model.compounds == [
        "aspirin", "nocodazole", "Compound:taxol", "CRISPR:taxol", "CRISPR:TP53", "ORF:TP53", "EGFR", "MYC", "KRAS",
    ]  # fmt: skip
    z = torch.randn(5, Z, generator=torch.Generator().manual_seed(0))
    order = [(1, 2, "EGFR"), (0, 2, "Compound:taxol"), (2, 0, "ORF:TP53"), (0, 0, "aspirin"), (1, 3, "CRISPR:MYC")]
    styles = model.style([name for _, _, name in order], z)

    stored = torch.load(path, weights_only=True)["mapping_network"]
    for i, (m, row, _) in enumerate(order):  # by hand: linear layers 0, 2, 4, ReLU between
        h = torch.cat([tables[m][row], z[i]])
        for layer in range(layers):
            key = f"mapping_network.{m}.layers.{2 * layer}"
            h = F.linear(F.relu(h) if layer else h, stored[f"{key}.weight"], stored[f"{key}.bias"])
        assert torch.allclose(styles[i], h, atol=1e-5)

    with pytest.raises(ValueError, match="'TP53' is in several modalities; write 'CRISPR:TP53' or 'ORF:TP53'"):
        model.style(["TP53"], z[:1])
    assert torch.allclose(model.style(tables[1][2:3], z[:1]), styles[:1])  # the one modality with rows of length 8
    with pytest.raises(ValueError, match="several modalities have rows of this length; give names"):
        model.style(tables[0][:1], z[:1])


def test_no_pooling_block_and_other_sizes(tmp_path: Path) -> None:
    """The number of levels is that of the file, not of a default: two blocks are the smallest encoder."""
    model = generators.load("impa", write(tmp_path, [counts(3, 5)], widths=(4, 4, 4)))
    assert model.capabilities.size_multiple == 1
    assert model.sample(torch.rand(1, 2, 7, 5), ["0"]).shape == (1, 2, 7, 5)
    deep = generators.load("impa", write(tmp_path, [counts(3, 5)], widths=(4, 5, 6, 7, 7, 7)))
    assert deep.capabilities.size_multiple == 8 and deep.capabilities.channels == 2
    assert deep.sample(torch.rand(1, 2, 16, 32), ["2"]).shape == (1, 2, 16, 32)
    with pytest.raises(ValueError, match="multiples of 8 px; these images are 20x16"):
        deep.sample(torch.rand(1, 2, 20, 16), ["2"])
    with pytest.raises(ValueError, match="at least 16x16 px"):
        deep.sample(torch.rand(1, 2, 8, 16), ["2"])


def test_z_modes(tmp_path: Path) -> None:
    path = write(tmp_path, [counts(3, 5)])
    modes = ("draw", "mean", "zero")
    noise = {z: generators.load("impa", path, z=z).noise(4000, torch.Generator().manual_seed(0)) for z in modes}
    assert noise["draw"].std() == pytest.approx(1, abs=0.03)
    assert noise["mean"].std() == pytest.approx(0.1, abs=0.003)
    assert not noise["zero"].any()
    with pytest.raises(ValueError, match="z='median': one of draw, mean, zero"):
        generators.load("impa", path, z="median")


def test_capabilities_and_streams(tmp_path: Path) -> None:
    path = write(tmp_path, [counts(3, 5)])
    model = generators.load("impa", path, compounds=NAMES)
    assert isinstance(model, Generator) and not isinstance(model, FlowGenerator)
    can = model.capabilities
    assert not can.post_trainable and can.stochastic and can.uses_control
    assert not generators.load("impa", path, z="zero").capabilities.stochastic
    assert generators.load("impa", path, z="zero", dequantise=True).capabilities.stochastic

    control = torch.rand(3, 2, 16, 16, generator=torch.Generator().manual_seed(5))
    batch = model.sample(control, NAMES, generator=seeded([7, 8, 9]))
    alone = model.sample(control[1:2], NAMES[1:2], generator=seeded([8]))
    assert torch.allclose(batch[1:2], alone, atol=1e-5)
    assert batch.min() >= 0 and batch.max() <= 1 and batch.dtype == torch.float32
    assert (batch[0] - model.sample(control[:1], NAMES[:1], generator=seeded([1]))[0]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="steps=50: IMPA draws in one pass"):
        model.sample(control, NAMES, steps=50)
    with pytest.raises(ValueError, match="no unconditional pass"):
        model.sample(control, None)
    with pytest.raises(ValueError, match="trained on 2 channels; these images have 3"):
        model.sample(torch.rand(1, 3, 16, 16), ["taxol"])
    with pytest.raises(ValueError, match="no compound 'Taxol'; did you mean 'taxol'"):
        model.sample(control, ["Taxol"] * 3)


def test_reconstruction_wants_the_size_it_was_trained_on(tmp_path: Path) -> None:
    model = generators.load("impa", write(tmp_path, [counts(3, 5)]))
    assert model.reconstruct(torch.rand(1, 2, 20, 20)).shape == (1, 2, 20, 20)
    with pytest.raises(ValueError, match="images of 20 to 23 px a side, these are 24 x 24"):
        model.reconstruct(torch.rand(1, 2, 24, 24))


def test_a_csv_names_the_rows_and_adds_compounds(tmp_path: Path) -> None:
    values = counts(5, 30, 4)
    path = write(tmp_path, [values[[0, 2, 3]]])
    csv = write_csv(tmp_path / "emb_fp.csv", ["A", "B", "C", "D", "E"], values)
    model = generators.load("impa", path, embeddings=csv)
    assert model.compounds == ["A", "B", "C", "D", "E"]
    z = torch.zeros(1, Z)
    assert torch.equal(model.style(["C"], z), generators.load("impa", path).style(["1"], z))
    assert torch.equal(model.style(["B"], z), model.style(values[1:2], z))  # never trained on
    generators.load("impa", path, embeddings=csv, compounds=["A", "C", "D"])
    with pytest.raises(ValueError, match="the row of 'B' is not row 1"):
        generators.load("impa", path, embeddings=csv, compounds=["A", "B", "D"])

    binary = write_csv(tmp_path / "binary.csv", ["A", "B", "C", "D", "E"], values.clamp(max=1))
    with pytest.raises(ValueError, match=r"table holds binary values, the checkpoint counts"):
        generators.load("impa", path, embeddings=binary)
    with pytest.raises(ValueError, match="binary fingerprints; this network was trained on fingerprint counts"):
        model.sample(torch.rand(1, 2, 16, 16), torch.ones(1, 30))
    with pytest.raises(ValueError, match=r"29 numbers a compound; .* has 30"):
        generators.load("impa", path, embeddings=write_csv(tmp_path / "n.csv", ["A"], values[:1, :29]))


def test_names_from_a_file_and_their_errors(tmp_path: Path) -> None:
    path = write(tmp_path, [counts(3, 5)])
    (tmp_path / "names.txt").write_text("aspirin\nnocodazole\ntaxol\n", encoding="utf-8")
    assert generators.load("impa", path, compounds=tmp_path / "names.txt").compounds == NAMES
    with pytest.raises(ValueError, match="2 names for the 3 labels"):
        generators.load("impa", path, compounds=NAMES[:2])
    with pytest.raises(ValueError, match=r"'taxol' is there twice \(labels 0 and 1\)"):
        generators.load("impa", path, compounds=["taxol", "taxol", "x"])
    two = write(tmp_path / "two", [counts(3, 5), counts(2, 5)])
    with pytest.raises(ValueError, match=r"compounds: .* has 2 modalities; give a list with one entry for each"):
        generators.load("impa", two, compounds=NAMES)
    with pytest.raises(ValueError, match=r"modalities=\['a', 'a'\]"):
        generators.load("impa", two, modalities=["a", "a"])


def test_folder_lightning_and_own_files_give_the_same_images(tmp_path: Path) -> None:
    path = write(tmp_path / "run", [counts(3, 5), counts(4, 6)])
    lists = [NAMES, ["a", "b", "c", "d"]]
    model = generators.load("impa", path, compounds=lists, z="zero")
    control = torch.rand(2, 2, 16, 16, generator=torch.Generator().manual_seed(1))
    expected = model.sample(control, ["taxol", "d"])
    (tmp_path / "run" / "000100_nets.ckpt").write_bytes(b"older, not to be opened")
    folder = generators.load("impa", tmp_path / "run", compounds=lists, z="zero")
    assert torch.equal(folder.sample(control, ["taxol", "d"]), expected)

    nets = torch.load(path, weights_only=True)
    table = torch.load(path.with_name("000200_embeddings.ckpt"), weights_only=True)["embedding_matrix"]
    state = {f"{part}.module.{key}": value for part, held in nets.items() for key, value in held.items()}
    torch.save({"epoch": 3, "state_dict": state | prefixed(table, "embedding_matrix.")}, tmp_path / "last.ckpt")
    lightning = generators.load("impa", tmp_path / "last.ckpt", compounds=lists, z="zero")
    assert torch.equal(lightning.sample(control, ["taxol", "d"]), expected)

    model.save(tmp_path / "own.safetensors")
    own = generators.load("impa", tmp_path / "own.safetensors")
    assert own.compounds == model.compounds and own.describe()["digest"] == model.describe()["digest"]
    assert torch.equal(own.sample(control, ["taxol", "d"]), expected)
    json.dumps(model.describe())


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding rows come with the networks, from the same folder of the repository."""
    path = write(tmp_path / "cache" / "run", [counts(3, 5)])

    def fetched(repo: str, path: str, revision: str, source: str) -> Path:
        if not (tmp_path / "cache" / path).exists():
            raise FileNotFoundError(path)
        return tmp_path / "cache" / path

    monkeypatch.setattr("generators.checkpoints._download", fetched)
    model = generators.load("impa", "hf://lab/impa/run/000200_nets.ckpt@abc123")
    assert model.describe()["digest"] == generators.load("impa", path).describe()["digest"]


def broken(path: Path, part: str, change: dict[str, Any]) -> None:
    """Change entries of one network; None removes."""
    content = torch.load(path, weights_only=True)
    for key, value in change.items():
        if value is None:
            del content[part][key]
        else:
            content[part][key] = value
    torch.save(content, path)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("generator", {"from_rgb.bias": None}, r"generator\.from_rgb\.bias is missing"),
        ("generator", {"encode.1.conv1.weight": None}, r"generator\.encode\.1\.conv1\.weight is missing"),
        ("generator", {"decode.2.norm2.fc.bias": torch.zeros(3)}, r"decode\.2\.norm2\.fc\.bias is \(3,\), wanted"),
        ("generator", {"extra": torch.zeros(3)}, r"generator\.extra does not belong"),
        ("generator", {"from_rgb.bias": torch.full((4,), torch.nan)}, r"generator\.from_rgb\.bias holds NaN"),
        ("mapping_network", {"mapping_network.layers.0.weight": None}, r"0\.layers\.0\.weight is missing"),
        ("mapping_network", {"mapping_network.layers.0.weight": torch.zeros(7, 4)}, "do not belong together"),
        ("style_encoder", {"linear.bias": None}, r"style_encoder\.linear\.bias is missing"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_named(tmp_path: Path, part: str, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path, [counts(3, 5)])
    broken(path, part, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        generators.load("impa", path)
    assert "\n" not in str(caught.value)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (Path("ran"), "code ran"))


def test_wrong_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "a", [counts(3, 5)])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged, cut short"):
        generators.load("impa", path)
    torch.save({"generator": Hostile()}, path)
    with pytest.raises(CheckpointError, match="holds more than data"):
        generators.load("impa", path)
    assert not Path("ran").exists()
    torch.save({"ddp": {}, "ema": {}}, path)
    with pytest.raises(CheckpointError, match=r"generator is missing .*'ddp'"):
        generators.load("impa", path)
    path.write_bytes(whole)

    shutil.copy(path, tmp_path / "renamed.ckpt")
    with pytest.raises(CheckpointError, match="call the two files as IMPA does"):
        generators.load("impa", tmp_path / "renamed.ckpt")
    (tmp_path / "a" / "000200_condition_embeddings.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="condition embeddings are not supported"):
        generators.load("impa", path)
    (tmp_path / "a" / "000200_condition_embeddings.ckpt").unlink()
    rows = {"0.weight": counts(3, 5), "1.weight": counts(3, 5)}
    torch.save({"embedding_matrix": rows}, tmp_path / "a" / "000200_embeddings.ckpt")
    with pytest.raises(CheckpointError, match="1 mapping networks and 2 embedding tables"):
        generators.load("impa", path)
    (tmp_path / "a" / "000200_embeddings.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match=r"000200_embeddings\.ckpt: missing"):
        generators.load("impa", path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        generators.load("impa", tmp_path / "nothing_nets.ckpt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no file <step>_nets.ckpt"):
        generators.load("impa", tmp_path / "empty")


@pytest.mark.parametrize(("channels", "parameters"), [(3, 24_318_595), (5, 24_319_877), (6, 24_320_518)])
def test_full_size_has_the_published_number_of_parameters(channels: int, parameters: int) -> None:
    with torch.device("meta"):
        net = StyleGenerator(channels, [64, 128, 256, 512, 512, 512], 64)
        encoder = StyleEncoder(3, [64, 128, 256, 512, 512, 512], 64, 3)
        mapping = StyleMapping([1024 + 16, 64])
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert sum(p.numel() for p in encoder.parameters()) == 14_329_472
    assert sum(p.numel() for p in mapping.parameters()) == 66_624
