"""The smallest piece of a network that an engine still refuses, or in which it still differs: what a bug report needs.

Polygraphy's ``debug reduce`` cuts the network down, and runs this module on each piece that it tries:
``python -m cvx_deploy.parity.reduction FOLDER`` ends with 3 where the piece in the folder shows the fault.
"""

import json
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.bundle.opened import MANIFEST, Bundle
from cvx_deploy.engines.registry import engine_spec, open_backend
from cvx_deploy.engines.spec import EngineName
from cvx_deploy.errors import CvxError, EngineError
from cvx_deploy.measure.difference import difference
from cvx_deploy.parity.cases import Arrays, Case, run_cases
from cvx_deploy.progress import Progress, SilentProgress

if TYPE_CHECKING:
    import onnx

SHOWS_IT = 3
CHECK = (sys.executable, "-m", "cvx_deploy.parity.reduction")
"""What is run on each piece, with the folder it lies in as its last word."""
_FEW = 60
"""Nodes up to which a piece is cut down node by node alone."""
_LARGEST = 1_900_000_000  # a protobuf file holds 2 GiB
_POLYGRAPHY = "from polygraphy.tools import main; raise SystemExit(main())"
_WHOLE, _PIECE, _ASKED, _INPUTS = "whole.onnx", "piece.onnx", "asked.json", "inputs.npz"


@dataclass(frozen=True)
class Fault:
    """What a piece of a network must show.

    Attributes:
        engine: On which engine.
        said: What the engine says where it refuses; empty where it runs, and differs from the same graph run node by
            node by ONNX Runtime, without its optimizations.
        limit: The relative L2 error from which it differs.
        target: The compute capability that a compiled engine is for.
    """

    engine: EngineName
    said: str = ""
    limit: float = 0.0
    target: str = "sm89"


@dataclass(frozen=True)
class Reduction:
    """A network cut down: how many nodes are left of how many, and the folder they lie in."""

    network: str
    nodes: int
    of: int
    folder: str

    def __str__(self) -> str:
        return f"{self.network}: {self.nodes} of its {self.of} nodes still show it, in {self.folder}"


def reduced(bundle: Bundle, role: str, case: Case, fault: Fault, folder: Path, progress: Progress) -> Reduction:
    """Cut a network down to what still shows a fault, and put ``reduced.onnx`` and its inputs into a folder.

    Args:
        bundle: Whose network it is, seen at a shape.
        role: Which network.
        case: What it is given.
        fault: What it shows.
        folder: Where the result goes.
        progress: Told what goes on.

    Raises:
        EngineError: The network is too large for one file, or its parts cannot be looked at, or Polygraphy fails, or
            the fault is not in how the engine runs the graph.
    """
    with tempfile.TemporaryDirectory(prefix="cvx-reduce-") as place, progress.task(f"reduce {role}"):
        work = Path(place)
        nodes = _prepare(bundle, role, case, fault, work)
        if engine_spec(fault.engine).compiled:
            _compile_whole(work, role, fault)
        if not shows(work):
            raise EngineError(
                f"{role} of {bundle.path} says the same node by node in ONNX Runtime: {fault.engine} runs it as it is",
                fix="look at the layers that the check names: the graph is wrong, or its weights are",
            )
        _narrow(work)
        _reduce(work, role)
        left = _keep(work, folder)
    return Reduction(bundle.network_name(role), left, nodes, str(folder))


def _prepare(bundle: Bundle, role: str, case: Case, fault: Fault, work: Path) -> int:
    """Lay out what a check of a piece needs; return how many nodes the whole has."""
    import onnx

    from cvx_deploy.engines.weights import mapped_weights
    from cvx_deploy.graph.pieces import standalone

    name, network = bundle.network_name(role), bundle.network(role)
    if network.precision == "bf16" and not fault.said:
        raise EngineError(
            f"{role} computes in bf16, and what lies between its nodes cannot be read", fix="check it in fp16 or fp32"
        )
    model = onnx.ModelProto.FromString(bundle.onnx_bytes(role))
    weights = mapped_weights(bundle, name, model.graph, SilentProgress())
    if sum(content.nbytes for content in weights.values()) > _LARGEST:
        raise EngineError(
            f"the weights of {role} are more than one ONNX file holds, 2 GB, and Polygraphy's reduction reads one",
            fix="reduce a model of the same width and few blocks: cvx-deploy synth --scale wide, and export that",
        )
    whole = standalone(model, weights, case.sizes)
    for file in (_WHOLE, _PIECE):
        (work / file).write_bytes(whole.SerializeToString())
    types = {spec.name: spec.dtype for spec in network.inputs}
    inputs = {given: array.astype(types[given]) for given, array in case.inputs.items() if types[given] != "bfloat16"}
    np.savez(work / _INPUTS, **inputs)  # type: ignore[arg-type]
    entry = replace(bundle.manifest.shapes[bundle.index], networks={role: name})
    manifest = replace(bundle.manifest, networks={name: network}, shapes=(entry,))
    (work / MANIFEST).write_bytes(manifest.to_json())
    _ask(work, role, fault)
    return len(whole.graph.node)


def _ask(work: Path, role: str, fault: Fault) -> None:
    (work / _ASKED).write_text(json.dumps({"role": role, **asdict(fault)}), encoding="utf-8")


def _compile_whole(work: Path, role: str, fault: Fault) -> None:
    """Note what a compiler says of the whole; where no GPU is, the check could not come to that."""
    try:
        compile_piece(_alone(work, role), fault)
    except EngineError as error:
        _ask(work, role, replace(fault, said=error.what))
    else:
        raise EngineError(
            f"{fault.engine} compiles {role} as a whole; {fault.said or 'what it computes is compared on a GPU alone'}",
            fix="reduce it with --engine onnxruntime-cuda or onnxruntime",
        )


def _narrow(work: Path) -> None:
    """Halve the piece, as a stretch of nodes, for as long as a half of it shows the fault; leave what is left of it."""
    import onnx

    from cvx_deploy.graph.pieces import cut

    model = onnx.load(work / _WHOLE)
    start, end = 0, len(model.graph.node)
    while end - start > 1:
        half, quarter = (end - start + 1) // 2, (end - start) // 4
        for first in (start, end - half, start + quarter):
            tried = cut(model, first, first + half)
            if tried is not None:
                (work / _PIECE).write_bytes(tried.SerializeToString())
                if shows(work):
                    start, end = first, first + half
                    break
        else:
            break
    left = cut(model, start, end) or model
    (work / _PIECE).write_bytes(left.SerializeToString())


def _reduce(work: Path, role: str) -> None:
    """Let Polygraphy cut the piece down, by halves where it is long, and then node by node."""
    import onnx
    from polygraphy.json import save_json

    for mode in ("bisect", "linear"):
        nodes = len(onnx.load(work / _PIECE, load_external_data=False).graph.node)
        if nodes == 1 or (mode == "bisect") == (nodes <= _FEW):
            continue
        save_json([_given(work, onnx.load(work / _PIECE))], str(work / "inputs.json"))
        (work / _PIECE).rename(work / "from.onnx")  # Polygraphy writes over nothing
        words = ["-c", _POLYGRAPHY, "debug", "reduce", "from.onnx", "--output", "to.onnx", "--mode", mode]
        words += ["--iter-artifact", _PIECE, "--fail-code", str(SHOWS_IT), "--load-inputs", "inputs.json"]
        done = subprocess.run(  # noqa: S603
            [sys.executable, *words, "--check", *CHECK, "."], cwd=work, capture_output=True, text=True, check=False
        )
        if not (work / "to.onnx").is_file():
            lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if "[!]" in line]
            reason = lines[0].removeprefix("[!] ") if lines else f"it ended with {done.returncode}"
            raise EngineError(f"Polygraphy cannot reduce {role}: {reason}", fix="report the whole network instead")
        (work / "to.onnx").rename(work / _PIECE)


def _keep(work: Path, folder: Path) -> int:
    """Put what was found where it is to lie; return how many nodes it has."""
    import onnx

    model = onnx.load(work / _PIECE)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "reduced.onnx").write_bytes((work / _PIECE).read_bytes())
    (folder / "fault.json").write_text((work / _ASKED).read_text(encoding="utf-8"), encoding="utf-8")
    given = _given(work, model)
    np.savez(folder / "inputs.npz", **given)  # type: ignore[arg-type]
    if not json.loads((work / _ASKED).read_text(encoding="utf-8"))["said"]:
        np.savez(folder / "expected.npz", **_reference(model, given))  # type: ignore[arg-type]
    return len(model.graph.node)


def shows(work: Path) -> bool:
    """Whether the piece that lies in a folder shows the fault that is looked for."""
    asked = json.loads((work / _ASKED).read_text(encoding="utf-8"))
    role, fault = asked.pop("role"), Fault(**asked)
    try:
        alone = _alone(work, role)
    except ValueError:
        return False
    return _refuses(alone, role, fault) if fault.said else _differs(alone, role, fault, work)


def _alone(work: Path, role: str) -> Bundle:
    """Return the piece in a folder as a bundle of one network; ValueError where a manifest could not say what it is."""
    from cvx_deploy.graph.pieces import piece

    bundle = Bundle.read(work)
    networks = {bundle.network_name(role): piece(work / _PIECE, bundle.network(role))}
    return replace(bundle, manifest=replace(bundle.manifest, networks=networks))


def _refuses(alone: Bundle, role: str, fault: Fault) -> bool:
    """Whether an engine refuses a piece with the words that it refused the whole with."""
    try:
        if engine_spec(fault.engine).compiled:
            compile_piece(alone, fault)
        else:
            with open_backend(fault.engine, alone) as backend, backend.load(role, {}):
                pass
    except CvxError as error:
        return _words(error.what) == _words(fault.said)
    return False


def compile_piece(alone: Bundle, fault: Fault) -> None:
    """Compile every network of a bundle, for the GPU that is here or, ahead of time, for one named in the fault."""
    from cvx_deploy.engines.tensorrt.build import BuildRequest, build
    from cvx_deploy.engines.tensorrt.libraries import load_library
    from cvx_deploy.engines.tensorrt.platforms import platform_here

    kind: Any = fault.engine
    library, here = load_library(kind), None
    with suppress(EngineError):
        here = platform_here()
    targets = (fault.target,) if library.ahead_of_time and here is None else ()
    for _ in build(library, alone, BuildRequest(targets, here), SilentProgress()):
        pass


def _words(text: str) -> str:
    """Return a message without its numbers, which differ from one piece to the next."""
    return "".join(letter for letter in text if not letter.isdigit())


def _differs(alone: Bundle, role: str, fault: Fault, work: Path) -> bool:
    import onnx

    model = onnx.load(work / _PIECE)
    given = _given(work, model)
    expected = _reference(model, given)
    with open_backend(fault.engine, alone) as backend:
        [(_, found)] = run_cases(backend, role, [Case("a piece", {}, given)])
    return any(difference(name, found[name], array).relative_l2 > fault.limit for name, array in expected.items())


def _given(work: Path, piece: "onnx.ModelProto") -> Arrays:
    """Return what a piece takes: what the network is given, or what its nodes before the piece put out."""
    import onnx

    from cvx_deploy.graph.pieces import with_outputs

    inputs: Arrays = dict(np.load(work / _INPUTS))
    names = [value.name for value in piece.graph.input]
    inner = [name for name in names if name not in inputs]
    values = _reference(with_outputs(onnx.load(work / _WHOLE), inner), inputs) if inner else {}
    return {name: values[name] if name in values else inputs[name] for name in names}


def _reference(model: "onnx.ModelProto", inputs: Arrays) -> dict[str, NDArray[Any]]:
    """Run a graph node by node, as it stands."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    taken = {value.name for value in session.get_inputs()}
    given = {name: array for name, array in inputs.items() if name in taken}
    return dict(zip(names, session.run(names, given), strict=True))


if __name__ == "__main__":
    raise SystemExit(SHOWS_IT if shows(Path(sys.argv[1])) else 0)
