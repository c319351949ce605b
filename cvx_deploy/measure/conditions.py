"""What figures were taken on: nothing measured is shown without it."""

import os
import platform
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from cvx_deploy.measure.cpu import cpu_name, instructions


def conditions(tools: Iterable[str], note: str, **more: Any) -> dict[str, Any]:
    """Say what figures were taken on.

    Args:
        tools: Packages whose versions matter; those that are not installed are left out.
        note: What else used the machine.
        more: What is particular to what was measured.
    """
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu": cpu_name(),
        "instructions": instructions(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average_at_start": [round(load, 1) for load in os.getloadavg()],
        "note": note,
        "python": platform.python_version(),
        "versions": dict(_versions(tools)),
        **more,
    }


def _versions(tools: Iterable[str]) -> Iterable[tuple[str, str]]:
    for tool in tools:
        try:
            yield tool, version(tool)
        except PackageNotFoundError:
            continue
