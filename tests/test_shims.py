"""Other tools' reward and metric interfaces: the numbers are those of the suite, and nothing missing is left out."""

from __future__ import annotations

import inspect
import json
import pickle
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bundled import bundled
from exact import assay as exact_assay
from exact import image, random_crop
from PIL import Image
from torch import Tensor

from biorewards.assay import Assay
from biorewards.batch import Batch
from biorewards.reward import Reason, Score, Suite
from biorewards.rewards import suite
from biorewards.shims import Judge, as_flow_grpo, as_metric, as_trl
from biorewards.shims import flow_grpo as flow_grpo_shim
from biorewards.shims import judge as judge_module
from biorewards.shims import trl as trl_shim

LABELS = ["DMSO", "drug-a", "SMALL", "drug-a", "drug-a", "drug-a"]
#: The worst of every reward: 5 * 0 + 2 * 0 - 5 * 25.
WORST = -125.0


@pytest.fixture(scope="module")
def ours() -> Assay:
    return exact_assay()


@pytest.fixture(scope="module")
def crops() -> Tensor:
    """Three good crops, a blank one, one without a nucleus, one of NaN."""
    good = [image(*random_crop(k)) for k in range(3)]
    nothing = image(np.zeros((96, 96), int), random_crop(4)[1])
    return torch.stack([*good, torch.full((3, 96, 96), 0.3), nothing, torch.full((3, 96, 96), torch.nan)])


@pytest.fixture(scope="module")
def expected(ours: Assay, crops: Tensor) -> Tensor:
    target = torch.tensor([0, 1, 1, 1, 1, 1])
    return suite(ours)(Batch(crops, target, ours)).total


def test_the_numbers_are_those_of_the_suite(ours: Assay, crops: Tensor, expected: Tensor) -> None:
    values = Judge(suite(ours), ours)(crops, LABELS)
    assert list(values) == [*suite(ours).rewards, "total"]
    assert torch.equal(values["total"], expected)
    assert values["total"].isfinite().all() and values["total"][3] == values["total"][5] == WORST
    # A cell without nucleus: nothing of the nucleus is skipped.
    assert values["nucleus_size"][4] == values["nucleus_count"][4] == -25 and values["nucleus_in_cytoplasm"][4] == 0


def test_a_missing_value_is_the_worst_and_a_question_that_cannot_be_asked_an_error(ours: Assay, crops: Tensor) -> None:
    @dataclass
    class Own:
        name: str = "own"
        worst: float = -7.0

        def __call__(self, batch: Batch) -> Score:
            value = torch.full((len(batch),), torch.nan)
            return Score(value, value, torch.zeros(len(batch), dtype=torch.uint8))

    assert Judge(Suite([Own()]), ours)(crops, LABELS)["total"].tolist() == [-7.0] * 6

    class Worstless:
        name = "own"
        __call__ = Own.__call__

    with pytest.raises(ValueError, match=r"'own' has no value for image 0.*no `worst`"):
        Judge(Suite([Worstless()]), ours)(crops, LABELS)  # type: ignore[list-item]
    judge = Judge(suite(ours), ours)
    for label, why in ((None, "NO_TARGET"), ("", "NO_TARGET"), ("drug-z", "nearest known: drug-")):
        with pytest.raises(ValueError, match=why):
            judge(crops[:1], [label])
    with pytest.raises(ValueError, match=Reason.NO_REFERENCE.name):
        judge(crops[:1], ["unmeasured"])
    free = Judge(suite(ours, ["nucleus_in_cytoplasm"]), ours)
    assert free(crops[:2], [None, None])["total"].min() > 0.5  # needs no label
    with pytest.raises(ValueError, match="2 images, but 1 labels"):
        judge(crops[:2], ["DMSO"])


def test_images_come_in_every_common_form(ours: Assay, crops: Tensor) -> None:
    good = (crops[:3] * 255).round().to(torch.uint8)
    judge = Judge(suite(ours), ours)
    wanted = judge(good.float() / 255, LABELS[:3])["total"]
    last = good.permute(0, 2, 3, 1).numpy()
    for form in (good, last, list(good), list(last), [Image.fromarray(one) for one in last], list(good.float() / 255)):
        assert torch.equal(judge(form, LABELS[:3])["total"], wanted)
    with pytest.raises(ValueError, match=r"lie in \[-1, 1\]"):
        judge(crops[:2] * 0 + torch.tensor([-1.0, 1.0])[:, None, None, None], LABELS[:2])
    with pytest.raises(ValueError, match="lie in"):
        judge(good.float(), LABELS[:3])
    with pytest.raises(ValueError, match="int64"):
        judge(good.long(), LABELS[:3])
    with pytest.raises(ValueError, match="one size"):
        judge([good[0], good[1][:, :50]], LABELS[:2])
    with pytest.raises(ValueError, match="wants"):
        judge(good[:, :2], LABELS[:3])


def test_torchmetrics_metric(ours: Assay, crops: Tensor) -> None:
    torchmetrics = pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    judge = suite(ours)
    metric = as_metric(judge, ours)
    assert isinstance(metric, torchmetrics.Metric) and metric.higher_is_better
    metric.update(crops[:4], LABELS[:4])
    metric.update(crops[4:], LABELS[4:])
    found, values = metric.compute(), Judge(judge, ours)(crops, LABELS)
    assert set(found) == {*judge.rewards, "total"}
    for name, value in values.items():
        assert float(found[name]) == pytest.approx(float(value.double().mean()))
    # As torchmetrics uses it: forward gives the batch's value, copies and processes are merged, reset empties.
    other = metric.clone()
    assert float(other(crops[:1], LABELS[:1])["total"]) == pytest.approx(float(values["total"][0]))
    assert int(other.count) == 7 and int(metric.count) == 6
    part = as_metric(judge, ours)
    part.update(crops[:2], LABELS[:2])
    merged = as_metric(judge, ours)
    merged.update(crops[2:], LABELS[2:])
    merged.merge_state(part)
    assert float(merged.compute()["total"]) == pytest.approx(float(found["total"]))
    thawed = pickle.loads(pickle.dumps(metric))
    assert float(thawed.compute()["total"]) == float(found["total"])
    together = torchmetrics.MetricCollection({"biology": metric})
    assert set(together.compute()) == {*judge.rewards, "total"}
    metric.reset()
    assert int(metric.count) == 0
    with pytest.raises(ValueError, match="NO_TARGET"):
        metric.update(crops[:1], [""])


def test_as_metric_says_what_is_missing(ours: Assay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.delitem(sys.modules, "biorewards.shims.metric", raising=False)
    with pytest.raises(ImportError, match="pip install torchmetrics"):
        as_metric(suite(ours), ours)


def test_trl_reward(ours: Assay, crops: Tensor, expected: Tensor) -> None:
    reward = as_trl(suite(ours), ours, label="drug")
    told: dict[str, float] = {}
    found = reward(prompts=["draw"] * 6, completions=list(crops), drug=LABELS, completion_ids=[[1]] * 6,
                   trainer_state=None, log_metric=told.__setitem__)  # fmt: skip
    assert found == pytest.approx(expected.tolist()) and all(isinstance(value, float) for value in found)
    assert told["biorewards/total"] == pytest.approx(float(expected.mean())) and "biorewards/moa" in told
    assert as_trl(suite(ours), ours, label=None)(prompts=LABELS, completions=list(crops)) == found
    with pytest.raises(ValueError, match=r"no column 'moa'; there are \['drug'\]"):
        as_trl(suite(ours), ours)(prompts=LABELS, completions=list(crops), drug=LABELS)
    assert pickle.loads(pickle.dumps(reward)).__name__ == "biorewards"


def test_trl_itself_takes_the_reward(ours: Assay, crops: Tensor, expected: Tensor) -> None:
    """TRL's own step from completions to rewards, without a language model before it."""
    pytest.importorskip("trl", reason="trl is not installed")
    from trl import GRPOTrainer
    from trl.trainer.utils import get_callable_name

    reward = as_trl(suite(ours), ours)
    assert get_callable_name(reward) == "biorewards"
    told: dict[str, list[float]] = defaultdict(list)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cpu"), is_main_process=True),
        args=SimpleNamespace(report_to=[]), state=SimpleNamespace(global_step=0), environments=None,
        reward_funcs=[reward], reward_processing_classes=[None], reward_func_names=["biorewards"],
        _log_metric=lambda name, value: told[name].append(value), _log_completion_extra=None,
    )  # fmt: skip
    inputs = [{"prompt": "draw", "moa": label} for label in LABELS]
    calculate = inspect.unwrap(GRPOTrainer._calculate_rewards)
    found = calculate(trainer, inputs, ["draw"] * 6, list(crops), [[1]] * 6)
    assert found.shape == (6, 1) and found[:, 0].tolist() == pytest.approx(expected.tolist())
    assert told["biorewards/total"] == [pytest.approx(float(expected.mean()))]


def multi_score(device: str, weights: dict[str, float], table: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    """How Flow-GRPO and DiffusionNFT call scorers: factories that name `device` get it, totals are sums of lists."""
    made = {k: table[k](device) if "device" in table[k].__code__.co_varnames else table[k]() for k in weights}

    def score(images: Any, prompts: list[str], metadata: list[dict[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, weight in weights.items():
            scores, _ = made[name](images, prompts, metadata)
            found[name] = scores
            found["avg"] = [a + weight * b for a, b in zip(found.get("avg", [0.0] * len(scores)), scores, strict=True)]
        return found

    return score


def test_flow_grpo_scorer(ours: Assay, crops: Tensor, expected: Tensor) -> None:
    factory = as_flow_grpo(suite(ours), ours)
    metadata = [{"moa": label} for label in LABELS]
    found = multi_score("cpu", {"biology": 0.5}, {"biology": factory})(crops, [""] * 6, metadata)
    np.testing.assert_allclose(found["avg"], 0.5 * expected.numpy(), rtol=1e-6)
    assert found["biology"].dtype == np.float32 and np.isfinite(found["biology"]).all()
    eight = (crops[:3] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()  # NHWC, as evaluation hands over
    scores, parts = as_flow_grpo(suite(ours), ours, label=None)("cpu")(eight, LABELS[:3], [{}] * 3)
    assert scores.shape == (3,) and set(parts) == set(suite(ours).rewards)
    with pytest.raises(ValueError, match="metadata of image 1 has no 'moa'"):
        factory("cpu")(crops[:2], ["", ""], [{"moa": "DMSO"}, {}])


@pytest.fixture
def flow_factory(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Flow-Factory's rewards as its `rewards/abc.py` describes them (it is not on PyPI): arguments, fields, output."""

    @dataclass
    class RewardModelOutput:
        rewards: Any
        extra_info: Any = None

    class PointwiseRewardModel:
        required_fields: tuple[str, ...] = ("image", "prompt")
        use_tensor_inputs = False

        def __init__(self, config: Any, accelerator: Any) -> None:
            self.accelerator, self.config, self.dtype = accelerator, config, config.dtype
            self.device = accelerator.device if config.device == torch.device("cuda") else config.device
            self.model = None

    package, rewards = ModuleType("flow_factory"), ModuleType("flow_factory.rewards")
    rewards.PointwiseRewardModel, rewards.RewardModelOutput = PointwiseRewardModel, RewardModelOutput  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flow_factory", package)
    monkeypatch.setitem(sys.modules, "flow_factory.rewards", rewards)
    sys.modules.pop("biorewards.shims.flow_factory", None)
    import biorewards.shims.flow_factory as shim

    yield shim
    sys.modules.pop("biorewards.shims.flow_factory", None)


@dataclass
class Arguments:
    extra_kwargs: dict[str, Any] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.bfloat16


def test_flow_factory_reward(
    flow_factory: Any, ours: Assay, crops: Tensor, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Assay, "load", classmethod(lambda cls, source: {"exact": ours}[source]))
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    reward = flow_factory.BiologicalReward(Arguments({"assay": "exact", "label": "moa"}), accelerator)
    assert reward.use_tensor_inputs and reward.required_fields == ("prompt", "image", "metadata")
    given = {"prompt": [""] * 6, "image": list(crops), "metadata": [json.dumps({"moa": label}) for label in LABELS]}
    found = reward(**given, condition_images=None)
    assert type(found).__name__ == "RewardModelOutput" and found.rewards.shape == (6,)
    assert torch.equal(found.rewards, expected)
    plain = flow_factory.BiologicalReward(
        Arguments({"assay": "exact", "rewards": ["moa"]}, torch.device("cuda")), accelerator
    )
    assert plain.required_fields == ("prompt", "image") and plain.device == torch.device("cpu")
    assert plain(prompt=LABELS, image=list(crops)).rewards[3] == 0
    with pytest.raises(ValueError, match="name an assay"):
        flow_factory.BiologicalReward(Arguments(), accelerator)


def test_the_page_on_shims_runs(root: Path) -> None:
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    bundled("phantom")
    page = (root / "docs" / "shims.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    exec("\n".join(blocks), {})


def test_shims_are_short(flow_factory: Any) -> None:
    parts: list[Any] = [trl_shim.TrlReward, trl_shim.as_trl, flow_grpo_shim.as_flow_grpo, flow_factory.BiologicalReward]
    if "torchmetrics" in sys.modules:
        from biorewards.shims.metric import BiologicalRewards

        parts.append(BiologicalRewards)
    assert all(len(inspect.getsource(part).splitlines()) < 40 for part in parts)
    assert judge_module.__doc__
