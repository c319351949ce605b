"""Commands of the README and of the pages for GPU owners, run on tiny checkpoints where no GPU and no hub is needed.

What is changed of a command stands in `as_tried`: a tiny checkpoint for the published one, fewer steps, prompts and
networks. Everything else, options and order included, is as it is printed.
"""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cvx_deploy.families.cogvideox.models import MODELS
from tests.command import cvx
from tests.conftest import ROOT, Exported, Tiny
from tests.test_docs import COMMAND, FENCED, joined
from tests.untraced import without_tracing

READ = ("README.md", "docs/one-gpu.md", "docs/h100.md")
LINES = [
    line
    for page in READ
    for block in FENCED.findall((ROOT / page).read_text(encoding="utf-8"))
    for line in COMMAND.findall(joined(block))
]
PARSED_ONLY = {
    r"--engine tensorrt": "needs a GPU",
    r"^serve ": "runs until it is ended; tests/serve does",
    r"someone/|modelscope://": "asks a hub; tests/exporters/sources/test_hub.py and test_checkpoint.py do, of a stub",
}
"""What is not run, and why; tests/test_docs.py parses it like all others."""
NEEDED = (
    ("--calibration ", "engines/5b.calibration.safetensors", "quantize --model 5b"),
    ("inspect --model 5b", "ready/5b/engines", "build --model 5b --target rtx4090"),
    ("--video panda.mp4", "panda.mp4", "run --model 2b --prompt panda --output panda.mp4"),
)
"""Words of a command, what it takes to be there, and what makes that where no command before it has."""


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, exported: Exported) -> Path:
    """A folder with what the pages take to be there: bundles, an image, results of benchmarks."""
    folder = tmp_path_factory.mktemp("desk")
    for name in ("2b", "5b-i2v"):
        shutil.copytree(exported(name).path, folder / "ready" / name)
    shutil.copytree(exported("5b", precision="bf16").path, folder / "ready" / "5b")
    shape = exported("5b-i2v").shape
    pixels = np.random.default_rng(0).integers(0, 255, (shape.height, shape.width, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "panda.png")
    for name in ("bf16", "fp8"):
        shutil.copytree(ROOT / "benchmarks" / "results" / "bench-mini", folder / "bench" / name)
    return folder


def as_tried(line: str, tiny: Tiny) -> str:
    """Return a printed command on a tiny checkpoint, or raise pytest's Skipped where it cannot be tried."""
    for pattern, reason in PARSED_ONLY.items():
        if re.search(pattern, line):
            pytest.skip(f"{reason}: parsed only")
    command = line.split()[0]
    model = re.search(r"--model (\S+)", line)
    if command in ("export", "quantize"):
        assert model is not None
        assert model[1] in MODELS
        line = re.sub(r" --checkpoint \S+", "", line) + f" --checkpoint {tiny(model[1])}"
    if command == "quantize":
        line = re.sub(r" --(?:shape|num-prompts) \S+", "", line) + " --num-prompts 1 --steps 1"
    if command == "run":
        line += " --steps 2" + (" --engines-dir ready" if model else "")
    if command in ("build", "inspect"):
        line += " --engines-dir ready" + (" --network text_encoder" if command == "build" else "")
    return line


@pytest.mark.parametrize("line", dict.fromkeys(LINES))
def test_a_printed_command_does_what_its_page_says(
    line: str, desk: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(desk)
    tried = as_tried(line, tiny)
    without_tracing(monkeypatch)
    for words, place, first in NEEDED:
        if words in line and not (desk / place).exists():
            run(as_tried(first, tiny))
    run(tried)
    made = re.search(r"--(?:output|contact-sheet) (\S+)", line)
    assert made is None or (desk / made[1]).exists()


def run(line: str) -> None:
    """Run a command; doctor exits with 1 where something is in the way, as bf16 is on some CPUs."""
    done = cvx(*shlex.split(line))
    assert done.code == 0 or (line == "doctor" and not done.err.startswith("Traceback")), done


def test_most_commands_are_run() -> None:
    left = [line for line in LINES if any(re.search(pattern, line) for pattern in PARSED_ONLY)]
    assert len(left) < len(LINES) / 2
    assert all(re.search(r"tensorrt|someone|modelscope|^serve ", line) for line in left)
