"""Adapters in every form that trainers write, merged to the bit as diffusers and peft merge them; misfits refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.errors import CheckpointError, CvxError, WrongModelError
from cvx_deploy.exporters.sources.checkpoint import Checkpoint
from cvx_deploy.exporters.sources.lora import MERGED, merge_adapters, read_adapters
from cvx_deploy.exporters.tracing.contract import TORCH_DTYPES
from cvx_deploy.precision import Precision
from cvx_deploy.progress import SilentProgress
from tests.command import cvx
from tests.conftest import Tiny
from tests.untraced import without_tracing

State = dict[str, torch.Tensor]
Loras = list[tuple[Path, float]]

ATTENTION = tuple(f"transformer_blocks.0.attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))
WIDER = (
    "transformer_blocks.1.ff.net.0.proj",
    "transformer_blocks.1.norm1.linear",
    "proj_out",
    "transformer_blocks.0.attn1.to_q",
)
PLAIN = "pytorch_lora_weights.safetensors"


def matrices(checkpoint: Path, layers: tuple[str, ...], rank: int, seed: int) -> State:
    """Return lora_A and lora_B of some layers, of plain keys, large enough to change every weight."""
    generator = torch.Generator().manual_seed(seed)
    weights = Checkpoint(checkpoint).tensors("transformer")
    state = {}
    for layer in layers:
        out, width = weights[f"{layer}.weight"].shape
        state[f"{layer}.lora_A.weight"] = torch.randn(rank, width, generator=generator) / width**0.5
        state[f"{layer}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
    return state


def written(path: Path, state: State, prefix: str = "transformer.", metadata: dict[str, str] | None = None) -> Path:
    """Write an adapter and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({prefix + key: value for key, value in state.items()}, path, metadata=metadata)
    return path


def merged(checkpoint: Path, loras: Loras, folder: Path, precision: Precision = "fp32") -> State:
    """Return what we make of the transformer's weights that the adapters change."""
    source, progress = Checkpoint(checkpoint), SilentProgress()
    adapters = read_adapters(loras, source.tensors("transformer"), progress)
    folder.mkdir(exist_ok=True)
    result = merge_adapters(adapters, source, precision, folder, progress)
    state = load_file(folder / MERGED)
    assert {name for name, stored in result.tensors("transformer").items() if stored.file == MERGED} == set(state)
    return state


def fused(checkpoint: Path, loras: Loras, precision: Precision = "fp32") -> State:
    """Return what diffusers makes of all of them."""
    parts = {"text_encoder": None, "tokenizer": None, "vae": None}
    pipe = CogVideoXPipeline.from_pretrained(checkpoint, torch_dtype=TORCH_DTYPES[precision], **parts)
    names = [f"adapter_{index}" for index in range(len(loras))]
    for name, (path, _) in zip(names, loras, strict=True):
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    pipe.set_adapters(names, [scale for _, scale in loras])
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    state: State = pipe.transformer.state_dict()
    return state


def same(found: State, expected: State, *, changed: int) -> bool:
    """Whether the merged weights are the expected ones to the bit, after counting them."""
    assert len(found) == changed
    return all(
        value.dtype == expected[name].dtype and torch.equal(value, expected[name]) for name, value in found.items()
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", ["2b", "1.5-5b"])
def test_two_adapters_merge_to_the_bit_as_in_diffusers(
    name: str, precision: Precision, tiny: Tiny, tmp_path: Path
) -> None:
    first = written(tmp_path / "first.safetensors", matrices(tiny(name), ATTENTION, 4, 1))
    half = {key: value.bfloat16() for key, value in matrices(tiny(name), WIDER, 7, 2).items()}
    second = written(tmp_path / "second.safetensors", half)
    loras = [(first, 0.7), (second, -1.3)]
    expected = fused(tiny(name), loras, precision)
    assert same(merged(tiny(name), loras, tmp_path / "a", precision), expected, changed=7)
    assert not same(merged(tiny(name), [(first, 0.7), (second, -1.2)], tmp_path / "b", precision), expected, changed=7)


def test_what_no_adapter_touches_is_as_it_was(tiny: Tiny, tmp_path: Path) -> None:
    path = written(tmp_path / PLAIN, matrices(tiny("5b"), ATTENTION, 4, 1))
    before = CogVideoXTransformer3DModel.from_pretrained(tiny("5b") / "transformer").state_dict()
    after = fused(tiny("5b"), [(path, 1.0)])
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == set(merged(tiny("5b"), [(path, 1.0)], tmp_path / "out"))


def peft_default(key: str) -> str:
    return "base_model.model." + key.replace(".weight", ".default.weight")


def down_up(key: str) -> str:
    return "transformer." + key.replace("lora_A", "lora.down").replace("lora_B", "lora.up")


def processor(key: str) -> str:
    layer, side = key.removesuffix(".weight").rsplit(".lora_", 1)
    block, to = layer.removesuffix(".0").rsplit(".", 1)
    return f"transformer.{block}.processor.{to}_lora.{'down' if side == 'A' else 'up'}.weight"


def comfy(key: str) -> str:
    return "diffusion_model." + key.replace("lora_A", "lora_down").replace("lora_B", "lora_up")


def flat(prefix: str) -> Callable[[str], str]:
    def renamed(key: str) -> str:
        layer, side = key.removesuffix(".weight").rsplit(".lora_", 1)
        return f"{prefix}_{layer.replace('.', '_')}.lora_{'down' if side == 'A' else 'up'}.weight"

    return renamed


FORMS = [
    *(str, peft_default, down_up, processor, comfy, *map(flat, ("lora_unet", "lora_unet_", "lora_transformer"))),
    *(lambda key: f"base_model.model.{key}", lambda key: f"diffusion_model.{key}"),
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_keys_means_the_same(form: Callable[[str], str], tiny: Tiny, tmp_path: Path) -> None:
    state = matrices(tiny("5b"), ATTENTION, 4, 1)
    expected = fused(tiny("5b"), [(written(tmp_path / "plain.safetensors", state), 0.5)])
    renamed = written(tmp_path / "renamed.safetensors", {form(key): value for key, value in state.items()}, "")
    assert same(merged(tiny("5b"), [(renamed, 0.5)], tmp_path / "out"), expected, changed=4)


@pytest.mark.parametrize("form", [down_up, processor])
def test_diffusers_reads_the_older_forms_so(form: Callable[[str], str], tiny: Tiny, tmp_path: Path) -> None:
    renamed = {form(key): value for key, value in matrices(tiny("5b"), ATTENTION, 4, 1).items()}
    loras = [(written(tmp_path / PLAIN, renamed, ""), 1.0)]
    assert same(merged(tiny("5b"), loras, tmp_path / "out"), fused(tiny("5b"), loras), changed=4)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 10},
        {"r": 4, "lora_alpha": 3, "use_rslora": True},
        {"r": 8, "lora_alpha": 8, "rank_pattern": {"to_[qkv]": 4, "to_out.0": 4}, "alpha_pattern": {"attn1.to_v": 3}},
    ],
)
def test_the_config_in_the_header_is_obeyed_as_in_diffusers(config: dict[str, Any], tiny: Tiny, tmp_path: Path) -> None:
    CogVideoXPipeline.save_lora_weights(
        tmp_path,
        matrices(tiny("5b"), ATTENTION, 4, 1),
        transformer_lora_adapter_metadata={"target_modules": ["to_q", "to_k", "to_v", "to_out.0"], **config},
    )
    expected = fused(tiny("5b"), [(tmp_path / PLAIN, 0.9)], "bf16")
    assert same(merged(tiny("5b"), [(tmp_path, 0.9)], tmp_path / "out", "bf16"), expected, changed=4)
    plain = written(tmp_path / "plain.safetensors", matrices(tiny("5b"), ATTENTION, 4, 1))
    assert not same(merged(tiny("5b"), [(plain, 0.9)], tmp_path / "twin", "bf16"), expected, changed=4)


@pytest.mark.parametrize("name", ["2b", "1.5-5b"])  # patch_embed.proj is a convolution and a linear layer
def test_an_adapter_that_peft_saved_merges_as_peft_merges_it(name: str, tiny: Tiny, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = CogVideoXTransformer3DModel.from_pretrained(tiny(name) / "transformer", torch_dtype=torch.float32)
    config = peft.LoraConfig(
        r=6,
        lora_alpha=9,
        target_modules=["to_q", "to_out.0", "patch_embed.proj", "ff.net.2"],
        rank_pattern={"ff.net.2": 3},
        init_lora_weights=False,
        lora_bias=True,
    )
    model = peft.get_peft_model(network, config)
    for key, value in model.named_parameters():
        if "lora_B" in key and key.endswith("bias"):
            torch.nn.init.normal_(value)
    model.save_pretrained(str(tmp_path))
    expected = model.merge_and_unload().state_dict()
    keys = [key for key in load_file(tmp_path / "adapter_model.safetensors") if key.endswith("lora_A.weight")]
    assert "base_model.model.patch_embed.proj.lora_A.weight" in keys
    assert same(merged(tiny(name), [(tmp_path, 1.0)], tmp_path / "out"), expected, changed=2 * len(keys))


def test_names_without_dots_are_told_apart_in_every_layer(model_name: str, tiny: Tiny) -> None:
    """What kohya's keys are read by: no two layers of a model have the same name without dots."""
    tensors = Checkpoint(tiny(model_name)).tensors("transformer")
    layers = {name.rpartition(".")[0] for name in tensors}
    assert len({layer.replace(".", "_") for layer in layers}) == len(layers)


def test_the_alpha_of_a_name_without_dots_is_obeyed(tiny: Tiny, tmp_path: Path) -> None:
    state = {flat("lora_unet")(key): value for key, value in matrices(tiny("5b"), ATTENTION[:1], 4, 1).items()}
    state["lora_unet_transformer_blocks_0_attn1_to_q.alpha"] = torch.tensor(2.0)
    state["lora_te_layer.alpha"] = torch.tensor(1.0)
    path = written(tmp_path / "kohya.safetensors", state, "")
    plain = written(tmp_path / "plain.safetensors", matrices(tiny("5b"), ATTENTION[:1], 4, 1))
    expected = fused(tiny("5b"), [(plain, 0.5)])
    assert same(merged(tiny("5b"), [(path, 1.0)], tmp_path / "out"), expected, changed=1)
    assert not same(merged(tiny("5b"), [(path, 0.9)], tmp_path / "twin"), expected, changed=1)


@pytest.mark.parametrize(
    ("alpha", "said"),
    [
        (torch.ones(2), r"the alpha of .*to_q is \[2\] and no number"),
        (torch.ones(0), r"is \[0\] and no number"),
        (torch.ones((), dtype=torch.complex64), "no number"),
        (torch.tensor(torch.inf), "the alpha of .* is inf"),
        (torch.tensor(torch.nan), "the alpha of .* is nan"),
        (torch.tensor(1e30), r"the alpha of .* is 1\."),
    ],
)
def test_an_alpha_that_is_no_number_is_refused(alpha: torch.Tensor, said: str, tiny: Tiny, tmp_path: Path) -> None:
    state = {**matrices(tiny("5b"), ATTENTION[:1], 4, 1), f"{ATTENTION[0]}.alpha": alpha}
    path = written(tmp_path / PLAIN, state)
    with pytest.raises(CheckpointError, match=said):
        read_adapters([(path, 1.0)], Checkpoint(tiny("5b")).tensors("transformer"), SilentProgress())


def test_an_alpha_key_scales_its_layer(tiny: Tiny, tmp_path: Path) -> None:
    state = matrices(tiny("5b"), ATTENTION[:1], 4, 1)
    plain = written(tmp_path / "plain.safetensors", state)
    scaled = written(tmp_path / "scaled.safetensors", {**state, f"{ATTENTION[0]}.alpha": torch.tensor(2.0)})
    expected = fused(tiny("5b"), [(plain, 0.5)])
    assert same(merged(tiny("5b"), [(scaled, 1.0)], tmp_path / "out"), expected, changed=1)


class Notes(SilentProgress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_text_encoder_part_is_left_out_and_said(tiny: Tiny, tmp_path: Path) -> None:
    state = {f"transformer.{key}": value for key, value in matrices(tiny("5b"), ATTENTION, 4, 1).items()}
    state["text_encoder.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight"] = torch.zeros(4, 8)
    loras = [(written(tmp_path / PLAIN, state, ""), 1.0)]
    assert same(merged(tiny("5b"), loras, tmp_path / "out"), fused(tiny("5b"), loras), changed=4)
    notes = Notes()
    read_adapters(loras, Checkpoint(tiny("5b")).tensors("transformer"), notes)
    assert "1 tensors for a text encoder" in notes.notes[0]


Q = f"transformer.{ATTENTION[0]}"


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"lora_unet_blocks_0_attn": (4, 8)}, "lora_unet_blocks_0_attn is no key of a LoRA of CogVideoX"),
        ({f"{Q}.lora_A.bias": (4,)}, "lora_A.bias is no key"),
        ({f"{Q}.lora_A.weight": (4, 64)}, "no lora_B beside transformer.transformer_blocks.0.attn1.to_q.lora_A"),
        ({f"{Q}.lora_A.weight": (4, 64), f"{Q}.lora_B.weight": (64, 3)}, "do not go together"),
        ({f"{Q}.lora_A.weight": (4, 8), f"{Q}.lora_B.weight": (8, 4)}, "is for a weight of [8, 8], the checkpoint's"),
        ({"lora_unet_proj.lora_down.weight": (4, 8), "lora_unet_proj.lora_up.weight": (8, 4)}, "checkpoint has not"),
        ({"proj.lora_A.weight": (4, 8), "proj.lora_B.weight": (8, 4)}, "is for a layer that this checkpoint has not"),
        ({f"{Q}.lora_magnitude_vector": (8,)}, "only LoRA is merged"),
        ({f"{Q}.lora_A.weight": (4, 8), f"{Q}.lora_A.default.weight": (4, 8)}, "are for the same layer"),
        ({"text_encoder.q.lora_A.weight": (4, 8)}, "holds nothing for the transformer"),
    ],
)
def test_an_adapter_that_does_not_fit_names_its_first_offending_key(
    state: dict[str, tuple[int, ...]], said: str, tiny: Tiny, tmp_path: Path
) -> None:
    path = written(tmp_path / PLAIN, {key: torch.zeros(shape) for key, shape in state.items()}, "")
    with pytest.raises(CheckpointError) as caught:
        read_adapters([(path, 1.0)], Checkpoint(tiny("5b")).tensors("transformer"), SilentProgress())
    assert said in caught.value.what
    assert str(path) in caught.value.what


@pytest.mark.parametrize(
    ("width", "block", "models"),
    [(1920, 0, "2b"), (3072, 41, "5b or 5b-i2v or 1.5-5b or 1.5-5b-i2v"), (3072, 42, None), (64, 0, None)],
)
def test_a_published_models_adapter_is_told_what_it_fits(
    width: int, block: int, models: str | None, tiny: Tiny, tmp_path: Path
) -> None:
    layer = f"transformer_blocks.{block}.attn1.to_q"
    state = {f"{layer}.lora_A.weight": torch.zeros(1, width), f"{layer}.lora_B.weight": torch.zeros(width, 1)}
    path = written(tmp_path / PLAIN, state)
    with pytest.raises(WrongModelError) as caught:
        read_adapters([(path, 1.0)], Checkpoint(tiny("5b")).tensors("transformer"), SilentProgress())
    assert caught.value.fix == (
        f"use it with a checkpoint of {models}" if models else "use the checkpoint it was trained on"
    )


def test_configs_that_make_no_sense_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    tensors = Checkpoint(tiny("5b")).tensors("transformer")
    for metadata, said in (
        ("{", "is damaged"),
        ("[]", "is damaged"),
        (json.dumps({"transformer.r": 5, "transformer.lora_alpha": 4}), "is 4, and 5 in its LoRA config"),
        (json.dumps({"transformer.r": 4, "transformer.lora_alpha": "much"}), "alpha of .* is much"),
        (json.dumps({"transformer.r": 4, "transformer.use_dora": True}), "is a DoRA"),
        (json.dumps({"transformer.alpha_pattern": ["to_q"]}), "alpha_pattern in its LoRA config is no table of patt"),
        (json.dumps({"transformer.rank_pattern": ["to_q"]}), "rank_pattern in its LoRA config is no table of patt"),
        (json.dumps({"transformer.alpha_pattern": {"(": 1}}), r"has '\(', which is no pattern: "),
        (
            json.dumps({"transformer.alpha_pattern": {"(.|.)*[!?]": 1}}),
            "which takes too long to match",
        ),
        (
            json.dumps({"transformer.alpha_pattern": {"((a{1000}){1000}){1000}": 1}}),
            "which is larger than a pattern of",
        ),
        (json.dumps({"transformer.alpha_pattern": {"((a{9}){9}){9}": 1}}), "which is larger than a pattern of layers"),
        (json.dumps({"transformer.rank_pattern": {"a" * 1001: 1}}), "which is larger than a pattern of layers is"),
        (json.dumps({"transformer.alpha_pattern": {"to_q": [1]}}), r"alpha of .* is \[1\]"),
        (json.dumps({"transformer.lora_alpha": 10**400}), "a number of more than 64 bits"),
        ("[" * 100_000, "is damaged"),
        ("3", "is damaged"),
    ):
        state = matrices(tiny("5b"), ATTENTION, 4, 1)
        path = written(tmp_path / PLAIN, state, metadata={"lora_adapter_metadata": metadata})
        with pytest.raises(CheckpointError, match=said):
            read_adapters([(path, 1.0)], tensors, SilentProgress())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("absent", "there is no LoRA"),
        ("empty", "holds neither"),
        ("a.bin", "is a pickle"),
        ("b", "no LoRA that can be read"),
    ],
)
def test_what_is_no_adapter_is_refused(name: str, said: str, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for file in ("a.bin", "b"):
        (tmp_path / file).write_bytes(b"\x80\x02}q\x00." * 9)
    with pytest.raises(CvxError, match=said):
        read_adapters([(tmp_path / name, 1.0)], Checkpoint(tiny("5b")).tensors("transformer"), SilentProgress())


def exported_with_loras(tiny: Tiny, folder: Path, *words: object) -> tuple[Bundle, dict[str, Any]]:
    outcome = cvx("export", "--model", "5b", "--checkpoint", tiny("5b"), "--output", folder, "--json", *words)
    assert outcome.code == 0, outcome
    return Bundle.open(folder), json.loads(outcome.out)


def test_the_bundle_says_what_was_merged_and_how_to_do_it_again(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_tracing(monkeypatch)
    first = written(tmp_path / "first" / PLAIN, matrices(tiny("5b"), ATTENTION, 4, 1))
    second = written(tmp_path / "b:2.safetensors", matrices(tiny("5b"), WIDER, 4, 2))
    words = ("--lora", f"{first.parent}:0.25", "--lora", second)
    bundle, values = exported_with_loras(tiny, tmp_path / "bundle", *words)
    assert [(entry.path, entry.scale) for entry in bundle.manifest.loras] == [(str(first), 0.25), (str(second), 1.0)]
    assert [len(entry["sha256"]) for entry in values["loras"]] == [64, 64]
    assert f"--lora {first}:0.25 --lora {second}:1.0" in bundle.remedy
    assert "--copy-weights" not in bundle.remedy
    table = bundle.manifest.weights
    assert [name for name, entry in table.items() if entry.in_bundle] == [MERGED]
    bundle.check_weight(MERGED, SilentProgress())
    copied, _ = exported_with_loras(tiny, tmp_path / "copied", *words, "--copy-weights")
    assert all(entry.in_bundle for entry in copied.manifest.weights.values())
    assert copied.manifest.weights[MERGED].sha256 == table[MERGED].sha256
    assert "--copy-weights" in copied.remedy


def test_a_misfit_is_told_before_any_work(tiny: Tiny, tmp_path: Path) -> None:
    path = written(tmp_path / PLAIN, {"proj.lora_A.weight": torch.zeros(4, 8), "proj.lora_B.weight": torch.zeros(8, 4)})
    outcome = cvx("export", "--model", "5b", "--checkpoint", tiny("5b"), "--output", tmp_path / "out", "--lora", path)
    assert "is for a layer that this checkpoint has not" in outcome.failure()
    assert not (tmp_path / "out").exists()
    assert cvx("export", "--model", "5b", "--checkpoint", tiny("5b"), "--lora", f"{path}:inf").code == 2
