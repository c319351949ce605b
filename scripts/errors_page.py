"""Write docs/errors.md: every error this package states, read from where the code raises it.

python scripts/errors_page.py
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "errors.md"

CAUSES = {
    "CvxError": "What belongs to no part below: a download, an option, a file of results.",
    "CheckpointError": "A checkpoint folder, config, shard, adapter or tensor is missing, damaged, or could not be "
    "fetched. Downloads that break off leave whole files alone and go on where they stopped; a damaged file is fetched "
    "again after it has been deleted.",
    "WrongModelError": "The checkpoint or adapter is healthy, but another model's: names or shapes of its tensors are "
    "not those of the model that was asked for, or a folder was passed for another component.",
    "ShapeError": "A video size that the model cannot do (the VAE halves space three times and time twice, the "
    "transformer patches what is left), or that this bundle was not exported for.",
    "BundleError": "A file of a bundle, a packed bundle, or an engine in it is missing, truncated, altered, of another "
    "version of this program, or lies outside the bundle. Copies that broke off, and checkpoints that were moved or "
    "edited after the export, are the usual reasons.",
    "MediaError": "An image or video that cannot be decoded, has another size than the bundle, or cannot be encoded in "
    "the format that the file name asks for.",
    "PromptError": "Prompts and inputs that do not go together: none, one too long for the tokenizer, an image for a "
    "text-to-video model.",
    "RecipeError": "A precision that does not exist, or that one of the networks cannot have.",
    "CalibrationError": "A calibration table that is missing, damaged, of another checkpoint or video size, or whose "
    "activations were not finite.",
    "OutputError": "A place that cannot be written: no space, no permission, something else in it, or another process "
    "at work there. Nothing that was there before is lost, and nothing half-written is left.",
    "ParityError": "Results that are further from eager PyTorch than their precision explains; "
    "[parity.md](parity.md) says where to look for each rung.",
    "EngineError": "An engine kind that is not installed, that cannot run or build this bundle here, or a compiled "
    "engine that is missing or of other weights, settings, versions or GPUs than the run needs.",
    "OutOfMemoryError": "The GPU has less memory free than the networks need, or than `--vram` allows.",
}
"""Why each class is raised, in words; the classes are those of cvx_deploy/errors.py."""

HEAD = """# Errors

A failure is one line on stderr, `error: what is wrong and where. fix: how to mend it.`, exit code 1, and no traceback;
with `--json` stdout holds `{"error": {"type", "what", "fix"}}`. Wrong usage of the command line is exit code 2, and
Ctrl-C 130.

Below is every such error, by its type. Words in capitals stand for what a message fills in (PATH, NAME, SHAPE); `...`
for text of other programs, or text that depends on more. A cure of `...` is put together from the case at hand, most
often the command to run. `python scripts/errors_page.py` makes this page from the code.
"""


@dataclass(frozen=True)
class Stated:
    """One place that raises an error: its message and its cure, with what they fill in as placeholders."""

    kind: str
    message: str
    cure: str


def classes() -> list[str]:
    """Return the names of all error classes, in the tree's order."""
    tree = ast.parse((ROOT / "cvx_deploy" / "errors.py").read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.ClassDef)]


def stated(path: Path, kinds: frozenset[str]) -> Iterator[Stated]:
    """Yield the errors that a module raises, in its order."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = _assigned(tree.body)
    scopes: list[tuple[ast.AST, dict[str, list[ast.expr]]]] = [(tree, top)]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            scopes.append((node, top | _assigned(ast.walk(node))))
    # The innermost function that a call stands in comes last, and knows the most names.
    known = {id(node): names for scope, names in scopes for node in ast.walk(scope)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda node: node.lineno):
        if not (isinstance(call.func, ast.Name) and call.func.id in kinds and call.args):
            continue
        cures = [keyword.value for keyword in call.keywords if keyword.arg == "fix"]
        if cures:
            names = known[id(call)]
            yield Stated(call.func.id, said(call.args[0], names), said(cures[0], names))


def _assigned(nodes: object) -> dict[str, list[ast.expr]]:
    """Return what each name is set to."""
    found: dict[str, list[ast.expr]] = {}
    for node in nodes:  # type: ignore[attr-defined]
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
    return found


def said(node: ast.expr, names: dict[str, list[ast.expr]]) -> str:
    """Return the text of an expression, with placeholders for what is known only when it runs."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(said(part, names) for part in node.values)
    if isinstance(node, ast.BinOp):
        return said(node.left, names) + said(node.right, names)
    if isinstance(node, ast.IfExp):
        return " / ".join(filter(None, (said(node.body, names), said(node.orelse, names))))
    if isinstance(node, ast.FormattedValue):
        return _placeholder(node.value, names)
    if isinstance(node, ast.Name) and (values := names.get(node.id)):
        return " / ".join(dict.fromkeys(said(value, names) for value in values))
    return "..."


def _placeholder(node: ast.expr, names: dict[str, list[ast.expr]]) -> str:
    """Return what stands for a value in a message: its name in capitals, or a constant's text."""
    if isinstance(node, ast.Name) and all(isinstance(value, ast.Constant) for value in names.get(node.id, [node])):
        return said(node, names)
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    if name == "error" or len(name) < 3:
        return "..."
    return name.strip("_").upper()


def lines() -> Iterator[str]:
    """Yield the page."""
    kinds = classes()
    paths = sorted((ROOT / "cvx_deploy").rglob("*.py")) + sorted((ROOT / "exporters").rglob("*.py"))
    seen = {path.resolve(): path for path in paths}
    rows = [one for path in seen for one in stated(path, frozenset(kinds))]
    yield HEAD
    for kind in kinds:
        yield f"## {kind}\n"
        yield CAUSES[kind] + "\n"
        mine = dict.fromkeys((_cell(one.message), _cell(one.cure)) for one in rows if one.kind == kind)
        yield "| message | cure |\n| --- | --- |"
        yield from (f"| {message} | {cure} |" for message, cure in mine)
        yield ""


def _cell(text: str) -> str:
    """Return a text that a table's cell can hold, as it stands."""
    return re.sub(r"([|<>*_\[\]])", r"\\\1", " ".join(text.split()))


def page() -> str:
    """Return the whole page."""
    return "\n".join(lines()).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
