"""An observer that keeps the latents which the transformer is given, step by step."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.engines.observe import Observer


class Recorder(Observer):
    """Looks on while a run is made.

    Attributes:
        hidden_states: What the transformer took at each step, (B, F, C, H, W).
    """

    def __init__(self) -> None:
        self.hidden_states: list[NDArray[np.float32]] = []

    def before(self, role: str, inputs: Mapping[str, Any]) -> None:
        """Keep what the transformer is given."""
        if role == "transformer":
            self.hidden_states.append(np.array(inputs["hidden_states"]))
