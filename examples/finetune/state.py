"""How a run trains, and what of it lies on the disk: all that it needs to go on, and what the export reads."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.training_utils import EMAModel
from diffusers.utils import is_bitsandbytes_available
from objective import CacheError
from peft import get_peft_model_state_dict

from cvx_deploy.errors import CvxError
from cvx_deploy.files import staged_directory, staged_file
from cvx_deploy.reading import reading

STATE = "state.pt"
_WARM_UP = 50


@dataclass(frozen=True)
class Training:
    """How to train.

    Attributes:
        method: Adapters of the attentions and feed-forward layers, or all weights.
        steps: Steps in all; the learning rate warms up, holds, and falls to zero over the last fifth.
        batch: Clips a step and process; with two processes, half of it gives the same weights.
        rank: Of the adapters.
        ema: How much of the averaged weights stays at each step; they are what is exported then.
        min_snr: See `objective.Objective`; `guidance` likewise.
        save_every: Steps between saved states.
    """

    method: Literal["lora", "full"] = "lora"
    steps: int = 1000
    batch: int = 1
    learning_rate: float = 1e-4
    rank: int = 64
    seed: int = 0
    ema: float | None = None
    min_snr: float | None = None
    guidance: float | None = None
    eight_bit: bool = False
    checkpointing: bool = False
    precision: Literal["no", "bf16"] = "no"
    save_every: int = 100

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.rank, self.save_every) < 1:
            raise CvxError("steps, batch, rank and steps between saves are 1 at the least", fix="raise what is less")
        if not 0 <= self.seed < 2**63:
            raise CvxError(f"{self.seed} is no seed", fix="choose one from 0 to 2**63 - 1")
        rates = [rate for rate in (self.learning_rate, self.min_snr) if rate is not None]
        if not all(0 < rate < math.inf for rate in rates):
            raise CvxError("the learning rate and gamma of min-SNR are above 0", fix="try 1e-4, and 5")
        if self.ema is not None and not 0 < self.ema < 1:
            raise CvxError(f"a decay of {self.ema} averages nothing", fix="try 0.999")
        if self.guidance is not None and not 1 < self.guidance < math.inf:
            raise CvxError(
                f"there is no guidance to distil at scale {self.guidance:g}", fix="name one above 1, such as 6"
            )
        if self.guidance is not None and self.method != "lora":
            raise CvxError(
                "guidance is distilled into a LoRA: its teacher is the same network without it",
                fix="leave the method at lora",
            )
        if self.eight_bit and not is_bitsandbytes_available():
            raise CvxError("the 8-bit optimizer needs bitsandbytes", fix="run: pip install bitsandbytes")

    def rate(self, step: int) -> float:
        """Return a step's learning rate."""
        return self.learning_rate * min(1.0, (step + 1) / _WARM_UP, (self.steps - step) / (0.2 * self.steps))


@dataclass
class Run:
    """A run that can be cut off anywhere: what `save` leaves is all that `resume` needs.

    Attributes:
        output: Its folder.
        how: What it was begun with; another is refused. `processes` likewise.
        parameters: What is trained.
        ema: Their average, if any.
        step: Steps done.
    """

    output: Path
    how: Training
    processes: int
    transformer: CogVideoXTransformer3DModel
    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: EMAModel | None
    step: int = field(default=0)

    def resume(self) -> None:
        """Take up the saved state, if there is one.

        Raises:
            CacheError: It is damaged, or of a run with other settings.
        """
        path = self.output / STATE
        if not path.exists():
            return
        fix = "choose another output folder, or remove this one"
        with reading(path, CacheError, fix=fix):
            saved: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
            if saved["how"] != asdict(self.how):
                raise CacheError(f"{path} is of a run with other settings", fix="choose another output folder")
            if saved["processes"] != self.processes:
                raise CacheError(
                    f"{path} is of a run of {saved['processes']} processes, and here are {self.processes}",
                    fix="start as many, or choose another output folder",
                )
            for parameter, value in zip(self.parameters, saved["parameters"], strict=True):
                parameter.data.copy_(value)
            self.optimizer.load_state_dict(saved["optimizer"])
            if self.ema is not None:
                self.ema.load_state_dict(saved["ema"])
            self.step = saved["step"]

    def save_settings(self) -> None:
        """Write what the run was begun with, for its reader."""
        with staged_file(self.output / "settings.json") as path:
            path.write_text(json.dumps(asdict(self.how), indent=1) + "\n", encoding="utf-8")

    def save(self) -> None:
        """Write the state and the weights that are exported, each whole or not at all."""
        state = {
            "how": asdict(self.how),
            "processes": self.processes,
            "step": self.step,
            "parameters": [parameter.detach().cpu() for parameter in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }
        with self._averaged():
            if self.how.method == "lora":
                self._save_adapters()
            else:
                with staged_directory(self.output / "transformer", replace=True) as folder:
                    self.transformer.save_pretrained(folder)
        with staged_file(self.output / STATE) as partial:
            torch.save(state, partial)

    def _save_adapters(self) -> None:
        name = "pytorch_lora_weights.safetensors"
        with staged_directory(self.output / "adapter", replace=True) as folder:
            CogVideoXPipeline.save_lora_weights(
                folder,
                transformer_lora_layers=get_peft_model_state_dict(self.transformer),
                weight_name=name,
                transformer_lora_adapter_metadata=self.transformer.peft_config["default"].to_dict(),
            )

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Put the averaged weights in for as long as the block lasts."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    @property
    def exported(self) -> Path:
        """What the export reads."""
        return self.output / ("adapter" if self.how.method == "lora" else "transformer")
