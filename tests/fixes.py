"""What a failure advises, held against the real command line: commands parse, options exist, their values are taken."""

import contextlib
import io
import re
import shlex
import tomllib
from collections.abc import Iterator

import click

from cvx_deploy.cli import cli
from tests.conftest import ROOT

HOLE = "\N{LEFT ANGLE BRACKET}\N{RIGHT ANGLE BRACKET}"
"""Stands for what a message fills in."""
_EXAMPLES = {
    **{"--target": "sm89", "--shape": "9x48x48", "--vram": "12GB", "--engine": "tensorrt-rtx", "--precision": "fp32"},
    **{"--frames": "9", "--height": "96", "--width": "96", "--steps": "2"},
}
_COMMAND = re.compile(
    r"(?P<run>(?:run|then|first): )?\bcvx-deploy(?P<rest>(?: --debug)? [a-z].*?)(?=, |; |\. |\.$|$)", re.DOTALL
)
_END = re.compile(r", |; |\. |\.$|$")
_OBJECTS = r"(?: it| a bundle| the engine| the bundle| anew| again)*"
_VERB = re.compile(rf"\b(?P<verb>run|export|build|calibrate){_OBJECTS} with(?P<rest> --.*)", re.DOTALL)
_COMMANDS = {"calibrate": "quantize"}
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")
_PIP = re.compile(r"\bpip (?:un)?install (?P<rest>.+)", re.DOTALL)
_PIP_FLAGS = {"-y", "-e", "--upgrade", "--force-reinstall", "--no-deps"}
_EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
_FOREIGN = {"--help", "--debug", *_PIP_FLAGS}  # of all commands, and of pip
_PROSE = {"such", "which", "or", "of", "and", "to", "until", "from", "alone", "means", "than"}


def faults(text: str) -> list[str]:
    """Return what cannot be followed in a piece of advice, of whose parts `HOLE` may stand for some."""
    return list(_faults(text)) if "--" in text or "cvx-deploy" in text or "pip" in text else []


def _faults(text: str) -> Iterator[str]:
    rest = text
    for found in _PIP.finditer(text):
        piece = _up_to_end(found["rest"])
        yield from _pip(piece)
        rest = rest.replace(piece, "")
    for option in _OPTION.findall(rest):
        if option not in _known():
            yield f"{option} is no option of any command"
    for found in _COMMAND.finditer(text):
        yield from _command(found["rest"].split(" "), whole=found["run"] is not None)
    for verb in _VERB.finditer(text):
        command = cli.commands[_COMMANDS.get(verb["verb"], verb["verb"])]
        yield from _options(command, _up_to_end(verb["rest"]))


def _up_to_end(text: str) -> str:
    end = _END.search(text)
    return text[: end.start() if end else None]


def _known() -> set[str]:
    return _FOREIGN.union(*(parameter.opts for command in cli.commands.values() for parameter in command.params))


def _pip(piece: str) -> Iterator[str]:
    for word in shlex.split(piece):
        if word.startswith("-") and word not in _PIP_FLAGS:
            yield f"{word} is no option of pip install"
        extras = re.fullmatch(r"(?:cvx-deploy|/.*)\[([a-z,-]+)\](?: @ .*)?", word)
        if extras and not set(extras[1].split(",")) <= _EXTRAS:
            yield f"{word} is no extra of this package"


def _command(words: list[str], *, whole: bool) -> Iterator[str]:
    """Parse a whole command, or look at the options of one that a sentence goes on with."""
    line = [word for word in words if word and word != "--debug"]
    name = line[0].rstrip(",.;:")
    if name not in cli.commands:
        if whole or len(line) == 1:
            yield f"{name} is no command"
        return
    command = cli.commands[name]
    if not whole:
        yield from _options(command, " ".join(line[1:]))
        return
    try:
        rest = _filled(shlex.split(" ".join(line[1:])))
        parent = click.Context(cli, info_name="cvx-deploy", **cli.context_settings)
        with contextlib.redirect_stdout(io.StringIO()):  # --help
            command.make_context(name, rest, parent=parent)
    except (click.UsageError, ValueError) as error:
        yield f"{' '.join(words)}: {error}"
    except click.exceptions.Exit:
        pass


def _filled(words: list[str]) -> list[str]:
    """Put examples where a message fills in a value, and leave out what it adds as a whole."""
    pairs = [(option, word) for option, word in zip(["", *words], words, strict=False)]
    kept = [(option, word) for option, word in pairs if HOLE not in word or option.startswith("--")]
    return [_EXAMPLES.get(option, "x") if HOLE in word else word for option, word in kept]


def _options(command: click.Command, text: str) -> Iterator[str]:
    """Look at the options in a text that belong to a command, and at the values beside them."""
    parameters = {option: parameter for parameter in command.params for option in parameter.opts}
    words = text.split()
    for word, following in zip(words, [*words, ""][1:], strict=True):
        option, value = word.rstrip(",.;:)"), following.strip(",.;:()")
        if not _OPTION.fullmatch(option) or option in _FOREIGN:
            continue
        if option not in parameters:
            if option not in _known() or not _elsewhere(text, option):
                yield f"{option} is no option of {command.name}"
        elif word == option and value and HOLE not in value:
            yield from _value(command, parameters[option], value)


def _elsewhere(text: str, option: str) -> bool:
    """Whether another verb stands before an option, so that it belongs to that one's command."""
    return re.search(rf"\b(?:run|export|build)\b.*{option}", text) is not None


def _value(command: click.Command, parameter: click.Parameter, value: str) -> Iterator[str]:
    if getattr(parameter, "is_flag", False) or value in _PROSE or value.isupper() or value.startswith("--"):
        return
    if not re.search(r"\d", value) and not isinstance(parameter.type, click.Choice):
        return
    try:
        parameter.process_value(click.Context(command), (value,) if parameter.multiple else value)
    except click.UsageError as error:
        yield f"{parameter.opts[0]} {value}: {error}"
