"""Exports without the minutes of tracing, for tests of everything around it."""

from collections.abc import Collection
from pathlib import Path

import pytest

from cvx_deploy.bundle.schema import Network
from cvx_deploy.exporters import export
from cvx_deploy.exporters.quantization.quantized import QuantizedComponent
from cvx_deploy.exporters.sources.checkpoint import Checkpoint
from cvx_deploy.exporters.tracing.contract import NetworkContract
from cvx_deploy.exporters.tracing.trace import weight_location

_TRACE = export._write_network


def with_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let exports trace every network again."""
    monkeypatch.setattr(export, "_write_network", _TRACE)


def without_tracing(monkeypatch: pytest.MonkeyPatch, *components: str) -> None:
    """Let exports write a line of text in place of every network, or of those of some components; all else is real."""

    def write(
        contract: NetworkContract,
        checkpoint: Checkpoint,
        path: Path,
        rewrites: Collection[str] | None,
        quantized: QuantizedComponent | None,
    ) -> Network:
        if components and contract.component not in components:
            return _TRACE(contract, checkpoint, path, rewrites, quantized)
        return _write_text(contract, checkpoint, path, quantized)

    monkeypatch.setattr(export, "_write_network", write)


def _write_text(
    contract: NetworkContract, checkpoint: Checkpoint, path: Path, quantized: QuantizedComponent | None
) -> Network:
    path.write_text(f"{contract.name} of {contract.precision}")
    files = {tensor.file for tensor in checkpoint.tensors(contract.component).values()}
    weights = tuple(sorted(map(weight_location, files)))
    return Network(
        export._stored(path),
        contract.input_specs,
        contract.output_specs,
        weights,
        contract.state,
        contract.precision,
        None if quantized is None else quantized.entry,
    )
