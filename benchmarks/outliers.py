"""What every scheme does to a deep transformer with the outliers that papers report, and which strength smooths best.

    python benchmarks/outliers.py --work DIR

Random weights with and without outliers (`cvx_deploy.exporters.sources.outliers`): 42 blocks at a width of 384, 6 heads
of 64 (deep), and two blocks at the 5b's width (wide). Each is observed on inputs of its own at three timesteps, and
judged on others against itself in fp32, block after block. What is done is kept in DIR, and the command goes on where
it was stopped. Results go to benchmarks/results/outliers.{json,md}.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import CogVideoXTransformer3DModel
from report import conditions, write
from safetensors.torch import save_file

from cvx_deploy.bundle.safetensors import read_header
from cvx_deploy.exporters.quantization.observe import Observations, observed
from cvx_deploy.exporters.quantization.quantized_weights import ALPHA, LayerWeights
from cvx_deploy.exporters.quantization.sensitivity import computing_quantized
from cvx_deploy.exporters.sources.synth import random_state
from cvx_deploy.exporters.sources.synth_configs import transformer_config
from cvx_deploy.families.cogvideox.layers import quantizable
from cvx_deploy.families.cogvideox.models import MODELS
from cvx_deploy.precision import SchemeName
from cvx_deploy.quantize.recipe import NetworkPrecision
from cvx_deploy.quantize.table import CalibrationTable, Conditions
from cvx_deploy.shape import Shape

TOOLS = ("torch", "torchao", "diffusers", "numpy")
RESULTS = Path(__file__).parent / "results" / "outliers"
TIMESTEPS = (999, 500, 20)
LATENTS, TEXT = (3, 12, 16), 64  # frames, height and width; tokens of the prompt
ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SIZES = {"deep": {"num_layers": 42, "num_attention_heads": 6}, "wide": {"num_layers": 2}}
SEED = 0


@dataclass(frozen=True)
class Case:
    """A transformer, and how its layers are kept.

    Attributes:
        alpha: SmoothQuant's strength, where the scheme smooths.
        moments: Whether rounding knows the inputs' second moments.
    """

    size: str
    outliers: bool
    scheme: SchemeName
    alpha: float = ALPHA
    moments: bool = False

    @property
    def name(self) -> str:
        """Its name in tables."""
        more = f", strength {self.alpha:g}" if self.scheme == "int8" else ", by moments" if self.moments else ""
        return f"{self.scheme}{more}"


@dataclass(frozen=True)
class Found:
    """What a scheme does.

    Attributes:
        growth: Relative L2 error of the video's tokens after each block, the mean over the timesteps.
        output: That of the transformer's output.
    """

    case: Case
    growth: tuple[float, ...]
    output: float


def network_of(size: str, outliers: bool) -> Any:
    """Return a transformer of random weights in fp32."""
    config = transformer_config(MODELS["5b"], "full") | SIZES[size]
    with torch.device("meta"):
        network = CogVideoXTransformer3DModel.from_config(config)
    network.load_state_dict(random_state(network, "transformer", SEED, outliers), assign=True)
    return network.eval().requires_grad_(False)


def inputs_of(network: Any, seed: int) -> dict[str, Any]:
    """Return what a sampler would give the network, a timestep a batch entry: noise and a prompt's embedding."""
    generator = torch.Generator().manual_seed(seed)
    frames, height, width = LATENTS
    config, batch = network.config, len(TIMESTEPS)
    return {
        "hidden_states": torch.randn(batch, frames, config.in_channels, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(batch, TEXT, config.text_embed_dim, generator=generator) * 0.2,
        "timestep": torch.tensor(TIMESTEPS),
        "image_rotary_emb": _positions(network),
        "return_dict": False,
    }


def _positions(network: Any) -> Any:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, height, width = LATENTS[0], LATENTS[1] // 2, LATENTS[2] // 2
    return get_3d_rotary_pos_embed(
        network.config.attention_head_dim, ((0, 0), (height, width)), (height, width), frames
    )


def trace_of(network: Any, seed: int) -> list[torch.Tensor]:
    """Return the video's tokens after every block, and the output."""
    kept: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(lambda _, __, output: kept.append(output[0]))
        for block in network.transformer_blocks
    ]
    kept.append(network(**inputs_of(network, seed))[0])
    for handle in handles:
        handle.remove()
    return kept


def table_of(network: Any, layers: list[str], moments: bool) -> CalibrationTable:
    """Observe the network on inputs that it is not judged on."""
    observations = Observations()
    observations.seen = True
    with observed(network, layers, "", observations, TEXT if moments else None):
        network(**inputs_of(network, SEED + 1))
    shape = Shape(9, LATENTS[1] * 8, LATENTS[2] * 8)
    told = Conditions(2, "", MODELS["5b"].traits, shape, "", 1, 3, (0, 1, 2), 1.0, SEED, "fp32", {})
    return CalibrationTable(told, dict(observations.amax), dict(observations.moments))


def cases_of(size: str, outliers: bool) -> list[Case]:
    """Return what is judged: at the full width the schemes at their defaults alone."""
    alphas = ALPHAS if size == "deep" else (ALPHA,)
    plain: tuple[SchemeName, ...] = ("int8wo", "fp8", "int4wo")
    return [
        *(Case(size, outliers, scheme) for scheme in plain),
        Case(size, outliers, "int4wo", moments=True),
        *(Case(size, outliers, "int8", alpha) for alpha in alphas),
    ]


def found_of(case: Case, network: Any, weights: LayerWeights, reference: list[torch.Tensor]) -> Found:
    """Judge one case."""
    with computing_quantized(network, weights.layers, weights):
        trace = trace_of(network, SEED + 2)
    errors = [_relative(expected, found) for expected, found in zip(reference, trace, strict=True)]
    return Found(case, tuple(round(error, 5) for error in errors[:-1]), errors[-1])


def _relative(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float(((found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).mean())


def judge(size: str, outliers: bool, work: Path) -> tuple[list[Found], dict[str, float]]:
    """Judge every case of one transformer; return how far its activations reach, too, by kind of layer."""
    network = network_of(size, outliers)
    save_file(network.state_dict(), work / "transformer.safetensors")
    tensors = read_header(work / "transformer.safetensors", "transformer.safetensors")
    layers = quantizable("transformer", tensors)
    table, reference = table_of(network, layers, moments=True), trace_of(network, SEED + 2)
    found = []
    for case in cases_of(size, outliers):
        kept = work / f"{size}-{outliers}-{case.name}.json"
        if not kept.is_file():
            known = table if case.moments or case.scheme in ("int8", "fp8") else None
            precision = NetworkPrecision("fp32", case.scheme)
            weights = LayerWeights("transformer", tensors, lambda _: work / "transformer.safetensors", precision,
                                   layers, known, alpha=case.alpha)  # fmt: skip
            one = found_of(case, network, weights, reference)
            kept.write_text(json.dumps(asdict(one)))
            print(kept.name, one.output, flush=True)
        values = json.loads(kept.read_text())
        found.append(Found(Case(**values["case"]), tuple(values["growth"]), values["output"]))
    return found, reach_of(table)


def reach_of(table: CalibrationTable) -> dict[str, float]:
    """Return by kind of layer the largest channel over the one in the middle, the median over the blocks."""
    kinds = ("attn1.to_q", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
    return {
        kind: float(
            np.median([amax.max() / np.median(amax) for place, amax in table.amax.items() if place.endswith(kind)])
        )
        for kind in kinds
    }


def lines_of(size: str, plain: list[Found], planted: list[Found]) -> list[str]:
    """Return one size's table, as Markdown."""
    depths = [1, 7, 14, 28, 42] if size == "deep" else [1, 2]
    titles = [*(f"after block {depth}" for depth in depths), "output", "output, no outliers"]
    lines = ["| scheme | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for one, other in zip(planted, plain, strict=True):
        values = [*(one.growth[depth - 1] for depth in depths), one.output, other.output]
        lines.append(f"| {one.case.name} | " + " | ".join(f"{value:.4f}" for value in values) + " |")
    return lines


def main() -> None:
    """Judge both sizes, without and with outliers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for weights and what is done")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--output", type=Path, default=RESULTS, help="without suffix")
    parser.add_argument("--note", default="", help="what else used the machine")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    lines: list[str] = []
    with torch.inference_mode():
        for size in arguments.sizes:
            (plain, calm), (planted, reach) = (judge(size, outliers, arguments.work) for outliers in (False, True))
            results[size] = {"found": [asdict(one) for one in (*plain, *planted)], "reach": [calm, reach]}
            lines += [f"{size}: {SIZES[size]}", "", *lines_of(size, plain, planted), "", *reach_lines(calm, reach), ""]
    told = conditions(TOOLS, arguments.note, latents=LATENTS, timesteps=TIMESTEPS, seed=SEED)
    write(arguments.output, told, results, lines)
    print("\n".join(lines))


def reach_lines(calm: dict[str, float], reach: dict[str, float]) -> list[str]:
    """Return how far activations reach, as Markdown."""
    lines = ["| largest channel over the middle one, before | no outliers | outliers |", "|---|---|---|"]
    return [*lines, *(f"| {kind} | {calm[kind]:.1f} | {reach[kind]:.1f} |" for kind in reach)]


if __name__ == "__main__":
    main()
