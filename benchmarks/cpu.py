"""Measure networks on a CPU: ours against eager diffusers, torch.compile and the plain export, in interleaved rounds.

    python benchmarks/cpu.py --work DIR [--cases transformer-2k ...] [--peers eager-fp32 ...] [--runs N]

`DIR` keeps the checkpoint (published 5b width, two blocks, random weights) and the bundles. Each case runs in a process
of its own; within it, every round runs each peer once, so that what disturbs the machine disturbs all of them. Ratios
are taken within a round. A case that is done is kept, and not run again unless `--again` is given.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
import unittest.mock
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from report import conditions

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.registry import open_backend
from cvx_deploy.engines.spec import EngineName
from cvx_deploy.measure.cpu import overflows_in_int8
from cvx_deploy.shape import Shape

Run = Callable[[], NDArray[Any]]
TOOLS = ("torch", "diffusers", "transformers", "onnxruntime", "openvino", "numpy")
REFERENCE = "eager-fp32"
SEED = 0
PROMPT = "a red circle moves to the right"


@dataclass(frozen=True)
class Case:
    """What is run.

    Attributes:
        role: Which network of the bundle.
        shape: The video it is exported for.
        plane: Height and width of the VAE's latents.
    """

    role: str
    shape: Shape
    plane: tuple[int, int] = (12, 16)


CASES = {
    "transformer-2k": Case("transformer", Shape(9, 384, 384)),  # 226 + 1,728 tokens
    "transformer-8k": Case("transformer", Shape(17, 624, 640)),  # 226 + 7,800 tokens
    "vae-decoder": Case("vae_decoder_first", Shape(9, 96, 128)),
    "text-encoder": Case("text_encoder", Shape(9, 96, 128)),
}
MINIATURE = "miniature"


@dataclass(frozen=True)
class Ours:
    """A peer that runs a bundle: on which engine, in which precision, with the rewrites or without.

    Attributes:
        guarded: Whether int8 products are kept from overflowing as on a CPU without VNNI, whatever this one is.
    """

    engine: EngineName
    precision: str
    rewrites: tuple[str, ...] | None = None
    guarded: bool = False


@dataclass(frozen=True)
class Eager:
    """A peer that runs diffusers' and transformers' modules."""

    dtype: str
    compiled: bool = False


PEERS: dict[str, Ours | Eager] = {
    REFERENCE: Eager("float32"),
    "eager-bf16": Eager("bfloat16"),
    "compile-fp32": Eager("float32", compiled=True),
    "compile-bf16": Eager("bfloat16", compiled=True),
    "onnxruntime-plain-fp32": Ours("onnxruntime", "fp32", rewrites=()),
    "onnxruntime-fp32": Ours("onnxruntime", "fp32"),
    "openvino-plain-fp32": Ours("openvino", "fp32", rewrites=()),
    "openvino-fp32": Ours("openvino", "fp32"),
    "openvino-bf16": Ours("openvino", "bf16"),
    "onnxruntime-int8": Ours("onnxruntime", "int8/fp32"),
    "onnxruntime-int8-guarded": Ours("onnxruntime", "int8/fp32", guarded=True),
    "onnxruntime-int8wo": Ours("onnxruntime", "int8wo/fp32"),
    "openvino-int8": Ours("openvino", "int8/fp32"),
    "openvino-int8-bf16": Ours("openvino", "int8/bf16"),
    "openvino-int8wo": Ours("openvino", "int8wo/fp32"),
    "openvino-int8wo-bf16": Ours("openvino", "int8wo/bf16"),
}
PAIRS = (
    ("onnxruntime-int8", "onnxruntime-fp32"),
    ("onnxruntime-int8", "onnxruntime-int8-guarded"),
    ("openvino-int8", "openvino-fp32"),
    ("openvino-int8-bf16", "openvino-bf16"),
    ("openvino-int8wo-bf16", "openvino-bf16"),
    ("openvino-bf16", "eager-bf16"),
    ("openvino-int8-bf16", "eager-bf16"),
    ("onnxruntime-fp32", "onnxruntime-plain-fp32"),
    ("openvino-fp32", "openvino-plain-fp32"),
)
"""What is also said: the speed of the first against that of the second."""


@dataclass(frozen=True)
class Timing:
    """What one peer took.

    Attributes:
        seconds: Of each round after the warm-up.
        load_seconds: From nothing to the first result.
        speedup: Median over the rounds of the reference's seconds over its own, then the least and the most.
        error: L2 distance of its result from the reference's, over the length of that; `cosine` of the angle between.
    """

    seconds: list[float]
    load_seconds: float
    speedup: tuple[float, float, float]
    error: float
    cosine: float


def make_checkpoint(work: Path) -> Path:
    """Return a checkpoint of the published 5b width in two blocks."""
    place = work / "5b-wide"
    if not place.exists():
        command = [sys.executable, "-m", "cvx_deploy", "synth", "--like", "5b", "--scale", "wide", "--output", place]
        subprocess.run([*map(str, command), "--quiet"], check=True, stdout=subprocess.DEVNULL)
    return place


def make_table(work: Path) -> Path:
    """Return a table of the checkpoint's activations, of one prompt at a small size."""
    table = work / "calibration.safetensors"
    if not table.exists():
        words = ["quantize", "--model", "5b", "--checkpoint", make_checkpoint(work), "--shape", "9x96x128"]
        words += ["--num-prompts", "1", "--steps", "3", "--output", table, "--quiet"]
        subprocess.run([sys.executable, "-m", "cvx_deploy", *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    return table


def make_bundle(work: Path, case: Case, peer: Ours) -> Bundle:
    """Return the bundle a peer runs; in a new work folder only, for the graphs may have changed since."""
    from cvx_deploy.exporters.export import ExportRequest, bundle_from_checkpoint
    from cvx_deploy.exporters.quantization.quantized import Quantizing

    precision = peer.precision.replace("/", "-")
    place = work / f"{case.shape}-{precision}{'-plain' if peer.rewrites == () else ''}"
    if not place.exists():
        table = make_table(work) if peer.precision.startswith("int8/") else None
        request = ExportRequest(
            "5b",
            make_checkpoint(work),
            shapes=(case.shape,),
            precision=peer.precision,
            rewrites=peer.rewrites,
            quantizing=Quantizing(calibration=table, any_shape=table is not None),
        )
        bundle_from_checkpoint(request, place)
    return Bundle.open(place)


def inputs_of(bundle: Bundle, case: Case) -> dict[str, NDArray[Any]]:
    """Return a network's inputs; what another network of the bundle puts out, such as the modulation, is left out."""
    rng = np.random.default_rng(SEED)
    sizes = {"batch": 1, "latent_height": case.plane[0], "latent_width": case.plane[1]}
    inputs: dict[str, NDArray[Any]] = {}
    for spec in bundle.network(case.role).inputs:
        shape = spec.resolve(sizes)
        whole = spec.dtype == "int64"
        inputs[spec.name] = rng.integers(0, 200, shape) if whole else rng.standard_normal(shape).astype(spec.dtype)
    return inputs | {name: np.array([937], np.int64) for name in inputs if name == "timestep"}


def ours(stack: ExitStack, work: Path, case: Case, peer: Ours) -> Run:
    """Load a bundle's network, and return what runs it once; `stack` lets go of it."""
    bundle = make_bundle(work, case, peer)
    backend = stack.enter_context(open_backend(peer.engine, bundle))
    inputs = inputs_of(bundle, case)
    if "modulation" in inputs:
        with backend.load("modulation", {}) as step:
            made = step.run({"timestep": np.array([937], np.int64)})
            inputs |= {name: backend.to_host(value) for name, value in made.items()}
    sizes = {"batch": 1, "latent_height": case.plane[0], "latent_width": case.plane[1]}
    overflows = overflows_in_int8() or peer.guarded
    with unittest.mock.patch("cvx_deploy.engines.onnxruntime.backend.overflows_in_int8", return_value=overflows):
        session = stack.enter_context(backend.load(case.role, sizes))
    first = bundle.network(case.role).outputs[0].name
    return lambda: backend.to_host(session.run(inputs)[first])


def eager(work: Path, case: Case, peer: Eager) -> Run:
    """Load a network as diffusers or transformers does, and return what runs it once."""
    import torch

    dtype: Any = getattr(torch, peer.dtype)
    checkpoint = make_checkpoint(work)
    inputs = inputs_of(make_bundle(work, case, Ours("onnxruntime", "fp32")), case)
    call = EAGER[case.role](checkpoint, case, {name: torch.from_numpy(array) for name, array in inputs.items()}, dtype)
    forward = torch.compile(call) if peer.compiled else call

    def run() -> NDArray[Any]:
        with torch.no_grad():
            result: NDArray[Any] = forward().float().numpy()
        return result

    return run


def eager_transformer(checkpoint: Path, case: Case, inputs: dict[str, Any], dtype: Any) -> Callable[[], Any]:
    """Return diffusers' transformer, with the rotary table its pipeline makes."""
    import torch
    from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel

    network = CogVideoXTransformer3DModel.from_pretrained(checkpoint / "transformer", torch_dtype=dtype).eval()
    parts = {"vae": None, "text_encoder": None, "tokenizer": None}
    pipeline = CogVideoXPipeline.from_pretrained(checkpoint, transformer=network, **parts)
    hidden, text = inputs["hidden_states"].to(dtype), inputs["encoder_hidden_states"].to(dtype)
    rotary = pipeline._prepare_rotary_positional_embeddings(
        case.shape.height, case.shape.width, hidden.shape[1], torch.device("cpu")
    )
    timestep = torch.tensor([937])
    return lambda: network(hidden, text, timestep, image_rotary_emb=rotary, return_dict=False)[0]


def eager_decoder(checkpoint: Path, case: Case, inputs: dict[str, Any], dtype: Any) -> Callable[[], Any]:
    """Return the decoder of diffusers' VAE, on one chunk."""
    from diffusers import AutoencoderKLCogVideoX

    network = AutoencoderKLCogVideoX.from_pretrained(checkpoint / "vae", torch_dtype=dtype).eval()
    latents = inputs["latents"].to(dtype)
    return lambda: network.decoder(latents)[0]


def eager_text_encoder(checkpoint: Path, case: Case, inputs: dict[str, Any], dtype: Any) -> Callable[[], Any]:
    """Return transformers' T5 encoder."""
    from transformers import T5EncoderModel

    network = T5EncoderModel.from_pretrained(checkpoint / "text_encoder", dtype=dtype).eval()
    return lambda: network(inputs["input_ids"])[0]


EAGER: dict[str, Callable[[Path, Case, dict[str, Any], Any], Callable[[], Any]]] = {
    "transformer": eager_transformer,
    "vae_decoder_first": eager_decoder,
    "text_encoder": eager_text_encoder,
}


def fits(peer: str, case: Case) -> bool:
    """Tell whether a peer has anything to show: int8 is the transformer's, and some need instructions of the CPU."""
    from cvx_deploy.engines.openvino.backend import precisions

    if "guarded" in peer and overflows_in_int8():
        return False  # the other is guarded, too
    if "bf16" in peer and "bf16" not in precisions():
        return False
    if "int8wo" in peer:
        return case.role in ("transformer", "text_encoder")
    if "int8" in peer:
        return case.role == "transformer" and not (peer.startswith("openvino") and overflows_in_int8())
    return True


def measure(work: Path, name: str, peers: Sequence[str], runs: int) -> dict[str, Timing]:
    """Run one case on every peer in turn, round by round, after a round of warm-up that also compares results."""
    case, loads = CASES[name], dict[str, float]()
    off: dict[str, tuple[float, float]] = {}
    peers = [peer for peer in peers if fits(peer, case)]
    seconds: dict[str, list[float]] = {peer: [] for peer in peers}
    expected: NDArray[Any] | None = None
    with ExitStack() as stack:
        loaded: dict[str, Run] = {}
        for peer in peers:
            start, what = time.perf_counter(), PEERS[peer]
            loaded[peer] = ours(stack, work, case, what) if isinstance(what, Ours) else eager(work, case, what)
            found = loaded[peer]().astype(np.float64)
            loads[peer] = round(time.perf_counter() - start, 2)
            expected = found if expected is None else expected
            off[peer] = apart(found, expected)
            gc.collect()
        for _ in range(runs):
            for peer, run in loaded.items():
                start = time.perf_counter()
                run()
                seconds[peer].append(round(time.perf_counter() - start, 4))
    return {
        peer: Timing(took, loads[peer], speedup(seconds[REFERENCE], took), *off[peer]) for peer, took in seconds.items()
    }


def measure_miniature(work: Path, runs: int) -> dict[str, Timing]:
    """Time `cvx-deploy run` on the miniature, from shell to video, on each engine for CPUs against the first."""
    engines = ("onnxruntime", "openvino")
    seconds: dict[str, list[float]] = {engine: [] for engine in engines}
    for _ in range(runs + 1):
        for engine in engines:
            command = [sys.executable, "-m", "cvx_deploy", "run", "--model", "mini", "--prompt", PROMPT, "--quiet"]
            start = time.perf_counter()
            subprocess.run([*command, "--engine", engine, "--output", str(work / f"{engine}.npy")], check=True)
            seconds[engine].append(round(time.perf_counter() - start, 3))
    videos = {engine: np.load(work / f"{engine}.npy").astype(np.float64) for engine in engines}
    first = videos[engines[0]]
    return {
        engine: Timing(
            took[1:],
            took[0],
            speedup(seconds[engines[0]][1:], took[1:]),
            *apart(videos[engine], first),
        )
        for engine, took in seconds.items()
    }


def apart(found: NDArray[np.float64], expected: NDArray[np.float64]) -> tuple[float, float]:
    """Return the relative L2 distance of two results, and the cosine of the angle between them."""
    lengths = np.linalg.norm(found), np.linalg.norm(expected)
    distance = np.linalg.norm(found - expected) / lengths[1]
    return float(distance), float(np.vdot(found, expected) / (lengths[0] * lengths[1]))


def speedup(reference: Sequence[float], took: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, the least and the most of a reference's seconds over another's, round by round."""
    ratios = [theirs / mine for theirs, mine in zip(reference, took, strict=True)]
    return round(statistics.median(ratios), 3), round(min(ratios), 3), round(max(ratios), 3)


def told(note: str) -> dict[str, Any]:
    """Say what the figures were taken on."""
    checkpoint = "random weights, 5b at its published width, two transformer blocks, two T5 layers, the whole VAE"
    return conditions(TOOLS, note, seed=SEED, checkpoint=checkpoint)


def report(results: dict[str, Any]) -> str:
    """Lay the results out as Markdown."""
    lines = [
        "# Networks on a CPU",
        "",
        "Speed-up: the first row's time over a row's, median of the rounds (least to most).",
        "",
    ]
    for name, result in results.items():
        case = CASES.get(name)
        what = f"`{case.role}` at {case.shape}, batch 1" if case else "`cvx-deploy run --model mini`, shell to video"
        lines += [f"## {name}", "", f"{what}, {result['runs']} rounds.", ""]
        lines += [
            "| peer | seconds | speed-up | relative L2 error | cosine | to the first result |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for peer, one in result["peers"].items():
            middle, least, most = one["speedup"]
            lines.append(
                f"| {peer} | {statistics.median(one['seconds']):.2f} | {middle:.2f} ({least:.2f} to {most:.2f}) "
                f"| {one['error']:.1e} | {one['cosine']:.6f} | {one['load_seconds']:.1f} s |"
            )
        lines += ["", *(compared(result["peers"], *pair) for pair in PAIRS if set(pair) <= set(result["peers"])), ""]
    lines += ["Conditions of the first case:", "", "```json"]
    lines += [json.dumps(next(iter(results.values()))["conditions"], indent=2), "```", ""]
    return "\n".join(lines)


def compared(peers: dict[str, Any], one: str, other: str) -> str:
    """Say how fast one peer is against another, round by round."""
    middle, least, most = speedup(peers[other]["seconds"], peers[one]["seconds"])
    return f"- {one} against {other}: {middle:.2f} ({least:.2f} to {most:.2f})"


def main() -> None:
    """Read the command line; measure each case in a process of its own, and keep what each found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder with 4 GB of room")
    every = [*CASES, MINIATURE]
    parser.add_argument("--cases", nargs="+", choices=every, default=every)
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS), help=f"besides {REFERENCE}")
    parser.add_argument("--runs", type=int, default=5, help="rounds")
    parser.add_argument("--again", action="store_true", help="measure what has been measured, too")
    parser.add_argument("--note", default="nothing else ran", help="what else used the machine, for the report")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cpu")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    peers = list(dict.fromkeys([REFERENCE, *arguments.peers]))
    if arguments.one:
        [name] = arguments.cases
        mini = name == MINIATURE
        found = (
            measure_miniature(arguments.work, arguments.runs)
            if mini
            else measure(arguments.work, name, peers, arguments.runs)
        )
        print(json.dumps({peer: asdict(timing) for peer, timing in found.items()}))
        return
    kept = arguments.output.with_suffix(".json")
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for name in arguments.cases:
        if name in results and not arguments.again:
            continue
        conditions_of_case = told(arguments.note)
        command = [sys.executable, __file__, "--one", "--work", str(arguments.work), "--cases", name]
        command += ["--runs", str(arguments.runs), "--peers", *peers]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found_peers = json.loads(done.stdout.splitlines()[-1])
        results[name] = {"runs": arguments.runs, "conditions": conditions_of_case, "peers": found_peers}
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(results, indent=2) + "\n")
        arguments.output.with_suffix(".md").write_text(report(results))


if __name__ == "__main__":
    main()
