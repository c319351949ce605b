"""Quantized bundles: their weights, their graphs, what ONNX Runtime makes of them, and what must not pass."""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.bundle.safetensors import read_header
from cvx_deploy.engines.onnxruntime.backend import OrtBackend
from cvx_deploy.errors import BundleError, CalibrationError, CheckpointError, CvxError, EngineError, RecipeError
from cvx_deploy.exporters.export import ExportRequest, bundle_from_checkpoint
from cvx_deploy.exporters.quantization.calibrate import CalibrationRequest, calibrate
from cvx_deploy.exporters.quantization.quantized import Quantizing, quantize_components
from cvx_deploy.exporters.quantization.quantized_weights import LayerWeights
from cvx_deploy.exporters.rewire import write_with_loras
from cvx_deploy.exporters.sources.checkpoint import Checkpoint
from cvx_deploy.exporters.sources.weights import load_tensor
from cvx_deploy.families.cogvideox import layers as layers_module
from cvx_deploy.measure.thresholds import THRESHOLDS
from cvx_deploy.progress import SilentProgress
from cvx_deploy.quantize.recipe import NetworkPrecision, Recipe
from cvx_deploy.quantize.table import CalibrationTable
from cvx_deploy.shape import Shape
from tests.conftest import Exported, Quantized, Tiny, inputs_of
from tests.untraced import without_tracing

Values = NDArray[np.floating]


def output_of(bundle: Bundle, role: str) -> Values:
    backend = OrtBackend(bundle, threads=1, reference=True)
    with backend.load(role, {"batch": 2}) as session:
        (output,) = session.run(inputs_of(bundle, role)).values()
        return backend.to_host(output).ravel().astype(np.float64)


def agree(bundle: Bundle, reference: Bundle, role: str) -> bool:
    """Whether a quantized network is as near to the plain one as the table of thresholds asks."""
    found, expected = output_of(bundle, role), output_of(reference, role)
    entry = bundle.network(role).quantization
    limits = THRESHOLDS[entry.scheme if entry else "fp32"]
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    cosine = found @ expected / (np.linalg.norm(found) * np.linalg.norm(expected))
    return bool(error <= limits.relative_l2 and cosine >= limits.cosine)


def graph_of(bundle: Bundle, role: str) -> onnx.GraphProto:
    return onnx.ModelProto.FromString(bundle.onnx_path(role).read_bytes()).graph


@pytest.mark.parametrize("precision", ["int8/fp32", "int8wo/fp32", "int4wo/fp32", "fp8/fp32"])
def test_quantized_networks_stay_near_the_plain_ones(precision: str, quantized: Quantized, exported: Exported) -> None:
    bundle, plain = quantized(precision), exported("5b", frames=9)
    assert agree(bundle, plain, "transformer")
    assert agree(bundle, plain, "text_encoder")


def test_a_text_encoder_in_fp8_stays_near(quantized: Quantized, exported: Exported) -> None:
    bundle = quantized("fp32,text_encoder=fp8")
    assert bundle.network("text_encoder").quantization.layers == 14  # type: ignore[union-attr]
    assert agree(bundle, exported("5b", frames=9), "text_encoder")


def test_attention_in_fp8_stays_near(quantized: Quantized, exported: Exported) -> None:
    bundle = quantized("fp8/fp32", attention=True)
    assert not any(node.op_type == "Attention" for node in graph_of(bundle, "transformer").node)
    assert agree(bundle, exported("5b", frames=9), "transformer")


def changed(bundle: Bundle, folder: Path, name: str, change: Callable[[Values], Values]) -> Bundle:
    """Return a copy of a bundle with one tensor of its transformer's weights changed, its hashes made to fit."""
    import shutil

    copy = Bundle.open(Path(shutil.copytree(bundle.path, folder / "copy")))
    (file,) = copy.network("transformer").weights
    path = copy.locate_weight(file)
    stored = read_header(path, file)[name]
    content = bytearray(path.read_bytes())
    values = np.frombuffer(bytes(content[stored.offset : stored.offset + stored.nbytes]), np.float32)
    content[stored.offset : stored.offset + stored.nbytes] = change(values).astype(np.float32).tobytes()
    path.write_bytes(content)
    entry = replace(copy.manifest.weights[file], mtime_ns=path.stat().st_mtime_ns)
    return replace(copy, manifest=replace(copy.manifest, weights=copy.manifest.weights | {file: entry}))


SCALE = "transformer_blocks.1.ff.net.2.weight_scale"


def test_a_wrong_scale_is_seen(quantized: Quantized, exported: Exported, tmp_path: Path) -> None:
    wrong = changed(quantized("int8wo/fp32"), tmp_path, SCALE, lambda scale: scale * 1.5)
    assert not agree(wrong, exported("5b", frames=9), "transformer")


def test_a_swapped_axis_is_seen(
    tiny: Tiny, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = LayerWeights.quantized

    def swapped(self: LayerWeights, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        weight, scale = take(self, layer)
        return weight.T.reshape(weight.shape), scale

    monkeypatch.setattr(LayerWeights, "quantized", swapped)
    request = ExportRequest("5b", tiny("5b"), frames=9, precision="fp32,transformer=int8wo")
    assert not agree(bundle_from_checkpoint(request, tmp_path / "5b"), exported("5b", frames=9), "transformer")


def places_quantized(bundle: Bundle) -> set[str]:
    graph = graph_of(bundle, "transformer")
    return {node.input[0] for node in graph.node if node.op_type == "DequantizeLinear" and "/Weight" in node.name}


def only_blocks(bundle: Bundle) -> bool:
    return all(".transformer_blocks." in f".{place}" for place in places_quantized(bundle))


def test_only_layers_of_blocks_are_quantized(
    tiny: Tiny, quantized: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = quantized("int8wo/fp32")
    assert len(places_quantized(bundle)) == 18 == bundle.network("transformer").quantization.layers  # type: ignore[union-attr]
    assert only_blocks(bundle)
    everything = re.compile(r"transformer_blocks\..*(to_q|net\.2)|proj_out")
    monkeypatch.setitem(layers_module._LAYERS, "transformer", everything)
    request = ExportRequest("5b", tiny("5b"), frames=9, precision="fp32,transformer=int8wo")
    assert not only_blocks(bundle_from_checkpoint(request, tmp_path / "5b"))


def kernels_of(bundle: Bundle, role: str, folder: Path) -> Counter[str]:
    """Return what ONNX Runtime ran, by operator, from a profile of one run."""
    backend = OrtBackend(bundle, threads=1)
    make = backend._options

    def profiled(*words: Any) -> onnxruntime.SessionOptions:
        options = make(*words)
        options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
        return options

    backend._options = profiled  # type: ignore[method-assign,assignment]
    with backend.load(role, {"batch": 2}) as session:
        session.run(inputs_of(bundle, role))
        events = json.loads(Path(session._session.end_profiling()).read_text())
    return Counter(event["args"]["op_name"] for event in events if "op_name" in event.get("args", {}))


def test_onnxruntime_multiplies_in_int8(quantized: Quantized, tmp_path: Path) -> None:
    assert kernels_of(quantized("int8/fp32"), "transformer", tmp_path)["MatMulIntegerToFloat"] == 18
    assert kernels_of(quantized("int8wo/fp32"), "transformer", tmp_path)["MatMulNBits"] == 18


def test_engines_that_cannot_refuse(quantized: Quantized) -> None:
    with pytest.raises(EngineError, match="multiplies in fp8, which no CPU can"):
        OrtBackend(quantized("fp8/fp32"))
    with pytest.raises(EngineError, match="bf16"):
        OrtBackend(quantized("int8wo/bf16"))


def test_a_quantized_network_needs_nothing_of_its_checkpoint(quantized: Quantized, tiny: Tiny) -> None:
    bundle = quantized("int8/fp32")
    for role in ("transformer", "modulation", "text_encoder"):
        for name in bundle.network(role).weights:
            assert bundle.manifest.weights[name].in_bundle
    tensors = read_header(bundle.locate_weight("transformer.int8.safetensors"), "")
    original = Checkpoint(tiny("5b")).tensors("transformer")
    assert tensors.keys() >= original.keys()
    assert tensors["proj_out.weight"].dtype == original["proj_out.weight"].dtype
    assert tensors["transformer_blocks.0.attn1.to_q.weight"].dtype == "I8"


@pytest.mark.parametrize("scheme", ["int8wo", "fp8", "int4wo"])
def test_weights_are_within_half_a_step_of_the_checkpoints(scheme: Any, tiny: Tiny, table: Path) -> None:
    checkpoint = Checkpoint(tiny("5b"))
    tensors, layer = checkpoint.tensors("transformer"), "transformer_blocks.0.ff.net.2"
    precision = NetworkPrecision("bf16", scheme)
    ranges = CalibrationTable.read(table)
    weights = LayerWeights("transformer", tensors, checkpoint.place, precision, [layer], ranges)
    values, scale = weights.quantized(layer)
    stored = tensors[f"{layer}.weight"]
    expected = load_tensor(checkpoint.place(stored.file), stored).float().T
    step = scale.float().reshape(-1, values.shape[1])
    step = step.repeat_interleave(values.shape[0] // len(step), 0)
    error = (values.float() * step - expected).abs()
    half = step / 2 if scheme != "fp8" else expected.abs() / 16 + step / 512
    if scheme == "int4wo":  # in 4 bits the largest are clipped, so that the others are nearer
        clipped = (values == -8) | (values == 7)
        assert clipped.float().mean() < 0.2
        error = error.where(~clipped, 0)
    # A scale rounded down to bfloat16 clips the largest weight by half a unit of its 8 bits.
    assert (error <= half * 1.01 + expected.abs().amax(0) / 256).all()
    assert scale.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def moments(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a table of the tiny 5b's activations with their second moments."""
    path = tmp_path_factory.mktemp("table") / "moments.safetensors"
    calibrate(replace(request_of(tiny), second_moments=True), path, SilentProgress())
    return path


def request_of(tiny: Tiny) -> CalibrationRequest:
    checkpoint = Checkpoint(tiny("5b"))
    shape = Shape(9, checkpoint.limits.sample_height, checkpoint.limits.sample_width)
    return CalibrationRequest(checkpoint, shape, ("a red ball",), steps=1, compute="fp32")


def lost_by(weights: LayerWeights, layer: str, moments: Values) -> float:
    """Return the mean square of what rounding a layer changes in its outputs, over the tokens that were observed."""
    values, scale = weights.quantized(layer)
    groups = scale.float().repeat_interleave(len(values) // len(scale), 0)
    stored = weights.tensors[f"{layer}.weight"]
    error = (values.float() * groups).T - load_tensor(weights.place(stored.file), stored).float()
    parts = error.reshape(len(error), len(moments), -1).numpy()
    return float(np.einsum("osi,sij,osj->", parts, moments, parts))


def test_second_moments_lessen_what_rounding_changes_and_those_of_others_do_not(tiny: Tiny, moments: Path) -> None:
    checkpoint, found = Checkpoint(tiny("5b")), CalibrationTable.read(moments)
    tensors, precision = checkpoint.tensors("transformer"), NetworkPrecision("fp32", "int4wo")
    layers = checkpoint.family.layers.quantizable("transformer", tensors)
    others = list(found.moments.values())
    mixed = {place: others[index - 4] for index, place in enumerate(found.moments)}  # of the block before
    lost = {}
    for name, table in (
        ("nearest", replace(found, moments={})),
        ("moments", found),
        ("mixed", replace(found, moments=mixed)),
    ):
        weights = LayerWeights("transformer", tensors, checkpoint.place, precision, layers, table)
        assert weights.by_moments == (name != "nearest")
        places = [layer for layer in layers if layer in found.moments]
        lost[name] = sum(lost_by(weights, layer, found.moments[layer]) for layer in places)
    # Random weights: what enters after a norm is nearly white, so that there is little to make up for.
    assert lost["moments"] < 0.8 * lost["nearest"] < lost["mixed"]


def test_a_bundle_rounded_by_moments_says_so_and_stays_near(
    tiny: Tiny, moments: Path, exported: Exported, tmp_path: Path
) -> None:
    how = Quantizing(moments)
    request = ExportRequest("5b", tiny("5b"), frames=9, precision="int4wo/fp32", quantizing=how)
    bundle = bundle_from_checkpoint(request, tmp_path / "5b")
    entry = bundle.network("transformer").quantization
    assert entry is not None
    assert entry.calibration is not None
    assert entry.calibration[0] == str(moments)
    assert f"--calibration {moments}" in bundle.export_command(bundle.shapes)
    assert agree(bundle, exported("5b", frames=9), "transformer")


def test_a_table_without_the_moments_that_it_is_given_for_is_refused(tiny: Tiny, table: Path, tmp_path: Path) -> None:
    request = ExportRequest("5b", tiny("5b"), frames=9, precision="int4wo/fp32", quantizing=Quantizing(table))
    with pytest.raises(CalibrationError, match="has no second moments, which are all that int4wo/fp32 takes"):
        bundle_from_checkpoint(request, tmp_path / "5b")
    assert not list(tmp_path.iterdir())


def test_a_place_without_moments_is_named(tiny: Tiny, moments: Path) -> None:
    checkpoint, found = Checkpoint(tiny("5b")), CalibrationTable.read(moments)
    layer = "transformer_blocks.1.attn1.to_k"
    fewer = {place: values for place, values in found.moments.items() if ".1.attn1.to_q" not in place}
    tensors, precision = checkpoint.tensors("transformer"), NetworkPrecision("fp32", "int4wo")
    table = replace(found, moments=fewer)
    weights = LayerWeights("transformer", tensors, checkpoint.place, precision, [layer], table)
    with pytest.raises(CalibrationError, match=r"no second moments of transformer_blocks\.1\.attn1\.to_q"):
        weights.quantized(layer)


def test_excluded_layers_are_as_they_were(quantized: Quantized) -> None:
    bundle = quantized("int8/fp32", exclude=("transformer_blocks.0",))
    entry = bundle.network("transformer").quantization
    assert entry is not None
    assert (entry.layers, entry.excluded) == (12, ("transformer_blocks.0",))
    assert not any("transformer_blocks.0." in place for place in places_quantized(bundle))


QUERY = "transformer_blocks.{}.attn1.to_q.weight"


@pytest.fixture
def one_in_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tiny model, which has three blocks, be deep enough for one to be spared."""
    monkeypatch.setattr("cvx_deploy.families.cogvideox.layers._BLOCKS_A_SPARED", 3)


@pytest.mark.usefixtures("one_in_three")
@pytest.mark.parametrize(
    ("precision", "exclude", "excluded"),
    [
        ("int8/fp32", None, ("transformer_blocks.2",)),
        ("int8/fp32", (), ()),
        ("int8/fp32", ("transformer_blocks.0",), ("transformer_blocks.0",)),
        ("int8wo/fp32", None, ()),
    ],
)
def test_the_last_blocks_stay_as_they_are_unless_others_are_chosen(
    precision: str, exclude: tuple[str, ...] | None, excluded: tuple[str, ...], tiny: Tiny, table: Path, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tiny("5b"))
    how = Quantizing(table if precision.startswith("int8/") else None, exclude=exclude)
    recipe = Recipe.parse(precision, "bf16")
    made = quantize_components(how, recipe, checkpoint, (), tmp_path, SilentProgress())
    entry = made["transformer"].entry
    assert (entry.excluded, entry.layers) == (excluded, 18 - 6 * len(excluded))
    assert made["text_encoder"].entry.excluded == ()
    stored = made["transformer"].made.tensors
    kept = {f"transformer_blocks.{block}" for block in range(3) if stored[QUERY.format(block)].dtype != "I8"}
    assert kept == set(excluded)


def test_the_manifest_says_how_to_export_it_again(quantized: Quantized, table: Path, exported: Exported) -> None:
    plain = exported("5b", frames=9)
    bundle = quantized("fp8/fp32", attention=True)
    command = bundle.export_command(bundle.shapes)
    for words in ("--precision fp8/fp32", f"--calibration {table}", "--quantize-attention", "--exclude none"):
        assert words in command
    bundle = quantized("int8/fp32", exclude=("transformer_blocks.0",))
    assert "--exclude transformer_blocks.0" in bundle.export_command(bundle.shapes)
    assert "--exclude" not in plain.export_command(plain.shapes)


@pytest.mark.parametrize(
    ("precision", "quantizing", "expected", "words"),
    [
        ("int8/fp32", Quantizing(), CalibrationError, "needs the ranges"),
        ("fp32", Quantizing(attention=True), RecipeError, "leaves the transformer's"),
        ("fp32", Quantizing(exclude=("transformer_blocks.0",)), RecipeError, "quantizes nothing"),
        ("int8wo/fp32", Quantizing(exclude=("proj_out",)), RecipeError, "proj_out cannot be excluded"),
        ("int8wo/fp32", Quantizing(calibration=Path("any")), RecipeError, "needs no calibration table"),
        ("int8/fp32", Quantizing(calibration=Path("none")), CalibrationError, "there is no calibration table"),
    ],
)
def test_what_makes_no_sense_is_refused_and_nothing_is_left(
    precision: str, quantizing: Quantizing, expected: type[CvxError], words: str, tiny: Tiny, tmp_path: Path
) -> None:
    request = ExportRequest("5b", tiny("5b"), frames=9, precision=precision, quantizing=quantizing)
    with pytest.raises(expected, match=words):
        bundle_from_checkpoint(request, tmp_path / "5b")
    assert not list(tmp_path.iterdir())


def test_tables_of_other_models_and_shapes_are_refused(
    tiny: Tiny, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_tracing(monkeypatch)
    how = Quantizing(table)
    with pytest.raises(CalibrationError, match="another model"):
        bundle_from_checkpoint(ExportRequest("2b", tiny("2b"), precision="int8/fp32", quantizing=how), tmp_path / "2b")
    request = ExportRequest("5b", tiny("5b"), frames=17, precision="int8/fp32", quantizing=how)
    with pytest.raises(CalibrationError, match="--calibration-any-shape"):
        bundle_from_checkpoint(request, tmp_path / "5b")
    assert not list(tmp_path.iterdir())
    bundle_from_checkpoint(replace(request, quantizing=replace(how, any_shape=True)), tmp_path / "5b")


def test_weights_that_are_no_numbers_are_named(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = load_tensor
    monkeypatch.setattr(
        "cvx_deploy.exporters.quantization.quantized_weights.load_tensor",
        lambda *words: take(*words).fill_(float("nan")),
    )
    request = ExportRequest("5b", tiny("5b"), frames=9, precision="int8wo/fp32")
    with pytest.raises(CheckpointError, match=r"weight holds what is no number"):
        bundle_from_checkpoint(request, tmp_path / "5b")
    assert not list(tmp_path.iterdir())


def test_adapters_are_not_added_to_quantized_weights(quantized: Quantized, tmp_path: Path) -> None:
    bundle = quantized("int8/fp32")
    with pytest.raises(BundleError, match="adapters are merged before that"):
        write_with_loras(bundle, [(tmp_path / "style.safetensors", 1.0)], tmp_path / "new", tmp_path, SilentProgress())
