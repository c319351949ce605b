"""The prompt cache: what is in it is not computed again, and only what would come out the same is taken from it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.onnxruntime.backend import OrtBackend, OrtSession
from cvx_deploy.errors import OutputError
from cvx_deploy.miniatures import miniature
from cvx_deploy.pipeline.prompt_cache import PromptCache
from cvx_deploy.pipeline.report import RunReport
from cvx_deploy.pipeline.request import RunRequest, networks_needed
from cvx_deploy.pipeline.run import make_latents
from cvx_deploy.pipeline.sampler import Latents
from cvx_deploy.progress import SilentProgress
from tests.command import cvx
from tests.conftest import in_precision

PROMPT = "a red circle moves to the right"


class Counting(OrtBackend):
    """Counts how often the text encoder is loaded."""

    loads = 0

    @contextmanager
    def load(self, role: str, sizes: Mapping[str, int]) -> Iterator[OrtSession]:
        self.loads += role == "text_encoder"
        with super().load(role, sizes) as session:
            yield session


class Noting(SilentProgress):
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def mini() -> Bundle:
    return Bundle.open(miniature("mini"))


@pytest.fixture
def request_() -> RunRequest:
    return RunRequest((PROMPT,), "video.npy", steps=1)


def made(
    bundle: Bundle, request: RunRequest, folder: Path, engine: str = "onnxruntime", version: str = "1"
) -> tuple[Latents, int, int, list[str]]:
    """Return the latents of a run, how often it loaded the encoder, how many texts were kept, and what it noted."""
    progress, report, backend = Noting(), RunReport(), Counting(bundle, threads=1)
    cache = PromptCache(folder, bundle, engine, version, progress)
    latents = make_latents(backend, request, progress, report, prompt_cache=cache)
    return latents, backend.loads, report.cached_prompts, progress.notes


def manifest_with(bundle: Bundle, **changes: Any) -> Bundle:
    return replace(bundle, manifest=replace(bundle.manifest, **changes))


def encoder_with(bundle: Bundle, graph: str) -> Bundle:
    """Return the bundle with another hash of its text encoder's ONNX file."""
    networks, name = bundle.manifest.networks, bundle.network_name("text_encoder")
    other = replace(networks[name], file=replace(networks[name].file, sha256=graph))
    return manifest_with(bundle, networks=networks | {name: other})


def weights_with(bundle: Bundle, digest: str) -> Bundle:
    """Return the bundle with another hash of its text encoder's weights."""
    weights = bundle.manifest.weights
    name = bundle.network("text_encoder").weights[0]
    return manifest_with(bundle, weights=weights | {name: replace(weights[name], sha256=digest)})


def test_second_run_does_not_load_the_text_encoder_and_makes_the_same_to_the_bit(
    mini: Bundle, request_: RunRequest, tmp_path: Path
) -> None:
    plain = make_latents(OrtBackend(mini, threads=1), request_, SilentProgress(), RunReport())
    first, loads, kept, _ = made(mini, request_, tmp_path / "cache")
    assert (loads, kept) == (1, 0)
    second, loads, kept, notes = made(mini, request_, tmp_path / "cache")
    assert (loads, kept, notes) == (0, 2, [])
    np.testing.assert_array_equal(plain, first)
    np.testing.assert_array_equal(plain, second)


def test_only_new_texts_are_encoded(mini: Bundle, request_: RunRequest, tmp_path: Path) -> None:
    made(mini, request_, tmp_path)
    more = replace(request_, prompts=(PROMPT, "a blue square"))
    latents, loads, kept, _ = made(mini, more, tmp_path)
    assert (loads, kept, len(list(tmp_path.glob("*.npy")))) == (1, 2, 3)
    np.testing.assert_array_equal(latents, make_latents(Counting(mini, 1), more, SilentProgress(), RunReport()))


def test_the_text_encoder_is_not_needed_when_every_text_is_there(
    mini: Bundle, request_: RunRequest, tmp_path: Path
) -> None:
    cache = PromptCache(tmp_path, mini, "onnxruntime", "1", SilentProgress())
    assert "text_encoder" in dict(networks_needed(mini, request_, cache))
    made(mini, request_, tmp_path)
    assert "text_encoder" not in dict(networks_needed(mini, request_, cache))
    assert "text_encoder" in dict(networks_needed(mini, replace(request_, negative_prompt="blurred"), cache))
    assert "text_encoder" in dict(networks_needed(mini, request_))


def test_what_decides_an_embedding_is_in_its_name(mini: Bundle, request_: RunRequest, tmp_path: Path) -> None:
    made(mini, request_, tmp_path)
    tokenizer = replace(mini.manifest.tokenizer, sha256="0" * 64)
    others = {
        "graph": encoder_with(mini, "0" * 64),
        "weights": weights_with(mini, "0" * 64),
        "tokenizer": manifest_with(mini, tokenizer=tokenizer),
        "precision": in_precision(mini, "fp16"),
        "text_length": manifest_with(mini, text_length=64),
    }
    for what, bundle in others.items():
        assert not PromptCache(tmp_path, bundle, "onnxruntime", "1", Noting()).read((PROMPT,)), what
    assert not PromptCache(tmp_path, mini, "onnxruntime-cuda", "1", Noting()).read((PROMPT,))
    assert not PromptCache(tmp_path, mini, "onnxruntime", "2", Noting()).read((PROMPT,))
    cache = PromptCache(tmp_path, mini, "onnxruntime", "1", Noting())
    assert not cache.read((f"{PROMPT} ",))
    assert list(cache.read((PROMPT,))) == [PROMPT]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip_a_bit, cut_off, empty])
def test_a_damaged_entry_is_noted_and_computed_again(
    damage: Any, mini: Bundle, request_: RunRequest, tmp_path: Path
) -> None:
    first, *_ = made(mini, request_, tmp_path)
    victim = sorted(tmp_path.glob("*.npy"))[0]
    whole = victim.read_bytes()
    damage(victim)
    second, loads, kept, notes = made(mini, request_, tmp_path)
    assert (loads, kept) == (1, 1)
    assert [str(victim) in note for note in notes] == [True]
    assert victim.read_bytes() == whole
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("values", [np.zeros((3, 64), np.float32), np.zeros((113, 64), np.float64)])
def test_an_entry_of_another_shape_or_type_counts_as_damaged(values: Any, mini: Bundle, tmp_path: Path) -> None:
    progress = Noting()
    cache = PromptCache(tmp_path, mini, "onnxruntime", "1", progress)
    cache.keep(PROMPT, values)
    assert not cache.read((PROMPT,))
    assert "not float32 (226, 64)" in progress.notes[0]
    assert not list(tmp_path.glob("*.npy"))


def test_what_is_not_finite_is_not_kept(mini: Bundle, tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, mini, "onnxruntime", "1", Noting())
    cache.keep(PROMPT, np.full((226, 64), np.inf, np.float32))
    assert not list(tmp_path.iterdir())


def test_what_numpy_reads_of_an_entry_is_the_embedding(mini: Bundle, tmp_path: Path) -> None:
    values = np.arange(226 * 64, dtype=np.float32).reshape(226, 64)
    cache = PromptCache(tmp_path, mini, "onnxruntime", "1", Noting())
    cache.keep(PROMPT, values)
    [entry] = tmp_path.iterdir()
    np.testing.assert_array_equal(np.load(entry, allow_pickle=False), values)
    np.testing.assert_array_equal(cache.read((PROMPT,))[PROMPT], values)


def test_an_entry_that_cannot_be_written_stops_no_run(mini: Bundle, request_: RunRequest, tmp_path: Path) -> None:
    made(mini, request_, tmp_path)
    for entry in tmp_path.glob("*.npy"):
        entry.unlink()
        entry.mkdir()
    progress = Noting()
    PromptCache(tmp_path, mini, "onnxruntime", "1", progress).keep(PROMPT, np.zeros((226, 64), np.float32))
    assert "cannot be kept" in progress.notes[0]


def test_a_folder_that_cannot_be_written_is_said(mini: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"prompt cache .*/file/cache cannot be written.*--prompt-cache"):
        PromptCache(tmp_path / "file" / "cache", mini, "onnxruntime", "1", Noting())


def test_a_text_that_is_no_unicode_has_no_entry(mini: Bundle, tmp_path: Path) -> None:
    assert not PromptCache(tmp_path, mini, "onnxruntime", "1", Noting()).read(("half a pair: \ud800",))


def test_run_says_how_many_texts_were_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("run", "--prompt", PROMPT, "--steps", 1, "--output", "v.npy", "--prompt-cache", "cache", "--json")
    assert '"cached_prompts": 0' in cvx(*words).out
    monkeypatch.setattr(OrtBackend, "load", _without_text_encoder(OrtBackend.load))
    assert '"cached_prompts": 2' in cvx(*words).out


def test_run_refuses_a_cache_it_cannot_write_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(OrtBackend, "load", lambda *_: pytest.fail("a network was loaded"))
    outcome = cvx("run", "--prompt", PROMPT, "--output", tmp_path / "v.npy", "--prompt-cache", tmp_path / "file")
    assert "prompt cache" in outcome.failure()
    assert not (tmp_path / "v.npy").exists()


def _without_text_encoder(load: Any) -> Any:
    def refusing(self: OrtBackend, role: str, sizes: Mapping[str, int]) -> Any:
        assert role != "text_encoder"
        return load(self, role, sizes)

    return refusing
