"""A batch in this process: what it makes, what it makes again, and what it refuses before it begins."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from cvx_deploy.files import sha256_of
from cvx_deploy.miniatures import miniature
from cvx_deploy.pipeline.pipeline import Pipeline
from tests.command import Outcome, cvx, spawn

PROMPT = "a red circle moves to the right"
PROGRAM = """
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run where a shell has it ignored
from cvx_deploy.cli import main

main()
"""


def line(**fields: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "num_inference_steps": 2, **fields}


def written(folder: Path, *lines: dict[str, Any] | str) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    return file


def batch(file: Path, *words: object) -> Outcome:
    return cvx("batch", file, "--output", file.parent / "videos", "--threads", 1, *words)


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(one) for one in (folder / "videos" / "manifest.jsonl").read_text().splitlines()]


def test_a_batch_makes_what_the_pipeline_makes_and_says_so_in_its_manifest(tmp_path: Path) -> None:
    file = written(tmp_path, line(id="circle", seed=7), "", line(seed=8), line(prompt="a blue square", seed=9))
    outcome = batch(file, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    told = json.loads(outcome.out)
    assert (told["made"], told["there_before"], told["failed"]) == (3, 0, {})
    records = manifest(tmp_path)
    assert [record["seed"] for record in records] == [7, 8, 9]
    for record in records:
        assert sha256_of(tmp_path / "videos" / record["file"]) == record["sha256"]
        assert record["seconds"] > 0
    with Pipeline.from_bundle(miniature("mini"), threads=1) as pipe:
        [alone] = pipe(PROMPT, seed=7, num_inference_steps=2).save(tmp_path / "alone.mp4")
        [other] = pipe(PROMPT, seed=6, num_inference_steps=2).save(tmp_path / "other.mp4")
    assert records[0]["file"] == "circle.mp4"
    assert records[0]["sha256"] == sha256_of(alone)
    assert records[0]["sha256"] != sha256_of(other), "the twin: another seed is another video"


def test_a_second_run_makes_what_is_missing_and_what_has_changed_only(tmp_path: Path) -> None:
    lines = [line(id=name, seed=1) for name in ("kept", "gone", "cut", "changed")]
    batch(written(tmp_path, *lines))
    videos = tmp_path / "videos"
    first = {path.name: path.read_bytes() for path in videos.glob("*.mp4")}
    kept = (videos / "kept.mp4").stat().st_mtime_ns
    (videos / "gone.mp4").unlink()
    (videos / "cut.mp4").write_bytes(first["cut.mp4"][:-1])
    with (videos / "manifest.jsonl").open("a") as file:
        file.write('{"id": "kept", "seed"')  # what a killed process leaves
    lines[3]["seed"] = 2
    told = json.loads(batch(written(tmp_path, *lines), "--json").out)
    assert (told["made"], told["there_before"]) == (3, 1)
    assert (videos / "kept.mp4").stat().st_mtime_ns == kept
    second = {path.name: path.read_bytes() for path in videos.glob("*.mp4")}
    assert {name for name, content in second.items() if content != first[name]} == {"changed.mp4"}
    assert len(manifest(tmp_path)) == 7, "each line of the manifest is whole"


def test_lines_without_a_seed_or_an_id_have_the_same_ones_each_time_and_differ(tmp_path: Path) -> None:
    first, second = line(prompt="a red circle"), line(prompt="a blue square")
    batch(written(tmp_path, first, second))
    records = manifest(tmp_path)
    assert len({record["seed"] for record in records}) == 2
    told = json.loads(batch(written(tmp_path, second, first), "--json").out)
    assert told["made"] == 0, "the order of the lines says nothing"


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"promt": "x"}, "promt"),
        ("{", "no line of a batch"),
        (line(prompt=" "), "the prompt is empty"),
        (line(id="../out"), "cannot name a file"),
        (line(num_frames=7), "makes no videos of 7x48x48"),
        (line(num_inference_steps=0), "steps"),
        (line(image="missing.png"), "takes no image"),
        (line(strength=0.5), "strength means nothing"),
        (line(seed=1), "it is line 1 again"),
        (line(guidance_scale="6"), "guidance_scale"),
        (line(seed=2**64), "seed"),
    ],
    ids=str,
)
def test_a_bad_line_is_stated_with_its_place_before_anything_is_made(
    tmp_path: Path, bad: dict[str, Any] | str, said: str
) -> None:
    file = written(tmp_path, line(seed=1), bad)
    failure = batch(file).failure()
    assert f"{file}:2: " in failure
    assert said in failure
    assert not (tmp_path / "videos").exists()


def test_a_file_that_is_none_or_empty_is_refused(tmp_path: Path) -> None:
    assert "missing.jsonl" in batch(tmp_path / "missing.jsonl").failure()
    assert "has no line" in batch(written(tmp_path)).failure()
    assert not (tmp_path / "videos").exists()


def test_a_video_that_cannot_be_made_is_noted_and_the_others_are_made(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    lines = [line(id="broken", image="broken.png"), line(id="whole", image="whole.png")]
    (tmp_path / "whole.png").write_bytes((Path(__file__).parent / "../../docs/page.webp").read_bytes())
    outcome = batch(written(tmp_path, *lines), "--model", "mini-i2v", "--json")
    assert outcome.code == 1
    told = json.loads(outcome.out)
    assert list(told["failed"]) == ["broken"]
    assert (tmp_path / "videos" / "whole.mp4").exists()
    assert "broken.png" in told["failed"]["broken"]
    (tmp_path / "broken.png").write_bytes((tmp_path / "whole.png").read_bytes())
    told = json.loads(batch(written(tmp_path, *lines), "--model", "mini-i2v", "--json").out)
    assert (told["made"], told["there_before"]) == (1, 1), "what had failed is tried again"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_batch_that_is_ended_keeps_all_but_the_video_being_made(tmp_path: Path, how: signal.Signals) -> None:
    lines = [line(id=f"v{number}", num_inference_steps=4, seed=number) for number in range(6)]
    file = written(tmp_path, *lines)
    process = spawn(PROGRAM, "batch", file, "--output", tmp_path / "videos", "--threads", 1)
    noted = tmp_path / "videos" / "manifest.jsonl"
    while not noted.exists() or len(noted.read_text().splitlines()) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.kill(process.pid, how)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    assert "Traceback" not in err
    done = {record["id"]: record["sha256"] for record in manifest(tmp_path)}
    assert 2 <= len(done) < 6
    told = json.loads(batch(file, "--json").out)
    assert told["there_before"] == len(done)
    assert {path.name for path in (tmp_path / "videos").iterdir()} == {
        *(f"v{number}.mp4" for number in range(6)),
        "manifest.jsonl",
        ".batch.lock",
    }
    for name, digest in done.items():
        assert sha256_of(tmp_path / "videos" / f"{name}.mp4") == digest


def test_two_batches_at_once_do_not_share_a_folder(tmp_path: Path) -> None:
    from cvx_deploy.batch.manifest import manifest_of

    with manifest_of(tmp_path / "videos"):
        assert "another batch has" in batch(written(tmp_path, line())).failure()


def test_workers_without_ray_mean_nothing(tmp_path: Path) -> None:
    outcome = batch(written(tmp_path, line()), "--workers", 2)
    assert outcome.code == 2
    assert "--workers means nothing without --ray" in outcome.err


def test_without_ray_the_command_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    failure = batch(written(tmp_path, line()), "--ray").failure()
    assert "needs ray" in failure
    assert "[ray]" in failure
    assert not (tmp_path / "videos").exists()
