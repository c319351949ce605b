"""What a run takes of this machine's memory, and what is said where that is more than it may have."""

from pathlib import Path
from typing import Any

import pytest

from cvx_deploy import Pipeline
from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.auto import VARIABLE
from cvx_deploy.engines.spec import EngineOptions
from cvx_deploy.errors import EngineError, OutOfMemoryError
from cvx_deploy.estimate import host
from cvx_deploy.estimate.host import PROCESS, HostNeeds, host_needs
from cvx_deploy.graph.bounded import bounded_graph
from cvx_deploy.measure import limit as limits
from cvx_deploy.measure.limit import memory_limit
from cvx_deploy.miniatures import miniature
from cvx_deploy.pipeline.request import RunRequest, networks_needed

PROMPT = "a red circle moves to the right"


@pytest.fixture
def mini(monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """Return the miniature, for once asked about as a large bundle is."""
    monkeypatch.setattr(host, "_LARGE", 0)
    return Bundle.open(miniature("mini"))


def needs(bundle: Bundle, engine: str = "onnxruntime") -> HostNeeds:
    found = host_needs(bundle, engine, networks_needed(bundle, RunRequest((PROMPT,))))
    assert found is not None
    return found


def test_a_small_bundle_and_a_gpu_are_not_asked_about(mini: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = networks_needed(mini, RunRequest((PROMPT,)))
    assert host_needs(mini, "onnxruntime-cuda", wanted) is None
    monkeypatch.undo()
    assert host_needs(mini, "onnxruntime", wanted) is None


def test_every_phase_is_counted_and_loading_one_by_one_takes_less(mini: Bundle) -> None:
    found = needs(mini)
    assert found.phases.keys() == {"text", "modulation", "transformer", "vae"}
    assert found.at_once - PROCESS == sum(found.phases.values())
    assert found.one_by_one - PROCESS == max(found.phases.values()) == found.phases[found.largest]


def test_weights_that_stay_in_their_file_are_left_out(mini: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from cvx_deploy.engines.onnxruntime import graphs

    copied = needs(mini).phases["transformer"]
    monkeypatch.setattr(graphs, "LARGE_NETWORK", 0)
    assert needs(mini).phases["transformer"] < copied


def test_a_graph_is_read_once_for_all_engines_and_sizes(mini: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin is another graph, which is read."""
    read: list[str] = []

    def reading(bundle: Bundle, role: str) -> Any:
        read.append(role)
        return bounded_graph(bundle, role)

    monkeypatch.setattr(host, "bounded_graph", reading)
    monkeypatch.setattr(host, "_seen", {})
    first = needs(mini)
    roles = ["modulation", "text_encoder", "transformer", "vae_decoder_first"]
    assert sorted(read) == roles
    assert needs(mini, "openvino") != first == needs(mini)
    assert sorted(read) == roles
    assert needs(Bundle.open(miniature("mini-i2v"))).phases["transformer"] != first.phases["transformer"]
    assert "transformer" in read[len(roles) :]


def test_where_not_all_fit_at_once_those_of_a_phase_are_held(mini: Bundle) -> None:
    found = needs(mini)
    for ram, policy in ((found.at_once, "resident"), (found.at_once - 1, "phase"), (found.one_by_one, "phase")):
        with Pipeline(mini, "onnxruntime", EngineOptions(threads=1, ram=ram)) as pipeline:
            pipeline(PROMPT, num_inference_steps=1)
            assert pipeline._backends[0]._residency.policy == policy  # type: ignore[attr-defined]


def test_twin_with_a_byte_less_than_one_phase_takes_it_is_refused_before_anything_is_loaded(
    mini: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cvx_deploy.pipeline import pipeline as module

    monkeypatch.setattr(module, "open_backend", None)
    with (
        Pipeline(mini, "onnxruntime", EngineOptions(ram=needs(mini).one_by_one - 1)) as pipeline,
        pytest.raises(OutOfMemoryError, match=r"the VAE takes .* more than the .* that --ram allows"),
    ):
        pipeline(PROMPT)


def test_what_is_advised_fits(mini: Bundle) -> None:
    wanted = networks_needed(mini, RunRequest((PROMPT,)))
    limit = needs(mini).one_by_one - (4 << 20)
    advice = host.what_fits(mini, ["onnxruntime"], wanted, wanted, limit)
    shape = advice.split()[3].rstrip(",")
    frames, height, width = map(int, shape.split("x"))
    assert frames == mini.shape.frames
    share = height * width / (mini.shape.height * mini.shape.width)
    assert 0 < share < 1
    assert max(host._phases(mini, "onnxruntime", wanted, share).values()) + PROCESS <= limit
    assert host.what_fits(mini, ["onnxruntime"], wanted, wanted, needs(mini).one_by_one).startswith("run it with")
    assert host.what_fits(mini, ["onnxruntime"], wanted, wanted, PROCESS).startswith("give it more memory")


def test_auto_takes_an_engine_that_fits(mini: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    takes = {name: needs(mini, name).one_by_one for name in ("onnxruntime", "openvino")}
    smaller, larger = sorted(takes, key=lambda name: takes[name])
    assert Pipeline(mini, options=EngineOptions(ram=takes[larger] - 1)).engine == smaller


def test_limits_that_are_set_on_a_process_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = tmp_path / "memory.max"
    monkeypatch.setattr(limits, "_CGROUPS", (str(group),))
    group.write_text("max\n")
    assert memory_limit()[1] in ("this machine has", "ulimit allows")
    group.write_text("1000000\n")
    assert memory_limit() == (1_000_000, "the control group of this process allows")


def test_ram_means_nothing_to_an_engine_on_a_gpu(mini: Bundle) -> None:
    with pytest.raises(EngineError, match="ram means nothing to the engine onnxruntime-cuda"):
        Pipeline(mini, "onnxruntime-cuda", EngineOptions(ram=1 << 30))
