"""Formulas against exports: parameters and caches to the last one, operations against compiled plans and FACTS."""

import json
import math
import runpy
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.estimate.memory import weight_bytes
from cvx_deploy.families.cogvideox.architecture import Architecture
from cvx_deploy.families.cogvideox.models import MODELS
from cvx_deploy.shape import Shape
from tests.conftest import ROOT, Exported, Tiny

RESULTS = ROOT / "benchmarks" / "results"
OF_CHECKPOINT = runpy.run_path(str(ROOT / "benchmarks" / "architecture.py"))["architecture_of"]


def read(checkpoint: Path) -> Architecture:
    """Return what a checkpoint's configs describe, as the benchmarks read them."""
    found: Architecture = OF_CHECKPOINT(checkpoint)
    return found


def parameters(bundle: Bundle, role: str) -> int:
    """Return the elements of everything in a graph that lies in the checkpoint."""
    graph = onnx.load(str(bundle.onnx_path(role)), load_external_data=False).graph
    external = onnx.TensorProto.EXTERNAL
    return sum(math.prod(tensor.dims) for tensor in graph.initializer if tensor.data_location == external)


def test_parameters_are_those_of_the_export(model_name: str, tiny: Tiny, exported: Exported) -> None:
    bundle, known = exported(model_name), read(tiny(model_name))
    assert parameters(bundle, "transformer") == known.transformer.parameters
    assert parameters(bundle, "modulation") == known.transformer.modulation_parameters
    assert parameters(bundle, "text_encoder") == known.text_encoder.parameters
    assert parameters(bundle, "vae_decoder_first") == known.vae.parameters("decoder")
    if bundle.has("vae_encoder"):
        assert parameters(bundle, "vae_encoder") == known.vae.parameters("encoder")


def test_one_layer_more_would_be_noticed(tiny: Tiny, exported: Exported) -> None:
    known = read(tiny("5b")).transformer
    assert parameters(exported("5b"), "transformer") != replace(known, layers=known.layers + 1).parameters


def test_caches_are_those_of_the_export(model_name: str, tiny: Tiny, exported: Exported) -> None:
    bundle, known = exported(model_name), read(tiny(model_name))
    expected = 0
    if bundle.has("vae_decoder_next"):
        network = bundle.network("vae_decoder_next")
        _, height, width = known.latents(bundle.shape)
        sizes = {"latent_height": height, "latent_width": width}
        expected = sum(math.prod(spec.resolve(sizes)) for spec in network.inputs if spec.name in network.state)
    assert known.decoder_state(bundle.shape) == expected


@pytest.mark.parametrize("name", list(MODELS))
def test_published_checkpoints_have_the_size_of_those_that_were_exported(name: str) -> None:
    measured = json.loads((RESULTS / "export.json").read_text())["models"][name]["checkpoint_bytes"]
    known = Architecture.of_model(MODELS[name])
    predicted = sum(weight_bytes(known, "bf16").values()) + 2 * known.vae.parameters("encoder")
    assert predicted == pytest.approx(measured, rel=1e-3)  # configs, tokenizer and headers are measured, too


def test_weights_of_published_engines_are_those_that_were_built() -> None:
    measured = json.loads((RESULTS / "build.json").read_text())["networks"]
    known = weight_bytes(Architecture.of_model(MODELS["5b"]), "bf16")
    # That build had no modulation network yet: its weights were the transformer's.
    assert known["transformer"] + known["modulation"] == pytest.approx(
        measured["transformer"]["weights_bytes"], rel=2e-3
    )
    assert known["text_encoder"] == pytest.approx(measured["text_encoder"]["weights_bytes"], rel=1e-3)
    assert known["vae_decoder"] == pytest.approx(measured["vae_decoder_next"]["weights_bytes"], rel=1e-3)


def test_operations_are_those_of_the_design() -> None:
    transformer, shape = Architecture.of_model(MODELS["5b"]).transformer, Shape(49, 480, 720)
    tokens = Architecture.of_model(MODELS["5b"]).tokens(shape)
    assert tokens == 17_776
    assert round(transformer.linear_flops(tokens) / 1e12) == 169
    assert round(transformer.attention_flops(tokens) / 1e12) == 163


def test_operations_of_the_decoder_are_those_of_its_compiled_plan() -> None:
    vae = Architecture.of_model(MODELS["5b"]).vae
    assert vae.flops("decoder", (3, 60, 90)) == pytest.approx(58.386e12, rel=1e-4)  # TensorRT for RTX, first chunk
    assert vae.flops("decoder", (2, 60, 90)) == pytest.approx(50.929e12, rel=1e-4)  # a steady one
    assert vae.flops("decoder", (5, 60, 90)) == vae.flops("decoder", (3, 60, 90)) + vae.flops("decoder", (2, 60, 90))


def test_blocks_that_int8_and_fp8_leave_as_they_are_weigh_twice_as_much() -> None:
    known = Architecture.of_model(MODELS["5b"])
    block = known.transformer.linear_parameters // known.transformer.layers
    least = weight_bytes(known, "int8wo")["transformer"]
    for precision in ("int8", "fp8"):
        assert weight_bytes(known, precision)["transformer"] == least + 2 * block
