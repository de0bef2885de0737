"""The phantom assay: same bytes twice, masks that hold, a layout others can read, and effects as large as real ones."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from skimage.measure import label as connected
from skimage.measure import regionprops_table
from skimage.segmentation import expand_labels

from biorewards.phantom import CLASSES, COMPOUNDS, PIXEL_SIZE_UM, Plate, render_dataset, render_field, write_dataset
from biorewards.phantom.classes import DOSE_STRENGTH, PROFILE, PROFILE_FEATURES
from biorewards.phantom.dataset import sample_path

SMALL = 40


@lru_cache(maxsize=1)
def small():
    return render_dataset(SMALL, 48, seed=3)


def test_same_seed_same_bytes_and_other_seed_other_bytes():
    first, second, other = small(), render_dataset(SMALL, 48, seed=3), render_dataset(12, 48, seed=4)
    for a, b in zip(first[:3], second[:3], strict=True):
        assert a.tobytes() == b.tobytes()
    pd.testing.assert_frame_equal(first.rows, second.rows)
    assert not np.array_equal(first.images[0], other.images[0])


def test_a_crop_does_not_depend_on_how_many_are_asked_for():
    few, many = small(), render_dataset(2 * SMALL, 48, seed=3)
    place = {key: i for i, key in enumerate(many.rows["SAMPLE_KEY"])}
    common = [(i, place[key]) for i, key in enumerate(few.rows["SAMPLE_KEY"]) if key in place]
    assert len(common) > SMALL // 2
    for i, j in common:
        assert np.array_equal(few.images[i], many.images[j]) and np.array_equal(few.cells[i], many.cells[j])


@pytest.mark.parametrize("effect", list(CLASSES))
def test_masks_of_a_field_hold(effect):
    field = render_field(np.random.default_rng(5), (240, 260), effect)
    assert field.image.shape == (240, 260, 3) and field.image.dtype == np.uint8
    for labels in field[1:]:
        assert labels.shape == (240, 260) and labels.dtype == np.int32
        present = np.unique(labels)
        assert np.array_equal(present, np.arange(len(present)))  # 0 = background, then 1..n without gaps
    assert not (field.nuclei > 0)[field.cells == 0].any()
    # A nucleus lies in ONE cell, and is one piece unless something lies on it.
    pairs = np.unique(np.stack([field.nuclei, field.cells], -1)[field.nuclei > 0], axis=0)
    assert len(pairs) == field.nuclei.max()
    parts = connected(field.nuclei, connectivity=2)
    assert parts.max() <= field.nuclei.max() * 1.15 + 1
    # What is called a nucleus is bright in DAPI, what is called a cell is brighter than the ground, in all channels.
    image = field.image.astype(float)
    assert image[..., 2][field.nuclei > 0].mean() > 4 * image[..., 2][field.nuclei == 0].mean()
    for channel in (0, 1):
        assert image[..., channel][field.cells > 0].mean() > 1.5 * image[..., channel][field.cells == 0].mean()


def test_crops_are_centred_on_a_nucleus():
    crops = small()
    assert (crops.nuclei[:, 22:27, 22:27] > 0).any((1, 2)).mean() > 0.97
    assert (crops.nuclei[:, 24, 24] > 0).mean() > 0.9
    assert crops.nuclei.reshape(SMALL, -1).max(1).min() >= 1


def test_masks_of_crops_are_renumbered_and_hold_no_slivers():
    crops = small()
    for nuclei, cells in zip(crops.nuclei, crops.cells, strict=True):
        for labels in (nuclei, cells):
            area = np.bincount(labels.ravel())[1:]
            assert (area >= 15 / 4).all()
        assert ((nuclei > 0) & (cells == 0)).sum() <= 15


def test_smaller_sizes_show_the_same_view_at_a_coarser_pixel():
    fields = {
        size: render_field(np.random.default_rng(8), (n, n), pixel=96 / size)
        for size, n in ((96, 240), (64, 160), (48, 120))
    }
    for size in (64, 48):
        factor = (96 / size) ** 2
        for full, coarse in zip(fields[96][1:], fields[size][1:], strict=True):
            assert abs(coarse.max() - full.max()) <= 1  # one sliver more or less
            assert (coarse > 0).sum() * factor == pytest.approx((full > 0).sum(), rel=0.02)
        assert fields[size].image.mean((0, 1)) == pytest.approx(fields[96].image.mean((0, 1)), rel=0.02)
    assert PIXEL_SIZE_UM == {96: 0.32, 64: 0.48, 48: 0.64}


def test_density_spread_and_touching_do_what_they_say():
    def draw(**options):
        fields = [render_field(np.random.default_rng(i), (300, 300), plate=Plate(), **options) for i in range(3)]
        cells = sum(f.cells.max() for f in fields)
        cover = np.mean([(f.cells > 0).mean() for f in fields])
        gaps = 0
        for f in fields:
            right, down = f.nuclei[:, :-1] * f.nuclei[:, 1:] > 0, f.nuclei[:-1] * f.nuclei[1:] > 0
            gaps += ((f.nuclei[:, :-1] != f.nuclei[:, 1:]) & right).sum() + (
                (f.nuclei[:-1] != f.nuclei[1:]) & down
            ).sum()
        return cells, cover, gaps

    cells, cover, contact = draw()
    assert draw(density=4.0)[0] > 1.5 * cells and draw(density=0.4)[0] < 0.5 * cells
    assert draw(spread=2.0)[1] > cover > draw(spread=0.5)[1] + 0.2
    assert draw(touching=0.8)[2] > 1.5 * contact > 3 * draw(touching=0.0)[2]


@pytest.mark.parametrize("seed", range(9))
def test_odd_shapes_and_settings_render(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(1, 130, 2))
    field = render_field(
        rng, shape, None, density=[None, 0.01, 8.0][seed % 3], pixel=[1.0, 1.5, 2.0][seed // 3], touching=seed % 2
    )
    assert field.image.shape == (*shape, 3) and field.nuclei.shape == field.cells.shape == shape


def test_unknown_effect_size_and_number_are_errors():
    with pytest.raises(ValueError, match="actin_collapse"):
        render_field(np.random.default_rng(0), effect="Actin disruptors")
    with pytest.raises(ValueError, match="48, 64, 96"):
        render_dataset(1, 50)
    with pytest.raises(ValueError, match="at least one"):
        render_dataset(0)


def test_plates_hold_all_classes_and_splits_go_by_plate():
    rows = render_dataset(1000, 48, seed=1).rows
    assert next(iter(CLASSES)) == "DMSO" and len(CLASSES) == 13
    assert rows["SAMPLE_KEY"].is_unique
    assert (rows.groupby("PLATE")["SPLIT"].nunique() == 1).all() and set(rows["SPLIT"]) == {"train", "val", "test"}
    assert (rows.groupby("PLATE")["ANNOT"].nunique() == 13).all()
    share = rows["ANNOT"].value_counts(normalize=True)
    assert share["DMSO"] == pytest.approx(0.25, abs=0.03)
    assert share.drop("DMSO").between(0.045, 0.08).all()
    assert set(rows["CPD_NAME"]) == set(COMPOUNDS)
    for name, part in rows.groupby("CPD_NAME"):
        assert set(part["ANNOT"]) == {COMPOUNDS[name].effect}
        assert set(part["STATE"]) == {"control" if name == "DMSO" else "trt"}
        assert set(part["DOSE"]) <= set(COMPOUNDS[name].doses)
    two = pd.Series([c.effect for c in COMPOUNDS.values()]).value_counts()
    assert (two == 2).sum() >= 6 and two.max() == 2


def test_plates_differ_in_stain():
    crops = render_dataset(130, 48, seed=2)
    controls = (crops.rows["STATE"] == "control").to_numpy()
    mean = pd.DataFrame(crops.images[controls].mean((1, 2))).groupby(crops.rows["PLATE"][controls].to_numpy()).mean()
    assert (mean.std() / mean.mean() > 0.03).all()


def test_written_layout(tmp_path: Path):
    out = tmp_path / "set"
    seen = []
    index = write_dataset(out, 26, 64, seed=9, progress=seen.append)
    crops = render_dataset(26, 64, seed=9)
    table = pd.read_csv(out / "index.csv", index_col=0, dtype={"PLATE": str})
    assert list(table.columns) == [
        "SAMPLE_KEY", "SPLIT", "STATE", "CPD_NAME", "ANNOT", "DOSE", "BATCH", "PLATE", "WELL",
    ]  # fmt: skip
    assert (out / "index.csv").read_text().startswith(",SAMPLE_KEY,")
    pd.testing.assert_frame_equal(table, index, check_names=False, check_dtype=False)
    assert len(seen) == 26
    assert sample_path("Week1_22123_1_11_3.0") == "Week1/22123/1_11_3.0.npy"
    for i, key in enumerate(table["SAMPLE_KEY"]):
        assert np.array_equal(np.load(out / sample_path(key)), crops.images[i])
        with np.load((out / "masks" / sample_path(key)).with_suffix(".npz")) as masks:
            assert np.array_equal(masks["nuclei"], crops.nuclei[i]) and np.array_equal(masks["cells"], crops.cells[i])
    hint = json.loads((out / "biorewards.json").read_text())
    assert hint["assay"] == "phantom" and hint["channels"] == {"actin": 0, "tubulin": 1, "dna": 2}
    assert (hint["size"], hint["pixel_size_um"], hint["seed"]) == (64, 0.48, 9)


def test_two_writes_give_the_same_bytes_and_a_full_folder_is_refused(tmp_path: Path):
    for name in ("a", "b"):
        write_dataset(tmp_path / name, 5, 48, seed=1)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) == 12
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    with pytest.raises(FileExistsError, match="not an empty folder"):
        write_dataset(tmp_path / "a", 5, 48)


def test_command(tmp_path: Path):
    from cli.phantom import command

    out = tmp_path / "new"
    done = CliRunner().invoke(command, ["--out", str(out), "--n", "13", "--size", "48", "--seed", "2"])
    assert done.exit_code == 0, done.output
    assert "biorewards score" in done.output and (out / "index.csv").is_file()
    again = CliRunner().invoke(command, ["--out", str(out), "--n", "13"])
    assert again.exit_code == 2 and "not an empty folder" in again.output
    assert "masks/" in CliRunner().invoke(command, ["--help"]).output


# What the effects do, against the real wells.


def on_border(labels):
    return np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))


def measure(effect: str, side: int = 420) -> dict[str, float]:
    """Means over whole objects of exact masks, doses and compounds mixed as in a data set, on an average plate."""
    nucleus, form, cell, neighbours, light = [], [], [], [], []
    # As many cells of each class. With half as many the cell area of one class was off by 12 %, with these by 1 %.
    for i in range(round(16 / CLASSES[effect].density)):
        rng = np.random.default_rng([41, list(CLASSES).index(effect), i])
        strength = 0.0 if effect == "DMSO" else DOSE_STRENGTH[i % 3] * (1.05, 0.92)[i % 2]
        field = render_field(rng, (side, side), effect, Plate(), strength=strength)
        table = regionprops_table(field.nuclei, properties=("label", "area", "perimeter_crofton"))
        whole = ~np.isin(table["label"], on_border(field.nuclei))
        nucleus.append(table["area"][whole])
        form.append((4 * np.pi * table["area"] / table["perimeter_crofton"] ** 2)[whole])
        area = np.bincount(field.cells.ravel())
        whole = ~np.isin(np.arange(len(area)), on_border(field.cells))
        cell.append(area[whole])
        wide = expand_labels(field.cells, 5)
        pairs = np.concatenate(
            [np.stack(p, -1).reshape(-1, 2) for p in ((wide[:, 1:], wide[:, :-1]), (wide[1:], wide[:-1]))]
        )
        pairs = np.unique(np.sort(pairs[(pairs[:, 0] != pairs[:, 1]) & (pairs.min(1) > 0)], 1), axis=0)
        neighbours.append(np.bincount(pairs.ravel(), minlength=len(area))[whole])
        image = field.image.astype(float) - Plate().offset
        inside = field.cells > 0
        light.append([image[field.nuclei > 0][:, 2].mean(), image[inside][:, 0].mean(), image[inside][:, 1].mean()])
    means = [np.concatenate(values).mean() for values in (nucleus, form, cell, neighbours)]
    return dict(zip(PROFILE_FEATURES, [*means, *np.mean(light, 0)], strict=True))


@pytest.fixture(scope="module")
def effects() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Ratio to DMSO of each class: measured, and of the real wells."""
    table = pd.DataFrame({effect: measure(effect) for effect in CLASSES}).T
    assert table.loc["DMSO", "nucleus_area"] == pytest.approx(989, rel=0.06)  # px, median real DMSO well
    assert table.loc["DMSO", "cell_area"] == pytest.approx(3901, rel=0.08)
    return table / table.loc["DMSO"], pd.DataFrame(PROFILE, index=list(PROFILE_FEATURES)).T


@pytest.mark.parametrize(
    ("measure", "within", "rank"),
    [
        ("nucleus_area", 0.12, 0.9),
        ("cell_area", 0.12, 0.9),
        ("dapi", 0.12, 0.85),
        ("actin", 0.15, 0.9),
        ("tubulin", 0.15, 0.9),
    ],
)
def test_effects_are_as_large_as_in_real_wells(effects, measure, within, rank):
    drawn, real = (table[measure] for table in effects)
    off = (drawn / real - 1).abs()
    assert off.max() <= within, f"{off.idxmax()}: {drawn[off.idxmax()]:.2f} against {real[off.idxmax()]:.2f}"
    assert drawn.corr(real, method="spearman") >= rank


def test_roundness_and_neighbours_move_as_in_real_wells(effects):
    drawn, real = effects
    assert drawn["form_factor"].corr(real["form_factor"], method="spearman") >= 0.85
    clear = real["form_factor"] < 0.96
    assert (drawn["form_factor"][clear] < 0.99).all() and clear.sum() >= 6
    assert drawn["neighbours"].corr(real["neighbours"], method="spearman") >= 0.7


def test_the_table_of_real_effects_is_what_the_profiles_say(shared: Path):
    path = shared / "data" / "bbbc021_profiles" / "wells.csv.gz"
    if not path.is_file():
        pytest.skip(f"{path.name} is not there")
    wells = pd.read_csv(path)
    features = list(PROFILE_FEATURES.values())
    control = wells[wells["moa"] == "DMSO"].groupby("plate")[features].median()
    ratio = wells[features] / control.reindex(wells["plate"]).to_numpy()
    real = ratio.groupby(wells["moa"]).median()
    for effect, numbers in PROFILE.items():
        assert numbers == pytest.approx(real.loc[CLASSES[effect].mirrors].to_numpy(), abs=6e-4), effect
