"""Where two files of a checkpoint disagree the one counts that diffusers and transformers believe; a note says so."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from cvx_deploy.errors import CheckpointError, WrongModelError
from cvx_deploy.exporters.reference.eager import eager_network
from cvx_deploy.exporters.sources.checkpoint import Checkpoint
from cvx_deploy.families.cogvideox.models import Task
from tests.conftest import Tiny

SCHEDULER = "scheduler/scheduler_config.json"
PARTS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of a checkpoint that a test may change."""
    return Path(shutil.copytree(tiny("5b"), tmp_path / "checkpoint"))


def edit(path: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))


def theirs(folder: Path, component: str, **options: Any) -> Any:
    """Return a component as diffusers' pipeline has it."""
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **options)
    return getattr(pipeline, component)


@pytest.mark.parametrize("name", ["CogVideoXDDIMScheduler", "DDIMScheduler", "Other", None])
def test_a_scheduler_is_of_the_class_that_the_index_names(folder: Path, name: str | None) -> None:
    edit(folder / SCHEDULER, **({} if name is None else {"_class_name": name}), drop=() if name else ("_class_name",))
    checkpoint = Checkpoint(folder)
    assert checkpoint.configs["scheduler"]["_class_name"] == type(theirs(folder, "scheduler")).__name__
    told = [f"{folder / SCHEDULER} calls itself '{name}'; it is read as CogVideoXDPMScheduler"] if name else []
    assert [note.removeprefix("note: ").partition(",")[0] for note in checkpoint.notes] == told


def test_the_index_is_believed_when_it_is_the_one_that_changes(folder: Path) -> None:
    edit(folder / "model_index.json", scheduler=["diffusers", "CogVideoXDDIMScheduler"])
    assert Checkpoint(folder).configs["scheduler"]["_class_name"] == type(theirs(folder, "scheduler")).__name__
    assert Checkpoint(folder).configs["scheduler"]["_class_name"] == "CogVideoXDDIMScheduler"


def test_values_that_a_config_lists_as_defaults_count_as_left_out(folder: Path) -> None:
    edit(folder / SCHEDULER, beta_end=0.02, snr_shift_scale=2.0, _use_default_values=["beta_end"])
    ours, expected = Checkpoint(folder).configs["scheduler"], theirs(folder, "scheduler").config
    assert (ours["beta_end"], ours["snr_shift_scale"]) == (expected.beta_end, expected.snr_shift_scale) == (0.012, 2.0)


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_a_config_that_calls_itself_something_else_is_read_as_the_index_says(folder: Path, component: str) -> None:
    edit(folder / component / "config.json", _class_name="Other")
    checkpoint = Checkpoint(folder)
    assert type(theirs(folder, component)).__name__ == checkpoint.configs[component]["_class_name"]
    assert f"{component}/config.json calls itself 'Other'" in checkpoint.notes[0]


@pytest.mark.parametrize("entry", [None, [], ["diffusers"], "CogVideoXDPMScheduler", ["diffusers", 3]])
def test_an_index_without_a_class_is_refused_as_in_diffusers(folder: Path, entry: object) -> None:
    edit(folder / "model_index.json", scheduler=entry)
    with pytest.raises(CheckpointError, match=r"model_index.json names no class of the scheduler. fix: add the line"):
        Checkpoint(folder)


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_every_key_left_out_has_diffusers_default(folder: Path, component: str) -> None:
    (folder / component / "config.json").write_text("{}")
    kind = {"transformer": "CogVideoXTransformer3DModel", "vae": "AutoencoderKLCogVideoX"}[component]
    import diffusers

    with torch.device("meta"):
        defaults = dict(getattr(diffusers, kind)().config)
    ours = Checkpoint(folder).configs[component]
    assert {key: ours[key] for key in defaults if not key.startswith("_")} == {
        key: value for key, value in defaults.items() if not key.startswith("_")
    }


def test_a_left_out_key_is_not_taken_for_a_damaged_one(folder: Path) -> None:
    edit(folder / "transformer/config.json", drop=("in_channels",))
    assert Checkpoint(folder).configs["transformer"]["in_channels"] == 16
    edit(folder / "transformer/config.json", in_channels=None)
    with pytest.raises(CheckpointError, match=r"is damaged: Expected `int`, got `null` - at `\$.in_channels`"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("pipeline", "task"),
    [
        ("CogVideoXPipeline", "text-to-video"),
        ("CogVideoXVideoToVideoPipeline", "text-to-video"),
        ("CogVideoXImageToVideoPipeline", "image-to-video"),
    ],
)
def test_the_task_is_the_one_of_the_index(folder: Path, pipeline: str, task: Task) -> None:
    edit(folder / "model_index.json", _class_name=pipeline)
    assert Checkpoint(folder).traits.task == task


def shard(folder: Path, component: str, *, value: float) -> None:
    """Put an index and a shard beside what a component has, every weight of them of one value."""
    stem = folder / component / PARTS[component]
    state = {name: torch.full_like(tensor, value) for name, tensor in weights(folder, component).items()}
    save_file(state, f"{stem}-00001-of-00001.safetensors", {"format": "pt"})
    names = dict.fromkeys(state, f"{PARTS[component]}-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": names}
    Path(f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def weights(folder: Path, component: str) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    files = checkpoint.weight_files(component)
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


def whole(folder: Path, component: str) -> None:
    """Put a component's weights into one file."""
    state = weights(folder, component)
    for file in (folder / component).glob("*.safetensors*"):
        file.unlink()
    save_file(state, folder / component / f"{PARTS[component]}.safetensors", {"format": "pt"})


@pytest.mark.parametrize("component", PARTS)
def test_of_an_index_and_a_single_file_the_one_is_read_that_the_library_reads(folder: Path, component: str) -> None:
    whole(folder, component)
    shard(folder, component, value=0.5)
    checkpoint = Checkpoint(folder)
    ours = eager_network(checkpoint, component, "fp32").state_dict()
    expected = theirs(folder, component).state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in expected.items())
    of_index = all(bool((tensor == 0.5).all()) for tensor in weights(folder, component).values())
    assert of_index == (component != "text_encoder")  # so that the two files are told apart at all
    [note] = checkpoint.notes
    assert f"has {checkpoint_names(component)}; the first is read, as " in note


def checkpoint_names(component: str) -> str:
    single = f"{component}/{PARTS[component]}.safetensors"
    both = [f"{single}.index.json", single]
    return " and ".join(both[::-1] if component == "text_encoder" else both)


@pytest.mark.parametrize("older", [False, True])
def test_a_variants_index_is_found_under_either_of_its_names(folder: Path, older: bool) -> None:
    whole(folder, "vae")
    shard(folder, "vae", value=0.5)
    stem = folder / "vae" / "diffusion_pytorch_model"
    index = json.loads(Path(f"{stem}.safetensors.index.json").read_text())
    Path(f"{stem}.safetensors.index.json").unlink()
    name = (
        "diffusion_pytorch_model-00001-of-00001.fp16.safetensors"
        if older
        else ("diffusion_pytorch_model.fp16-00001-of-00001.safetensors")
    )
    Path(f"{stem}-00001-of-00001.safetensors").rename(folder / "vae" / name)
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    end = "fp16.index.json" if older else "index.fp16.json"
    Path(f"{stem}.safetensors.{end}").write_text(json.dumps(index))
    assert Checkpoint(folder, "fp16").weight_files("vae") == [f"vae/{name}"]
    assert Checkpoint(folder).weight_files("vae") == ["vae/diffusion_pytorch_model.safetensors"]


def test_a_class_that_no_cogvideox_has_is_refused(folder: Path) -> None:
    edit(folder / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    with pytest.raises(WrongModelError, match="says that the scheduler is a EulerDiscreteScheduler, not a CogVideoX"):
        Checkpoint(folder)
