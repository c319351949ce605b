"""A bundle opens when every file of it is there, inside, and the one that was written; else it says which is not."""

import copy
import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from cvx_deploy.bundle.inspect import describe
from cvx_deploy.bundle.opened import MANIFEST, Bundle
from cvx_deploy.bundle.schema import (
    SCHEMA_VERSION,
    Manifest,
    Network,
    ShapeEntry,
    StoredFile,
    TensorSpec,
    WeightFile,
    dimension,
)
from cvx_deploy.errors import BundleError, ShapeError
from cvx_deploy.families.cogvideox.models import MODELS
from cvx_deploy.families.cogvideox.vae import Vae
from cvx_deploy.miniatures import MINIATURES, miniature
from cvx_deploy.progress import SilentProgress
from cvx_deploy.shape import Shape

SILENT = SilentProgress()
Json = Any


def stored(path: Path) -> StoredFile:
    data = path.read_bytes()
    return StoredFile(path.name, len(data), hashlib.sha256(data).hexdigest())


def weight(root: Path, path: str, *, in_bundle: bool) -> WeightFile:
    file = stored(root / path)
    return WeightFile(path, file.size, file.sha256, (root / path).stat().st_mtime_ns, in_bundle)


def make_bundle(root: Path) -> Bundle:
    """Write a bundle of one network, with one weight file inside and one in a checkpoint beside it."""
    folder, checkpoint = root / "bundle", root / "checkpoint"
    folder.mkdir()
    (checkpoint / "vae").mkdir(parents=True)
    for path in (folder / "tokenizer.json", folder / "vae.onnx", folder / "in", checkpoint / "vae" / "out"):
        path.write_text(f"content of {path.name}")
    pixels = TensorSpec("pixels", "float32", (1, 3, 9, "8*latent_height", "8*latent_width"), "BCFHW")
    cache = TensorSpec("new_cache", "float16", (1, 4, 2, "latent_height", "latent_width"), "BCFHW")
    network = Network(
        stored(folder / "vae.onnx"), (pixels,), (cache,), ("in", "vae.out"), {"cache": "new_cache"}, "fp32"
    )
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        model="5b",
        traits=MODELS["5b"].traits,
        shapes=(ShapeEntry(Shape(9, 80, 112), {"vae": "vae"}), ShapeEntry(Shape(17, 80, 112), {"vae": "vae"})),
        fps=8,
        precision="fp32",
        text_length=226,
        vae=Vae(0.7, False, 16, 8, 4, 48, 40),
        scheduler={"kind": "dpm", "config": {"beta_start": 0.1}},
        tokenizer=stored(folder / "tokenizer.json"),
        networks={"vae": network},
        checkpoint=str(checkpoint),
        weights={
            "in": weight(folder, "in", in_bundle=True),
            "vae.out": weight(checkpoint, "vae/out", in_bundle=False),
        },
        provenance={"cvx-deploy": "0.1.0"},
    )
    (folder / MANIFEST).write_bytes(manifest.to_json())
    return Bundle(folder, manifest)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path)


def rewrite(bundle: Bundle, change: Callable[[Json], object]) -> Path:
    """Change the manifest as JSON and return the bundle's folder."""
    raw = json.loads((bundle.path / MANIFEST).read_bytes())
    change(raw)
    (bundle.path / MANIFEST).write_text(json.dumps(raw))
    return bundle.path


def use(path: Path) -> None:
    """Open a bundle and ask for everything it has."""
    bundle = Bundle.open(path)
    describe(bundle)
    for shape in bundle.shapes:
        for role in bundle.manifest.shapes[bundle.shapes.index(shape)].networks:
            bundle.at(shape).onnx_path(role)
    for name in bundle.manifest.weights:
        bundle.weight_path(name, SILENT)


def test_what_was_written_is_read_back(bundle: Bundle) -> None:
    use(bundle.path)
    assert Bundle.open(bundle.path) == bundle
    assert bundle.onnx_path("vae").read_text() == "content of vae.onnx"
    assert bundle.weight_path("in", SILENT).read_text() == "content of in"
    assert bundle.weight_path("vae.out", SILENT).read_text() == "content of out"


def test_a_bundle_behind_a_link_opens(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle.path)
    use(tmp_path / "link")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=f"there is no bundle at {tmp_path}/nothing"):
        Bundle.open(tmp_path / "nothing")


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=f"{tmp_path} is not a bundle: it has no bundle.json"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        *((b"", "is damaged"), (b"{", "is damaged"), (b'{"schema_version": 4}', "missing required field `model`")),
        *((b"\xff\xfe", "is damaged"), (b"[" * 100_000, "is damaged"), (b'{"schema_version": NaN}', "is damaged")),
        *((b"[]", "schema version None"), (b'"text"', "schema version None"), (b"null", "schema version None")),
        *((b'{"schema_version": 1}', "schema version 1, this program reads 4"), (b"{}", "schema version None")),
    ],
)
def test_a_manifest_that_is_none_is_one_stated_failure(bundle: Bundle, text: bytes, what: str) -> None:
    (bundle.path / MANIFEST).write_bytes(text)
    with pytest.raises(BundleError, match=what) as failure:
        Bundle.open(bundle.path)
    assert MANIFEST in failure.value.what


def places(value: Json, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the way to every value in a JSON document."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from places(inner, (*at, key))


def test_no_change_of_any_value_in_the_manifest_is_more_than_a_stated_failure(bundle: Bundle) -> None:
    original = json.loads((bundle.path / MANIFEST).read_bytes())
    missing = object()
    refused = 0
    for place in places(original):
        for value in (missing, None, "../x", "", -1, 0, 1.5, True, [], [0], {}, {"a": 1}):
            changed = copy.deepcopy(original)
            inner = changed
            for key in place[:-1]:
                inner = inner[key]
            if value is missing:
                del inner[place[-1]]
            else:
                inner[place[-1]] = value
            (bundle.path / MANIFEST).write_text(json.dumps(changed))
            try:
                use(bundle.path)
            except BundleError:
                refused += 1
    assert refused > 500


def test_a_layout_of_another_length_than_the_shape_is_refused(bundle: Bundle) -> None:
    path = rewrite(bundle, lambda raw: raw["networks"]["vae"]["inputs"][0].update(layout="BCF"))
    with pytest.raises(BundleError, match="layout BCF does not name the 5 axes of pixels"):
        Bundle.open(path)


@pytest.mark.parametrize("size", [0, -8, "", "8*", "0*latent_height", "a b", "8*8*latent_height"])
def test_an_axis_of_no_size_is_refused(bundle: Bundle, size: int | str) -> None:
    path = rewrite(bundle, lambda raw: raw["networks"]["vae"]["inputs"][0]["shape"].__setitem__(3, size))
    with pytest.raises(BundleError, match=r"pixels has an axis of size"):
        Bundle.open(path)


@pytest.mark.parametrize("file", ["tokenizer.json", "vae.onnx"])
@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda path: path.unlink(), r"{file} is missing"),
        (lambda path: path.write_text("short"), r"{file} has 5 bytes instead of \d+"),
        (lambda path: path.write_text(path.read_text().upper()), r"{file} was altered, or belongs to another bundle"),
        (lambda path: (path.unlink(), path.mkdir()), r"{file} is missing"),
    ],
)
def test_a_damaged_file_is_named(bundle: Bundle, file: str, damage: Callable[[Path], object], what: str) -> None:
    damage(bundle.path / file)
    with pytest.raises(BundleError, match=what.format(file=bundle.path / file)):
        Bundle.open(bundle.path)


@pytest.mark.skipif(os.geteuid() == 0, reason="permission bits do not stop root")
def test_a_file_without_permission_is_named(bundle: Bundle) -> None:
    (bundle.path / "vae.onnx").chmod(0)
    with pytest.raises(BundleError, match=r"vae.onnx cannot be read.*permissions"):
        Bundle.open(bundle.path)


OUTSIDE = ["../x", "/etc/hostname", "a/../../x", "..", ".", "", "a\0b", "./../x"]
WAYS_OUT: list[Callable[[Json, str], object]] = [
    lambda raw, path: raw["tokenizer"].update(path=path),
    lambda raw, path: raw["networks"]["vae"]["file"].update(path=path),
    lambda raw, path: raw["weights"]["in"].update(path=path),
    lambda raw, path: raw["weights"]["vae.out"].update(path=path),
]


@pytest.mark.parametrize("way", range(len(WAYS_OUT)), ids=["tokenizer", "network", "weight inside", "weight outside"])
@pytest.mark.parametrize("path", OUTSIDE)
def test_a_path_that_leaves_is_refused(bundle: Bundle, way: int, path: str) -> None:
    (bundle.path.parent / "x").write_text("secret")
    rewrite(bundle, lambda raw: WAYS_OUT[way](raw, path))
    with pytest.raises(BundleError, match=r"names .*, which lies outside.*fix: do not use this bundle"):
        use(bundle.path)


@pytest.mark.parametrize("file", ["tokenizer.json", "vae.onnx", "in"])
def test_a_link_that_leaves_is_refused_even_to_the_same_content(bundle: Bundle, file: str) -> None:
    outside = bundle.path.parent / "outside"
    (bundle.path / file).rename(outside)
    (bundle.path / file).symlink_to(outside)
    with pytest.raises(BundleError, match=f"names '{file}', which lies outside"):
        use(bundle.path)


def test_only_the_packaged_miniatures_may_link_to_one_another(tmp_path: Path) -> None:
    """The twin is the same pair of folders elsewhere, where a link from one bundle into the next is one that leaves."""
    use(miniature("mini-i2v"))
    for name in MINIATURES:
        shutil.copytree(miniature(name), tmp_path / name)
    use(tmp_path / "mini-i2v")  # files all of them, as in a wheel
    shared = tmp_path / "mini-i2v" / "tokenizer.json"
    shared.unlink()
    shared.symlink_to("../mini/tokenizer.json")
    with pytest.raises(BundleError, match=r"names 'tokenizer.json', which lies outside"):
        use(tmp_path / "mini-i2v")


def test_a_link_inside_is_followed(bundle: Bundle) -> None:
    (bundle.path / "vae.onnx").rename(bundle.path / "real.onnx")
    (bundle.path / "vae.onnx").symlink_to("real.onnx")
    use(bundle.path)


def test_a_loop_of_links_is_a_missing_file(bundle: Bundle) -> None:
    (bundle.path / "vae.onnx").unlink()
    (bundle.path / "vae.onnx").symlink_to("vae.onnx")
    with pytest.raises(BundleError, match=r"vae.onnx is missing"):
        use(bundle.path)


def test_weights_in_a_checkpoint_may_be_links_as_in_the_hubs_cache(bundle: Bundle, tmp_path: Path) -> None:
    file = Path(bundle.manifest.checkpoint) / "vae" / "out"
    file.rename(tmp_path / "blob")
    file.symlink_to(tmp_path / "blob")
    use(bundle.path)


class Watching(SilentProgress):
    """Keeps what it is told to show."""

    def __init__(self) -> None:
        self.tasks: list[str] = []

    def task(self, description: str, total: int | None = None) -> Any:
        self.tasks.append(description)
        return super().task(description, total)


def test_a_weight_file_is_hashed_again_only_when_its_time_changed(bundle: Bundle) -> None:
    file = Path(bundle.manifest.checkpoint) / "vae" / "out"
    progress = Watching()
    bundle.weight_path("vae.out", progress)
    assert progress.tasks == []
    os.utime(file)
    assert bundle.weight_path("vae.out", progress) == file
    assert progress.tasks == ["check out"]


@pytest.mark.parametrize(("name", "path"), [("in", "bundle/in"), ("vae.out", "checkpoint/vae/out")])
@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda path: path.unlink(), "{path} is missing"),
        (lambda path: path.write_text("short"), r"{path} has 5 bytes instead of 1\d"),
        (lambda path: path.write_text(path.read_text().upper()), "{path} was altered since the bundle"),
    ],
)
def test_a_damaged_weight_file_is_named(
    bundle: Bundle, tmp_path: Path, name: str, path: str, damage: Callable[[Path], object], what: str
) -> None:
    damage(tmp_path / path)
    with pytest.raises(BundleError, match=what.format(path=tmp_path / path)):
        bundle.weight_path(name, SILENT)


def test_weights_that_moved_are_found_again_with_the_checkpoint(bundle: Bundle, tmp_path: Path) -> None:
    Path(bundle.manifest.checkpoint).rename(tmp_path / "moved")
    with pytest.raises(BundleError, match=r"out is missing.*run the command again with --checkpoint DIR"):
        bundle.weight_path("vae.out", SILENT)
    moved = bundle.with_checkpoint(tmp_path / "moved")
    assert moved.weight_path("vae.out", SILENT) == tmp_path / "moved" / "vae" / "out"


def test_a_name_the_manifest_does_not_have_is_stated(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="has no network transformer at 9x80x112 \\(it has vae\\)"):
        bundle.network("transformer")
    with pytest.raises(BundleError, match="no weight file named nothing"):
        bundle.weight_path("nothing", SILENT)


def test_the_remedy_makes_the_same_bundle_again(bundle: Bundle) -> None:
    words = shlex.split(bundle.with_checkpoint(Path("/with a space")).remedy.removeprefix("run: "))
    assert words[:2] == ["cvx-deploy", "export"]
    assert list(zip(words[2::2], words[3::2], strict=True)) == [
        ("--model", "5b"),
        ("--checkpoint", "/with a space"),
        ("--shape", "9x80x112"),
        ("--shape", "17x80x112"),
        ("--precision", "fp32"),
        ("--output", str(bundle.path)),
    ]


def test_the_remedy_copies_weights_where_all_were_copied(bundle: Bundle) -> None:
    weights = {name: replace(entry, in_bundle=True) for name, entry in bundle.manifest.weights.items()}
    copied = replace(bundle, manifest=replace(bundle.manifest, weights=weights))
    assert copied.remedy == f"{bundle.remedy} --copy-weights"


def test_a_bundle_is_seen_at_its_first_shape_or_at_another(bundle: Bundle) -> None:
    assert bundle.shapes == (Shape(9, 80, 112), Shape(17, 80, 112))
    assert (bundle.shape, bundle.at(Shape(17, 80, 112)).shape) == bundle.shapes
    assert bundle.at(Shape(17, 80, 112)).with_checkpoint(Path("moved")).shape == Shape(17, 80, 112)


def test_each_shape_has_the_networks_the_manifest_gives_it(bundle: Bundle) -> None:
    path = rewrite(bundle, lambda raw: raw["shapes"][1].update(networks={"vae": "vae", "vae_next": "vae"}))
    first = Bundle.open(path)
    second = first.at(Shape(17, 80, 112))
    assert (first.has("vae_next"), second.has("vae_next")) == (False, True)
    assert second.network("vae_next") == first.network("vae")
    with pytest.raises(BundleError, match=r"no network vae_next at 9x80x112 \(it has vae\)"):
        first.network("vae_next")


def test_a_shape_the_bundle_does_not_make_is_refused_with_the_command_that_adds_it(bundle: Bundle) -> None:
    with pytest.raises(ShapeError, match=r"makes no videos of 25x80x112 \(it makes 9x80x112, 17x80x112\)") as failure:
        bundle.at(Shape(25, 80, 112))
    assert "--shape 9x80x112 --shape 17x80x112 --shape 25x80x112" in failure.value.fix


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda raw: raw["shapes"].clear(), "Expected `array` of length >= 1"),
        (lambda raw: raw["shapes"].append(raw["shapes"][0]), "it names a shape twice"),
        (lambda raw: raw["shapes"][1]["shape"].update(width=0), "it names the shape 17x80x0"),
        (lambda raw: raw["shapes"][1]["networks"].update(vae="x"), "vae at 17x80x112 is x, which is not among its net"),
    ],
)
def test_shapes_that_make_no_sense_are_refused(bundle: Bundle, change: Callable[[Json], object], what: str) -> None:
    path = rewrite(bundle, change)
    with pytest.raises(BundleError, match=what):
        Bundle.open(path)


def test_sizes_are_numbers_symbols_and_multiples_of_symbols() -> None:
    spec = TensorSpec("x", "float32", ("batch", 3, "8*latent_height"), "BCH")
    assert spec.resolve({"batch": 2, "latent_height": 10}) == (2, 3, 80)
    assert dimension("latent_height", {"latent_height": 10}) == 10
    with pytest.raises(BundleError, match=r"size latent_width, which means nothing there"):
        dimension("latent_width", {"latent_height": 10})


def test_the_manifest_is_json_that_a_person_can_read(bundle: Bundle) -> None:
    text = bundle.manifest.to_json().decode()
    assert json.loads(text)["networks"]["vae"]["state"] == {"cache": "new_cache"}
    assert json.loads(text) == json.loads(json.dumps(asdict(bundle.manifest)))
    assert text.startswith('{\n  "schema_version": 5,\n')
