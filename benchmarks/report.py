"""What every benchmark says of its conditions, and how its results are written."""

import json
import os
import platform
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any


def conditions(tools: Iterable[str], note: str, **more: Any) -> dict[str, Any]:
    """Say what figures were taken on.

    Args:
        tools: Packages whose versions matter.
        note: What else used the machine.
        more: What is particular to this benchmark.
    """
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average_at_start": [round(load, 1) for load in os.getloadavg()],
        "note": note,
        "python": platform.python_version(),
        "versions": {tool: version(tool) for tool in tools},
        **more,
    }


def write(output: Path, told: dict[str, Any], results: dict[str, Any], lines: Iterable[str]) -> None:
    """Write results beside their conditions: `output` with .json, and with .md the lines that say the same."""
    output.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"conditions": told, **results}, indent=2)
    output.with_suffix(".json").write_text(content + "\n", encoding="utf-8")
    said = [*lines, "", "Conditions:", "", "```json", json.dumps(told, indent=2), "```", ""]
    output.with_suffix(".md").write_text("\n".join(said), encoding="utf-8")
