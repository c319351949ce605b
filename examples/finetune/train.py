"""Fine-tune a CogVideoX transformer on what prepare.py cached: LoRA by PEFT, or all of its weights.

    accelerate launch examples/finetune/train.py --checkpoint DIR --cache CACHE --output RUN [--method lora|full] ...

Stop it at any time: the same command goes on from the last saved step, to the bit. `RUN/adapter` is what
``cvx-deploy export --lora`` reads, `RUN/transformer` what ``--transformer`` does. With ``--distil-guidance G`` a LoRA
learns what its own checkpoint makes at guidance G, to be run at guidance 1: half the work.
"""

import argparse
import math
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from dataset import exit_with
from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from diffusers.training_utils import EMAModel
from objective import Objective, Prepared
from peft import LoraConfig
from state import Run, Training
from torch import Tensor
from validate import Validation, validate

from cvx_deploy.errors import CheckpointError, CvxError, MediaError
from cvx_deploy.reading import reading

_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
_REPORT = 25


class TrainingError(CvxError):
    """Training that cannot go on."""


def transformer_of(checkpoint: Path, dtype: torch.dtype) -> CogVideoXTransformer3DModel:
    """Load a checkpoint's transformer.

    Raises:
        CheckpointError: It cannot be loaded.
    """
    fix = "name a folder in diffusers layout; hf download makes one of a repository"
    if not (checkpoint / "transformer").is_dir():
        raise CheckpointError(f"there is no transformer in {checkpoint}", fix=fix)
    with reading(checkpoint / "transformer", CheckpointError, fix=fix):
        transformer: CogVideoXTransformer3DModel = CogVideoXTransformer3DModel.from_pretrained(
            checkpoint, subfolder="transformer", torch_dtype=dtype, local_files_only=True
        )
        return transformer


def make_trainable(transformer: CogVideoXTransformer3DModel, how: Training) -> list[torch.nn.Parameter]:
    """Freeze what is not trained, and return what is, in float32."""
    transformer.requires_grad_(how.method == "full")
    if how.method == "lora":
        torch.manual_seed(how.seed)
        transformer.add_adapter(LoraConfig(r=how.rank, lora_alpha=how.rank, target_modules=list(_LAYERS)))
    if how.checkpointing:
        transformer.enable_gradient_checkpointing()
    trained = [p for p in transformer.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    return trained


def new_optimizer(parameters: list[torch.nn.Parameter], how: Training) -> torch.optim.Optimizer:
    """Return AdamW over the trained parameters, with its state in 8 bits if asked for."""
    shared: dict[str, Any] = {"lr": how.learning_rate, "betas": (0.9, 0.99), "weight_decay": 1e-2}
    if how.eight_bit:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **shared)
    # Fused, it needs no memory of its own: AdamW as it is by default takes 4 bytes a parameter more on a GPU.
    return torch.optim.AdamW(parameters, fused=True, **shared)


def train(
    checkpoint: Path,
    cache: Path,
    output: Path,
    how: Training,
    validation: Validation | None = None,
    load: Callable[[Path, torch.dtype], CogVideoXTransformer3DModel] = transformer_of,
) -> Run:
    """Train until the steps are done; goes on from a saved state.

    Raises:
        CacheError: The cache cannot be read, or is of another model than the checkpoint.
        CheckpointError: The checkpoint cannot be read.
        TrainingError: The loss is no number any more.
    """
    # While the first process validates, the others wait.
    waiting = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    accelerator = Accelerator(mixed_precision=how.precision, kwargs_handlers=[waiting])
    prepared = Prepared(cache)
    frozen = how.method == "lora" and how.precision == "bf16"
    transformer = load(checkpoint, torch.bfloat16 if frozen else torch.float32)
    prepared.check_fits(checkpoint, transformer.config)
    if validation is not None and prepared.task == "image-to-video" and validation.image is None:
        raise MediaError("validation videos of this model begin with an image", fix="name one with --image")
    run = _begun(transformer.to(accelerator.device), output, how, accelerator)
    student, optimizer = accelerator.prepare(transformer, run.optimizer)
    scheduler = CogVideoXDDIMScheduler.from_pretrained(checkpoint, subfolder="scheduler", local_files_only=True)
    objective = Objective(scheduler, transformer.config, how.min_snr, how.guidance)
    student.train()
    losses: list[float] = []
    while run.step < how.steps:
        draw = (how.batch, how.seed, run.step, accelerator.process_index, accelerator.num_processes)
        batch = prepared.batch(*draw, drop_captions=how.guidance is None).to(accelerator.device)
        with accelerator.autocast():
            loss = objective.loss(student, transformer, batch)
        losses.append(_finite(loss, run))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(run.parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = how.rate(run.step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.step += 1
        if run.ema is not None:
            run.ema.step(run.parameters)
        _look_up(accelerator, run, losses, validation)
    return run


def _begun(transformer: CogVideoXTransformer3DModel, output: Path, how: Training, accelerator: Accelerator) -> Run:
    """Return a run at its first step, or where it was cut off."""
    parameters = make_trainable(transformer, how)
    ema = None if how.ema is None else EMAModel(parameters, decay=how.ema)
    optimizer = new_optimizer(parameters, how)
    run = Run(output, how, accelerator.num_processes, transformer, parameters, optimizer, ema)
    run.resume()
    if ema is not None:
        ema.to(parameters[0].device)
    if accelerator.is_main_process:  # an output that cannot be written is found out before the first step
        run.save_settings()
    return run


def _finite(loss: Tensor, run: Run) -> float:
    """Return a loss as a number, and raise TrainingError where it is none."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise TrainingError(
            f"the loss of step {run.step} is {value}; what was saved last stays in {run.output}",
            fix="train anew into another folder, with a lower learning rate",
        )
    return value


def _look_up(accelerator: Accelerator, run: Run, losses: list[float], validation: Validation | None) -> None:
    """Report, save and validate where it is time to, on the first process."""
    last, shown = run.step == run.how.steps, validation is not None and run.step % validation.every == 0
    if run.step % _REPORT == 0 or last:
        mean = accelerator.reduce(torch.tensor(losses, device=accelerator.device).mean(), "mean")
        accelerator.print(f"step {run.step} of {run.how.steps}: loss {float(mean):.5f}", flush=True)
        losses.clear()
    if last or shown or run.step % run.how.save_every == 0:
        if accelerator.is_main_process:
            run.save()
            if shown and validation is not None:
                validate(validation, run.exported, run.how.method, run.output / "validation" / f"step-{run.step:06d}")
        accelerator.wait_for_everyone()


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Training()
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder in diffusers layout")
    parser.add_argument("--cache", type=Path, required=True, help="folder of prepare.py")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--method", choices=("lora", "full"), default=defaults.method)
    for name in ("steps", "batch", "rank", "seed", "save-every"):
        parser.add_argument(f"--{name}", type=int, default=getattr(defaults, name.replace("-", "_")))
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--ema", type=float, help="decay of averaged weights, such as 0.999")
    parser.add_argument("--min-snr", type=float, help="gamma of min-SNR weighting, such as 5")
    parser.add_argument("--distil-guidance", type=float, dest="guidance", help="guidance scale to do without")
    parser.add_argument("--8bit", action="store_true", dest="eight_bit", help="optimizer of bitsandbytes")
    parser.add_argument("--gradient-checkpointing", action="store_true", dest="checkpointing")
    parser.add_argument("--precision", choices=("no", "bf16"), default=defaults.precision)
    parser.add_argument("--validate-every", type=int, help="steps between validation videos")
    parser.add_argument("--prompt", action="append", default=[], help="of a validation video; may be given again")
    parser.add_argument("--image", type=Path, help="first frame of validation videos, for image-to-video")
    given = vars(parser.parse_args())
    if given["validate_every"] is None and (given["prompt"] or given["image"]):
        parser.error("--prompt and --image are of validation videos: give --validate-every as well")
    checkpoint, cache, output = (given.pop(name) for name in ("checkpoint", "cache", "output"))
    every, prompts, image = (given.pop(name) for name in ("validate_every", "prompt", "image"))
    validation = None if every is None else Validation(checkpoint, every, tuple(prompts), image)
    try:
        train(checkpoint, cache, output, Training(**given), validation)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            "the GPU has not enough memory for this",
            fix="checkpoint gradients, or take the 8-bit optimizer or fewer clips: see cvx-deploy plan --train",
        ) from error


if __name__ == "__main__":
    exit_with(main)
