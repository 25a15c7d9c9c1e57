"""A drafter's layers in one native call, compared to PyTorch's operators, pass by pass."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dspark_core.engine.draft_engines.base import Appended
from dspark_core.engine.draft_engines.block_layers import NativeLayers, TorchLayers
from dspark_core.engine.draft_engines.blocks import DraftEngine
from dspark_core.engine.draft_engines.draft_context import DraftContext
from dspark_core.engine.protocols import DraftItem
from dspark_core.kernels.library import native_kernels
from dspark_core.models.config import DecoderConfig, DrafterConfig, Family
from dspark_core.models.dspark import DSparkDrafter
from dspark_core.models.moe_config import MoeConfig
from dspark_core.records import SamplingParams, Verification
from tests.unit.models.dspark_tiny import BACKBONE, tiny_config, tiny_drafter

native_only = pytest.mark.skipif(native_kernels() is None, reason="no native kernels on this machine")

WIDE = dataclasses.replace(
    BACKBONE, hidden_size=64, intermediate_size=80, num_heads=6, num_kv_heads=2, head_dim=16
)
BACKBONES = {
    "llama": BACKBONE,
    "wide": WIDE,
    "qwen3": dataclasses.replace(WIDE, family=Family.QWEN3, qk_norm=True),
    "biases": dataclasses.replace(BACKBONE, attention_bias=True),
    "one key head": dataclasses.replace(WIDE, num_heads=5, num_kv_heads=1, head_dim=24, num_layers=3),
    "odd sizes": dataclasses.replace(BACKBONE, hidden_size=42, intermediate_size=50, head_dim=10),
}
# Anchor positions of the sequences drafted for in successive passes.
ROUNDS = (
    {"a": 3},
    {"a": 5, "b": 1},
    {"a": 9, "b": 2, "c": 30},
    {"c": 31},
    {"a": 26, "b": 3, "c": 33, "d": 12, "e": 7},
)


def config_of(backbone: DecoderConfig, window: int | None) -> DrafterConfig:
    return tiny_config(backbone=backbone, context_window=window)


def context_of(window: int | None, page_tokens: int, room: int = 0) -> DraftContext:
    return DraftContext(num_pages=60, page_tokens=page_tokens, window=window, room=room)


def both(
    config: DrafterConfig, page_tokens: int, dtype: torch.dtype, *, byte_products: bool = False
) -> tuple[tuple[NativeLayers, DraftContext], tuple[TorchLayers, DraftContext]]:
    """Native layers in `dtype` and PyTorch's in float32, with the same weights."""
    reference = tiny_drafter(config)
    for parameter in reference.parameters():
        parameter.copy_(parameter.to(dtype))
    reference.embed_tokens.copy_(reference.embed_tokens.to(dtype))
    rotary = reference.rotary
    packed = copy.deepcopy(reference).to(dtype)
    packed.rotary = copy.deepcopy(rotary)  # its tables stay float32, as in a loaded drafter
    packed.pack(byte_products=byte_products)
    assert packed.native_layers is not None
    window = config.context_window
    own, plain = context_of(window, page_tokens, config.block_size), context_of(window, page_tokens)
    native = NativeLayers(packed.native_layers, config, own)
    return (native, own), (TorchLayers(reference, plain, torch.float32), plain)


def item(name: str, anchor: int) -> DraftItem:
    return DraftItem(
        sequence_id=name,
        anchor_token_id=anchor % 50,
        anchor_position=anchor,
        features_start=0,
        features=torch.empty(0),
        sampling=SamplingParams(temperature=0.0),
        verification=Verification.REJECTION,
    )


def features_of(name: str, size: int, dtype: torch.dtype) -> Tensor:
    """[positions, size]: values that `dtype` can represent."""
    generator = torch.Generator().manual_seed(ord(name))
    return torch.randn(64, size, generator=generator).to(dtype)


def hidden_of(
    layers: NativeLayers | TorchLayers,
    context: DraftContext,
    window: int | None,
    size: int,
    dtypes: Sequence[torch.dtype],
    block: int = 5,
) -> list[Tensor]:
    """Hidden states of each round; features are rounded to the first dtype and passed in the second."""
    held: dict[str, int] = {}
    found = []
    for anchors in ROUNDS:
        items = [item(name, anchor) for name, anchor in anchors.items()]
        appended, features = [], []
        for one in items:
            start = held.get(one.sequence_id, 0)
            start = start if window is None else max(start, one.anchor_position - window)
            assert context.reserve(one.sequence_id, start, one.anchor_position, in_use=set(anchors))
            appended.append(Appended(one, start))
            features.append(features_of(one.sequence_id, size, dtypes[0])[start : one.anchor_position])
            held[one.sequence_id] = one.anchor_position
        layers.append(appended, torch.cat(features).to(dtypes[1]))
        found.append(layers.hidden(items, block))
    return found


@native_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "page_tokens"), [(None, 16), (None, 4), (8, 4), (11, 16), (20, 3)])
@pytest.mark.parametrize("name", BACKBONES)
@torch.inference_mode()
def test_one_call_computes_what_operators_do(
    name: str, window: int | None, page_tokens: int, dtype: torch.dtype
) -> None:
    config = config_of(BACKBONES[name], window)
    (native, own), (operators, plain) = both(config, page_tokens, dtype)
    size = config.backbone.hidden_size
    found = hidden_of(native, own, window, size, (dtype, dtype))
    expected = hidden_of(operators, plain, window, size, (dtype, torch.float32))
    exact = dtype is torch.float32
    for one, other in zip(found, expected, strict=True):
        assert one.dtype is dtype
        error = (one.float() - other).norm() / other.norm()
        assert error < (1e-5 if exact else 0.03), error


@native_only
@pytest.mark.parametrize("block", [1, 2, 4])
@torch.inference_mode()
def test_a_shorter_block_is_computed_alike(block: int) -> None:
    config = config_of(WIDE, 11)
    (native, own), (operators, plain) = both(config, 16, torch.float32)
    dtypes = (torch.float32, torch.float32)
    found = hidden_of(native, own, 11, 64, dtypes, block)
    expected = hidden_of(operators, plain, 11, 64, dtypes, block)
    for one, other in zip(found, expected, strict=True):
        assert one.shape[1] == block
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@native_only
@torch.inference_mode()
def test_layers_in_bytes_stay_close_to_operators() -> None:
    kernels = native_kernels()
    if kernels is None or not kernels.byte_products:
        pytest.skip("this machine has no products of bytes")
    config, dtype = config_of(WIDE, 11), torch.bfloat16
    (plain, first), (operators, reference) = both(config, 16, dtype)
    (native, own), _ = both(config, 16, dtype, byte_products=True)
    size = config.backbone.hidden_size
    found = hidden_of(native, own, 11, size, (dtype, dtype))
    unrounded = hidden_of(plain, first, 11, size, (dtype, dtype))
    expected = hidden_of(operators, reference, 11, size, (dtype, torch.float32))
    for one, exact, other in zip(found, unrounded, expected, strict=True):
        assert not torch.equal(one, exact)  # otherwise byte products were not used
        error = (one.float() - other).norm() / other.norm()
        assert error < 0.1, error


@native_only
@pytest.mark.parametrize("byte_products", [False, True])
@torch.inference_mode()
def test_a_block_does_not_depend_on_the_batch(byte_products: bool) -> None:
    config = config_of(WIDE, 11)
    for dtype in (torch.float32, torch.bfloat16):
        blocks = []
        for others in ([], ["x", "y"]):
            (native, context), _ = both(config, 16, dtype, byte_products=byte_products)
            items = [item(name, 14) for name in [*others, "a"]]
            for one in items:
                assert context.reserve(one.sequence_id, 3, 14, in_use=())
            features = [features_of(one.sequence_id, 64, dtype)[3:14] for one in items]
            native.append([Appended(one, 3) for one in items], torch.cat(features))
            blocks.append(native.hidden(items, 5)[-1])
        assert torch.equal(*blocks)


def proposals(drafter: DSparkDrafter) -> list[tuple[int, ...]]:
    engine = DraftEngine(drafter, fingerprint="tiny", num_pages=64, page_tokens=4)
    size = drafter.config.backbone.hidden_size
    features = features_of("a", size, torch.float32)
    found = []
    for start, end in ((0, 9), (9, 12), (12, 13)):
        asked = dataclasses.replace(item("a", end), features_start=start, features=features[start:end])
        found += [block.token_ids for block in engine.propose([asked])]
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {"markov_rank": 0, "confidence_head": False, "confidence_head_with_markov": False},  # DFlash
        {"moe": MoeConfig(num_experts=4, experts_per_token=2, expert_size=8)},
    ],
)
def test_packed_drafters_of_any_kind_propose_as_plain_ones(fields: dict[str, object]) -> None:
    packed = tiny_drafter(tiny_config(context_window=8, **fields))
    packed.pack()
    assert (packed.native_layers is None) == ("moe" in fields or native_kernels() is None)
    assert proposals(packed) == proposals(tiny_drafter(tiny_config(context_window=8, **fields)))


@native_only
def test_layers_that_went_native_refuse_operators() -> None:
    packed = tiny_drafter(tiny_config())
    packed.pack()
    with pytest.raises(RuntimeError, match="native_layers"):
        packed.context_keys_values(torch.zeros(1, 16), torch.zeros(1, dtype=torch.long))
