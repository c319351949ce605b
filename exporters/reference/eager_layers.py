"""What the modules within an eager network put out, by the names that its trace gives them."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.exporters.reference.eager import EagerBackend, EagerSession
from cvx_deploy.exporters.sources.checkpoint import Checkpoint
from cvx_deploy.precision import Precision


class ListeningEager(EagerBackend):
    """An eager backend that notes what modules put out.

    Left out is a module that is called more than once in a run, or that puts out more than one tensor: which node of
    the traced graph agrees with it would not be known.

    Args:
        bundle: As of `EagerBackend`, likewise `checkpoint` and `precision`.
        wanted: Names of the modules, such as ``model.transformer_blocks.0.attn1.to_q``; None for the shapes of all.

    Attributes:
        shapes: Of what each module put out in the last run.
        values: What the wanted ones did, in float32.
    """

    def __init__(
        self, bundle: Bundle, checkpoint: Checkpoint, precision: Precision, wanted: Collection[str] | None = None
    ) -> None:
        super().__init__(bundle, checkpoint, precision)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.values: dict[str, NDArray[np.float32]] = {}
        self._wanted = wanted
        self._seen: set[str] = set()

    @contextlib.contextmanager
    def load(self, role: str, sizes: Mapping[str, int]) -> Iterator[EagerSession]:
        """Load a network for the block, and listen to it."""
        with super().load(role, sizes) as session, contextlib.ExitStack() as stack:
            for name, module in session.modules():
                if self._wanted is None or name in self._wanted:
                    hook = module.register_forward_hook(lambda _, __, output, name=name: self._hear(name, output))
                    stack.callback(hook.remove)
            yield session

    def _hear(self, name: str, output: Any) -> None:
        if name in self._seen or not isinstance(output, torch.Tensor):
            self.shapes.pop(name, None)
            self.values.pop(name, None)
        else:
            self.shapes[name] = tuple(output.shape)
            if self._wanted is not None:
                self.values[name] = output.float().cpu().numpy().copy()
        self._seen.add(name)
