"""A traced network computes what its module does, with weights that stay in the checkpoint's own files."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from cvx_deploy.bundle.safetensors import StoredTensor, read_header
from cvx_deploy.bundle.schema import TensorSpec
from cvx_deploy.errors import CheckpointError
from cvx_deploy.exporters.sources.checkpoint import Checkpoint
from cvx_deploy.exporters.tracing import graph
from cvx_deploy.exporters.tracing.contract import NetworkContract
from cvx_deploy.exporters.tracing.graph import OPSET
from cvx_deploy.exporters.tracing.trace import onnx_from_contract, weight_location
from cvx_deploy.precision import Precision
from tests.conftest import Exported, Tiny

FILE = "part/weights.safetensors"
FEATURES, WIDTH = 300, 200

pytestmark = pytest.mark.export


class Affine(torch.nn.Module):
    """One layer, and one table that no checkpoint holds."""

    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(FEATURES, WIDTH)
        self.register_buffer("table", torch.zeros(WIDTH, dtype=torch.float32), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layer(x.to(self.layer.weight.dtype)).float() + self.table
        return output


class AffineContract(NetworkContract):
    """As small as a contract gets; ``rows`` is the size its config states."""

    name = "affine"
    component = "part"

    @property
    def input_specs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec("x", "float32", ("batch", FEATURES), "BD"),)

    @property
    def output_specs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec("y", "float32", ("batch", WIDTH), "BD"),)

    def build(self) -> torch.nn.Module:
        if self.config.get("broken"):
            raise ValueError("32 groups do not divide 8 channels")
        return Affine()

    def constants(self) -> dict[str, NDArray[Any]]:
        return {"table": np.arange(WIDTH, dtype=np.float32)}

    def weight_names(self, parameter: str) -> tuple[str, ...]:
        return (parameter, f"also.{parameter}")


_traced: dict[str, ir.Model] = {}


@pytest.fixture(autouse=True)
def _traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace once a precision: the tests differ in what happens to the graph then."""
    original = graph._trace

    def once(contract: NetworkContract, where: Path) -> ir.Model:
        if contract.config:
            return original(contract, where)
        if contract.precision not in _traced:
            _traced[contract.precision] = original(contract, where)
        return _traced[contract.precision].clone()

    monkeypatch.setattr(graph, "_trace", once)


def weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "layer.weight": torch.randn(WIDTH, FEATURES, generator=generator).to(dtype),
        "layer.bias": torch.randn(WIDTH, generator=generator).to(dtype),
    }


def saved(root: Path, tensors: dict[str, torch.Tensor]) -> dict[str, StoredTensor]:
    (root / FILE).parent.mkdir(exist_ok=True)
    save_file(tensors, root / FILE)
    return read_header(root / FILE, FILE)


def trace(root: Path, tensors: dict[str, torch.Tensor], precision: Precision = "fp32") -> ir.Model:
    return onnx_from_contract(AffineContract({}, precision), saved(root, tensors), root / "part")


def run(model: ir.Model, root: Path, x: NDArray[np.float32]) -> NDArray[np.float32]:
    file = np.fromfile(root / FILE, np.uint8)
    options = onnxruntime.SessionOptions()
    options.add_external_initializers_from_files_in_memory([weight_location(FILE)], [file], [file.nbytes])
    text = ir.serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(text, options, providers=["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(None, {"x": x})[0]
    return result


def expected(x: NDArray[np.float32], tensors: dict[str, torch.Tensor]) -> NDArray[np.float32]:
    weight, bias = (tensors[f"layer.{name}"].float().numpy() for name in ("weight", "bias"))
    result: NDArray[np.float32] = x @ weight.T + bias + np.arange(WIDTH, dtype=np.float32)
    return result


def inputs(rows: int) -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((rows, FEATURES), np.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_graph_computes_what_the_module_does_whatever_the_weights_are_stored_in(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    tensors = weights(dtype)
    model = trace(tmp_path, tensors)
    for rows in (1, 3):
        np.testing.assert_allclose(run(model, tmp_path, inputs(rows)), expected(inputs(rows), tensors), atol=1e-4)
    casts = [node for node in model.graph if node.op_type == "Cast"]
    assert len(casts) == (0 if dtype == torch.float32 else 2)


def test_one_altered_weight_is_seen(tmp_path: Path) -> None:
    """The twin of the test above."""
    tensors = weights()
    model = trace(tmp_path, tensors)
    damaged = weights()
    damaged["layer.weight"][0, 0] += 1
    save_file(damaged, tmp_path / FILE)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(run(model, tmp_path, inputs(1)), expected(inputs(1), tensors), atol=1e-4)


def test_weights_are_pointed_at_and_never_copied(tmp_path: Path) -> None:
    tensors = weights()
    model = trace(tmp_path, tensors)
    stored = read_header(tmp_path / FILE, FILE)
    for name, known in stored.items():
        tensor = model.graph.initializers[name].const_value
        assert isinstance(tensor, ir.ExternalTensor)
        assert (tensor.location, tensor.offset, tensor.length) == (weight_location(FILE), known.offset, known.nbytes)
    ir.save(model, tmp_path / "affine.onnx")
    assert (tmp_path / "affine.onnx").stat().st_size < 5_000
    assert (tmp_path / FILE).stat().st_size > 200_000


def test_tables_are_kept_in_the_graph(tmp_path: Path) -> None:
    table = trace(tmp_path, weights()).graph.initializers["table"].const_value
    assert table is not None
    assert not isinstance(table, ir.ExternalTensor)
    assert table.numpy().tolist() == list(range(WIDTH))


def test_the_interface_is_the_contracts(tmp_path: Path) -> None:
    model = trace(tmp_path, weights())
    (x,), (y,) = model.graph.inputs, model.graph.outputs
    assert (x.name, str(x.shape), x.dtype) == ("x", f"[batch,{FEATURES}]", ir.DataType.FLOAT)
    assert (y.name, str(y.shape), y.dtype) == ("y", f"[batch,{WIDTH}]", ir.DataType.FLOAT)
    assert model.opset_imports[""] == OPSET
    assert any(node.name is not None and node.name.startswith("layer/") for node in model.graph)


def test_bfloat16_computes_in_bfloat16_from_stored_bfloat16(tmp_path: Path) -> None:
    model = trace(tmp_path, weights(torch.bfloat16), "bf16")
    assert {model.graph.initializers[name].dtype for name in weights()} == {ir.DataType.BFLOAT16}
    casts = [node for node in model.graph if node.op_type == "Cast"]
    assert len(casts) == 2  # of the input and the output, none of a weight


def test_a_tensor_is_found_under_its_other_name(tmp_path: Path) -> None:
    tensors = {f"also.{name}": tensor for name, tensor in weights().items()}
    np.testing.assert_allclose(
        run(trace(tmp_path, tensors), tmp_path, inputs(2)), expected(inputs(2), weights()), atol=1e-4
    )


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"layer.bias": None}, r"part has no tensor layer.bias"),
        ({"layer.bias": torch.zeros(WIDTH + 1)}, r"layer.bias has shape \[201\], the config asks for \[200\]"),
        ({"layer.bias": torch.zeros(1, WIDTH)}, r"layer.bias has shape \[1, 200\], the config asks for \[200\]"),
        ({"layer.bias": torch.zeros(WIDTH, dtype=torch.int64)}, r"layer.bias is I64. fix: .*floating point"),
        ({"layer.bias": torch.zeros(WIDTH).to(torch.float8_e4m3fn)}, r"layer.bias is F8_E4M3. fix: .*floating"),
    ],
    ids=["missing", "longer", "another rank", "integers", "float8"],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path: Path, change: dict[str, torch.Tensor | None], what: str) -> None:
    tensors = {name: tensor for name, tensor in (weights() | change).items() if tensor is not None}
    with pytest.raises(CheckpointError, match=what):
        trace(tmp_path, tensors)


def test_a_config_that_describes_no_network_is_named(tmp_path: Path) -> None:
    contract = AffineContract({"broken": True}, "fp32")
    with pytest.raises(CheckpointError, match=f"{tmp_path}/config.json: 32 groups do not divide 8"):
        onnx_from_contract(contract, {}, tmp_path)


def test_weight_files_have_plain_names() -> None:
    assert weight_location("vae/model-00001-of-00002.safetensors") == "vae.model-00001-of-00002.safetensors"


def test_exported_networks_hold_no_weight_of_the_checkpoint(exported: Exported, tiny: Tiny) -> None:
    bundle, checkpoint = exported("5b"), Checkpoint(tiny("5b"))
    for name, network in bundle.manifest.networks.items():
        model = ir.load(bundle.onnx_path(name))
        component = name.split("_encoder")[0].split("_decoder")[0].replace("text", "text_encoder")
        component = component.replace("modulation", "transformer")
        ranges = {
            (weight_location(stored.file), stored.offset, stored.nbytes)
            for stored in checkpoint.tensors(component).values()
        }
        held = [value.const_value for value in model.graph.initializers.values()]
        external = [tensor for tensor in held if isinstance(tensor, ir.ExternalTensor)]
        assert {tensor.location for tensor in external} == set(network.weights)
        assert {(tensor.location, tensor.offset, tensor.length) for tensor in external} <= ranges
        # What is left are the tables of the transformer and the text encoder.
        tables = {tensor.name for tensor in held if tensor is not None and not isinstance(tensor, ir.ExternalTensor)}
        assert all(
            table and (table in ("buckets",) or ".freqs" in table or table[:3] in ("cos", "sin")) for table in tables
        )
