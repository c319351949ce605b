"""A transformer of two blocks in ONNX, and what TensorRT for RTX compiles it to on the CPU."""

from functools import cache
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from cvx_deploy.engines.tensorrt.compiled_plan import CompiledPlan, plans_from_messages
from cvx_deploy.engines.tensorrt.gate import NetworkFacts, facts_from_graph
from cvx_deploy.families.cogvideox.family import COGVIDEOX
from cvx_deploy.precision import Precision

# Attention as one node, in pieces, in pieces with a bias, and with a running sum that no fused kernel has.
Attention = Literal["whole", "decomposed", "biased", "broken"]
BATCH, TOKENS, WIDTH, HEADS, BLOCKS = 2, 96, 64, 2, 2
_TYPES: dict[Precision, tuple[int, Any]] = {
    "fp32": (TensorProto.FLOAT, np.float32),
    "fp16": (TensorProto.FLOAT16, np.float16),
    "bf16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
}
_QUANTIZED = {"int8": (TensorProto.INT8, np.int8), "fp8": (TensorProto.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn)}


class Net:
    """Builds the graph node by node; every node and its output have one name."""

    def __init__(self, precision: Precision, attention: Attention, quantized: str | None) -> None:
        self.type, self.numpy_type = _TYPES[precision]
        self.attention = attention
        self.quantized = quantized
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.random = np.random.RandomState(0)

    def node(self, op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def weight(self, name: str, value: Any, kind: tuple[int, Any] | None = None) -> str:
        dtype, numpy_type = kind or (self.type, self.numpy_type)
        array = np.asarray(value).astype(numpy_type)
        self.weights.append(helper.make_tensor(name, dtype, array.shape, array.tobytes(), raw=True))
        return name

    def linear(self, x: str, name: str, wide_in: int, wide_out: int) -> str:
        value = self.random.randn(wide_in, wide_out) * 0.1
        if self.quantized:
            kind = _QUANTIZED[self.quantized]
            scale, zero = self.weight(f"{name}.scale", 0.05), self.weight(f"{name}.zero", 0, kind)
            x = self.node("QuantizeLinear", [x, scale, zero], f"{name}/QuantizeLinear_x")
            x = self.node("DequantizeLinear", [x, scale, zero], f"{name}/DequantizeLinear_x")
            stored = self.weight(f"{name}.weight", value * 20, kind)
            weight = self.node("DequantizeLinear", [stored, scale, zero], f"{name}/DequantizeLinear_w")
        else:
            weight = self.weight(f"{name}.weight", value)
        y = self.node("MatMul", [x, weight], f"{name}/MatMul")
        return self.node("Add", [y, self.weight(f"{name}.bias", np.ones(wide_out))], f"{name}/Add")

    def head(self, x: str, name: str) -> str:
        x = self.node("Reshape", [self.linear(x, name, WIDTH, WIDTH), "heads"], f"{name}/Reshape")
        return self.node("Transpose", [x], f"{name}/Transpose", perm=[0, 2, 1, 3])

    def attend(self, q: str, k: str, v: str, at: str) -> str:
        scale = (WIDTH // HEADS) ** -0.5
        if self.attention == "whole":
            return self.node("Attention", [q, k, v], f"{at}/Attention", scale=scale)
        k = self.node("Transpose", [k], f"{at}/Transpose_kt", perm=[0, 1, 3, 2])
        x = self.node("MatMul", [q, k], f"{at}/MatMul_scores")
        x = self.node("Mul", [x, self.weight(f"{at}.scale", scale)], f"{at}/Mul")
        if self.attention == "biased":
            bias = self.weight(f"{at}.bias", self.random.randn(1, HEADS, TOKENS, TOKENS))
            x = self.node("Add", [x, bias], f"{at}/Add_bias")
        if self.attention == "broken":
            x = self.node("CumSum", [x, self.weight(f"{at}.axis", -1, (TensorProto.INT64, np.int64))], f"{at}/CumSum")
        x = self.node("Softmax", [x], f"{at}/Softmax", axis=-1)
        return self.node("MatMul", [x, v], f"{at}/MatMul_v")

    def block(self, x: str, at: str) -> str:
        ones = self.weight(f"{at}.norm1.weight", np.ones(WIDTH))
        y = self.node("LayerNormalization", [x, ones], f"{at}.norm1/LayerNormalization")
        q, k, v = (self.head(y, f"{at}.attn1.to_{part}") for part in "qkv")
        y = self.attend(q, k, v, f"{at}.attn1")
        y = self.node("Transpose", [y], f"{at}.attn1/Transpose_out", perm=[0, 2, 1, 3])
        y = self.linear(
            self.node("Reshape", [y, "flat"], f"{at}.attn1/Reshape_out"), f"{at}.attn1.to_out.0", WIDTH, WIDTH
        )
        x = self.node("Add", [x, y], f"{at}/Add_attention")
        y = self.node("Gelu", [self.linear(x, f"{at}.ff.net.0.proj", WIDTH, 4 * WIDTH)], f"{at}.ff/Gelu")
        return self.node("Add", [x, self.linear(y, f"{at}.ff.net.2", 4 * WIDTH, WIDTH)], f"{at}/Add_ff")

    def model(self, batch: int | str) -> onnx.ModelProto:
        integers = (TensorProto.INT64, np.int64)
        self.weight("heads", [0, 0, HEADS, WIDTH // HEADS], integers)
        self.weight("flat", [0, 0, WIDTH], integers)
        x = self.node("Cast", ["x"], "/Cast_in", to=self.type)
        for block in range(BLOCKS):
            x = self.block(x, f"model.transformer_blocks.{block}")
        self.node("Cast", [x], "y", to=TensorProto.FLOAT)
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, TOKENS, WIDTH]) for name in "xy"]
        graph = helper.make_graph(self.nodes, "two_blocks", ends[:1], ends[1:], self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
        return onnx.shape_inference.infer_shapes(model)


@cache
def two_blocks(
    precision: Precision = "bf16",
    attention: Attention = "whole",
    quantized: str | None = None,
    batch: int | str = BATCH,
) -> onnx.ModelProto:
    return Net(precision, attention, quantized).model(batch)


def facts(
    precision: Precision = "bf16",
    attention: Attention = "whole",
    quantized: str | None = None,
    role: str = "transformer",
) -> NetworkFacts:
    return facts_from_graph(
        two_blocks(precision, attention, quantized).graph, role, COGVIDEOX.expectation(role), precision
    )


@cache
def messages_of(
    precision: Precision = "bf16",
    attention: Attention = "whole",
    quantized: str | None = None,
    batches: tuple[tuple[int, int], ...] = (),
) -> tuple[str, ...]:
    """Compile it for SM89 and return what the builder said; each of `batches` is a profile's least and most."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx compiles the networks of this test")

    class Messages(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.texts: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            self.texts.append(message)

    logger = Messages()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    model = two_blocks(precision, attention, quantized, "batch" if batches else BATCH)
    assert parser.parse(model.SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    for least, most in batches:
        profile = builder.create_optimization_profile()
        profile.set_shape("x", *((batch, TOKENS, WIDTH) for batch in (least, most, most)))
        config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None
    return tuple(logger.texts)


def compiled(
    precision: Precision = "bf16", attention: Attention = "whole", quantized: str | None = None
) -> CompiledPlan:
    return plans_from_messages(messages_of(precision, attention, quantized), ["sm89"])[0]
