"""Which shape is exported, in which networks, and what a bundle says of its checkpoint."""

import functools
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cvx_deploy.bundle.opened import MANIFEST, Bundle
from cvx_deploy.errors import BundleError, CheckpointError, OutputError, ShapeError
from cvx_deploy.exporters.cogvideox.vae import VaeContract
from cvx_deploy.exporters.export import ExportRequest, bundle_from_checkpoint, named_contracts, shapes_of
from cvx_deploy.exporters.networks import contracts_for
from cvx_deploy.exporters.sources.checkpoint import Checkpoint
from cvx_deploy.exporters.sources.synth_configs import (
    Scale,
    model_index,
    scheduler_config,
    text_encoder_config,
    transformer_config,
    vae_config,
)
from cvx_deploy.exporters.tracing.contract import NetworkContract
from cvx_deploy.families.cogvideox.models import MODELS
from cvx_deploy.precision import Precision
from cvx_deploy.progress import SilentProgress
from cvx_deploy.quantize.recipe import Recipe
from cvx_deploy.shape import Shape
from tests.command import content
from tests.conftest import Tiny
from tests.untraced import without_tracing


@pytest.fixture
def _untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    without_tracing(monkeypatch)


def configs(root: Path, name: str, scale: Scale) -> Checkpoint:
    """Write a checkpoint's configs without its weights."""
    model = MODELS[name]
    for path, config in {
        "model_index.json": model_index(model),
        "scheduler/scheduler_config.json": scheduler_config(model),
        "transformer/config.json": transformer_config(model, scale),
        "vae/config.json": vae_config(model, scale),
        "text_encoder/config.json": text_encoder_config(model, scale),
    }.items():
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text(json.dumps(config))
    return Checkpoint(root)


def asked(name: str, **sizes: Any) -> ExportRequest:
    return ExportRequest(name, Path("unused"), **sizes)


def test_the_default_shape_of_a_published_checkpoint_is_its_authors(tmp_path: Path, model_name: str) -> None:
    model = MODELS[model_name]
    shapes = shapes_of(asked(model_name), configs(tmp_path, model_name, "full"))
    assert shapes == (Shape(model.frames, model.height, model.width),)


def test_the_default_shape_of_another_checkpoint_is_its_samples(tmp_path: Path) -> None:
    assert shapes_of(asked("5b"), configs(tmp_path, "5b", "tiny")) == (Shape(9, 80, 112),)


def test_what_is_asked_for_goes_before_defaults(tmp_path: Path) -> None:
    checkpoint = configs(tmp_path, "5b", "tiny")
    assert shapes_of(asked("5b", frames=17), checkpoint) == (Shape(17, 80, 112),)
    assert shapes_of(asked("5b", height=96, width=64), checkpoint) == (Shape(9, 96, 64),)


@pytest.mark.parametrize("axis", ["frames", "height", "width"])
def test_zero_is_refused_rather_than_taken_for_the_default(tmp_path: Path, axis: str) -> None:
    with pytest.raises(ShapeError, match=f"use --{axis}"):
        shapes_of(asked("5b", **{axis: 0}), configs(tmp_path, "5b", "tiny"))


Contracts = Callable[..., list[NetworkContract]]


@pytest.fixture(scope="module")
def contracts_of(tmp_path_factory: pytest.TempPathFactory) -> Contracts:
    """Return the contracts of a model's tiny topology, made once."""

    @functools.cache
    def contracts(name: str, frames: int, precision: Precision = "fp32") -> list[NetworkContract]:
        checkpoint = configs(tmp_path_factory.mktemp(name), name, "tiny")
        return contracts_for(checkpoint, Shape(frames, 80, 112), Recipe.parse(precision, "bf16"))

    return contracts


def chunks(contracts: list[NetworkContract], half: str) -> dict[str, int]:
    return {c.name: c.frames for c in contracts if isinstance(c, VaeContract) and c.name.startswith(f"vae_{half}")}


ENCODER = ("vae_encoder", "vae_encoder_next")
DECODER = ("vae_decoder_first", "vae_decoder_next")


@pytest.mark.parametrize(
    ("name", "frames", "latents", "encoder", "decoder"),
    [
        ("5b", 1, 1, (1,), (1,)),
        ("5b", 8, 2, (8,), (2,)),
        ("5b", 9, 3, (9,), (3,)),
        ("5b", 16, 4, (8, 8), (2, 2)),
        ("5b", 17, 5, (9, 8), (3, 2)),
        ("5b", 49, 13, (9, 8), (3, 2)),
        ("2b", 49, 13, (9, 8), (3, 2)),
        # Image-to-video encodes one image, whatever the length of the video.
        ("5b-i2v", 9, 3, (1,), (3,)),
        ("5b-i2v", 49, 13, (1,), (3, 2)),
        # 1.5 pads the transformer's latents to an even number, and cannot start from a video whose latents are odd.
        ("1.5-5b", 1, 2, (), (1,)),
        ("1.5-5b", 80, 20, (8, 8), (2, 2)),
        ("1.5-5b", 81, 22, (), (3, 2)),
        ("1.5-5b-i2v", 80, 20, (1,), (2, 2)),
        ("1.5-5b-i2v", 81, 22, (1,), (3, 2)),
    ],
)
def test_networks_and_their_chunks_follow_from_the_frames(
    contracts_of: Contracts, name: str, frames: int, latents: int, encoder: tuple[int, ...], decoder: tuple[int, ...]
) -> None:
    contracts = contracts_of(name, frames)
    assert [contract.name for contract in contracts[:3]] == ["text_encoder", "modulation", "transformer"]
    assert contracts[2].input_specs[0].shape[1] == latents
    assert chunks(contracts, "encoder") == dict(zip(ENCODER, encoder, strict=False))
    assert chunks(contracts, "decoder") == dict(zip(DECODER, decoder, strict=False))


@pytest.mark.parametrize("frames", [1, 8, 9, 16, 17, 48, 49])
def test_chunks_make_up_the_whole_video_and_no_more(contracts_of: Contracts, frames: int) -> None:
    contracts = contracts_of("5b", frames)
    latents = -(-frames // 4)
    for half, given, made in (("encoder", frames, latents), ("decoder", latents, frames)):
        first, *following = [c for c in contracts if isinstance(c, VaeContract) and half in c.name]
        left, missing = given - first.frames, made - int(first.output_specs[0].shape[2])
        if following:
            times, rest = divmod(left, following[0].frames)
            assert rest == 0
            assert missing == times * int(following[0].output_specs[0].shape[2])
        else:
            assert (left, missing) == (0, 0)


@pytest.mark.parametrize(("frames", "kept"), [(9, False), (17, True)])
def test_only_a_chunk_that_another_follows_keeps_its_state(contracts_of: Contracts, frames: int, kept: bool) -> None:
    for contract in contracts_of("5b", frames):
        if isinstance(contract, VaeContract):
            assert bool(contract.state) == kept
            assert len(contract.output_specs) == 1 + len(contract.state)
            read = {spec.name for spec in contract.input_specs[1:]}
            assert read == (set(contract.state) if contract.name.endswith("_next") else set())


@pytest.mark.parametrize(("precision", "state"), [("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")])
def test_what_the_host_reads_and_writes_are_types_that_numpy_has(
    contracts_of: Contracts, precision: Precision, state: str
) -> None:
    for contract in contracts_of("5b", 17, precision):
        specs = (*contract.input_specs, *contract.output_specs)
        states = {name for pair in contract.state.items() for name in pair}
        handed_on = [spec for spec in specs if spec.name in states or spec.name.startswith("cache.")]
        others = {spec.dtype for spec in specs if spec not in handed_on}
        assert others <= {"float32", "int64"} | ({"float16"} if precision == "fp16" else set())
        assert {spec.dtype for spec in handed_on} <= {state}


@pytest.mark.parametrize(
    ("component", "changes"),
    [("vae", {"norm_num_groups": 7}), ("vae", {"down_block_types": None}), ("text_encoder", {"num_layers": "two"})],
)
def test_a_config_that_describes_no_network_is_named(
    tmp_path: Path, component: str, changes: dict[str, object]
) -> None:
    checkpoint = configs(tmp_path, "5b", "tiny")
    checkpoint.configs[component] |= changes
    with pytest.raises(CheckpointError, match=f"no network can be built from {tmp_path}/{component}/config.json"):
        contracts_for(checkpoint, Shape(17, 80, 112), Recipe.parse("fp32", "bf16"))


@pytest.mark.usefixtures("_untraced")
def test_a_bundle_points_at_the_checkpoint_and_knows_its_hashes(tiny: Tiny, tmp_path: Path) -> None:
    root = tiny("5b")
    bundle = bundle_from_checkpoint(ExportRequest("5b", root), tmp_path / "bundle")
    manifest = bundle.manifest
    assert manifest.checkpoint == str(root)
    files = {str(path.relative_to(root)) for path in root.rglob("*.safetensors")}
    assert {entry.path for entry in manifest.weights.values()} == files
    for name, entry in manifest.weights.items():
        assert name == entry.path.replace("/", ".")
        assert entry.sha256 == hashlib.sha256((root / entry.path).read_bytes()).hexdigest()
        assert bundle.weight_path(name, SilentProgress()) == root / entry.path
    assert sorted(content(tmp_path / "bundle")) == sorted(
        [MANIFEST, "tokenizer.json", *(f"{name}.onnx" for name in manifest.networks)]
    )


@pytest.mark.usefixtures("_untraced")
def test_a_bundle_says_what_the_runtime_must_know(tiny: Tiny, tmp_path: Path, model_name: str) -> None:
    request = ExportRequest(model_name, tiny(model_name), frames=17, precision="fp16")
    manifest = bundle_from_checkpoint(request, tmp_path / "bundle").manifest
    model = MODELS[model_name]
    assert (manifest.model, manifest.traits, manifest.precision) == (model_name, model.traits, "fp16")
    assert (manifest.shapes[0].shape.frames, manifest.fps, manifest.text_length) == (17, model.fps, 226)
    assert manifest.scheduler["kind"] == model.scheduler
    assert manifest.scheduler["config"]["snr_shift_scale"] == model.snr_shift_scale
    assert (manifest.vae.scaling_factor, manifest.vae.invert_scale_latents) == (
        model.scaling_factor,
        model.invert_scale_latents,
    )
    assert (manifest.vae.spatial, manifest.vae.temporal, manifest.vae.latent_channels) == (8, 4, 16)
    assert (manifest.vae.tile_height, manifest.vae.tile_width) == (48, 40)
    assert {"cvx-deploy", "torch", "diffusers", "onnxscript"} <= manifest.provenance.keys()


@pytest.mark.usefixtures("_untraced")
def test_shapes_of_one_bundle_share_every_graph_that_is_the_same(tiny: Tiny, tmp_path: Path) -> None:
    shapes = (Shape(17, 80, 112), Shape(25, 48, 64), Shape(17, 80, 112))
    bundle = bundle_from_checkpoint(ExportRequest("5b", tiny("5b"), shapes=shapes), tmp_path / "bundle")
    assert bundle.shapes == shapes[:2]
    vae = {"vae_encoder", "vae_encoder_next", "vae_decoder_first", "vae_decoder_next"}
    transformers = {"transformer_17x80x112", "transformer_25x48x64"}
    assert set(bundle.manifest.networks) == {"text_encoder", "modulation", *transformers, *vae}
    for shape, name in zip(bundle.shapes, sorted(transformers), strict=True):
        assert bundle.at(shape).network("transformer") == bundle.manifest.networks[name]
        assert bundle.at(shape).network("vae_decoder_next") == bundle.manifest.networks["vae_decoder_next"]


@pytest.mark.parametrize(
    ("name", "shapes", "doubled"),
    [
        ("5b", (Shape(9, 80, 112), Shape(8, 80, 112)), {"transformer", "vae_decoder_first", "vae_encoder"}),
        ("5b", (Shape(9, 80, 112), Shape(9, 96, 112)), {"transformer"}),
        ("5b", (Shape(9, 80, 112), Shape(17, 80, 112)), {"transformer", "vae_decoder_first", "vae_encoder"}),
        ("1.5-5b", (Shape(17, 80, 112), Shape(24, 80, 112)), {"vae_decoder_first"}),  # 5 + 1 and 6 latent frames
    ],
)
def test_networks_are_named_after_shapes_only_where_they_differ(
    tmp_path: Path, name: str, shapes: tuple[Shape, ...], doubled: set[str]
) -> None:
    checkpoint = configs(tmp_path, name, "tiny")
    contracts, entries = named_contracts(
        {shape: contracts_for(checkpoint, shape, Recipe.parse("fp32", "bf16")) for shape in shapes}
    )
    assert {entry.networks[role] for entry in entries for role in entry.networks} == set(contracts)
    assert {name for name in contracts if re.search(r"_\d+x", name)} == {
        f"{role}_{shape}" for role in doubled for shape in shapes
    }


def test_several_shapes_are_checked_one_by_one(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="10 frames"):
        shapes_of(
            ExportRequest("5b", tmp_path, shapes=(Shape(9, 80, 112), Shape(10, 80, 112))),
            configs(tmp_path, "5b", "tiny"),
        )
    with pytest.raises(ShapeError, match="both shapes and the sizes of one"):
        ExportRequest("5b", tmp_path, shapes=(Shape(9, 80, 112),), frames=9)


@pytest.mark.usefixtures("_untraced")
def test_copied_weights_make_the_checkpoint_unnecessary(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny("5b"), tmp_path / "checkpoint"))
    request = ExportRequest("5b", checkpoint, copy_weights=True)
    bundle_from_checkpoint(request, tmp_path / "bundle")
    shutil.rmtree(checkpoint)
    moved = Bundle.open((tmp_path / "bundle").rename(tmp_path / "elsewhere"))
    for name, entry in moved.manifest.weights.items():
        path = moved.weight_path(name, SilentProgress())
        assert path.parent == tmp_path / "elsewhere"
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry.sha256


@pytest.mark.usefixtures("_untraced")
def test_a_new_bundle_takes_an_earlier_ones_place(tiny: Tiny, tmp_path: Path) -> None:
    bundle_from_checkpoint(ExportRequest("5b", tiny("5b")), tmp_path / "bundle")
    bundle_from_checkpoint(ExportRequest("5b", tiny("5b"), precision="bf16"), tmp_path / "bundle")
    assert Bundle.open(tmp_path / "bundle").manifest.precision == "bf16"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.usefixtures("_untraced")
def test_a_folder_that_is_no_bundle_is_never_replaced(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("mine")
    with pytest.raises(OutputError, match="photos already exists and is not empty"):
        bundle_from_checkpoint(ExportRequest("5b", tiny("5b")), tmp_path / "photos")
    assert content(tmp_path) == {"photos": "folder", "photos/one.jpg": b"mine"}


@pytest.mark.usefixtures("_untraced")
@pytest.mark.parametrize("mine", ["video.mp4", "checkpoint/vae/x.safetensors"])
def test_what_a_user_put_into_a_bundle_is_never_lost(tiny: Tiny, tmp_path: Path, mine: str) -> None:
    bundle_from_checkpoint(ExportRequest("5b", tiny("5b")), tmp_path / "bundle")
    (tmp_path / "bundle" / mine).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "bundle" / mine).write_text("mine")
    before = content(tmp_path)
    with pytest.raises(OutputError, match=f"bundle holds {Path(mine).parts[0]}, which is not of a bundle"):
        bundle_from_checkpoint(ExportRequest("5b", tiny("5b")), tmp_path / "bundle")
    assert content(tmp_path) == before


@pytest.mark.usefixtures("_untraced")
def test_a_checkpoint_altered_after_the_export_is_noticed(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny("5b"), tmp_path / "checkpoint"))
    bundle = bundle_from_checkpoint(ExportRequest("5b", checkpoint), tmp_path / "bundle")
    file = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match=f"{file} was altered since"):
        bundle.weight_path("vae.diffusion_pytorch_model.safetensors", SilentProgress())


@pytest.mark.parametrize("changes", [{"trained_betas": [0.1]}, {"timestep_spacing": "other"}, {"beta_start": "x"}])
def test_a_scheduler_that_no_run_could_follow_is_refused_before_any_tracing(
    tiny: Tiny, tmp_path: Path, changes: dict[str, object]
) -> None:
    checkpoint = Path(shutil.copytree(tiny("5b"), tmp_path / "checkpoint"))
    file = checkpoint / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(CheckpointError, match=f"scheduler config: {next(iter(changes))}"):
        bundle_from_checkpoint(ExportRequest("5b", checkpoint), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
