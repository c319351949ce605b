"""A model repository of Triton: a folder for the model, with its ``config.pbtxt`` and a ``model.py`` of one import."""

from pathlib import Path
from typing import Final

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.registry import engine_spec
from cvx_deploy.engines.spec import EngineName, EngineOptions
from cvx_deploy.errors import CvxError, OutputError
from cvx_deploy.files import staged_directory

INPUTS: Final = {
    "prompt": "TYPE_STRING",
    "negative_prompt": "TYPE_STRING",
    "size": "TYPE_STRING",
    "num_frames": "TYPE_INT32",
    "fps": "TYPE_INT32",
    "num_inference_steps": "TYPE_INT32",
    "guidance_scale": "TYPE_FP64",
    "seed": "TYPE_INT64",
    "strength": "TYPE_FP64",
    "cache": "TYPE_STRING",
    "image": "TYPE_STRING",
    "video": "TYPE_STRING",
}
"""Every input by its type, one element each; all but the first are optional. Texts are UTF-8, files their bytes."""

OUTPUTS: Final = {"event": "TYPE_STRING", "video": "TYPE_STRING"}
"""What answers hold: each an event, as JSON; the last one the mp4's bytes too."""

_HEAD = "# written by cvx-deploy triton"
_MODEL = '''"""A CogVideoX bundle; see docs/serving.md of cvx-deploy."""

from cvx_deploy.serve.triton.model import TritonPythonModel
'''


def write_model(bundle: Bundle, engine: EngineName, options: EngineOptions, output: Path, *, replace: bool) -> Path:
    """Write the model's folder into a repository, and return it.

    Args:
        bundle: What it runs, where it lies: only its path is noted.
        engine: What runs it, and `options` how.
        output: The repository; other models in it stay as they are.
        replace: Whether an earlier one of that name, of this program, may go.

    Raises:
        OutputError: There is one and it may not go, or it is of another program.
        EngineError: The engine takes no such option.
    """
    engine_spec(engine).check(options)
    folder = output / bundle.path.absolute().name
    _check_replaceable(folder, replace=replace)
    with staged_directory(folder, replace=True) as staging:
        (staging / "1").mkdir()
        (staging / "1" / "model.py").write_text(_MODEL)
        (staging / "config.pbtxt").write_text(config_text(bundle.path, engine, options))
    return folder


def config_text(bundle: Path, engine: EngineName, options: EngineOptions) -> str:
    """Return a ``config.pbtxt``: a protobuf in text form, whose schema is Triton's ``model_config.proto``."""
    values = {"bundle": str(bundle.absolute()), "engine": engine, "threads": options.threads, "vram": options.vram}
    inputs = [_tensor(name, kind, optional=name != "prompt") for name, kind in INPUTS.items()]
    outputs = [_tensor(name, kind) for name, kind in OUTPUTS.items()]
    parameters = [
        f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(str(value))} }} }}"
        for key, value in values.items()
        if value is not None
    ]
    return "\n".join(
        [
            _HEAD,
            f"name: {_quoted(bundle.absolute().name)}",
            'backend: "python"',
            "max_batch_size: 0",
            "model_transaction_policy { decoupled: true }",
            *(f"input {tensor}" for tensor in inputs),
            *(f"output {tensor}" for tensor in outputs),
            f"instance_group {{ kind: {'KIND_GPU' if engine_spec(engine).on_gpu else 'KIND_CPU'} count: 1 }}",
            *parameters,
            "",
        ]
    )


def _tensor(name: str, kind: str, *, optional: bool = False) -> str:
    return f"{{ name: {_quoted(name)} data_type: {kind} dims: [ 1 ]{' optional: true' if optional else ''} }}"


def _quoted(text: str) -> str:
    """Return a string as a protobuf in text form has it, whatever it holds."""
    plain = (chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}" for byte in text.encode())
    return f'"{"".join(plain)}"'


def _check_replaceable(folder: Path, *, replace: bool) -> None:
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not replace:
        raise OutputError(f"{folder} is there", fix="add --force to replace it, or choose another --output")
    try:
        ours = (folder / "config.pbtxt").read_text(encoding="utf-8", errors="replace").startswith(_HEAD)
    except OSError:
        ours = False
    if not ours:
        raise OutputError(f"{folder} was not written by this command, and stays", fix="choose another --output")


def settings_of(model_config: dict[str, object]) -> dict[str, str]:
    """Return what `config_text` noted, from the config as Triton hands it to a model.

    Raises:
        CvxError: It is not of this program.
    """
    parameters = model_config.get("parameters")
    found = {name: str(one["string_value"]) for name, one in parameters.items()} if isinstance(parameters, dict) else {}
    if not {"bundle", "engine"} <= found.keys():
        raise CvxError("config.pbtxt names no bundle and engine", fix="write it anew with cvx-deploy triton")
    return found
