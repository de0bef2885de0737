"""`biorewards validate`: the bench, finished checks, pages and the command."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from exact import assay as exact_assay
from PIL import Image
from test_report import CHROMIUM, chromium
from validate_toys import Counting, Fails, bench, write_folder

from biorewards.assay import Assay
from biorewards.audit.lesions import LESIONS
from biorewards.io.manifest import ManifestError, read_manifest
from biorewards.phantom import write_dataset
from biorewards.reward import Suite
from biorewards.rewards import ReferenceReward, suite
from biorewards.validate import CHECKS, Bench, Finding, not_judged
from biorewards.validate.page import card_document, render, render_card, write_pages
from biorewards.validate.run import Validation, validate
from cli.main import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("validate") / "real", 40)


def test_findings_survive_json() -> None:
    found = Finding("oracle", None, "What.", 0.5, (0.1, math.nan), ">= 0.9", False, 7, "why", {"a": [np.float64(1.0)]})
    read = Finding.read(json.loads(json.dumps(found.document())))
    assert read.interval is not None and math.isnan(read.interval[1]) and read.interval[0] == 0.1
    assert (read.value, read.passed, read.details) == (0.5, False, {"a": [1.0]})
    with pytest.raises(ValueError, match="wants a reason"):
        Finding("oracle", None, "What.", None, None, ">= 1", None, 0)
    assert not_judged("oracle", "moa", "What.", ">= 1", "no classifier").passed is None


def test_an_image_is_scored_once(folder: Path, tmp_path: Path) -> None:
    judge = Counting()
    first = bench(folder, {"nucleus_count": judge}, shelf=tmp_path / "kept")
    real = first.real()
    asked = judge.calls
    assert asked == math.ceil(40 / 16) and len(real) == 40
    again = first.score(first.images(range(10)), first.target[:10])
    assert judge.calls == asked, "pixels and targets were known"
    pd.testing.assert_frame_equal(again.value, real.value.iloc[:10])
    first.score(first.images([0, 0, 0]), 1 - first.target[[0, 0, 0]])
    assert judge.calls == asked + 1 and judge.crops == 16 * (asked + 1), "under another label it is another question"
    # Another process finds the scores on disk.
    later = bench(folder, {"nucleus_count": Fails()}, shelf=tmp_path / "kept")
    pd.testing.assert_frame_equal(later.real().value, real.value)
    assert first.fingerprint == later.fingerprint != bench(folder, {"nucleus_count": judge}, seed=1).fingerprint


def test_scores_do_not_depend_on_company(folder: Path) -> None:
    alone, together = bench(folder), bench(folder)
    whole = together.real()
    for row in (0, 17, 39):
        one = alone.real([row])
        pd.testing.assert_frame_equal(one.value, whole.value.iloc[[row]].reset_index(drop=True))
        assert np.array_equal(one.encoded.probabilities[0], whole.encoded.probabilities[row])


def test_what_has_no_value_is_told_from_what_shows_nothing(folder: Path) -> None:
    judged = bench(folder)
    images = torch.stack([torch.zeros(3, 64, 64), judged.images([0])[0]])
    scores = judged.score(images, [0, -1])
    assert scores.scored("nucleus_count").tolist() == [True, False]
    assert scores.valid("nucleus_count").tolist() == [False, False] and scores.valid("nucleus_in_cytoplasm")[1]
    total = scores.total(judged.suite.weights)
    assert np.isfinite(total[0]) and np.isnan(total[1])


def test_the_unit_has_a_floor(folder: Path) -> None:
    judged = bench(folder)
    assert judged.spread("nucleus_in_cytoplasm") == pytest.approx(0.02)  # toy nuclei lie wholly inside
    assert judged.spread("nucleus_count") == pytest.approx(judged.real().value["nucleus_count"].std())


def test_what_cannot_be_used_is_told(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "a")
    table = pd.read_csv(tmp_path / "a" / "index.csv", dtype=str, keep_default_na=False)
    table.loc[0, "moa"] = "no such class"
    table.to_csv(tmp_path / "a" / "index.csv", index=False)
    (tmp_path / "a" / "1.npy").write_bytes(b"broken")
    np.save(tmp_path / "a" / "2.npy", np.zeros((3, 80, 80), np.float32))
    judged = bench(tmp_path / "a")
    assert len(judged) == 37
    said = " ".join(judged.notes)
    assert "no such class" in said and "1 of 39 real images cannot be read" in said and "another size" in said
    (tmp_path / "b").mkdir()
    np.save(tmp_path / "b" / "x.npy", np.zeros((3, 64, 64), np.float32))
    with pytest.raises(ManifestError, match="no labelled real image"):
        bench(tmp_path / "b")


def test_masks_of_a_phantom_are_the_true_ones(command_line: tuple[Path, Path]) -> None:
    assay, real = command_line
    judged = Bench.build(Assay.load(assay), read_manifest(real))
    assert judged.exact_masks and len(judged) == 26
    masks = judged.masks(range(26))
    for k, file in enumerate(judged.rows["file"]):
        with np.load(real / "masks" / Path(file).with_suffix(".npz")) as true:
            assert np.array_equal(masks.nuclei[k], true["nuclei"]) and np.array_equal(masks.cells[k], true["cells"])


def test_finished_checks_are_not_run_again(folder: Path, tmp_path: Path) -> None:
    ran = []

    def check(judged: Bench) -> list[Finding]:
        ran.append(judged.seed)
        return [Finding("mine", None, "Fine.", 1.0, None, ">= 1", True, 3)]

    said: list[tuple[str, str]] = []
    kept = {"folder": tmp_path, "progress": lambda name, what: said.append((name, what))}
    first = validate(bench(folder), {"mine": check}, **kept)  # type: ignore[arg-type]
    second = validate(bench(folder), {"mine": check}, **kept)  # type: ignore[arg-type]
    assert ran == [0] and first.document() == second.document() and said[-1] == ("mine", "reused")
    validate(bench(folder, seed=5), {"mine": check}, folder=tmp_path)
    assert ran == [0, 5], "another seed is another result"
    (tmp_path / "mine.json").write_text("{broken", encoding="utf-8")
    validate(bench(folder), {"mine": check}, folder=tmp_path)
    assert ran == [0, 5, 0]
    with pytest.raises(ValueError, match="no check 'other'; there are mine"):
        validate(bench(folder), {"mine": check}, ["other"])


@pytest.fixture
def found(folder: Path) -> tuple[Validation, Bench]:
    """Findings of every kind."""
    judged = bench(folder)
    doses = {"doses": [0, *LESIONS["erase_nuclei"].doses], "unit": "share of nuclei", "lesion": "erase_nuclei",
             "value": [-1, -2, -4, -8, -12, -20, -25], "low": [-1.5, -3, -5, -9, -14, -22, None],
             "high": [-0.5, -1, -3, -7, -10, -18, None]}  # fmt: skip
    shares = {"responses": {"erase_nuclei": 6.0, "grow_nuclei": 0.2}, "shares": {"grow_nuclei": 0.02}, "explained": {}}
    other = {"responses": {"erase_nuclei": 5.0, "grow_nuclei": 4.0}, "shares": {"erase_nuclei": 0.9},
             "explained": {"erase_nuclei": "The largest nucleus may be the one that is gone"}}  # fmt: skip
    findings = {
        "oracle": [not_judged("oracle", "moa", "Wins <b>often</b>.", ">= 0.5", "no classifier & no label")],
        "dose_response": [
            Finding("dose_response", "nucleus_count", "Falls.", 1.0, (0.95, 1.0), ">= 0.9", True, 40, "", doses),
            Finding(
                "dose_response", "nucleus_count", "Wins.", 0.62, (0.5, 0.7), ">= 0.9", False, 40, "it sees it badly"
            ),
        ],
        "specificity": [
            Finding("specificity", "nucleus_count", "Share.", 0.02, (0.0, 0.1), "<= 0.33", True, 40, "", shares),
            Finding("specificity", "nucleus_size", "Share.", 0.02, (0.0, 0.1), "<= 0.33", True, 40, "", other),
            Finding("specificity", None, "Blind.", 1.0, None, "<= 0", False, 40, "unseen: blend"),
        ],
    }
    return Validation(findings, validate(judged, {}).about), judged


def test_pages_stand_alone_and_put_failures_first(found: tuple[Validation, Bench], tmp_path: Path) -> None:
    validation, judged = found
    write_pages(tmp_path, validation, judged.assay, judged.suite, {"command": "biorewards validate <x>"})
    pages = [tmp_path / "validate.html", *(tmp_path / "cards" / f"{name}.html" for name in judged.suite.rewards)]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"<script|<link|src=|https?://|url\(", text) and "<b>often" not in text
        assert len(text) < 60_000
    summary = pages[0].read_text(encoding="utf-8")
    assert "Dose-response: Number of nuclei: it sees it badly." in summary
    assert "The largest nucleus may be the one that is gone." in summary and "No reward answers to: blend" in summary
    assert summary.count("<polyline") == 1 and "2 of 5 figures" not in summary and "3 of 5 figures pass" in summary
    card = (tmp_path / "cards" / "nucleus_count.html").read_text(encoding="utf-8")
    assert card.index("It sees it badly") > card.index("Context of use") and "Not for diagnosis" in card
    assert card.index('id="failed"') < card.index('id="passed"')
    data = json.loads((tmp_path / "cards" / "nucleus_count.json").read_text(encoding="utf-8"))
    assert [one["passed"] for one in data["findings"]] == [False, True, True]
    assert data == json.loads(json.dumps(card_document(validation, judged.assay, judged.suite, "nucleus_count")))
    whole = json.loads((tmp_path / "validate.json").read_text(encoding="utf-8"))
    assert (whole["failed"], whole["passed"], whole["not_judged"]) == (2, 3, 1)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_chromium_draws_the_pages(found: tuple[Validation, Bench], tmp_path: Path) -> None:
    validation, judged = found
    for name, text in (
        ("summary", render(validation, judged.assay, {})),
        ("card", render_card(validation, judged.assay, judged.suite, "nucleus_count", {})),
    ):
        page = tmp_path / f"{name}.html"
        page.write_text(text, encoding="utf-8")
        picture = tmp_path / f"{name}.png"
        done = chromium(tmp_path, page, f"--screenshot={picture}", "--window-size=1300,2600")
        assert "CONSOLE" not in done.stderr
        pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
        # The curve's line and band are drawn in the page's blue.
        assert (np.abs(pixels - [11, 106, 162]).max(2) < 12).sum() > 200


def test_every_check_has_words() -> None:
    from biorewards.validate.wording import CHECK_WORDS, LIMITS

    assert set(CHECKS) <= set(CHECK_WORDS)
    assert set(LIMITS) == set(suite(exact_assay()).rewards)


class Always(ReferenceReward):
    """A reward for the command line: the number of nuclei, but 0 for a crop without one."""

    def __init__(self) -> None:
        super().__init__("nucleus_count")

    def __repr__(self) -> str:
        return "Always()"


@pytest.fixture(scope="module")
def command_line(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An assay folder with the classical segmenter, and 26 phantom crops."""
    root = tmp_path_factory.mktemp("cli")
    write_dataset(root / "real", 26, 48, 2)
    classes = sorted(set(pd.read_csv(root / "real" / "index.csv")["ANNOT"]), key=lambda name: name != "DMSO")
    rows = exact_assay().statistics.query("`class` == 'DMSO'")
    known = pd.concat([rows.assign(**{"class": name}) for name in classes])
    Assay(
        name="plain", channels={"actin": 0, "tubulin": 1, "dna": 2}, pixel_size=None, crop_size=48,
        intensity=dict.fromkeys(("actin", "tubulin", "dna"), (0.03, 0.6)), classes=classes, compounds={},
        nucleus_diameter=18.0, statistics=known, segmenter_name="classical",
    ).save(root / "assay")  # fmt: skip
    return root / "assay", root / "real"


def test_the_command(command_line: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assay, real = command_line
    args = ["validate", "--assay", str(assay), "--real", str(real), "--n", "8", "--device", "cpu"]
    collapse = [*args, "--out", str(tmp_path / "out"), "--check", "variance_collapse"]
    status = run(collapse)
    said = capsys.readouterr()
    answer = json.loads((tmp_path / "out" / "validate.json").read_text(encoding="utf-8"))
    assert status == (1 if answer["failed"] else 0) and "26 real images" in said.err
    assert "variance_collapse: " in said.err and "validate.html" in said.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "validate.html",
        "validate.json",
        "cards",
        "finished",
    }
    assert len(list((tmp_path / "out" / "cards").iterdir())) == 14
    # Again: nothing is judged, the answer is the same, and --json prints it alone.
    assert run([*collapse, "--json"]) == status
    said = capsys.readouterr()
    assert json.loads(said.out) == answer and "reused; 0 images judged" in said.err
    # Too few images for any verdict: nothing fails.
    assert run([*args, "--check", "calibration"]) == 0
    assert "could not be judged" in capsys.readouterr().out
    assert run([*args, "--check", "calibration", "--reward", "test_validate:Always"]) == 0


def test_wrong_usage(command_line: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assay, real = command_line
    args = ["validate", "--assay", str(assay), "--real", str(real)]
    assert run([*args, "--check", "melting"]) == 2
    assert "no check 'melting'; there are oracle, invariance" in capsys.readouterr().err
    assert run(["validate", "--assay", str(assay), "--real", str(real / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert run([*args, "--reward", "nowhere"]) == 2 and "MODULE:NAME" in capsys.readouterr().err
    assert run(["validate", "--help"]) == 0
    assert "Exit status" in capsys.readouterr().out


def test_weights_follow_the_suite(folder: Path) -> None:
    judge = Suite([ReferenceReward("nucleus_count"), ReferenceReward("nucleus_size")], {"nucleus_size": 3.0}, "x")
    assert bench(folder, judge).suite.weights == {"nucleus_count": 1.0, "nucleus_size": 3.0}  # type: ignore[arg-type]
