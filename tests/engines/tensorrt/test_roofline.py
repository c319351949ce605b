"""The roofline takes the longer of arithmetic and traffic, and leaves out what it cannot know."""

from dataclasses import replace

import pytest

from cvx_deploy.engines.gpus import GpuModel, gpu_named
from cvx_deploy.engines.tensorrt.compiled_plan import CompiledPlan
from cvx_deploy.engines.tensorrt.kernels import Kernel, KernelTensor
from cvx_deploy.engines.tensorrt.roofline import roofline
from cvx_deploy.errors import EngineError
from tests.engines.tensorrt.compiled import compiled

# A terabyte and a teraflop a second: bytes and FLOPs are picoseconds.
PLAIN = GpuModel("plain", "sm89", 1, 1e12, float16=1, bfloat16=1, int8=2, float8=None, float32=0.5)


def gemm(rows: int, dtype: str = "bfloat16", block: int = 0) -> Kernel:
    made = [KernelTensor(name, shape, dtype) for name, shape in (("x", (rows, 64)), ("w", (64, 64)), ("y", (rows, 64)))]
    layers = (f"transformer_blocks.{block}.to_q/MatMul_1",)
    return Kernel("to_q_myl0_1", "gemm", "", (made[0],), (made[1],), (made[2],), layers)


def plan(*kernels: Kernel) -> CompiledPlan:
    return CompiledPlan(1, "build messages", (), 0, (), kernels, None, None)


def test_a_tall_gemm_waits_for_arithmetic_and_a_short_one_for_its_weights() -> None:
    tall, short = roofline(plan(gemm(1024), gemm(1)), PLAIN).kernels
    assert (tall.bound, short.bound) == ("arithmetic", "bandwidth")
    assert tall.seconds == pytest.approx(2 * 1024 * 64 * 64 * 1e-12)
    assert short.seconds == pytest.approx((64 + 64 * 64 + 64) * 2 * 1e-12)


def test_arithmetic_runs_at_the_peak_of_its_type() -> None:
    half, narrow = (roofline(plan(gemm(1024, dtype)), PLAIN).seconds for dtype in ("bfloat16", "int8"))
    assert narrow == pytest.approx(half / 2)


def test_sums_are_by_kind_and_by_block() -> None:
    norm = Kernel("__myl_MeanSub_myl0_2", "kgen", "", (KernelTensor("h", (500,), "float32"),), (), (), ())
    priced = roofline(plan(gemm(1024, block=0), norm, gemm(1024, block=1)), PLAIN)
    one = 2 * 1024 * 64 * 64 * 1e-12
    assert priced.by_kind == pytest.approx({"gemm": 2 * one, "elementwise": 2e-9})
    assert priced.by_block == pytest.approx({"transformer_blocks.0": one + 2e-9, "transformer_blocks.1": one})
    assert priced.seconds == pytest.approx(2 * one + 2e-9)
    assert not priced.unpriced


def test_what_is_not_known_is_left_out_and_counted() -> None:
    dynamic = replace(gemm(1), inputs=(KernelTensor("x", (-1, 64), "bfloat16"),))
    strange = replace(gemm(1), constants=(KernelTensor("w", (7, 9), "bfloat16"),))
    priced = roofline(plan(dynamic, strange, gemm(1)), PLAIN)
    assert [kernel.seconds is None for kernel in priced.kernels] == [True, True, False]
    assert priced.unpriced == {"transformer_blocks.0": 2}


def test_a_type_the_gpu_has_no_units_for_is_an_error() -> None:
    with pytest.raises(EngineError, match="plain has no units for float8, which to_q_myl0_1 multiplies"):
        roofline(plan(gemm(8, "float8")), PLAIN)
    with pytest.raises(EngineError, match="T4 has no units for bfloat16"):
        roofline(plan(gemm(8)), gpu_named("t4"))


def test_a_faster_gpu_bounds_a_compiled_network_lower() -> None:
    slow, fast = (roofline(compiled(), gpu_named(name)) for name in ("4060 ti", "5090"))
    assert 0 < fast.seconds < slow.seconds
    assert set(fast.by_kind) >= {"gemm", "attention", "elementwise"}
