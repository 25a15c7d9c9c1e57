"""The decoder against `transformers`, and the laws of the flattened ragged batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from dspark_core.errors import ConfigError
from dspark_core.models.config import DecoderConfig, Family
from dspark_core.models.decoder import Decoder, DecoderOutput
from dspark_core.models.loading import load_target
from dspark_core.models.packing import PackedLinear, PackingPlan, can_pack
from tests.unit.models.target_checkpoints import LLAMA3_ROPE, CausalAttend, llama, qwen3, save_hf

MODELS = {
    "llama": lambda: llama(),
    "llama tied": lambda: llama(tie_word_embeddings=True),
    "llama all heads": lambda: llama(num_key_value_heads=4, attention_bias=True),
    "llama 3 rope": lambda: llama(rope_parameters=LLAMA3_ROPE),
    "qwen3": lambda: qwen3(),
    "qwen3 tied": lambda: qwen3(tie_word_embeddings=True, attention_bias=True),
}
TAPS = (2, -1, 0, 1)


def load(model: PreTrainedModel, directory: Path, *, pack: bool = True) -> Decoder:
    return load_target(str(save_hf(model, directory)), torch.float32, pack=pack).decoder


def run(decoder: Decoder, prompts: list[list[int]], taps: tuple[int, ...] = ()) -> DecoderOutput:
    attend = CausalAttend(len(prompts))
    attend.lengths = [len(prompt) for prompt in prompts]
    ids = torch.tensor([token for prompt in prompts for token in prompt])
    positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts])
    with torch.inference_mode():
        return decoder(ids, positions, attend, taps)


def prompt_of(length: int, seed: int) -> list[int]:
    return torch.randint(0, 96, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_every_layer_equal_transformers(name: str, pack: bool, tmp_path: Path) -> None:
    model, prompt = MODELS[name](), prompt_of(50, seed=1)
    layer_outputs: list[torch.Tensor] = []
    for module in (model.model.embed_tokens, *model.model.layers):
        module.register_forward_hook(lambda _module, _inputs, output: layer_outputs.append(output[0]))
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0]
    decoder = load(model, tmp_path, pack=pack)

    output = run(decoder, [prompt], TAPS)

    wanted = torch.cat([layer_outputs[layer + 1] for layer in TAPS], dim=-1)
    torch.testing.assert_close(output.taps, wanted, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(decoder.logits(output.hidden), expected, atol=2e-5, rtol=2e-5)


def test_sequences_in_one_ragged_batch_do_not_touch_each_other(tmp_path: Path) -> None:
    decoder = load(qwen3(), tmp_path)
    prompts = [prompt_of(7, seed=1), prompt_of(3, seed=2), prompt_of(1, seed=3)]
    together = run(decoder, prompts, TAPS)
    alone = [run(decoder, [prompt], TAPS) for prompt in prompts]
    torch.testing.assert_close(together.hidden, torch.cat([part.hidden for part in alone]))
    torch.testing.assert_close(together.taps, torch.cat([part.taps for part in alone]))


def test_continuing_from_a_cache_equals_one_pass(tmp_path: Path) -> None:
    decoder, prompt = load(llama(), tmp_path), prompt_of(9, seed=1)
    attend, hidden = CausalAttend(), []
    for start, end in ((0, 4), (4, 5), (5, 9)):
        attend.lengths = [end - start]
        output = decoder(torch.tensor(prompt[start:end]), torch.arange(start, end), attend)
        hidden.append(output.hidden)
    torch.testing.assert_close(torch.cat(hidden), run(decoder, [prompt]).hidden)


def test_without_taps_there_are_none() -> None:
    output = run(Decoder(tiny_config()), [[1, 2, 3]])
    assert output.taps.shape == (3, 0)


def test_the_tap_past_the_last_layer_is_the_final_hidden_state() -> None:
    output = run(Decoder(tiny_config()), [[1, 2, 3]], (0, 2))
    assert torch.equal(output.taps[:, tiny_config().hidden_size :], output.hidden)


@pytest.mark.parametrize("layer", [-2, 3])
def test_a_tap_layer_the_model_lacks_is_refused(layer: int) -> None:
    with pytest.raises(ConfigError, match=rf"tap layer {layer} is not in \[-1, 2\]"):
        run(Decoder(tiny_config()), [[1]], (layer,))


def test_packing_keeps_results_and_frees_the_layers_plain_weights() -> None:
    torch.manual_seed(0)
    decoder = Decoder(tiny_config()).requires_grad_(False)
    if not can_pack(decoder.lm_head.weight, PackingPlan()):
        pytest.skip("no packed layout in this build or on this processor")
    prompt = [3, 1, 4, 1, 5]
    before = run(decoder, [prompt])
    logits = decoder.logits(before.hidden)

    decoder.pack()

    after = run(decoder, [prompt])
    torch.testing.assert_close(after.hidden, before.hidden)
    torch.testing.assert_close(decoder.logits(after.hidden), logits)
    assert isinstance(decoder.layers[0].self_attn.qkv_proj, PackedLinear)
    matrices = [name for name, weight in decoder.named_parameters() if weight.dim() == 2]
    assert matrices == ["embed_tokens.weight", "lm_head.weight"]


def test_gradients_flow_through_the_output_projection_of_a_packed_model() -> None:
    decoder = Decoder(tiny_config()).requires_grad_(False)
    decoder.pack()
    hidden = torch.randn(2, 16, requires_grad=True)
    decoder.logits(hidden)[:, 5].sum().backward()
    torch.testing.assert_close(hidden.grad, decoder.lm_head.weight[5].expand(2, 16))


def test_logits_of_no_rows_are_no_rows() -> None:
    decoder = Decoder(tiny_config()).requires_grad_(False)
    decoder.pack()
    assert decoder.logits(torch.zeros(0, 16)).shape == (0, 24)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("num_kv_heads", 3, "num_kv_heads, got 4 and 3"), ("head_dim", 5, "head_dim must be even, got 5")],
)
def test_impossible_geometry_is_refused(field: str, value: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(**{field: value})


def tiny_config(**changes: int) -> DecoderConfig:
    fields = {
        "vocab_size": 24,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "max_context_tokens": 32,
    }
    return DecoderConfig(family=Family.LLAMA, rms_norm_eps=1e-6, rope_theta=1e4, **(fields | changes))
