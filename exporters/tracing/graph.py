"""A contract in, its graph out: traced, with sizes as symbols and weights that are names and shapes.

The module is built and traced with fake tensors, which have shapes and types and no data.
"""

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.onnx._internal.exporter._registration import ONNXRegistry

from cvx_deploy.exporters.sources.checkpoint import sensible_config
from cvx_deploy.exporters.tracing.contract import NetworkContract
from cvx_deploy.exporters.tracing.copies import make_copies
from cvx_deploy.exporters.tracing.repeat import repeat_blocks
from cvx_deploy.exporters.tracing.symbols import PRIMES, make_symbolic
from cvx_deploy.graph.fold import fold_indices
from cvx_deploy.graph.split import split_without_sequences

OPSET = 23

# Every export builds the exporter's table of operators anew, in half a second; it is the same one, and is not changed.
_operators = staticmethod(functools.cache(ONNXRegistry.from_torchlib))


def graph_from_contract(contract: NetworkContract, where: Path) -> ir.Model:
    """Trace a network as deep as it is; nothing is rewritten for an engine, and its weights are names and shapes."""
    model = _trace(contract, where)
    _name_nodes_by_module(model)
    make_copies(model)
    for named, specs in ((model.graph.inputs, contract.input_specs), (model.graph.outputs, contract.output_specs)):
        for value, spec in zip(named, specs, strict=True):
            value.name, value.shape = spec.name, ir.Shape(spec.shape)
    make_symbolic(model, contract.input_specs)
    split_without_sequences(model)
    if contract.blocks is not None:
        repeat_blocks(model, contract.blocks)
    fold_indices(model)
    return model


def _trace(contract: NetworkContract, where: Path) -> ir.Model:
    with FakeTensorMode(allow_non_fake_inputs=True), _quiet(), torch.no_grad():
        with sensible_config(where):
            module = contract.traceable()
        inputs = tuple(contract.generate_dummy_inputs(**PRIMES).values())
        program = torch.export.export(module, inputs, strict=False)
    with _quiet(), mock.patch.object(ONNXRegistry, "from_torchlib", _operators):
        onnx_program = torch.onnx.export(program, dynamo=True, optimize=False, opset_version=OPSET, verbose=False)
    assert onnx_program is not None
    return onnx_program.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' notes on packages that are not needed here off the user's screen."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def _name_nodes_by_module(model: ir.Model) -> None:
    """Name nodes by the module they come from, so that a profile or a diff can be read."""
    for index, node in enumerate(model.graph):
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        inner = [scope for scope in (part.strip(" '\"[]") for part in scopes.split(",")) if scope]
        module = inner[-2] if len(inner) > 1 else ""
        node.name = f"{module}/{node.op_type}_{index}"
