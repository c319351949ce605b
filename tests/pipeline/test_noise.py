"""Noise against torch itself: any shape, any order of draws, any seed."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cvx_deploy.pipeline.noise import Generator

TOLERANCE = 1e-6  # torch evaluates float32 polynomials: 4.8e-7 from exact at worst in 126 million values

shapes = st.lists(st.integers(0, 7), max_size=4).map(tuple) | st.integers(0, 70).map(lambda count: (count,))
seeds = st.integers(-(2**63), 2**64 - 1)


def difference(seed: int, torch_seed: int, draws: list[tuple[int, ...]]) -> float:
    """Draw the same shapes from both and return the largest difference."""
    ours, theirs = Generator(seed), torch.Generator("cpu").manual_seed(torch_seed)
    largest = 0.0
    for shape in draws:
        values, reference = ours.randn(shape), torch.randn(shape, generator=theirs).numpy()
        assert values.shape == reference.shape
        assert values.dtype == reference.dtype
        largest = max(largest, float(np.abs(values - reference).max(initial=0.0)))
    return largest


@settings(deadline=None)
@given(seed=seeds, draws=st.lists(shapes, min_size=1, max_size=8))
@example(seed=0, draws=[(1,), (16,), (1,), (17,), (), (15,), (31,), (2,)])
def test_any_order_of_draws_equals_torch(seed: int, draws: list[tuple[int, ...]]) -> None:
    assert difference(seed, seed, draws) <= TOLERANCE


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**32, 2**63, 2**64 - 1])
def test_seeds_at_the_edges_equal_torch(seed: int) -> None:
    assert difference(seed, seed, [(3,), (40,)]) <= TOLERANCE


@pytest.mark.parametrize("count", [2**20 - 1, 2**20, 2**20 + 1, 2**20 + 16, 2**21 + 5])
def test_draws_larger_than_one_chunk_equal_torch(count: int) -> None:
    assert difference(5, 5, [(count,), (4,)]) <= TOLERANCE


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 2), draws=st.lists(st.sampled_from([(4,), (16,), (3, 7)]), min_size=1, max_size=3))
def test_twin_an_off_by_one_seed_does_not_agree(seed: int, draws: list[tuple[int, ...]]) -> None:
    assert difference(seed + 1, seed, draws) > TOLERANCE


def test_twin_a_draw_left_out_does_not_agree() -> None:
    ours, theirs = Generator(3), torch.Generator("cpu").manual_seed(3)
    torch.randn((16,), generator=theirs)
    assert np.abs(ours.randn((16,)) - torch.randn((16,), generator=theirs).numpy()).max() > TOLERANCE
