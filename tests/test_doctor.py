"""doctor names what it finds, and the cure of what is in the way."""

import json
import shutil
from pathlib import Path

import onnxruntime
import pytest

from cvx_deploy import __version__, doctor
from cvx_deploy.bundle.schema import Manifest
from cvx_deploy.doctor import Check, Diagnosis, diagnose
from cvx_deploy.engines.cuda import Gpu
from cvx_deploy.errors import EngineError
from cvx_deploy.miniatures import MINIATURES
from tests.command import cvx
from tests.conftest import Exported
from tests.engines.onnxruntime.fake_onnxruntime import NO_CUDNN, FakeOnnxRuntime

GPU = Gpu(name="NVIDIA GeForce RTX 4090", compute_capability="sm89", memory=25_757_220_864, driver="580.65")


@pytest.fixture
def engines(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(doctor, "free_space", lambda _: 10**12)  # whatever this machine has
    folder = tmp_path / "engines"
    shutil.copytree(exported("5b", frames=9).path, folder / "mine")
    return folder


def of(diagnosis: Diagnosis, subject: str) -> list[Check]:
    return [finding for finding in diagnosis.findings if finding.subject == subject]


def change_manifest(place: Path, **changes: object) -> None:
    path = place / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_sound_machine_and_bundle_have_no_problems(engines: Path) -> None:
    found = diagnose(engines)
    assert not found.problems
    assert of(found, "cvx-deploy") == [Check("ok", "cvx-deploy", __version__)]
    version, runs = of(found, "onnxruntime")
    assert version.what == onnxruntime.__version__
    assert (runs.state, runs.what) == ("ok", "runs fp32 and fp16 bundles on the CPU")
    assert "5b, fp32, 9x" in of(found, "bundle mine")[0].what
    assert {f"bundle {name}" for name in MINIATURES} <= {finding.subject for finding in found.findings}


def test_whatever_is_in_the_way_or_absent_has_its_cure(engines: Path) -> None:
    assert all(finding.fix for finding in diagnose(engines).findings if finding.state != "ok")


def test_a_machine_without_a_gpu_is_no_problem(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise EngineError("there is no NVIDIA driver here", fix="install one")

    monkeypatch.setattr(doctor, "CudaPython", none)
    found = diagnose(engines)
    assert of(found, "gpu") == [Check("note", "gpu", "there is no NVIDIA driver here", "install one")]
    assert not found.problems


def test_a_gpu_is_named_with_its_memory_and_driver(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_gpus", lambda: ([GPU], None))
    (finding,) = of(diagnose(engines), "gpu")
    assert str(finding) == "ok      gpu: NVIDIA GeForce RTX 4090, sm89, 25.8 GB, driver 580.65"


def test_a_gpu_without_cudnn_is_not_said_to_run_anything(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeOnnxRuntime(monkeypatch)
    runs = Check("ok", "onnxruntime-cuda", "runs bundles on an NVIDIA GPU")
    assert of(diagnose(engines), "onnxruntime-cuda") == [runs]
    fake.failures["run"] = NO_CUDNN
    (finding,) = of(diagnose(engines), "onnxruntime-cuda")
    assert finding.state == "note"
    assert "cannot convolve on GPU 0: cuDNN is unavailable" in finding.what
    assert "cuDNN" in finding.fix


def test_an_onnxruntime_that_runs_nothing_is_not_said_to_run(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("an illegal instruction")

    monkeypatch.setattr(onnxruntime, "InferenceSession", broken)
    found = diagnose(engines)
    (_, finding) = of(found, "onnxruntime")
    assert finding.state == "note"
    assert "cannot convolve on the CPU: an illegal instruction" in finding.what


def test_a_full_disk_is_a_problem(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "free_space", lambda _: 9 * 10**9)
    (problem,) = diagnose(engines).problems
    assert (problem.subject, problem.what[:14]) == ("disk", "9.0 GB free at")
    assert problem.fix.startswith("make room")


def test_a_bundle_whose_weights_are_gone_is_a_problem(engines: Path) -> None:
    change_manifest(engines / "mine", checkpoint=str(engines / "gone"))
    (problem,) = diagnose(engines).problems
    assert problem.subject == "bundle mine"
    assert "gone" in problem.what
    assert problem.fix


def test_a_damaged_bundle_is_a_problem_and_hides_no_other(engines: Path) -> None:
    shutil.copytree(engines / "mine", engines / "broken")
    (engines / "broken" / "bundle.json").write_text("{")
    found = diagnose(engines)
    assert [problem.subject for problem in found.problems] == ["bundle broken"]
    assert of(found, "bundle mine")[0].state == "ok"


@pytest.mark.parametrize(
    ("said", "what", "cure"),
    [
        ("computes_in", "ONNX Runtime has no bf16 on the CPU", "--engine openvino"),
        ("multiplies_in", "no CPU multiplies in fp8", "int8/fp32"),
    ],
)
def test_what_no_cpu_engine_computes_in_is_said(
    engines: Path, monkeypatch: pytest.MonkeyPatch, said: str, what: str, cure: str
) -> None:
    types = {"computes_in": {"bf16"}, "multiplies_in": {"fp8"}}[said]
    monkeypatch.setattr(Manifest, said, property(lambda _: types))
    notes = [finding for finding in of(diagnose(engines), "bundle mine") if finding.state == "note"]
    assert [(note.what, cure in note.fix) for note in notes] == [(what, True)]


def test_the_command_prints_every_finding_and_says_whether_all_is_well(engines: Path) -> None:
    healthy = cvx("doctor", "--engines-dir", engines)
    assert healthy.code == 0
    assert any(line.startswith("ok      bundle mine: 5b, fp32") for line in healthy.out.splitlines())
    change_manifest(engines / "mine", checkpoint=str(engines / "gone"))
    ill = cvx("doctor", "--engines-dir", engines, "--json")
    report = json.loads(ill.out)
    assert (ill.code, report["ok"]) == (1, False)
    assert "bundle mine" in report["error"]["what"]
    assert {"state", "subject", "what", "fix"} == set(report["findings"][0])
