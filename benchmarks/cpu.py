"""Measure networks of the published width on a CPU: our engines against eager diffusers and torch.compile.

    python benchmarks/cpu.py --work DIR [--cases transformer-2k vae text] [--pairs 5]

A checkpoint of the 5B's width and two transformer blocks is made in `DIR` (3 GB) and kept, and exported three times: in
fp32, in bf16, and in fp32 without graph rewrites. Every peer runs the same inputs in turn, round after round, and each
round gives one ratio to eager fp32. Each case is kept as it ends; a case that is in the results is not run again.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from numpy.typing import NDArray
from report import conditions, write
from transformers import T5EncoderModel

from cvx_deploy.bundle import Bundle
from cvx_deploy.exporters.export import ExportRequest, bundle_from_checkpoint
from cvx_deploy.exporters.transformer import TransformerContract
from cvx_deploy.models import Shape
from cvx_deploy.runtime.open import EngineName, open_backend

Arrays = dict[str, NDArray[Any]]
Peer = Callable[[], NDArray[Any]]

TOOLS = ("torch", "diffusers", "transformers", "onnxruntime", "openvino")
SHAPES = {"transformer-2k": Shape(9, 384, 400), "transformer-8k": Shape(33, 480, 448)}
CASES = {
    "transformer-2k": "two blocks, 2,026 tokens, batch 1",
    "transformer-8k": "two blocks, 7,786 tokens, batch 1",
    "vae": "the decoder's first chunk, 3 latent frames of 12x16",
    "text": "T5, two layers, 226 tokens, batch 1",
}
BUNDLES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "plain": {"rewrites": ()},
}
ENGINES: dict[str, tuple[EngineName, str]] = {
    "ONNX Runtime fp32": ("onnxruntime", "fp32"),
    "ONNX Runtime fp32, no rewrites": ("onnxruntime", "plain"),
    "OpenVINO fp32": ("openvino", "fp32"),
    "OpenVINO fp32, no rewrites": ("openvino", "plain"),
    "OpenVINO bf16": ("openvino", "bf16"),
}
BASELINE = "eager fp32"


def bundles_in(work: Path) -> dict[str, Bundle]:
    """Return the bundles, made in `work` unless they are there."""
    checkpoint = work / "5b-wide"
    if not checkpoint.exists():
        made = [sys.executable, "-m", "cvx_deploy", "synth", "--like", "5b", "--scale", "wide", "--quiet", "--output"]
        subprocess.run([*made, str(checkpoint)], check=True)
    found = {}
    for name, changes in BUNDLES.items():
        path = work / f"cpu-{name}"
        if not path.exists():
            request = ExportRequest(model="5b", checkpoint=checkpoint, shapes=tuple(SHAPES.values()), **changes)
            bundle_from_checkpoint(request, path)
        found[name] = Bundle.open(path)
    return found


def inputs_of(bundle: Bundle, role: str, sizes: dict[str, int]) -> Arrays:
    """Return seeded inputs of a network: normal, integers below 1,000, and a small modulation."""
    rng = np.random.default_rng(0)
    inputs: Arrays = {}
    for spec in bundle.network(role).inputs:
        shape = spec.resolve(sizes)
        if spec.dtype == "int64":
            inputs[spec.name] = rng.integers(0, 1000, shape)
        else:
            inputs[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
    return inputs


@contextlib.contextmanager
def our_peer(engine: EngineName, bundle: Bundle, role: str, sizes: dict[str, int], inputs: Arrays) -> Iterator[Peer]:
    """Load a network on an engine; of the transformer, the modulation is part of the run, as it is of eager's."""
    name = bundle.network(role).outputs[0].name
    with open_backend(engine, bundle) as backend, contextlib.ExitStack() as stack:
        modulation = stack.enter_context(backend.load("modulation", {})) if role == "transformer" else None
        session = stack.enter_context(backend.load(role, sizes))

        def run() -> NDArray[Any]:
            given = dict(inputs)
            if modulation is not None:
                given["modulation"] = backend.to_host(modulation.run({"timestep": given.pop("timestep")})["modulation"])
            return backend.to_host(session.run(given)[name])

        yield run


def eager_peer(
    case: str, checkpoint: Path, bundle: Bundle, inputs: Arrays, dtype: torch.dtype, *, compiled: bool
) -> Peer:
    """Return diffusers' or transformers' own module on the same inputs."""
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    module: Any
    arguments: dict[str, Any]
    if case == "vae":
        vae: Any = AutoencoderKLCogVideoX.from_pretrained(checkpoint / "vae", torch_dtype=dtype)
        module, arguments = vae.decoder, {"sample": tensors["latents"].to(dtype)}
    elif case == "text":
        module = T5EncoderModel.from_pretrained(checkpoint / "text_encoder", dtype=dtype)
        arguments = {"input_ids": tensors["input_ids"]}
    else:
        module = CogVideoXTransformer3DModel.from_pretrained(checkpoint / "transformer", torch_dtype=dtype)
        contract = TransformerContract(dict(module.config), "fp32", bundle.shape, 8, 4)
        constants = contract.constants()
        tables = (_whole(constants, name, contract.tokens) for name in ("cos", "sin"))
        arguments = {
            "hidden_states": tensors["hidden_states"].to(dtype),
            "encoder_hidden_states": tensors["encoder_hidden_states"].to(dtype),
            "timestep": tensors["timestep"],
            "image_rotary_emb": tuple(tables),
            "return_dict": False,
        }
    module = torch.compile(module.eval()) if compiled else module.eval()

    def run() -> NDArray[Any]:
        with torch.no_grad():
            return module(**arguments)[0].float().numpy()

    return run


def _whole(constants: Arrays, name: str, tokens: tuple[int, int, int]) -> torch.Tensor:
    """Return a rotary table over all video tokens from its three axes."""
    views = [(tokens[0], 1, 1, -1), (1, tokens[1], 1, -1), (1, 1, tokens[2], -1)]
    axes = [constants[f"{name}.{axis}"].reshape(view) for axis, view in zip("thw", views, strict=True)]
    whole = np.concatenate([np.broadcast_to(axis, (*tokens, axis.shape[-1])) for axis in axes], axis=-1)
    return torch.from_numpy(np.ascontiguousarray(whole.reshape(-1, whole.shape[-1])))


def measure(case: str, bundles: dict[str, Bundle], checkpoint: Path, pairs: int) -> dict[str, Any]:
    """Run every peer of a case in turn; return seconds, ratios to eager fp32 and errors against it."""
    role = {"vae": "vae_decoder_first", "text": "text_encoder"}.get(case, "transformer")
    at = {name: bundle.at(SHAPES[case]) if case in SHAPES else bundle for name, bundle in bundles.items()}
    sizes = {"batch": 1, "latent_height": 12, "latent_width": 16}
    inputs = inputs_of(at["fp32"], role, sizes)
    if role == "transformer":
        del inputs["modulation"]
        inputs["timestep"] = np.array([500], np.int64)
    with contextlib.ExitStack() as stack:
        peers: dict[str, Peer] = {
            BASELINE: eager_peer(case, checkpoint, at["fp32"], inputs, torch.float32, compiled=False),
            "eager bf16": eager_peer(case, checkpoint, at["fp32"], inputs, torch.bfloat16, compiled=False),
            "torch.compile fp32": eager_peer(case, checkpoint, at["fp32"], inputs, torch.float32, compiled=True),
        }
        for name, (engine, bundle) in ENGINES.items():
            peers[name] = stack.enter_context(our_peer(engine, at[bundle], role, sizes, inputs))
        expected = peers[BASELINE]()
        errors = {name: _error(peer(), expected) for name, peer in peers.items()}  # the warm-up too
        seconds: dict[str, list[float]] = {name: [] for name in peers}
        for _ in range(pairs):
            for name, peer in peers.items():
                start = time.perf_counter()
                peer()
                seconds[name].append(time.perf_counter() - start)
    return {name: {"seconds": taken, "relative_l2": errors[name]} for name, taken in seconds.items()}


def _error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def lines(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Lay the results out as Markdown."""
    yield "# Networks of the 5B's width on a CPU"
    for case, peers in results.items():
        yield from ("", f"## {case}: {CASES[case]}", "")
        yield "| peer | median seconds | times eager fp32 | from | to | relative L2 against eager fp32 |"
        yield "| --- | --- | --- | --- | --- | --- |"
        base = np.array(peers[BASELINE]["seconds"])
        for name, found in peers.items():
            ratios = base / np.array(found["seconds"])
            yield (
                f"| {name} | {np.median(found['seconds']):.2f} | {np.median(ratios):.2f} | {ratios.min():.2f} "
                f"| {ratios.max():.2f} | {found['relative_l2']:.1e} |"
            )


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder with 5 GB of room")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--pairs", type=int, default=5, help="rounds, each of which runs every peer once")
    parser.add_argument("--again", action="store_true", help="run cases again that are in the results")
    parser.add_argument("--note", default="nothing else ran", help="what else used the machine, for the report")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cpu")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    bundles = bundles_in(arguments.work)
    kept = arguments.output.with_suffix(".json")
    results = json.loads(kept.read_text())["cases"] if kept.exists() and not arguments.again else {}
    told = conditions(
        TOOLS, arguments.note, rounds=arguments.pairs, seed=0, weights="random, fp32 and bf16 of the same"
    )
    for case in arguments.cases:
        if case not in results:
            results[case] = measure(case, bundles, arguments.work / "5b-wide", arguments.pairs)
            write(arguments.output, told, {"cases": results}, lines(results))


if __name__ == "__main__":
    main()
