"""What the text encoder makes of positions and of padding."""

import numpy as np
import onnx
import torch
from transformers import T5EncoderModel

from tests.conftest import Exported, Tiny
from tests.parity.test_networks import relative_error, run
from tests.tolerances import NETWORK_RELATIVE

WORDS, LENGTH = 100, 226


def test_one_position_bias_from_a_constant_table_serves_all_layers(exported: Exported) -> None:
    graph = onnx.load(exported("5b").onnx_path("text_encoder"), load_external_data=False).graph
    makers = {output: node for node in graph.node for output in node.output}
    (bias,) = [node for node in graph.node if node.op_type == "Gather" and "relative_attention_bias" in node.name]
    buckets = next(tensor for tensor in graph.initializer if tensor.name == bias.input[1])
    table = onnx.numpy_helper.to_array(buckets)
    assert table.shape == (LENGTH, LENGTH)
    assert np.array_equal(table[1:, 1:], table[:-1, :-1]), "a bucket follows from the distance alone"

    def is_bias(name: str) -> bool:
        while name in makers and makers[name].op_type in ("Unsqueeze", "Transpose"):
            name = makers[name].input[0]
        return name == bias.output[0]

    sums = [node for node in graph.node if node.op_type == "Add" and any(map(is_bias, node.input))]
    softmaxes = [node for node in graph.node if node.op_type == "Softmax"]
    assert len(sums) == len(softmaxes) > 1


def test_padding_is_attended_to_as_in_diffusers_pipelines(tiny: Tiny, exported: Exported) -> None:
    ids = np.random.default_rng(0).integers(1, 200, (1, LENGTH))
    ids[:, WORDS:] = 0
    found = run(exported("5b"), "text_encoder", {"input_ids": ids}, batch=1)["prompt_embeds"]
    eager = T5EncoderModel.from_pretrained(tiny("5b") / "text_encoder", dtype=torch.float32)
    tokens = torch.from_numpy(ids)
    with torch.no_grad():
        unmasked, masked = eager(tokens)[0], eager(tokens, attention_mask=(tokens != 0).long())[0]
    assert relative_error(found, unmasked) < NETWORK_RELATIVE
    assert relative_error(found[:, :WORDS], masked[:, :WORDS]) > NETWORK_RELATIVE
