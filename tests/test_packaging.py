"""What is shipped: wheel and sdist, their dependencies, and a runtime that works where torch is not installed."""

import ast
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import cvx_deploy
from cvx_deploy.miniatures import miniature
from tests.conftest import ROOT, Exported

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
LINT = PYPROJECT["tool"]["ruff"]["lint"]
HEAVY = LINT["flake8-tidy-imports"]["banned-module-level-imports"]
# The folders that ruff lets import heavy packages; of these exporters is linked into cvx_deploy, the others lie in it.
EXPORT_SIDE = [
    ROOT / "cvx_deploy" / ignored.removesuffix("/*").removeprefix("cvx_deploy/")
    for ignored, rules in LINT["per-file-ignores"].items()
    if "TID253" in rules
]
FILES = sorted(file for file in (ROOT / "cvx_deploy").rglob("*.py") if file.name != "__main__.py")
IN_TRITON = ROOT / "cvx_deploy" / "serve" / "triton" / "model.py"  # imports what there is in Triton's processes only
RUNTIME_FILES = [
    file for file in FILES if file != IN_TRITON and not any(file.is_relative_to(folder) for folder in EXPORT_SIDE)
]
BUILD_FILES = [file for file in FILES if file.parent.name == "tensorrt"]
GRAPH_FILES = [file for file in FILES if file.parent.name == "graph"]


def command(
    *arguments: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; what it says is in the result."""
    return subprocess.run(arguments, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def python(*arguments: str | Path, cwd: Path = ROOT) -> str:
    """Run this Python and return what it prints."""
    done = command(sys.executable, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def built(kind: str, root: Path, folder: Path) -> Path:
    """Build a ``wheel`` or an ``sdist`` of the project at `root`."""
    python("-m", "hatchling", "build", "-t", kind, "-d", folder, cwd=root)
    [file] = folder.iterdir()
    return file


def contents(wheel: Path) -> dict[str, bytes]:
    with ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


FOR_USERS_TESTS = {"cvx_deploy/testing.py", "cvx_deploy/pytest_plugin.py"}


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = contents(wheel)
    assert {name.split("/")[0] for name in names} == {"cvx_deploy", f"cvx_deploy-{cvx_deploy.__version__}.dist-info"}
    assert "cvx_deploy/py.typed" in names
    assert not [name for name in names if ("test" in name and name not in FOR_USERS_TESTS) or "__pycache__" in name]


def test_wheel_holds_the_web_page(wheel: Path) -> None:
    packed = contents(wheel)
    sources = sorted((ROOT / "cvx_deploy" / "serve" / "page").iterdir())
    assert {"index.html", "page.css", "page.js"} <= {source.name for source in sources}
    for source in sources:
        assert packed[f"cvx_deploy/serve/page/{source.name}"] == source.read_bytes()


def test_wheel_holds_the_exporters_as_real_files(wheel: Path) -> None:
    packed = contents(wheel)
    sources = sorted((ROOT / "exporters").rglob("*.py"))
    assert sources
    for source in sources:
        assert packed[f"cvx_deploy/{source.relative_to(ROOT)}"] == source.read_bytes()


def test_wheel_holds_the_files_that_the_miniatures_share_in_both(wheel: Path) -> None:
    packed = contents(wheel)
    links = [path for path in miniature("mini-i2v").rglob("*") if path.is_symlink()]
    assert miniature("mini-i2v") / "vae" / "diffusion_pytorch_model.safetensors" in links
    for link in links:
        assert packed[str(link.relative_to(ROOT))] == link.read_bytes()


def test_wheel_built_from_the_sdist_is_the_same(wheel: Path, tmp_path: Path) -> None:
    sdist = built("sdist", ROOT, tmp_path / "sdist")
    shutil.unpack_archive(sdist, tmp_path / "unpacked")
    [root] = (tmp_path / "unpacked").iterdir()
    assert contents(built("wheel", root, tmp_path / "wheel")) == contents(wheel)


def with_dependencies(requirements: Iterable[str]) -> set[str]:
    """Return the names of all installed distributions that some requirements lead to."""
    found: set[tuple[str, str]] = set()
    pending = [(Requirement(text), "") for text in requirements]
    while pending:
        requirement, extra = pending.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in ("", *requirement.extras):
            key = (canonicalize_name(requirement.name), wanted)
            if key not in found:
                found.add(key)
                pending += [(Requirement(text), wanted) for text in importlib.metadata.requires(key[0]) or []]
    return {name for name, _ in found}


def link_distribution(name: str, site: Path) -> None:
    """Make an installed distribution appear in another environment's `site` folder, it and nothing beside it."""
    distribution = importlib.metadata.distribution(name)
    for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
        (site / top).symlink_to(Path(str(distribution.locate_file(top))))


@pytest.fixture(scope="module")
def runtime(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the programs' folder of an environment with the wheel and its runtime dependencies.

    The dependencies are linked from the environment of the tests, so that nothing is downloaded; that they are all
    there, and of versions that the wheel asks for, is what pip makes sure of.
    """
    folder = tmp_path_factory.mktemp("runtime")
    venv.create(folder, symlinks=True)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    for name in with_dependencies(PROJECT["dependencies"]):
        link_distribution(name, site)
    python("-m", "pip", "--isolated", "--python", folder / "bin" / "python", "install", "--no-index", wheel)
    return folder / "bin"


@pytest.mark.slow
def test_runtime_dependencies_bring_no_torch(runtime: Path, tmp_path: Path) -> None:
    heavy = [name for name in HEAVY if name != "onnx"]  # which the runtime has, and imports where it needs it
    code = f"import importlib.util as u; print([name for name in {heavy} if u.find_spec(name)])"
    assert command(runtime / "python", "-c", code, cwd=tmp_path).stdout == "[]\n"


@pytest.mark.slow
def test_installed_wheel_makes_a_video_without_torch(runtime: Path, exported: Exported, tmp_path: Path) -> None:
    bundle, video = exported("5b").path, tmp_path / "clip.mp4"
    run = (runtime / "cvx-deploy", "run", "--bundle", bundle, "--prompt", "a red circle", "--steps", "2")
    done = command(*run, "--output", video, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{video}\n"
    assert video.stat().st_size > 0


@pytest.mark.slow
def test_installed_wheel_makes_a_video_of_a_miniature_by_itself(runtime: Path, tmp_path: Path) -> None:
    words = ("run", "--prompt", "a red circle moves to the right", "--steps", "4", "--output", "circle.mp4")
    done = command(runtime / "cvx-deploy", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "circle.mp4\n"
    assert (tmp_path / "circle.mp4").stat().st_size > 0


@pytest.mark.slow
def test_installed_wheel_leaves_nothing_in_the_home_folder(runtime: Path, tmp_path: Path) -> None:
    """Unless told not to, ONNX Runtime keeps an identifier there, for the usage data that it sends to its makers."""
    done = command(
        runtime / "python", "-c", "import cvx_deploy.engines.onnxruntime.backend", env={"HOME": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("export", "--model", "5b", "--checkpoint", "checkpoints/5b"),
        ("synth", "--like", "5b", "--output", "checkpoints/5b"),
    ],
    ids=lambda arguments: str(arguments[0]),
)
def test_installed_wheel_says_in_one_line_that_exporting_needs_the_extra(
    runtime: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    done = command(runtime / "cvx-deploy", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert re.search(r"fix: pip install .*\[export\].*\.$", line)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_installed_wheel_has_the_command_and_the_module(runtime: Path, tmp_path: Path) -> None:
    for program in ((runtime / "cvx-deploy",), (runtime / "python", "-m", "cvx_deploy")):
        assert command(*program, "--version", cwd=tmp_path).stdout.split()[-1] == PROJECT["version"]


def test_public_version_is_that_of_the_project() -> None:
    assert cvx_deploy.__version__ == PROJECT["version"]


def imported(files: Iterable[Path]) -> set[str]:
    """Return the distributions that some files import from, wherever in the file they do so."""
    names: set[str] = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(str(node.module).partition(".")[0])
    known = importlib.metadata.packages_distributions()
    outside = names - set(sys.stdlib_module_names) - {"cvx_deploy"}
    return {canonicalize_name(known.get(name, [name])[0]) for name in outside}


def declared(requirements: Iterable[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def engine_extras() -> set[str]:
    """Return what the extras for engines install; cuda-python is a name for its parts."""
    extras = PROJECT["optional-dependencies"]
    names = declared(extras["openvino"] + extras["tensorrt"] + extras["tensorrt-rtx"])
    return names | {"cuda-core", "cuda-bindings"} if "cuda-python" in names else names


def test_runtime_imports_are_the_declared_dependencies() -> None:
    extras = PROJECT["optional-dependencies"]
    bench = declared(extras["bench"])
    check = declared(extras["export"]) & {"scikit-image"} | declared(extras["debug"]) | {"pytest"}
    serve = declared(extras["serve"]) - {"python-multipart"}
    others = serve | declared(extras["ray"]) | declared(extras["interpolate"])
    assert others <= imported(RUNTIME_FILES)
    assert imported(RUNTIME_FILES) - engine_extras() - bench - check - others == declared(PROJECT["dependencies"])


def test_building_engines_imports_nothing_that_is_not_declared() -> None:
    assert BUILD_FILES
    assert imported(BUILD_FILES) <= declared(PROJECT["dependencies"]) | engine_extras()


def test_export_imports_nothing_that_is_not_declared() -> None:
    extras = PROJECT["optional-dependencies"]
    extra = declared(PROJECT["dependencies"] + extras["export"] + extras["modelscope"] + extras["bench"])
    assert imported([*(ROOT / "exporters").rglob("*.py"), *GRAPH_FILES]) <= extra


IMPORT_WITHOUT = """
import importlib, sys

blocked, *modules = sys.argv[1:]

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked.split(","):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Block())
for module in modules:
    importlib.import_module(module)
"""


def modules(files: Iterable[Path]) -> list[str]:
    return [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]


def test_every_module_of_the_runtime_imports_where_torch_and_onnx_cannot() -> None:
    there = find_spec("ray") is not None
    files = [file for file in RUNTIME_FILES if there or "ray" not in imported([file])]
    python("-c", IMPORT_WITHOUT, ",".join(HEAVY), *modules(files))


def test_every_graph_rewrite_imports_where_torch_cannot() -> None:
    assert GRAPH_FILES
    python("-c", IMPORT_WITHOUT, "torch,diffusers,transformers,optimum", *modules(GRAPH_FILES))


def test_an_exporter_does_not_import_where_torch_cannot() -> None:
    done = command(sys.executable, "-c", IMPORT_WITHOUT, "torch", "cvx_deploy.exporters.tracing.trace")
    assert "torch is blocked" in done.stderr


def findings(code: str, filename: str) -> set[str]:
    """Return the rules that ruff says `code` breaks if it stood in `filename`."""
    ruff = (sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "json", "--stdin-filename")
    done = subprocess.run((*ruff, filename, "-"), input=code, cwd=ROOT, capture_output=True, text=True, check=False)
    return {finding["code"] for finding in json.loads(done.stdout)}


@pytest.mark.parametrize(
    ("code", "filename", "rule"),
    [
        ("import torch\n", "cvx_deploy/pipeline/new.py", "TID253"),
        ("from diffusers import CogVideoXPipeline\n", "cvx_deploy/new.py", "TID253"),
        ("import exporters\n", "cvx_deploy/new.py", "TID251"),
        ("from exporters import trace\n", "tests/new.py", "TID251"),
    ],
)
def test_ruff_flags_a_banned_import(code: str, filename: str, rule: str) -> None:
    assert rule in findings(code, filename)


@pytest.mark.parametrize(
    ("code", "filename"),
    [
        ("import torch\n", "exporters/new.py"),
        ("def f() -> None:\n    import torch\n", "cvx_deploy/new.py"),
        ("import torch\n", "tests/new.py"),
        ("from cvx_deploy.exporters import trace\n", "cvx_deploy/new.py"),
    ],
)
def test_ruff_lets_an_import_pass_where_it_belongs(code: str, filename: str) -> None:
    assert not findings(code, filename) & {"TID251", "TID253"}
