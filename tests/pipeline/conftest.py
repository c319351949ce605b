"""The miniatures, opened once for a file of tests."""

from collections.abc import Iterator

import pytest

from cvx_deploy import Pipeline


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with Pipeline.from_pretrained("mini", threads=1) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def images() -> Iterator[Pipeline]:
    with Pipeline.from_pretrained("mini-i2v", threads=1) as pipeline:
        yield pipeline
