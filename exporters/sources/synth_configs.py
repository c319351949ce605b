"""The configs and tokenizer files of synthetic checkpoints: the published ones, shallow ones, and a tiny topology.

Key for key these are the files of the zai-org repositories. Wide ones change the depth only. Tiny ones change sizes
only: every block type, norm and embedding is still there, and sizes are odd and unlike each other, so that nothing
works by luck.
"""

import io
from typing import Any, Final, Literal

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as spm

from cvx_deploy.families.cogvideox.models import Model

Scale = Literal["tiny", "wide", "full"]
Config = dict[str, Any]

_DIFFUSERS_VERSION: Final = {
    "2b": "0.30.0.dev0",
    "5b": "0.31.0.dev0",
    "5b-i2v": "0.31.0.dev0",
    "1.5-5b": "0.32.0.dev0",
    "1.5-5b-i2v": "0.32.0.dev0",
}
_PIPELINES: Final = {"text-to-video": "CogVideoXPipeline", "image-to-video": "CogVideoXImageToVideoPipeline"}
_SCHEDULERS: Final = {"ddim": "CogVideoXDDIMScheduler", "dpm": "CogVideoXDPMScheduler"}

EXTRA_IDS: Final = 100
MAX_TEXT_TOKENS: Final = 226
PIECES: Final[dict[Scale, int]] = {"tiny": 450, "wide": 32_000, "full": 32_000}

# Blocks of wide transformers, and layers of wide text encoders: the fewest of which one follows another.
_SHALLOW: Final = 2

# (video frames, latent height, latent width). Token grids are odd. 9 frames are one VAE chunk; 17 are 5 latent frames:
# a first chunk and a steady one, and padding where a token spans two. As in the originals, 1.5 image-to-video has a
# rotary table that is larger than the videos it usually makes.
_TINY_SAMPLE: Final = {
    "2b": (17, 10, 14),
    "5b": (9, 10, 14),
    "5b-i2v": (9, 10, 14),
    "1.5-5b": (17, 10, 14),
    "1.5-5b-i2v": (17, 14, 18),
}


def model_index(model: Model) -> Config:
    """Return ``model_index.json``, which names the pipeline and the class of each part."""
    return {
        "_class_name": _PIPELINES[model.traits.task],
        "_diffusers_version": _DIFFUSERS_VERSION[model.name],
        "scheduler": ["diffusers", _SCHEDULERS[model.scheduler]],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }


def scheduler_config(model: Model) -> Config:
    """Return ``scheduler/scheduler_config.json``."""
    return {
        "_class_name": _SCHEDULERS[model.scheduler],
        "_diffusers_version": _DIFFUSERS_VERSION[model.name],
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "sample_max_value": 1.0,
        "set_alpha_to_one": True,
        "snr_shift_scale": model.snr_shift_scale,
        "steps_offset": 0,
        "timestep_spacing": "trailing",
        "trained_betas": None,
    }


def transformer_config(model: Model, scale: Scale) -> Config:
    """Return ``transformer/config.json``. Sample sizes are in latents, but `sample_frames` in video frames."""
    config: Config = {
        "_class_name": "CogVideoXTransformer3DModel",
        "_diffusers_version": _DIFFUSERS_VERSION[model.name],
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": model.attention_head_dim,
        "dropout": 0.0,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 32 if model.traits.task == "image-to-video" else 16,
        "max_text_seq_length": MAX_TEXT_TOKENS,
        "norm_elementwise_affine": True,
        "norm_eps": 1e-05,
        "num_attention_heads": model.num_attention_heads,
        "num_layers": model.num_layers,
        "out_channels": 16,
        "patch_size": 2,
        "sample_frames": model.frames,
        "sample_height": model.sample_height,
        "sample_width": model.sample_width,
        "spatial_interpolation_scale": 1.875,
        "temporal_compression_ratio": 4,
        "temporal_interpolation_scale": 1.0,
        "text_embed_dim": 4096,
        "time_embed_dim": 512,
        "timestep_activation_fn": "silu",
        "use_rotary_positional_embeddings": model.traits.positions != "sincos",
    }
    if scale == "wide":
        config["num_layers"] = _SHALLOW
    elif scale == "tiny":
        config |= _tiny_transformer(model)
    return config | _late_keys(model, config["time_embed_dim"])


def _tiny_transformer(model: Model) -> Config:
    # Width 48 or 80: heads are no power of two, and both head dim and width are multiples of 16, as the 3D rotary and
    # sin-cos embeddings ask.
    frames, height, width = _TINY_SAMPLE[model.name]
    return {
        "attention_head_dim": 16,
        "num_attention_heads": 3 if model.name == "2b" else 5,
        "num_layers": 2 if model.name == "2b" else 3,
        "sample_frames": frames,
        "sample_height": height,
        "sample_width": width,
        "text_embed_dim": 40,
        "time_embed_dim": 56,
    }


def _late_keys(model: Model, time_embed_dim: int) -> Config:
    """Return the keys that came with later models, which the files of earlier ones do not have."""
    keys: Config = {}
    if model.traits.positions == "rope+learned" or model.traits.patch_size_t:
        keys["use_learned_positional_embeddings"] = model.traits.positions == "rope+learned"
    if model.traits.patch_size_t:
        keys |= {"patch_bias": False, "patch_size_t": model.traits.patch_size_t}
    if model.traits.ofs:
        keys["ofs_embed_dim"] = time_embed_dim  # the two embeddings are added
    return keys


def vae_config(model: Model, scale: Scale) -> Config:
    """Return ``vae/config.json``, of which nothing can be left out: its depth is its widths.

    `sample_height` and `sample_width` are pixels and only say how large tiles are.
    """
    config: Config = {
        "_class_name": "AutoencoderKLCogVideoX",
        "_diffusers_version": _DIFFUSERS_VERSION[model.name],
        "act_fn": "silu",
        "block_out_channels": [128, 256, 256, 512],
        "down_block_types": ["CogVideoXDownBlock3D"] * 4,
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": 16,
        "latents_mean": None,
        "latents_std": None,
        "layers_per_block": 3,
        "norm_eps": 1e-06,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_height": 480,
        "sample_width": 720,
        "scaling_factor": model.scaling_factor,
        "shift_factor": None,
        "temporal_compression_ratio": 4,
        "up_block_types": ["CogVideoXUpBlock3D"] * 4,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }
    if model.invert_scale_latents:
        config["invert_scale_latents"] = True
    if scale == "tiny":
        # Tiles are half a sample, 6x5 latents: the smallest that overlaps of 1/6 and 1/5 divide, else diffusers
        # joins tiles to another size. A 10x14 latent has 2x4 of them, cut short at the far edges.
        config |= {"block_out_channels": [8, 12, 12, 20], "norm_num_groups": 4, "sample_height": 96, "sample_width": 80}
        if model.name != "1.5-5b":  # whose VAE has all layers; tracing and compiling take as long as there are some
            config["layers_per_block"] = 1
    return config


def text_encoder_config(model: Model, scale: Scale) -> Config:
    """Return ``text_encoder/config.json`` of a T5 v1.1 encoder; the vocabulary is rounded up to 128, as T5's is."""
    tokens = PIECES[scale] + EXTRA_IDS
    config: Config = {
        "architectures": ["T5EncoderModel"],
        "classifier_dropout": 0.0,
        "d_ff": 10240,
        "d_kv": 64,
        "d_model": 4096,
        "decoder_start_token_id": 0,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "num_decoder_layers": 24,
        "num_heads": 64,
        "num_layers": 24,
        "output_past": True,
        "pad_token_id": 0,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False,
        "torch_dtype": model.dtype,
        "transformers_version": "4.44.0",
        "use_cache": True,
        "vocab_size": -(-tokens // 128) * 128,
    }
    if scale == "wide":
        config |= {"num_decoder_layers": _SHALLOW, "num_layers": _SHALLOW}
    elif scale == "tiny":
        config |= {"d_ff": 88, "d_kv": 8, "d_model": 40, "num_decoder_layers": 2, "num_heads": 3, "num_layers": 2}
    return config


def tokenizer_files(scale: Scale) -> dict[str, Config]:
    """Return the JSON files of ``tokenizer/`` by name, as transformers 4 saved a T5 tokenizer."""
    first = PIECES[scale]
    sentinels = {f"<extra_id_{i}>": first + EXTRA_IDS - 1 - i for i in range(EXTRA_IDS)}
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    decoder = {str(i): _added_token(token) for i, token in enumerate(("<pad>", "</s>", "<unk>"))}
    decoder |= {str(i): _added_token(token, strip=True) for token, i in reversed(sentinels.items())}
    return {
        "added_tokens.json": sentinels,
        "special_tokens_map.json": {
            "additional_special_tokens": list(sentinels),
            **{
                role: {k: v for k, v in _added_token(token).items() if k != "special"}
                for role, token in special.items()
            },
        },
        "tokenizer_config.json": {
            "add_prefix_space": True,
            "added_tokens_decoder": decoder,
            "additional_special_tokens": list(sentinels),
            "clean_up_tokenization_spaces": True,
            "extra_ids": EXTRA_IDS,
            "legacy": True,
            "model_max_length": MAX_TEXT_TOKENS,
            "sp_model_kwargs": {},
            "tokenizer_class": "T5Tokenizer",
            **special,
        },
    }


def _special_token(content: str, *, strip: bool = False) -> Config:
    return {"content": content, "lstrip": strip, "normalized": False, "rstrip": strip, "single_word": False}


def _added_token(content: str, *, strip: bool = False) -> Config:
    return {**_special_token(content, strip=strip), "special": True}


_WORDS: Final = """
a an the and or of in on at to from with without under over above below behind between through across along around into
near by as is are was be it its this that one two three four five six seven eight nine ten some many few all each both
several his her their up down left right forward backward away slowly quickly gently smoothly softly brightly then
while red orange yellow green blue purple pink brown black white gray grey golden silver cyan magenta violet teal beige
crimson bright dark light pale deep vivid warm cold hot soft hard smooth rough round square flat tall short long wide
narrow thin thick big small large tiny giant huge little old young new ancient modern wooden wood glass metal stone
plastic paper gold colorful happy sad cute fluffy shiny beautiful striped spotted realistic detailed glowing
transparent elegant quiet busy wild calm peaceful misty foggy sunny rainy snowy cloudy stormy windy icy wet dry dusty
steaming burning natural dramatic circle triangle star cube sphere ball ring cross heart diamond line dot shape cone
box arrow pattern stripe spot edge dog puppy cat kitten panda horse bird fish elephant lion tiger rabbit fox bear wolf
deer dragon monkey mouse duck swan owl eagle turtle frog snake shark whale dolphin octopus jellyfish butterfly bee
spider cow sheep goat pig chicken penguin robot astronaut man woman boy girl child baby people person friend king queen
knight wizard chef dancer singer artist car train ship boat plane rocket bicycle bike bus truck balloon flower rose
tree leaf grass bamboo mushroom house castle tower bridge street road path city town village park garden forest jungle
desert island beach sea ocean river lake stream waterfall mountain hill valley cave sky cloud sun moon planet galaxy
space night day sunset sunrise morning evening winter summer autumn spring rain snow wind fire smoke fog water wave ice
lava sand rock wall floor door window room kitchen table chair stool stage lamp candle book cup coffee tea cake bread
apple banana sandwich fruit guitar piano drum umbrella hat jacket coat dress suit shirt shoes scarf crown mask hair
face eyes eye hand head arm leg tail wings nose mouth body move moves moving rotate rotates rotating spin spins
spinning turn turns turning jump jumps jumping run runs running walk walks walking fly flies flying swim swims swimming
dance dances dancing fall falls falling grow grows growing larger shrink shrinks shrinking smaller stand stands
standing still sit sits sitting lie lies sleeping play plays playing ride rides riding bounce bounces bouncing float
floats floating drift drifts sail sails sailing drive drives driving climb climbs waves waving smile smiles smiling
laugh laughs sing sings singing eat eats eating drink drinks open opens close closes glide glides roll rolls rolling
explode explodes melt melts bloom blooms shine shines sparkle look looks looking wear wears wearing hold holds holding
dressed surrounded covered filled background foreground center middle top bottom side corner camera pan pans zoom zooms
shot closeup aerial view scene video film cinematic slow motion style cartoon anime painting watercolor drawing sketch
photo portrait landscape lighting shadow shadows reflection focus blurred quality high low resolution ultra fast front
back outside inside home world life time way texture color colors gradient
"""


def spiece_model(scale: Scale) -> bytes:
    """Train the sentencepiece unigram model of ``tokenizer/spiece.model`` on the words of plain English prompts.

    T5's conventions hold: pad 0, end 1, unknown 2, no beginning token. Unless tiny, it is filled up to T5's 32,000
    pieces with unused ones from a private Unicode plane, so that the sentinels get the identifiers they have there.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_WORDS.split()),
        model_writer=model,
        model_type="unigram",
        vocab_size=PIECES["tiny"],
        character_coverage=1.0,
        required_chars="".join(map(chr, range(33, 127))),
        num_threads=1,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return _filled_up(model.getvalue(), PIECES[scale])


def _filled_up(model: bytes, pieces: int) -> bytes:
    proto = spm.ModelProto.FromString(model)
    lowest = min(piece.score for piece in proto.pieces)
    for i in range(pieces - len(proto.pieces)):
        proto.pieces.add(piece=chr(0xF0000 + i), score=lowest, type=spm.ModelProto.SentencePiece.UNUSED)
    proto.trainer_spec.vocab_size = pieces
    return bytes(proto.SerializeToString(deterministic=True))
