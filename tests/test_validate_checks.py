"""The checks of `validate`: right rewards pass, each fault fails the check that is meant for it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from validate_toys import Blind, Counting, LeftHalf, SilentOnFailure, ZeroOnFailure, bench, write_folder

from biorewards.audit.lesions import LESIONS
from biorewards.rewards import MechanismOfAction, NucleusInCytoplasm, ReferenceReward
from biorewards.validate.bench import Bench
from biorewards.validate.check import Finding
from biorewards.validate.lesions_response import Response
from biorewards.validate.statistics import auroc, share_interval

# The package binds the functions of these names.
calibration, counting, exploits, invariance, lesions_response, oracle, specificity = (
    import_module(f"biorewards.validate.{name}")
    for name in ("calibration", "counting", "exploits", "invariance", "lesions_response", "oracle", "specificity")
)
#: Two lesions are enough to see the machinery of checks 3, 4 and 6; all twelve are tested in test_audit_lesions.py.
FEW = {name: LESIONS[name] for name in ("erase_nuclei", "erase_cytoplasm")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("validate") / "real", 60)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (lesions_response, specificity):
        monkeypatch.setattr(module, "LESIONS", FEW)


def of(findings: list[Finding], reward: str | None, word: str = "") -> list[Finding]:
    return [one for one in findings if one.reward == reward and word in f"{one.what} {one.details}"]


def test_auroc_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    good, bad = rng.normal(0.5, 1, 40).round(1), rng.normal(0, 1, 30).round(1)
    assert auroc(good, bad) == pytest.approx(roc_auc_score([1] * 40 + [0] * 30, [*good, *bad]))
    assert auroc(np.array([1.0, np.nan]), np.array([0.0])) == 1 and np.isnan(auroc(good, np.array([np.nan])))


def test_a_share_of_none_has_an_interval() -> None:
    assert share_interval([False] * 24) == (0.0, pytest.approx(0.138, abs=0.001))
    low, high = share_interval([True, False] * 50)
    assert low == pytest.approx(0.404, abs=0.001) and high == pytest.approx(0.596, abs=0.001)
    assert all(np.isnan(share_interval([])))


def test_oracle(folder: Path) -> None:
    found = oracle.oracle(bench(folder, {"moa": MechanismOfAction(), "nucleus_count": ReferenceReward("nucleus_count"),
                                         "nucleus_in_cytoplasm": NucleusInCytoplasm()}))  # fmt: skip
    assert all(one.passed for one in of(found, "moa")) and len(of(found, "moa")) == 6
    assert of(found, "moa", "shuffled")[0].value == 1  # brightness tells the two classes apart
    assert {one.passed for one in of(found, "nucleus_in_cytoplasm", "AUROC")} == {None}
    assert of(found, "nucleus_count", "'blank'")[0].value == 0
    assert {one.threshold for one in of(found, None)} == {">= 0.9"}


def test_oracle_fails_what_pays_noise_or_lets_blanks_off(folder: Path) -> None:
    found = oracle.oracle(bench(folder, {"left_half": LeftHalf()}))
    noise = of(found, "left_half", "'noise'")[0]
    assert noise.passed is False and noise.value == 1 and noise.details["highest"] > noise.details["real_floor"]
    silent = oracle.oracle(bench(folder, {"nucleus_count": SilentOnFailure()}))
    assert of(silent, "nucleus_count", "'blank'")[0].reason == "left without a value"


def test_oracle_without_controls_says_so(folder: Path, tmp_path: Path) -> None:
    treated = (folder / "index.csv").read_text(encoding="utf-8").splitlines()
    rows = [treated[0], *(line for line in treated[1:] if "drug-a" in line)]
    for line in rows[1:]:
        name = line.split(",")[0]
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "index.csv").write_text("\n".join(rows), encoding="utf-8")
    found = oracle.oracle(bench(tmp_path, {"moa": MechanismOfAction()}))
    assert [one.passed for one in found[:3]] == [None] * 3
    assert "one class only" in found[0].reason and "untreated" in found[1].reason


def test_invariance(folder: Path) -> None:
    found = invariance.invariance(bench(folder, {"nucleus_count": ReferenceReward("nucleus_count")}))
    assert of(found, "nucleus_count", "flips")[0].value == 1
    assert [one.details["nuisance"] for one in found[1:]] == list(invariance.TOLERATED)
    assert all(len(one.details["doses"]) >= 6 for one in found[1:])
    found = invariance.invariance(bench(folder, {"left_half": LeftHalf()}))
    assert of(found, "left_half", "flips")[0].passed is False
    gain = of(found, "left_half", "'gain_up'")[0]
    assert gain.value is not None and 0 < gain.value < gain.details["shift"][-1]
    assert gain.details["shift"] == sorted(gain.details["shift"])


def test_shifts_move_and_mirror() -> None:
    images = torch.arange(64.0).view(1, 1, 8, 8).repeat(20, 1, 1, 1)
    moved = invariance.shifted(images, 2, np.random.default_rng(0))
    assert moved.shape == images.shape and len({one.numpy().tobytes() for one in moved}) > 4
    for one in moved[:, 0]:  # the middle is a shifted middle
        assert any(
            torch.equal(one[2:6, 2:6], images[0, 0, 2 + dy : 6 + dy, 2 + dx : 6 + dx])
            for dy in (-2, 0, 2) for dx in (-2, 0, 2)
        )  # fmt: skip


@pytest.mark.usefixtures("few")
def test_dose_response(folder: Path) -> None:
    found = lesions_response.dose_response(bench(folder, {"nucleus_count": ReferenceReward("nucleus_count")}))
    rank, wins = of(found, "nucleus_count", "rank correlation")[0], of(found, "nucleus_count", "AUROC")[0]
    assert rank.passed and wins.value == 1 and rank.details["doses"][0] == 0 and len(rank.details["doses"]) == 7
    assert rank.details["measure"][-1] == 0 and rank.details["value"][-1] == -25
    blind = lesions_response.dose_response(bench(folder, {"nucleus_count": Blind()}))
    assert [one.passed for one in blind] == [False, False] and blind[0].value == 0 and blind[1].value == 0.5


@pytest.mark.usefixtures("few")
def test_counting_law(folder: Path) -> None:
    found = counting.counting(bench(folder, {"nucleus_count": ReferenceReward("nucleus_count")}, n=24))
    assert [one.passed for one in found] == [True] * 4, [(one.what, one.value) for one in found]
    assert found[0].value == pytest.approx(1, abs=0.02) and found[3].value == pytest.approx(1, abs=0.02)
    blind = counting.counting(bench(folder, {"nucleus_count": Blind()}, n=24))
    assert [one.passed for one in blind[:2]] == [False, False]
    few = counting.counting(bench(folder, {"nucleus_count": ReferenceReward("nucleus_count")}, n=12))
    assert few[0].passed is None and "too few" in few[0].reason


def test_counting_figures_of_known_series() -> None:
    x = np.array([[24.0, 20, 28], [12, 10, 14], [6, 5, 7]])
    assert counting.slope(x, 0.9 * x) == pytest.approx(0.9)
    assert counting.r2(x, 0.9 * x) == pytest.approx(1) and counting.off_proportion(x, 0.9 * x) == pytest.approx(0)
    assert counting.variation(x, 0.9 * x) == pytest.approx(0)
    saturated = np.minimum(x, 12)
    assert counting.off_proportion(x, saturated) > 0.1 and counting.r2(x, saturated) < 0.9
    rng = np.random.default_rng(0)
    spread = counting.variation(np.full((3, 400), 20.0), 20 * (1 + 0.2 * rng.standard_normal((3, 400))))
    assert spread == pytest.approx(0.2, abs=0.02)


def answers(judged: Bench, own: float, other: float) -> dict[str, Response | str]:
    """Twelve images. Owners fall by `own` real sd at every dose of their lesion; size by `other` at that of count."""
    names = ("nucleus_count", "nucleus_size")
    fall = np.array([0.0, 1.0, 1.0])[:, None] * np.ones(12)
    valid = {name: np.ones((3, 12), bool) for name in names}

    def response(count: float, size: float) -> Response:
        value = {name: -by * judged.spread(name) * fall for name, by in zip(names, (count, size), strict=True)}
        return Response((0.0, 1.0, 2.0), value, value, valid, {})

    return {"erase_nuclei": response(own, other), "grow_nuclei": response(0.0, own), "blend": "one class only"}


@pytest.mark.parametrize(("other", "passed"), [(0.5, True), (-0.5, True), (2.0, False), (-2.0, False)])
def test_specificity(folder: Path, other: float, passed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = bench(folder, {name: ReferenceReward(name) for name in ("nucleus_count", "nucleus_size")})
    monkeypatch.setattr(
        judged.__class__, "spread", lambda self, name: {"nucleus_count": 1.5, "nucleus_size": 2.0}[name]
    )
    monkeypatch.setattr(specificity, "responses", lambda _: answers(judged, 3.0, other))
    monkeypatch.setattr(specificity, "EXPLAINED", {})
    found = specificity.specificity(judged)
    assert of(found, "nucleus_count", "own lesion")[0].value == pytest.approx(3)
    foreign = of(found, "nucleus_size", "unexplained")[0]
    assert foreign.passed is passed and foreign.value == pytest.approx(abs(other) / 3)
    assert of(found, None)[0].passed and of(found, None)[0].details["strongest"]["erase_nuclei"] == pytest.approx(3)
    # Explained, it is no failure; but it is told.
    monkeypatch.setattr(specificity, "EXPLAINED", {("nucleus_size", "erase_nuclei"): "the largest may be gone"})
    foreign = of(specificity.specificity(judged), "nucleus_size", "unexplained")[0]
    assert bool(foreign.details["explained"]) is not passed and foreign.passed is (True if passed else None)


def test_specificity_finds_blind_spots(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = bench(folder, {name: ReferenceReward(name) for name in ("nucleus_count", "nucleus_size")})
    monkeypatch.setattr(judged.__class__, "spread", lambda self, name: 1.0)
    monkeypatch.setattr(specificity, "responses", lambda _: answers(judged, 0.1, 0.0))
    found = specificity.specificity(judged)
    assert of(found, "nucleus_count", "own lesion")[0].passed is False
    assert of(found, None)[0].passed is False and "erase nuclei" in of(found, None)[0].reason


def test_every_explanation_is_of_a_reward_and_anothers_lesion() -> None:
    assert all(LESIONS[lesion].owner != reward for reward, lesion in specificity.EXPLAINED)


def test_missing_biology(folder: Path) -> None:
    honest = {"nucleus_count": Counting(), "cytoplasm_count": ReferenceReward("cytoplasm_count")}
    found = exploits.missing_biology(bench(folder, honest))
    assert all(one.passed for one in found), [(one.what, one.value) for one in found if not one.passed]
    needs = {one.details["exploit"] for one in of(found, "nucleus_count") if "exploit" in one.details}
    assert needs == {"no nucleus", "no DNA channel", "blank", "not a number"}
    zero = exploits.missing_biology(bench(folder, {"nucleus_count": ZeroOnFailure()}))
    assert zero[0].passed is False and zero[0].value is not None and zero[0].value > 0.1
    assert "no nucleus" in {one.details.get("exploit") for one in zero if one.passed is False}
    silent = exploits.missing_biology(bench(folder, {"nucleus_count": SilentOnFailure()}))
    assert silent[0].passed is False and "without a value" in silent[0].reason


def test_variance_collapse(folder: Path) -> None:
    names = ("nucleus_count", "cytoplasm_count")
    found = exploits.variance_collapse(bench(folder, {name: ReferenceReward(name) for name in names}))
    gain = of(found, "nucleus_count", "one real image of each class")[0]
    assert gain.passed is False and gain.details["premium"][0] == pytest.approx(0, abs=1e-6)
    assert gain.details["premium"][-1] == pytest.approx(gain.value)
    assert of(found, None)[0].passed is False
    ratio = of(found, "nucleus_count", "Spread within classes")[0]
    assert ratio.value is not None and ratio.value < 0.8 and ratio.passed
    flat = exploits.variance_collapse(bench(folder, {"nucleus_count": Blind()}))
    assert flat[0].passed is None and "one value" in flat[0].reason


def test_calibration_error_of_known_probabilities() -> None:
    rng = np.random.default_rng(0)
    sure = rng.uniform(0.5, 1, 20_000)
    assert calibration.expected_error(sure, (rng.random(20_000) < sure).astype(float)) < 0.01
    assert calibration.expected_error(sure, (rng.random(20_000) < sure - 0.3).astype(float)) == pytest.approx(
        0.3, abs=0.02
    )


def test_calibration(folder: Path) -> None:
    judged = bench(folder, {"moa": MechanismOfAction(), "nucleus_size": ReferenceReward("nucleus_size")})
    found = calibration.calibration(judged)
    assert found[0].details["accuracy"] == 1 and sum(b["n"] for b in found[0].details["bins"]) == 60
    # Nuclei of 6 to 9 px radius are no nuclei of 900 px: the reference is of other cells.
    assert found[1].passed is False and "another scale" in found[1].reason
    assert set(found[1].details["by_class"]) == {"DMSO", "small"}
    few = calibration.calibration(bench(folder, {"moa": MechanismOfAction()}, pool=30))
    assert few[0].passed is None and "too few" in few[0].reason


def test_every_check_can_be_repeated(folder: Path) -> None:
    def again() -> list[Finding]:
        judged: Bench = bench(folder, {"nucleus_count": Counting()})
        return [*oracle.oracle(judged), *exploits.missing_biology(judged)]

    assert [one.document() for one in again()] == [one.document() for one in again()]
