"""PhenDiff against the original's outputs, any number of classes, and folders that hold no such model."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import generators
from generators.base import FlowGenerator, Generator, seeded
from generators.checkpoints import CheckpointError
from generators.phendiff import PhenDiff

pytest.importorskip("diffusers", reason="the extra `generators` is not installed")


def write(folder: Path, *, classes: int = 3, **changed: Any) -> Path:
    """A small model in diffusers' folder layout, random weights, as PhenDiff's pipeline saves it."""
    from diffusers import UNet2DModel

    config = {
        "sample_size": 8, "in_channels": 2, "out_channels": 2, "block_out_channels": [8, 16], "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4, "num_class_embeds": classes,
    }  # fmt: skip
    torch.manual_seed(0)
    unet = UNet2DModel(**config)
    (folder / "unet").mkdir(parents=True)
    (folder / "scheduler").mkdir()
    save_file(unet.state_dict(), folder / "unet" / "diffusion_pytorch_model.safetensors")
    named = {"_class_name": "CustomCondUNet2DModel", "_diffusers_version": "0.18.2"}
    (folder / "unet" / "config.json").write_text(json.dumps(named | config | changed))
    schedule = {
        "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon", "timestep_spacing": "trailing",
    }  # fmt: skip
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    return folder


@pytest.fixture
def golden(shared: Path) -> tuple[Path, dict[str, Tensor], dict[str, Tensor]]:
    folder = shared / "golden" / "phendiff_tiny"
    inputs, expected = (dict(np.load(folder / name)) for name in ("inputs.npz", "expected.npz"))
    return folder / "pipeline", *({k: torch.from_numpy(v) for k, v in f.items()} for f in (inputs, expected))


def load(folder: Path, **options: Any) -> PhenDiff:
    model = generators.load("phendiff", folder, **options)
    assert isinstance(model, PhenDiff)
    return model


def unit(y: Tensor) -> Tensor:
    return (y / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def away(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max())


@pytest.mark.parametrize("which", ["cond", "uncond"])
def test_network_is_bit_identical(golden: tuple[Path, dict[str, Tensor], dict[str, Tensor]], which: str) -> None:
    """To the stored outputs where the arithmetic is that of the machine they come from; to diffusers' own always."""
    from diffusers import UNet2DModel

    folder, inputs, expected = golden
    model = load(folder)
    stock = UNet2DModel.from_pretrained(folder / "unet").eval()
    x = inputs["x"].contiguous(memory_format=torch.channels_last)  # as it came from the 8-bit images
    labels = inputs["labels_source"]
    if which == "uncond":
        stock.class_embedding.weight.data.zero_()
    with torch.no_grad():
        classes = model.embed(labels) if which == "cond" else None
        for i, t in enumerate(inputs["timesteps"].tolist()):
            got = model.denoiser(x, t, classes)
            assert torch.equal(got, stock(x, t, class_labels=labels).sample)
            assert torch.equal(got, model.denoiser(inputs["x"], t, classes))  # whatever the memory layout
            assert away(got, expected[f"unet_{which}"][i]) < 2e-5


def test_schedule_is_the_originals(golden: tuple[Path, dict[str, Tensor], dict[str, Tensor]]) -> None:
    folder, inputs, expected = golden
    model = load(folder)
    assert away(model.schedule.alphas_cumprod, expected["alphas_cumprod"]) < 1e-6
    assert model.times(10) == expected["ddim_timesteps_10"].tolist()
    half = load(folder, start="noised_control", skip=0.5)
    assert half.times(10) == expected["timesteps_skip0.5"].tolist()
    assert away(half.noised(inputs["x"], inputs["noise"], 10), expected["noised_at_start"]) < 1e-5


def test_transfer_is_the_originals(golden: tuple[Path, dict[str, Tensor], dict[str, Tensor]]) -> None:
    folder, inputs, expected = golden
    model = load(folder, compounds=["untreated", "treated"])
    source, target = (model.embed(inputs[f"labels_{name}"]) for name in ("source", "target"))
    assert source is not None and target is not None
    with torch.no_grad():
        inverted = model.invert(inputs["x"], source, 10)
        assert away(inverted, expected["inverted_10"]) < 1e-4
        assert away(unit(model.denoise(inverted, target, 10)), expected["ddib_float01_10"]) < 1e-4
        assert away(unit(model.denoise(inverted, source, 10)), expected["regenerate_same_class_float01_10"]) < 1e-4
    images = inputs["image_uint8"].permute(0, 3, 1, 2) / 255
    got = model.sample(images, ["treated", "untreated"], steps=10).permute(0, 2, 3, 1)  # the source: the other class
    assert away(got, expected["ddib_float01_10"]) < 1e-4
    off = ((got * 255).round().to(torch.uint8).int() - expected["ddib_png_uint8_10"].int()).abs()
    assert off.max() <= 1 and (off > 0).float().mean() <= 0.005
    named = load(folder, compounds=["untreated", "treated"], control_class="untreated", steps=10)
    assert away(named.sample(images[:1], ["treated"]).permute(0, 2, 3, 1), expected["ddib_float01_10"][:1]) < 1e-4


@pytest.mark.parametrize(
    ("start", "form", "weight", "key"),
    [
        ("noised_control", "imagen", 1.0, "forward_start_skip0.5_imagen_w1.0"),
        ("noised_control", "imagen", 2.5, "forward_start_skip0.5_imagen_w2.5"),
        ("noised_control", "cfg", 1.5, "forward_start_skip0.5_CFG_w1.5"),
        ("noise", "imagen", 2.5, "from_noise_imagen_w2.5"),
    ],
)
def test_guided_samples_are_the_originals(
    golden: tuple[Path, dict[str, Tensor], dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch,
    start: str, form: str, weight: float, key: str,
) -> None:  # fmt: skip
    folder, inputs, expected = golden
    model = load(folder, start=start, guidance=weight, guidance_form=form, steps=10)
    monkeypatch.setattr("generators.phendiff.normal", lambda shape, device, generator: inputs["noise"])
    got = model.sample(inputs["image_uint8"].permute(0, 3, 1, 2) / 255, inputs["labels_target"])
    assert away(got.permute(0, 2, 3, 1), expected[f"{key}_float01_10"]) < 1e-4
    assert model.capabilities.stochastic and model.capabilities.uses_control == (start != "noise")


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_any_number_of_classes(tmp_path: Path, classes: int) -> None:
    names = [f"class {i}" for i in range(classes)]
    model = load(write(tmp_path / "m", classes=classes), compounds=names, steps=2, control_class="class 0")
    assert isinstance(model, Generator) and not isinstance(model, FlowGenerator)
    assert not model.capabilities.post_trainable and not model.capabilities.stochastic
    assert model.compounds == names and model.capabilities.channels == 2 and model.capabilities.size_multiple == 2
    control = torch.rand(classes, 2, 8, 6)
    got = model.sample(control, names)
    assert got.shape == control.shape and got.min() >= 0 and got.max() <= 1
    by_vector = model.sample(control, model.embed(names))
    assert torch.equal(got, by_vector)
    assert torch.equal(model.sample(control, torch.arange(classes)), got)


def test_no_class_is_the_zero_vector(tmp_path: Path) -> None:
    model = load(write(tmp_path / "m"), start="noise", steps=2, guidance=2.0)
    control = torch.zeros(2, 2, 8, 8)
    width = model.net.class_embedding.embedding_dim
    nothing = model.sample(control, None, generator=seeded([1, 2]))
    model.guidance = 1.0  # guidance from u to u is none
    assert torch.equal(nothing, model.sample(control, torch.zeros(2, width), generator=seeded([1, 2])))
    alone = model.sample(control[1:], None, generator=seeded([2]))
    assert torch.allclose(nothing[1:], alone, atol=1e-5)


def test_options_and_their_errors(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    model = load(folder, compounds=list("abc"), steps=2)
    control = torch.rand(1, 2, 8, 8)
    calls: list[tuple[Any, str]] = [
        (lambda: model.sample(control, ["a"]), "inversion needs the class of the controls: load with control_class="),
        (lambda: load(folder, compounds=list("abc"), control_class="d"), "no compound 'd'"),
        (lambda: load(folder, compounds=list("abc")).sample(control, ["d"]), "no compound 'd'; it has: a, b, c"),
        (lambda: load(folder, start="ddib"), "start='ddib': one of inversion, noised_control, noise"),
        (lambda: load(folder, guidance_form="CFG"), "guidance_form='CFG': one of imagen, cfg"),
        (lambda: load(folder, guidance=0.5), "guidance=0.5: 1 .none. or more in the form 'imagen'"),
        (lambda: load(folder, steps=1001), "steps=1001: from 1 to 1000"),
        (lambda: load(folder, start="noised_control", steps=1, skip=0.5), "skip=0.5 of 1 steps leaves none"),
        (lambda: load(folder, skip=1.0), "skip=1.0: a fraction"),
        (lambda: load(folder, compounds=["a", "b"]), "2 names for the 3 labels"),
        (lambda: model.sample(control, torch.tensor([3])), "label 3: this checkpoint has the classes 0 to 2"),
        (lambda: model.sample(control, torch.rand(1, 5)), r"class vectors of shape \(1, 5\); wanted \(B, 32\)"),
        (lambda: model.sample(control, torch.tensor([0, 1])), "2 classes for 1 images"),
        (lambda: model.sample(torch.rand(1, 3, 8, 8), ["a"]), "trained on 2 channels; these images have 3"),
        (lambda: model.sample(torch.rand(1, 2, 7, 8), ["a"]), "multiples of 2 px"),
        (lambda: model.sample(control, ["a"], steps=0), "steps=0: from 1 to 1000"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_pickled_weights_and_own_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    options = {"steps": 2, "start": "noised_control"}
    model = load(folder, compounds=list("abc"), **options)
    control = torch.rand(2, 2, 8, 8)
    expected = model.sample(control, ["a", "c"], generator=seeded([1, 2]))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    pickled = load(folder, compounds=list("abc"), **options)
    assert torch.equal(pickled.sample(control, ["a", "c"], generator=seeded([1, 2])), expected)
    pickled.save(tmp_path / "own.safetensors")
    own = load(tmp_path / "own.safetensors")
    assert load(tmp_path / "own.safetensors", start="inversion", control_class="a").guidance == 1.0
    assert (
        own.compounds == list("abc")
        and own.start == "noised_control"
        and own.describe()["digest"] == model.describe()["digest"]
    )
    assert torch.equal(own.sample(control, ["a", "c"], generator=seeded([1, 2])), expected)
    json.dumps(own.describe())


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that make up a folder are fetched one by one: weights in either form, both configurations."""
    folder = write(tmp_path / "cache" / "run" / "model")

    def fetched(repo: str, path: str, revision: str, source: str) -> Path:
        assert (repo, revision) == ("lab/phendiff", "abc123")
        if not (tmp_path / "cache" / path).exists():
            raise FileNotFoundError(path)
        return tmp_path / "cache" / path

    monkeypatch.setattr("generators.checkpoints._download", fetched)
    model = load("hf://lab/phendiff/run/model@abc123")  # type: ignore[arg-type]
    assert model.describe()["digest"] == load(folder).describe()["digest"]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("unet", {"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel; PhenDiff in pixel space"),
        ("unet", {"num_class_embeds": None}, "num_class_embeds is None: not a network with a table of classes"),
        ("unet", {"num_class_embeds": 7}, r"class_embedding\.weight is \(3, 32\), wanted \(7, 32\)"),
        ("unet", {"in_channels": 5}, "in_channels 5, out_channels 2"),
        ("unet", {"in_channels": 5, "out_channels": 5}, r"conv_in\.weight is \(8, 2, 3, 3\), wanted \(8, 5, 3, 3\)"),
        ("unet", {"layers_per_block": 2}, r"down_blocks\.0\.resnets\.1\.norm1\.weight is missing"),
        ("unet", {"layers_per_block": 10**9}, "layers_per_block is 1000000000; the weights have"),
        ("unet", {"block_out_channels": [8, 2**40]}, "weights|build"),
        ("unet", {"block_out_channels": [8]}, "diffusers cannot build this network"),
        ("unet", {"down_block_types": ["DownBlock2D", "Odd"]}, "diffusers cannot build this network"),
        ("unet", {"warp": 1}, "warp is no option of UNet2DModel in diffusers"),
        ("scheduler", {"_class_name": "PNDMScheduler"}, "_class_name is PNDMScheduler; PhenDiff has a DDIMScheduler"),
        ("scheduler", {"num_train_timesteps": 10**12}, "num_train_timesteps is 1000000000000"),
        ("scheduler", {"beta_schedule": "odd"}, "diffusers cannot build this schedule"),
        ("scheduler", {"warp": 1}, "warp is no option of DDIMScheduler"),
    ],
)  # fmt: skip
def test_wrong_configurations_are_named(tmp_path: Path, file: str, change: dict[str, Any], message: str) -> None:
    folder = write(tmp_path / "m")
    path = folder / file / ("config.json" if file == "unet" else "scheduler_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (Path("ran"), "code ran"))


def test_wrong_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "m")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        load(folder)
    state = load_file(shutil.copy(write(tmp_path / "other") / "unet" / weights.name, tmp_path / "w.safetensors"))
    save_file({k: v for k, v in state.items() if k != "conv_out.bias"}, weights)
    with pytest.raises(CheckpointError, match=r"conv_out\.bias is missing"):
        load(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"diffusion_pytorch_model\.safetensors: no such file \(nor .*\.bin\)"):
        load(folder)
    torch.save({"conv_out.bias": Hostile()}, weights.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="holds more than data"):
        load(folder)
    assert not Path("ran").exists()
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: no JSON"):
        save_file(state, weights)
        load(folder)
    with pytest.raises(FileNotFoundError, match=r"unet/config\.json: no such file"):
        load(tmp_path)
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(FileNotFoundError, match=r"scheduler_config\.json: no such file"):
        load(folder)


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "m")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'needs the diffusers package: pip install "biorewards\[generators\]"'):
        load(folder)


def test_published_small_size(tmp_path: Path) -> None:
    """The configuration of the published `small` network has its number of parameters in this reading of it."""
    from diffusers import UNet2DModel

    with torch.device("meta"):
        nets = [
            UNet2DModel(
                block_out_channels=widths, layers_per_block=2, num_class_embeds=2,
                down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            )
            for widths in ((64, 128, 256), (128, 256, 512))
        ]  # fmt: skip
    assert [sum(p.numel() for p in net.parameters()) for net in nets] == [15_725_443, 62_826_243]
