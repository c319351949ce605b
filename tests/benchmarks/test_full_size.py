"""What `benchmarks/full_size.py` starts, at a tiny size: the reference converts weights late, and exactly."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, Exported, Tiny

sys.path.insert(0, str(ROOT / "benchmarks"))
import full_size
import full_size_depth
from full_size_eager import converted_late


def test_weights_that_are_converted_late_give_the_same() -> None:
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3)).bfloat16()
    model = torch.nn.Sequential(torch.nn.Linear(8, 8).bfloat16(), *blocks)
    x = torch.randn(2, 8)
    wide = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
    wide.load_state_dict(model.state_dict())
    late = converted_late(model, blocks)
    assert torch.equal(late(x), wide(x))
    assert {weight.dtype for weight in blocks.parameters()} == {torch.bfloat16}, "they are as they were"


@pytest.mark.nightly
def test_the_depth_of_a_tiny_model_is_told_block_by_block(
    exported: Exported, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = shutil.copytree(exported("5b").path, tmp_path / "bundle")
    words = ["x", "onnxruntime", bundle, tiny("5b"), exported("5b").shape]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    full_size_depth.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["blocks"]) == 3
    assert max(*found["blocks"], found["noise_pred"], found["prompt_embeds"], found["frames"]) < 1e-4
    row = full_size.depth_row("depth onnxruntime fp32", found)
    assert row.count("|") == 12


@pytest.mark.nightly
def test_twin_another_reference_is_far_from_it(
    exported: Exported, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = shutil.copytree(exported("5b").path, tmp_path / "bundle")
    real = full_size_depth.embeds_of
    monkeypatch.setattr(full_size_depth, "embeds_of", lambda *given: real(*given) * 1.1)
    monkeypatch.setattr(sys, "argv", list(map(str, ["x", "onnxruntime", bundle, tiny("5b"), exported("5b").shape])))
    full_size_depth.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["prompt_embeds"] > 0.05
