"""The compiled plan is read whole from a build's messages and from the inspector, and nothing unknown is made up."""

import json
import string
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvx_deploy.engines.gpus import gpu_named
from cvx_deploy.engines.tensorrt.compiled_plan import (
    SCHEMA_VERSION,
    CompiledPlan,
    plans_from_inspector,
    plans_from_messages,
)
from cvx_deploy.engines.tensorrt.kernels import Kernel, KernelTensor
from cvx_deploy.engines.tensorrt.plan_report import describe_plan, plan_values
from cvx_deploy.errors import EngineError
from tests.engines.tensorrt.compiled import BATCH, BLOCKS, HEADS, TOKENS, WIDTH, compiled, messages_of

LINEAR = "Format: (Linear) Row major linear format"
GEMM = (
    "Name: to_v/MatMul_195+to_q/MatMul_189_myl0_12, LayerType: gemm, Inputs: [ { Name: cat, Dimensions: [662,80], "
    f"Strides: [80,1], StrideOrder: [1,0], Datatype: BFloat16, {LINEAR} }}], Constants: [ {{ Name: w, "
    f"Dimensions: [80,240], Strides: [240,1], StrideOrder: [1,0], Datatype: BFloat16, {LINEAR} }}, {{ Name: alpha, "
    f"Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Float, {LINEAR} }}], Outputs: [ {{ Name: o, "
    "Dimensions: [662,240], Strides: [240,1], StrideOrder: [1,0], Datatype: BFloat16, Format: (Arbitrary) Format "
    "with stride order = [1,0] }], TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: "
    "[ONNX Layer: blocks.0.to_v/MatMul_195]\x1f[ONNX Layer: blocks.0.to_q/MatMul_189]"
)
WAIT = (
    "Name: __mye97830_myl0_232, LayerType: wait, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 1, "
    "EventId: 1, Metadata: "
)
ENDS = (
    "\n\nI/O Tensors:\n Name: latents, IOMode: Input, DataType: Float, Dimensions: [1,16], Location: Device\n"
    " Name: pixels, IOMode: Output, DataType: Float, Dimensions: [1,3], Location: Device\n"
)


def listed(*lines: str) -> str:
    return "Layers:\n" + "\n".join(lines) + ENDS


def plan_of(*lines: str) -> CompiledPlan:
    return plans_from_messages([listed(*lines)])[0]


Shapes = Sequence[tuple[int, ...]]


def kernel(
    name: str,
    inputs: Shapes = (),
    constants: Shapes = (),
    outputs: Shapes = (),
    kind: str = "kgen",
) -> Kernel:
    """Return a kernel of bfloat16 tensors with these shapes."""
    sides = {"inputs": inputs, "constants": constants, "outputs": outputs}
    made = {
        side: tuple(KernelTensor(f"{side}{place}", shape, "bfloat16") for place, shape in enumerate(shapes))
        for side, shapes in sides.items()
    }
    return Kernel(name, kind, "", made["inputs"], made["constants"], made["outputs"], layers=())


def test_a_line_becomes_a_kernel_with_shapes_types_bytes_and_layers() -> None:
    (gemm,) = plan_of(GEMM).kernels
    assert (gemm.type, gemm.kind, gemm.tactic, gemm.block) == ("gemm", "gemm", "__myelin_CASK_STUB", "blocks.0")
    assert gemm.inputs == (KernelTensor("cat", (662, 80), "bfloat16"),)
    assert gemm.constants[1] == KernelTensor("alpha", (1,), "float32")
    assert gemm.layers == ("blocks.0.to_v/MatMul_195", "blocks.0.to_q/MatMul_189")
    assert (gemm.bytes_in, gemm.bytes_constants, gemm.bytes_out) == (662 * 160, 80 * 480 + 4, 662 * 480)
    assert gemm.flops == 2 * 662 * 80 * 240


def test_steps_without_tensors_and_layers_are_read() -> None:
    plan = plan_of(GEMM, WAIT)
    assert (plan.kernels[1].kind, plan.kernels[1].stream, plan.kernels[1].layers) == ("control", 1, ())
    assert plan.blocks == ("blocks.0", "blocks.0")
    assert plan.io == ("latents", "pixels")


def test_memory_is_that_of_the_same_build() -> None:
    messages = ["Total Activation Memory: 9075712 bytes", "Total Weights Memory: 876320 bytes", listed(GEMM)]
    (plan,) = plans_from_messages(messages, ["sm86", "sm89"])
    assert (plan.activation_bytes, plan.weights_bytes) == (9075712, 876320)
    assert plan.targets == ("sm86", "sm89")
    assert plan_of(GEMM).activation_bytes is None


def test_one_list_for_each_target_is_kept_apart() -> None:
    messages = ["Total Weights Memory: 1 bytes", listed(GEMM), "Total Weights Memory: 2 bytes", listed(GEMM, WAIT)]
    first, second = plans_from_messages(messages, ["sm86", "sm120"])
    assert (first.targets, first.weights_bytes, len(first.kernels)) == (("sm86",), 1, 1)
    assert (second.targets, second.weights_bytes, len(second.kernels)) == (("sm120",), 2, 2)
    with pytest.raises(EngineError, match="lists its kernels 2 times, for 1 targets"):
        plans_from_messages(messages, ["sm86"])


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "list no kernels"),
        (["Engine generation completed in 5 seconds."], "list no kernels"),
        (["Layers:\nmodel.to_q/MatMul_1"], "a kernel in an unknown format: model.to_q"),
        ([listed(GEMM.replace("Datatype", "Type"))], "a tensor in an unknown format"),
    ],
)
def test_another_format_is_an_error_and_no_empty_plan(messages: list[str], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        plans_from_messages(messages)


def test_sizes_chosen_at_run_time_leave_bytes_and_flops_unknown() -> None:
    plan = plan_of(GEMM.replace("662", "-1"))
    gemm = plan.kernels[0]
    assert (gemm.bytes_in, gemm.bytes_out, gemm.traffic, gemm.flops) == (None, None, None, None)
    assert gemm.bytes_constants == 80 * 480 + 4
    assert plan.is_partial
    assert "partial: the sizes of 1 kernels are chosen at run time" in describe_plan(plan)
    assert plan_values(plan)["total"]["unsized"] == {"gemm": 1}


def test_a_type_this_program_does_not_know_keeps_its_name_and_has_no_bytes() -> None:
    tensor = plan_of(GEMM.replace("BFloat16", "NVFP3")).kernels[0].inputs[0]
    assert (tensor.dtype, tensor.bytes) == ("NVFP3", None)


@pytest.mark.parametrize(
    ("made", "kind", "flops"),
    [
        (kernel("_gemm_mha_v2_myl0_20", [(10, 331, 16), (10, 16, 331), (10, 331, 16)], [], [(10, 331, 16)]),
         "attention", 4 * 10 * 331 * 331 * 16),
        (kernel("__myl_FcAddAdd_myl0_9", [(192, 64), (192, 256)], [(1, 64), (256, 64)], [(192, 64)], "runtime_fusion"),
         "gemm", 2 * 192 * 256 * 64),
        (kernel("__myl_AddSiluReshMulSum_myl0_3", [(1, 56)], [(56, 3040), (1, 56)], [(1, 3040)]),
         "gemm", 2 * 56 * 3040),
        (kernel("scores_myl0_4", [(4, 96, 32), (4, 32, 96)], [], [(4, 96, 96)], "gemm"), "gemm", 2 * 4 * 96 * 96 * 32),
        (kernel("conv_myl0_5", [(6, 16, 10, 14)], [(80, 16, 2, 2), (1, 80, 1, 1)], [(6, 80, 5, 7)], "correlation"),
         "convolution", 2 * 6 * 80 * 35 * 64),
        (kernel("__myl_CorrMul_myl0_7", [(1, 16, 9, 8, 8)], [(8, 16, 1, 1, 1)], [(1, 8, 9, 8, 8)], "runtime_fusion"),
         "convolution", 2 * 8 * 9 * 64 * 16),
        (kernel("__myl_TranReshMove_myl0_17", [(2, 4)], [], [(4, 2)]), "copy", None),
        (kernel("__myl_CastMeanSubMulMean_myl0_9", [(2, 4)], [], [(2, 1)]), "elementwise", None),
        (kernel("pool_myl0_9", [(1, 2, 4)], [], [(1, 2, 2)], "avgpool"), "elementwise", None),
        (kernel("strange_myl0_1", [(4, 96, 32)], [], [(4, 96, 96)], "gemm"), "gemm", None),
        (kernel("__myl_FcFcAdd_myl0_9", [(8, 4)], [(4, 6)], [(8, 6)], "runtime_fusion"), "gemm", None),
    ],
    ids=lambda made: made.name if isinstance(made, Kernel) else "",
)  # fmt: skip
def test_kinds_and_flops_follow_from_names_and_shapes(made: Kernel, kind: str, flops: int | None) -> None:
    assert (made.kind, made.flops) == (kind, flops)


def test_what_is_read_twice_counts_once_and_another_view_counts() -> None:
    one = kernel("__myl_SlicConc_myl0_1", [(2, 4)], [], [(2, 6)])
    again = replace(one, inputs=one.inputs * 2)
    view = replace(one, inputs=(*one.inputs, replace(one.inputs[0], shape=(2, 1))))
    assert (one.bytes_in, again.bytes_in, view.bytes_in) == (16, 16, 20)


def test_a_kernel_that_serves_many_blocks_is_in_none() -> None:
    layers = tuple(f"model.transformer_blocks.{block}.norm1.linear/Gemm_1" for block in range(3))
    assert replace(kernel("g"), layers=layers).block is None
    assert replace(kernel("g"), layers=layers[:2]).block == "transformer_blocks.0"
    assert replace(kernel("g"), layers=("encoder.encoder.block.3.layer.0/Softmax_80",)).block == "block.3"
    assert replace(kernel("g"), layers=("coder.mid_block.resnets.0/Conv_1",)).block == "mid_block"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_compiled_network_has_all_its_arithmetic(precision: Any) -> None:
    plan = compiled(precision)
    flops = {
        kind: sum(kernel.flops or 0 for kernel in plan.kernels if kernel.kind == kind) for kind in ("gemm", "attention")
    }
    rows = BATCH * TOKENS
    assert flops["gemm"] == BLOCKS * 2 * rows * (4 + 8) * WIDTH**2
    assert flops["attention"] == BLOCKS * 4 * rows * TOKENS * WIDTH
    assert not plan.is_partial
    assert plan.io == ("x", "y")
    assert plan.block_order[:BLOCKS] == ("transformer_blocks.0", "transformer_blocks.1")
    assert plan.activation_bytes
    assert plan.weights_bytes


def test_quantized_weights_count_a_byte_each() -> None:
    gemms = [made for made in compiled(quantized="int8").kernels if made.kind == "gemm"]
    assert {made.operand_type for made in gemms} == {"int8"}
    weights = [tensor for made in gemms for tensor in made.constants if tensor.dtype == "int8"]
    assert sum(tensor.bytes or 0 for tensor in weights) == BLOCKS * 12 * WIDTH**2


def test_profiles_of_one_build_are_plans_of_their_own() -> None:
    one, two = plans_from_messages(messages_of(batches=((1, 1), (2, 2))), ["sm89"])
    assert (one.profile, two.profile) == (0, 1)
    for plan, batch in ((one, 1), (two, 2)):
        attention = [made for made in plan.kernels if made.kind == "attention"]
        assert [made.inputs[0].shape[0] for made in attention] == [batch * HEADS] * BLOCKS
        assert not plan.is_partial
        assert any(plan.touches_io(made) for made in plan.kernels)
        assert "[profile" not in plan.to_json().decode()


def test_a_range_of_batches_is_partial() -> None:
    (plan,) = plans_from_messages(messages_of(batches=((1, 2),)), ["sm89"])
    assert plan.is_partial
    assert sum(made.kind == "attention" for made in plan.kernels) == BLOCKS


def test_a_plan_survives_its_json() -> None:
    plan = compiled()
    text = plan.to_json()
    assert CompiledPlan.from_json(text) == plan
    written = json.loads(text)["kernels"][1]
    assert {"kind", "block", "bytes_in", "bytes_constants", "bytes_out", "flops"} <= set(written)
    with pytest.raises(EngineError, match=f"schema version 99, not {SCHEMA_VERSION}"):
        CompiledPlan.from_json(replace(plan, schema_version=99).to_json())
    with pytest.raises(EngineError, match="cannot be read"):
        CompiledPlan.from_json(b"{}")


INSPECTED_11 = {
    "Layers": [
        {
            "Name": "_gemm_mha_v2_myl0_20",
            "LayerType": "kgen",
            "Inputs": [
                {"Name": name, "Location": "Device", "Dimensions": shape, "Strides": [1, 1, 1], "Datatype": "Half"}
                for name, shape in (("q", [10, 331, 16]), ("k", [10, 16, 331]), ("v", [10, 331, 16]))
            ],
            "Constants": [],
            "Outputs": [{"Name": "o", "Location": "Device", "Dimensions": [10, 331, 16], "Datatype": "Half"}],
            "TacticName": "_gemm_mha_v2_0x16",
            "StreamId": 0,
            "Metadata": "[ONNX Layer: transformer_blocks.0.attn1/Attention_1]\x1f[ONNX Layer: cast]",
        }
    ],
    "I/O Tensors": [{"Name": "latents", "IOMode": "Input", "DataType": "Float", "Dimensions": [1, 16]}],
}
INSPECTED_10: dict[str, Any] = {
    "Layers": [
        {
            "Name": "Reformatting CopyNode for Input KernelTensor 0 to conv",
            "LayerType": "Reformat",
            "Inputs": [{"Name": "x", "Dimensions": [1, 3, 8, 8], "Format/Datatype": "Row major linear FP32"}],
            "Outputs": [{"Name": "r", "Dimensions": [1, 3, 8, 8], "Format/Datatype": "Channel major FP16 format"}],
            "ParameterType": "Reformat",
            "TacticValue": "0x0000000000000000",
        }
    ],
    "Bindings": ["x", "y"],
}


def test_the_inspectors_json_gives_the_same_kernels() -> None:
    (plan,) = plans_from_inspector(json.dumps(INSPECTED_11))
    (attention,) = plan.kernels
    assert (attention.kind, attention.flops) == ("attention", 4 * 10 * 331 * 331 * 16)
    assert attention.layers == ("transformer_blocks.0.attn1/Attention_1", "cast")
    assert (plan.source, plan.io, plan.activation_bytes) == ("engine inspector", ("latents",), None)


def test_the_inspectors_older_json_is_read() -> None:
    (plan,) = plans_from_inspector(json.dumps(INSPECTED_10))
    (reformat,) = plan.kernels
    assert (reformat.kind, reformat.bytes_in, reformat.bytes_out) == ("copy", 768, 384)
    assert plan.touches_io(reformat)
    unknown = json.dumps(INSPECTED_10).replace("Row major linear FP32", "N/A due to dynamic shapes")
    assert plans_from_inspector(unknown)[0].kernels[0].bytes_in is None


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ("no JSON", "cannot be read"),
        ("{}", "cannot be read"),
        ('{"Layers": ["conv1"], "Bindings": []}', "no more than names"),
    ],
)
def test_an_inspector_that_tells_names_alone_is_an_error(told: str, words: str) -> None:
    with pytest.raises(EngineError, match=words):
        plans_from_inspector(told)


def test_the_report_has_a_row_for_each_block_and_says_it_is_an_estimate() -> None:
    plan = compiled()
    text = describe_plan(plan, gpu_named("rtx4090"))
    rows = [line.split()[0] for line in text.splitlines() if line.startswith(("transformer_blocks", "all "))]
    assert rows == ["transformer_blocks.0", "transformer_blocks.1", "all"]
    assert "an estimate from below, at RTX 4090's peaks and bandwidth" in text
    assert "compiled for sm89" not in text
    assert "the plan was compiled for sm89; A100 80GB is sm80" in describe_plan(plan, gpu_named("a100"))
    assert "estimate" not in describe_plan(plan)


def test_the_reports_values_are_plain_and_add_up() -> None:
    values = json.loads(json.dumps(plan_values(compiled(), gpu_named("4090"))))
    for sums in ("bytes", "kernels", "flops"):
        for kind, total in values["total"][sums].items():
            assert total == sum(block[sums].get(kind, 0) for block in values["blocks"])
    assert values["roofline"]["estimate"] is True
    assert values["roofline"]["seconds"] == pytest.approx(sum(block["seconds"] for block in values["blocks"]))


NAMES = st.text(string.ascii_letters + string.digits + "_./+ [](){}:,", min_size=1, max_size=30).map(str.strip)
# TensorRT puts names in without quoting them; only these words within one would mislead.
SAFE_NAMES = NAMES.filter(lambda name: name and not any(mark in name for mark in ("{", "}", "]", "[", ", ")))
TENSORS = st.builds(
    KernelTensor,
    SAFE_NAMES,
    st.lists(st.integers(-1, 99999), max_size=6).map(tuple),
    st.sampled_from(["bfloat16", "int8"]),
)
SIDES = st.lists(TENSORS, max_size=4).map(tuple)


def written(tensors: tuple[KernelTensor, ...]) -> str:
    words = {"bfloat16": "BFloat16", "int8": "Int8"}
    parts = [
        f"{{ Name: {tensor.name}, Dimensions: [{','.join(map(str, tensor.shape))}], Strides: [], StrideOrder: [], "
        f"Datatype: {words[tensor.dtype]}, Format: (Arbitrary) Format with stride order = [1,0] }}"
        for tensor in tensors
    ]
    return f"[ {', '.join(parts)}]" if parts else "[]"


@given(name=SAFE_NAMES, inputs=SIDES, constants=SIDES, outputs=SIDES, layers=st.lists(SAFE_NAMES, max_size=3))
def test_what_is_written_in_the_known_format_is_read_back(
    name: str,
    inputs: tuple[KernelTensor, ...],
    constants: tuple[KernelTensor, ...],
    outputs: tuple[KernelTensor, ...],
    layers: list[str],
) -> None:
    metadata = "\x1f".join(f"[ONNX Layer: {layer}]" for layer in layers)
    line = (
        f"Name: {name}, LayerType: kgen, Inputs: {written(inputs)}, Constants: {written(constants)}, Outputs: "
        f"{written(outputs)}, TacticName: t, StreamId: 3, Metadata: {metadata}"
    )
    assert plan_of(line).kernels == (Kernel(name, "kgen", "t", inputs, constants, outputs, tuple(layers), 3),)
