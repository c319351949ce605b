"""Every quantized form of a real export is compiled, without a GPU, and judged by its kernels."""

from dataclasses import replace
from pathlib import Path

import pytest

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.tensorrt.build import BuildRequest, Outcome, build, judged
from cvx_deploy.engines.tensorrt.libraries import Library, load_library
from cvx_deploy.engines.tensorrt.store import EngineStore
from cvx_deploy.errors import EngineError
from cvx_deploy.exporters.export import ExportRequest, bundle_from_checkpoint
from cvx_deploy.exporters.quantization.quantized import Quantizing
from cvx_deploy.progress import SilentProgress
from tests.conftest import Tiny

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
REQUEST = BuildRequest(targets=("sm89",), batch=(2, 2), networks=("transformer",))


@pytest.fixture(scope="module")
def library() -> Library:
    return load_library("tensorrt-rtx")


def exported(checkpoint: Path, precision: str, table: Path | None, output: Path, *, attention: bool = False) -> Bundle:
    quantizing = Quantizing(table, attention=attention)
    return bundle_from_checkpoint(
        ExportRequest("5b", checkpoint, frames=9, precision=precision, quantizing=quantizing), output
    )


def built(library: Library, bundle: Bundle, request: BuildRequest) -> tuple[Outcome, ...]:
    return tuple(build(library, bundle, request, SilentProgress()))


def attention_takes(bundle: Bundle, outcome: Outcome) -> set[str]:
    """Return the types of all tensors that attention kernels read."""
    (plan,) = EngineStore(bundle).plans(outcome.record)
    fused = [kernel for kernel in plan.kernels if kernel.kind == "attention"]
    return {tensor.dtype for kernel in fused for tensor in kernel.inputs if not tensor.is_scalar}


@pytest.mark.parametrize(
    ("precision", "kernels"),
    [("int8/bf16", "int8"), ("fp8/bf16", "float8")],
)
def test_every_layer_of_eight_bits_multiplies_in_eight_bits(
    precision: str, kernels: str, tiny: Tiny, table: Path, library: Library, tmp_path: Path
) -> None:
    bundle = exported(tiny("5b"), precision, table, tmp_path / "5b")
    (outcome,) = built(library, bundle, REQUEST)
    said = "\n".join(map(str, judged(bundle, outcome)))
    assert "compiled as expected" in said
    assert f"18 of 18 quantized layers run in {kernels}" in said
    assert "3 of 3 attentions are one fused kernel each" in said
    assert attention_takes(bundle, outcome) == {"bfloat16"}


@pytest.mark.parametrize(("precision", "layers"), [("fp8/bf16", "float8"), ("int8/bf16", "int8")])
def test_quantized_attention_multiplies_in_float8_in_one_kernel_whatever_its_layers_do(
    precision: str, layers: str, tiny: Tiny, table: Path, library: Library, tmp_path: Path
) -> None:
    bundle = exported(tiny("5b"), precision, table, tmp_path / "5b", attention=True)
    (outcome,) = built(library, bundle, REQUEST)
    said = "\n".join(map(str, judged(bundle, outcome)))
    assert "compiled as expected" in said
    assert "3 of 3 attentions are one fused kernel each" in said
    assert f"18 of 18 quantized layers run in {layers}" in said
    assert "3 of 3 quantized attentions run in float8" in said
    assert attention_takes(bundle, outcome) == {"float8"}


@pytest.mark.export
@pytest.mark.parametrize("precision", ["int8wo/bf16", "int4wo/bf16"])
def test_weights_alone_in_few_bits_are_compiled_with_attention_fused(
    precision: str, tiny: Tiny, library: Library, tmp_path: Path
) -> None:
    bundle = exported(tiny("5b"), precision, None, tmp_path / "5b")
    (outcome,) = built(library, bundle, REQUEST)
    assert "3 of 3 attentions are one fused kernel each" in "\n".join(map(str, judged(bundle, outcome)))


def test_fp8_is_refused_for_gpus_without_it_and_leaves_nothing(
    tiny: Tiny, table: Path, library: Library, tmp_path: Path
) -> None:
    bundle = exported(tiny("5b"), "fp8/bf16", table, tmp_path / "5b")
    with pytest.raises(EngineError, match="sm86 has no instructions") as raised:
        built(library, bundle, replace(REQUEST, targets=("sm86",)))
    assert "int8" in raised.value.fix
    assert not list(bundle.path.glob("engines/*.engine"))
