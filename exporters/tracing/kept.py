"""Traces that are kept: the graph of a network that was traced before is read, in milliseconds, from the user's cache.

What a trace gives depends on the network's config, precision and sizes, on the code that traces and on the libraries
it uses, and on no weight: a graph names its weights and is bound to a checkpoint's afterwards. An entry is named after
a hash of all that and one of its own bytes, so that what is damaged is not taken for a trace.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from cvx_deploy.errors import OutputError
from cvx_deploy.exporters.tracing.contract import NetworkContract
from cvx_deploy.exporters.tracing.graph import graph_from_contract
from cvx_deploy.exporters.tracing.sources import PACKAGE, sources_of
from cvx_deploy.files import cache_folder, staged_file

_TOOLS = ("torch", "diffusers", "transformers", "optimum", "onnxscript", "onnx-ir", "onnx")
_MOST = 256 << 20
"""Bytes; a trace is a few hundred thousand."""
_NOT_TRACED = {
    *("_class_name", "_diffusers_version", "_name_or_path", "transformers_version", "torch_dtype", "dtype"),
    *("scaling_factor", "shift_factor", "latents_mean", "latents_std", "invert_scale_latents"),
}
"""What a config says that its network does not compute with: the sampler scales latents."""


def kept_graph(contract: NetworkContract, where: Path) -> ir.Model:
    """Return what `graph_from_contract` does, from an earlier trace where there is one; a new one is kept.

    Of a contract from outside this package it is not known what it is made of, so that nothing is kept of it.

    Raises:
        CheckpointError: No network can be built from the config.
    """
    if not sources_of(type(contract).__module__):
        return graph_from_contract(contract, where)
    folder, key = cache_folder("traces"), _key(contract)
    data = _read(folder, key)
    if data is None:
        data = _serialized(graph_from_contract(contract, where))
        with contextlib.suppress(OutputError, OSError):  # a full disk, or another process keeping the same: no matter
            _keep(folder, key, data)
    model: ir.Model = ir.from_proto(onnx.ModelProto.FromString(data))
    for value in model.graph.initializers.values():
        value.const_value = None
    return model


def _key(contract: NetworkContract) -> str:
    """Return a hash of all that a trace depends on."""
    config = {name: value for name, value in contract.config.items() if name not in _NOT_TRACED}
    digest = hashlib.sha256()
    for file in sources_of(__name__, type(contract).__module__):
        digest.update(f"{file.relative_to(PACKAGE)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    tools = [importlib.metadata.version(tool) for tool in _TOOLS]
    network = [type(contract).__qualname__, contract.precision, repr(contract.interface)]
    digest.update(json.dumps([tools, network, config], sort_keys=True).encode())
    return digest.hexdigest()


def _serialized(model: ir.Model) -> bytes:
    """Return a graph as ONNX, its weights as bytes in a file that is not there."""
    passes.ClearMetadataAndDocStringPass()(model)
    for name, value in model.graph.initializers.items():
        assert value.dtype is not None
        assert value.shape is not None
        value.const_value = ir.ExternalTensor("unbound", 0, 0, value.dtype, shape=value.shape, name=name)
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return data


def _read(folder: Path, key: str) -> bytes | None:
    """Return the trace kept under a key; None where there is none, or none that is whole."""
    with contextlib.suppress(OSError):
        for entry in folder.glob(f"{key}-*.onnx"):
            data = entry.read_bytes()
            if entry.stem == f"{key}-{hashlib.sha256(data).hexdigest()}":
                os.utime(entry)  # the least recently used go first
                return data
            entry.unlink()
    return None


def _keep(folder: Path, key: str, data: bytes) -> None:
    with staged_file(folder / f"{key}-{hashlib.sha256(data).hexdigest()}.onnx") as staging:
        staging.write_bytes(data)
    entries = sorted(folder.iterdir(), key=lambda entry: entry.stat().st_mtime_ns, reverse=True)
    total = 0
    for entry in entries:
        total += entry.stat().st_size
        if total > _MOST:
            entry.unlink()
