"""Write docs/errors.md: every error this package states, read from where the code raises it.

python scripts/errors_page.py
"""

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

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
for text of other programs, or the rest of a command that is put together from the case at hand; ` / ` for one or the
other, as the case may be. `python scripts/errors_page.py` makes this page from the code.
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


class Scope:
    """What names mean where an expression stands: an expression each, and the scope that one stands in."""

    def __init__(self, package: "Package", module: Path, values: "dict[str, list[Meant]]") -> None:
        self.package, self.module, self.values = package, module, values

    def bound(self, values: "dict[str, list[Meant]]") -> "Scope":
        """Return a scope within this one, that knows more names."""
        return Scope(self.package, self.module, self.values | values)

    def assigned(self, nodes: Iterable[ast.AST]) -> "Scope":
        """Return a scope within this one, with what names are set to there."""
        inner = self.bound({})
        for node in nodes:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                if isinstance(target, ast.Name):
                    known = inner.values.get(target.id, []) if target.id not in self.values else []
                    inner.values[target.id] = [*known, (node.value, inner)]
        return inner


Meant = tuple[ast.expr, Scope]


@dataclass(frozen=True)
class Call:
    """A call, the scope it stands in, and the function around it."""

    node: ast.Call
    scope: Scope
    within: ast.FunctionDef | None


class Package:
    """Every call and every function of the package's modules."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.calls: list[Call] = []
        self.functions: dict[str, list[tuple[ast.FunctionDef, Scope]]] = {}
        for path in paths:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            self._read(tree, Scope(self, path, {}).assigned(tree.body), None)

    def _read(self, node: ast.AST, scope: Scope, within: ast.FunctionDef | None) -> None:
        for child in ast.iter_child_nodes(node):
            inner, around = scope, within
            if isinstance(child, ast.FunctionDef):
                parameters = {argument.arg for argument in (*child.args.args, *child.args.kwonlyargs)}
                inner = Scope(self, scope.module, {key: value for key, value in scope.values.items()
                                                   if key not in parameters}).assigned(ast.walk(child))  # fmt: skip
                self.functions.setdefault(child.name, []).append((child, inner))
                around = child
            if isinstance(child, ast.Call):
                self.calls.append(Call(child, scope, within))
            self._read(child, inner, around)

    def callers(self, function: ast.FunctionDef, module: Path) -> list[Call]:
        """Return the calls of a function: of a private one those of its module."""
        return [
            call
            for call in self.calls
            if _called(call.node) == function.name
            and (call.scope.module == module or not function.name.startswith("_"))
        ]

    def returned(self, node: ast.Call | ast.Attribute, module: Path) -> list[Meant]:
        """Return what a function, or a property, of that name returns, in this module or else in any."""
        name = _called(node) if isinstance(node, ast.Call) else node.attr
        every = [one for one in self.functions.get(name, []) if _is_property(one[0]) != isinstance(node, ast.Call)]
        mine = [one for one in every if one[1].module == module] or every
        return [
            (node.value, scope)
            for function, scope in mine
            for node in ast.walk(function)
            if isinstance(node, ast.Return) and node.value is not None
        ]


def _is_property(function: ast.FunctionDef) -> bool:
    return any(isinstance(one, ast.Name) and one.id == "property" for one in function.decorator_list)


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def stated(call: Call, package: Package) -> Iterator[Stated]:
    """Yield the error that a call makes, once for each that calls the function around it with other words."""
    cures = [keyword.value for keyword in call.node.keywords if keyword.arg == "fix"]
    if not (isinstance(call.node.func, ast.Name) and call.node.args and cures):
        return
    message, cure, scopes = call.node.args[0], cures[0], [call.scope]
    if call.within is not None:
        parameters = [argument.arg for argument in (*call.within.args.args, *call.within.args.kwonlyargs)]
        used = {node.id for given in (message, cure) for node in ast.walk(given) if isinstance(node, ast.Name)}
        used |= {
            node.id
            for name in used
            for value, _ in call.scope.values.get(name, [])
            for node in ast.walk(value)
            if isinstance(node, ast.Name)
        }
        words = used & set(parameters) & {"what", "fix", "problem"}
        if words:
            scopes = [_given(call, other, words) for other in package.callers(call.within, call.scope.module)]
    for scope in scopes:
        yield Stated(call.node.func.id, said(message, scope), said(cure, scope))


def _given(call: Call, other: Call, words: set[str]) -> Scope:
    """Return the scope of a call in a function, with the words that another call hands that function."""
    assert call.within is not None
    names = [argument.arg for argument in call.within.args.args if argument.arg != "self"]
    given = dict(zip(names, other.node.args, strict=False))
    given |= {keyword.arg: keyword.value for keyword in other.node.keywords if keyword.arg}
    bound: dict[str, list[Meant]] = {name: [(given[name], other.scope)] for name in words if name in given}
    within = call.scope.bound(bound)
    # What the function sets from those words is set anew.
    for name, meant in call.scope.values.items():
        if name not in bound:
            within.values[name] = [(value, within if scope is call.scope else scope) for value, scope in meant]
    return within


def said(node: ast.expr, scope: Scope, depth: int = 0) -> str:
    """Return the text of an expression, with placeholders for what is known only when it runs."""
    if depth > _DEEPEST:
        return "..."
    match node:
        case ast.Constant():
            return str(node.value)
        case ast.JoinedStr():
            return "".join(said(part, scope, depth + 1) for part in node.values)
        case ast.BinOp(op=ast.Add()):
            return said(node.left, scope, depth + 1) + said(node.right, scope, depth + 1)
        case ast.IfExp():
            return _either([(node.body, scope), (node.orelse, scope)], depth)
        case ast.FormattedValue():
            return _placeholder(node.value, scope, depth)
        case ast.Name() if node.id in scope.values:
            return _either(scope.values[node.id], depth)
        case ast.Call(func=ast.Attribute(attr="splitlines" | "strip"), args=[]):
            return said(node.func.value, scope, depth + 1)  # type: ignore[attr-defined]
        case ast.Call(func=ast.Name(id="next"), args=[first, default]):
            return _either([*_values(first, scope), (default, scope)], depth)
        case ast.Call(func=ast.Attribute(attr="get", value=table), args=[_, default]):
            return _either([*_values(table, scope), (default, scope)], depth)
        case ast.Call(func=ast.Attribute(attr="join", value=ast.Name(id="shlex")), args=[ast.List() as words]):
            return (
                " ".join(said(word, scope, depth + 1) for word in words.elts if isinstance(word, ast.Constant)) + " ..."
            )
        case ast.Call() if _called(node) in scope.package.functions:
            return _either(scope.package.returned(node, scope.module), depth)
        case ast.Attribute():
            return _either(scope.package.returned(node, scope.module), depth) or _name_in(node)
        case ast.Subscript():
            return said(node.value, scope, depth + 1)
    return "..."


_DEEPEST = 12
_COMMANDS = ("export_command", "remedy", "_restoring")  # what returns a command within a message


def _either(meant: Iterable[Meant], depth: int) -> str:
    texts = dict.fromkeys(said(value, scope, depth + 1) for value, scope in meant)
    return " / ".join(filter(None, texts))


def _values(node: ast.expr, scope: Scope) -> list[Meant]:
    """Return the values of a table, or of what is taken from one."""
    if isinstance(node, ast.Name):
        return [value for meant in scope.values.get(node.id, []) for value in _values(*meant)]
    if isinstance(node, ast.Dict):
        return [(value, scope) for value in node.values]
    if isinstance(node, ast.GeneratorExp):
        items = node.generators[0].iter
        return _values(items.func.value, scope) if isinstance(items, ast.Call) and _is_items(items.func) else []
    return []


def _is_items(node: ast.expr) -> TypeGuard[ast.Attribute]:
    return isinstance(node, ast.Attribute) and node.attr == "items"


def _placeholder(node: ast.expr, scope: Scope, depth: int) -> str:
    """Return what stands for a value in a message: a text where one is known, or else a name in capitals."""
    if isinstance(node, ast.Name) and node.id in scope.values:
        meant = scope.values[node.id]
        if all(isinstance(value, ast.Constant | ast.JoinedStr | ast.IfExp) for value, _ in meant):
            text = _either(meant, depth)
            if "..." not in text:
                return text
    if _called(node) in _COMMANDS if isinstance(node, ast.Call) else getattr(node, "attr", "") in _COMMANDS:
        return said(node, scope, depth + 1)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and isinstance(node.left, ast.Constant):
        return str(node.left.value)  # the plural's s
    if isinstance(node, ast.IfExp):
        text = said(node, scope, depth + 1)
        return text if "..." not in text else _name_in(node.body)
    return _name_in(node)


def _name_in(node: ast.expr) -> str:
    """Return the first name in an expression that says something, in capitals."""
    for inner in _in_order(node):
        name = inner.attr if isinstance(inner, ast.Attribute) else inner.id if isinstance(inner, ast.Name) else ""
        if len(name) >= _SHORTEST and name not in _UNTOLD:
            return name.strip("_").upper()
    return "..."


def _in_order(node: ast.expr) -> Iterator[ast.AST]:
    """Yield what an expression is made of: what a method or function is given before what it is called."""
    if isinstance(node, ast.Call):
        given = [*node.args, *([node.func.value] if isinstance(node.func, ast.Attribute) else [])]
        for argument in given:
            yield from _in_order(argument)
    elif isinstance(node, ast.Attribute):
        yield node
    else:
        yield node
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                yield from _in_order(child)


_SHORTEST = 3
_UNTOLD = {"error", "str", "map", "sorted", "list", "tuple", "min", "max", "len", "self", "_reason", "repr"}


def lines() -> Iterator[str]:
    """Yield the page."""
    kinds = classes()
    paths = sorted((ROOT / "cvx_deploy").rglob("*.py")) + sorted((ROOT / "exporters").rglob("*.py"))
    seen = {path.resolve(): path for path in paths}
    package = Package(seen)
    rows = [one for call in package.calls if _called(call.node) in kinds for one in stated(call, package)]
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
