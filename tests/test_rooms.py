"""The rooms of the package, and that imports go one way through them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

ROOMS = (
    *(
        "errors",
        "install",
        "terminal",
        "progress",
        "reading",
        "precision",
        "bounds",
        "shape",
        "files",
        "kept",
        "miniatures",
    ),
    *(
        "families",
        "bundle",
        "measure",
        "graph",
        "quantize",
        "engines",
        "estimate",
        "media",
        "pipeline",
        "longer",
        "exporters",
        "diffusers",
        "parity",
    ),
    *("bench", "doctor", "testing", "pytest_plugin", "cluster", "batch", "serve", "cli", "__main__"),
)
"""From the ground up: a room imports from those before it only. Folders of the package, and its single files."""


def arrows(package: Path) -> Iterator[tuple[str, str, str]]:
    """Yield each import that leaves its room, wherever in a file it stands: room, room it is from, and where."""
    for file in sorted(package.rglob("*.py")):
        here = file.relative_to(package).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for name in imported(node):
                if name.startswith("cvx_deploy.") and (there := name.split(".")[1]) != here:
                    yield here, there, f"{file.relative_to(package)}:{node.lineno}"  # type: ignore[attr-defined]


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module is not None:
        plain = node.module == "cvx_deploy"
        return [f"cvx_deploy.{alias.name}" for alias in node.names] if plain else [node.module]
    return []


def upwards(package: Path) -> list[str]:
    """Return every import that runs from a room to one that stands above it."""
    return [
        f"{where}: {here} imports from {there}"
        for here, there, where in arrows(package)
        if here != "__init__" and there in ROOMS and ROOMS.index(there) > ROOMS.index(here)
    ]


def test_every_room_has_its_place() -> None:
    found = {path.name.removesuffix(".py") for path in (ROOT / "cvx_deploy").iterdir() if path.suffix in ("", ".py")}
    assert found - {"__init__", "__pycache__"} == set(ROOMS)


def test_imports_go_one_way_through_the_rooms() -> None:
    assert upwards(ROOT / "cvx_deploy") == []


@pytest.mark.parametrize(
    "line", ["from cvx_deploy.pipeline.run import run", "import cvx_deploy.cli", "from cvx_deploy import parity"]
)
def test_an_import_that_runs_against_them_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "new.py").write_text(f"def late() -> None:\n    {line}\n")
    assert len(upwards(tmp_path)) == 1


DATA = {"Architecture", "Grid", "Limits", "Model", "SchedulerKind", "Task", "Traits", "Vae", "VaeHalf"}
"""What a family says; how it says it is behind `cvx_deploy.families.registry`."""


def of_one_family(file: Path) -> list[str]:
    """Return what a file imports from a family's own folder, the types of its data aside."""
    return [
        alias.name
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cvx_deploy.families.cogvideox")
        for alias in node.names
        if alias.name not in DATA
    ]


def test_nothing_but_an_exporter_knows_a_family_by_name() -> None:
    files = [file for file in (ROOT / "cvx_deploy").rglob("*.py") if not {"families", "exporters"} & {*file.parts}]
    assert {file.name: found for file in files if (found := of_one_family(file))} == {}


def test_one_that_does_is_found(tmp_path: Path) -> None:
    (tmp_path / "new.py").write_text("from cvx_deploy.families.cogvideox.vae import DECODER, Vae\n")
    assert of_one_family(tmp_path / "new.py") == ["DECODER"]
