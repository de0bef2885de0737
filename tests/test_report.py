"""The HTML report: its numbers, its pictures, and what hostile or empty input does to it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import escape
from PIL import Image
from skimage.filters import gaussian
from skimage.measure import label as components
from torch import Tensor

from biorewards import Assay, Suite, score_folder, suite
from biorewards.assay import TREATED
from biorewards.io.images import FloatImage, ImageError, read_image
from biorewards.io.manifest import Manifest, read_manifest
from biorewards.phantom import CLASSES, COMPOUNDS
from biorewards.report import crops, figures, wording, write_report
from biorewards.reward import Reason
from biorewards.scoring import summarise
from biorewards.segmentation.segmenter import Masks

DEMO = Path(__file__).resolve().parents[1] / "biorewards" / "assets" / "demo" / "phantom"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Threshold:
    """Connected bright regions: quick, and good enough to have outlines to draw."""

    name = fingerprint = "threshold"

    def to(self, device: torch.device | str) -> Threshold:
        return self

    def __call__(self, nucleus: Tensor | None, cytoplasm: Tensor | None, diameter: float) -> Masks:
        assert nucleus is not None and cytoplasm is not None
        return Masks(_regions(nucleus, 0.35), _regions(cytoplasm.amax(1), 0.15))


def _regions(images: Tensor, level: float) -> Tensor:
    found = [components(gaussian(image, 2) > level).astype(np.int32) for image in images.numpy()]
    return torch.from_numpy(np.stack(found))


class Flat:
    """A classifier that knows nothing."""

    classes = tuple(CLASSES)
    fingerprint = "flat"

    def to(self, device: torch.device | str) -> Flat:
        return self

    def __call__(self, images: Tensor) -> Tensor:
        return torch.full((len(images), len(self.classes)), 1 / len(self.classes))


def make_assay() -> Assay:
    known = {
        "nucleus_in_cytoplasm": (0.97, 0.03),
        "nucleus_roundness": (0.85, 0.08),
        "nucleus_size": (120.0, 50.0),
        "cytoplasm_size": (400.0, 150.0),
        "nucleus_count": (2.2, 1.1),
        "cytoplasm_count": (1.5, 0.8),
    }
    rows = []
    for number, name in enumerate([*CLASSES, TREATED]):
        for measure, (mean, sd) in known.items():
            moved = mean * (1 if measure == "nucleus_in_cytoplasm" else 0.85 + 0.025 * number)
            z = {"q05": -1.6, "q25": -0.7, "q50": 0.0, "q75": 0.7, "q95": 1.6}
            spread = {quantile: moved + sd * value for quantile, value in z.items()}
            # The last treated class has too few images for a reference of its own.
            n = 8 if number == len(CLASSES) - 1 else 200
            rows.append(
                {"class": name, "measure": measure, "mean": moved, "sd": sd, "n": n, "origin": "images", **spread}
            )
    real = {name: {"mean": -1.0, "n": 400} for name in known if name != "nucleus_in_cytoplasm"}
    return Assay(
        name="report-test",
        channels={"actin": 0, "tubulin": 1, "dna": 2},
        pixel_size=0.32,
        crop_size=96,
        intensity={"actin": (0.02, 0.6), "tubulin": (0.02, 0.6), "dna": (0.02, 0.7)},
        classes=list(CLASSES),
        compounds={name: compound.effect for name, compound in COMPOUNDS.items()},
        nucleus_diameter=35.0,
        statistics=pd.DataFrame(rows),
        segmenter_name="threshold",
        card={"images": 2400, "real_scores": real | {"nucleus_in_cytoplasm": {"mean": 0.98, "n": 400}}},
        classifier=Flat(),  # type: ignore[arg-type]
        segmenter=Threshold(),
        fingerprint="0123456789abcdef",
    )


class Case(NamedTuple):
    """A scored data set and what `write_report` wants of it."""

    scores: pd.DataFrame
    assay: Assay
    manifest: Manifest
    suite: Suite

    def read(self, row: int) -> FloatImage:
        return read_image(self.manifest.files[row][0], 3)

    def write(
        self, path: Path, scores: pd.DataFrame | None = None, read: Callable[[int], FloatImage] | None = None
    ) -> tuple[str, dict[str, Any]]:
        table = self.scores if scores is None else scores
        summary = summarise(table, self.assay, self.suite)
        write_report(
            path,
            table,
            assay=self.assay,
            manifest=table,
            read=self.read if read is None else read,
            suite=self.suite,
            summary=summary,
            settings={"source": "demo/phantom", "command": "biorewards score demo/phantom", "batch size": 16},
        )
        return path.read_text(encoding="utf-8"), summary


@pytest.fixture(scope="module")
def case() -> Case:
    manifest = read_manifest(DEMO)
    assay = make_assay()
    judge = suite(assay)
    return Case(score_folder(manifest, assay, judge, workers=1).scores, assay, manifest, judge)


@pytest.fixture(scope="module")
def plain(case: Case, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    """The report of the demo set: file, text, summary."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    return path, *case.write(path)


class Page(HTMLParser):
    """Tags, attributes, ids, and the cells of every table of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.tables: list[list[list[str]]] = []
        self._cell: list[str] | None = None
        self.feed(text)

    @property
    def ids(self) -> list[str]:
        return [value for name, value in self.attributes if name == "id"]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self.tables[-1][-1].append("".join(self._cell).strip())
            self._cell = None


def test_page_holds_the_summary_of_the_table(case: Case, plain: tuple[Path, str, dict[str, Any]]) -> None:
    _, text, summary = plain
    page = Page(text)
    rows = {row[0].split()[-1]: row for row in page.tables[0][1:]}
    assert list(rows) == [*case.suite.rewards, "total", "total_label_free"]
    for name, row in rows.items():
        value = case.scores[f"Reward_{name}"]
        assert row[1] == str(value.notna().sum())
        assert row[2] == wording.number(float(value.mean()))
        assert row[4] == wording.number(summary["rewards"][name]["real_mean"])
        assert row[6] == str(value.isna().sum())
    for name in case.suite.rewards:
        assert f"reward-{name}" in page.ids
        assert wording.WORDINGS[name].title in text
    assert case.suite.fingerprint in text


def test_page_holds_every_class_and_reason(case: Case, plain: tuple[Path, str, dict[str, Any]]) -> None:
    page = Page(plain[1])
    classes = {row[0]: row for row in page.tables[1][1:]}
    assert list(classes) == [name for name in case.assay.classes if name in set(case.scores["Metadata_MoA"])]
    for name, row in classes.items():
        part = case.scores[case.scores["Metadata_MoA"] == name]
        assert row[1] == str(len(part))
        assert row[2] == wording.number(float(part["Reward_moa"].mean()))
    reasons = {row[0]: row for row in page.tables[2][1:]}
    for name, row in reasons.items():
        counted = [int((case.scores[f"Reason_{reward}"] == name).sum()) for reward in case.suite.rewards]
        assert [int(text) for text in row[1:-1]] == counted
        assert row[-1] == wording.REASONS[Reason[name]]
    assert {"OK", "BLANK", "POOLED_REFERENCE"} <= set(reasons)


def test_page_loads_nothing(plain: tuple[Path, str, dict[str, Any]]) -> None:
    text = plain[1]
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("href", "src", "xlink:href"):
            assert value.startswith(("#", "data:image/jpeg;base64,"))
    assert len(page.ids) == len(set(page.ids))
    targets = {value[1:] for name, value in page.attributes if name == "href" and value.startswith("#")}
    assert targets <= set(page.ids)


def test_same_input_same_bytes(case: Case, plain: tuple[Path, str, dict[str, Any]], tmp_path: Path) -> None:
    case.write(tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == plain[0].read_bytes()


@pytest.mark.parametrize(
    "nasty", ["<script>alert(1)</script>.png", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}{% x %}"]
)
def test_text_from_outside_stays_text(
    nasty: str, case: Case, plain: tuple[Path, str, dict[str, Any]], tmp_path: Path
) -> None:
    scores = case.scores.assign(Metadata_File=nasty, Metadata_Error=nasty)
    scores.loc[:4, [f"Reason_{name}" for name in case.suite.rewards]] = "BAD_IMAGE"
    scores.loc[5:, "Metadata_MoA"] = nasty
    text, _ = case.write(tmp_path / "report.html", scores)
    ours, hostile = Page(plain[1]), Page(text)
    assert set(hostile.tags) <= set(ours.tags) | {"ul", "li"}
    assert {name for name, _ in hostile.attributes} <= {name for name, _ in ours.attributes}
    assert text.count(str(escape(nasty))) > 20


def test_unreadable_files_are_listed(case: Case, tmp_path: Path) -> None:
    scores = case.scores.copy()
    numbers = [name for name in scores if name.startswith(("Reward_", "Measure_"))]
    scores.loc[[3, 7], numbers] = np.nan
    scores.loc[[3, 7], [f"Reason_{name}" for name in case.suite.rewards]] = "BAD_IMAGE"
    scores.loc[[3, 7], "Metadata_Error"] = "the file ends early"
    text, _ = case.write(tmp_path / "report.html", scores)
    assert f"2 of {len(scores)} files could not be read" in text
    assert text.count("the file ends early") == 2
    assert str(scores.at[7, "Metadata_File"]) in text


def test_a_file_that_is_gone_leaves_a_note(case: Case, tmp_path: Path) -> None:
    def gone(row: int) -> FloatImage:
        raise ImageError("cells/a.png", "does not exist any more")

    text, _ = case.write(tmp_path / "report.html", read=gone)
    assert "does not exist any more" in text
    assert "<image" not in text


def test_images_of_several_sizes(case: Case, tmp_path: Path) -> None:
    def read(row: int) -> FloatImage:
        image = case.read(row)
        return image if row % 2 else np.tile(image, (1, 5, 4))

    text, _ = case.write(tmp_path / "report.html", read=read)
    sizes = set(re.findall(r'<image id="crop-\d+" width="(\d+)" height="(\d+)"', text))
    assert sizes == {("96", "96"), ("154", "192")}


def test_without_labels(case: Case, tmp_path: Path) -> None:
    scores = case.scores.assign(Metadata_MoA="", Metadata_Compound="")
    for name in case.suite.rewards:
        if name != "nucleus_in_cytoplasm":
            scores[f"Reward_{name}"] = np.float32(np.nan)
            scores[f"Reason_{name}"] = "NO_TARGET"
    scores["Reward_total"] = np.float32(np.nan)
    text, _ = case.write(tmp_path / "report.html", scores)
    page = Page(text)
    assert [row[0].split()[-1] for row in page.tables[0][1:]][-1] == "total_label_free"
    assert "reward-total_label_free" in page.ids
    assert "have no label" in text
    assert "(no label)" in text


@pytest.mark.parametrize("rows", [1, 2])
def test_few_rows(rows: int, case: Case, tmp_path: Path) -> None:
    text, _ = case.write(tmp_path / "report.html", case.scores.head(rows))
    assert Page(text).tables[0][1][1] == str(rows)


def test_nothing_readable(case: Case, tmp_path: Path) -> None:
    scores = case.scores.copy()
    scores[[name for name in scores if name.startswith(("Reward_", "Measure_"))]] = np.float32(np.nan)
    scores[[f"Reason_{name}" for name in case.suite.rewards]] = "BAD_IMAGE"
    text, _ = case.write(tmp_path / "report.html", scores)
    assert "No image has this reward." in text


def test_a_reward_of_the_users_own(case: Case, tmp_path: Path) -> None:
    class Brightness:
        name = "my_brightness"

    own = Suite([Brightness()])  # type: ignore[list-item]
    scores = case.scores[[name for name in case.scores if name.startswith("Metadata_")]].copy()
    scores["Reward_my_brightness"] = np.linspace(0, 3, len(scores), dtype=np.float32)
    scores["Reward_total"] = scores["Reward_my_brightness"]
    scores["Reward_total_label_free"] = np.float32(0)
    scores["Reason_my_brightness"] = "OK"
    scores["Measure_my_brightness"] = scores["Reward_my_brightness"]
    text, _ = case._replace(suite=own).write(tmp_path / "report.html", scores)
    assert "My brightness" in text


def test_many_rows_stay_small(case: Case, tmp_path: Path) -> None:
    scores = pd.concat([case.scores] * 220, ignore_index=True)
    case.write(tmp_path / "report.html", scores, read=lambda row: case.read(row % len(case.scores)))
    assert len(scores) > 18_000
    assert (tmp_path / "report.html").stat().st_size < 2 * 2**20


def test_rows_must_match(case: Case, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the same images"):
        write_report(
            tmp_path / "report.html", case.scores, assay=case.assay, manifest=case.scores.head(3), read=case.read,
            suite=case.suite, summary={}, settings={},
        )  # fmt: skip
    assert not (tmp_path / "report.html").exists()


def test_best_and_worst_are_the_best_and_the_worst() -> None:
    value = pd.Series([0.1, np.nan, 0.9, 0.5, 0.7, 0.3, 0.2, 0.8, 0.6, 0.4])
    nothing = pd.Series(np.zeros(10, bool))
    assert crops.best_and_worst(value, nothing) == ([2, 7, 4, 8], [0, 6, 5, 9])
    assert crops.best_and_worst(value.head(3), nothing.head(3)) == ([2], [0])
    assert crops.best_and_worst(value * np.nan, nothing) == ([], [])


def test_blanks_do_not_hide_the_others() -> None:
    value = pd.Series([-25.0] * 6 + [-9.0, -8.0, -7.0, -1.0, -0.5, -0.1, 0.0])
    nothing = pd.Series([True] * 6 + [False] * 7)
    assert crops.best_and_worst(value, nothing)[1] == [0, 1, 6, 7]
    assert crops.best_and_worst(value.head(7), nothing.head(7))[1] == [3, 4, 5]
    assert crops.best_and_worst(value.head(6), nothing.head(6))[1] == [3, 4, 5]


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_outline_encloses_the_object(scale: float) -> None:
    y, x = np.mgrid[:60, :60]
    labels = np.where((y - 20) ** 2 + (x - 25) ** 2 <= 144, 3, 0).astype(np.int32)
    labels[50:, 50:] = 7  # cut by the border
    paths = crops.outline(labels, scale).split("Z")[:-1]
    areas = []
    for path in paths:
        points = np.array([pair.split(",") for pair in path[1:].split()], float)
        px, py = points.T
        areas.append(abs(np.dot(px, np.roll(py, 1)) - np.dot(py, np.roll(px, 1))) / 2 / scale**2)
        assert points.min() >= 0 and points.max() <= 60 * scale
    assert areas == pytest.approx([(labels == 3).sum(), 100], rel=0.1)
    assert crops.outline(np.zeros((8, 8), np.int32), 1.0) == ""


def test_composite_colours() -> None:
    image = np.zeros((3, 1, 4), np.float32)
    image[0, 0, 0] = image[1, 0, 1] = 0.6
    image[2, 0, 2] = 0.36
    image[:, 0, 3] = np.nan
    shown = crops.composite(image, make_assay())[0]
    assert shown.tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 128], [0, 0, 0]]


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_round_and_inside(low: float, width: float) -> None:
    marks = figures.ticks(low, low + width)
    assert 2 <= len(marks) <= 13
    assert all(low - 1e-6 * width <= mark <= low + width * (1 + 1e-6) for mark in marks)
    steps = np.diff(marks)
    assert np.allclose(steps, steps[0], rtol=1e-3)


def test_figure_puts_numbers_where_they_belong() -> None:
    measure = pd.Series([*np.linspace(0, 100, 101), 50.0, np.nan])
    group = pd.Series(["a"] * 101 + ["b"] * 2)
    real = pd.DataFrame({"q05": [10.0], "q25": [40.0], "q50": [50.0], "q75": [60.0], "q95": [90.0]}, index=["a"])
    figure = figures.distribution(measure, -measure, group, real, ["b", "a", "c"], "px")
    assert figure is not None
    assert [row.label for row in figure.rows] == ["b", "a"]
    first, second = figure.rows
    assert first.band is None and second.band is not None
    scale = (second.band[4] - second.band[0]) / 80  # SVG units a unit of the measure
    assert second.box[2] == pytest.approx(second.band[2], abs=0.2)
    assert second.box[3] - second.box[1] == pytest.approx(50 * scale, abs=0.3)
    assert second.band[2] - second.band[1] == pytest.approx(10 * scale, abs=0.2)
    assert (second.n, first.n) == (101, 1)
    assert second.mean == pytest.approx(-50) and first.mean == pytest.approx(-50)
    assert len(second.points) == figures.POINTS
    assert all(figure.left <= x <= figure.right for row in figure.rows for x, _ in row.points)
    assert figures.distribution(measure * np.nan, measure, group, real, ["a"], "px") is None


def test_figure_shows_the_worst_of_many_classes() -> None:
    names = [f"class {k:03d}" for k in range(100)]
    value = pd.Series(np.arange(100.0))
    figure = figures.distribution(value, value, pd.Series(names), make_assay().statistics.head(0), names, "px")
    assert figure is not None
    assert [row.label for row in figure.rows] == names[: figures.CLASSES]
    assert figure.left_out == 70


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (float("nan"), "–"), (-0.001, "0.00"), (-1.0, "−1.00"), (12.34, "12.3"), (1234.5, "1\u202f234")],
)
def test_numbers_are_readable(value: float | None, text: str) -> None:
    assert wording.number(value) == text


def test_shares_are_readable() -> None:
    assert [wording.percent(share) for share in (0.0, 0.0001, 0.05, 0.5, None)] == [
        "0\u00a0%", "< 0.1\u00a0%", "5.0\u00a0%", "50\u00a0%", "–",
    ]  # fmt: skip


def test_every_reason_has_words() -> None:
    assert set(wording.REASONS) == set(Reason)


def chromium(tmp_path: Path, page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}")  # fmt: skip
    command = [CHROMIUM, *quiet, *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_chromium_draws_the_page(plain: tuple[Path, str, dict[str, Any]], tmp_path: Path) -> None:
    done = chromium(tmp_path, plain[0], f"--screenshot={tmp_path / 'page.png'}", "--window-size=1300,6000")
    assert "CONSOLE" not in done.stderr
    picture = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    assert picture.shape[:2] == (6000, 1300)
    saturated = picture.max(2) - picture.min(2) > 100
    # Crops are colourful and are drawn in every section: some of the lower page must be, too.
    assert saturated[:3000].mean() > 0.005 and saturated[3000:].mean() > 0.005
    # The outlines: Chromium draws the cell colour where the style sheet says so.
    assert (np.abs(picture - [79, 227, 255]).max(2) < 12).sum() > 200


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_chromium_reports_an_error_where_there_is_one(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<!doctype html><script>console.error('broken')</script>", encoding="utf-8")
    assert "CONSOLE" in chromium(tmp_path, page, "--dump-dom").stderr
