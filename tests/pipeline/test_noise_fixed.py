"""Noise against values that torch 2.13.0 (x86, AVX2) once drew, so that it can be checked where torch is not."""

import numpy as np
import pytest

from cvx_deploy.errors import CvxError
from cvx_deploy.pipeline.noise import Generator

TOLERANCE = 1e-6  # torch evaluates float32 polynomials: 4.8e-7 from exact at worst in 126 million values

# One generator, seed 42: small draws, whose second value waits through the big draws between them.
SEED_42 = [
    ((3,), [0.336690366, 0.128809407, 0.234462366]),
    (
        (20,),
        [
            1.78778934, -0.478045255, -0.242858633, -0.934163153, -1.11090386, 0.0915456563, -2.31692266,
            -0.216804728, -1.38467371, -0.871236145, -0.223365918, 1.71736145, -0.592000544, -0.0630743802,
            -0.828554273, 0.330898434, -1.55757248, 0.995636106, -0.879785836, -0.601142049,
        ],
    ),
    ((2,), [0.23033303, -0.32775864]),
    ((), [0.794968724]),
    (
        (16,),
        [
            -0.913823009, -0.658137262, 0.0780238733, 0.525808752, -0.48799172, 1.19136906, -0.81400764, -0.735992789,
            -1.40324783, 0.0360036679, -0.0634772703, 0.675614893, -0.0978068933, 1.844594, -1.18453741, 1.38354933,
        ],
    ),
]  # fmt: skip


def test_draws_follow_torch_through_small_and_big_shapes() -> None:
    generator = Generator(42)
    for shape, expected in SEED_42:
        values = generator.randn(shape)
        assert values.shape == shape
        assert values.dtype == np.float32
        np.testing.assert_allclose(values.reshape(-1), expected, rtol=0, atol=TOLERANCE)


def test_twin_the_next_seed_draws_something_else() -> None:
    values = Generator(43).randn((20,))
    assert np.abs(values - Generator(42).randn((20,))).max() > 0.1


@pytest.mark.parametrize(
    ("seed", "count", "last"),
    [
        (2**64 - 1, 840, [0.547151923, -1.16744208]),
        (-7, 16 * 2**16, [0.548848033, -0.474399388]),
        (-7, 16 * 2**16 + 3, [-0.711102962, 1.22083735]),
    ],
)
def test_large_draws_end_as_in_torch(seed: int, count: int, last: list[float]) -> None:
    np.testing.assert_allclose(Generator(seed).randn((count,))[-2:], last, rtol=0, atol=TOLERANCE)


def test_an_empty_draw_takes_nothing_from_the_stream() -> None:
    generator = Generator(0)
    assert generator.randn((2, 0, 3)).shape == (2, 0, 3)
    np.testing.assert_array_equal(generator.randn((5,)), Generator(0).randn((5,)))


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, True, 1.0, "3", None])
def test_a_seed_that_torch_refuses_is_refused_with_a_fix(seed: object) -> None:
    with pytest.raises(CvxError, match=r"seed .* is not an integer of 64 bits\. fix: "):
        Generator(seed)  # type: ignore[arg-type]
