"""A trained adapter, deployed in both ways, merged by the export or by refit, has the weights that diffusers fuses."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from state import Training
from train import train

from cvx_deploy.bundle.opened import Bundle
from tests.command import cvx
from tests.conftest import Exported, Tiny
from tests.engines.tensorrt.fake_refit import Engine
from tests.engines.tensorrt.test_refit import build, changed, engine_of, given, refitted, weights_of
from tests.exporters.sources.test_lora import PLAIN, State, fused
from tests.untraced import without_tracing

HOW = Training(steps=2, rank=2, learning_rate=1e-2, precision="bf16")
Weights = dict[str, tuple[str, bytes]]


def differing(found: Weights, expected: State) -> set[str]:
    """Return which of an engine's weights are not those of a transformer, to the bit."""
    named = {name: found[f"model.{name}"] for name in expected if f"model.{name}" in found}
    assert len(named) > 0.7 * len(expected)  # adaLN and the embedding of time are the modulation network's
    return {
        name
        for name, (kind, stored) in named.items()
        if (kind, stored) != ("BF16", expected[name].contiguous().view(torch.int16).numpy().tobytes())
    }


@pytest.mark.export
def test_a_trained_adapter_merged_and_refitted_is_what_diffusers_fuses(
    tiny: Tiny,
    exported: Exported,
    tiny_cache: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The twin is an adapter of another seed: all that was trained differs, and nothing else."""
    adapter = train(tiny("5b"), tiny_cache("5b"), tmp_path / "run", HOW).exported
    other = train(tiny("5b"), tiny_cache("5b"), tmp_path / "other", replace(HOW, seed=1)).exported
    expected, others = (fused(tiny("5b"), [(path / PLAIN, 1.0)], "bf16") for path in (adapter, other))
    without_tracing(monkeypatch, "text_encoder", "vae")
    words = ("--checkpoint", tiny("5b"), "--precision", "bf16", "--lora", adapter)
    assert cvx("export", "--model", "5b", *words, "--output", tmp_path / "merged").code == 0
    merged = weights_of(Bundle.open(tmp_path / "merged"))

    given(monkeypatch)
    base = Bundle.open(shutil.copytree(exported("5b", precision="bf16").path, tmp_path / "engines" / "5b"))
    before = weights_of(base)
    build(base, Engine(before))
    engine = engine_of(refitted(base, "--lora", adapter)).weights

    assert differing(merged, expected) == differing(engine, expected) == set()
    assert len(differing(engine, others)) == changed(before, engine) == 6 * 3  # layers of each block, and blocks
