"""A checkpoint comes whole from a hub, only what is needed of it, or one line says why not and what to do.

The hub is a stub on loopback: see `tests/exporters/sources/stub_hub.py`.
"""

import errno
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.errors import CheckpointError, OutputError, WrongModelError
from cvx_deploy.exporters.sources.checkpoint import COMPONENTS, Checkpoint
from cvx_deploy.exporters.sources.hub import Fetched, Source, fetch
from cvx_deploy.progress import SilentProgress
from tests.bundle.test_bundle import make_bundle
from tests.command import TELLING, cvx, signalled, spawn, wait_for
from tests.conftest import Tiny
from tests.exporters.sources.stub_hub import COMMIT, StubHub, serving

ID = "zai-org/CogVideoX-5b"
VAE = "vae/diffusion_pytorch_model.safetensors"
SHARD = "transformer/diffusion_pytorch_model-00001-of-00003.safetensors"


@pytest.fixture
def hub(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    """A hub that serves a tiny 5b, and a cache and home of its own for whoever asks it."""
    root = Path(shutil.copytree(tiny("5b"), tmp_path / "served"))
    (root / "README.md").write_text("read me")
    (root / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")
    (root / "pytorch_lora_weights.safetensors").write_bytes(b"x")
    with serving(StubHub(root)) as served:
        home = tmp_path / "home"
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        template = served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
        monkeypatch.setattr("time.sleep", lambda _: None)  # what the hub library does between its retries
        for name, value in (("HOME", home), ("HF_HOME", home), ("HF_ENDPOINT", served.endpoint), ("NO_PROXY", "*")):
            monkeypatch.setenv(name, str(value))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        huggingface_hub.close_session()
        yield served
        huggingface_hub.close_session()


def get(where: str = ID, check: str = "5b", **options: Any) -> Fetched:
    return fetch(
        Source(where, **options),
        lambda checkpoint: checkpoint.require_model(check),
        SilentProgress(),
    )


def cached(hub: StubHub, file: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / "models--zai-org--CogVideoX-5b" / "blobs" / hub.etag(file)


def flip_last(path: Path) -> None:
    """Alter a file's last byte; its time stamp is certainly later than any before."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    later = time.time() + 60
    os.utime(path, (later, later))


def add_variant(root: Path, component: str, variant: str = "fp16") -> None:
    """Store a component under the variant's names beside its plain ones, with another content."""
    folder = root / component
    stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
    index = folder / f"{stem}.safetensors.index.json"
    for file in sorted(folder.glob(f"{stem}*.safetensors")):
        copy = file.with_name(file.name.replace(stem, f"{stem}.{variant}", 1))
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        copy.write_bytes(data)
    if index.is_file():
        text = index.read_text().replace(f"{stem}-", f"{stem}.{variant}-")
        (folder / f"{stem}.safetensors.index.{variant}.json").write_text(text)


def test_what_an_export_reads_is_fetched_and_nothing_else(hub: StubHub) -> None:
    fetched = get()
    assert (fetched.source, fetched.revision) == (ID, COMMIT)
    files = sorted(path.relative_to(fetched.folder).as_posix() for path in fetched.folder.rglob("*") if path.is_file())
    assert files == hub.served()
    unneeded = {"README.md", "SHA256SUMS", "vae/diffusion_pytorch_model.bin", "pytorch_lora_weights.safetensors"}
    here = {path.relative_to(hub.root).as_posix() for path in hub.root.rglob("*") if path.is_file()}
    assert here - set(files) == unneeded
    for file in files:
        assert (fetched.folder / file).read_bytes() == (hub.root / file).read_bytes()


def test_nothing_is_fetched_twice(hub: StubHub) -> None:
    first = get()
    hub.requests.clear()
    assert get() == first
    assert hub.served() == []


@pytest.mark.parametrize("revision", ["main", "v1", COMMIT])
def test_a_revision_is_fetched_by_branch_tag_or_commit(hub: StubHub, revision: str) -> None:
    assert get(revision=revision).revision == COMMIT
    assert get(revision=revision, offline=True).revision == COMMIT


def test_a_token_goes_to_the_hub_and_not_to_its_storage(hub: StubHub) -> None:
    Path(constants.HF_TOKEN_PATH).parent.mkdir(parents=True)
    Path(constants.HF_TOKEN_PATH).write_text("hf_secret")
    get()
    assert {request.token for request in hub.requests if request.cdn} == {None}
    assert {request.token for request in hub.requests if not request.cdn} == {"Bearer hf_secret"}


def test_an_interrupted_download_goes_on_with_the_files_that_are_not_whole(hub: StubHub) -> None:
    hub.cut[SHARD] = [2500, 0]
    with pytest.raises(CheckpointError, match=r"was interrupted: .*fix: run the command again: files that came whole"):
        get()
    kept = sorted(file for file in hub.served() if cached(hub, file).is_file())
    assert kept
    assert SHARD not in kept
    assert {path.name for path in cached(hub, SHARD).parent.iterdir()} == {hub.etag(file) for file in kept}
    hub.cut.clear()
    hub.requests.clear()
    folder = get().folder
    assert SHARD in hub.served()
    assert not set(hub.served()) & set(kept)
    assert (folder / SHARD).read_bytes() == (hub.root / SHARD).read_bytes()


def test_a_dropped_connection_alone_fails_nothing(hub: StubHub) -> None:
    hub.cut[VAE] = [1 + (hub.root / VAE).stat().st_size // 3]
    assert (get().folder / VAE).read_bytes() == (hub.root / VAE).read_bytes()
    assert len([request for request in hub.requests if request.file == VAE and request.range]) >= 2


def test_a_server_without_ranges_sends_it_all_again(hub: StubHub) -> None:
    hub.ranges = False
    hub.cut[VAE] = [1234, 10**9]
    assert (get().folder / VAE).read_bytes() == (hub.root / VAE).read_bytes()
    assert len([request for request in hub.requests if request.file == VAE and request.cdn]) == 2


@pytest.mark.parametrize("file", [VAE, "vae/config.json"])
def test_another_content_than_its_hash_is_refused_and_not_kept(hub: StubHub, file: str) -> None:
    data = bytearray((hub.root / file).read_bytes())
    data[-2] ^= 1
    hub.alter[file] = bytes(data)
    with pytest.raises(
        CheckpointError, match=f"{file} of {ID} came with another content than its hash at {hub.endpoint}"
    ):
        get()
    assert not cached(hub, file).exists()
    hub.alter.clear()
    assert (get().folder / file).read_bytes() == (hub.root / file).read_bytes()


def test_a_cached_file_that_was_cut_is_fetched_again(hub: StubHub) -> None:
    get()
    os.truncate(cached(hub, VAE), 1000)
    assert (get().folder / VAE).read_bytes() == (hub.root / VAE).read_bytes()


def test_a_disk_without_room_is_known_before_the_weights_come(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(hub.root)._replace(free=100_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    with pytest.raises(
        OutputError, match=r"needs .* GB more in .*/hub, which has 0.0 GB free. fix: make room there, or "
    ):
        get()
    assert not [file for file in hub.served() if file.endswith(".safetensors")]


def test_a_disk_that_fills_up_is_one_clear_line(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(OutputError, match=r"cannot write to the cache .*: No space left on device. fix: make room"):
        get()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no repository": ({"repository": "zai-org/Other"}, f"there is no folder {ID} here, and no repository of that name"),
    "private": (
        {"refuse_list": (401, "RepoNotFound")},
        f"there is no folder {ID} here, .* fix: check the name; if it is private, ",
    ),
    "no revision": ({"revisions": ("v2",)}, f"{ID} has no revision main. fix: name a branch, tag or commit"),
    "gated": ({"refuse": (403, "GatedRepo")}, f"{ID} is gated. fix: ask for access at http.*/{ID}, then log in with"),
    "gated, no token": ({"refuse": (401, "GatedRepo")}, f"{ID} is gated. fix: ask for access"),
    "forbidden": ({"refuse_list": (403, "")}, r"refuses .* \(HTTP 403\). fix: log in with: hf auth login"),
    "lost file": ({"refuse": (404, "EntryNotFound")}, "has lost a file of"),
    "server": (
        {"refuse_list": (500, "")},
        r"refuses .* \(HTTP 500\). fix: try again later; what has been fetched is ke",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_hub_refuses_is_one_clear_line(hub: StubHub, case: str) -> None:
    changes, words = REFUSED[case]
    for name, value in changes.items():
        setattr(hub, name, value)
    with pytest.raises(CheckpointError, match=words):
        get(revision="main")


@pytest.mark.parametrize("file", ["model_index.json", "vae/config.json", "tokenizer/tokenizer_config.json", SHARD])
def test_a_file_the_repository_lacks_is_named_before_any_weights_come(hub: StubHub, file: str) -> None:
    (hub.root / file).unlink()
    with pytest.raises(CheckpointError, match=f"{ID} on {hub.endpoint} has no file {file}"):
        get()
    assert not [name for name in hub.served() if name.endswith(".safetensors")]


def test_pickled_weights_are_not_fetched(hub: StubHub) -> None:
    (hub.root / VAE).unlink()
    with pytest.raises(CheckpointError, match=f"{ID} on .* has only pickled weights .*vae/diffusion_pytorch_model.bin"):
        get()
    assert not [name for name in hub.served() if name.endswith((".safetensors", ".bin"))]


def test_another_models_repository_is_named_before_its_weights_come(hub: StubHub) -> None:
    with pytest.raises(WrongModelError, match=r"is a 5b checkpoint, asked for 2b. fix: use --model 5b"):
        get(check="2b")
    assert not [name for name in hub.served() if name.endswith(".safetensors")]


def test_a_transformer_of_ones_own_spares_the_repositorys(hub: StubHub) -> None:
    get(own_transformer=True)
    assert [name for name in hub.served() if name.startswith("transformer/")] == ["transformer/config.json"]


def test_without_a_network_one_line_says_so(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        CheckpointError, match=r"http://127.0.0.1:9 cannot be reached: .* fix: check the network; --off"
    ):
        get()


@pytest.mark.parametrize("how", ["option", "environment"])
def test_offline_uses_what_was_fetched_and_no_network(hub: StubHub, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    fetched = get()
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "environment")
    assert get(offline=how == "option") == fetched
    assert hub.requests == []


def test_offline_without_the_repository_is_one_clear_line(hub: StubHub) -> None:
    with pytest.raises(
        CheckpointError, match=rf"{ID} is neither a folder nor in the cache .* fix: run once without --off"
    ):
        get(offline=True)
    with pytest.raises(CheckpointError, match=f"{ID} at revision v9 is neither"):
        get(offline=True, revision="v9")


@pytest.mark.parametrize("file", ["vae/config.json", SHARD])
def test_offline_without_one_of_the_files_names_it(hub: StubHub, file: str) -> None:
    (get().folder / file).unlink()
    with pytest.raises(CheckpointError, match=f"{file} of {ID} is not in the cache .* fix: run once without --offline"):
        get(offline=True)


def test_a_variant_is_fetched_in_place_of_the_plain_files(hub: StubHub) -> None:
    for component in ("transformer", "vae"):
        add_variant(hub.root, component)
    folder = get(variant="fp16").folder
    weights = [name for name in hub.served() if name.endswith(".safetensors")]
    assert all((".fp16" in name) == (not name.startswith("text_encoder/")) for name in weights)
    checkpoint = Checkpoint(folder, "fp16")
    assert sorted({tensor.file for part in COMPONENTS for tensor in checkpoint.tensors(part).values()}) == weights
    with pytest.raises(CheckpointError, match=r"has no bf16 weight files. fix: leave out --variant"):
        get(variant="bf16")


def test_a_local_folder_has_variants_too(tiny: Tiny, tmp_path: Path) -> None:
    root = Path(shutil.copytree(tiny("5b"), tmp_path / "checkpoint"))
    add_variant(root, "vae")
    files = {tensor.file for tensor in Checkpoint(root, "fp16").tensors("vae").values()}
    assert files == {"vae/diffusion_pytorch_model.fp16.safetensors"}
    assert {tensor.file for tensor in Checkpoint(root).tensors("vae").values()} == {VAE}
    with pytest.raises(CheckpointError, match="has no ema weight files"):
        Checkpoint(root, "ema").tensors("vae")


def test_the_variants_files_are_those_diffusers_would_take(tiny: Tiny, tmp_path: Path) -> None:
    from diffusers.pipelines.pipeline_loading_utils import variant_compatible_siblings

    root = Path(shutil.copytree(tiny("5b"), tmp_path / "checkpoint"))
    for component in ("text_encoder", "transformer"):
        add_variant(root, component)
    names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    theirs, _ = variant_compatible_siblings(names, variant="fp16", ignore_patterns=["*.bin"])
    checkpoint = Checkpoint(root, "fp16")
    ours = {file for component in COMPONENTS for file in checkpoint.weight_files(component)}
    assert ours == {str(name) for name in theirs if str(name).endswith(".safetensors")}


def test_an_existing_folder_wins_over_a_repository(
    hub: StubHub, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zai-org").mkdir()
    (tmp_path / ID).symlink_to(tiny("5b"))
    assert get() == Fetched(Path(ID), None, None)
    assert hub.requests == []
    with pytest.raises(CheckpointError, match=f"{ID} is a folder, which has no revision v1. fix: leave out --revision"):
        get(revision="v1")


@pytest.mark.parametrize(
    "where", ["nothing", "./a/b", "/a/b", "a/b/c", "~/x", "here/missing", "a/b/", "served/README.md"]
)
def test_what_looks_like_a_path_is_a_folder(
    hub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="there is no checkpoint folder"):
        Checkpoint(get(where).folder)
    assert hub.requests == []


def test_two_processes_that_fetch_at_once_both_get_it_whole(hub: StubHub) -> None:
    hub.stalled = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(get), pool.submit(get)]
        hub.stalled.set()
        folders = {future.result().folder for future in both}
    [folder] = folders
    assert (folder / VAE).read_bytes() == (hub.root / VAE).read_bytes()
    assert {path.suffix for path in cached(hub, VAE).parent.iterdir()} == {""}


@pytest.mark.parametrize("sha", ["../../../../escaped", "main", "", f"{COMMIT}/..", COMMIT.upper()])
def test_what_is_no_commit_never_becomes_a_path(hub: StubHub, tmp_path: Path, sha: str) -> None:
    mine = tmp_path / "escaped" / "model_index.json"
    mine.parent.mkdir()
    mine.write_text("mine")
    hub.commit = sha
    with pytest.raises(CheckpointError, match=r"gives '.*' for a commit. fix: use an endpoint that does"):
        get()
    assert mine.read_text() == "mine"
    assert not Path(constants.HF_HUB_CACHE).exists()


def test_a_token_stays_here_when_the_environment_says_so(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(constants.HF_TOKEN_PATH).parent.mkdir(parents=True)
    Path(constants.HF_TOKEN_PATH).write_text("hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    get()
    assert {request.token for request in hub.requests} == {None}


def test_progress_is_told_of_every_byte_once(hub: StubHub) -> None:
    told: list[int] = []

    class Counting(SilentProgress):
        @contextmanager
        def task(self, description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
            before = sum(told)
            yield told.append
            assert sum(told) - before == total

    fetch(Source(ID), lambda _: None, Counting())
    assert sum(told) == sum((hub.root / file).stat().st_size for file in hub.served())


def test_what_was_fetched_is_not_read_again_for_its_hash(hub: StubHub) -> None:
    checkpoint = Checkpoint(get().folder)
    told: list[int] = []
    for component in COMPONENTS:
        for file in {tensor.file for tensor in checkpoint.tensors(component).values()}:
            assert checkpoint.weight_file(file, told.append).sha256 == hub.etag(file)
    assert told == []


def test_a_cached_file_altered_later_does_not_pass_its_links_name(hub: StubHub) -> None:
    checkpoint = Checkpoint(get().folder)
    flip_last(cached(hub, VAE))
    with pytest.raises(CheckpointError, match=rf"{VAE} was altered: its SHA-256 is not the one in .*{VAE}"):
        checkpoint.weight_file(VAE)


def test_a_link_that_leaves_the_cache_is_not_believed(hub: StubHub, tmp_path: Path) -> None:
    folder = get().folder
    outside = tmp_path / ("0" * 64)
    outside.write_bytes((hub.root / VAE).read_bytes())
    (folder / VAE).unlink()
    (folder / VAE).symlink_to(outside)
    told: list[int] = []
    assert Checkpoint(folder).weight_file(VAE, told.append).sha256 == hub.etag(VAE)
    assert sum(told) == outside.stat().st_size


@pytest.fixture
def local(hub: StubHub, tmp_path: Path) -> Path:
    """A checkpoint in a folder, as ``hf download --local-dir`` leaves it."""
    for file in get().folder.rglob("*"):
        if file.is_file():
            name = "/".join(file.parts[-2:]) if file.parent.name != COMMIT else file.name
            huggingface_hub.hf_hub_download(ID, name, local_dir=tmp_path / "local")
    return tmp_path / "local"


def test_the_notes_of_a_download_into_a_folder_are_trusted(hub: StubHub, local: Path) -> None:
    told: list[int] = []
    assert Checkpoint(local).weight_file(VAE, told.append).sha256 == hub.etag(VAE)
    assert told == []


def test_a_file_altered_after_its_note_was_written_is_noticed(local: Path) -> None:
    flip_last(local / VAE)
    with pytest.raises(CheckpointError, match=rf"{VAE} was altered: .* not the one in .*{VAE}.metadata"):
        Checkpoint(local).weight_file(VAE)


@pytest.mark.parametrize("note", ["", "a b", f"{COMMIT}\n{'0' * 64}\nnever\n", f"{COMMIT}\n{'0' * 40}\n9e9\n", "\xff"])
def test_a_note_that_says_nothing_is_disregarded(hub: StubHub, local: Path, note: str) -> None:
    (local / ".cache" / "huggingface" / "download" / f"{VAE}.metadata").write_text(note)
    assert Checkpoint(local).weight_file(VAE).sha256 == hub.etag(VAE)


@pytest.mark.export
def test_a_model_is_exported_from_its_own_repository_and_runs(hub: StubHub, tmp_path: Path) -> None:
    bundle_path, video = tmp_path / "bundle", tmp_path / "video.npy"
    made = cvx("export", "--model", "5b", "--revision", "v1", "--output", bundle_path, "--quiet")
    assert made.code == 0, made.err
    bundle = Bundle.open(bundle_path)
    provenance = bundle.manifest.provenance
    assert (provenance["source"], provenance["revision"]) == (ID, COMMIT)
    assert f"from {ID}, revision {COMMIT}" in cvx("inspect", "--bundle", bundle_path).out.splitlines()
    words = shlex.split(bundle.remedy.removeprefix("run: cvx-deploy "))
    assert words[3:7] == ["--checkpoint", ID, "--revision", COMMIT]
    run = ["run", "--bundle", bundle_path, "--prompt", "a circle", "--steps", "1", "--output", video]
    assert cvx(*run).code == 0
    shutil.rmtree(constants.HF_HUB_CACHE)
    line = cvx(*run).failure()
    assert line.endswith(f"fix: {bundle.remedy}.")
    get(revision=COMMIT)
    assert cvx(*run).code == 0


def test_a_fetched_bundle_whose_checkpoint_moved_names_the_new_place(hub: StubHub, tmp_path: Path) -> None:
    manifest = {"source": ID, "revision": COMMIT, "variant": "fp16"}
    bundle = make_bundle(tmp_path)
    bundle = replace(bundle, manifest=replace(bundle.manifest, provenance=manifest))
    assert f"--checkpoint {ID} --revision {COMMIT} --variant fp16 " in bundle.remedy
    assert "--checkpoint /moved --variant fp16 " in bundle.with_checkpoint(Path("/moved")).remedy


def test_a_name_of_ones_own_needs_a_checkpoint(hub: StubHub) -> None:
    outcome = cvx("export", "--model", "mine")
    assert outcome.code == 2
    assert "mine is a name of your own: name its checkpoint with --checkpoint" in outcome.err


def test_ctrl_c_stops_a_download_at_once(hub: StubHub, tmp_path: Path) -> None:
    hub.stalled = threading.Event()
    words = ["export", "--model", "5b", "--output", tmp_path / "bundle", "--quiet"]
    process = spawn(f"{TELLING}\nsys.argv[0] = 'cvx-deploy'\nmain()", *words)
    wait_for(process, "now: fetch")
    threading.Timer(0.5, hub.stalled.set).start()
    outcome = signalled(process, signal.SIGINT)
    assert (outcome.code, outcome.err.splitlines()[-1]) == (130, "interrupted")
    assert not (tmp_path / "bundle").exists()
    get()


class Package:
    """A stand-in for the package modelscope, with what is used of it."""

    def __init__(self, root: Path, cache: Path) -> None:
        self.root, self.cache = root, cache
        self.asked: list[str] = []

    def get_model_files(self, name: str, revision: str, recursive: bool) -> list[dict[str, object]]:
        assert (name, recursive) == ("ZhipuAI/CogVideoX-5b", True)
        if revision != "master":
            raise RuntimeError(f"no such revision {revision}\nand a second line")
        files = (path for path in self.root.rglob("*") if path.is_file())
        return [{"Path": path.relative_to(self.root).as_posix(), "Size": path.stat().st_size} for path in files]

    def snapshot_download(self, name: str, *, local_files_only: bool, **options: Any) -> str:
        if local_files_only and not self.cache.is_dir():
            raise ValueError("nothing here")
        for file in options.get("allow_patterns", ()):
            self.asked.append(file)
            (self.cache / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self.root / file, self.cache / file)
            for callback in options["progress_callbacks"]:
                callback(file, 1).update((self.root / file).stat().st_size)
        return str(self.cache)


class Callback:
    """The package's base class of what is told of a download."""

    def __init__(self, filename: str, file_size: int) -> None: ...


@pytest.fixture
def package(hub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    fake = Package(hub.root, tmp_path / "modelscope")
    monkeypatch.setitem(sys.modules, "modelscope", SimpleNamespace(snapshot_download=fake.snapshot_download))
    monkeypatch.setitem(sys.modules, "modelscope.hub", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "modelscope.hub.api", SimpleNamespace(HubApi=lambda: fake))
    monkeypatch.setitem(sys.modules, "modelscope.hub.callback", SimpleNamespace(ProgressCallback=Callback))
    return fake


MODELSCOPE = "modelscope://ZhipuAI/CogVideoX-5b"


def test_modelscope_is_asked_for_the_same_files_as_the_hub(hub: StubHub, package: Package) -> None:
    assert get(MODELSCOPE) == Fetched(package.cache, MODELSCOPE, "master")
    get()
    assert sorted(package.asked) == hub.served()
    assert get(MODELSCOPE, offline=True).folder == package.cache


def test_modelscope_failures_are_one_clear_line(package: Package) -> None:
    with pytest.raises(
        CheckpointError, match=r"cannot be fetched from ModelScope: no such revision x. fix: check the id"
    ):
        get(MODELSCOPE, revision="x")
    with pytest.raises(
        CheckpointError, match=r"is not in ModelScope's cache: nothing here. fix: run without --offline"
    ):
        get(MODELSCOPE, offline=True)
    (package.root / VAE).unlink()
    with pytest.raises(CheckpointError, match="ZhipuAI/CogVideoX-5b on ModelScope has only pickled weights"):
        get(MODELSCOPE)


def test_without_its_package_modelscope_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope.hub.api", None)
    with pytest.raises(CheckpointError, match=r"not installed. fix: pip install .*\[modelscope\]"):
        get(MODELSCOPE)
