"""What the plan says of training holds against what PyTorch allocates for it, and against what was measured."""

import json
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from cvx_deploy.estimate import training
from cvx_deploy.estimate.training import Way, training_needs, training_plan
from cvx_deploy.exporters.sources.synth_configs import transformer_config
from cvx_deploy.families.cogvideox.architecture import Architecture
from cvx_deploy.families.cogvideox.models import MODELS
from cvx_deploy.shape import Shape
from tests.command import cvx
from tests.conftest import ROOT
from tests.tolerances import PLANNED_MEMORY

PLACE = ROOT / "benchmarks" / "results" / "training_step"
SHAPE = Shape(49, 480, 720)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.syspath_prepend(ROOT / "examples" / "finetune")
    monkeypatch.delitem(sys.modules, "report", raising=False)
    import training_step

    return training_step


@pytest.mark.parametrize("way", [Way("lora"), Way("lora", checkpointing=False), Way("full")], ids=str)
def test_a_step_of_two_blocks_holds_what_the_plan_says(way: Way, scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin is the plan of twice the activations."""
    whole = Architecture.of_model(MODELS["5b"])
    architecture = replace(whole, transformer=replace(whole.transformer, layers=2))
    config = {**transformer_config(MODELS["5b"], "full"), "num_layers": 2}
    found = scripts.counted(config, SHAPE, scripts.training(way))
    said = training_needs(architecture, SHAPE, way, scripts.RANK)
    assert found.held == pytest.approx(said.weights + said.optimizer, rel=0.02)
    assert found.peak == pytest.approx(said.total, rel=PLANNED_MEMORY)
    for name in ("_KEPT", "_RECOMPUTED"):
        monkeypatch.setitem(getattr(training, name), way.method, 2 * getattr(training, name)[way.method])
    doubled = training_needs(architecture, SHAPE, way, scripts.RANK)
    assert found.peak != pytest.approx(doubled.total, rel=PLANNED_MEMORY)


def test_storages_are_counted_while_they_live_and_views_once(scripts: Any) -> None:
    from training_bytes import Storages

    layer = nn.Linear(100, 50, bias=False).requires_grad_(False)
    storages = Storages()
    storages.add(list(layer.parameters()))
    with storages:
        made = layer(torch.ones(10, 100)).view(50, 10)[:5]
        assert storages.now == 4 * (5000 + 500)  # the ones are gone, their whole product is there
        del made
    assert (storages.now, storages.peak) == (4 * 5000, 4 * 6500)


def test_the_plan_of_training_is_shown_and_tells_what_fits() -> None:
    outcome = cvx("plan", "--model", "5b", "--train", "--vram", "80GB", "--json")
    ways = json.loads(outcome.out)["ways"]
    assert ways["lora, checkpointing"]["fits"]
    assert not ways["full, checkpointing"]["fits"]
    assert ways["full, checkpointing"]["optimizer"] == 2 * ways["full, checkpointing"]["weights"]
    assert "full, checkpointing, 8-bit optimizer" in cvx("plan", "--model", "2b", "--train").out
    ranks = [training_plan(MODELS["5b"], SHAPE, rank).needs[Way("lora")] for rank in (64, 128)]
    assert ranks[1].gradients == 2 * ranks[0].gradients == 2 * 4 * 18 * 42 * 3072 * 64


def test_options_that_training_has_no_use_for_are_refused() -> None:
    assert cvx("plan", "--model", "5b", "--rank", "8").code == 2
    assert cvx("plan", "--model", "5b", "--train", "--no-guidance").code == 2
    assert "use --frames 9 or 16" in cvx("plan", "--model", "5b", "--train", "--frames", "10").failure()
