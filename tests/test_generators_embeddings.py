"""Compound tables: reading, names, and the kind of numbers they hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from generators.embeddings import CompoundTable, kind_of


def table(path: Path, text: str) -> CompoundTable:
    path.write_text(text, encoding="utf-8")
    return CompoundTable.read_csv(path)


def test_reads_names_and_numbers_in_order(tmp_path: Path) -> None:
    read = table(tmp_path / "t.csv", "\ufeff,0,1\ncytochalasin B,3,0\n01,0,2.5\nNA,1,1\n")
    assert read.names == ["cytochalasin B", "01", "NA"]
    assert read.values.dtype == torch.float32
    assert read.rows(["NA", "cytochalasin B"]).tolist() == [[1, 1], [3, 0]]
    assert read.index(["01"]).tolist() == [1]
    assert read.subset(["01", "NA"]).names == ["01", "NA"]
    assert read.dim == 2


def test_unknown_compound_names_the_nearest(tmp_path: Path) -> None:
    read = table(tmp_path / "t.csv", ",0\ntaxol,3\nAZ138,1\n")
    with pytest.raises(ValueError, match=r"no compound 'Taxoll'; did you mean 'taxol'\?"):
        read.rows(["taxol", "Taxoll"])
    with pytest.raises(ValueError, match="it has: taxol, AZ138"):
        read.rows(["zzzzzz"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (",0,1\ntaxol,1,x\n", "'taxol', column '1': 'x' is no number"),
        (",0,1\ntaxol,1,\n", "'taxol', column '1'"),
        (",0\ntaxol,1\ntaxol,2\n", "'taxol' has two rows"),
        (",0\ntaxol,inf\n", "'taxol' has an empty or non-finite value"),
        ("taxol\n", "first column of names"),
        ("", "no CSV table"),
        (",0,1\n", "a row each"),
    ],
)
def test_bad_tables_name_the_place(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        table(tmp_path / "t.csv", text)
    assert "t.csv" in str(caught.value)


def test_kinds() -> None:
    assert kind_of(torch.tensor([[0.0, 1], [1, 0]])) == "binary"
    assert kind_of(torch.tensor([[0.0, 1], [2, 0]])) == "counts"
    assert kind_of(torch.tensor([[0.0, 1.5]])) == "real"
    assert kind_of(torch.tensor([[-1.0, 2]])) == "real"


@pytest.mark.parametrize("held", ["binary", "counts", "real"])
@pytest.mark.parametrize("wanted", ["binary", "counts", "real", "any"])
def test_only_the_kind_that_was_trained_on_passes(held: str, wanted: str) -> None:
    values = {"binary": [[0.0, 1]], "counts": [[0.0, 3]], "real": [[0.5, 1]]}[held]
    made = CompoundTable(["a"], torch.tensor(values), "emb.csv")
    if wanted in (held, "any"):
        made.expect_kind(wanted, "the model")
        return
    with pytest.raises(ValueError, match=r"emb\.csv holds .*the model was trained on .*fingerprints='any'"):
        made.expect_kind(wanted, "the model")


def test_unknown_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match="counts, binary, real, any"):
        CompoundTable(["a"], torch.ones(1, 1)).expect_kind("count", "the model")
