"""Drafts' messages: the same whatever device the tensors are on, which is read once for each message."""

from __future__ import annotations

import pytest
import torch
from dspark_proto.v1 import common_pb2

from dspark_core.engine.protocols import DraftBlock, DraftItem, SparseDistribution
from dspark_core.errors import InvalidRequestError
from dspark_core.records import SamplingParams, Verification
from services.drafter.convert import draft_blocks_to_proto, draft_item_from_proto, tensor_from_proto
from services.verifier.convert import draft_items_to_proto
from tests.support.gpu_parts import generator
from tests.support.pretend_cuda import on_gpu, pretend_cuda

ROWS = (3, 0, 1, 40)


def items(dtype: torch.dtype, place=lambda tensor: tensor) -> list[DraftItem]:
    drawing = generator(0)
    return [
        DraftItem(
            sequence_id=f"s{index}",
            anchor_token_id=index,
            anchor_position=100 + rows,
            features_start=100,
            features=place(torch.randn(rows, 6, generator=drawing).to(dtype)),
            token_ids=tuple(range(rows)),
            sampling=SamplingParams(temperature=0.5),
            verification=Verification.REJECTION,
        )
        for index, rows in enumerate(ROWS)
    ]


def blocks(place=lambda tensor: tensor) -> list[DraftBlock]:
    drawing = generator(1)
    made = [DraftBlock("greedy", (1, 2), (0.5, 0.25)), DraftBlock("lost", needs_context=True)]
    for width, block in ((5, 3), (2, 1)):
        law = SparseDistribution(
            token_ids=place(torch.randint(0, 150_000, (block, width), generator=drawing)),
            probabilities=place(torch.rand(block, width, generator=drawing)),
        )
        made.insert(1, DraftBlock(f"sampled-{width}", (7,) * block, (0.5,) * block, law))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rounds_features_are_read_from_a_gpu_at_once(dtype) -> None:
    expected = [message for item in items(dtype) for message in draft_items_to_proto([item])]
    for message, item in zip(expected, items(dtype), strict=True):
        assert torch.equal(draft_item_from_proto(message).features, item.features)
    with pretend_cuda(reads_allowed=1):
        assert draft_items_to_proto(items(dtype, on_gpu)) == expected


def test_a_rounds_distributions_are_read_from_a_gpu_at_once() -> None:
    expected = draft_blocks_to_proto(blocks())
    assert [len(message.distributions) for message in expected] == [0, 1, 3, 0]
    for message, block in zip(expected, blocks(), strict=True):
        if block.distribution is not None:
            laws = zip(block.distribution.token_ids, block.distribution.probabilities, strict=True)
            for law, (ids, probabilities) in zip(message.distributions, laws, strict=True):
                assert list(law.token_ids) == ids.tolist()
                assert list(law.probabilities) == probabilities.tolist()
    with pretend_cuda(reads_allowed=1):
        assert draft_blocks_to_proto(blocks(on_gpu)) == expected


def test_nothing_to_send_is_no_read() -> None:
    with pretend_cuda():
        assert draft_items_to_proto([]) == []
        assert draft_blocks_to_proto([DraftBlock("greedy", (1,), (0.5,))])[0].token_ids == [1]


@pytest.mark.parametrize("shape", [[], [4], [2, 2, 6], [2**31, 2**31, 2**31, 0]])
def test_features_that_are_no_matrix_are_refused(shape) -> None:
    message = common_pb2.Tensor(dtype=common_pb2.DTYPE_FLOAT32, shape=shape)
    with pytest.raises(InvalidRequestError, match=r"features\.shape must be \[rows, feature_size\], got \["):
        tensor_from_proto(message, "features")
