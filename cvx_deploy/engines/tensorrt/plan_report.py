"""A compiled plan for people and for programs: its blocks, what their kernels move, and a roofline of it."""

from collections.abc import Iterator, Sequence
from typing import Any

from cvx_deploy.engines.gpus import GpuModel
from cvx_deploy.engines.tensorrt.compiled_plan import CompiledPlan
from cvx_deploy.engines.tensorrt.kernels import KINDS, Kernel, Kind
from cvx_deploy.engines.tensorrt.roofline import Roofline, roofline
from cvx_deploy.measure.units import size_text, time_text

_OUTSIDE = "outside of blocks"


def describe_plan(plan: CompiledPlan, gpu: GpuModel | None = None) -> str:
    """Return a plan as text: totals, a table of its blocks, and with `gpu` a roofline, which is an estimate."""
    values = plan_values(plan, gpu)
    targets = f", for {', '.join(plan.targets)}" if plan.targets else ""
    lines = [f"{len(plan.kernels)} kernels{targets}, from the {plan.source}"]
    memory = {"activations": plan.activation_bytes, "weights": plan.weights_bytes}
    known = [f"{size_text(size)} of {name}" for name, size in memory.items() if size is not None]
    if known:
        lines.append(f"device memory: {' and '.join(known)}")
    lines += ["", *_table(values)]
    if plan.is_partial:
        count = sum(kernel.traffic is None for kernel in plan.kernels)
        lines.append(
            f"partial: the sizes of {count} kernels are chosen at run time, and they are left out of every sum"
        )
    if gpu is not None:
        lines += ["", *_estimate(plan, gpu, values["roofline"])]
    return "\n".join(lines)


def plan_values(plan: CompiledPlan, gpu: GpuModel | None = None) -> dict[str, Any]:
    """Return the same as plain values: bytes, FLOPs and seconds, by block and by kind.

    Raises:
        EngineError: The plan multiplies in a type that `gpu` has no units for.
    """
    priced = roofline(plan, gpu) if gpu else None
    blocks = []
    for block in plan.block_order:
        kernels = [kernel for kernel, its in zip(plan.kernels, plan.blocks, strict=True) if its == block]
        times = {"seconds": priced.by_block[block], "kernels_left_out": priced.unpriced.get(block, 0)} if priced else {}
        blocks.append({"block": block, **_sums(kernels), **times})
    return {
        "source": plan.source,
        "targets": plan.targets,
        "profile": plan.profile,
        "activation_bytes": plan.activation_bytes,
        "weights_bytes": plan.weights_bytes,
        "partial": plan.is_partial,
        "total": _sums(plan.kernels),
        "blocks": blocks,
        "roofline": _roofline_values(priced) if priced else None,
    }


def _sums(kernels: Sequence[Kernel]) -> dict[str, Any]:
    """Return by kind the number of kernels, what those of known size move and compute, and how many have no size."""
    by_kind: dict[Kind, list[Kernel]] = {}
    for kind in KINDS:
        if same := [kernel for kernel in kernels if kernel.kind == kind]:
            by_kind[kind] = same
    return {
        "kernels": {kind: len(same) for kind, same in by_kind.items()},
        "bytes": {kind: sum(kernel.traffic or 0 for kernel in same) for kind, same in by_kind.items()},
        "flops": {
            kind: sum(kernel.flops or 0 for kernel in same) for kind, same in by_kind.items() if same[0].computes
        },
        "unsized": {kind: sum(kernel.traffic is None for kernel in same) for kind, same in by_kind.items()},
    }


def _roofline_values(priced: Roofline) -> dict[str, Any]:
    return {
        "gpu": priced.gpu.name,
        "estimate": True,
        "seconds": priced.seconds,
        "seconds_by_kind": priced.by_kind,
        "kernels_left_out": sum(priced.unpriced.values()),
    }


def _table(values: dict[str, Any]) -> Iterator[str]:
    """Yield one row a block: kernels, bytes read and written by each kind, and milliseconds if priced."""
    kinds = [kind for kind in KINDS if kind != "control" and kind in values["total"]["kernels"]]
    priced = values["roofline"] is not None
    total = {"block": "all", **values["total"], **(values["roofline"] or {})}
    rows = [["block", "kernels", *kinds, "all bytes", *["at least"] * priced]]
    for block in (*values["blocks"], total):
        time = [_time(block)] if priced else []
        count = str(sum(block["kernels"].values()))
        rows.append(
            [block["block"] or _OUTSIDE, count, *(_moved(block, [kind]) for kind in kinds), _moved(block), *time]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        yield "  ".join(
            [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))]
        )


def _moved(sums: dict[str, Any], kinds: Sequence[Kind] = KINDS) -> str:
    """Return what kernels of some kinds move: "-" for none of them, "?" if no size is known, ">" if some are not."""
    kernels, moved, unsized = (sum(sums[key].get(kind, 0) for kind in kinds) for key in ("kernels", "bytes", "unsized"))
    if not kernels:
        return "-"
    if unsized == kernels:
        return "?"
    return f"{'>' if unsized else ''}{size_text(moved)}"


def _time(sums: dict[str, Any]) -> str:
    left_out = sums["kernels_left_out"]
    return "?" if left_out and not sums["seconds"] else f"{'>' if left_out else ''}{time_text(sums['seconds'])}"


def _estimate(plan: CompiledPlan, gpu: GpuModel, priced: dict[str, Any]) -> Iterator[str]:
    parts = ", ".join(f"{kind} {time_text(time)}" for kind, time in priced["seconds_by_kind"].items() if time)
    yield f"an estimate from below, at {gpu.name}'s peaks and bandwidth: {time_text(priced['seconds'])} ({parts})"
    if priced["kernels_left_out"]:
        yield f"it leaves out {priced['kernels_left_out']} kernels whose sizes or arithmetic are not known"
    if plan.targets and gpu.compute_capability not in plan.targets:
        yield f"the plan was compiled for {', '.join(plan.targets)}; {gpu.name} is {gpu.compute_capability}"
