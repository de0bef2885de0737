"""The shape of the repository: who imports whom, how long files are, what is documented, how much is bundled."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import biorewards

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("biorewards", "generators", "rl", "cli")
#: package -> what it may import of ours, itself aside.
ALLOWED = {"biorewards": set(), "generators": {"biorewards"}, "rl": {"biorewards"}, "cli": set(PACKAGES)}
LINES = 350
ASSETS_MB = 20


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    """Top-level packages that a module imports, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    for path in sources(package):
        ours = set(imported(ast.parse(path.read_text(encoding="utf-8")))) & set(PACKAGES)
        assert ours <= ALLOWED[package] | {package}, f"{path} imports {ours}"


def test_import_finder_sees_every_form() -> None:
    tree = ast.parse("import rl.nft as x\ndef f():\n    from cli.main import run\nfrom . import generators\n")
    assert set(imported(tree)) == {"rl", "cli"}


@pytest.mark.parametrize("path", sources(*PACKAGES, "scripts", "benchmarks"), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LINES


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=lambda p: str(p.relative_to(ROOT)))
def test_public_functions_are_documented(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module has no docstring"
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def test_bundled_files_are_small() -> None:
    size = sum(path.stat().st_size for path in (ROOT / "biorewards" / "assets").rglob("*") if path.is_file())
    assert size < ASSETS_MB * 2**20


def test_nothing_bundled_is_a_pickle() -> None:
    names = {path.suffix for path in (ROOT / "biorewards").rglob("*") if path.is_file()}
    assert not names & {".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib"}


@pytest.mark.parametrize("name", biorewards.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(biorewards, name) is not None
    assert name in dir(biorewards)


def test_version_is_said_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "biorewards/__init__.py"
    assert f"## {biorewards.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"version: {biorewards.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_links_between_documents_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page} links to {target}"
