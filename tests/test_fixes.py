"""Every `fix:` can be followed: what the sources may print is parsed here, and the cures of common mistakes are run.

What other tests make fail is held to the same by a fixture of `tests/conftest.py`, with all that a message fills in.
"""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.command import cvx
from tests.conftest import ROOT
from tests.fixes import HOLE, faults
from tests.untraced import without_tracing

SOURCES = sorted(path for place in ("cvx_deploy", "exporters") for path in (ROOT / place).rglob("*.py"))


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield every text of a module but its docstrings, with `HOLE` for what is filled in."""
    left_out = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            left_out |= {id(part) for part in node.values}
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        elif isinstance(node, ast.JoinedStr):
            parts = (str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)
            yield node.lineno, "".join(parts)


def unquoted(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield every path that stands in a command as it is: a space in it would make two words of it."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.JoinedStr):
            continue
        text = ""
        for part in node.values:
            if isinstance(part, ast.Constant):
                text += str(part.value)
            elif isinstance(part, ast.FormattedValue):
                words = ast.unparse(part.value)
                option = text.split(" ")[-2:-1] if "cvx-deploy" in text else []
                if option in (["--bundle"], ["--checkpoint"], ["--output"]) and not words.startswith("shlex.quote"):
                    yield node.lineno, words


def all_faults(tree: ast.AST) -> list[str]:
    found = [f"{line}: {fault}" for line, text in texts(tree) for fault in faults(text)]
    return found + [f"{line}: {path} is not quoted" for line, path in unquoted(tree)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_module_advises_can_be_followed(path: Path) -> None:
    assert all_faults(ast.parse(path.read_bytes())) == []


@pytest.mark.parametrize(
    "line",
    [
        'fix = "run: cvx-deploy rum --model 5b"',
        'fix = "run: cvx-deploy export"',  # without --model
        'fix = f"run: cvx-deploy build --bundle {shlex.quote(path)} --targets sm89"',
        'fix = f"run: cvx-deploy build --bundle {path}"',  # may hold a space
        'fix = "name it with --modle NAME"',
        'fix = "run it with --target sm89"',  # an option of another command
        'fix = "export with --precision int5"',
        'fix = "run with --engine tensorflow"',
        'fix = f"export with {words} --no-lora"',
        'fix = "pip install --force onnxruntime"',
        "fix = \"pip install 'cvx-deploy[exports]'\"",
    ],
)
def test_twin_advice_that_cannot_be_followed_is_found(line: str) -> None:
    assert all_faults(ast.parse(line))


RUN = ("run", "--prompt", "a red circle", "--steps", "2", "--threads", "1", "--output", "video.npy", "-q")
EXAMPLES = {"--image": "image.png", "--video": "clip", "--cache": "fixed", "--steps": "10", "--prompt": "a red circle"}
"""What a person puts where advice names an option alone, or with FILE or DIR."""
MISTAKES: dict[str, tuple[str, ...]] = {
    "no steps": (*RUN, "--steps", "0"),
    "steps that leave the schedule": (*RUN, "--steps", "61"),
    "too strong guidance": (*RUN, "--guidance-scale", "2000"),
    "no videos": (*RUN, "--num-videos", "0"),
    "a foreign format": (*RUN, "--output", "video.avi"),
    "a foreign format of latents": (*RUN, "--save-latents", "latents.txt"),
    "a foreign format of a picture": (*RUN, "--contact-sheet", "sheet.jpg"),
    "too much speed": (*RUN, "--steps", "12", "--cache", "fixed", "--cache-speedup", "99"),
    "no speed": (*RUN, "--steps", "12", "--cache-speedup", "2"),
    "too much tolerance": (*RUN, "--steps", "12", "--cache", "adaptive", "--cache-tolerance", "9"),
    "the dial of the other mode": (*RUN, "--steps", "12", "--cache", "adaptive", "--cache-speedup", "2"),
    "too few steps to forecast": (*RUN, "--fast"),
    "two ways to forecast": (*RUN, "--steps", "12", "--fast", "--cache", "fixed"),
    "strength of nothing": (*RUN, "--strength", "0.5"),
    "no strength": (*RUN, "--video", "clip", "--strength", "0"),
    "too little strength": (*RUN, "--video", "clip", "--strength", "0.1"),
    "no image": (*RUN, "--model", "mini-i2v"),
    "an image for a model without": (*RUN, "--model", "mini", "--image", "image.png"),
    "no prompt": ("run", *RUN[3:]),
    "another size": (*RUN, "--model", "mini", "--frames", "17"),
    "no such seed": (*RUN, "--seed", str(1 << 70)),
    "latents of a seed": ("run", "--from-latents", "latents.npy", "--threads", "1", "--output", "v.npy", "--seed", "3"),
    "forecasts with latents in half precision": (*RUN, "--latents-dtype", "bf16", "--fast", "--steps", "12"),
    "no engine for the packaged bundle": ("inspect", "--model", "mini", "--plan"),
    "a forgotten frame": ("export", "--model", "mini", "--frames", "10", "--output", "made"),
}
CURES = (
    (r"use one from (\d+)", "--seed"),
    (r"use (--[a-z-]+) (?:between |from )?(\S+?)[,.]?(?: |$)", None),
    (r"raise (--[a-z-]+)", None),
    (r"add (--[a-z-]+)", None),
    (r"give at least one with (--[a-z-]+)", None),
    (r"leave out (--[a-z-]+)", ""),
    (r"leave (--[a-z-]+) out", ""),
)


def cured(words: list[str], fix: str) -> list[str]:
    """Return a command with the first thing done that is advised."""
    if found := re.search(r"end it in (\.\w+)", fix):
        return with_option(words, "--output", f"video{found[1]}")
    for pattern, option in CURES:
        if found := re.search(pattern, fix):
            name = option or found[1]
            if option == "":
                return without(words, name)
            value = found[found.lastindex or 1]
            return with_option(words, name, EXAMPLES[name] if value == name else value)
    raise AssertionError(f"nothing can be done about {fix!r}")


def without(words: list[str], option: str) -> list[str]:
    """Return a command without an option and its value."""
    place = len(words) - 1 - words[::-1].index(option)
    end = place + 1 if option in ("--fast",) else place + 2
    return words[:place] + words[end:]


def with_option(words: list[str], option: str, value: str) -> list[str]:
    return [*words, option, value]  # the last of several counts


@pytest.fixture
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with an image, a clip, and finished latents."""
    monkeypatch.chdir(tmp_path)
    pictures = np.random.default_rng(0).integers(0, 255, (9, 48, 48, 3), np.uint8)
    Path("clip").mkdir()
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(f"clip/{index}.png")
    Image.fromarray(pictures[0]).save("image.png")
    np.save("latents.npy", np.zeros((1, 3, 8, 6, 6), np.float32))


@pytest.mark.usefixtures("_workplace")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_cured_by_what_is_advised(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = list(MISTAKES[mistake])
    without_tracing(monkeypatch)
    for _ in range(3):  # one cure may lead to what else is wrong
        outcome = cvx(*words)
        if outcome.code == 0:
            return
        fix = outcome.failure().partition(". fix: ")[2].removesuffix(".")
        commands = re.findall(r"cvx-deploy (export .*?)(?:, |$)", fix)
        if commands:
            assert cvx(*shlex.split(commands[0])).code == 0
            return  # the bundle is there; that it makes such videos is what tests of exports say
        words = cured(words, fix)
    raise AssertionError(outcome)


@pytest.mark.usefixtures("_workplace")
@pytest.mark.parametrize(
    ("words", "fix"),
    [((*RUN, "--steps", "0"), "use --steps 61"), ((*RUN, "--fast"), "leave --prompt out")],
)
def test_twin_a_cure_that_does_not_help_fails(words: tuple[str, ...], fix: str) -> None:
    assert cvx(*cured(list(words), fix)).code != 0
