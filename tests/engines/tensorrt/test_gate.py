"""The fusion gate passes what TensorRT fuses, and says of the rest which kernels it became."""

from dataclasses import replace
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from cvx_deploy.engines.tensorrt.compiled_plan import CompiledPlan
from cvx_deploy.engines.tensorrt.gate import Findings, NetworkFacts, facts_from_graph, judge
from cvx_deploy.engines.tensorrt.kernels import Kernel, KernelTensor
from cvx_deploy.families.cogvideox.family import COGVIDEOX
from tests.engines.tensorrt.compiled import BLOCKS, TOKENS, compiled, facts

NODE = "model.transformer_blocks.0.attn1/Attention_1"


def facts_of(role: str) -> NetworkFacts:
    return NetworkFacts(role, COGVIDEOX.expectation(role), "bf16", (NODE,), (331,), (), (80,))


FACTS = facts_of("transformer")


def tensor(name: str, *shape: int, dtype: str = "bfloat16") -> KernelTensor:
    return KernelTensor(name, shape, dtype)


QKV = (tensor("q", 10, 331, 16), tensor("k", 10, 16, 331), tensor("v", 10, 331, 16))
FUSED = Kernel("_gemm_mha_v2_myl0_20", "kgen", "", QKV, (), (tensor("o", 10, 331, 16),), (NODE,))


def kernel(
    name: str,
    *,
    kind: str = "kgen",
    inputs: tuple[KernelTensor, ...] = (),
    constants: tuple[KernelTensor, ...] = (),
    outputs: tuple[KernelTensor, ...] = (),
) -> Kernel:
    return Kernel(name, kind, "", inputs, constants, outputs, ())


def plan(*kernels: Kernel) -> CompiledPlan:
    return CompiledPlan(1, "build messages", ("sm89",), 0, ("x", "y"), kernels, None, None)


def rules(findings: Findings, severity: str = "failure") -> set[str]:
    return {finding.rule for finding in findings.found if finding.severity == severity}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("attention", ["whole", "decomposed"])
def test_attention_compiles_to_one_kernel_a_block(precision: Any, attention: Any) -> None:
    findings = judge(compiled(precision, attention), facts(precision, attention))
    assert findings.ok, str(findings)
    assert findings.fused_attentions == findings.attentions == BLOCKS
    assert "transformer_blocks.1: attention is one kernel" in findings.fused[1]


def test_a_running_sum_before_the_softmax_fails_both_rules_in_every_block() -> None:
    findings = judge(compiled(attention="broken"), facts(attention="broken"))
    assert rules(findings) == {"attention", "scores"}
    assert findings.fused_attentions == 0
    assert {finding.block for finding in findings.failures} == {f"transformer_blocks.{i}" for i in range(BLOCKS)}
    assert f"{TOKENS} x {TOKENS} scores" in str(findings)
    assert all(finding.bytes for finding in findings.failures)


def test_float32_attention_in_pieces_is_noted_and_fails_a_half_network() -> None:
    pieces, its_facts = compiled("fp32", "decomposed"), facts("fp32", "decomposed")
    in_float32 = judge(pieces, its_facts)
    assert in_float32.ok
    assert rules(in_float32, "note") >= {"attention", "scores"}
    in_half = judge(pieces, replace(its_facts, precision="bf16"))
    assert rules(in_half) == {"attention", "scores", "float32"}


def test_attention_with_a_constant_bias_is_one_kernel() -> None:
    findings = judge(compiled(attention="biased"), facts(attention="biased"))
    assert findings.ok, str(findings)
    assert findings.fused_attentions == BLOCKS


def test_the_text_encoders_attention_in_pieces_is_noted() -> None:
    findings = judge(compiled(attention="broken"), facts(attention="broken", role="text_encoder"))
    assert findings.ok
    assert rules(findings, "note") >= {"attention", "scores"}
    assert f"0 of {BLOCKS} attentions" in str(findings)


def test_the_text_encoder_may_compute_its_feed_forward_output_in_float32_alone() -> None:
    x = tensor("a", 452, 80, dtype="float32")
    gemm = kernel("wo", kind="gemm", inputs=(x,), constants=(tensor("w", 80, 80, dtype="float32"),), outputs=(x,))
    text = replace(facts_of("text_encoder"), precision="fp16")
    allowed = replace(gemm, layers=("block.0.layer.1.DenseReluDense.wo/MatMul_148",))
    assert judge(plan(FUSED, allowed), text).ok
    assert rules(judge(plan(FUSED, allowed), FACTS)) == {"float32"}
    assert rules(judge(plan(FUSED, replace(gemm, layers=("block.0.layer.1.DenseReluDense.wi_0/MatMul_1",))), text)) == {
        "float32"
    }


@pytest.mark.parametrize(("kind", "dtype"), [("int8", "int8"), ("fp8", "float8")])
def test_quantized_linears_run_in_their_type(kind: str, dtype: str) -> None:
    its_facts = facts(quantized=kind)
    findings = judge(compiled(quantized=kind), its_facts)
    assert findings.ok, str(findings)
    assert len(its_facts.quantized) == 6 * BLOCKS
    assert f"12 of 12 quantized layers run in {dtype}" in str(findings)


def test_quantized_linears_compiled_in_a_wide_type_fail() -> None:
    findings = judge(compiled(), facts(quantized="int8"))
    assert rules(findings) == {"quantized"}
    assert len(findings.failures) == 6 * BLOCKS


def test_a_quantized_linear_without_a_kernel_fails() -> None:
    findings = judge(plan(FUSED), replace(FACTS, quantized=("to_q/MatMul_1",)))
    assert "no gemm or convolution stands for it" in str(findings)


def test_two_kernels_for_one_attention_fail() -> None:
    findings = judge(plan(FUSED, replace(FUSED, name="_gemm_mha_v2_myl0_21")), FACTS)
    assert rules(findings) == {"attention"}


def test_an_attention_kernel_of_no_node_fails() -> None:
    assert rules(judge(plan(FUSED, replace(FUSED, layers=("other",))), FACTS)) == {"attention"}


def test_a_transformer_without_attention_fails_and_a_vae_does_not() -> None:
    none = replace(FACTS, attentions=(), tokens=())
    assert rules(judge(plan(), none)) == {"attention"}
    assert judge(plan(), replace(none, expectation=COGVIDEOX.expectation("vae_decoder_first"))).ok


def test_an_unknown_sequence_length_fails_instead_of_skipping_the_rule() -> None:
    assert rules(judge(plan(FUSED), replace(FACTS, tokens=()))) == {"scores"}


def test_scores_merged_with_batch_and_heads_are_found() -> None:
    merged = kernel("__myl_Exp_myl0_1", outputs=(tensor("s", 3310, 331),))
    assert rules(judge(plan(FUSED, merged), FACTS)) == {"scores"}


def test_a_width_that_looks_like_the_sequence_turns_the_rule_into_a_note() -> None:
    square = kernel("__myl_Exp_myl0_1", outputs=(tensor("s", 2, 331, 662),))
    findings = judge(plan(FUSED, square), replace(FACTS, widths=(662,)))
    assert findings.ok
    assert rules(findings, "note") == {"scores"}


def test_a_float32_gemm_fails_and_float32_statistics_are_noted_with_their_traffic() -> None:
    x, y = (tensor(name, 662, 80, dtype="float32") for name in "ab")
    gemm = kernel("to_q", kind="gemm", inputs=(x,), constants=(tensor("w", 80, 80, dtype="float32"),), outputs=(y,))
    assert rules(judge(plan(FUSED, gemm), FACTS)) == {"float32"}
    mean = kernel("__myl_CastMean_myl0_2", inputs=(tensor("h", 662, 80),), outputs=(y,))
    findings = judge(plan(FUSED, mean), FACTS)
    assert findings.ok
    assert [note.bytes for note in findings.notes] == [662 * 80 * (2 + 4)]


@pytest.mark.parametrize(("name", "kind"), [("__myl_Cast_myl0_3", "kgen"), ("Reformatting CopyNode", "Reformat")])
def test_a_cast_or_reformat_inside_fails_and_at_the_ends_is_right(name: str, kind: str) -> None:
    half, full = tensor("h", 2, 4), tensor("f", 2, 4, dtype="float32")
    inside = kernel(name, kind=kind, inputs=(full,), outputs=(half,))
    assert rules(judge(plan(FUSED, inside), FACTS)) == {"reformat"}
    assert judge(plan(FUSED, replace(inside, inputs=(replace(full, name="x"),))), FACTS).ok


def test_transposes_of_the_graph_are_noted() -> None:
    moved = kernel("__myl_TranReshMove_myl0_17", inputs=(tensor("a", 2, 4),), outputs=(tensor("b", 4, 2),))
    findings = judge(plan(FUSED, moved), FACTS)
    assert findings.ok
    assert rules(findings, "note") == {"reformat"}
    assert findings.as_dict()["ok"] is True


def test_facts_of_a_graph_are_its_attentions_lengths_widths_and_quantized_nodes() -> None:
    its_facts = facts("bf16", "decomposed", "int8")
    assert its_facts.attentions == tuple(f"model.transformer_blocks.{i}.attn1/Softmax" for i in range(BLOCKS))
    assert its_facts.tokens == (TOKENS,)
    assert its_facts.widths == (64, 256)
    assert its_facts.expectation.attention == "fused"


def test_a_linear_with_a_dequantized_weight_alone_is_not_expected_to_run_quantized() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], name="dequantize"),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="linear"),
    ]
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])
    graph: onnx.GraphProto = helper.make_graph(nodes, "g", [value], [])
    assert facts_from_graph(graph, "vae_encoder", COGVIDEOX.expectation("vae_encoder"), "bf16").quantized == ()
