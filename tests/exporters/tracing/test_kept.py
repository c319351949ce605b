"""A kept trace is what tracing gives, and is taken for nothing else than what it was traced from."""

import importlib.metadata
import os
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from cvx_deploy.errors import CheckpointError
from cvx_deploy.exporters.cogvideox.modulation import ModulationContract
from cvx_deploy.exporters.cogvideox.text_encoder import TextEncoderContract
from cvx_deploy.exporters.cogvideox.transformer import TransformerContract
from cvx_deploy.exporters.cogvideox.vae import VaeContract
from cvx_deploy.exporters.sources.checkpoint import Checkpoint
from cvx_deploy.exporters.tracing import kept
from cvx_deploy.exporters.tracing.contract import NetworkContract
from cvx_deploy.exporters.tracing.graph import graph_from_contract
from cvx_deploy.exporters.tracing.sources import PACKAGE, sources_of
from cvx_deploy.exporters.tracing.trace import onnx_from_contract
from cvx_deploy.shape import Shape
from tests.conftest import Tiny
from tests.exporters.tracing.test_repeat import meaning
from tests.exporters.tracing.test_trace import AffineContract

HERE = Path("here")

pytestmark = pytest.mark.export


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep traces in a folder of the test's own."""
    monkeypatch.setenv("CVX_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "traces"


@pytest.fixture(scope="module")
def straight(tiny: Tiny) -> bytes:
    """Return the modulation network of the tiny 5b as tracing gives it."""
    return kept._serialized(graph_from_contract(modulation(tiny), HERE))


@pytest.fixture
def traced(straight: bytes, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let every trace be that of one small network, and return a list to which each adds its network's name."""
    names: list[str] = []

    def trace(contract: NetworkContract, where: Path) -> ir.Model:
        names.append(contract.name)
        return ir.from_proto(onnx.ModelProto.FromString(straight))

    monkeypatch.setattr(kept, "graph_from_contract", trace)
    return names


def modulation(tiny: Tiny, **changes: Any) -> ModulationContract:
    return ModulationContract(Checkpoint(tiny("5b")).configs["transformer"] | changes, "bf16")


def graph_of(contract: NetworkContract) -> bytes:
    return kept._serialized(kept.kept_graph(contract, HERE))


def test_a_network_is_traced_once(tiny: Tiny, traced: list[str], straight: bytes) -> None:
    assert [graph_of(modulation(tiny)) for _ in range(3)] == [straight] * 3
    assert traced == ["modulation"]


def test_a_network_from_a_kept_trace_is_the_one_that_tracing_gives(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tiny("5b"))
    contract = VaeContract(checkpoint.configs["vae"], "fp32", "vae_encoder", 1, last=True)
    fresh: list[list[str]] = []

    def trace(contract: NetworkContract, where: Path) -> ir.Model:
        model = graph_from_contract(contract, where)
        fresh.append(meaning(model))
        return model

    monkeypatch.setattr(kept, "graph_from_contract", trace)
    first, second = (
        ir.to_proto(onnx_from_contract(contract, checkpoint.tensors("vae"), HERE)).SerializeToString() for _ in range(2)
    )
    assert first == second
    assert fresh == [meaning(kept.kept_graph(contract, HERE))]


@pytest.mark.parametrize(
    "change",
    ["config", "precision", "network", "tool", "source"],
)
def test_what_a_trace_depends_on_is_part_of_its_key(
    change: str, tiny: Tiny, traced: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contract: NetworkContract = modulation(tiny)
    graph_of(contract)
    if change == "config":
        contract = modulation(tiny, num_layers=5)
    elif change == "precision":
        contract = ModulationContract(contract.config, "fp32")
    elif change == "network":
        contract = TransformerContract(contract.config, "bf16", Shape(9, 80, 112), 8, 4)
    elif change == "tool":
        monkeypatch.setattr(importlib.metadata, "version", lambda tool: f"another {tool}")
    else:
        monkeypatch.setattr(
            kept, "sources_of", lambda *modules: sources_of(*modules, "cvx_deploy.exporters.sources.hub")
        )
    graph_of(contract)
    graph_of(contract)
    assert traced == ["modulation", contract.name]


def test_every_size_has_a_trace_of_its_own(tiny: Tiny, traced: list[str]) -> None:
    config = Checkpoint(tiny("5b")).configs["transformer"]
    sizes = [Shape(9, 80, 112), Shape(9, 112, 80), Shape(17, 80, 112)]
    keys = {kept._key(TransformerContract(config, "fp32", shape, 8, 4)) for shape in sizes}
    vae = Checkpoint(tiny("5b")).configs["vae"]
    keys |= {kept._key(VaeContract(vae, "fp32", "vae_decoder_first", frames, last)) for frames, last in CHUNKS}
    assert len(keys) == len(sizes) + len(CHUNKS)


CHUNKS = [(2, False), (3, False), (3, True)]


@pytest.mark.parametrize("component", ["text_encoder", "vae"])
def test_what_a_trace_does_not_depend_on_changes_nothing_in_it(component: str, tiny: Tiny) -> None:
    config = Checkpoint(tiny("5b")).configs[component]
    words = {"torch_dtype": "float16", "_name_or_path": "elsewhere", "_diffusers_version": "0.99.0"}
    numbers = {"scaling_factor": 0.3, "shift_factor": 0.1, "invert_scale_latents": True}
    other = config | (words if component == "text_encoder" else words | numbers)

    def contract(config: dict[str, Any]) -> NetworkContract:
        if component == "text_encoder":
            return TextEncoderContract(config, "bf16", 7)
        return VaeContract(config, "bf16", "vae_encoder", 1, last=True)

    assert kept._key(contract(other)) == kept._key(contract(config))
    graphs = [meaning(graph_from_contract(contract(each), HERE)) for each in (config, other)]
    assert graphs[0] == graphs[1]


@pytest.mark.parametrize("damage", ["a bit", "cut", "empty"])
def test_a_damaged_trace_is_none(damage: str, tiny: Tiny, traced: list[str], straight: bytes, folder: Path) -> None:
    graph_of(modulation(tiny))
    (entry,) = folder.iterdir()
    data = bytearray(entry.read_bytes())
    data[len(data) // 2] ^= 1
    damaged = {"a bit": bytes(data), "cut": straight[:-1], "empty": b""}
    entry.write_bytes(damaged[damage])
    assert graph_of(modulation(tiny)) == straight
    assert traced == ["modulation"] * 2
    assert [path.name for path in folder.iterdir()] == [entry.name]
    assert graph_of(modulation(tiny)) == straight
    assert len(traced) == 2


def test_where_nothing_can_be_kept_a_network_is_traced_all_the_same(
    tiny: Tiny, traced: list[str], straight: bytes, folder: Path
) -> None:
    folder.parent.write_text("a file in the place of the cache")
    assert [graph_of(modulation(tiny)) for _ in range(2)] == [straight] * 2
    assert traced == ["modulation"] * 2


def test_the_least_recently_used_traces_go_when_they_are_too_many(
    tiny: Tiny, traced: list[str], straight: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "_MOST", int(2.5 * len(straight)))
    contracts = [modulation(tiny, num_layers=layers) for layers in (1, 2, 3)]
    for age, contract in enumerate(contracts[:2]):
        graph_of(contract)
        (entry,) = folder.glob(f"{kept._key(contract)}*")
        os.utime(entry, (1000 + age, 1000 + age))
    graph_of(contracts[0])  # used: the other is the oldest now
    graph_of(contracts[2])
    assert {path.name[:64] for path in folder.iterdir()} == {kept._key(contracts[index]) for index in (0, 2)}


def test_nothing_is_kept_of_a_contract_from_elsewhere(folder: Path) -> None:
    kept.kept_graph(AffineContract({}, "fp32"), HERE)
    assert not folder.exists()


def test_a_config_that_describes_no_network_is_named_and_nothing_kept(tiny: Tiny, folder: Path) -> None:
    config = Checkpoint(tiny("5b")).configs["vae"] | {"norm_num_groups": 7}
    with pytest.raises(CheckpointError, match=r"here/config\.json"):
        kept.kept_graph(VaeContract(config, "fp32", "vae_encoder", 1, last=True), HERE)
    assert not folder.exists()


def test_the_sources_are_all_that_tracing_imports_and_little_else() -> None:
    found = {str(path.relative_to(PACKAGE)) for path in sources_of(kept.__name__, VaeContract.__module__)}
    assert {"exporters/tracing/graph.py", "graph/fold.py", "exporters/cogvideox/vae.py", "precision.py"} <= found
    assert not {path for path in found if path.startswith(("pipeline/", "cli/", "engines/")) or "hub" in path}
    assert not sources_of(AffineContract.__module__)
