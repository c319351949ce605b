"""Which precision to export with for a machine: what ``cvx-deploy export --for`` takes."""

from dataclasses import dataclass
from typing import Final

from cvx_deploy.engines.gpus import GPUS, GpuModel, gpu_named
from cvx_deploy.engines.openvino.bf16 import bf16_speedup
from cvx_deploy.errors import EngineError
from cvx_deploy.estimate.estimate import plan
from cvx_deploy.families.cogvideox.models import Model
from cvx_deploy.measure.cpu import cpu_name
from cvx_deploy.measure.units import size_text
from cvx_deploy.shape import Shape

CPU: Final = "cpu"
_WORTH = 1.1  # times as fast, from which on bf16 is worth its rounding


@dataclass(frozen=True)
class TargetPrecision:
    """A precision, as ``--precision`` takes it, and why it is this one."""

    precision: str
    why: str

    def __str__(self) -> str:
        return f"--precision {self.precision}: {self.why}"


def precision_for(target: str, model: Model | None, shape: Shape | None, *, calibrated: bool) -> TargetPrecision:
    """Choose a precision for a target.

    Args:
        target: ``cpu`` for the one of this machine, or a GPU such as ``rtx4090``.
        model: The published model; None for one of unknown size, which is taken to fit.
        shape: The largest video that is to be made; None for the model's own.
        calibrated: Whether there is a table for schemes that quantize activations.

    Raises:
        EngineError: No GPU of that name is known; the model does not fit into its memory in any precision.
        ShapeError: The model cannot do the shape.
    """
    if target.strip().lower() == CPU:
        return _for_cpu(calibrated=calibrated)
    try:
        gpu = gpu_named(target)
    except EngineError as error:
        raise EngineError(error.what, fix=f"{error.fix}, or {CPU} for this machine's") from error
    return _for_gpu(gpu, model, shape, calibrated=calibrated)


def _for_cpu(*, calibrated: bool) -> TargetPrecision:
    gain = bf16_speedup()
    eight = "products of 8 bits are the fastest on a CPU"
    if gain >= _WORTH:
        return TargetPrecision(
            "transformer=bf16,text_encoder=int8wo/bf16,vae=bf16",
            f"here OpenVINO is {gain:.2g} times as fast in bf16 as in fp32; the text encoder's weights in 8 bits",
        )
    slow = (
        f"bf16 would take {1 / gain:.2g} times as long as fp32 on {cpu_name()}" if gain else f"{cpu_name()} has no bf16"
    )
    if calibrated:
        return TargetPrecision("int8/fp32", f"{slow}; with a table of activations, {eight}")
    return TargetPrecision(
        "int8wo/fp32", f"{slow}; weights of 8 bits take half the memory, and --calibration would make it faster"
    )


def _for_gpu(gpu: GpuModel, model: Model | None, shape: Shape | None, *, calibrated: bool) -> TargetPrecision:
    native = "fp16" if gpu.bfloat16 is None or (model is not None and model.dtype == "float16") else "bf16"
    eight = ("fp8" if gpu.float8 is not None else "int8") if calibrated else None
    reasons = {
        "fp8": f"{gpu.name} multiplies fp8, and there is a table of activations",
        "int8": f"{gpu.name} has no fp8, and there is a table of activations",
        native: f"what {gpu.name} multiplies fast, nearest to what the model was published in",
        "int8wo": "with weights of 16 bits it would not fit",
        "int4wo": "with weights of 8 bits it would not fit",
    }
    wanted = [name for name in (eight, native, "int8wo", "int4wo") if name is not None]
    if model is None:
        return TargetPrecision(_typed(wanted[0], native), reasons[wanted[0]])
    fit = {option.precision: option for option in plan(model, shape or _usual(model), gpu=gpu).options}
    for name in wanted:
        residency = fit[name].residency(gpu.memory)  # type: ignore[index]
        if residency is not None:
            return TargetPrecision(
                _typed(name, native), f"{reasons[name]}; it fits into {size_text(gpu.memory)}, {residency}"
            )
    raise EngineError(
        f"{model.name} at {shape or _usual(model)} does not fit into the {size_text(gpu.memory)} of {gpu.name}",
        fix="export at a smaller --shape; cvx-deploy plan tells what each takes, "
        f"or for a larger GPU, such as {max(GPUS, key=lambda each: each.memory).name}",
    )


def _typed(name: str, native: str) -> str:
    return name if name == native else f"{name}/{native}"


def _usual(model: Model) -> Shape:
    return Shape(model.frames, model.height, model.width)
