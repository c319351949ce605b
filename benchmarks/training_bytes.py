"""Count the bytes that a training step of examples/finetune holds, at any size and without holding them.

A transformer of fake tensors goes through two steps, while every storage that comes and goes is counted: what PyTorch
allocates on a device, without the workspace of kernels. It takes seconds, and as many blocks as the published models
have.
"""

import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from objective import Batch, Objective
from state import Training
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train import make_trainable, new_optimizer

from cvx_deploy.shape import Shape


@dataclass(frozen=True)
class Counted:
    """Bytes of one step.

    Attributes:
        held: Between steps: weights and the state of the optimizer.
        peak: The most at once.
    """

    held: int
    peak: int


class Storages(TorchDispatchMode):
    """Counts the bytes of every storage that is alive, views once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def add(self, tensors: list[Any]) -> None:
        """Count tensors that were not made under this mode."""
        for tensor in tensors:
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in self._alive:
                self._alive.add(id(storage))
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)

    def _gone(self, name: int, size: int) -> None:
        self._alive.discard(name)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and count what it returns."""
        found = func(*args, **(kwargs or {}))
        self.add(tree_leaves(found))
        return found


def counted(config: dict[str, Any], shape: Shape, how: Training) -> Counted:
    """Return what the second step of a transformer of some config holds, for one clip."""
    with torch.device("meta"):
        dtype = torch.bfloat16 if how.method == "lora" else torch.float32
        transformer = CogVideoXTransformer3DModel.from_config(config).to(dtype)
        make_trainable(transformer, how)
    transformer.train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        _without_values(transformer)
        parameters = [p for p in transformer.parameters() if p.requires_grad]
        optimizer, batch = new_optimizer(parameters, how), random_batch(transformer.config, shape)
        schedule: Any = _Schedule()
        objective, storages = Objective(schedule, transformer.config, None, None), Storages()
        storages.add([*transformer.parameters(), *transformer.buffers(), *vars(batch).values()])
        for _ in range(2):
            held, storages.peak = storages.now, storages.now
            with storages:
                take_step(objective, transformer, optimizer, batch, how)
    return Counted(held, storages.peak)


def take_step(
    objective: Objective, transformer: Any, optimizer: torch.optim.Optimizer, batch: Batch, how: Training
) -> None:
    """Take one step as train.py takes it, on a CPU."""
    with torch.autocast("cpu", torch.bfloat16) if how.precision == "bf16" else nullcontext():
        loss = objective.loss(transformer, transformer, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def random_batch(config: Any, shape: Shape) -> Batch:
    """Return one clip's latents of a shape, of random numbers."""
    frames = -(-shape.frames // 4)
    frames += frames % (config.patch_size_t or 1)
    latents = torch.randn(1, frames, config.out_channels, shape.height // 8, shape.width // 8)
    images = latents.clone() if config.in_channels == 2 * config.out_channels else None
    prompts = torch.randn(1, config.max_text_seq_length, config.text_embed_dim)
    return Batch(latents, torch.randn_like(latents), images, prompts, prompts, torch.full((1,), 500))


class _Schedule:
    """A schedule that mixes by a half: the real one looks the step up, which fake tensors cannot."""

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """Return noisy latents."""
        return (original_samples + noise) / 2

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """Return v."""
        return noise - sample


def _without_values(network: nn.Module) -> None:
    """Put fake tensors into the places of a network's parameters and buffers, which are on the meta device."""
    for module in network.modules():
        for name, value in module._parameters.items():
            if value is not None:
                fake = torch.empty(value.shape, dtype=value.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=value.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
