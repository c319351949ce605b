"""What the CPU of this machine is, as Linux tells it."""

import functools
import platform
from pathlib import Path

_INSTRUCTIONS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
"""What an x86 CPU may have or not, and the products of matrices depend on."""


def cpu_name() -> str:
    """Return what the CPU calls itself; the architecture where it does not say."""
    return _told("model name") or platform.processor() or platform.machine()


def instructions() -> list[str]:
    """Return which of the instructions for products of matrices an x86 CPU has; none where nothing is known."""
    told = _told("flags").split()
    return [name for name in _INSTRUCTIONS if name in told]


def overflows_in_int8() -> bool:
    """Tell whether 8-bit products may overflow: on x86 without VNNI two of them are added up in 16 bits, and clipped.

    Source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html, "When and why do I
    need to try U8U8?".
    """
    known = instructions()
    return "avx2" in known and not {"avx_vnni", "avx512_vnni"} & set(known)


@functools.cache
def _told(what: str) -> str:
    """Return what Linux says of the first core, empty where it says nothing."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
    said = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in said if name.strip() == what), "")
