"""The check for finite numbers: the network, the tensor, how many values and the step are named."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.finite import FiniteCheck
from cvx_deploy.engines.observe import ObservedBackend
from cvx_deploy.errors import EngineError
from cvx_deploy.miniatures import miniature
from cvx_deploy.pipeline.request import RunRequest
from cvx_deploy.pipeline.run import run
from cvx_deploy.precision import Precision
from tests.conftest import in_precision

Outputs = dict[str, NDArray[np.float32]]


class Damaged:
    """A backend of zeros, which puts some other values into one network's output at one of its runs."""

    def __init__(
        self, precision: Precision = "fp32", role: str = "", at: int = 0, values: tuple[float, ...] = ()
    ) -> None:
        self.bundle = in_precision(Bundle.open(miniature("mini")), precision)
        self.role, self.at, self.values = role, at, values

    @contextmanager
    def load(self, role: str, sizes: Mapping[str, int]) -> Iterator["Damaged.Session"]:
        yield self.Session(self, role, dict(sizes))

    def to_device(self, array: NDArray[Any]) -> NDArray[Any]:
        return array

    def to_host(self, tensor: NDArray[Any]) -> NDArray[Any]:
        return tensor

    class Session:
        def __init__(self, backend: "Damaged", role: str, sizes: dict[str, int]) -> None:
            self.backend, self.role, self.sizes, self.runs = backend, role, sizes, 0

        def run(self, inputs: Mapping[str, Any]) -> Outputs:
            self.runs += 1
            outputs = self.backend.bundle.network(self.role).outputs
            made: Outputs = {spec.name: np.zeros(spec.resolve(self.sizes), np.float32) for spec in outputs}
            if (self.role, self.runs) == (self.backend.role, self.backend.at):
                made[outputs[0].name].flat[: len(self.backend.values)] = self.backend.values
            return made


def checked(backend: Damaged) -> ObservedBackend:
    return ObservedBackend(backend, FiniteCheck(backend))


def make(backend: Damaged, folder: Path, **request: Any) -> None:
    run(checked(backend), RunRequest(("one", "two"), folder / "out.npy", **{"steps": 4, **request}))


def failure(backend: Damaged, folder: Path) -> EngineError:
    with pytest.raises(EngineError) as raised:
        make(backend, folder)
    assert not (folder / "out.npy").exists()
    return raised.value


def test_finite_numbers_pass(tmp_path: Path) -> None:
    make(Damaged(), tmp_path)
    assert len(list(tmp_path.glob("out*.npy"))) > 0


def test_a_nan_is_found_at_the_step_that_made_it(tmp_path: Path) -> None:
    error = failure(Damaged(role="transformer", at=3, values=(np.nan, np.nan, np.inf)), tmp_path)
    assert error.what == (
        "transformer put out 2 NaN and 1 infinite values among the 1,728 of noise_pred at step 3 (timestep 499)"
    )


def test_steps_are_counted_anew_for_every_video(tmp_path: Path) -> None:
    error = failure(Damaged(role="transformer", at=6, values=(-np.inf,)), tmp_path)
    assert "put out 1 infinite values among" in error.what
    assert error.what.endswith("at step 2 (timestep 749)")


def test_other_networks_say_which_run_it_was(tmp_path: Path) -> None:
    assert failure(Damaged(role="text_encoder", at=2, values=(np.nan,)), tmp_path).what.endswith("at run 2")
    frames = failure(Damaged(role="vae_decoder_first", at=1, values=(np.nan,) * 5), tmp_path)
    assert frames.what.startswith("vae_decoder_first put out 5 NaN among the ")
    assert "of pixels" in frames.what


def test_what_comes_from_the_host_is_looked_at_too() -> None:
    backend = checked(Damaged())
    [latents] = backend.bundle.network("vae_decoder_first").inputs
    sizes = {"latent_height": 6, "latent_width": 6}
    with backend.load("vae_decoder_first", sizes) as session, pytest.raises(EngineError, match="was given 1 NaN"):
        session.run({latents.name: np.array([0, np.nan], np.float32)})


@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("role", ["text_encoder", "transformer"])
def test_the_cure_fits_the_network_and_its_precision(precision: Precision, role: str, tmp_path: Path) -> None:
    fix = failure(Damaged(precision, role, 1, (np.nan,)), tmp_path).fix
    assert ("--precision bf16" in fix) == (precision == "fp16")
    assert ("T5-XXL" in fix) == (precision == "fp16" and role == "text_encoder")


def test_twin_without_the_check_damage_goes_unseen(tmp_path: Path) -> None:
    damaged = Damaged(role="text_encoder", at=1, values=(np.nan,))
    run(damaged, RunRequest(("one",), tmp_path / "out.npy", steps=2))
    assert (tmp_path / "out.npy").exists()
