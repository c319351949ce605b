"""What the documentation prints: its commands parse, its links lead somewhere, its tables agree with the code."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import click
import pytest

from cvx_deploy.bundle.schema import Manifest
from cvx_deploy.cli import cli
from cvx_deploy.families.cogvideox.models import MODELS
from tests.command import cvx
from tests.conftest import ROOT

PAGES = sorted(
    path for place in ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "engines/README.md") for path in ROOT.glob(place)
)
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^[ \t]*(?:\$ |\S*/)?cvx-deploy (.+)$", re.MULTILINE)
IN_PLACE = re.compile(r"`cvx-deploy ([^`\n]+)`")
LINK = re.compile(r"\[[^\]\n]*\]\(([^)#\s]+)")
# A path in backquotes that begins with something the repository has, not with what a command makes.
NAMED = re.compile(
    r"`((?:\.ci|\.github|benchmarks|cvx_deploy|docs|exporters|scripts|tests)/[\w./-]*|\w+\.(?:md|toml))`"
)


def joined(text: str) -> str:
    """Return a text with its continued lines put together."""
    return text.replace("\\\n", " ")


def printed_commands() -> Iterator[str]:
    """Yield what follows ``cvx-deploy`` in code blocks, the Makefile, and the examples of the help."""
    for page in PAGES:
        for block in FENCED.findall(page.read_text(encoding="utf-8")):
            yield from COMMAND.findall(joined(block))
    yield from COMMAND.findall(joined((ROOT / "Makefile").read_text(encoding="utf-8")))
    for command in (cli, *cli.commands.values()):
        yield from COMMAND.findall(command.help or "")


def named_command(words: list[str]) -> tuple[click.Command, list[str]]:
    """Return the command that some words name, and the words after its name."""
    with click.Context(cli) as context:
        _, command, rest = cli.resolve_command(context, words)
    assert command is not None
    return command, rest


def parse(line: str) -> None:
    """Parse the words after ``cvx-deploy`` up to a comment or redirection, and run nothing."""
    words = shlex.split(re.split(r" (?:>|>>|\||&&) ", line)[0], comments=True)
    command, rest = named_command(words)
    # With its parent: a command keeps the help option it is first asked for, and -h is the group's setting.
    command.make_context(command.name, rest, parent=click.Context(cli, info_name="cvx-deploy", **cli.context_settings))


@pytest.mark.parametrize("line", sorted(set(printed_commands())))
def test_every_printed_command_parses(line: str) -> None:
    parse(line)


@pytest.mark.parametrize(
    "line", ["rum --model 5b", "run --modle 5b", "export --checkpoint c", "synth --like 6b --output checkpoints/6b"]
)
def test_a_mistaken_command_does_not_parse(line: str) -> None:
    with pytest.raises(click.UsageError):
        parse(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_within_sentences_exist_with_their_options(page: Path) -> None:
    for line in IN_PLACE.findall(page.read_text(encoding="utf-8")):
        command, rest = named_command(line.split())
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in rest if word.startswith("-")} <= known | {"--help"}, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_named_file_exists(page: Path) -> None:
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    targets = [page.parent / target for target in LINK.findall(text) if "://" not in target]
    targets += [ROOT / name for name in NAMED.findall(text)]
    assert not [str(target) for target in targets if not target.exists()]


def test_readme_names_every_command() -> None:
    assert set(re.findall(r"^\| `cvx-deploy ([\w-]+)` \|", README, re.MULTILINE)) == set(cli.commands)


def test_readme_describes_every_model_as_the_code_does() -> None:
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in README.splitlines() if "zai-org/" in row]
    table = {cells[0].strip("`"): cells for cells in rows if len(cells) == 7}
    assert set(table) == set(MODELS)
    for name, (_, hub_id, source, size, video, fps, scheduler) in table.items():
        model = MODELS[name]
        assert hub_id == model.hub_id
        assert source.endswith("image") == (model.traits.task == "image-to-video")
        assert size == f"{model.num_layers} x {model.num_attention_heads} x {model.attention_head_dim}"
        assert (video, fps) == (f"{model.frames}x{model.height}x{model.width}", str(model.fps))
        assert scheduler == model.scheduler


def test_bundle_page_describes_every_field_of_the_manifest() -> None:
    page = (ROOT / "docs" / "bundle.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == [field.name for field in fields(Manifest)]


RUN = re.compile(r"^<!-- run -->\n```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.export
@pytest.mark.parametrize(
    "page", [page for page in PAGES if "<!-- run -->" in page.read_text(encoding="utf-8")], ids=str
)
def test_commands_of_a_page_run_one_after_the_other(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = RUN.findall(page.read_text(encoding="utf-8"))
    for line in COMMAND.findall(joined("\n".join(blocks))):
        done = cvx(*shlex.split(line))
        # doctor exits with 1 where something is in the way of a bundle here, such as bf16 on this CPU.
        assert done.code == 0 or (line == "doctor" and "Traceback" not in done.err), done
