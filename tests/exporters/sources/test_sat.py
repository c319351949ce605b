"""SAT files, made here from tiny checkpoints by the inverse renaming, become the same checkpoints again to the bit."""

import shutil
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cvx_deploy.errors import CheckpointError, WrongModelError
from cvx_deploy.exporters.sources.checkpoint import Checkpoint
from cvx_deploy.exporters.sources.sat import checkpoint_from_sat
from tests.command import cvx
from tests.conftest import Tiny

State = dict[str, torch.Tensor]

# diffusers' end of a name in a block to SAT's.
BLOCK = {
    "norm1.norm": "transformer.layers.{}.input_layernorm",
    "norm2.norm": "transformer.layers.{}.post_attention_layernorm",
    "attn1.to_out.0": "transformer.layers.{}.attention.dense",
    "attn1.norm_q": "mixins.adaln_layer.query_layernorm_list.{}",
    "attn1.norm_k": "mixins.adaln_layer.key_layernorm_list.{}",
    "ff.net.0.proj": "transformer.layers.{}.mlp.dense_h_to_4h",
    "ff.net.2": "transformer.layers.{}.mlp.dense_4h_to_h",
}
TOP = {
    "norm_final": "transformer.final_layernorm",
    "norm_out.norm": "mixins.final_layer.norm_final",
    "norm_out.linear": "mixins.final_layer.adaLN_modulation.1",
    "proj_out": "mixins.final_layer.linear",
    "patch_embed.proj": "mixins.patch_embed.proj",
    "patch_embed.text_proj": "mixins.patch_embed.text_proj",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "ofs_embedding.linear_1": "ofs_embed.0",
    "ofs_embedding.linear_2": "ofs_embed.2",
}
COMPUTED = {
    "mixins.pos_embed.freqs_sin": torch.zeros(3, 2),
    "transformer.word_embeddings.weight": torch.zeros(1, 8),
    "transformer.position_embeddings.weight": torch.zeros(1, 8),
}


def state_of(checkpoint: Path, component: str) -> State:
    """Return every tensor of a component."""
    files = {tensor.file for tensor in Checkpoint(checkpoint).tensors(component).values()}
    return {name: value for file in files for name, value in load_file(checkpoint / file).items()}


def sat_transformer(state: State) -> State:
    """Return a diffusers transformer under SAT's names, with what SAT keeps besides."""
    return {f"model.diffusion_model.{key}": value for key, value in _sat_transformer(state)}


def _sat_transformer(state: State) -> Iterator[tuple[str, torch.Tensor]]:
    yield from COMPUTED.items()
    yield "mixins.pos_embed.pos_embedding", state.get("patch_embed.pos_embedding", torch.zeros(1, 4, 8))
    for name, value in state.items():
        layer, _, kind = name.rpartition(".")
        if layer in TOP:
            yield f"{TOP[layer]}.{kind}", value
        elif layer.startswith("transformer_blocks."):
            _, index, end = layer.split(".", 2)
            block = f"transformer_blocks.{index}"
            if end in BLOCK:
                yield f"{BLOCK[end].format(index)}.{kind}", value
            elif end == "attn1.to_q":
                parts = [state[f"{block}.attn1.to_{part}.{kind}"] for part in "qkv"]
                yield f"transformer.layers.{index}.attention.query_key_value.{kind}", torch.cat(parts)
            elif end == "norm1.linear":
                video, text = state[f"{block}.norm1.linear.{kind}"].chunk(2)
                video_mlp, text_mlp = state[f"{block}.norm2.linear.{kind}"].chunk(2)
                whole = torch.cat([video, video_mlp, text, text_mlp])
                yield f"mixins.adaln_layer.adaLN_modulations.{index}.1.{kind}", whole


def sat_vae(state: State) -> State:
    """Return a diffusers VAE under SAT's names, with the loss that SAT keeps besides."""
    last = max(int(name.split(".")[2]) for name in state if name.startswith("decoder.up_blocks."))
    renamed = {"loss.logvar": torch.zeros(())}
    for name, value in state.items():
        words = name.split(".")
        if "mid_block" in words:
            words[1:4] = ["mid", f"block_{int(words[3]) + 1}"]
        elif words[1] in ("down_blocks", "up_blocks"):
            index = int(words[2]) if words[1] == "down_blocks" else last - int(words[2])
            words[1:3] = [words[1].removesuffix("_blocks"), str(index)]
            if words[3] == "resnets":
                words[3] = "block"
            else:
                words[3:5] = [words[3].removesuffix("rs")]
        renamed[".".join(words).replace("conv_shortcut", "nin_shortcut")] = value
    return renamed


def sat_files(checkpoint: Path, folder: Path) -> tuple[Path, Path]:
    """Write a checkpoint's transformer and VAE as SAT has them."""
    folder.mkdir(exist_ok=True)
    transformer, vae = folder / "mp_rank_00_model_states.pt", folder / "3d-vae.pt"
    torch.save({"module": sat_transformer(state_of(checkpoint, "transformer"))}, transformer)
    torch.save({"state_dict": sat_vae(state_of(checkpoint, "vae"))}, vae)
    return transformer, vae


def altered(checkpoint: Path, folder: Path) -> Path:
    """Return a copy of a checkpoint whose transformer and VAE are all zeros, so that nothing of them can be kept."""
    copy = folder / "base"
    shutil.copytree(checkpoint, copy)
    (copy / "SHA256SUMS").unlink()
    for component in ("transformer", "vae"):
        for tensor in Checkpoint(copy).tensors(component).values():
            with (copy / tensor.file).open("r+b") as file:
                file.seek(tensor.offset)
                file.write(bytes(tensor.nbytes))
    return copy


def same(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def test_sat_files_become_the_checkpoint_they_were_to_the_bit(
    model_name: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cvx_deploy.exporters.sources.sat.FULL_SHARD_BYTES", 200_000)
    transformer, vae = sat_files(tiny(model_name), tmp_path / "sat")
    base = altered(tiny(model_name), tmp_path)
    made = checkpoint_from_sat(transformer, vae, base, tmp_path / "made")
    for component in ("text_encoder", "transformer", "vae"):
        assert same(state_of(made, component), state_of(tiny(model_name), component))
    assert len(list((made / "transformer").glob("*.safetensors"))) > 1
    assert not same(state_of(made, "transformer"), state_of(base, "transformer"))
    for line in (made / "SHA256SUMS").read_text().splitlines():
        digest, file = line.split("  ")
        assert sha256((made / file).read_bytes()).hexdigest() == digest
    assert {path.name for path in (made / "tokenizer").iterdir()} == {p.name for p in (base / "tokenizer").iterdir()}


def test_an_altered_sat_tensor_shows(tiny: Tiny, tmp_path: Path) -> None:
    state = sat_transformer(state_of(tiny("5b"), "transformer"))
    key = "model.diffusion_model.mixins.adaln_layer.adaLN_modulations.1.1.bias"
    state[key] = state[key].flip(0)
    torch.save(state, tmp_path / "altered.pt")
    made = checkpoint_from_sat(tmp_path / "altered.pt", None, tiny("5b"), tmp_path / "made")
    assert not same(state_of(made, "transformer"), state_of(tiny("5b"), "transformer"))
    assert same(state_of(made, "vae"), state_of(tiny("5b"), "vae"))


def test_a_patch_embedding_kept_as_a_linear_layer_is_the_same_convolution(tiny: Tiny, tmp_path: Path) -> None:
    state = sat_transformer(state_of(tiny("2b"), "transformer"))
    key = "model.diffusion_model.mixins.patch_embed.proj.weight"
    assert state[key].ndim == 4
    state[key] = state[key].flatten(1)
    torch.save(state, tmp_path / "linear.pt")
    made = checkpoint_from_sat(tmp_path / "linear.pt", None, tiny("2b"), tmp_path / "made")
    assert same(state_of(made, "transformer"), state_of(tiny("2b"), "transformer"))


def test_the_command_converts_and_the_result_exports_as_a_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    transformer, vae = sat_files(tiny("5b"), tmp_path / "sat")
    words = ("--transformer", transformer, "--vae", vae, "--checkpoint", tiny("5b"), "--output", tmp_path / "made")
    assert cvx("convert", *words).out.strip() == str(tmp_path / "made")
    made = Checkpoint(tmp_path / "made")
    assert made.traits == Checkpoint(tiny("5b")).traits
    assert "already exists" in cvx("convert", *words).failure()
    assert cvx("convert", "--checkpoint", tiny("5b"), "--output", tmp_path / "x").code == 2


class Evil:
    """Would run code if it were unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, ("ran",)


def refusal(content: object, tiny: Tiny, folder: Path, *, zipped: bool = True) -> str:
    """Return what is said of a SAT transformer with some content, after making sure that nothing is left."""
    torch.save(content, folder / "sat.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as caught:
        checkpoint_from_sat(folder / "sat.pt", None, tiny("5b"), folder / "made")
    assert "\n" not in str(caught.value)
    assert [path.name for path in folder.iterdir()] == ["sat.pt"]
    return str(caught.value)


def test_a_pickle_that_could_run_code_is_refused(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "holds more than tensors" in refusal({"module": {"a": Evil()}}, tiny, tmp_path)
    assert "no file that torch.save has written" in refusal({"a": torch.zeros(1)}, tiny, tmp_path, zipped=False)


def test_what_does_not_fit_names_its_first_offending_key(tiny: Tiny, tmp_path: Path) -> None:
    prefix = "model.diffusion_model."
    whole = sat_transformer(state_of(tiny("5b"), "transformer"))
    without = {key: value for key, value in whole.items() if "layers.0.attention.dense.bias" not in key}
    qkv = f"{prefix}transformer.layers.0.attention.query_key_value.weight"
    adapter = f"{prefix}transformer.layers.0.attention.dense.matrix_A.0"
    trained = {key.replace("attention.dense.", "attention.dense.original."): value for key, value in whole.items()}
    for state, said in (
        (without, "has no transformer.layers.0.attention.dense.bias, which is to become"),
        ({**whole, qkv: whole[qkv][:-1]}, "attention.query_key_value.weight is"),
        ({**whole, qkv: whole[qkv].int()}, "is torch.int32"),
        ({**whole, adapter: torch.zeros(2, 2)}, "tools/export_sat_lora_weight.py"),
        ({**trained, adapter: torch.zeros(2, 2)}, "tools/export_sat_lora_weight.py"),
        (trained, "has no transformer.layers.0.attention.dense.weight"),
        ({**whole, "extra": torch.zeros(1)}, "extra has no place in the transformer"),
        ({"module": 3}, "module is no tensor"),
        ([torch.zeros(1)], "holds no state dict"),
    ):
        assert said in refusal(state, tiny, tmp_path)


def test_another_models_file_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    transformer, _ = sat_files(tiny("2b"), tmp_path)
    with pytest.raises(WrongModelError, match="same model"):
        checkpoint_from_sat(transformer, None, tiny("5b"), tmp_path / "made")


def test_a_damaged_or_absent_file_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    transformer, _ = sat_files(tiny("5b"), tmp_path)
    transformer.write_bytes(transformer.read_bytes()[:5000])
    for path, said in ((transformer, "is damaged"), (tmp_path / "absent.pt", "there is no file")):
        with pytest.raises(CheckpointError, match=said):
            checkpoint_from_sat(path, None, tiny("5b"), tmp_path / "made")
