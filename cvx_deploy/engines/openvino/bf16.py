"""Whether bf16 pays on this CPU: how fast OpenVINO multiplies in it, against fp32.

Instructions do not tell. A CPU with AMX was three times as fast in bf16; an Intel one with AVX512-BF16 alone was
slower in it than in fp32.
"""

import statistics
import time
from contextlib import suppress
from typing import Any

import numpy as np

from cvx_deploy.kept import Kept
from cvx_deploy.measure.cpu import cpu_name, instructions

_KEPT = Kept("probes", "bf16.json")
_ROWS, _WIDTH = 512, 3072  # a product of a 5b's block
_ROUNDS = 5  # after one that does not count


def bf16_speedup() -> float:
    """Return the time of a product in fp32 over that in bf16, measured once and remembered; 0 where bf16 cannot run."""
    try:
        import openvino

        from cvx_deploy.engines.openvino.backend import precisions
    except ImportError:
        return 0.0
    if "bf16" not in precisions():
        return 0.0
    key = "|".join([cpu_name(), *instructions(), openvino.__version__])
    with suppress(ValueError):
        if 0 < (kept := float(_KEPT.get(key) or "")) < float("inf"):
            return kept
    found = _measured()
    _KEPT.put(key, str(found))
    return found


def _measured() -> float:
    """Return the median ratio over interleaved rounds, to a hundredth."""
    runs = [_product(hint) for hint in ("f32", "bf16")]
    rounds = [[_seconds(run) for run in runs] for _ in range(1 + _ROUNDS)]
    return round(statistics.median(fp32 / bf16 for fp32, bf16 in rounds[1:]), 2)


def _product(hint: str) -> Any:
    import openvino
    from openvino import opset13 as ops

    weights = np.random.default_rng(0).standard_normal((_WIDTH, _WIDTH), dtype=np.float32)
    given = ops.parameter([_ROWS, _WIDTH], openvino.Type.f32)
    model = openvino.Model([ops.matmul(given, ops.constant(weights), False, True)], [given], "product")
    request = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint}).create_infer_request()
    request.set_input_tensor(openvino.Tensor(np.ones((_ROWS, _WIDTH), np.float32)))
    return request


def _seconds(request: Any) -> float:
    start = time.perf_counter()
    request.infer()
    return time.perf_counter() - start
