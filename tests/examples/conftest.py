"""Let the tests import the scripts of examples/finetune, which import each other by their file names."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

from tests.conftest import ROOT, Tiny

sys.path.insert(0, str(ROOT / "examples" / "finetune"))


@pytest.fixture(autouse=True)
def a_precision_of_its_own() -> Iterator[None]:
    """Let every test choose a precision: accelerate keeps the first one that a process asks for."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def tiny_cache(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what prepare.py would leave for a tiny checkpoint, of random numbers; do not change it."""
    made: dict[str, Path] = {}

    def cache(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(f"cache-{name}")
            _write_cache(made[name], tiny(name))
        return made[name]

    return cache


def _write_cache(folder: Path, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "transformer" / "config.json").read_text())
    vae = json.loads((checkpoint / "vae" / "config.json").read_text())
    random = np.random.default_rng(0)
    frames = (config["sample_frames"] - 1) // 4 + 1
    frames += frames % (config.get("patch_size_t") or 1)
    latents = (frames, config["out_channels"], config["sample_height"], config["sample_width"])

    def save(kind: str, number: int, **shapes: tuple[int, ...]) -> str:
        (folder / kind).mkdir(exist_ok=True)
        tensors = {n: torch.from_numpy(random.standard_normal(s).astype(np.float32)) for n, s in shapes.items()}
        save_file(tensors, folder / kind / f"{number}.safetensors")
        return f"{kind}/{number}.safetensors"

    wants_image = config["in_channels"] == 2 * config["out_channels"]
    text = (config["max_text_seq_length"], config["text_embed_dim"])
    clips = []
    for number in range(3):
        clip = {"shape": "9x16x16", "latents": save("clips", number, mean=latents, deviation=latents)}
        clip["prompt"] = save("prompts", number, prompt_embeds=text)
        if wants_image:
            clip["image"] = save("images", number, mean=(1, *latents[1:]), deviation=(1, *latents[1:]))
        clips.append(clip)
    index = {
        "model": "tiny",
        "task": "image-to-video" if wants_image else "text-to-video",
        "scaling_factor": vae["scaling_factor"],
        "invert_scale_latents": bool(vae.get("invert_scale_latents")),
        "empty": save("prompts", 9, prompt_embeds=text),
        "clips": clips,
    }
    (folder / "index.json").write_text(json.dumps(index))
