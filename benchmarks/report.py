"""How every benchmark's results are written, beside their conditions."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cvx_deploy.measure.conditions import conditions

__all__ = ["conditions", "write"]


def write(output: Path, told: dict[str, Any], results: dict[str, Any], lines: Iterable[str]) -> None:
    """Write results beside their conditions: `output` with .json, and with .md the lines that say the same."""
    output.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"conditions": told, **results}, indent=2)
    output.with_suffix(".json").write_text(content + "\n", encoding="utf-8")
    said = [*lines, "", "Conditions:", "", "```json", json.dumps(told, indent=2), "```", ""]
    output.with_suffix(".md").write_text("\n".join(said), encoding="utf-8")
