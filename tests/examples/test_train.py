"""Training: its loss is v-prediction's, it goes on to the bit where it was cut off, and what it leaves is exported."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import train as script
from accelerate import Accelerator
from diffusers import CogVideoXDDIMScheduler, CogVideoXImageToVideoPipeline, CogVideoXTransformer3DModel
from objective import Batch, CacheError, Objective, Prepared, rotary
from safetensors.torch import load_file
from state import Run, Training
from train import train
from validate import Validation

from cvx_deploy.errors import CheckpointError, CvxError, MediaError, OutputError, PromptError
from cvx_deploy.exporters.sources.checkpoint import Checkpoint
from cvx_deploy.exporters.sources.lora import read_adapters
from cvx_deploy.families.cogvideox.models import MODELS
from cvx_deploy.progress import SilentProgress
from tests.conftest import Tiny

Cache = Callable[[str], Path]
SHORT = Training(steps=4, rank=2, learning_rate=1e-2, save_every=1)


class CutOffError(Exception):
    """Stands for the end of the process."""


def weights(run: Run) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in run.parameters]


def cut_off_at(steps: int) -> Callable[[Path, torch.dtype], CogVideoXTransformer3DModel]:
    """Load a transformer that ends the run after so many passes."""

    def load(checkpoint: Path, dtype: torch.dtype) -> CogVideoXTransformer3DModel:
        transformer, left = script.transformer_of(checkpoint, dtype), [steps]

        def count(*_: object) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise CutOffError

        transformer.register_forward_pre_hook(count)
        return transformer

    return load


def test_every_model_is_trained_and_its_adapter_fits_the_export(
    model_name: str, tiny: Tiny, tiny_cache: Cache, tmp_path: Path
) -> None:
    how = replace(SHORT, steps=1)
    run = train(tiny(model_name), tiny_cache(model_name), tmp_path, how)
    adapters = [p for name, p in run.transformer.named_parameters() if "lora_B" in name]
    assert all(p.abs().max() > 0 for p in adapters)
    checkpoint = Checkpoint(tiny(model_name))
    (adapter,) = read_adapters([(run.exported, 1.0)], checkpoint.tensors("transformer"), SilentProgress())
    assert len(adapter.layers) == len(adapters) == 6 * checkpoint.configs["transformer"]["num_layers"]


def test_a_run_that_is_cut_off_ends_with_the_same_bits(tiny: Tiny, tiny_cache: Cache, tmp_path: Path) -> None:
    """The twin is another seed, which ends with other weights."""
    how = replace(SHORT, ema=0.9, min_snr=5.0)
    whole = train(tiny("5b"), tiny_cache("5b"), tmp_path / "whole", how)
    for _ in range(3):
        with pytest.raises(CutOffError):
            train(tiny("5b"), tiny_cache("5b"), tmp_path / "cut", how, load=cut_off_at(1))
    resumed = train(tiny("5b"), tiny_cache("5b"), tmp_path / "cut", how)
    other = train(tiny("5b"), tiny_cache("5b"), tmp_path / "other", replace(how, seed=1))
    assert all(map(torch.equal, weights(whole), weights(resumed)))
    assert not all(map(torch.equal, weights(whole), weights(other)))
    name = "pytorch_lora_weights.safetensors"
    left, right = (load_file(run.exported / name) for run in (whole, resumed))
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_all_weights_are_trained_and_saved_for_the_export(tiny: Tiny, tiny_cache: Cache, tmp_path: Path) -> None:
    how = replace(SHORT, method="full", steps=2, checkpointing=True, precision="bf16")
    run = train(tiny("5b"), tiny_cache("5b"), tmp_path, how)
    saved = CogVideoXTransformer3DModel.from_pretrained(run.exported).state_dict()
    before = script.transformer_of(tiny("5b"), torch.float32).state_dict()
    assert all(torch.equal(saved[name], value) for name, value in run.transformer.state_dict().items())
    assert sum(not torch.equal(saved[name], value) for name, value in before.items()) > 0.9 * len(before)


def test_adapters_train_on_weights_in_bfloat16(tiny: Tiny, tiny_cache: Cache, tmp_path: Path) -> None:
    run = train(tiny("2b"), tiny_cache("2b"), tmp_path, replace(SHORT, steps=1, precision="bf16"))
    kinds = {p.dtype for p in run.transformer.parameters() if not p.requires_grad}
    assert (kinds, {p.dtype for p in run.parameters}) == ({torch.bfloat16}, {torch.float32})


def test_settings_cache_and_state_that_do_not_fit_are_refused(
    tiny: Tiny, tiny_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny("5b"), tiny_cache("5b"), tmp_path, replace(SHORT, steps=1))
    with pytest.raises(CacheError, match="other settings"):
        train(tiny("5b"), tiny_cache("5b"), tmp_path, replace(SHORT, steps=2))
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(CacheError, match=r"of a run of 1 processes, and here are 2. fix: start as many"):
        train(tiny("5b"), tiny_cache("5b"), tmp_path, replace(SHORT, steps=1))
    monkeypatch.undo()
    (tmp_path / "state.pt").write_bytes(b"no state")
    with pytest.raises(CacheError, match=r"state\.pt is damaged"):
        train(tiny("5b"), tiny_cache("5b"), tmp_path, replace(SHORT, steps=1))
    with pytest.raises(CacheError, match="the cache is for image-to-video"):
        train(tiny("5b"), tiny_cache("5b-i2v"), tmp_path / "new", SHORT)
    with pytest.raises(CacheError, match=r"index\.json"):
        Prepared(tmp_path)
    with pytest.raises(CheckpointError, match="no transformer in"):
        train(tmp_path, tiny_cache("5b"), tmp_path / "new", SHORT)
    with pytest.raises(CacheError, match="of another model"):
        train(tiny("5b"), tiny_cache("2b"), tmp_path / "new", SHORT)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"):
        train(tiny("5b"), tiny_cache("5b"), tmp_path / "file" / "run", SHORT)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"rank": 0}, "1 at the least"),
        ({"seed": 2**63}, "is no seed"),
        ({"learning_rate": float("nan")}, "above 0"),
        ({"min_snr": 0.0}, "above 0"),
        ({"ema": 1.0}, "averages nothing"),
        ({"guidance": 1.0}, "no guidance to distil at scale 1"),
        ({"method": "full", "guidance": 6.0}, "distilled into a LoRA"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(CvxError, match=told):
        Training(**settings)


def test_validation_needs_prompts_an_interval_and_for_image_to_video_an_image(
    tiny: Tiny, tiny_cache: Cache, tmp_path: Path
) -> None:
    with pytest.raises(PromptError, match="--prompt"):
        Validation(tmp_path, 1, ())
    with pytest.raises(CvxError, match="choose 1 or more"):
        Validation(tmp_path, 0, ("a",))
    with pytest.raises(MediaError, match="no such file"):
        Validation(tmp_path, 1, ("a",), image=tmp_path / "none.png")
    with pytest.raises(MediaError, match="name one with --image"):
        train(tiny("5b-i2v"), tiny_cache("5b-i2v"), tmp_path / "run", SHORT, Validation(tiny("5b-i2v"), 1, ("a",)))


def test_a_loss_that_is_no_number_ends_the_run_and_leaves_what_was_saved(
    tiny: Tiny, tiny_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin is the same run with a loss that is one, which overwrites what was saved."""
    with pytest.raises(CutOffError):
        train(tiny("5b"), tiny_cache("5b"), tmp_path, SHORT, load=cut_off_at(1))
    saved = (tmp_path / "state.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Objective, "loss", lambda *_: torch.tensor(float("nan")))
        with pytest.raises(script.TrainingError, match=r"the loss of step 1 is nan.*lower learning rate"):
            train(tiny("5b"), tiny_cache("5b"), tmp_path, SHORT)
    assert (tmp_path / "state.pt").read_bytes() == saved
    train(tiny("5b"), tiny_cache("5b"), tmp_path, SHORT)
    assert (tmp_path / "state.pt").read_bytes() != saved


@pytest.mark.export
def test_validation_makes_a_video_a_prompt_and_a_sheet_of_all(tmp_path: Path, tiny: Tiny, tiny_cache: Cache) -> None:
    look = Validation(tiny("2b"), 1, ("a red ball", "a blue box"), steps=1)
    train(tiny("2b"), tiny_cache("2b"), tmp_path, replace(SHORT, steps=1), look)
    made = {path.name for path in (tmp_path / "validation" / "step-000001").iterdir()}
    assert made == {"video-0.mp4", "video-1.mp4", "contact.png"}


@pytest.fixture
def scheduler(tiny: Tiny) -> CogVideoXDDIMScheduler:
    return CogVideoXDDIMScheduler.from_pretrained(tiny("5b"), subfolder="scheduler")


def knowing(scheduler: CogVideoXDDIMScheduler, batch: Batch, error: float) -> Any:
    """Return a student that is off the true v by so much."""
    velocity = scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
    return lambda **_: (velocity + error,)


CONFIG = SimpleNamespace(use_rotary_positional_embeddings=False, ofs_embed_dim=None)


def test_the_loss_is_the_error_of_v(scheduler: CogVideoXDDIMScheduler, tiny_cache: Cache) -> None:
    batch = Prepared(tiny_cache("5b")).batch(2, seed=0, step=0)
    objective = Objective(scheduler, CONFIG, min_snr=None, guidance=None)
    for error, loss in ((0.0, 0.0), (2.0, 4.0)):
        found = objective.loss(knowing(scheduler, batch, error), None, batch)
        assert float(found) == pytest.approx(loss, rel=1e-5)


def test_min_snr_weighs_timesteps_as_its_paper_does(scheduler: CogVideoXDDIMScheduler, tiny_cache: Cache) -> None:
    batch = replace(Prepared(tiny_cache("5b")).batch(2, seed=0, step=0), timesteps=torch.tensor([10, 700]))
    objective = Objective(scheduler, CONFIG, min_snr=5.0, guidance=None)
    kept = scheduler.alphas_cumprod[batch.timesteps].double()
    ratio = kept / (1 - kept)
    expected = (ratio.clamp(max=5.0) / (ratio + 1)).mean()
    found = objective.loss(knowing(scheduler, batch, 1.0), None, batch)
    assert float(found) == pytest.approx(float(expected), rel=1e-4)
    assert float(ratio[0]) > 5 > float(ratio[1])


def test_a_fresh_student_is_its_teacher_without_guidance_and_not_with(
    tiny: Tiny, tiny_cache: Cache, scheduler: CogVideoXDDIMScheduler
) -> None:
    transformer = script.transformer_of(tiny("5b"), torch.float32)
    script.make_trainable(transformer, SHORT)
    batch = Prepared(tiny_cache("5b")).batch(1, seed=0, step=0, drop_captions=False)
    losses = [
        float(Objective(scheduler, transformer.config, None, scale).loss(transformer, transformer, batch).detach())
        for scale in (1.0, 6.0)
    ]
    assert losses[0] < 1e-9 < 1e-6 < losses[1]


def test_rotary_tables_are_those_of_the_pipelines(model_name: str, tiny: Tiny) -> None:
    """The twin is a grid of another form."""
    transformer = script.transformer_of(tiny(model_name), torch.float32)
    config, frames = transformer.config, 4
    height, width = config.sample_height, config.sample_width
    found = rotary(config, frames, height, width)
    if MODELS[model_name].traits.positions == "sincos":
        assert found is None
        return
    pipeline: Any = SimpleNamespace(transformer=transformer, vae_scale_factor_spatial=8)
    expected = CogVideoXImageToVideoPipeline._prepare_rotary_positional_embeddings(
        pipeline, 8 * height, 8 * width, frames, torch.device("cpu")
    )
    assert found is not None
    assert all(map(torch.equal, found, expected))
    other = rotary(config, frames + 2, height, width)
    assert other is not None
    assert not torch.equal(other[0][: len(found[0])], found[0]) or other[0].shape != found[0].shape


def test_batches_follow_from_seed_and_step(tiny_cache: Cache) -> None:
    prepared = Prepared(tiny_cache("5b-i2v"))
    batch, again = (prepared.batch(2, 0, 3) for _ in range(2))
    assert torch.equal(batch.latents, again.latents)
    assert torch.equal(batch.noise, again.noise)
    assert batch.images is not None
    assert batch.images[:, :1].abs().max() > 0 == batch.images[:, 1:].abs().max()
    for seed, step in ((1, 3), (0, 4)):
        assert not torch.equal(prepared.batch(2, seed, step).noise, batch.noise)


def test_processes_share_the_batch_of_one(tiny_cache: Cache) -> None:
    """The twin is a process of another place, whose part is another."""
    prepared = Prepared(tiny_cache("5b-i2v"))
    whole = prepared.batch(4, 0, 3)
    halves = [prepared.batch(2, 0, 3, process, 2) for process in range(2)]
    for name in ("latents", "noise", "images", "prompts", "timesteps"):
        parts = [getattr(half, name) for half in halves]
        assert torch.equal(torch.cat(parts), getattr(whole, name))
        assert not torch.equal(*parts)
