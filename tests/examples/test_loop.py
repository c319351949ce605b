"""The four commands of docs/fine-tunes.md, from clips to a checked video, on the miniature."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from state import Training
from train import train

from cvx_deploy.miniatures import miniature
from tests.command import cvx
from tests.conftest import ROOT

FINETUNE = ROOT / "examples" / "finetune"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train"])
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def script(name: str, *words: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(FINETUNE / name), *map(str, words)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def done(process: subprocess.Popen[str]) -> str:
    _, told = process.communicate()
    assert process.returncode == 0, told
    return told


def write_clips(data: Path) -> None:
    lines = []
    for name, seed in (("a", 0), ("b", 1)):
        clip = data / "videos" / name
        clip.mkdir(parents=True)
        for index, frame in enumerate(np.random.default_rng(seed).integers(0, 255, (9, 48, 48, 3), np.uint8)):
            Image.fromarray(frame).save(clip / f"{index}.png")
        lines.append(json.dumps({"video": name, "caption": f"a red {name} circle"}))
    (data / "captions.jsonl").write_text("\n".join(lines))


def killed_after_a_save(mini: Path, cache: Path, output: Path, how: Training) -> None:
    """Begin or resume a run in a process of its own, and kill it as soon as it has saved once more."""
    state = output / "state.pt"
    before = state.stat().st_mtime_ns if state.exists() else 0
    process = FORKS.Process(target=train, args=(mini, cache, output, how))
    process.start()
    while process.is_alive() and (not state.exists() or state.stat().st_mtime_ns == before):
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.nightly
def test_clips_become_a_checked_video_and_a_run_killed_five_times_the_same_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin is a bundle whose adapter was trained a step less: its weights are others."""
    data, cache, mini = tmp_path / "data", tmp_path / "cache", miniature("mini")
    write_clips(data)
    done(script("prepare.py", "--data", data, "--model", "mini", "--output", cache))
    how = Training(steps=40, rank=4, save_every=5, learning_rate=1e-3)
    settings = ("--steps", 40, "--rank", 4, "--save-every", 5, "--learning-rate", 1e-3)
    look = ("--validate-every", 40, "--prompt", "a red circle grows")
    done(script("train.py", "--checkpoint", mini, "--cache", cache, "--output", tmp_path / "whole", *settings, *look))
    monkeypatch.setenv("PYTHONPATH", str(FINETUNE))  # for the process that the killed ones are forked from
    for _ in range(5):
        killed_after_a_save(mini, cache, tmp_path / "killed", how)
    train(mini, cache, tmp_path / "killed", how)
    train(mini, cache, tmp_path / "less", replace(how, steps=39))
    name = "adapter/pytorch_lora_weights.safetensors"
    whole, killed, less = (load_file(tmp_path / run / name) for run in ("whole", "killed", "less"))
    assert all(torch.equal(whole[key], killed[key]) for key in whole)
    assert not all(torch.equal(whole[key], less[key]) for key in whole)
    looked = tmp_path / "whole" / "validation" / "step-000040"
    assert {path.name for path in looked.iterdir()} == {"video.mp4", "contact.png"}
    bundle = tmp_path / "bundle"
    adapter = tmp_path / "whole" / "adapter"
    assert cvx("export", "--model", "mine", "--checkpoint", mini, "--lora", adapter, "--output", bundle).code == 0
    assert cvx("check", "--bundle", bundle, "--steps", 2).code == 0
    output = tmp_path / "video.mp4"
    assert cvx("run", "--bundle", bundle, "--prompt", "a red circle", "--steps", 2, "--output", output).code == 0
    assert output.stat().st_size > 0


def test_a_script_states_its_failure_in_one_line(tmp_path: Path) -> None:
    process = script("dataset.py", "--data", tmp_path, "--model", "mini")
    _, told = process.communicate()
    assert process.returncode == 1
    assert told.startswith("error: ")
    assert ". fix: " in told
    assert "Traceback" not in told
