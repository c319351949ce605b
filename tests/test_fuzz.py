"""Damaged files of every format that is read: no traceback, no hang, little memory, no raw control character, no rest.

Seeded: input N is the same everywhere. The short form runs with the rest; ``pytest -m nightly`` runs a thousand.
"""

import json
import os
import random
import re
import shutil
import signal
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from cvx_deploy.measure.memory import MemoryWatch
from cvx_deploy.miniatures import miniature
from tests.command import Outcome, cvx

SECONDS = 60
MOST_MEMORY = 2 << 30
_RAW = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_TITLE = b"\x1b]0;owned\x07"
Words = list[object]


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        make: Puts a whole one into a folder, beside what goes with it, and returns its path.
        words: The command that reads it, of the folder and the file.
    """

    make: Callable[[Path], Path]
    words: Callable[[Path, Path], Words]


def copied(name: str, file: str) -> Callable[[Path], Path]:
    """Return what copies a miniature and names one of its files."""

    def make(folder: Path) -> Path:
        shutil.copytree(miniature(name), folder / "bundle")
        return next((folder / "bundle").rglob(file))

    return make


def image(suffix: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        pixels = np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"image{suffix}")
        return folder / f"image{suffix}"

    return make


def video(folder: Path) -> Path:
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 48, "yuv420p"
        for _ in range(9):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 48, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return folder / "clip.mp4"


def latents(folder: Path) -> Path:
    np.save(folder / "latents.npy", np.zeros((1, 3, 8, 6, 6), np.float32))
    return folder / "latents.npy"


def table(folder: Path) -> Path:
    from safetensors.numpy import save_file

    save_file({"a.amax": np.ones(4, np.float32)}, folder / "table.safetensors", {"calibration": "{}"})
    return folder / "table.safetensors"


def exclusions(folder: Path) -> Path:
    (folder / "list.json").write_text('{"exclude": ["transformer_blocks.0"]}')
    return folder / "list.json"


def packed(folder: Path) -> Path:
    with tarfile.open(folder / "bundle.cvx", "w") as archive:
        archive.add(miniature("mini") / "bundle.json", "bundle.json")
    return folder / "bundle.cvx"


def state(folder: Path) -> Path:
    import torch

    torch.save({"module": {"a": torch.zeros(2)}}, folder / "sat.pt")
    return folder / "sat.pt"


def lora(folder: Path) -> Path:
    from safetensors.numpy import save_file

    layer, config = "transformer.transformer_blocks.0.attn1.to_q", {"transformer.r": 4, "transformer.lora_alpha": 4}
    width = json.loads((miniature("mini") / "transformer" / "config.json").read_text())
    size = width["num_attention_heads"] * width["attention_head_dim"]
    pair = {f"{layer}.lora_A.weight": np.ones((4, size)), f"{layer}.lora_B.weight": np.ones((size, 4))}
    tensors = {key: value.astype(np.float32) for key, value in pair.items()}
    save_file(tensors, folder / "lora.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    return folder / "lora.safetensors"


def script(folder: Path) -> Path:
    (folder / "script.txt").write_text("# what is shown\n\n0 a red circle moves to the right\n")
    return folder / "script.txt"


def cached_prompt(folder: Path) -> Path:
    words = ["run", "--prompt", "x", "--steps", "1", "--threads", "1", "--prompt-cache", folder / "cache", "-q"]
    assert cvx(*words, "--output", folder / "first.npy").code == 0
    return next((folder / "cache").iterdir())


def run(*more: object) -> Words:
    return ["run", "--prompt", "x", "--steps", "1", "--threads", "1", "--output", "OUT", *more]


def _of_bundle(folder: Path, _: Path) -> Words:
    return run("--bundle", folder / "bundle")


def _export(folder: Path, _: Path) -> Words:
    return ["export", "--model", "mine", "--checkpoint", folder / "bundle", "--frames", "3", "--output", "OUT"]


FORMATS = {
    "manifest": Format(copied("mini", "bundle.json"), lambda folder, _: ["inspect", "--bundle", folder / "bundle"]),
    "tokenizer": Format(copied("mini", "tokenizer.json"), _of_bundle),
    "onnx": Format(copied("mini", "*.onnx"), lambda folder, _: ["verify", "--bundle", folder / "bundle", "--quick"]),
    "config": Format(copied("mini", "config.json"), _export),
    "index": Format(copied("mini", "model_index.json"), _export),
    "safetensors": Format(copied("mini", "*.safetensors"), _export),
    "latents": Format(latents, lambda _, file: ["run", "--from-latents", file, "--threads", "1", "--output", "OUT"]),
    "png": Format(image(".png"), lambda _, file: run("--image", file)),
    "jpeg": Format(image(".jpg"), lambda _, file: run("--image", file)),
    "video": Format(video, lambda _, file: run("--video", file)),
    "script": Format(script, lambda _, file: ["run", "--script", file, "--seconds", "1", *run()[3:]]),
    "table": Format(table, lambda _, file: ["quantize", "--show", file]),
    "exclusions": Format(exclusions, lambda folder, file: [*_export(folder, file), "--exclude", file]),
    "lora": Format(lora, lambda folder, file: ["export", "--model", "mini", "--checkpoint", miniature("mini"),
                                               "--lora", file, "--frames", "3", "--output", "OUT"]),
    "prompt cache": Format(cached_prompt, lambda folder, _: run("--prompt-cache", folder / "cache")),
    "scheduler": Format(copied("mini", "scheduler_config.json"), _export),
    "tar": Format(packed, lambda _, file: ["unpack", file, "--output", "OUT"]),
    "sat": Format(state, lambda folder, file: ["convert", "--transformer", file, "--checkpoint", miniature("mini"),
                                               "--output", "OUT"]),
}  # fmt: skip


def damage(data: bytes, chance: random.Random) -> bytes:
    """Return bytes that were flipped, cut, repeated, filled with control characters, or given a large number."""
    kind, place = chance.randrange(7), chance.randrange(len(data))
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + _TITLE + data[place:]
    if kind == 2:
        return data[:place] + b"\xff" * 8 + data[place + 8 :]
    if kind == 3:
        return re.sub(rb"\d+", lambda found: b"9" * 18 if chance.random() < 0.05 else found[0], data[: 1 << 20])
    if kind == 4:
        return b"[" * 10**5 if chance.random() < 0.5 else b""
    altered = bytearray(data)
    for _ in range(1 if kind == 5 else 20):
        altered[chance.randrange(min(len(data), 4096))] ^= 1 << chance.randrange(8)
    return bytes(altered)


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail what takes longer."""

    def late(*_: object) -> None:
        raise AssertionError(f"not done within {seconds} s")

    earlier = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)


def faults(outcome: Outcome, as_json: bool) -> list[str]:
    """Return what is wrong with how a command ended."""
    found = []
    if outcome.code not in (0, 1, 2) or "Traceback" in outcome.err or "a fault of cvx-deploy" in outcome.err:
        found.append("it was not stated")
    if outcome.code == 1 and [line[:7] for line in outcome.err.splitlines()] != ["error: "]:
        found.append("it is not one line")
    if any(len(line) > 6000 for line in outcome.err.splitlines()):
        found.append("its line is too long")
    if _RAW.search(outcome.out + outcome.err):
        found.append("it holds raw control characters")
    if as_json:
        json.loads(outcome.out)
    return found


def one(number: int, folder: Path) -> list[str]:
    """Make input `number`, give it to its command, and return what is wrong."""
    chance = random.Random(number)
    name = list(FORMATS)[number % len(FORMATS)]
    kind = FORMATS[name]
    file = kind.make(folder)
    file.write_bytes(damage(file.read_bytes(), chance))
    if chance.random() < 0.05:
        file.unlink()
        os.mkfifo(file)
    before = set(content_names(folder))
    words = [folder / "out.npy" if word == "OUT" else word for word in kind.words(folder, file)]
    as_json = chance.random() < 0.5
    with within(SECONDS):
        outcome = cvx(*words, "-q", *(["--json"] if as_json else []))
    found = faults(outcome, as_json)
    rest = {left for left in set(content_names(folder)) - before if outcome.code or not left.startswith("out.npy")}
    if rest:
        found.append(f"it left {sorted(rest)[:3]}")
    return [f"{number} ({name}): {fault}: {outcome.err[-300:]}" for fault in found]


def content_names(folder: Path) -> Iterator[str]:
    return (str(path.relative_to(folder)) for path in folder.rglob("*"))


def all_of(numbers: range, folder: Path) -> list[str]:
    import cvx_deploy.exporters.export  # noqa: F401 - takes long, and is not what is timed

    found = []
    with MemoryWatch(interval=0.05) as watch:
        for number in numbers:
            place = folder / str(number)
            place.mkdir()
            found += one(number, place)
            shutil.rmtree(place)
    peak = watch.peak_bytes - watch.samples[0].resident  # the tests before this one have left their memory, too
    return found + ([f"{peak:,} bytes of memory"] if peak > MOST_MEMORY else [])


def test_a_hundred_damaged_files_are_stated_failures(tmp_path: Path) -> None:
    assert all_of(range(6 * len(FORMATS)), tmp_path) == []


@pytest.mark.nightly
def test_a_thousand_damaged_files_are_stated_failures(tmp_path: Path) -> None:
    assert all_of(range(1000, 2000), tmp_path) == []


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(1, "", "Traceback (most recent call last):\n"),
        Outcome(1, "", "error: a\nb\n"),
        Outcome(1, "", "error: \x1b[31m\n"),
        Outcome(1, "", "error: " + "x" * 7000),
        Outcome(-11, "", ""),
    ],
)
def test_twin_what_is_wrong_is_found(outcome: Outcome) -> None:
    assert faults(outcome, as_json=False)
