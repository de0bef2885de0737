"""Folders and tables of images: which rows, in which order, with which file and label."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from exact import assay
from pictures import picture
from PIL import Image

from biorewards.io.images import ImageError
from biorewards.io.layouts import sample_key_path
from biorewards.io.manifest import Manifest, ManifestError, read_manifest
from biorewards.io.reading import plan_reading
from biorewards.io.targets import assign_targets


def save(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, picture(seed))
    else:
        Image.fromarray(picture(seed)).save(path)
    return path


def column(found: Manifest, name: str) -> list[str]:
    return found.table[f"Metadata_{name}"].tolist()


# Folders


def test_a_folder_in_natural_order_with_the_sub_folder_as_label(tmp_path: Path) -> None:
    for name in ("img10.png", "img2.png", "taxol/b.png", "taxol/deep/a10.png", "taxol/deep/a9.png", "Étoposide/x.npy"):
        save(tmp_path / name)
    found = read_manifest(tmp_path)
    assert column(found, "File") == [
        "img2.png", "img10.png", "taxol/b.png", "taxol/deep/a9.png", "taxol/deep/a10.png", "Étoposide/x.npy",
    ]  # fmt: skip
    assert column(found, "Compound") == ["", "", "taxol", "taxol", "taxol", "Étoposide"]
    assert found.files[0] == (tmp_path / "img2.png",) and not found.problems
    assert list(found.table)[:5] == [f"Metadata_{n}" for n in ("File", "Compound", "MoA", "Plate", "Well")]


def test_a_folder_leaves_out_hidden_files_and_our_own_outputs_and_says_so(tmp_path: Path) -> None:
    for name in ("a.png", ".b.png", ".cache/c.png", "a_overlay.png", "scores.csv.partial/d.png", "e_overlay.png"):
        save(tmp_path / name)
    (tmp_path / "a_nuclei.tif").write_bytes(b"labels")
    (tmp_path / "photo.jpg").write_bytes(b"x")
    (tmp_path / "scores.csv").write_text("Metadata_File,Reward_total\na.png,1\n")
    (tmp_path / "objects.csv").write_text("ImageNumber,ObjectNumber,Metadata_File\n1,1,a.png\n")
    found = read_manifest(tmp_path)
    assert column(found, "File") == ["a.png", "e_overlay.png"]
    assert found.notes == ["left out: 2 masks and overlays beside their image", "left out: 1 with suffix .jpg"]


def test_links_that_leave_the_folder_are_rows_with_a_problem(tmp_path: Path) -> None:
    outside = save(tmp_path / "outside" / "o.png")
    inside = save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").symlink_to(outside)
    (tmp_path / "in" / "c.png").symlink_to(inside)
    (tmp_path / "in" / "d").symlink_to(tmp_path / "outside", target_is_directory=True)
    found = read_manifest(tmp_path / "in")
    assert column(found, "File") == ["a.png", "b.png", "c.png"]
    assert list(found.problems) == [1] and "leaves the image root" in found.problems[1]
    assert found.notes == [f"linked folder {tmp_path / 'in' / 'd'} was not followed"]


def test_a_file_name_that_is_no_utf8_can_be_written_to_a_table(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/bad\xff.png"
    try:
        with open(raw, "wb") as stream:
            Image.fromarray(picture()).save(stream, "PNG")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    found = read_manifest(tmp_path)
    assert column(found, "File") == ["bad\\xff.png"]
    assert plan_reading(found, assay())(0).pixels.shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "holds no image"),
        ({"a.txt": "x"}, "holds no image"),
        ({"a.csv": "file\nx.png\n", "b.csv": "SAMPLE_KEY\nA_B_C\n"}, "holds 2 tables of images (a.csv, b.csv)"),
        ({"a.png": "x", "biorewards.json": "{"}, "biorewards.json: cannot be used"),
        ({"a.png": "x", "biorewards.json": '{"assay": "../../elsewhere"}'}, "is no plain name; pass it with --assay"),
        ({"a.png": "x", "biorewards.json": '{"channels": {"dna": "two"}}'}, "biorewards.json: cannot be used"),
    ],
)
def test_a_folder_that_cannot_be_used(content: dict[str, str], words: str, tmp_path: Path) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ManifestError) as caught:
        read_manifest(tmp_path)
    assert words in str(caught.value)


# Tables


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_a_manifest_keeps_its_rows_their_order_and_all_columns_as_text(suffix: str, tmp_path: Path) -> None:
    for name in ("z.png", "sub/a.png", "naïve 細胞.png"):
        save(tmp_path / name)
    table = pd.DataFrame(
        {
            "Path": ["z.png", "sub/a.png", "naïve 細胞.png", "z.png"],
            "CPD_NAME": ["drug-a", "drug-b", None, "drug-a"],
            "Metadata_Plate": ["007", "008", "009", "007"],
            "Image_Metadata_Well": ["B02", "B03", "B04", "B02"],
            "note": ["", "x, y", 'say "z"', ""],
        }
    )
    path = tmp_path / f"list{suffix}"
    if suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",", encoding="utf-8-sig")
    for found in (read_manifest(path), read_manifest(tmp_path), read_manifest(tmp_path, manifest=path)):
        assert column(found, "File") == table["Path"].tolist()
        assert column(found, "Compound") == ["drug-a", "drug-b", "", "drug-a"]
        assert column(found, "Plate") == ["007", "008", "009", "007"]
        assert column(found, "Well") == ["B02", "B03", "B04", "B02"]
        assert column(found, "note") == table["note"].tolist()
        assert [files[0] for files in found.files] == [tmp_path / name for name in table["Path"]]


def test_the_images_of_a_table_may_lie_elsewhere(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png")
    (tmp_path / "tables").mkdir()
    path = tmp_path / "tables" / "list.csv"
    path.write_text("file\na.png\n")
    for found in (
        read_manifest(path, images=tmp_path / "images"),
        read_manifest(tmp_path / "images", manifest=path),
    ):
        assert found.files == [(tmp_path / "images" / "a.png",)]
    absolute = tmp_path / "tables" / "absolute.csv"
    absolute.write_text(f"file\n{tmp_path / 'images' / 'a.png'}\n")
    assert not read_manifest(absolute, images=tmp_path / "images").problems
    assert "name a root that holds it with --images" in read_manifest(absolute).problems[0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../secret.png", "leaves the image root"),
        ("sub/../../secret.png", "leaves the image root"),
        ("..", "leaves the image root"),
        ("/etc/passwd", "leaves the image root"),
        ("link.png", "leaves the image root"),
        ("linked/secret.png", "leaves the image root"),
        ("https://example.org/a.png", "is a URL; nothing is downloaded"),
        ("s3://bucket/a.png", "is a URL; nothing is downloaded"),
        ("  ", "no file is named"),
        ("a" * 5000, "cannot be resolved"),
    ],
)
def test_a_path_that_leaves_the_root_is_a_row_with_a_problem(name: str, words: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    save(root / "good.png")
    secret = save(tmp_path / "secret.png")
    (root / "link.png").symlink_to(secret)
    (root / "linked").symlink_to(tmp_path, target_is_directory=True)
    (root / "list.csv").write_text(f"file,compound\ngood.png,drug-a\n{name},drug-a\ngood.png,drug-b\n")
    found = read_manifest(root / "list.csv")
    assert len(found) == 3 and list(found.problems) == [1] and words in found.problems[1]
    reader = plan_reading(found, assay())
    assert reader(0).pixels.shape == reader(2).pixels.shape == (3, 32, 32)
    with pytest.raises(ImageError, match=words):
        reader(1)


def test_links_and_dots_that_stay_inside_are_fine(tmp_path: Path) -> None:
    save(tmp_path / "real" / "a.png")
    (tmp_path / "alias").symlink_to(tmp_path / "real", target_is_directory=True)
    (tmp_path / "list.csv").write_text("file\nalias/a.png\nreal/../real/a.png\n./real/a.png\n")
    assert not read_manifest(tmp_path / "list.csv").problems


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("file,compound\n", "has no rows"),
        ("name,compound\na.png,x\n", "no column names the images"),
        ("name,compound\na.png,x\n", "the columns are name, compound"),
        ("file,compound\na.png,x,y\n", "line 2 has 3 fields, the header has 2"),
        ("file,compound\na.png\n", "line 2 has 1 fields, the header has 2"),
        ("file,file\na,b\n", "column 'file' occurs twice"),
        ("file\n\xff\n", "is not UTF-8 text"),
    ],
)
def test_a_table_that_cannot_be_used(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    assert words in str(caught.value) and "list.csv" in str(caught.value)


def test_a_parquet_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "list.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ManifestError, match="cannot be read as a table"):
        read_manifest(tmp_path / "list.parquet")


# IMPA / CellFlux index


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("Week1_22123_1_11_3.0", "Week1/22123/1_11_3.0"),
        ("BR00117010_M01_9_144", "BR00117010/M01_9/M01_9_144"),
        ("U2OS-01_1_B02_s1_14", "01_1/B02/s1_14"),
        ("Batch1_1001_5_0_3.0", "Batch1/1001/5_0_3.0"),
    ],
)
def test_sample_keys_name_files_as_in_the_published_data_sets(key: str, path: str) -> None:
    assert sample_key_path(key) == path


def test_an_index_in_both_spellings_of_state(tmp_path: Path) -> None:
    save(tmp_path / "Week1" / "22123" / "1_11_3.0.npy")
    save(tmp_path / "Week1" / "22123" / "1_11_4.0.png")
    (tmp_path / "index.csv").write_text(
        ",SAMPLE_KEY,SPLIT,CPD_NAME,ANNOT,STATE,BATCH,DOSE\n"
        "0,Week1_22123_1_11_3.0,train,taxol,Microtubule stabilizers,1,Week1,0.3\n"
        "1,Week1_22123_1_11_4.0,test,DMSO,DMSO,0,Week1,0.0\n"
        "2,Week1_22123_1_11_9.0,test,DMSO,DMSO,control,Week1,0.0\n"
        "3,nokey,test,DMSO,DMSO,trt,Week1,0.0\n"
        "4,Week1_.._.._x,test,DMSO,DMSO,trt,Week1,0.0\n"
    )
    found = read_manifest(tmp_path)
    assert column(found, "State") == ["treated", "control", "control", "treated", "treated"]
    assert column(found, "SAMPLE_KEY")[0] == "Week1_22123_1_11_3.0"
    assert column(found, "Dose") == ["0.3", "0.0", "0.0", "0.0", "0.0"]
    assert column(found, "MoA")[0] == "Microtubule stabilizers"
    assert [files[0].name for files in found.files[:3]] == ["1_11_3.0.npy", "1_11_4.0.png", "1_11_9.0.npy"]
    assert column(found, "File")[:2] == ["Week1/22123/1_11_3.0.npy", "Week1/22123/1_11_4.0.png"]
    assert "names no path" in found.problems[3] and found.files[3] == ()
    with pytest.raises(ImageError, match="does not exist"):
        plan_reading(found, assay())(2)


def test_a_folder_names_its_assay_channels_and_pixel_size(tmp_path: Path) -> None:
    save(tmp_path / "B1" / "P1" / "1_1.npy")
    (tmp_path / "index.csv").write_text("SAMPLE_KEY,CPD_NAME\nB1_P1_1_1,drug-a\n")
    hints = {"assay": "phantom", "channels": {"actin": 0, "tubulin": 1, "dna": 2}, "pixel_size_um": 0.64, "seed": 3}
    (tmp_path / "biorewards.json").write_text(json.dumps(hints))
    found = read_manifest(tmp_path)
    assert found.hints == ("phantom", hints["channels"], 0.64)
    pixels = plan_reading(found, assay(pixel_size=0.32))(0).pixels
    assert pixels.shape == (3, 64, 64), "twice the pixel size: resampled to twice the side"
    np.testing.assert_allclose(pixels.mean((1, 2)), picture()[..., [2, 0, 1]].mean((0, 1)) / 255, atol=0.01)


# load_data.csv


def write_load_data(root: Path, header: str, row: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    path = root / "load_data.csv"
    path.write_text(f"{header}\n{row}\n")
    return path


def channel_header(*channels: str, prefix: str = "") -> str:
    return ",".join(f"{prefix}FileName_{name},{prefix}PathName_{name}" for name in channels)


def grey(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((32, 32), value, np.uint8)).save(path)


def test_one_file_a_channel_by_name_synonym_or_choice(tmp_path: Path) -> None:
    for name, value in (("d.png", 10), ("a.png", 20), ("t.png", 30), ("e.png", 40)):
        grey(tmp_path / "p1" / name, value)
    header = channel_header("OrigDNA", "Actin", "Tubulin", "ER") + ",FileName_IllumER,Metadata_Plate,Metadata_Well"
    path = write_load_data(tmp_path, header, "d.png,p1,a.png,p1,t.png,p1,e.png,p1,gone.npy,P1,A01")
    found = read_manifest(path)
    assert found.channel_names == ("OrigDNA", "Actin", "Tubulin", "ER")
    assert column(found, "Plate") == ["P1"] and column(found, "File") == ["p1/d.png"]
    assert not [name for name in found.table if "Name" in name]
    pixels = plan_reading(found, assay())(0).pixels
    np.testing.assert_allclose(pixels[:, 0, 0] * 255, [10, 20, 30])  # exact.assay: dna, actin, tubulin
    chosen = plan_reading(found, assay(), channels={"dna": "ER", "actin": "Tubulin", "tubulin": "1"})
    np.testing.assert_allclose(chosen(0).pixels[:, 0, 0] * 255, [40, 30, 20])
    with pytest.raises(ValueError, match="channel dna=Mito: the table's channels are OrigDNA, Actin, Tubulin, ER"):
        plan_reading(found, assay(), channels={"dna": "Mito", "actin": "Tubulin", "tubulin": "1"})


def test_a_channel_that_no_column_means_must_be_named(tmp_path: Path) -> None:
    path = write_load_data(tmp_path, "FileName_AGP,FileName_DAPI,FileName_Tubulin", "a.png,d.png,t.png")
    with pytest.raises(ValueError, match=r"no channel of the table is called actin; .*--channels dna=NAME"):
        plan_reading(read_manifest(path), assay())


def test_bbbc021s_own_image_list_is_read(tmp_path: Path) -> None:
    for name in ("d.tif", "a.tif", "t.tif"):
        grey(tmp_path / "Week1" / "Week1_22123" / name, 5)
    header = (
        f"TableNumber,ImageNumber,{channel_header('DAPI', 'Tubulin', 'Actin', prefix='Image_')},Replicate,"
        "Image_Metadata_Plate_DAPI,Image_Metadata_Well_DAPI,Image_Metadata_Compound,Image_Metadata_Concentration"
    )
    files = ",".join(f"{name}.tif,Week1/Week1_22123" for name in "dta")
    path = write_load_data(tmp_path, header, f"4,233,{files},1,Week1_22123,A02,5-fluorouracil,0.003")
    found = read_manifest(path)
    assert found.channel_names == ("DAPI", "Tubulin", "Actin")
    got = {name: column(found, name)[0] for name in ("Compound", "Plate", "Well", "Dose", "Replicate")}
    assert got == {
        "Compound": "5-fluorouracil",
        "Plate": "Week1_22123",
        "Well": "A02",
        "Dose": "0.003",
        "Replicate": "1",
    }
    assert plan_reading(found, assay())(0).pixels.shape == (3, 32, 32)


def test_path_names_of_another_machine_are_found_under_the_root_by_their_folders(tmp_path: Path) -> None:
    for plate in ("BR1", "BR2"):
        for name in "dat":
            grey(tmp_path / "images" / plate / f"{name}.png", 5)
    far = "/home/ubuntu/bucket/projects/p/images"
    rows = [",".join(f"{name}.png,{far}/{plate}" for name in "dat") for plate in ("BR1", "BR2", "BR3")]
    path = write_load_data(tmp_path, channel_header("DNA", "Actin", "Tubulin"), "\n".join(rows))
    found = read_manifest(path)
    assert [files[0].relative_to(tmp_path).as_posix() for files in found.files[:2]] == [
        "images/BR1/d.png",
        "images/BR2/d.png",
    ]
    assert list(found.problems) == [2] and "leaves the image root" in found.problems[2]


def test_url_columns_are_read_when_local_and_refused_otherwise(tmp_path: Path) -> None:
    for name in "dat":
        grey(tmp_path / f"{name} 1.png", 5)
    header = "URL_DNA,URL_Actin,URL_Tubulin"
    local = ",".join((tmp_path / f"{name} 1.png").as_uri() for name in "dat")
    path = write_load_data(tmp_path, header, f"{local}\ns3://cellpainting-gallery/d.png,a 1.png,t 1.png")
    found = read_manifest(path)
    assert plan_reading(found, assay())(0).pixels.shape == (3, 32, 32)
    assert list(found.problems) == [1] and "is a URL" in found.problems[1]


# Channels, pixel size, intensity


def test_roles_and_sizes_that_do_not_fit_are_errors_with_the_repair(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    found = read_manifest(tmp_path)
    for channels in ({"dna": 0}, {"dna": 0, "actin": 1, "mito": 2}):
        with pytest.raises(ValueError, match=r"do not fit assay 'exact'.*--channels dna=0,actin=1,tubulin=2"):
            plan_reading(found, assay(), channels=channels)
    with pytest.raises(ValueError, match="give the channel's number"):
        plan_reading(found, assay(), channels={"dna": "x", "actin": 1, "tubulin": 2})
    with pytest.raises(ValueError, match="does not know its pixel size"):
        plan_reading(found, assay(), pixel_size=0.5)
    with pytest.raises(ValueError, match="is empty; give LO,HI"):
        plan_reading(found, assay(), intensity_range=(5, 5))
    with pytest.raises(ValueError, match="is no length"):
        plan_reading(found, assay(pixel_size=0.3), pixel_size=float("nan"))


def test_channels_are_reordered_by_role_and_a_near_pixel_size_changes_nothing(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    found = read_manifest(tmp_path)
    plain = plan_reading(found, assay(pixel_size=0.5))(0).pixels
    turned = plan_reading(found, assay(pixel_size=0.5), channels={"dna": 2, "actin": 1, "tubulin": 0}, pixel_size=0.505)
    np.testing.assert_array_equal(turned(0).pixels, plain[::-1])
    half = plan_reading(found, assay(pixel_size=0.5), pixel_size=0.25)(0).pixels
    assert half.shape == (3, 16, 16)


# Labels

CLASSES = ["DMSO", "Actin disruptors", "Epithelial"]
COMPOUNDS = {"DMSO": "DMSO", "cytochalasin B": "Actin disruptors", "PP-2": "Epithelial"}


@pytest.mark.parametrize(
    ("compound", "moa", "state", "target", "compound_after", "moa_after"),
    [
        ("", "", "", -1, "", ""),
        ("", "", "control", 0, "", "DMSO"),
        ("cytochalasin B", "", "", 1, "cytochalasin B", "Actin disruptors"),
        ("Cytochalasin_b", "", "treated", 1, "cytochalasin B", "Actin disruptors"),
        ("PP-2", "Actin disruptors", "", 1, "PP-2", "Actin disruptors"),
        ("PP-2", "no such class", "", 2, "PP-2", "Epithelial"),
        ("actin_disruptors", "", "", 1, "", "Actin disruptors"),
        ("", "EPITHELIAL", "", 2, "", "Epithelial"),
        ("cytochalasin C", "", "", -2, "cytochalasin C", ""),
        ("cytochalasin C", "other", "control", -2, "cytochalasin C", "other"),
    ],
)
def test_the_class_of_a_row(
    compound: str, moa: str, state: str, target: int, compound_after: str, moa_after: str
) -> None:
    table = pd.DataFrame({"Metadata_Compound": [compound], "Metadata_MoA": [moa], "Metadata_State": [state]})
    found = assign_targets(table, CLASSES, COMPOUNDS)
    assert found.target.tolist() == [target] and found.target.dtype == np.int64
    assert found.table["Metadata_Compound"].tolist() == [compound_after]
    assert found.table["Metadata_MoA"].tolist() == [moa_after]
    assert table["Metadata_MoA"].tolist() == [moa], "the input is not changed"


def test_unknown_labels_are_named_once_with_the_nearest() -> None:
    names = ["cytochalasin C", "cytochalasin C", "PP-2", "zzz"]
    table = pd.DataFrame({"Metadata_Compound": names, "Metadata_MoA": ["", "", "other", ""]})
    found = assign_targets(table, CLASSES, COMPOUNDS)
    assert found.target.tolist() == [-2, -2, 2, -2]
    assert found.notes == [
        "'other' is no class of the assay; PP-2's class 'Epithelial' is used (1 rows)",
        "unknown label 'cytochalasin C' (2 rows): nearest known: cytochalasin B",
        "unknown label 'zzz' (1 rows): known classes: DMSO, Actin disruptors, Epithelial",
    ]
