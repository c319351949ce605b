"""The command line is what scripts build on: exit codes, streams, JSON, help and completion."""

import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.cli import cli
from cvx_deploy.errors import CvxError
from cvx_deploy.families.cogvideox.models import MODELS
from cvx_deploy.install import pip_install
from tests.bundle.test_bundle import make_bundle
from tests.command import Outcome, cvx
from tests.conftest import Exported, Tiny
from tests.untraced import without_tracing

COMMANDS = [
    "synth",
    "export",
    "convert",
    "build",
    "refit",
    "run",
    "quantize",
    "calibrate-cache",
    "cache",
    "bench",
    "check",
    "plan",
    "inspect",
    "doctor",
    "verify",
    "pack",
    "unpack",
    "serve",
    "triton",
    "batch",
    "completion",
]
HEAVY = {"rich", "numpy", "torch", "onnxruntime", "diffusers", "transformers", "av", "PIL", "tokenizers", "onnx_ir"}


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no setting of the surroundings tell of a terminal, or of its width."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "CVX_ENGINES_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path)


def python(program: str, *words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


def only_object(outcome: Outcome) -> dict[str, Any]:
    """Return the one JSON object on stdout, after making sure that nothing else is there."""
    value = json.loads(outcome.out)
    assert isinstance(value, dict)
    return value


def test_the_commands_are_those_that_are_tested_here() -> None:
    assert sorted(cli.commands) == sorted(COMMANDS)


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("words", [[], *([command] for command in COMMANDS)], ids=str)
def test_every_help_text_has_an_example_and_explains_every_option(words: list[str], flag: str) -> None:
    outcome = cvx(*words, flag)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(f"Usage: {' '.join(['cvx-deploy', *words])} ")
    assert f"  cvx-deploy {words[0] if words else 'run'}" in outcome.out
    command = cli.commands[words[0]] if words else cli
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert parameter.opts[0] in outcome.out


def test_help_texts_fit_into_the_width_they_are_made_for() -> None:
    for words in ([], *([command] for command in COMMANDS)):
        assert max(map(len, cvx(*words, "--help").out.splitlines())) <= 100


def test_every_model_has_its_name_in_the_help_of_export() -> None:
    text = " ".join(cvx("export", "--help").out.split())
    assert ", ".join(MODELS) in text


def test_help_imports_nothing_heavy() -> None:
    program = f"""
import sys
import cvx_deploy.cli
for words in {[[], *([command] for command in COMMANDS)]}:
    sys.argv = ["cvx-deploy", *words, "--help"]
    try:
        cvx_deploy.cli.main()
    except SystemExit as exit_:
        assert exit_.code == 0
print(*sys.modules, file=sys.stderr)
"""
    done = python(program)
    assert done.returncode == 0, done.stderr
    imported = set(done.stderr.split())
    assert "click" in imported
    assert not imported & HEAVY


def test_the_version_is_the_packages() -> None:
    assert cvx("--version").out == f"cvx-deploy, version {version('cvx-deploy')}\n"


def test_the_module_runs_as_the_command_does() -> None:
    done = subprocess.run([sys.executable, "-m", "cvx_deploy", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout == cvx("--help").out


WRONG_USAGE = [
    ["nothing"],
    ["inspect"],
    ["run", "--model", "a", "--bundle", "b"],
    ["run", "--model"],
    ["run", "--model", "a", "--steps", "many"],
    ["run", "--model", "a", "--scheduler", "euler"],
    ["run", "--model", "a", "--threads", "0"],
    ["run", "--model", "a", "--engine", "magic"],
    ["export", "--model", "mine"],
    ["export", "--model", "5b", "--checkpoint", "c", "--precision", "int3"],
    ["export", "--model", "5b", "--checkpoint", "c", "--frames", "9.5"],
    ["export", "--model", "5b", "--checkpoint", "c", "--shape", "49x480"],
    ["export", "--model", "5b", "--checkpoint", "c", "--shape", "49x480x0"],
    ["export", "--model", "5b", "--checkpoint", "c", "--shape", "49x480x720", "--width", "720"],
    ["run", "--model", "a", "--shape", "big"],
    ["run", "--model", "a", "--shape", "49x480x720", "--frames", "49"],
    ["synth", "--like", "6b", "--output", "c"],
    ["inspect", "--model", "5b", "stray"],
    ["completion", "tcsh"],
]


@pytest.mark.parametrize("words", WRONG_USAGE, ids=" ".join)
def test_wrong_usage_is_explained_and_exits_with_2(words: list[str]) -> None:
    outcome = cvx(*words)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.splitlines()[-1].startswith("Error: ")


def test_wrong_usage_is_one_json_object_too() -> None:
    outcome = cvx("inspect", "--json")
    assert outcome.code == 2
    assert only_object(outcome) == {
        "error": {"type": "UsageError", "what": "name a bundle with --model NAME or --bundle DIR", "fix": "see --help"}
    }


def test_a_stated_failure_exits_with_1_and_says_so_on_stderr_alone(tmp_path: Path) -> None:
    outcome = cvx("inspect", "--bundle", tmp_path / "nothing")
    assert outcome.failure().startswith(f"error: there is no bundle at {tmp_path}/nothing. fix: run: cvx-deploy export")
    assert outcome.out == ""


def test_a_stated_failure_is_one_json_object_too(tmp_path: Path) -> None:
    outcome = cvx("inspect", "--bundle", tmp_path / "nothing", "--json")
    error = only_object(outcome)["error"]
    assert outcome.failure() == f"error: {error['what']}. fix: {error['fix']}."
    assert error["type"] == "BundleError"


def test_an_interrupt_exits_with_130_and_is_one_json_object_too(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cvx_deploy.bundle.inspect.describe", interrupted)
    outcome = cvx("inspect", "--bundle", bundle.path, "--json")
    assert outcome.code == 130
    assert outcome.err.split() == ["interrupted"]
    assert only_object(outcome)["error"]["type"] == "Interrupted"
    outcome = cvx("inspect", "--bundle", bundle.path)
    assert (outcome.code, outcome.out) == (130, "")


def test_an_interrupt_that_a_library_turns_into_another_error_is_still_one(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrapped(*_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None

    monkeypatch.setattr("cvx_deploy.bundle.inspect.describe", wrapped)
    outcome = cvx("inspect", "--bundle", bundle.path)
    assert (outcome.code, outcome.out, outcome.err.split()) == (130, "", ["interrupted"])


def test_an_interrupt_that_the_shell_has_ignored_stays_ignored(bundle: Bundle) -> None:
    program = "import os, signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    program += "; from cvx_deploy import cli; from cvx_deploy.bundle import inspect"
    program += "; inspect.describe = lambda _: os.kill(os.getpid(), signal.SIGINT) or 'done'; cli.main()"
    done = python(program, "inspect", "--bundle", bundle.path)
    assert (done.returncode, done.stdout) == (0, "done\n")


class Panic(BaseException):
    """No `Exception`, as a panic in Rust is none."""


@pytest.mark.parametrize("error", [ZeroDivisionError("\x1b[31mby\nnought"), Panic(), MemoryError(), RecursionError()])
def test_an_error_of_the_program_itself_is_one_line_that_says_so(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr("cvx_deploy.bundle.inspect.describe", broken)
    outcome = cvx("inspect", "--bundle", bundle.path, "--json")
    line = outcome.failure()
    assert outcome.err == line + "\n"
    assert "\x1b" not in line
    assert ("not enough memory" if isinstance(error, MemoryError) else "a fault of cvx-deploy") in line
    assert only_object(outcome)["error"]["what"] in line


def test_with_debug_the_traceback_is_shown_too(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("cvx_deploy.bundle.inspect.describe", broken)
    outcome = cvx("--debug", "inspect", "--bundle", bundle.path)
    assert (outcome.code, "Traceback" in outcome.err) == (1, True)
    monkeypatch.setenv("CVX_DEBUG", "1")
    assert "Traceback" in cvx("inspect", "--bundle", bundle.path).err


def test_what_libraries_warn_of_reaches_nobody_unless_asked_for(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noisy(*_: object) -> str:
        warnings.warn("look out", stacklevel=1)
        logging.getLogger("library").error("look here")
        return "done"

    monkeypatch.setattr("cvx_deploy.bundle.inspect.describe", noisy)
    assert cvx("inspect", "--bundle", bundle.path).err == ""
    with pytest.warns(UserWarning, match="look out"):
        cvx("--debug", "inspect", "--bundle", bundle.path)


def test_what_would_steer_a_terminal_is_escaped(tmp_path: Path) -> None:
    outcome = cvx("inspect", "--bundle", tmp_path / "\x1b]0;title\x07\x9b31m\u202eno\nerror: such")
    assert outcome.failure().count("error: ") == 2
    assert "\\x1b]0;title\\x07\\x9b31m\\u202eno\\nerror: such" in outcome.err
    assert cvx("inspect", "--model", "\x1b[31m").err.count("\x1b") == 0


def test_a_failure_of_several_lines_is_stated_in_one(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise CvxError("one\ntwo", fix="three\nfour")

    monkeypatch.setattr("cvx_deploy.bundle.inspect.describe", fail)
    assert cvx("inspect", "--bundle", bundle.path).failure() == "error: one\\ntwo. fix: three\\nfour."


def test_what_the_system_refuses_is_stated(tmp_path: Path) -> None:
    line = cvx("inspect", "--bundle", tmp_path / ("x" * 300)).failure()
    assert line.startswith(f"error: {tmp_path}/xxx")
    assert "File name too long" in line


def test_a_reader_that_goes_away_leaves_no_traceback(bundle: Bundle) -> None:
    for words in (["--bundle", bundle.path], ["--bundle", "nothing"]):
        reading, writing = os.pipe()
        os.close(reading)
        command = [sys.executable, "-m", "cvx_deploy", "inspect", "--json", *map(str, words)]
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
        os.close(writing)
        assert done.returncode == 1
        assert done.stderr.count("\n") == (words[1] == "nothing")  # a failure is stated all the same
        assert "Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_stdout_is_stated(bundle: Bundle) -> None:
    command = [sys.executable, "-m", "cvx_deploy", "inspect", "--bundle", str(bundle.path)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the output: No space left on device. fix: ")
    assert len(done.stderr.splitlines()) == 1


def test_inspect_says_the_same_in_words_and_in_json(bundle: Bundle) -> None:
    words, values = cvx("inspect", "--bundle", bundle.path), cvx("inspect", "--bundle", bundle.path, "--json")
    assert (words.code, values.code) == (0, 0)
    assert words.out.startswith("5b: text-to-video, rope positions, 9x80x112, 17x80x112 at 8 fps\n")
    found = only_object(values)
    assert found.pop("bundle") == str(bundle.path)
    assert found == json.loads(bundle.manifest.to_json())


def test_inspect_checks_the_weights_too(bundle: Bundle) -> None:
    (Path(bundle.manifest.checkpoint) / "vae" / "out").unlink()
    assert "out is missing" in cvx("inspect", "--bundle", bundle.path).failure()


@pytest.mark.parametrize("how", ["option", "environment", "working directory"])
def test_a_model_is_a_bundle_in_the_engines_folder(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    folder = tmp_path / "engines"
    folder.mkdir()
    bundle.path.rename(folder / "mine")
    words = ["inspect", "--model", "mine"]
    if how == "option":
        words += ["--engines-dir", str(folder)]
    elif how == "environment":
        monkeypatch.setenv("CVX_ENGINES_DIR", str(folder))
    else:
        monkeypatch.chdir(tmp_path)
    assert cvx(*words).code == 0


def test_synth_prints_the_folder_it_made(tmp_path: Path) -> None:
    outcome = cvx("synth", "--like", "2b", "--output", tmp_path / "one", "--seed", "3")
    assert (outcome.code, outcome.out, outcome.err) == (0, f"{tmp_path}/one\n", "")
    values = only_object(cvx("synth", "--like", "2b", "--output", tmp_path / "two", "--json", "--quiet"))
    size = sum(file.stat().st_size for file in (tmp_path / "two").rglob("*") if file.is_file())
    told = {"checkpoint": f"{tmp_path}/two", "like": "2b", "scale": "tiny", "seed": 0, "outliers": False}
    assert values == told | {"bytes": size}
    planted = only_object(cvx("synth", "--like", "2b", "--output", tmp_path / "three", "--outliers", "--json"))
    assert planted == told | {"checkpoint": f"{tmp_path}/three", "outliers": True, "bytes": size}


def test_export_prints_the_bundle_it_made(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_tracing(monkeypatch)
    common = ["export", "--model", "5b", "--checkpoint", tiny("5b")]
    outcome = cvx(*common, "--engines-dir", tmp_path)
    assert (outcome.code, outcome.out, outcome.err) == (0, f"{tmp_path}/5b\n", "")
    values = only_object(cvx(*common, "--output", tmp_path / "other", "--json", "--frames", "8"))
    sizes = {path.stem: path.stat().st_size for path in (tmp_path / "other").glob("*.onnx")}
    assert values == {
        "bundle": f"{tmp_path}/other",
        "model": "5b",
        "shapes": ["8x80x112"],
        "precision": "fp32",
        "loras": [],
        "networks": sizes,
        "quantized": {},
    }


@pytest.mark.parametrize("words", [["synth", "--like", "2b"], ["export", "--model", "5b", "--checkpoint", "c"]])
def test_without_the_export_packages_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    line = cvx(*words, "--output", tmp_path / "out").failure()
    assert line == f"error: this command needs torch, which the runtime does without. fix: {pip_install('export')}."


def test_run_prints_its_videos_and_times(exported: Exported, tmp_path: Path) -> None:
    path = exported("5b").path
    common = ["run", "--bundle", path, "--prompt", "a red circle", "--steps", "2", "--threads", "1"]
    outcome = cvx(*common, "--output", tmp_path / "one.npy")
    assert (outcome.code, outcome.out) == (0, f"{tmp_path}/one.npy\n")
    stages = ["text encoder", "vae encode", "modulation", "transformer", "vae decode", "write video"]
    assert [line.split("  ")[0] for line in outcome.err.splitlines()] == [*stages, "total"]  # and no bars in a file
    quiet = cvx(*common, "--output", tmp_path / "two.npy", "--json", "--quiet")
    assert quiet.err == ""
    values = only_object(quiet)
    assert sorted(values.pop("seconds")) == sorted(stages)
    assert values == {
        "videos": [f"{tmp_path}/two.npy"],
        "seeds": [0],
        "cached_prompts": 0,
        "steps": [],
        "branches_apart": False,
        "windows": None,
        "fps": 8,
        "interpolated": [],
        "shape": "9x80x112",
        "engine": "onnxruntime",
        "precision": "fp32",
        "bundle": str(path),
    }
    assert np.array_equal(np.load(tmp_path / "one.npy"), np.load(tmp_path / "two.npy"))


def test_bars_are_shown_on_a_terminal_and_only_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["synth", "--like", "5b", "--output"]
    assert cvx(*words, tmp_path / "one").err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # how rich is told that it writes to a terminal
    assert "write weights" in cvx(*words, tmp_path / "two").err
    assert cvx(*words, tmp_path / "three", "--quiet").err == ""


@pytest.mark.parametrize(
    ("shell", "sign"), [("bash", "complete -o"), ("zsh", "#compdef"), ("fish", "complete --no-files")]
)
def test_completion_scripts_complete_the_command(shell: str, sign: str) -> None:
    outcome = cvx("completion", shell)
    assert outcome.code == 0
    assert sign in outcome.out
    assert f"_CVX_DEPLOY_COMPLETE={shell}_complete" in outcome.out


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("cvx-deploy ex", ["export"]),
        ("cvx-deploy run --see", ["--seed"]),
        ("cvx-deploy synth --like 1", ["1.5-5b", "1.5-5b-i2v"]),
    ],
)
def test_completion_knows_commands_options_and_choices(
    monkeypatch: pytest.MonkeyPatch, line: str, found: list[str]
) -> None:
    monkeypatch.setenv("_CVX_DEPLOY_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - 1))
    assert [answer.split(",")[1] for answer in cvx().out.splitlines()] == found


@pytest.mark.parametrize("name", ["", "../elsewhere", "/tmp/x", ".hidden", "a b"])
@pytest.mark.parametrize("command", [("export", "--checkpoint", "c"), ("run", "--prompt", "p"), ("inspect",)])
def test_a_name_that_is_not_plain_is_wrong_usage(command: tuple[str, ...], name: str) -> None:
    outcome = cvx(*command, "--model", name)
    assert outcome.code == 2
    assert "not a plain name" in outcome.err
