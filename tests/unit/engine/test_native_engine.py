"""The native decoder compared to PyTorch's operators, and the invariants of its batches."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import Tensor

from dspark_core.engine.target.batch import Run
from dspark_core.engine.target.context_features import ContextProjection
from dspark_core.engine.target.target_engine import TargetEngine
from dspark_core.errors import ConfigError
from dspark_core.kernels.library import Format, native_kernels
from dspark_core.kernels.matrix import GROUP, QuantizedRows
from dspark_core.models.config import DecoderConfig, Family
from dspark_core.models.decoder import Decoder
from dspark_core.models.packing import PackingPlan, WeightChoice
from dspark_core.records import SamplingParams, SpeculationOptions
from tests.unit.engine.tiny import ScriptedDrafts, make_loop, prompts, request, run

pytestmark = pytest.mark.skipif(native_kernels() is None, reason="no native kernels on this machine")

FIELDS = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_context_tokens": 1024,
}
CONFIGS = {
    "llama": DecoderConfig(family=Family.LLAMA, **FIELDS),
    "llama, tied, biases": DecoderConfig(
        family=Family.LLAMA, tie_word_embeddings=True, attention_bias=True, **FIELDS
    ),
    "qwen3": DecoderConfig(family=Family.QWEN3, qk_norm=True, **FIELDS),
    "one key head": DecoderConfig(
        family=Family.LLAMA, **(FIELDS | {"num_kv_heads": 1, "num_heads": 14, "head_dim": 24})
    ),
    "odd sizes": DecoderConfig(
        family=Family.LLAMA, **(FIELDS | {"hidden_size": 42, "intermediate_size": 50, "vocab_size": 67})
    ),
}

QUANTISED_THROUGHOUT = {  # where a group of 32 inputs of the output matrix comes from
    "a part of a head": DecoderConfig(family=Family.LLAMA, **(FIELDS | {"head_dim": 64, "num_heads": 4})),
    "a head": DecoderConfig(family=Family.LLAMA, **(FIELDS | {"head_dim": 32})),
    "several heads": DecoderConfig(family=Family.LLAMA, **(FIELDS | {"num_heads": 8})),
}


def decoder(config: DecoderConfig, dtype: torch.dtype) -> Decoder:
    torch.manual_seed(0)
    made = Decoder(config).eval()
    for name, parameter in made.named_parameters():
        torch.nn.init.normal_(parameter, std=0.25, mean=1.0 if "norm" in name else 0.0)
    rotary = made.rotary
    made = made.to(dtype).requires_grad_(False)
    made.rotary = type(rotary)(config)  # its tables stay float32, as in `load_target`
    return made


def four_bits_of(model: Decoder) -> dict[str, QuantizedRows]:
    """Its weight matrices in 4 bits, as a file might hold them."""
    return {
        name: QuantizedRows(
            Format.Q4,
            torch.from_numpy(quantize(weight.float().numpy(), GGMLQuantizationType.Q4_1)),
            weight.shape[1],
        )
        for name, weight in model.named_parameters()
        if weight.ndim == 2 and weight.shape[1] % GROUP == 0
    }


def engine(
    config: DecoderConfig,
    *,
    native: bool = True,
    dtype: torch.dtype = torch.float32,
    page_tokens: int = 16,
    weights: WeightChoice = WeightChoice.FULL,
) -> TargetEngine:
    model = decoder(config, dtype)
    stored = four_bits_of(model) if weights.keeps_blocks else {}
    plan = PackingPlan(native=native, weights=weights, stored=stored)
    return engine_of(model, config, plan, dtype=dtype, page_tokens=page_tokens)


def with_stored_weights(config: DecoderConfig, weights: WeightChoice) -> Decoder:
    """A float32 decoder with the values of quantised blocks, if `weights` keep them."""
    model = decoder(config, torch.float32)
    if weights.keeps_blocks:
        for name, rows in four_bits_of(decoder(config, torch.bfloat16)).items():
            if "embed" not in name:  # embeddings are not quantised
                values = dequantize(rows.blocks.numpy(), GGMLQuantizationType.Q4_1)
                model.get_parameter(name).copy_(torch.from_numpy(values))
    return model


def engine_of(
    model: Decoder,
    config: DecoderConfig,
    plan: PackingPlan | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    page_tokens: int = 16,
) -> TargetEngine:
    plan = plan or PackingPlan(native=True)
    model.pack(plan)
    torch.manual_seed(1)
    taps = (0, -1, config.num_layers - 1, config.num_layers)
    made = TargetEngine.of_decoder(
        model,
        config,
        num_pages=1 + 1024 // page_tokens,
        page_tokens=page_tokens,
        projection=ContextProjection(
            project=torch.nn.Linear(len(taps) * config.hidden_size, 6, bias=False, dtype=dtype),
            target_layer_ids=taps,
            feature_size=6,
        ),
    )
    assert made.native is plan.native
    return made


def tokens(count: int) -> list[int]:
    source = random.Random(count)
    return [source.randrange(61) for _ in range(count)]


def pages_for(made: TargetEngine, length: int, seed: int = 0) -> list[int]:
    """Pages in random order, as from a busy cache."""
    pages = list(range(1, made.num_pages))
    random.Random(seed).shuffle(pages)
    return pages[: -(-length // made.page_tokens)]


def in_pieces(made: TargetEngine, ids: Sequence[int], pieces: Sequence[int]) -> Tensor:
    """Logits of every position, computed in chunks of `pieces` tokens."""
    pages, rows, start = pages_for(made, len(ids)), [], 0
    for count in pieces:
        rows.append(made.forward([Run(ids[start : start + count], start, pages, count)]))
        start += count
    return torch.cat(rows)


@pytest.mark.parametrize("page_tokens", [4, 16, 20, 32])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_computes_what_pytorch_computes(name: str, page_tokens: int) -> None:
    ids = tokens(300)  # more than one softmax update
    ours = engine(CONFIGS[name], page_tokens=page_tokens)
    reference = engine(CONFIGS[name], native=False, page_tokens=page_tokens)
    pieces = (270, 1, 1, 8, 20)
    torch.testing.assert_close(
        in_pieces(ours, ids, pieces), in_pieces(reference, ids, pieces), atol=2e-3, rtol=2e-3
    )
    pages = pages_for(ours, 300)
    torch.testing.assert_close(
        ours.read_features(pages, 0, 300), reference.read_features(pages, 0, 300), atol=1e-3, rtol=1e-3
    )


def test_bfloat16_is_as_close_to_float32_as_pytorchs() -> None:
    ids, config = tokens(120), CONFIGS["llama"]
    exact = in_pieces(engine(config), ids, [120])

    def error(native: bool) -> float:
        found = in_pieces(engine(config, native=native, dtype=torch.bfloat16), ids, [120])
        return float((found - exact).pow(2).mean())

    assert error(native=True) <= 1.5 * error(native=False)


@pytest.mark.parametrize("weights", WeightChoice)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_is_the_same_bits_in_any_batch(dtype: torch.dtype, weights: WeightChoice) -> None:
    config = CONFIGS["qwen3"]
    ids = tokens(300)
    whole = in_pieces(engine(config, dtype=dtype, weights=weights), ids, [300])
    for pieces in ([299, 1], [256, 44], [290, *[1] * 10], [7] * 42 + [6]):
        assert torch.equal(in_pieces(engine(config, dtype=dtype, weights=weights), ids, pieces), whole)

    crowded = engine(config, dtype=dtype, weights=weights)
    other, mine = tokens(40), list(range(1, 20))
    rows, start = [], 0
    for count in (200, 8, 8, 84):  # together with other sequences, and with two threads
        theirs, others = Run(other, 0, [30, 31, 32], 0), Run(other, 0, [40, 41, 42], 0)
        own = Run(ids[start : start + count], start, mine, count)
        torch.set_num_threads(2)
        try:
            rows.append(crowded.forward([theirs, own, others]))
        finally:
            torch.set_num_threads(1)
        start += count
    assert torch.equal(torch.cat(rows), whole)


@pytest.mark.parametrize("weights", [WeightChoice.STORED, WeightChoice.STORED_A8, WeightChoice.INT8])
@pytest.mark.parametrize("group_of", QUANTISED_THROUGHOUT)
def test_what_quantised_layers_hand_on_is_the_same_in_any_batch(group_of: str, weights: WeightChoice) -> None:
    ids, config = tokens(150), QUANTISED_THROUGHOUT[group_of]
    whole = in_pieces(engine(config, dtype=torch.bfloat16, weights=weights), ids, [150])
    exact = in_pieces(engine_of(with_stored_weights(config, weights), config), ids, [150])
    assert float((whole - exact).norm() / exact.norm()) < 0.15
    for threads, pieces in ((1, [1] * 20 + [130]), (2, [130, 9, 6, 5]), (3, [13] * 11 + [7])):
        torch.set_num_threads(threads)
        try:
            made = engine(config, dtype=torch.bfloat16, weights=weights)
            assert torch.equal(in_pieces(made, ids, pieces), whole)
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("page_tokens", [16, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_that_share_a_long_context_change_no_bit(dtype: torch.dtype, page_tokens: int) -> None:
    ids = tokens(700)
    results = []
    for threads in (1, 2, 3, 8):
        made = engine(CONFIGS["llama"], dtype=dtype, page_tokens=page_tokens)
        torch.set_num_threads(threads)
        try:
            results.append(in_pieces(made, ids, [640, 1, 8, 2, 49]))
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(result, results[0]) for result in results)


def test_activations_in_eight_bits_are_close_to_the_stored_weights_result() -> None:
    ids = tokens(40)
    config, dtype = CONFIGS["llama"], torch.bfloat16
    stored, rounded = (
        in_pieces(engine(config, dtype=dtype, weights=weights), ids, [40])
        for weights in (WeightChoice.STORED, WeightChoice.STORED_A8)
    )
    assert not torch.equal(stored, rounded)
    assert float((stored - rounded).norm() / stored.norm()) < 0.1


def test_only_the_asked_rows_have_logits() -> None:
    made, ids = engine(CONFIGS["llama"]), tokens(30)
    everything = in_pieces(engine(CONFIGS["llama"]), ids, [30])
    pages = pages_for(made, 30)
    assert made.forward([Run(ids[:20], 0, pages, 0)]).shape == (0, 61)
    assert torch.equal(made.forward([Run(ids[20:], 20, pages, 3)]), everything[27:])


@pytest.mark.parametrize("seed", [None, 7])
def test_in_bfloat16_speculation_changes_no_token(seed: int | None) -> None:
    sampling = SamplingParams(temperature=0.0 if seed is None else 0.8, seed=seed)
    asked = prompts(6, longest=40)

    def answers(speculate: bool, drafts: ScriptedDrafts | None) -> dict[str, list[int]]:
        made = engine(CONFIGS["qwen3"], dtype=torch.bfloat16)
        loop = make_loop(made, drafts, max_running=4, max_batch_tokens=64, prefill_chunk_tokens=16)
        options = SpeculationOptions(enabled=speculate)
        return run(
            loop,
            [
                request(str(i), prompt, 24, sampling=sampling, speculation=options)
                for i, prompt in enumerate(asked)
            ],
        )

    plain = answers(False, None)
    lengths = {str(i): len(prompt) for i, prompt in enumerate(asked)}
    drafts = ScriptedDrafts(plain, prompt_lengths=lengths, error_rate=0.3)
    assert answers(True, drafts) == plain
    assert drafts.items  # drafting did take place


def test_a_layer_the_target_lacks_cannot_be_tapped() -> None:
    model = decoder(CONFIGS["llama"], torch.float32)
    model.pack()
    projection = ContextProjection(project=torch.nn.Identity(), target_layer_ids=(4,), feature_size=64)
    with pytest.raises(ConfigError, match="tap layer 4"):
        TargetEngine.of_decoder(model, CONFIGS["llama"], num_pages=4, projection=projection)
