"""What the training scripts share: a run that can be stopped anywhere and resumed to the bit, and averaged weights."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger("miniature")


@dataclass
class Run:
    """A network in training: its weights, the optimizer's, their average, and how many steps they have seen.

    Attributes:
        network: What is trained.
        optimizer: Over the network's parameters.
        state: Folder that holds `FILE`; made when it does not exist.
        decay: How much of the averaged weights stays at each step; less in the first steps.
        step: Steps done.
        average: The averaged weights, by parameter name.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    state: Path
    decay: float = 0.998
    step: int = 0
    average: dict[str, Tensor] = field(default_factory=dict)

    FILE = "training.pt"

    def __post_init__(self) -> None:
        if not self.average:
            self.average = {name: p.detach().clone() for name, p in self.network.named_parameters()}

    def resume(self) -> bool:
        """Take up what `save` left in the state folder; False when there is nothing."""
        path = self.state / self.FILE
        if not path.exists():
            return False
        saved: dict[str, Any] = torch.load(path, weights_only=True)
        self.network.load_state_dict(saved["network"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.average, self.step = saved["average"], saved["step"]
        return True

    def save(self) -> None:
        """Write everything `resume` needs under a temporary name, then rename it."""
        self.state.mkdir(parents=True, exist_ok=True)
        partial = self.state / f"{self.FILE}.partial"
        saved = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
        }
        torch.save(saved, partial)
        partial.replace(self.state / self.FILE)

    def update(self, loss: Tensor, learning_rate: float, max_norm: float = 1.0) -> None:
        """Take one optimizer step down `loss` and fold the new weights into the average."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), max_norm)
        self.optimizer.step()
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        weights = dict(self.network.named_parameters())
        with torch.no_grad():
            torch._foreach_lerp_([self.average[name] for name in weights], list(weights.values()), 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Swap the averaged weights in for as long as the context lasts."""
        trained = {name: p.detach().clone() for name, p in self.network.named_parameters()}
        _copy_into(self.network, self.average)
        try:
            yield
        finally:
            _copy_into(self.network, trained)


def load_average(network: nn.Module, state: Path) -> int:
    """Give `network` the averaged weights of a saved run; returns the steps they have seen."""
    saved: dict[str, Any] = torch.load(state / Run.FILE, weights_only=True)
    _copy_into(network, saved["average"])
    return int(saved["step"])


def _copy_into(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.copy_(weights[name])


@dataclass(frozen=True)
class Rhythm:
    """How often a training run speaks, measures and saves.

    Attributes:
        report: Steps between log lines.
        measure: Steps between measurements on held-out data.
        save_seconds: Least seconds between saves; the last step always saves.
    """

    report: int = 25
    measure: int = 250
    save_seconds: float = 120.0


def train(
    run: Run,
    steps: int,
    rhythm: Rhythm,
    do_step: Callable[[int], float],
    measure: Callable[[], str],
) -> None:
    """Run `do_step(step)` until `steps` are done in all; it returns the loss and must call `run.update` once."""
    if run.resume():
        logger.info("resumed at step %d", run.step)
    began = saved_at = time.monotonic()
    losses: list[float] = []
    while run.step < steps:
        losses.append(do_step(run.step))
        if run.step % rhythm.report == 0:
            pace = (time.monotonic() - began) / len(losses)
            logger.info("step %d  loss %.5f  %.2f s a step", run.step, sum(losses) / len(losses), pace)
            losses, began = [], time.monotonic()
        if run.step % rhythm.measure == 0:
            with run.averaged():
                logger.info("step %d  %s", run.step, measure())
        if time.monotonic() - saved_at > rhythm.save_seconds:
            run.save()
            saved_at = time.monotonic()
    run.save()
