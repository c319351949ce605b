"""Every network of every model is compiled, for real and without a GPU, and judged."""

import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.bundle.schema import StoredFile
from cvx_deploy.engines.tensorrt.build import BuildRequest, Outcome, build, jobs
from cvx_deploy.engines.tensorrt.compile import BuildSettings, compiled_plans, timing_cache, timing_cache_path
from cvx_deploy.engines.tensorrt.gate import facts_from_graph, judge
from cvx_deploy.engines.tensorrt.libraries import Library, load_library
from cvx_deploy.engines.tensorrt.memory import build_memory
from cvx_deploy.engines.tensorrt.store import EngineStore, Platform
from cvx_deploy.errors import BundleError, EngineError, OutputError
from cvx_deploy.families.cogvideox.models import MODELS
from cvx_deploy.files import sha256_of
from cvx_deploy.pipeline.vae import decode
from cvx_deploy.progress import SilentProgress
from cvx_deploy.shape import Shape
from tests.command import cvx
from tests.conftest import Exported
from tests.engines.tensorrt.test_compiled_plan import INSPECTED_10

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
REQUEST = BuildRequest(targets=("sm89",), batch=(2, 2))
NATIVE = {"float16": "fp16", "bfloat16": "bf16"}
ADA = Platform("NVIDIA GeForce RTX 4090", "sm89", "580.65")


@pytest.fixture(scope="module")
def library() -> Library:
    return load_library("tensorrt-rtx")


@pytest.fixture(scope="module")
def own(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """Return a copy of a tiny bundle that a test may write engines into."""

    def copy(name: str, **request: str) -> Bundle:
        place = tmp_path_factory.mktemp("bundle") / name
        shutil.copytree(exported(name, **request).path, place)
        return Bundle.open(place)

    return copy


@pytest.fixture(scope="module")
def encoder(own: Callable[..., Bundle], library: Library) -> tuple[Bundle, Outcome]:
    """Return a bundle with the engine of its text encoder, the quickest to build."""
    bundle = own("5b", precision="bf16")
    (outcome,) = built(library, bundle, replace(REQUEST, networks=("text_encoder",)))
    return bundle, outcome


def built(library: Library, bundle: Bundle, request: BuildRequest = REQUEST) -> list[Outcome]:
    return list(build(library, bundle, request, SilentProgress()))


WHOLE = "5b"
"""The model of which every network is compiled daily; of others only what is unlike it, their transformers."""


def graph_of(bundle: Bundle, name: str) -> onnx.GraphProto:
    return onnx.ModelProto.FromString(bundle.inside(bundle.manifest.networks[name].file.path).read_bytes()).graph


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param(name, precision, marks=[pytest.mark.nightly] if (name, precision) != (WHOLE, "bf16") else [])
        for name, precision in (*((model.name, NATIVE[model.dtype]) for model in MODELS.values()), (WHOLE, "fp16"))
    ],
)
def test_every_network_of_every_model_compiles_as_expected(
    name: str, precision: str, own: Callable[..., Bundle], library: Library
) -> None:
    bundle = own(name, precision=precision)
    outcomes = built(library, bundle)
    assert {outcome.record.network for outcome in outcomes} == set(bundle.manifest.networks)
    hold_as_expected(bundle, outcomes)


@pytest.mark.parametrize(("name", "precision"), [("2b", "fp16"), ("1.5-5b-i2v", "bf16")])
def test_the_transformer_of_another_kind_of_model_compiles_as_expected(
    name: str, precision: str, own: Callable[..., Bundle], library: Library
) -> None:
    bundle = own(name, only="transformer", precision=precision)
    outcomes = built(library, bundle, replace(REQUEST, networks=("transformer",)))
    assert [outcome.record.network for outcome in outcomes] == ["transformer"]
    hold_as_expected(bundle, outcomes)


def hold_as_expected(bundle: Bundle, outcomes: list[Outcome]) -> None:
    """Hold what was compiled against what its graph says."""
    store = EngineStore(bundle)
    for outcome in outcomes:
        record = outcome.record
        assert store.path(record).stat().st_size == record.file.size > 100_000
        (plan,) = store.plans(record)
        facts = facts_from_graph(
            graph_of(bundle, record.network),
            outcome.role,
            bundle.family.expectation(outcome.role),
            bundle.manifest.networks[record.network].precision,
        )
        assert judge(plan, facts).ok, judge(plan, facts)
        attentions = sum(node.op_type == "Attention" for node in graph_of(bundle, record.network).node)
        assert record.attention == ("fused" if attentions else "none")
        assert sum("mha" in kernel.name for kernel in plan.kernels) == attentions


def test_in_fp32_attention_is_compiled_from_its_parts(own: Callable[..., Bundle], library: Library) -> None:
    bundle = own("5b")
    (outcome,) = built(library, bundle, replace(REQUEST, networks=("transformer",)))
    assert outcome.record.attention == "decomposed"
    (plan,) = EngineStore(bundle).plans(outcome.record)
    assert not any("mha" in kernel.name for kernel in plan.kernels)


def test_an_engine_that_is_there_is_not_built_again(encoder: tuple[Bundle, Outcome], library: Library) -> None:
    bundle, outcome = encoder
    (again,) = built(library, bundle, replace(REQUEST, networks=("text_encoder",)))
    assert again.reused
    assert again.record == outcome.record


def test_an_altered_engine_is_refused_and_built_again(encoder: tuple[Bundle, Outcome], library: Library) -> None:
    bundle, outcome = encoder
    path = EngineStore(bundle).path(outcome.record)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"was altered since it was built\. fix: run: cvx-deploy build"):
        EngineStore(bundle).path(outcome.record)
    (again,) = built(library, bundle, replace(REQUEST, networks=("text_encoder",)))
    assert not again.reused
    assert EngineStore(bundle).path(again.record) == path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"library": "9.9"}, "it was built with tensorrt-rtx .*, here is 9.9"),
        ({"platform": replace(ADA, capability="sm120")}, "it was built for sm89, here is .* \\(sm120\\)"),
        ({"sizes": {"batch": 3}}, "it takes batch 1 to 1, not 3"),
    ],
)
def test_an_engine_that_does_not_fit_is_refused_in_words(
    encoder: tuple[Bundle, Outcome], library: Library, change: dict[str, object], words: str
) -> None:
    asked = {"sizes": {"batch": 1}, "library": library.version, "platform": ADA}
    store = EngineStore(encoder[0])
    assert store.find("tensorrt-rtx", "text_encoder", **asked).network == "text_encoder"  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=f"{words}.* fix: run: cvx-deploy build"):
        store.find("tensorrt-rtx", "text_encoder", **{**asked, **change})  # type: ignore[arg-type]


def test_an_engine_of_another_graph_or_of_other_weights_is_stale(
    encoder: tuple[Bundle, Outcome], library: Library
) -> None:
    bundle, _ = encoder
    manifest, network = bundle.manifest, bundle.manifest.networks["text_encoder"]
    other = replace(network, file=replace(network.file, sha256="0" * 64))
    weights = {name: replace(file, sha256="1" * 64) for name, file in manifest.weights.items()}
    for changed, words in (
        (replace(manifest, networks={**manifest.networks, "text_encoder": other}), "ONNX graph was another one"),
        (replace(manifest, weights=weights), "the weights in text_encoder.* were others"),
    ):
        store = EngineStore(replace(bundle, manifest=changed))
        with pytest.raises(EngineError, match=words):
            store.find("tensorrt-rtx", "text_encoder", {"batch": 1}, library.version, ADA)


def test_a_damaged_record_counts_as_none(encoder: tuple[Bundle, Outcome], library: Library, tmp_path: Path) -> None:
    place = tmp_path / "bundle"
    shutil.copytree(encoder[0].path, place)
    bundle = Bundle.open(place)
    (record,) = (path for path in (place / "engines").glob("*.json") if not path.name.endswith(".plan.json"))
    record.write_text("{")
    with pytest.raises(EngineError, match="has no tensorrt-rtx engine for text_encoder"):
        EngineStore(bundle).find("tensorrt-rtx", "text_encoder", {"batch": 1}, library.version, ADA)


def test_a_record_cannot_lead_out_of_the_bundle(encoder: tuple[Bundle, Outcome]) -> None:
    bundle, outcome = encoder
    away = replace(outcome.record, file=replace(outcome.record.file, path="../away.engine"))
    with pytest.raises(BundleError, match="which lies outside"):
        EngineStore(bundle).path(away)


class Interrupting(SilentProgress):
    """Ctrl-C in the middle of a build."""

    def task(self, description: str, total: int | None = None):  # type: ignore[no-untyped-def]
        @contextmanager
        def shown():  # type: ignore[no-untyped-def]
            def advance(_: int) -> None:
                if description.startswith("build "):
                    raise KeyboardInterrupt

            yield advance

        return shown()


def test_an_interrupted_build_leaves_nothing(own: Callable[..., Bundle], library: Library) -> None:
    bundle = own("5b", precision="bf16")
    request = replace(REQUEST, networks=("text_encoder",))
    with pytest.raises(KeyboardInterrupt):
        list(build(library, bundle, request, Interrupting()))
    left = [path.name for path in (bundle.path / "engines").glob("*")] if (bundle.path / "engines").exists() else []
    assert left == []


def test_a_full_disk_is_said_and_leaves_nothing(
    own: Callable[..., Bundle], library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = own("5b", precision="bf16")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(OutputError, match="where 10 are free"):
        built(library, bundle, replace(REQUEST, networks=("text_encoder",)))
    assert not (bundle.path / "engines").exists()


def test_a_machine_that_is_too_small_is_told_before_the_build(
    own: Callable[..., Bundle], library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=build_memory(0)))
    with pytest.raises(EngineError, match=r"takes about 0\.6 GiB of memory, and 0\.6 GiB are available"):
        built(library, own("5b", precision="bf16"), replace(REQUEST, networks=("text_encoder",)))


def test_a_network_that_the_parser_refuses_names_its_node(own: Callable[..., Bundle], library: Library) -> None:
    bundle = own("5b", precision="bf16")
    path = bundle.onnx_path("text_encoder")
    model = onnx.ModelProto.FromString(path.read_bytes())
    node = next(node for node in model.graph.node if node.op_type == "Softmax")
    node.op_type, node.domain = "Softmux", "made.up"
    model.opset_import.append(onnx.helper.make_opsetid("made.up", 1))
    path.write_bytes(model.SerializeToString())
    network = bundle.network("text_encoder")
    altered = replace(network, file=StoredFile(path.name, path.stat().st_size, sha256_of(path)))
    networks = {**bundle.manifest.networks, bundle.network_name("text_encoder"): altered}
    bundle = replace(bundle, manifest=replace(bundle.manifest, networks=networks))
    with pytest.raises(EngineError, match=f"refuses node {node.name} \\(Softmux\\) of text_encoder: "):
        built(library, bundle, replace(REQUEST, networks=("text_encoder",)))


def test_shapes_that_need_the_same_engine_share_it(exported: Exported) -> None:
    bundle = exported("5b", precision="bf16")
    networks = bundle.manifest.networks
    (entry,) = bundle.manifest.shapes
    longer = replace(entry, shape=Shape(17, 80, 112), networks={**entry.networks, "transformer": "longer"})
    two = replace(bundle.manifest, shapes=(entry, longer), networks={**networks, "longer": networks["transformer"]})
    found = jobs(replace(bundle, manifest=two), REQUEST)
    assert sum(job.role == "text_encoder" for job in found) == 1
    assert sum(job.role == "transformer" for job in found) == 2


def test_tiled_runs_find_an_engine_for_every_tile(exported: Exported) -> None:
    small = exported("5b", precision="bf16")
    (entry,) = small.manifest.shapes
    large = replace(small.manifest, shapes=(replace(entry, shape=Shape(9, 480, 720)),))  # the graphs fit any plane
    bundle = replace(small, manifest=large)
    found = jobs(bundle, replace(REQUEST, vae_tiling=True))
    decoders = [job.profile for job in found if job.role == "vae_decoder_first"]
    loaded: set[tuple[int, int]] = set()

    class Recording:
        """A backend that only remembers the sizes it was asked for."""

        def __init__(self) -> None:
            self.bundle = bundle

        def load(self, role: str, sizes: Mapping[str, int]) -> AbstractContextManager[object]:
            loaded.add((sizes["latent_height"], sizes["latent_width"]))
            return nullcontext(self)

        def run(self, inputs: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
            frames, height, width = inputs["latents"].shape[2:]
            return {"pixels": np.zeros((1, 3, 4 * frames - 3, 8 * height, 8 * width), np.float32)}

        def to_host(self, tensor: NDArray[np.float32]) -> NDArray[np.float32]:
            return tensor

    latents = np.zeros((1, 16, 3, 60, 90), np.float32)
    list(decode(Recording(), latents, tiled=True, advance=lambda _: None))  # type: ignore[arg-type]
    assert {(sizes["latent_height"][0], sizes["latent_width"][0]) for sizes in decoders} == loaded
    assert len(loaded) > 1


def test_other_settings_make_another_engine(encoder: tuple[Bundle, Outcome], library: Library) -> None:
    bundle, outcome = encoder
    settings = BuildSettings(weight_streaming=True, optimization_level=1)
    (other,) = built(library, bundle, replace(REQUEST, networks=("text_encoder",), settings=settings))
    assert other.record.key.digest != outcome.record.key.digest
    assert len(EngineStore(bundle).records()) == 2


def test_timings_are_kept_by_the_name_of_the_gpu(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CVX_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = timing_cache_path(library, ADA.gpu)
    assert path.parent == tmp_path / "cvx-deploy" / "timing"
    assert path.name.startswith("nvidia-geforce-rtx-4090-tensorrt-rtx-")

    class Config:
        """Remembers what it was given; the library for RTX does nothing with timings."""

        def create_timing_cache(self, content: bytes) -> "Config":
            self.given = content
            return self

        def set_timing_cache(self, cache: object, ignore_mismatch: bool) -> None:
            assert cache is self
            assert not ignore_mismatch

        def serialize(self) -> bytes:
            return self.given + b"one more"

    for given in (b"", b"one more"):
        config = Config()
        with timing_cache(config, path):
            assert config.given == given
    assert path.read_bytes() == b"one moreone more"


def test_the_plan_is_asked_of_the_engine_where_the_messages_do_not_tell_it(library: Library, tmp_path: Path) -> None:
    asked = []

    class Engine:
        def create_engine_inspector(self) -> "Engine":
            return self

        def get_engine_information(self, form: object) -> str:
            asked.append(form)
            return json.dumps(INSPECTED_10)

    path = tmp_path / "a.engine"
    path.write_bytes(b"engine")
    (plan,) = compiled_plans(full_library(library, Engine()), [], path, HERE)
    assert plan.source == "engine inspector"
    assert asked == [library.module.LayerInformationFormat.JSON]
    with pytest.raises(EngineError, match="list no kernels"):
        compiled_plans(library, [], path, ("sm89",))


HERE = ("NVIDIA H100 80GB HBM3", "sm90", "driver 580.65")


def full_library(library: Library, engine: Any) -> Library:
    """Return a TensorRT, of the API of the other, which reads an engine file piece by piece and gives `engine`."""

    def deserialize(reader: Any) -> Any:
        assert reader.read(3, 0) == b"eng"
        return engine

    module = SimpleNamespace(
        ILogger=library.module.ILogger,
        IStreamReaderV2=object,
        SeekPosition=library.module.SeekPosition,
        LayerInformationFormat=library.module.LayerInformationFormat,
        Runtime=lambda _: SimpleNamespace(deserialize_cuda_engine=deserialize),
    )
    return Library("tensorrt", module, "10.14")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        (None, "cannot load the new engine"),
        (SimpleNamespace(create_engine_inspector=lambda: None), "does not tell what"),
    ],
)
def test_an_engine_that_cannot_be_opened_again_is_stated(
    engine: Any, said: str, library: Library, tmp_path: Path
) -> None:
    path = tmp_path / "a.engine"
    path.write_bytes(b"engine")
    with pytest.raises(EngineError, match=said):
        compiled_plans(full_library(library, engine), [], path, HERE)


def test_an_rtx_build_on_a_hopper_says_that_the_library_does_not_run_there(own: Callable[..., Bundle]) -> None:
    bundle, library = own("5b", precision="bf16"), load_library("tensorrt-rtx")
    hopper = BuildRequest(platform=Platform("NVIDIA H100 80GB HBM3", "sm90", "580.65"))
    with pytest.raises(EngineError, match=r"does not run on sm90 \(Hopper\)") as raised:
        next(build(library, bundle, hopper, SilentProgress()))
    assert "--engine tensorrt," in raised.value.fix


def test_a_tensorrt_that_is_too_old_is_said_before_anything_is_asked_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("10.13.3.9", "10.14.1.48", "11.0.0"):
        monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__=version))
        if version.startswith("10.13"):
            with pytest.raises(EngineError, match=r"tensorrt 10\.13\.3\.9 is too old: attention needs 10\.14"):
                load_library("tensorrt")
        else:
            assert load_library("tensorrt").version == version


def test_the_command_builds_says_what_fused_and_does_it_once(own: Callable[..., Bundle]) -> None:
    bundle = own("5b", precision="bf16")
    words = ("build", "--bundle", bundle.path, "--target", "rtx4090", "--batch", "2", "--network", "transformer")
    first = json.loads(cvx(*words, "--strict", "--json").out)
    (engine,) = first["engines"]
    assert (engine["targets"], engine["attention"], engine["reused"]) == (["sm89"], "fused", False)
    (finding,) = engine["findings"]
    assert finding["ok"]
    assert finding["fused_attentions"] == finding["attentions"] > 0
    assert json.loads(cvx(*words, "--json").out)["engines"][0]["reused"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--bundle", "{bundle}"), "there is no GPU here to build for"),
        (("--bundle", "{bundle}", "--target", "sm90"), "compiles for sm75, sm80, .*, not for sm90"),
        (("--bundle", "{bundle}", "--target", "rtx4099"), "no figures are known for a GPU called rtx4099"),
        (("--bundle", "{bundle}", "--target", "sm89", "--network", "unet"), "has no network unet"),
        (
            ("--model", "mini", "--engines-dir", "{empty}", "--target", "sm89"),
            "is a part of the package, where nothing is written",
        ),
        (("--bundle", "{bundle}", "--engine", "tensorrt"), "tensorrt is not installed here"),
    ],
)
def test_what_cannot_be_built_is_one_clear_error(
    exported: Exported, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    place = str(exported("5b", precision="bf16").path)
    assert re.search(said, cvx("build", *(word.format(bundle=place, empty=tmp_path) for word in words)).failure())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--target", "sm75"), r"Cannot compile for target\(s\) sm75, because .* b16.* fix: name a newer --target"),
        (("--target", "sm89", "--refit"), r"CUDA_SUCCESS\) failed.* fix: build on a machine with the GPU"),
    ],
)
def test_the_cause_is_said_and_not_what_followed_from_it(
    own: Callable[..., Bundle], options: tuple[str, ...], said: str
) -> None:
    bundle = own("5b", precision="bf16")
    outcome = cvx("build", "--bundle", bundle.path, "--network", "text_encoder", *options)
    assert re.search(said, outcome.failure())
    assert not (bundle.path / "engines").exists()


def test_records_are_plain_json(encoder: tuple[Bundle, Outcome]) -> None:
    bundle, outcome = encoder
    path = bundle.path / "engines" / f"text_encoder-{outcome.record.key.digest}.json"
    assert msgspec.json.decode(path.read_bytes())["key"]["targets"] == ["sm89"]
