"""A sound bundle has no findings, and every kind of damage has one; all of them are told, not only the first."""

import hashlib
import importlib.util
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from cvx_deploy.bundle.opened import MANIFEST, Bundle
from cvx_deploy.engines.onnxruntime.backend import OrtBackend
from cvx_deploy.errors import EngineError
from cvx_deploy.install import pip_install
from cvx_deploy.parity.verify import FileReport, NetworkReport, Verification, verify
from cvx_deploy.progress import SilentProgress
from tests.command import content, cvx
from tests.conftest import Exported

Json = Any
VAE = "vae.diffusion_pytorch_model.safetensors"
NETWORK = "vae_decoder_first"


@pytest.fixture
def bundle(exported: Exported, tmp_path: Path) -> Bundle:
    """A copy of a bundle, and of its checkpoint, that a test may damage."""
    original = exported("5b")
    shutil.copytree(original.manifest.checkpoint, tmp_path / "checkpoint")
    shutil.copytree(original.path, tmp_path / "bundle")
    return edited(tmp_path / "bundle", lambda raw: raw.update(checkpoint=str(tmp_path / "checkpoint")))


def edited(path: Path, change: Callable[[Json], object]) -> Bundle:
    """Change a bundle's manifest."""
    raw = json.loads((path / MANIFEST).read_bytes())
    change(raw)
    (path / MANIFEST).write_text(json.dumps(raw))
    return Bundle.read(path)


def regraphed(bundle: Bundle, change: Callable[[onnx.ModelProto], object], name: str = NETWORK) -> Bundle:
    """Change a graph, and let the manifest know its new hash."""
    path = bundle.inside(bundle.manifest.networks[name].file.path)
    model = onnx.load_model(path, load_external_data=False)
    change(model)
    data = model.SerializeToString()
    path.write_bytes(data)
    stored = {"path": path.name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return edited(bundle.path, lambda raw: raw["networks"][name].update(file=stored))


def found(bundle: Bundle, **options: bool) -> dict[str, list[str]]:
    """Return all findings by part."""
    report = verify(bundle, SilentProgress(), **options)
    parts: dict[str, FileReport | NetworkReport] = {"tokenizer": report.tokenizer, **report.weights, **report.networks}
    assert report.unsound == tuple(name for name, part in parts.items() if part.findings)
    return {name: list(parts[name].findings) for name in report.unsound}


def only(findings: dict[str, list[str]], part: str) -> str:
    """Return the one finding, after making sure of which part it is."""
    assert list(findings) == [part], findings
    [finding] = findings[part]
    assert "\n" not in finding
    return finding


def weights_of(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    return [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]


def put(tensor: onnx.TensorProto, key: str, value: object) -> None:
    """Change one entry of where a weight lies."""
    [entry] = [entry for entry in tensor.external_data if entry.key == key]
    entry.value = str(value)


def place(tensor: onnx.TensorProto, key: str) -> int:
    return int(next(entry.value for entry in tensor.external_data if entry.key == key))


def flip(path: Path, at: int = -1) -> None:
    """Alter a byte of a file and leave its time stamp as it was."""
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_sound_bundle_has_no_findings(bundle: Bundle) -> None:
    before = content(bundle.path.parent)
    report = verify(bundle, SilentProgress())
    assert report.unsound == ()
    assert report.networks.keys() == bundle.manifest.networks.keys()
    assert report.weights.keys() == bundle.manifest.weights.keys()
    for network in report.networks.values():
        assert network.opset == 23
        assert min(network.nodes, network.weights) > 15
        assert network.loaded == ()
    assert content(bundle.path.parent) == before


def test_a_flipped_byte_of_a_weight_is_found_under_the_same_time_stamp(bundle: Bundle) -> None:
    path = bundle.locate_weight(VAE)
    flip(path)
    assert bundle.weight_path(VAE, SilentProgress()) == path  # a run would not have noticed
    assert only(found(bundle), VAE) == f"{path} was altered since the bundle {bundle.path} was made"
    assert not verify(bundle, SilentProgress(), quick=True).unsound
    os.utime(path)
    assert verify(bundle, SilentProgress(), quick=True).unsound == (VAE,)


def test_a_truncated_weight_file_is_found(bundle: Bundle) -> None:
    path = bundle.locate_weight(VAE)
    os.truncate(path, path.stat().st_size - 7)
    assert f"{path} has " in only(found(bundle), VAE)


def test_a_missing_weight_file_is_found_and_graphs_are_checked_all_the_same(bundle: Bundle) -> None:
    path = bundle.locate_weight(VAE)
    path.unlink()
    bundle = regraphed(bundle, lambda model: model.graph.node.pop(40))
    findings = found(bundle)
    assert findings[VAE] == [f"{path} is missing"]
    assert list(findings) == [VAE, NETWORK]


def test_an_altered_tokenizer_is_found(bundle: Bundle) -> None:
    flip(bundle.path / "tokenizer.json")
    assert "tokenizer.json was altered" in only(found(bundle), "tokenizer")


@pytest.mark.parametrize("size", [0, 1000])
def test_a_truncated_graph_is_found(bundle: Bundle, size: int) -> None:
    path = bundle.path / f"{NETWORK}.onnx"
    os.truncate(path, size)
    findings = found(bundle)
    assert list(findings) == [NETWORK]
    assert f"{path} has {size:,} bytes instead of" in findings[NETWORK][0]
    assert len(findings[NETWORK]) > 1


def test_a_graph_outside_the_bundle_is_found_and_not_opened(bundle: Bundle) -> None:
    bundle = edited(bundle.path, lambda raw: raw["networks"][NETWORK]["file"].update(path="../secret.onnx"))
    assert "names '../secret.onnx', which lies outside" in only(found(bundle), NETWORK)


def flatten(model: onnx.ModelProto) -> None:
    """Give a weight another shape of as many elements."""
    weight = next(tensor for tensor in weights_of(model) if len(tensor.dims) > 1)
    weight.dims[:] = [math.prod(weight.dims)]


DAMAGED_GRAPHS: dict[str, tuple[Callable[[onnx.ModelProto], object], list[str]]] = {
    "a moved offset": (
        lambda model: put(weights_of(model)[3], "offset", place(weights_of(model)[3], "offset") + 4),
        ["and no tensor of the file does"],
    ),
    "an offset past the end": (lambda model: put(weights_of(model)[3], "offset", 10**12), ["ends at byte 1,000,0"]),
    "a negative offset": (lambda model: put(weights_of(model)[3], "offset", -8), ["ends at byte"]),
    "an offset in letters": (lambda model: put(weights_of(model)[3], "offset", "four"), ["has no byte range"]),
    "a wrong length": (lambda model: put(weights_of(model)[3], "length", 3), ["has 3 bytes, where BFLOAT16 of "]),
    "another shape": (flatten, [" in the file", "shape inference: "]),
    "another location": (
        lambda model: put(weights_of(model)[3], "location", "../../etc/passwd"),
        ["lies in '../../etc/passwd', which the manifest does not give this network"],
    ),
    "a weight of another type": (
        lambda model: setattr(weights_of(model)[3], "data_type", onnx.TensorProto.FLOAT16),
        [" is F16 of "],
    ),
    "a type that is never stored": (
        lambda model: setattr(weights_of(model)[3], "data_type", onnx.TensorProto.STRING),
        ["is of type STRING, which no weight file has"],
    ),
    "a dropped node": (
        lambda model: model.graph.node.pop(40),
        ["onnx.checker: Nodes in a graph must be topologically"],
    ),
    "an unknown operator": (
        lambda model: setattr(model.graph.node[40], "op_type", "Magic"),
        ["onnx.checker: No Op registered for Magic"],
    ),
    "another output size": (
        lambda model: setattr(model.graph.output[0].type.tensor_type.shape.dim[1], "dim_value", 4),
        ["output pixels is float32 (1, 4, ", "shape inference: "],
    ),
    "another output type": (
        lambda model: setattr(model.graph.output[0].type.tensor_type, "elem_type", onnx.TensorProto.FLOAT16),
        ["output pixels is float16", "shape inference: "],
    ),
    "an opset of the future": (
        lambda model: setattr(model.opset_import[0], "version", 999),
        ["opset 999 is not one that onnx"],
    ),
    "no opset": (lambda model: model.opset_import.pop(), ["opset 0 is not one", "onnx.checker: ", "shape inference: "]),
    "foreign operators": (
        lambda model: model.opset_import.append(onnx.helper.make_opsetid("com.example", 1)),
        ["it uses operators of com.example, which onnx does not know"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGED_GRAPHS)
def test_damage_to_a_graph_whose_hash_is_right_is_found(bundle: Bundle, damage: str) -> None:
    change, expected = DAMAGED_GRAPHS[damage]
    findings = found(regraphed(bundle, change))
    assert list(findings) == [NETWORK]
    assert len(findings[NETWORK]) == len(expected), findings
    for finding, part in zip(findings[NETWORK], expected, strict=True):
        assert part in finding
        assert "\n" not in finding


def spec(raw: Json, kind: str) -> Json:
    return raw["networks"]["transformer"][kind][0]


DAMAGED_MANIFESTS: dict[str, tuple[Callable[[Json], object], str]] = {
    "a wrong type": (
        lambda raw: spec(raw, "inputs").update(dtype="float16"),
        "input hidden_states is float32 (batch, {frames}, 16, 10, 14), and float16 (batch, {frames}, 16, 10, 14) in",
    ),
    "a wrong size": (lambda raw: spec(raw, "outputs")["shape"].__setitem__(1, 4), "output noise_pred is float32"),
    "a wrong symbol": (
        lambda raw: spec(raw, "inputs")["shape"].__setitem__(0, "videos"),
        "(videos, {frames}, 16, 10, 14)",
    ),
    "a wrong name": (lambda raw: spec(raw, "inputs").update(name="latents"), "its inputs are hidden_states, "),
    "a missing input": (lambda raw: raw["networks"]["transformer"]["inputs"].pop(), "its inputs are hidden_states, "),
    "a weight file too many": (
        lambda raw: raw["networks"]["transformer"]["weights"].append(VAE),
        f"the manifest gives it {VAE}, which it does not use",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED_MANIFESTS)
def test_a_manifest_that_is_not_the_graphs_is_found(bundle: Bundle, damage: str) -> None:
    change, what = DAMAGED_MANIFESTS[damage]
    frames = bundle.manifest.networks["transformer"].inputs[0].shape[1]
    assert what.format(frames=frames) in only(found(edited(bundle.path, change)), "transformer")


def test_a_weight_file_that_the_manifest_forgot_is_found_for_every_weight(bundle: Bundle) -> None:
    findings = found(edited(bundle.path, lambda raw: raw["weights"].pop(VAE)))
    count = len(weights_of(onnx.load_model(bundle.path / f"{NETWORK}.onnx", load_external_data=False)))
    assert len(findings[NETWORK]) == count
    assert set(findings) == {name for name in bundle.manifest.networks if name.startswith("vae")}


def several(bundle: Bundle) -> Bundle:
    """Damage three parts."""
    flip(bundle.locate_weight(VAE))
    flip(bundle.path / "tokenizer.json")
    return regraphed(bundle, lambda model: put(weights_of(model)[3], "offset", 10**12))


def test_everything_that_is_wrong_is_told_and_the_exit_code_is_1(bundle: Bundle) -> None:
    several(bundle)
    outcome = cvx("verify", "--bundle", bundle.path)
    line = outcome.failure()
    assert line.startswith(f"error: {bundle.path} is not sound: see tokenizer, {VAE}, {NETWORK}. fix: run: cvx-deploy")
    assert sum(word in outcome.out for word in ("tokenizer.json was altered", "made", "ends at byte")) == 3
    assert outcome.out.count("WRONG") == 3


def test_the_json_of_an_unsound_bundle_is_one_object_with_every_finding(bundle: Bundle) -> None:
    several(bundle)
    outcome = cvx("verify", "--bundle", bundle.path, "--json")
    values = json.loads(outcome.out)
    assert outcome.failure() == f"error: {values['error']['what']}. fix: {values['error']['fix']}."
    assert values["sound"] is False
    assert len(values["tokenizer"]["findings"]) == len(values["weights"][VAE]["findings"]) == 1
    assert [name for name, network in values["networks"].items() if network["findings"]] == [NETWORK]


def test_a_sound_bundle_exits_with_0_and_says_what_was_looked_at(bundle: Bundle) -> None:
    outcome = cvx("verify", "--bundle", bundle.path, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert json.loads(outcome.out)["sound"] is True
    text = cvx("verify", "--bundle", bundle.path).out
    assert all(f"ok     {name}: " in text for name in (*bundle.manifest.networks, *bundle.manifest.weights))


def test_a_moved_checkpoint_can_be_named(bundle: Bundle) -> None:
    moved = bundle.path.parent / "moved"
    Path(bundle.manifest.checkpoint).rename(moved)
    assert f"{VAE}: " in cvx("verify", "--bundle", bundle.path).out.split("WRONG", 1)[1]
    assert cvx("verify", "--bundle", bundle.path, "--checkpoint", moved).code == 0


def test_without_onnx_the_command_says_what_to_install(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else find(name))
    line = cvx("verify", "--bundle", bundle.path).failure()
    assert line.startswith("error: this command needs onnx, ")
    assert pip_install("export") in line


def loaded(report: Verification) -> dict[str, tuple[str, ...]]:
    return {name: network.loaded for name, network in report.networks.items()}


def test_every_network_loads_at_every_shape(bundle: Bundle) -> None:
    def add_shape(raw: Json) -> None:
        entry = json.loads(json.dumps(raw["shapes"][0]))
        entry["shape"]["height"] += 16
        raw["shapes"].append(entry)

    bundle = edited(bundle.path, add_shape)
    report = verify(bundle, SilentProgress(), load=True)
    shapes = tuple(map(str, bundle.shapes))
    assert len(shapes) == 2
    assert report.unsound == ()
    assert loaded(report) == dict.fromkeys(bundle.manifest.networks, shapes)


def test_what_the_engine_refuses_is_a_finding_and_what_is_unsound_is_not_loaded(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = OrtBackend.load

    def refusing(backend: OrtBackend, role: str, sizes: dict[str, int]) -> Any:
        assert role != NETWORK
        if role == "transformer":
            raise EngineError("ONNX Runtime cannot load transformer: no", fix="none")
        return load(backend, role, sizes)

    monkeypatch.setattr(OrtBackend, "load", refusing)
    bundle = regraphed(bundle, lambda model: put(weights_of(model)[3], "offset", 10**12))
    report = verify(bundle, SilentProgress(), load=True)
    assert report.networks["transformer"].findings == ("ONNX Runtime cannot load transformer: no",)
    assert {name for name, shapes in loaded(report).items() if not shapes} == {"transformer", NETWORK}


def test_bf16_is_verified_and_said_not_to_load(exported: Exported) -> None:
    report = verify(exported("5b", precision="bf16"), SilentProgress(), load=True)
    assert report.unsound == ()
    assert not any(loaded(report).values())
    assert "computes in bf16, which ONNX Runtime has no CPU kernels for" in report.notes[0]
    assert report.notes[0] in str(report)
