"""Several processes train what one trains, and go on after a kill, through accelerate's own launcher."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from state import Training
from train import train

from tests.conftest import ROOT, Tiny
from tests.tolerances import PROCESSES_RELATIVE

CONFIG = ROOT / "examples" / "finetune" / "gpus.yaml"
ADAPTER = "adapter/pytorch_lora_weights.safetensors"
State = dict[str, torch.Tensor]


def test_the_configuration_is_one_that_accelerate_reads_and_the_docs_name() -> None:
    found = load_config_from_file(str(CONFIG))
    assert (found.distributed_type, found.num_machines) == ("MULTI_GPU", 1)
    assert f"--config_file {CONFIG.relative_to(ROOT)}" in (ROOT / "docs" / "fine-tunes.md").read_text()


def launched(tiny: Path, cache: Path, output: Path) -> subprocess.Popen[bytes]:
    """Start two processes on the CPU, each with half of the batch."""
    words = ("--steps", 12, "--batch", 1, "--rank", 2, "--learning-rate", 0.01, "--save-every", 2)
    paths = ("--checkpoint", tiny, "--cache", cache, "--output", output)
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIG, "--num_processes", 2)
    command = [*launcher, "--main_process_port", 0, ROOT / "examples" / "finetune" / "train.py", *paths, *words]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(list(map(str, command)), env=environment)


def killed_after_a_save(process: subprocess.Popen[bytes], state: Path) -> None:
    while process.poll() is None and not state.exists():
        time.sleep(0.002)
    launcher = psutil.Process(process.pid)
    for each in (launcher, *launcher.children(recursive=True)):
        each.kill()
    assert process.wait() == -signal.SIGKILL


def apart(left: State, right: State) -> float:
    return max(float((left[key] - right[key]).abs().max() / left[key].abs().max()) for key in left)


@pytest.mark.nightly
def test_two_processes_on_half_the_batch_train_what_one_trains_killed_or_not(
    tiny: Tiny, tiny_cache: Callable[[str], Path], tmp_path: Path
) -> None:
    """The twin is one process that has half of the batch alone."""
    checkpoint, cache = tiny("5b"), tiny_cache("5b")
    assert launched(checkpoint, cache, tmp_path / "two").wait() == 0
    killed_after_a_save(launched(checkpoint, cache, tmp_path / "killed"), tmp_path / "killed" / "state.pt")
    step = torch.load(tmp_path / "killed" / "state.pt", weights_only=True)["step"]
    assert 0 < step < 12
    assert launched(checkpoint, cache, tmp_path / "killed").wait() == 0
    for name, batch in (("one", 2), ("half", 1)):
        how = Training(steps=12, batch=batch, rank=2, learning_rate=0.01, save_every=2)
        train(checkpoint, cache, tmp_path / name, how)
    one, half, two, killed = (load_file(tmp_path / name / ADAPTER) for name in ("one", "half", "two", "killed"))
    assert all(torch.equal(two[key], killed[key]) for key in two)
    assert apart(one, two) < PROCESSES_RELATIVE < apart(one, half)
