"""CellFlux in use: files of every form and fault, perturbations, randomness, guidance, training, the fast path."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import generators
from generators.adm import AdmConfig, AdmNet, infer_config
from generators.base import FlowGenerator, seeded
from generators.cellflux import CellFlux
from generators.checkpoints import CheckpointError
from generators.embeddings import CompoundTable
from generators.solvers import Solver
from tests.foreign import Averaged, cellflux_content, randomised, touches

ROOT = Path(__file__).resolve().parents[1]
TINY = AdmConfig(channels=2, condition=5, width=32, mult=(1, 1), blocks=1, attention=(2,))
NAMES = ["DMSO", "taxol", "AZ138"]
COUNTS = torch.tensor([[1.0, 0, 2, 0, 0], [0, 4, 1, 1, 0], [3, 0, 0, 0, 7]])


def net(config: AdmConfig = TINY, seed: int = 0) -> AdmNet:
    made = randomised(AdmNet(config), seed)
    assert isinstance(made, AdmNet)
    return made.eval()


def cellflux(**options: Any) -> CellFlux:
    """A tiny one with random weights and a table of counts."""
    options = {"table": CompoundTable(NAMES, COUNTS), "solver": Solver(steps=3), "fingerprints": "counts", **options}
    return CellFlux(net(), **options)


def controls(count: int = 3, seed: int = 1, side: int = 8) -> Tensor:
    return torch.rand(count, 2, side, side, generator=torch.Generator().manual_seed(seed))


def write_csv(path: Path, values: Tensor = COUNTS, names: list[str] = NAMES) -> Path:
    rows = [f"{name},{','.join(f'{v:g}' for v in row)}" for name, row in zip(names, values.tolist(), strict=True)]
    path.write_text("\n".join([f",{','.join(map(str, range(values.shape[1])))}", *rows]) + "\n")
    return path


# ---- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "condition", "count"), [(3, 1024, 56_201_219), (6, 200, 55_793_158), (5, 1224, 56_312_837)]
)
def test_full_size_networks(channels: int, condition: int, count: int) -> None:
    with torch.device("meta"):
        made = AdmNet(AdmConfig(channels, condition))
    assert sum(p.numel() for p in made.parameters()) == count
    assert len(made.state_dict()) == 392
    assert made.config.size_multiple == 4


@pytest.mark.parametrize(
    "config",
    [
        AdmConfig(),
        AdmConfig(6, 200),
        AdmConfig(3, 1, 64, (1, 2, 3, 4), 2, (4, 8), 0.3),
        AdmConfig(1, 7, 32, (2,), 3, (1,), 0.3),
        AdmConfig(5, 9, 33, (32, 64), 1, (), 0.3),
        AdmConfig(4, 3, 16, (2, 4), 1, (1, 2), 0.3),
    ],
)
def test_configuration_is_read_off_the_shapes(config: AdmConfig) -> None:
    with torch.device("meta"):
        made = AdmNet(config)
    assert infer_config({key: tuple(value.shape) for key, value in made.state_dict().items()}) == config


@pytest.mark.parametrize("average", [True, False])
def test_files_with_and_without_an_average(tmp_path: Path, average: bool) -> None:
    raw, mean = net(seed=1).state_dict(), net(seed=2).state_dict()
    torch.save(cellflux_content(raw, mean if average else None), tmp_path / "c.pth")
    loaded = generators.load("cellflux", tmp_path / "c.pth")
    expected = mean if average else raw
    assert all(torch.equal(value, expected[key]) for key, value in loaded.net.state_dict().items())
    assert loaded.weights == ("ema" if average else "raw")
    by_request = generators.load("cellflux", tmp_path / "c.pth", weights="raw").net.state_dict()
    assert all(torch.equal(value, raw[key]) for key, value in by_request.items())
    if not average:
        with pytest.raises(CheckpointError, match=r"no averaged weights .*weights='raw'"):
            generators.load("cellflux", tmp_path / "c.pth", weights="ema")


def test_a_bare_state_dict_is_read(tmp_path: Path) -> None:
    torch.save(net().state_dict(), tmp_path / "bare.pth")
    loaded = generators.load("cellflux", tmp_path / "bare.pth")
    assert torch.equal(loaded.net.out[2].weight, net().out[2].weight)
    assert (loaded.guidance, loaded.solver, loaded.weights) == (0.2, Solver("heun2", "edm", 50), "raw")


@pytest.mark.parametrize("average", [True, False])
def test_saved_file_passes_the_official_loader(tmp_path: Path, average: bool) -> None:
    """Model, optimiser, schedule and scaler take their parts of the file, strictly, as a resumed run does."""
    torch.save(cellflux_content(net().state_dict(), net(seed=2).state_dict() if average else None), tmp_path / "a.pth")
    loaded = generators.load("cellflux", tmp_path / "a.pth")
    loaded.save(tmp_path / "b.pth")
    with torch.serialization.safe_globals([types.SimpleNamespace]):
        content = torch.load(tmp_path / "b.pth", weights_only=True)
    assert sorted(content) == ["args", "epoch", "lr_schedule", "model", "optimizer", "scaler"]
    official = Averaged(net(seed=9)) if average else net(seed=9)
    assert list(official.state_dict()) == list(content["model"])
    official.load_state_dict(content["model"], strict=True)
    optimizer = torch.optim.AdamW(official.parameters(), lr=1e-4, betas=(0.9, 0.95))
    optimizer.load_state_dict(content["optimizer"])
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=10)
    schedule.load_state_dict(content["lr_schedule"])
    torch.amp.GradScaler("cpu").load_state_dict(content["scaler"])
    assert content["epoch"] == 3
    assert content["args"].use_ema is average
    now = list(official.shadow_params) if average else list(official.parameters())
    assert all(torch.equal(a, b) for a, b in zip(now, loaded.net.parameters(), strict=True))
    if average:
        loaded.save(tmp_path / "c.pth", raw=net(seed=4).state_dict())
        assert generators.load("cellflux", tmp_path / "c.pth").describe()["digest"] == loaded.describe()["digest"]
        kept = generators.load("cellflux", tmp_path / "c.pth", weights="raw")
        assert torch.equal(kept.net.out[2].weight, net(seed=4).out[2].weight)
    else:
        with pytest.raises(ValueError, match="no average"):
            loaded.save(tmp_path / "c.pth", raw=net(seed=4).state_dict())


def test_own_pair_draws_the_same_images(tmp_path: Path) -> None:
    model = cellflux(guidance=0.7, noise_level=0.3, solver=Solver("midpoint", "uniform", step_size=0.3))
    model.save(tmp_path / "m.safetensors")
    again = generators.load("cellflux", tmp_path / "m.safetensors")
    images = [m.sample(controls(), NAMES, generator=torch.Generator().manual_seed(0)) for m in (model, again)]
    assert torch.equal(*images)
    assert again.compounds == NAMES
    assert again.fingerprints == "counts"
    assert {**again.describe(), "checkpoint": ""} == {**model.describe(), "checkpoint": ""}
    assert again.net.config == model.net.config
    with pytest.raises(ValueError, match=r"\.pth layout"):
        model.save(tmp_path / "n.safetensors", raw={})
    with pytest.raises(ValueError, match=r"NAME\.safetensors"):
        model.save(tmp_path / "n.bin")


def test_options_override_what_a_file_says(tmp_path: Path) -> None:
    args = {"ode_method": "midpoint", "edm_schedule": False, "ode_options": {"step_size": 0.25}, "use_initial": 0}
    torch.save(cellflux_content(net().state_dict(), None, **args, cfg_scale=0.0), tmp_path / "a.pth")

    def load(**options: Any) -> CellFlux:
        model = generators.load("cellflux", tmp_path / "a.pth", **options)
        assert isinstance(model, CellFlux)
        return model

    assert load().solver == Solver("midpoint", "uniform", step_size=0.25)
    assert (load().source_mode, load().guidance) == ("noise", 0.0)
    assert load(steps=7).solver == Solver("midpoint", "uniform", 7)
    assert load(grid="edm").solver == Solver("midpoint", "edm", 50)
    assert load(grid="edm", steps=4, solver="euler").solver == Solver("euler", "edm", 4)
    assert load(source="control", guidance=1.0, noise_level=0.5).source_mode == "control"


FAULTS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda c: c["model"].pop("model.out.2.bias"), "averaged tensors"),
    (lambda c: c["model"].pop("shadow_params.3"), r"averaged tensors .*weights='raw'"),
    (lambda c: c["model"].update({"shadow_params.0": torch.zeros(3)}), "at the place of mol_embed_transform.weight"),
    (lambda c: c.update(model={"w": torch.ones(2)}), "no mol_embed_transform.weight"),
    (lambda c: c.update(model=[1]), "no CellFlux checkpoint"),
    (lambda c: c.update(epoch="x"), "epoch is str"),
    (lambda c: setattr(c["args"], "ode_method", "edm_heun"), "solver='edm_heun'"),
    (lambda c: setattr(c["args"], "use_initial", 3), "use_initial is 3"),
    (lambda c: setattr(c["args"], "cfg_scale", "much"), "guidance is 'much'"),
    (lambda c: setattr(c["args"], "ode_options", {"nfe": 1}), "at least 2"),
    (lambda c: setattr(c["args"], "ode_options", "nfe"), "ode_options is 'nfe'"),
]


@pytest.mark.parametrize(("change", "says"), FAULTS, ids=[says[:20] for _, says in FAULTS])
def test_faults_of_a_file_are_named(tmp_path: Path, change: Callable[[dict[str, Any]], Any], says: str) -> None:
    content = cellflux_content(net().state_dict(), net(seed=2).state_dict())
    change(content)
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=says) as caught:
        generators.load("cellflux", tmp_path / "c.pth")
    assert "c.pth" in str(caught.value)


STATE_FAULTS: list[tuple[Callable[[dict[str, Tensor]], Any], str]] = [
    (lambda s: s.pop("time_embed.0.weight"), "time_embed.0.weight is missing"),
    (lambda s: s.pop("out.2.bias"), r"out\.2\.bias is missing \(1 of"),
    (lambda s: s.update({"label_emb.weight": torch.ones(3, 3)}), "class labels"),
    (lambda s: s.update({"input_blocks.2.0.op.weight": torch.ones(3, 3)}), "conv_resample"),
    (lambda s: s.update({"out.2.weight": torch.ones(6, 32, 3, 3)}), r"out\.2\.weight is \(6, 32, 3, 3\), wanted \(2"),
    (lambda s: [s.pop(k) for k in list(s) if k.startswith("input_blocks.1.")], "not a whole network"),
    (lambda s: s.update({"input_blocks.99999.0.op": torch.ones(1)}), "not a whole network"),
    (lambda s: s.update({"time_embed.0.weight": torch.ones(128, 20)}), "multiple"),
    (lambda s: s["middle_block.0.in_layers.0.weight"].fill_(float("nan")), "middle_block.0.in_layers.0.weight holds"),
    (lambda s: s.update({"mol_embed_transform.weight": torch.ones(1).expand(128, 10**7)}), "no plain tensor"),
]


@pytest.mark.parametrize(("change", "says"), STATE_FAULTS, ids=[says[:20] for _, says in STATE_FAULTS])
def test_wrong_networks_are_named(tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], says: str) -> None:
    state = {key: value.clone() for key, value in net().state_dict().items()}
    change(state)
    torch.save(cellflux_content(state, None), tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=says) as caught:
        generators.load("cellflux", tmp_path / "c.pth")
    assert "c.pth" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"generator": {}, "mapping_network": {}}, "looks like a checkpoint of IMPA"),
        ({"ddp": {}, "ema": {}, "opt": {}}, "looks like a checkpoint of MiT"),
        ({"state_dict": {}, "hyper_parameters": {}}, "Lightning"),
        ({}, "no CellFlux checkpoint"),
    ],
)
def test_files_of_other_systems_are_recognised(tmp_path: Path, content: dict[str, Any], says: str) -> None:
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=says):
        generators.load("cellflux", tmp_path / "c.pth")


def test_hostile_options_are_not_run(tmp_path: Path) -> None:
    content = cellflux_content(net().state_dict(), None, seed=touches(tmp_path / "marker"))
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="more than data"):
        generators.load("cellflux", tmp_path / "c.pth")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m["config"].pop("sampling"), "not whole"),
        (lambda m: m["config"]["sampling"].pop("grid"), "not whole"),
        (lambda m: m["config"]["sampling"].update(noise_level=None), "noise_level is None"),
        (lambda m: m["config"]["sampling"].update(source="air"), "source='air'"),
        (lambda m: m["config"].update(compounds=["a"]), "1 names for values"),
        (lambda m: m["config"]["origin"].update(more=1), "not whole"),
    ],
)
def test_a_changed_json_is_named(tmp_path: Path, change: Callable[[dict[str, Any]], Any], says: str) -> None:
    cellflux().save(tmp_path / "m.safetensors")
    meta = json.loads((tmp_path / "m.json").read_text())
    change(meta)
    (tmp_path / "m.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=says):
        generators.load("cellflux", tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weights": "EMA"}, "'ema' or 'raw'"),
        ({"source": "dna"}, "noise, control, control_plus_noise"),
        ({"noise_level": -1.0}, "noise_level=-1.0"),
        ({"guidance": float("inf")}, "guidance=inf"),
        ({"guidance": "x"}, "guidance is 'x'"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"fingerprints": "bits"}, "counts, binary, real, any"),
        ({"compile": "yes"}, "compile='yes'"),
        ({"noise": 1}, "no option 'noise'; it has: embeddings, weights"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    torch.save(cellflux_content(net().state_dict(), None), tmp_path / "c.pth")
    with pytest.raises(ValueError, match=says):
        generators.load("cellflux", tmp_path / "c.pth", **options)


def test_unknown_generators_are_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'cellflux'"):
        generators.load("celflux", "x.pth")
    with pytest.raises(ModuleNotFoundError):
        generators.load("no_such_module:load", "x.pth")


# ---- perturbations ----------------------------------------------------------------------------------------------


def test_names_rows_and_nothing() -> None:
    model = cellflux()
    rows = model.embed(["AZ138", "DMSO"])
    assert rows is not None
    assert torch.equal(rows, COUNTS[[2, 0]])
    assert model.embed(None) is None
    draws = [
        model.sample(controls(2), perturbation, generator=torch.Generator().manual_seed(0))
        for perturbation in (["AZ138", "DMSO"], COUNTS[[2, 0]], None)
    ]
    assert torch.equal(draws[0], draws[1])
    assert float((draws[0] - draws[2]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("perturbation", "says"),
    [
        (["taxol", "taxoll", "DMSO"], "no compound 'taxoll'; did you mean 'taxol'"),
        ("taxol", "one name, 'taxol'"),
        (["taxol"], "1 compounds for 3 images"),
        (torch.ones(2, 5) * 2, "2 embedding rows for 3 images"),
        (torch.ones(3, 4) * 2, r"\(3, 4\); wanted \(N, 5\)"),
        (torch.full((3, 5), float("nan")), "NaN"),
    ],
)
def test_wrong_perturbations_are_named(perturbation: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        cellflux().sample(controls(), perturbation)


def test_names_need_a_table() -> None:
    with pytest.raises(ValueError, match="no compound table: load it with embeddings=CSV"):
        cellflux(table=None).sample(controls(), NAMES)


def test_binary_fingerprints_for_a_network_of_counts(tmp_path: Path) -> None:
    binary = write_csv(tmp_path / "emb_fp_all.csv", (COUNTS > 0).float())
    counts = write_csv(tmp_path / "emb_fp.csv")
    torch.save(cellflux_content(net().state_dict(), None, dataset="bbbc021"), tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"emb_fp_all\.csv holds binary .*trained on fingerprint counts .*'any'"):
        generators.load("cellflux", tmp_path / "c.pth", embeddings=binary)
    assert generators.load("cellflux", tmp_path / "c.pth", embeddings=counts).compounds == NAMES
    assert generators.load("cellflux", tmp_path / "c.pth", embeddings=binary, fingerprints="any").compounds == NAMES
    # A file that says it was trained on the binary table wants that one.
    torch.save(
        cellflux_content(net().state_dict(), None, dataset="bbbc021", embedding_path="d/emb_fp_all.csv"),
        tmp_path / "d.pth",
    )
    assert generators.load("cellflux", tmp_path / "d.pth", embeddings=binary).compounds == NAMES
    with pytest.raises(ValueError, match="trained on binary"):
        generators.load("cellflux", tmp_path / "d.pth", embeddings=counts)
    wide = write_csv(tmp_path / "wide.csv", torch.cat([COUNTS, COUNTS], 1))
    with pytest.raises(ValueError, match=r"wide\.csv has 10 columns a compound; the network takes 5"):
        generators.load("cellflux", tmp_path / "c.pth", embeddings=wide)


def test_binary_fingerprints_as_a_tensor() -> None:
    model = CellFlux(net(AdmConfig(2, 40, 32, (1, 1), 1, ())), fingerprints="counts", solver=Solver(steps=2))
    bits = (torch.arange(40) < 30).float().expand(3, 40)
    with pytest.raises(ValueError, match="the tensor holds binary fingerprints"):
        model.sample(controls(), bits)
    # A small molecule can have counts that are all 0 or 1.
    assert model.sample(controls(), (torch.arange(40) < 8).float().expand(3, 40)).shape == (3, 2, 8, 8)


# ---- images and randomness --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (torch.rand(1, 3, 8, 8), "trained on 2 channels; these images have 3"),
        (torch.rand(1, 2, 9, 8), "multiples of 2 px; these images are 9x8: crop or pad to 8x8"),
        (torch.rand(2, 8, 8), r"\(B, C, H, W\)"),
        (torch.zeros(1, 2, 8, 8, dtype=torch.uint8), "torch.uint8"),
        (torch.rand(1, 2, 8, 8) * 255, "divide by 255"),
        (torch.rand(1, 2, 8, 8) - 1, r"in \[0, 1\]"),
        (torch.full((1, 2, 8, 8), float("nan")), r"in \[0, 1\]"),
    ],
)
def test_wrong_images_are_named(images: Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        cellflux().sample(images, None)


def test_no_images_give_no_images() -> None:
    assert cellflux().sample(torch.zeros(0, 2, 8, 8), []).shape == (0, 2, 8, 8)


def test_it_is_what_it_says() -> None:
    model = cellflux()
    assert isinstance(model, FlowGenerator)
    assert json.loads(json.dumps(model.describe())) == model.describe()
    out = model.sample(controls(), NAMES)
    assert (out.dtype, out.shape, out.requires_grad) == (torch.float32, (3, 2, 8, 8), False)
    assert 0 <= float(out.min()) <= float(out.max()) <= 1


def test_one_seed_an_image_makes_it_independent_of_its_batch() -> None:
    model = cellflux(dequantise=True)
    together = model.sample(controls(), NAMES, generator=seeded([5, 6, 7]))
    for i in range(3):
        alone = model.sample(controls()[i : i + 1], NAMES[i : i + 1], generator=seeded([5 + i]))
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)
    assert float((together - model.sample(controls(), NAMES, generator=seeded([5, 6, 8]))).abs()[2].max()) > 1e-3
    with pytest.raises(ValueError, match="2 random streams for 3 images"):
        model.sample(controls(), NAMES, generator=seeded([1, 2]))


def test_guidance_is_one_doubled_batch_and_falls_back_to_two(monkeypatch: pytest.MonkeyPatch) -> None:
    model = cellflux(guidance=1.5)
    sizes: list[int] = []
    model.net.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    x, t = controls() * 2 - 1, 0.3
    with torch.no_grad():
        model.guided_velocity(x, t, NAMES)
        assert sizes == [3, 3], "two passes are quicker on a CPU"
        model.doubled = True
        sizes.clear()
        doubled = model.guided_velocity(x, t, NAMES)
        assert sizes == [6]
        apart = 2.5 * model.velocity(x, t, NAMES) - 1.5 * model.velocity(x, t, None)
        torch.testing.assert_close(doubled, apart, rtol=1e-5, atol=1e-5)

        def little_memory(module: Any, args: Any) -> None:
            if len(args[0]) > 3:
                raise torch.OutOfMemoryError("no memory")

        model.net.register_forward_pre_hook(little_memory)
        sizes.clear()
        torch.testing.assert_close(model.guided_velocity(x, t, NAMES), doubled, rtol=1e-5, atol=1e-5)
        assert sizes == [6, 3, 3]
        model.guided_velocity(x, t, NAMES)
        assert sizes == [6, 3, 3, 3, 3], "the doubled batch is not tried again"
        model.guidance = 0.0
        sizes.clear()
        model.guided_velocity(x, t, NAMES)
        assert sizes == [3]


# ---- training ---------------------------------------------------------------------------------------------------


def test_a_fresh_network_is_small_and_returns_zero() -> None:
    model = CellFlux.create(compounds=NAMES)
    assert sum(p.numel() for p in model.net.parameters()) < 3_000_000
    assert not bool(model.velocity(torch.randn(2, 3, 16, 16), 0.5, ["taxol", "DMSO"]).any())
    assert torch.equal(model.table.values, torch.eye(3))  # type: ignore[union-attr]
    table = CompoundTable(NAMES, COUNTS)
    assert CellFlux.create(compounds=table).fingerprints == "counts"


def test_gradients_reach_every_weight_and_dropped_conditions_have_none() -> None:
    model = cellflux()
    x, rows = controls() * 2 - 1, COUNTS.clone().requires_grad_()
    loss = (
        model.velocity(x, torch.tensor([0.1, 0.5, 0.9]), rows, drop=torch.tensor([False, True, False])).square().sum()
    )
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.net.parameters())
    assert rows.grad is not None
    assert [bool(row.any()) for row in rows.grad] == [True, False, True]


def test_dropout_is_on_in_training_and_off_in_sampling() -> None:
    model = CellFlux(net(AdmConfig(2, 5, 32, (1, 1), 1, (2,), dropout=0.5)), solver=Solver(steps=2))
    x = controls() * 2 - 1
    model.net.train()
    assert not torch.equal(model.velocity(x, 0.5, None), model.velocity(x, 0.5, None))
    draws = [model.sample(controls(), COUNTS, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(*draws)
    assert model.net.training
    assert all(module.training for module in model.net.modules())


def test_another_net_makes_another_policy() -> None:
    model = cellflux()
    other = copy.copy(model)
    other.net = copy.deepcopy(model.net)
    with torch.no_grad():
        other.net.out[2].bias += 1
        x = controls() * 2 - 1
        difference = other.velocity(x, 0.5, NAMES) - model.velocity(x, 0.5, NAMES)
    torch.testing.assert_close(difference, torch.ones_like(x), rtol=0, atol=1e-5)


def test_it_learns_to_tell_two_compounds_apart() -> None:
    """Flow matching on two flat images: after training one compound draws dark images, the other bright ones."""
    torch.manual_seed(0)
    model = CellFlux.create(
        compounds=["dark", "bright"], channels=1, width=32, mult=(1, 1), blocks=1, attention=(),
        solver=Solver("euler", "uniform", 8), noise_level=0.5,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.net.parameters(), lr=2e-3)
    rows = model.embed(["dark", "bright"] * 8)
    image = torch.tensor([-0.6, 0.6] * 8)[:, None, None, None].expand(16, 1, 8, 8)
    model.net.train()
    for _ in range(150):
        source = model.source(torch.zeros_like(image))
        t = torch.rand(16)
        at = torch.lerp(source, image, t[:, None, None, None])
        drop = torch.rand(16) < 0.2
        loss = (model.velocity(at, t, rows, drop=drop) - (image - source)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn = model.sample(torch.full((2, 1, 8, 8), 0.5), ["dark", "bright"], generator=seeded([1, 2])).mean((1, 2, 3))
    assert float(drawn[0]) == pytest.approx(0.2, abs=0.1)
    assert float(drawn[1]) == pytest.approx(0.8, abs=0.1)


# ---- the fast path ----------------------------------------------------------------------------------------------

#: Largest difference of images in [0, 1] from the plain path.
TOLERANCE = {"channels_last": 1e-5, "bfloat16": 0.02, "compile": 1e-4}


@pytest.mark.parametrize("option", ["channels_last", "bfloat16", pytest.param("compile", marks=pytest.mark.slow)])
def test_fast_path_agrees_with_the_plain_one(tmp_path: Path, option: str) -> None:
    cellflux().save(tmp_path / "m.safetensors")
    plain, fast = (generators.load("cellflux", tmp_path / "m.safetensors", **o) for o in ({}, {option: True}))
    images = [m.sample(controls(), NAMES, generator=seeded([1, 2, 3])) for m in (plain, fast)]
    assert float(images[0].std()) > 0.1
    assert float((images[0] - images[1]).abs().max()) <= TOLERANCE[option]
    fast.save(tmp_path / "fast.safetensors")
    assert generators.load("cellflux", tmp_path / "fast.safetensors").describe()["digest"] == plain.describe()["digest"]


def test_time_stays_in_float32_under_bfloat16() -> None:
    """The last times of the EDM grid round to 1 in bfloat16; the network must still tell them apart."""
    model = cellflux(bfloat16=True)
    times = torch.tensor(Solver(steps=50).times()[-4:-1])
    with torch.autocast("cpu", torch.bfloat16):
        vectors = model.net.embedding(times, None)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors, model.net.embedding(times, None))
    assert len(vectors.unique(dim=0)) == 3


def test_a_trainer_keeps_its_own_autocast() -> None:
    model = cellflux()
    x = controls() * 2 - 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = model.velocity(x, 0.5, NAMES)
    with torch.no_grad():
        difference = (mixed - model.velocity(x, 0.5, NAMES)).abs().max()
    assert mixed.dtype == torch.float32
    assert 0 < float(difference) < 0.05


@pytest.mark.cuda
@pytest.mark.parametrize("options", [{}, {"channels_last": True, "bfloat16": True, "compile": True}])
def test_cuda_agrees_with_the_cpu(tmp_path: Path, options: dict[str, bool]) -> None:
    cellflux().save(tmp_path / "m.safetensors")
    plain = generators.load("cellflux", tmp_path / "m.safetensors")
    fast = generators.load("cellflux", tmp_path / "m.safetensors", **options).to("cuda")
    images = [m.sample(controls(), NAMES, generator=seeded([1, 2, 3])).cpu() for m in (plain, fast)]
    assert float((images[0] - images[1]).abs().max()) <= (0.02 if options else 2e-3)


FULL_SIZE = """
import resource, sys, types, torch
torch.set_num_threads(1)
if sys.argv[1] == "write":
    # Weights, average and two moments, as a full file has: four times 225 MB.
    from generators.adm import AdmConfig, AdmNet
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in AdmNet(AdmConfig()).state_dict().items()}
    draw = lambda s: torch.randn(s) * 0.02
    model = {"num_updates": torch.tensor(9)} | {f"model.{k}": draw(s) for k, s in shapes.items()}
    model |= {f"shadow_params.{i}": draw(s) for i, s in enumerate(shapes.values())}
    moments = {i: {"exp_avg": draw(s), "exp_avg_sq": draw(s)} for i, s in enumerate(shapes.values())}
    torch.save({"model": model, "optimizer": {"state": moments, "param_groups": []}, "lr_schedule": {}, "epoch": 199,
                "scaler": {}, "args": types.SimpleNamespace(dataset="bbbc021", use_ema=True)}, sys.argv[2])
else:
    import generators
    model = generators.load("cellflux", sys.argv[2], solver="euler", steps=2)
    rows = torch.randint(0, 5, (1, 1024)).float()
    image = model.sample(torch.rand(1, 3, 96, 96), rows, generator=torch.Generator().manual_seed(0))
    assert image.shape == (1, 3, 96, 96) and bool(torch.isfinite(image).all())
    model.save(sys.argv[3])
    again = generators.load("cellflux", sys.argv[3])
    assert again.describe()["digest"] == model.describe()["digest"]
    print(sum(p.numel() for p in model.net.parameters()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_full_size_loads_samples_and_saves_within_two_gigabytes(tmp_path: Path, suffix: str) -> None:
    def run(*args: object) -> str:
        command = [sys.executable, "-c", FULL_SIZE, *map(str, args)]
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout

    run("write", tmp_path / "full.pth")
    assert (tmp_path / "full.pth").stat().st_size > 850e6
    parameters, peak = run("use", tmp_path / "full.pth", tmp_path / f"again{suffix}").split()
    assert int(parameters) == 56_201_219
    assert int(peak) < 2 * 2**30
    for path in tmp_path.iterdir():
        path.unlink()  # pytest keeps the folders of the last runs: a gigabyte each
