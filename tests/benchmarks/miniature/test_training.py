"""Training that is stopped and resumed ends in the same bits as training that was not."""

import itertools
from pathlib import Path

import latents
import pytest
import torch
import train_transformer
import train_vae
from safetensors.torch import save_file
from text import TEXT_LENGTH, load_tokenizer, token_ids
from training import Rhythm, Run, load_average

SMALL = train_transformer.Size(heads=2, head_dim=16, layers=2, time_embed_dim=8, text_width=16, text_layers=1)
QUIET = Rhythm(report=10**9, measure=10**9, save_seconds=10**9)
CURRICULUM = (
    train_vae.Stage(until=2, frames=1, crop=16, batch=2, learning_rate=1e-3),
    train_vae.Stage(until=4, frames=9, crop=16, batch=1, learning_rate=1e-3),
    train_vae.Stage(until=6, frames=9, crop=16, batch=1, learning_rate=1e-3, encoder=False),
)


def _train_vae(state: Path, steps: int, data_seed: int = 0) -> Run:
    torch.manual_seed(0)
    vae = train_vae.new_vae((8, 8, 8, 8))
    return train_vae.train_vae(vae, state, steps, data_seed, CURRICULUM, QUIET)


@pytest.fixture
def sources(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> train_transformer.Sources:
    """Eight clips' latents, random but the same each time."""
    monkeypatch.setattr(latents, "CHUNK", 8)
    folder = tmp_path / "latents"
    folder.mkdir()
    parts = {"clips": torch.Generator().manual_seed(1), "images": torch.Generator().manual_seed(2)}
    frames = {"clips": 3, "images": 1}
    tensors = {name: torch.randn(8, 16, frames[name], 6, 6, generator=g).half() for name, g in parts.items()}
    save_file(tensors, folder / "chunk-0000.safetensors")
    return train_transformer.Sources(folder, tmp_path / "state", tokenizer_folder)


def _train_transformer(task: train_transformer.Task, sources: train_transformer.Sources, stop: int) -> Run:
    plan = train_transformer.Plan(steps=4, batch=2)
    return train_transformer.train_transformer(task, sources, plan, 0, stop, SMALL, QUIET)


def _same(one: Run, other: Run) -> bool:
    weights = [run.network.state_dict() | {f"average {k}": v for k, v in run.average.items()} for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    return all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_vae_training_resumes_to_the_bit(tmp_path: Path) -> None:
    whole = _train_vae(tmp_path / "whole", 6)
    for steps in (1, 3, 5, 6):
        parts = _train_vae(tmp_path / "parts", steps)
    assert parts.step == whole.step == 6
    assert _same(whole, parts)


def test_vae_training_on_other_data_ends_elsewhere(tmp_path: Path) -> None:
    assert not _same(_train_vae(tmp_path / "one", 2), _train_vae(tmp_path / "other", 2, data_seed=1))


def test_the_encoder_settles_on_its_averaged_weights(tmp_path: Path) -> None:
    before, after = _train_vae(tmp_path, 4), _train_vae(tmp_path, 6)
    decoder_moved = False
    for name, p in after.network.named_parameters():
        if name.startswith("encoder."):
            assert torch.equal(p, before.average[name])
            assert torch.equal(after.average[name], before.average[name])
        else:
            decoder_moved |= not torch.equal(p, before.average[name])
    assert decoder_moved


def test_single_frames_are_computed_exactly_while_kernels_see_no_past() -> None:
    torch.manual_seed(0)
    vae = train_vae.new_vae((8, 8, 8, 8))
    frame = torch.randn(1, 3, 1, 16, 16)
    with torch.no_grad():
        slow = vae.decode(vae.encode(frame).latent_dist.mode()).sample
        with train_vae.single_frames():
            fast = vae.decode(vae.encode(frame).latent_dist.mode()).sample
        assert torch.allclose(fast, slow, atol=1e-5)
        # The twin: a kernel that does see the past is another network.
        vae.decoder.conv_in.conv.weight[:, :, 0] = 0.5
        assert not torch.allclose(fast, vae.decode(vae.encode(frame).latent_dist.mode()).sample, atol=1e-3)


@pytest.mark.parametrize("task", ["text-to-video", "image-to-video"])
def test_transformer_training_resumes_to_the_bit(
    task: train_transformer.Task, sources: train_transformer.Sources, tmp_path: Path
) -> None:
    whole = _train_transformer(task, train_transformer.Sources(sources.latents, tmp_path / "w", sources.tokenizer), 4)
    for stop in (1, 3, 4):
        parts = _train_transformer(task, sources, stop)
    assert parts.step == whole.step == 4
    assert _same(whole, parts)


def test_image_to_video_starts_as_text_to_video(sources: train_transformer.Sources, tmp_path: Path) -> None:
    trained = _train_transformer("text-to-video", sources, 2)
    tokenizer = load_tokenizer(sources.tokenizer)
    before = train_transformer.TextToLatents("text-to-video", SMALL, len(tokenizer))
    assert load_average(before, sources.state) == trained.step
    start = train_transformer.new_network("image-to-video", SMALL, tokenizer, sources.state)
    noisy, image = torch.randn(2, 1, 3, 8, 6, 6)
    ids = token_ids(tokenizer, ["a red ball"], 16)
    with torch.no_grad():
        plain = before(noisy, ids, torch.tensor([500]))
        assert torch.allclose(start(torch.cat([noisy, image], dim=2), ids, torch.tensor([500])), plain, atol=1e-6)


def test_short_prompts_train_the_function_of_full_ones(tokenizer_folder: Path) -> None:
    """The twin shows that the padding's weight is what does it."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(tokenizer_folder)
    network = train_transformer.TextToLatents("text-to-video", SMALL, len(tokenizer))
    for p in network.transformer.parameters():
        torch.nn.init.normal_(p, std=0.2)
    captions = ["a red circle moves to the right", ""]
    latent, time = torch.randn(2, 3, 8, 6, 6), torch.tensor([900, 10])
    with torch.no_grad():
        short, full = (network(latent, token_ids(tokenizer, captions, n), time) for n in (16, TEXT_LENGTH))
        assert torch.allclose(short, full, atol=1e-4)
        unweighted = network.transformer(
            hidden_states=latent,
            encoder_hidden_states=network.text_encoder(token_ids(tokenizer, captions, 16))[0],
            timestep=time,
            image_rotary_emb=train_transformer._rotary(16, 3, 3),
        ).sample
        assert not torch.allclose(unweighted, full, atol=1e-2)


def test_rate_warms_up_holds_and_falls_to_nothing() -> None:
    plan = train_transformer.Plan(steps=5000, learning_rate=1.0)
    rates = [plan.rate(step) for step in range(5000)]
    assert rates[0] < 0.01
    assert max(rates) == 1.0
    assert rates[-1] < 0.01
    assert all(late <= early for early, late in itertools.pairwise(rates[4000:]))


def test_an_interrupted_save_leaves_the_last_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _train_vae(tmp_path, 1)

    def interrupted(saved: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _train_vae(tmp_path, 2)
    monkeypatch.undo()
    assert _train_vae(tmp_path, 2).step == 2


def test_learned_positions_reach_the_checkpoint(sources: train_transformer.Sources) -> None:
    tokenizer = load_tokenizer(sources.tokenizer)
    torch.manual_seed(0)
    network = train_transformer.TextToLatents("image-to-video", SMALL, len(tokenizer))
    for p in network.transformer.parameters():
        torch.nn.init.normal_(p, std=0.2)
    noisy, time = torch.randn(1, 3, 16, 6, 6), torch.tensor([500])
    ids = token_ids(tokenizer, ["a red ball"], TEXT_LENGTH)
    with torch.no_grad():
        without = network(noisy, ids, time)
        network.positions.normal_()
        trained = network(noisy, ids, time)
        finished = network.finished_transformer()
        assert finished.config.use_learned_positional_embeddings
        published = finished(
            hidden_states=noisy,
            encoder_hidden_states=network.text_encoder(ids)[0],
            timestep=time,
            image_rotary_emb=train_transformer._rotary(16, 3, 3),
        ).sample
    assert torch.allclose(published, trained, atol=1e-5)
    assert not torch.allclose(published, without, atol=1e-2)
