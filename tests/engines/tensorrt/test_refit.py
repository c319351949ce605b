"""A bundle with adapters, made from a built one, is to the bit what an export with them makes; and back again."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from cvx_deploy.bundle.opened import MANIFEST, Bundle
from cvx_deploy.bundle.schema import ShapeEntry, StoredFile, WeightFile
from cvx_deploy.engines.tensorrt import libraries, platforms
from cvx_deploy.engines.tensorrt.refit import WEIGHT_TYPES
from cvx_deploy.engines.tensorrt.store import EngineKey, EngineRecord, EngineStore, Platform
from cvx_deploy.engines.weights import mapped_weights
from cvx_deploy.exporters.sources.lora import MERGED
from cvx_deploy.files import sha256_of
from cvx_deploy.parity.verify import verify
from cvx_deploy.progress import SilentProgress
from cvx_deploy.shape import Shape
from tests.command import Outcome, content, cvx
from tests.conftest import Exported, Tiny
from tests.engines.tensorrt.fake_refit import VERSION, Engine, ForgetfulRefitter, Refitter, engine_in, fake_library
from tests.exporters.sources.test_lora import ATTENTION, WIDER, matrices, written
from tests.untraced import without_tracing

ADA = Platform("NVIDIA GeForce RTX 4090", "sm89", "580.65")
TYPES = {onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.BFLOAT16: "BF16", onnx.TensorProto.INT64: "INT64"}
QKV = [f"model.transformer_blocks.0.attn1.to_{name}.weight" for name in "qkv"]


@dataclass(frozen=True)
class Adapters:
    """Two adapters, and the bundle that an export with both makes of the same checkpoint."""

    words: tuple[str, ...]
    exported: Bundle


@pytest.fixture(scope="module")
def adapters(tiny: Tiny, exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    folder = tmp_path_factory.mktemp("adapters")
    first = written(folder / "first.safetensors", matrices(tiny("5b"), ATTENTION, 4, 1))
    second = written(folder / "second.safetensors", matrices(tiny("5b"), WIDER, 7, 2))
    words = ("--lora", f"{first}:0.8", "--lora", f"{second}:-1.3")
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_tracing(monkeypatch, "text_encoder", "vae")
        outcome = cvx(
            *("export", "--model", "5b", "--checkpoint", tiny("5b"), "--precision", "bf16"),
            *("--output", folder / "exported", *words),
        )
    assert outcome.code == 0, outcome
    return Adapters(words, Bundle.open(folder / "exported"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let there be a GPU and a library whose engines are their weights."""
    given(monkeypatch)


def given(monkeypatch: pytest.MonkeyPatch, refitter: type[Refitter] = Refitter, gpu: Platform | None = ADA) -> None:
    monkeypatch.setattr(libraries, "load_library", lambda kind: fake_library(refitter, kind))
    monkeypatch.setattr(platforms, "platform_here", lambda: gpu)


def graph_of(bundle: Bundle, name: str) -> onnx.GraphProto:
    return onnx.ModelProto.FromString(bundle.inside(bundle.manifest.networks[name].file.path).read_bytes()).graph


def weights_of(bundle: Bundle, name: str = "transformer") -> dict[str, tuple[str, bytes]]:
    """Return what an engine of a network holds: every weight's type and bytes."""
    graph = graph_of(bundle, name)
    external = mapped_weights(bundle, name, graph, SilentProgress())
    return {
        tensor.name: (TYPES[tensor.data_type], external[tensor.name].tobytes() if tensor.name in external else raw)
        for tensor in graph.initializer
        if (raw := tensor.raw_data) or tensor.name in external
    }


def build(bundle: Bundle, engine: Engine, name: str = "transformer", **key: Any) -> EngineRecord:
    """Put an engine into a bundle as `cvx-deploy build` does."""
    store = EngineStore(bundle)
    wanted = store.wanted(name, VERSION, None)
    settings = {"refit": True, "strip_weights": False}
    made = EngineKey("tensorrt-rtx", wanted.graph, wanted.weights, {}, settings, VERSION, ("sm120", "sm89"))
    made = replace(made, **key)
    store.folder.mkdir(exist_ok=True)
    path = store.folder / f"{name}-{made.digest}.engine"
    path.write_bytes(engine.to_bytes())
    plan = path.with_suffix(".plan.json")
    plan.write_text("[]\n")
    files = [StoredFile(f"engines/{file.name}", file.stat().st_size, sha256_of(file)) for file in (path, plan)]
    mtime = path.stat().st_mtime_ns
    record = EngineRecord(made, name, files[0], mtime, files[1], "fused", 83.0, 1, 1, "2026-01-01T00:00:00Z")
    store.keep(record)
    return record


@pytest.fixture
def own(exported: Exported, tmp_path: Path) -> Callable[..., Bundle]:
    """Return a copy of the tiny bundle, at a path such as engines/5b."""

    def copy(**request: Any) -> Bundle:
        shutil.copytree(exported("5b", **{"precision": "bf16", **request}).path, tmp_path / "engines" / "5b")
        return Bundle.open(tmp_path / "engines" / "5b")

    return copy


@pytest.fixture
def base(own: Callable[..., Bundle]) -> Bundle:
    """Return a bundle with engines of its transformer, of its modulation and of its text encoder."""
    bundle = own()
    build(bundle, Engine(weights_of(bundle, "modulation")), "modulation")
    build(bundle, Engine(weights_of(bundle), combined=[QKV]))
    build(bundle, Engine(weights_of(bundle, "text_encoder")), "text_encoder")
    return bundle


def refit(bundle: Bundle, *words: object) -> Outcome:
    return cvx("refit", "--bundle", bundle.path, *words)


def refitted(bundle: Bundle, *words: object) -> Bundle:
    outcome = refit(bundle, "--name", "5b-style", *words)
    assert outcome.code == 0, outcome
    return Bundle.open(bundle.path.with_name("5b-style"))


def engine_of(bundle: Bundle, name: str = "transformer") -> Engine:
    """Return the engine that a run of the bundle finds."""
    store = EngineStore(bundle)
    return engine_in(store.path(store.find("tensorrt-rtx", name, {}, VERSION, ADA)))


def at_no_time(weights: dict[str, WeightFile]) -> dict[str, WeightFile]:
    return {name: replace(entry, mtime_ns=0) for name, entry in weights.items()}


def changed(before: dict[str, Any], after: dict[str, Any]) -> int:
    assert before.keys() == after.keys()
    return sum(before[name] != after[name] for name in before)


@pytest.mark.usefixtures("gpu")
def test_a_refitted_engine_has_the_weights_of_an_export_with_the_same_adapters(
    base: Bundle, adapters: Adapters
) -> None:
    before = content(base.path)
    bundle = refitted(base, *adapters.words)
    engine = engine_of(bundle)
    assert engine.weights == weights_of(adapters.exported)
    assert engine.refittable
    assert changed(weights_of(base), engine.weights) == 6
    assert engine_of(bundle, "modulation").weights == weights_of(adapters.exported, "modulation")
    assert changed(weights_of(base, "modulation"), engine_of(bundle, "modulation").weights) == 1
    assert content(base.path) == before


def test_a_weight_that_is_left_out_is_found(
    own: Callable[..., Bundle], adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(monkeypatch, ForgetfulRefitter)
    bundle = own()
    build(bundle, Engine(weights_of(bundle)))
    engine = engine_of(refitted(bundle, *adapters.words))
    assert engine.weights != weights_of(adapters.exported)
    assert changed(weights_of(adapters.exported), engine.weights) == 1


def test_the_library_has_all_that_is_called_and_takes_weights_where_they_are_mapped() -> None:
    api = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    for owner, names in {
        api.Refitter: "get_all_weights set_named_weights get_missing_weights refit_cuda_engine",
        api.ICudaEngine: "refittable create_serialization_config serialize_with_config",
        api.ISerializationConfig: "set_flag clear_flag",
        api.SerializationFlag: "EXCLUDE_WEIGHTS INCLUDE_REFIT",
        api.IHostMemory: "nbytes",
    }.items():
        assert [name for name in names.split() if not hasattr(owner, name)] == []
    content = np.arange(12, dtype=np.uint8)
    for name, itemsize in WEIGHT_TYPES.values():
        weights = api.Weights(getattr(api.DataType, name), content.ctypes.data, 1)
        assert weights.nbytes == itemsize


@pytest.mark.usefixtures("gpu")
def test_graph_and_manifest_are_those_of_an_export_with_the_same_adapters(base: Bundle, adapters: Adapters) -> None:
    bundle, expected = refitted(base, *adapters.words), adapters.exported
    assert bundle.onnx_path("transformer").read_bytes() == expected.onnx_path("transformer").read_bytes()
    assert bundle.onnx_path("transformer").read_bytes() != base.onnx_path("transformer").read_bytes()
    found = bundle.manifest
    assert found.networks["transformer"] == expected.manifest.networks["transformer"]
    assert (found.loras, found.provenance) == (expected.manifest.loras, expected.manifest.provenance)
    assert at_no_time(found.weights) == at_no_time(expected.manifest.weights)
    assert bundle.remedy.replace(str(bundle.path), str(expected.path)) == expected.remedy
    # Whoever exports the bundle as its remedy says finds the engine again.
    wanted = EngineStore(expected).wanted("transformer", VERSION, ADA)
    assert EngineStore(bundle).find("tensorrt-rtx", "transformer", {}, VERSION, ADA).key.misfits(wanted) == []


@pytest.mark.usefixtures("gpu")
def test_a_refitted_bundle_is_sound_and_brings_the_other_engines(base: Bundle, adapters: Adapters) -> None:
    bundle = refitted(base, *adapters.words)
    assert not verify(bundle, SilentProgress(), quick=True).unsound
    assert engine_of(bundle, "text_encoder") == engine_of(base, "text_encoder")
    built = {record.network for record in EngineStore(bundle).records()}
    assert built == {"modulation", "text_encoder", "transformer"}
    # What it held for another GPU was not loaded on this one.
    assert EngineStore(bundle).find("tensorrt-rtx", "transformer", {}, VERSION, ADA).key.targets == ("sm89",)


@pytest.mark.usefixtures("gpu")
def test_restoring_brings_back_the_base_weights_to_the_bit(base: Bundle, adapters: Adapters) -> None:
    bundle = refitted(base, *adapters.words)
    outcome = refit(bundle, "--restore", "--json")
    assert sum(engine["changed_weights"] for engine in json.loads(outcome.out)["engines"]) == 7
    restored = Bundle.open(bundle.path)
    assert engine_of(restored).weights == weights_of(base) == engine_of(base).weights
    assert restored.manifest == base.manifest
    assert not (restored.path / MERGED).exists()
    assert restored.onnx_path("transformer").read_bytes() == base.onnx_path("transformer").read_bytes()
    assert engine_of(restored, "text_encoder") == engine_of(base, "text_encoder")


@pytest.mark.usefixtures("gpu")
def test_what_was_restored_can_be_refitted_again(base: Bundle, adapters: Adapters) -> None:
    style = refitted(base, *adapters.words)
    assert refit(style, "--restore").code == 0
    outcome = refit(style, *adapters.words, "--output", style.path.with_name("again"))
    assert outcome.code == 0, outcome
    assert engine_of(Bundle.open(style.path.with_name("again"))).weights == weights_of(adapters.exported)


@pytest.mark.usefixtures("gpu")
def test_a_bundle_with_its_own_weights_needs_no_checkpoint(
    own: Callable[..., Bundle], adapters: Adapters, tmp_path: Path
) -> None:
    linked = own()
    packed = tmp_path / "5b.cvx"
    assert cvx("pack", "--bundle", linked.path, "--output", packed).code == 0
    assert cvx("unpack", packed, "--output", tmp_path / "engines" / "copied").code == 0
    copied = Bundle.open(tmp_path / "engines" / "copied")
    away = Bundle(copied.path, replace(copied.manifest, checkpoint=str(tmp_path / "away")))
    (away.path / MANIFEST).write_bytes(away.manifest.to_json())
    build(away, Engine(weights_of(away)))
    bundle = refitted(away, *adapters.words)
    assert engine_of(bundle).weights == weights_of(adapters.exported)
    assert all(entry.in_bundle for entry in bundle.manifest.weights.values())
    assert refit(bundle, "--restore").code == 0
    assert engine_of(Bundle.open(bundle.path)).weights == weights_of(away)


@pytest.mark.usefixtures("gpu")
def test_an_engine_without_weights_gets_all_of_them(own: Callable[..., Bundle], adapters: Adapters) -> None:
    bundle = own()
    stripped = {name: (dtype, b"") for name, (dtype, _) in weights_of(bundle).items()}
    build(bundle, Engine(stripped), settings={"refit": True, "strip_weights": True})
    style = refitted(bundle, *adapters.words)
    assert engine_of(style).weights == weights_of(adapters.exported)
    (record,) = EngineStore(style).records()
    assert record.key.settings == {"refit": True, "strip_weights": False}


def with_another_shape(bundle: Bundle) -> Bundle:
    """Give a bundle a second video size, whose transformer is a network of its own."""
    manifest, second = bundle.manifest, "transformer_17x80x112"
    network = manifest.networks["transformer"]
    shutil.copy(bundle.onnx_path("transformer"), bundle.path / f"{second}.onnx")
    file = replace(network.file, path=f"{second}.onnx")
    entry = manifest.shapes[0]
    entries = (entry, ShapeEntry(Shape(17, 80, 112), {**entry.networks, "transformer": second}))
    networks = {**manifest.networks, second: replace(network, file=file)}
    (bundle.path / MANIFEST).write_bytes(replace(manifest, shapes=entries, networks=networks).to_json())
    return Bundle.open(bundle.path)


@pytest.mark.usefixtures("gpu")
def test_every_video_size_gets_the_adapters_and_one_without_an_engine_is_named(
    own: Callable[..., Bundle], adapters: Adapters
) -> None:
    bundle = with_another_shape(own())
    build(bundle, Engine(weights_of(bundle)))
    outcome = refit(bundle, "--name", "5b-style", *adapters.words)
    assert "transformer_17x80x112 has no engine that can be refitted" in outcome.err
    style = Bundle.open(bundle.path.with_name("5b-style"))
    assert weights_of(style, "transformer_17x80x112") == weights_of(adapters.exported)
    build(bundle, Engine(weights_of(bundle)), "transformer_17x80x112")
    build(bundle, Engine(weights_of(bundle, "modulation")), "modulation")
    assert "no engine" not in refit(bundle, "--name", "5b-style", *adapters.words).err
    assert {record.network for record in EngineStore(style).records()} == {
        "modulation",
        "transformer",
        "transformer_17x80x112",
    }
    store = EngineStore(style.at(Shape(17, 80, 112)))
    assert engine_in(store.path(store.find("tensorrt-rtx", "transformer", {}, VERSION, ADA))) == engine_of(style)


def told(outcome: Outcome, what: str, fix: str) -> None:
    line = outcome.failure()
    assert what in line, line
    assert fix in line.partition(". fix: ")[2], line


def test_without_a_gpu_nothing_is_merged(base: Bundle, adapters: Adapters, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, gpu=None)
    monkeypatch.setattr("cvx_deploy.exporters.rewire.write_merged", lambda *_: pytest.fail("weights were merged"))
    outcome = refit(base, "--name", "5b-style", *adapters.words)
    told(outcome, "there is no GPU here", "merge the weights with cvx-deploy export --lora")
    assert [path.name for path in base.path.parent.iterdir()] == ["5b"]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("key", "what"),
    [
        ({"settings": {"refit": False, "strip_weights": True}}, "was built without --refit"),
        ({"targets": ("sm120",)}, "it was built for sm120, here is NVIDIA GeForce RTX 4090 (sm89)"),
        ({"library": "9.9"}, "it was built with tensorrt-rtx 9.9, here is 1.2.3"),
        ({"graph": "0" * 64}, "the ONNX graph was another one"),
    ],
)
def test_an_engine_that_cannot_be_refitted_says_how_to_build_one(
    own: Callable[..., Bundle], adapters: Adapters, key: dict[str, Any], what: str
) -> None:
    bundle = own()
    build(bundle, Engine(weights_of(bundle)), **key)
    fix = f"run: cvx-deploy build --bundle {bundle.path} --engine tensorrt-rtx --target sm89 --refit"
    told(refit(bundle, "--name", "5b-style", *adapters.words), what, fix)
    assert not bundle.path.with_name("5b-style").exists()


@pytest.mark.usefixtures("gpu")
def test_a_bundle_without_an_engine_says_how_to_build_one(own: Callable[..., Bundle], adapters: Adapters) -> None:
    bundle = own()
    outcome = refit(bundle, "--name", "5b-style", *adapters.words)
    told(outcome, "has no engine for transformer", f"cvx-deploy build --bundle {bundle.path} --refit")


@pytest.mark.usefixtures("gpu")
def test_what_the_engine_refuses_leaves_nothing(own: Callable[..., Bundle], adapters: Adapters) -> None:
    bundle = own()
    weights = weights_of(bundle)
    unknown = {name: value for name, value in weights.items() if name != QKV[0]}
    other = {**weights, QKV[0]: ("HALF", weights[QKV[0]][1])}
    for engine, what in (
        (Engine(unknown), f"knows no weight {QKV[0]} that could be exchanged"),
        (Engine(other), f"refuses the weight {QKV[0]} of transformer: the type or the size"),
        (Engine({**weights, "x": ("FLOAT", b"")}), "asks for a weight x, which cannot be given"),
        (Engine(weights, refittable=False), "cannot be refitted"),
    ):
        build(bundle, engine)
        assert what in refit(bundle, "--name", "5b-style", *adapters.words).failure()
        assert [path.name for path in bundle.path.parent.iterdir()] == ["5b"]


@pytest.mark.usefixtures("gpu")
def test_weights_of_another_type_are_left_to_an_export(own: Callable[..., Bundle], adapters: Adapters) -> None:
    bundle = own(precision="fp32")  # the checkpoint is stored in bf16
    build(bundle, Engine({}))
    outcome = refit(bundle, "--name", "5b-style", *adapters.words)
    told(outcome, "is stored as BF16", " ".join(("--precision fp32 --output", str(bundle.path.with_name("5b-style")))))
    assert " ".join(adapters.words) in outcome.failure()
    assert not bundle.path.with_name("5b-style").exists()


@pytest.mark.usefixtures("gpu")
def test_a_lora_for_another_model_is_refused(base: Bundle, tmp_path: Path) -> None:
    state = {"proj.lora_A.weight": torch.zeros(4, 8), "proj.lora_B.weight": torch.zeros(8, 4)}
    outcome = refit(base, "--name", "5b-style", "--lora", written(tmp_path / "other.safetensors", state))
    assert "is for a layer that this checkpoint has not" in outcome.failure()
    assert [path.name for path in base.path.parent.iterdir()] == ["5b"]


@pytest.mark.usefixtures("gpu")
def test_adapters_are_not_put_on_top_of_others_nor_taken_out_of_none(base: Bundle, adapters: Adapters) -> None:
    told(refit(base, "--restore"), "has no adapters merged into it", "use it as it is")
    style = refitted(base, *adapters.words)
    outcome = refit(style, "--name", "twice", *adapters.words)
    told(outcome, "has adapters merged into it already", f"cvx-deploy refit --bundle {style.path} --restore")
    told(refit(base, "--output", base.path, *adapters.words), "is the bundle itself", "another --output")


def test_what_is_wanted_must_be_clear(base: Bundle) -> None:
    for words in ((), ("--lora", "a"), ("--lora", "a", "--restore"), ("--restore", "--name", "b")):
        assert refit(base, *words).code == 2
    assert refit(base, "--lora", "a", "--name", "../b").code == 2
