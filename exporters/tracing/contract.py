"""What every exported network states about itself: an optimum `ExporterConfig` with shapes, layouts and weights."""

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from optimum.exporters.base import ExporterConfig
from optimum.utils import DummyInputGenerator, NormalizedConfig

from cvx_deploy.bundle.schema import TensorSpec
from cvx_deploy.exporters.tracing.repeat import Blocks
from cvx_deploy.measure.thresholds import THRESHOLDS
from cvx_deploy.precision import Precision

TORCH_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
}


class SpecInputGenerator(DummyInputGenerator):  # type: ignore[misc]
    """Makes seeded inputs of the shapes a contract states.

    Args:
        specs: The contract's inputs.
        sizes: A number for every symbol in their shapes.
        max_int: Integers are drawn below it.
    """

    def __init__(self, specs: tuple[TensorSpec, ...], sizes: dict[str, int], max_int: int) -> None:
        self.specs = {spec.name: spec for spec in specs}
        self.sizes = sizes
        self.max_int = max_int

    def supports_input(self, input_name: str) -> bool:
        """Whether the contract has an input of that name."""
        return input_name in self.specs

    def generate(
        self, input_name: str, framework: str = "pt", int_dtype: str = "int64", float_dtype: str = "fp32"
    ) -> torch.Tensor:
        """Return one input: standard normal, or uniform integers, of the spec's own dtype, seeded by its name."""
        spec = self.specs[input_name]
        generator = torch.Generator().manual_seed(sum(input_name.encode()))
        shape = spec.resolve(self.sizes)
        if spec.dtype == "int64":
            return torch.randint(self.max_int, shape, generator=generator)
        return torch.randn(shape, generator=generator).to(TORCH_DTYPES[spec.dtype])


class NetworkContract(ExporterConfig):  # type: ignore[misc]
    """One network to export: its traceable module, inputs, outputs, and where its weights come from.

    Attributes:
        name: The network's role in the bundle.
        component: The checkpoint folder its weights lie in.
        max_int: Integer inputs lie below it.
        ATOL_FOR_VALIDATION: Largest error in fp32 against eager, over the largest output: float32 sums in another
            order, hundreds of layers deep.
    """

    NORMALIZED_CONFIG_CLASS = NormalizedConfig
    name: str
    component: str
    max_int: int = 1000
    ATOL_FOR_VALIDATION = THRESHOLDS["fp32"].relative_max

    def __init__(self, config: dict[str, Any], precision: Precision) -> None:
        super().__init__(config, task=self.component, float_dtype=precision)
        self.config = config
        self.precision: Precision = precision

    @property
    @abstractmethod
    def input_specs(self) -> tuple[TensorSpec, ...]:
        """Inputs in the order of the module's ``forward``."""

    @property
    @abstractmethod
    def output_specs(self) -> tuple[TensorSpec, ...]:
        """Outputs in the order in which ``forward`` returns them."""

    @property
    def interface(self) -> tuple[str, tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """What tells the networks of one checkpoint and precision apart: role, inputs, outputs."""
        return self.name, self.input_specs, self.output_specs

    @property
    def state(self) -> dict[str, str]:
        """Input to output, for tensors that one run hands to the next."""
        return {}

    @abstractmethod
    def build(self) -> torch.nn.Module:
        """Return the module to trace; called with the compute type as torch's default type."""

    def module(self) -> torch.nn.Module:
        """Return the module to trace, in its compute type and inference mode.

        Parameters are made in that type rather than cast to it: fake parameters cannot change their type.
        """
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.compute_dtype)
        try:
            return self.build().eval()
        finally:
            torch.set_default_dtype(default)

    def traceable(self) -> torch.nn.Module:
        """Return the module as a trace takes it: equal parts may be told to `tracing.copies` rather than be run."""
        return self.module()

    @property
    def blocks(self) -> Blocks | None:
        """The run of equal blocks that the module is made of, if it is; `build` makes `Blocks.traced` of them."""
        return None

    def constants(self) -> dict[str, NDArray[Any]]:
        """Return, by buffer name of the module, tables that are computed rather than stored in the checkpoint."""
        return {}

    @abstractmethod
    def weight_names(self, parameter: str) -> tuple[str, ...]:
        """Return the names under which the checkpoint may hold a parameter of the module."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type the network computes in."""
        return TORCH_DTYPES[self.precision]

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        """Symbolic axes of each input, as optimum states them."""
        return _symbolic_axes(self.input_specs)

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        """Symbolic axes of each output, as optimum states them."""
        return _symbolic_axes(self.output_specs)

    def _create_dummy_input_generator_classes(self, **sizes: int) -> list[DummyInputGenerator]:
        return [SpecInputGenerator(self.input_specs, sizes, self.max_int)]


def _symbolic_axes(specs: tuple[TensorSpec, ...]) -> dict[str, dict[int, str]]:
    return {spec.name: {axis: size for axis, size in enumerate(spec.shape) if isinstance(size, str)} for spec in specs}


def as_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """Return a real (not fake) tensor as a NumPy array."""
    return np.ascontiguousarray(tensor.detach().numpy())
