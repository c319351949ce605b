"""What pytest finds by itself where cvx-deploy is installed: the fixture ``parity``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from cvx_deploy.testing import assert_parity

if TYPE_CHECKING:
    from cvx_deploy.parity.ladder import Parity


class Hold(Protocol):
    """What the fixture is."""

    def __call__(self, bundle: Path | str, checkpoint: Path | str | None = None, **options: Any) -> "Parity":
        """See `cvx_deploy.testing.assert_parity`."""


@pytest.fixture
def parity(tmp_path: Path) -> Hold:
    """Return `assert_parity`, which leaves its reports in the test's own folder."""

    def hold(bundle: Path | str, checkpoint: Path | str | None = None, **options: Any) -> "Parity":
        return assert_parity(bundle, checkpoint, **{"output": tmp_path / "parity", **options})

    return hold
