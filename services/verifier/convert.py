"""Draft items to protobuf, draft blocks from protobuf."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from dspark_proto.v1 import common_pb2, drafter_pb2
from torch import Tensor

from dspark_core.engine.protocols import DraftBlock, DraftGeometry, DraftItem, SparseDistribution
from dspark_core.errors import DraftUnavailableError
from services.common.convert import sampling_to_proto, verification_to_proto

_DTYPES = {torch.float32: common_pb2.DTYPE_FLOAT32, torch.bfloat16: common_pb2.DTYPE_BFLOAT16}


def geometry_from_proto(message: drafter_pb2.DescribeDrafterResponse) -> DraftGeometry:
    return DraftGeometry(
        fingerprint=message.fingerprint,
        block_size=message.block_size,
        feature_size=message.feature_size,
        vocab_size=message.vocab_size,
        context_window=message.context_window or None,
    )


def draft_items_to_proto(values: Sequence[DraftItem]) -> list[drafter_pb2.DraftItem]:
    """Converts all items of a message together, so that a GPU is synchronised only once."""
    features = _on_the_host([value.features for value in values])
    return [
        drafter_pb2.DraftItem(
            sequence_id=value.sequence_id,
            anchor_token_id=value.anchor_token_id,
            anchor_position=value.anchor_position,
            features_start=value.features_start,
            features=tensor_to_proto(rows),
            sampling=sampling_to_proto(value.sampling),
            verification=verification_to_proto(value.verification),
            token_ids=value.token_ids,
        )
        for value, rows in zip(values, features, strict=True)
    ]


def draft_block_from_proto(message: drafter_pb2.DraftBlock, geometry: DraftGeometry) -> DraftBlock:
    """Raises DraftUnavailableError for a block that contradicts the drafter's description."""
    token_ids = tuple(message.token_ids)
    confidences = tuple(message.confidences)
    _check(len(token_ids) <= geometry.block_size, f"{len(token_ids)} draft tokens in a block")
    _check(all(t < geometry.vocab_size for t in token_ids), f"draft token ids {token_ids}")
    _check(not confidences or len(confidences) == len(token_ids), f"{len(confidences)} confidences")
    _check(all(0.0 <= c <= 1.0 for c in confidences), f"confidences {confidences}")
    return DraftBlock(
        message.sequence_id,
        token_ids,
        confidences,
        _distribution_from_proto(message, geometry) if message.distributions else None,
        message.needs_context,
    )


def tensor_to_proto(value: Tensor) -> common_pb2.Tensor:
    """`value` must be in host memory."""
    return common_pb2.Tensor(
        dtype=_DTYPES[value.dtype],
        shape=value.shape,
        data=value.contiguous().view(torch.uint8).numpy().tobytes() if value.numel() else b"",
    )


def _on_the_host(parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """Copies parts [.., size] of one device to the host in one transfer; returns CPU tensors as they are."""
    if all(part.device.type == "cpu" for part in parts):
        return parts
    return torch.split(torch.cat(list(parts)).cpu(), [len(part) for part in parts])


def _distribution_from_proto(message: drafter_pb2.DraftBlock, geometry: DraftGeometry) -> SparseDistribution:
    rows = message.distributions
    width = max(len(row.token_ids) for row in rows)
    token_ids = torch.zeros((len(rows), width), dtype=torch.long)
    probabilities = torch.zeros((len(rows), width), dtype=torch.float32)
    _check(len(rows) == len(message.token_ids), f"{len(rows)} distributions")
    for index, row in enumerate(rows):
        _check(len(row.token_ids) == len(row.probabilities), "a ragged distribution")
        _check(all(t < geometry.vocab_size for t in row.token_ids), "unknown token ids in a distribution")
        token_ids[index, : len(row.token_ids)] = torch.tensor(row.token_ids)
        probabilities[index, : len(row.probabilities)] = torch.tensor(row.probabilities)
    return SparseDistribution(token_ids=token_ids, probabilities=probabilities)


def _check(condition: bool, what: str) -> None:
    if not condition:
        raise DraftUnavailableError(f"the drafter sent {what}, which does not fit its description")
