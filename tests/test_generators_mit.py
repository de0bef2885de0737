"""MiT against the original's outputs, its variants, labels and solvers, and files that are no such checkpoint."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import generators
from generators.adaptive import Dopri5
from generators.adm import AdmConfig, AdmNet
from generators.base import FlowGenerator, seeded
from generators.checkpoints import CheckpointError
from generators.mit import MiT
from generators.mit_net import Adaptor, AdmMiTNet, FingerprintEmbedder, LabelEmbedder, MiTNet, Transformer


def tiny(*, patch: int = 4, channels: int = 2, width: int = 24, depth: int = 2, frequencies: int = 15) -> MiTNet:
    """Random weights in every tensor, position code aside."""
    torch.manual_seed(0)
    adaptor = Adaptor(width, frequencies, LabelEmbedder(6, width), 4, 2)
    net = MiTNet(Transformer(channels, 3 * patch, patch, width, depth, 3, 2 * width), adaptor)
    return shaken(net)


def shaken(net: Any) -> Any:
    for parameter in net.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return net.eval()


def write(path: Path, net: nn.Module) -> Path:
    """A checkpoint in the official layout; the raw weights are twice the averaged ones."""
    state = {f"module.{key}": value for key, value in net.state_dict().items()}
    content = {"global_step": 7, "ddp": {k: 2 * v for k, v in state.items()}, "ema": state, "opt": {"state": {}}}
    torch.save(content, path)
    return path


@pytest.fixture
def golden(shared: Path) -> tuple[Path, dict[str, Tensor], dict[str, Tensor]]:
    folder = shared / "golden" / "mit_tiny"
    files = [np.load(folder / name) for name in ("inputs.npz", "expected.npz")]
    inputs, expected = ({k: torch.tensor(f[k]) for k in f.files if f[k].dtype.kind in "iuf"} for f in files)
    return folder, inputs, expected


def load(folder: Path, **options: Any) -> MiT:
    model = generators.load("mit", folder / "step_25003.ckpt", heads=4, **options)
    assert isinstance(model, MiT)
    return model


def labels(inputs: dict[str, Tensor]) -> dict[str, Any]:
    return {"experiment": inputs["e"], "cell_type": inputs["c"]}


def away(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max())


def test_velocities_are_the_originals(golden: tuple[Path, dict[str, Tensor], dict[str, Tensor]]) -> None:
    folder, inputs, expected = golden
    model, x, y, who = load(folder), inputs["x_in"], inputs["y"], labels(inputs)
    with torch.no_grad():
        assert away(model.velocity(x, inputs["t_vec"], y, **who), expected["v_tvec"]) < 1e-5
        raw = load(folder, weights="raw")
        assert away(raw.velocity(x, inputs["t_vec"], y, **who), expected["v_tvec_raw_weights"]) < 1e-5
        names = [str(label) for label in y.tolist()]
        assert torch.equal(model.velocity(x, 0.3, names, **who), model.velocity(x, 0.3, y, **who))
        drop = torch.tensor([True, False, True])
        half = model.velocity(x, 0.3, y, drop=drop, **who)
        assert away(half[drop], model.velocity(x, 0.3, None, **who)[drop]) < 1e-6
        assert away(half[~drop], model.velocity(x, 0.3, y, **who)[~drop]) < 1e-6
        for w in (0, 0.5, 1, 2):
            guided = load(folder, guidance=w)
            got = torch.stack([guided.guided_velocity(x, t, y, **who) for t in inputs["t_values"]])
            assert away(got, expected[f"v_cfg{w}"]) < 1e-5
        nothing = {"experiment": torch.full((3,), 3), "cell_type": torch.zeros(3, dtype=torch.int64)}
        assert model.velocity(x, 0.3, y, **nothing).isfinite().all()
        # No label at all: an unset generator with more than one cell type takes "none" for all three.
        alone = load(folder)
        alone.cell_type = None
        got = torch.stack([alone.velocity(x, t, None) for t in inputs["t_values"]])
        assert away(got, expected["v_null_all"]) < 1e-5


def test_parts_are_the_originals(golden: tuple[Path, dict[str, Tensor], dict[str, Tensor]]) -> None:
    folder, inputs, expected = golden
    net = load(folder).net
    assert isinstance(net, MiTNet)
    fresh = MiTNet(Transformer(3, 16, 2, 40, 4, 4, 160), Adaptor(40, 256, LabelEmbedder(7, 40), 5, 2))
    assert away(fresh.dit.pos_embed[0], expected["pos_embed"]) < 1e-6  # the code itself, not the stored copy
    with torch.no_grad():
        adaptor, t = net.adaptor, inputs["t_values"]
        assert away(adaptor.t_embedder.sinusoid(t), expected["sinusoid"]) < 1e-5
        assert away(adaptor.t_embedder(t), expected["time_emb"]) < 1e-5
        y = adaptor.y_embedder(inputs["y"])
        assert away(adaptor(inputs["t_vec"], y, inputs["e"], inputs["c"]), expected["cond"]) < 1e-5
        tokens = net.dit.x_embedder(inputs["x_in"]) + net.dit.pos_embed
        assert away(tokens, expected["tokens_in"]) < 1e-5


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("euler_uniform0.05_cfg1", {"solver": "euler", "step_size": 0.05}),
        ("midpoint_uniform0.1_cfg1", {"solver": "midpoint", "step_size": 0.1}),
        ("midpoint_uniform0.1_cfg2", {"solver": "midpoint", "steps": 10, "guidance": 2.0}),
    ],
)
def test_fixed_steps_are_the_originals(
    golden: tuple[Path, dict[str, Tensor], dict[str, Tensor]], name: str, options: dict[str, Any]
) -> None:
    folder, inputs, expected = golden
    model = load(folder, **options)
    with torch.no_grad():
        got = model.solver(lambda x, t: model.guided_velocity(x, t, inputs["y"], **labels(inputs)), inputs["x0"])
    assert away(got, expected[f"sample_{name}"]) < 1e-4


def test_dopri5_is_the_originals(golden: tuple[Path, dict[str, Tensor], dict[str, Tensor]]) -> None:
    folder, inputs, expected = golden
    options = {"cfg1": {}, "cfg1_raw_weights": {"weights": "raw"}, "cfg2": {"guidance": 2.0}, "cfg0": {"guidance": 0.0}}
    for name, given in options.items():
        model, times = load(folder, **given), []

        def velocity(x: Tensor, t: float, model: MiT = model, times: list[float] = times) -> Tensor:
            times.append(t)
            return model.guided_velocity(x, t, inputs["y"], **labels(inputs))

        with torch.no_grad():
            got = model.solver(velocity, inputs["x0"])
        assert away(got, expected[f"sample_dopri5_{name}"]) < 1e-3
        assert len(times) == 26
        if name == "cfg1":
            assert np.abs(np.array(times) - expected["dopri5_times_cfg1"].numpy()).max() < 1e-3


def test_sample_is_the_originals_8_bit_image(
    golden: tuple[Path, dict[str, Tensor], dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, inputs, expected = golden
    model = load(folder)
    monkeypatch.setattr(model, "source", lambda control, generator=None: inputs["x0"])
    names = [str(label) for label in inputs["y"].tolist()]
    got = model.sample(torch.zeros(3, 3, 16, 16), names, **labels(inputs))
    as_bytes = (got * 255 + 0.5).to(torch.uint8).permute(0, 2, 3, 1)
    off = (as_bytes.int() - expected["sample_dopri5_cfg1_uint8"].int()).abs()
    assert off.max() <= 1 and (off > 0).float().mean() <= 0.005


def test_fine_tuned_variant_is_the_originals(golden: tuple[Path, dict[str, Tensor], dict[str, Tensor]]) -> None:
    folder, inputs, expected = golden
    model = generators.load("mit", folder / "finetuned" / "step_25000.ckpt", heads=4)
    assert isinstance(model, MiT)
    embedder, y = model.net.adaptor.y_embedder, inputs["y_finetuned"]
    assert isinstance(embedder, FingerprintEmbedder)
    with torch.no_grad():
        assert away(embedder(torch.arange(7)), expected["ft_y_emb_all"]) < 1e-5
        assert away(model.velocity(inputs["x_in"], inputs["t_vec"], y, **labels(inputs)), expected["ft_v_tvec"]) < 1e-5
        rows = model.embed_fingerprints(embedder.embs_array[y], embedder.dose_array[y])
        by_rows = model.velocity(inputs["x_in"], inputs["t_vec"], rows, **labels(inputs))
        assert away(by_rows, expected["ft_v_tvec"]) < 1e-5
        got = model.solver(lambda x, t: model.guided_velocity(x, t, y, **labels(inputs)), inputs["x0"])
    assert away(got, expected["ft_sample_dopri5_cfg1"]) < 1e-3
    with pytest.raises(ValueError, match="no row 'no perturbation'"):
        model.velocity(inputs["x_in"], 0.5, None)
    with pytest.raises(ValueError, match="use guidance=1"):
        generators.load("mit", folder / "finetuned" / "step_25000.ckpt", heads=4, guidance=2.0)
    with pytest.raises(ValueError, match=r"wanted \(B, 2048\) and \(B,\)"):
        model.embed_fingerprints(torch.ones(2, 1024), torch.ones(2))


def test_sizes_are_read_off_the_file(tmp_path: Path) -> None:
    net = tiny()
    model = generators.load("mit", write(tmp_path / "a.ckpt", net), heads=3, solver="euler", steps=2)
    assert model.capabilities.size == 12 and model.capabilities.channels == 2 and not model.capabilities.uses_control
    assert isinstance(model, FlowGenerator) and model.capabilities.post_trainable and model.capabilities.stochastic
    x, t = torch.randn(2, 2, 12, 12), torch.tensor([0.1, 0.9])
    y = net.adaptor.y_embedder(torch.tensor([4, 1]))
    expected = net(x, t, y, torch.tensor([3, 3]), torch.tensor([0, 0]))  # no experiment; the only cell type
    assert torch.equal(model.velocity(x, t, ["4", "1"]), expected)
    with pytest.raises(ValueError, match="draws 12x12 px only; these images are 16x16"):
        model.sample(torch.rand(1, 2, 16, 16), ["1"])
    got = model.sample(torch.rand(2, 2, 12, 12), ["1", "2"], generator=seeded([1, 2]))
    assert torch.allclose(model.sample(torch.rand(1, 2, 12, 12), ["2"], generator=seeded([2])), got[1:], atol=1e-5)


def test_gradients_reach_every_weight(tmp_path: Path) -> None:
    model = generators.load("mit", write(tmp_path / "a.ckpt", tiny()), heads=3)
    model.velocity(
        torch.randn(2, 2, 12, 12), 0.5, ["0", "1"], drop=torch.tensor([True, False])
    ).square().mean().backward()
    without = [n for n, p in model.net.named_parameters() if p.requires_grad and p.grad is None]
    assert without == [] and model.net.adaptor.y_embedder.embedding_table.weight.grad[5].any()


def test_guidance_without_memory_for_two_passes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = generators.load("mit", write(tmp_path / "a.ckpt", tiny()), heads=3, guidance=1.7)
    x, y = torch.randn(2, 2, 12, 12), torch.tensor([0, 3])
    experiment = torch.tensor([0, 2])
    expected = model.guided_velocity(x, 0.5, y, experiment=experiment)
    sizes, forward = [], model.net.forward

    def tight(x: Tensor, *rest: Tensor) -> Tensor:
        sizes.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("no room")
        return forward(x, *rest)

    monkeypatch.setattr(model.net, "forward", tight)
    for _ in range(2):
        assert torch.allclose(model.guided_velocity(x, 0.5, y, experiment=experiment), expected, atol=1e-5)
    assert sizes == [4, 2, 2, 2, 2]  # it tries once, and remembers


def test_bfloat16_is_near(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ckpt", tiny())
    x, t = torch.randn(2, 2, 12, 12), torch.tensor([0.2, 0.999])
    plain, fast = (
        generators.load("mit", path, heads=3, bfloat16=b).velocity(x, t, torch.tensor([0, 1])) for b in (False, True)
    )
    assert fast.dtype == torch.float32
    assert 0 < float(((plain - fast).norm() / plain.norm()).detach()) < 0.03


def test_u_net_variant(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AdmConfig(channels=3, condition=8, width=32, mult=(1, 1), blocks=1, attention=(2,), dropout=0.0)
    net = shaken(AdmMiTNet(AdmNet(config), Adaptor(8, 16, LabelEmbedder(4, 8), 3, 2)))
    model = generators.load("mit", write(tmp_path / "adm.ckpt", net), solver="heun2", steps=1, guidance=1.5)
    x = torch.randn(2, 3, 8, 12)
    adaptor = net.adaptor  # the condition is the sum of the labels and of time 0
    condition = adaptor.t_embedder(torch.zeros(2)) + adaptor.y_embedder(torch.tensor([2, 0]))
    condition = condition + adaptor.e_embedder(torch.tensor([1, 1])) + adaptor.c_embedder(torch.tensor([0, 0]))
    expected = net.adm(x, torch.tensor([0.4, 0.4]), condition)
    assert torch.allclose(model.velocity(x, 0.4, ["2", "0"], experiment=1), expected, atol=1e-6)
    assert model.sample(torch.rand(2, 3, 8, 12), ["2", "0"]).shape == x.shape
    assert model.capabilities.size is None and model.capabilities.size_multiple == 2
    with torch.device("meta"):
        full = AdmMiTNet(AdmNet(AdmConfig(condition=200)), Adaptor(200, 256, LabelEmbedder(129, 200), 65, 2))
    assert sum(p.numel() for p in full.parameters()) == 55_910_131 and len(full.state_dict()) == 399


@pytest.mark.parametrize(
    ("width", "depth", "heads", "channels", "patch", "parameters", "tensors"),
    [
        (384, 12, 6, 3, 2, 35_203_212, 146),
        (768, 12, 12, 3, 2, 138_531_084, 146),
        (1024, 24, 16, 3, 2, 484_529_164, 278),
        (1152, 28, 16, 3, 2, 713_708_940, 322),
        (1152, 28, 16, 6, 2, 713_736_600, 322),
        (1152, 28, 16, 3, 8, 711_635_520, 322),
    ],
)
def test_full_sizes_have_the_published_number_of_parameters(
    width: int, depth: int, heads: int, channels: int, patch: int, parameters: int, tensors: int
) -> None:
    with torch.device("meta"):
        adaptor = Adaptor(width, 256, LabelEmbedder(129, width), 65, 2)
        net = MiTNet(Transformer(channels, 96, patch, width, depth, heads, 4 * width), adaptor)
        assert sum(p.numel() for p in net.parameters()) == parameters and len(net.state_dict()) == tensors
        if parameters == 713_708_940:
            net.adaptor.y_embedder = FingerprintEmbedder(128, 2048, width, width, 6, 256)
            assert sum(p.numel() for p in net.adaptor.y_embedder.parameters()) == 99_619_200
            assert sum(p.numel() for p in net.parameters()) == 813_179_532


def test_labels_and_their_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ckpt", tiny())
    model = generators.load("mit", path, heads=3, compounds=["DMSO", "taxol 0.1", "taxol 1"], experiment=2)
    assert model.compounds == ["DMSO", "taxol 0.1", "taxol 1"]
    x = torch.randn(1, 2, 12, 12)
    assert torch.equal(model.velocity(x, 0.5, ["taxol 1"]), model.velocity(x, 0.5, torch.tensor([2]), experiment=2))
    assert not torch.equal(model.velocity(x, 0.5, ["taxol 1"]), model.velocity(x, 0.5, ["taxol 1"], experiment=0))
    calls: list[tuple[Any, str]] = [
        (lambda: model.velocity(x, 0.5, ["taxol 10"]), "no compound 'taxol 10'; did you mean 'taxol 1'"),
        (lambda: model.velocity(x, 0.5, torch.tensor([5])), "perturbation=5: this checkpoint has the labels 0 to 4"),
        (lambda: model.velocity(x, 0.5, torch.rand(1, 7)), r"condition rows of shape \(1, 7\); wanted \(B, 24\)"),
        (lambda: model.velocity(x, 0.5, ["DMSO", "DMSO"]), "2 perturbations for 1 images"),
        (lambda: model.velocity(x, 0.5, ["DMSO"], experiment=3), "experiment=3: .* labels 0 to 2"),
        (lambda: model.velocity(x, 0.5, ["DMSO"], experiment=torch.tensor([0, 1])), "2 experiment labels for 1 images"),
        (lambda: generators.load("mit", path, heads=3, cell_type=1), "cell_type=1: .* labels 0 to 0"),
        (lambda: generators.load("mit", path, heads=3, compounds=list("abcdef")), "6 names for the 5 labels"),
        (lambda: generators.load("mit", path, heads=3, guidance=float("nan")), "guidance=nan"),
        (lambda: model.sample(torch.rand(2, 2, 12, 12), ["DMSO"]), "1 compounds for 2 images"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_solver_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.ckpt", tiny())
    assert generators.load("mit", path, heads=3).solver == Dopri5(1e-5, 1e-5)
    model = generators.load("mit", path, heads=3, rtol=1e-3)
    assert model.describe()["rtol"] == 1e-3
    with pytest.raises(ValueError, match="steps=20: dopri5 chooses its own"):
        model.sample(torch.rand(1, 2, 12, 12), ["0"], steps=20)
    with pytest.raises(ValueError, match="steps=20: the solver 'dopri5' takes rtol, atol only"):
        generators.load("mit", path, heads=3, steps=20)
    with pytest.raises(ValueError, match="solver='rk4': one of euler, midpoint, heun2, dopri5"):
        generators.load("mit", path, heads=3, solver="rk4")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "biorewards\[generators\]"'):
        generators.load("mit", path, heads=3)


def test_own_files_keep_names_and_settings(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ckpt", tiny())
    model = generators.load(
        "mit", path, heads=3, compounds=list("abc"), experiment=1, guidance=2.0, solver="midpoint", step_size=0.25
    )
    model.save(tmp_path / "own.safetensors")
    own = generators.load("mit", tmp_path / "own.safetensors")
    changing = {"checkpoint"}
    assert {k: v for k, v in own.describe().items() if k not in changing} == {
        k: v for k, v in model.describe().items() if k not in changing
    }
    assert own.compounds == list("abc")
    x = torch.rand(2, 2, 12, 12)
    ours, theirs = (m.sample(x, list("ab"), generator=seeded([1, 2])) for m in (own, model))
    assert torch.equal(ours, theirs)
    assert generators.load("mit", tmp_path / "own.safetensors", steps=3).describe()["steps"] == 3
    meta = json.loads((tmp_path / "own.json").read_text())
    meta["config"]["sampling"]["guidance"] = "two"
    (tmp_path / "own.json").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match="guidance='two', which is no such setting"):
        generators.load("mit", tmp_path / "own.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dit.final_layer.linear.bias": None}, r"dit\.final_layer\.linear\.bias is missing"),
        ({"dit.blocks.0.attn.qkv.weight": torch.zeros(3, 24)}, r"attn\.qkv\.weight is \(3, 24\), wanted"),
        ({"dit.pos_embed": torch.zeros(1, 8, 24)}, "dit.pos_embed has 8 places"),
        ({"dit.blocks.2.attn.qkv.weight": torch.zeros(72, 24)}, "3 blocks, wanted an even number"),
        ({"dit.blocks.1e9.x": torch.zeros(1)}, r"dit\.blocks\.1e9\.x does not belong"),
        ({"adaptor.t_embedder.mlp.0.weight": None}, r"adaptor\.t_embedder\.mlp\.0\.weight is missing"),
        ({"adaptor.e_embedder.embedding_table.weight": torch.full((4, 24), torch.inf)}, "holds NaN or infinity"),
        ({"dit.x_embedder.proj.weight": torch.zeros(1).expand(24, 2, 4, 4)}, "no plain tensor"),
        ({"dit.pos_embed": "text"}, r"dit\.pos_embed is missing"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "a.ckpt", tiny())
    content = torch.load(path, weights_only=True)
    for key, value in change.items():
        if value is None:
            del content["ema"][f"module.{key}"]
        else:
            content["ema"][f"module.{key}"] = value
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        generators.load("mit", path, heads=3)
    assert "\n" not in str(caught.value)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (Path("ran"), "code ran"))


def test_wrong_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "a.ckpt", tiny())
    with pytest.raises(CheckpointError, match=r"the width 24 is none of .* 1152; give the number of heads"):
        generators.load("mit", path)
    with pytest.raises(ValueError, match="heads=5: the width 24"):
        generators.load("mit", path, heads=5)
    with pytest.raises(ValueError, match="weights='best': 'ema' or 'raw'"):
        generators.load("mit", path, heads=3, weights="best")
    whole = path.read_bytes()
    path.write_bytes(whole[:-2000])
    with pytest.raises(CheckpointError, match="damaged, cut short"):
        generators.load("mit", path, heads=3)
    torch.save({"ema": Hostile()}, path)
    with pytest.raises(CheckpointError, match="holds more than data"):
        generators.load("mit", path, heads=3)
    assert not Path("ran").exists()
    torch.save({"generator": {}, "mapping_network": {}}, path)
    with pytest.raises(CheckpointError, match=r"ema is missing \(it has 'generator', 'mapping_network'\)"):
        generators.load("mit", path, heads=3)
