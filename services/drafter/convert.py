"""Converts draft items from protobuf and draft blocks to protobuf."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from dspark_proto.v1 import common_pb2, drafter_pb2
from torch import Tensor

from dspark_core.engine.protocols import DraftBlock, DraftGeometry, DraftItem, SparseDistribution
from dspark_core.errors import InvalidRequestError
from dspark_core.records import Verification
from services.common.convert import sampling_from_proto, verification_from_proto

_DTYPES = {common_pb2.DTYPE_FLOAT32: torch.float32, common_pb2.DTYPE_BFLOAT16: torch.bfloat16}


def geometry_to_proto(value: DraftGeometry) -> drafter_pb2.DescribeDrafterResponse:
    return drafter_pb2.DescribeDrafterResponse(
        fingerprint=value.fingerprint,
        block_size=value.block_size,
        feature_size=value.feature_size,
        vocab_size=value.vocab_size,
        context_window=value.context_window or 0,
    )


def draft_item_from_proto(message: drafter_pb2.DraftItem) -> DraftItem:
    verification = verification_from_proto(message.verification)
    if verification is None:
        raise InvalidRequestError("verification must be rejection or coupled", field="verification")
    sampling = sampling_from_proto(message.sampling)
    if verification is Verification.COUPLED and sampling.seed is None:
        raise InvalidRequestError("seed must be set when verification is coupled", field="seed")
    return DraftItem(
        sequence_id=message.sequence_id,
        anchor_token_id=message.anchor_token_id,
        anchor_position=message.anchor_position,
        features_start=message.features_start,
        features=tensor_from_proto(message.features, "features"),
        token_ids=tuple(message.token_ids),
        sampling=sampling,
        verification=verification,
    )


def draft_blocks_to_proto(values: Sequence[DraftBlock]) -> list[drafter_pb2.DraftBlock]:
    """Converts all blocks of a message together, so that a GPU is synchronised only once."""
    laws = iter(_on_the_host([value.distribution for value in values if value.distribution is not None]))
    return [
        drafter_pb2.DraftBlock(
            sequence_id=value.sequence_id,
            token_ids=value.token_ids,
            confidences=value.confidences,
            distributions=() if value.distribution is None else _distributions_to_proto(next(laws)),
            needs_context=value.needs_context,
        )
        for value in values
    ]


def tensor_from_proto(message: common_pb2.Tensor, field: str) -> Tensor:
    dtype = _DTYPES.get(message.dtype)
    if dtype is None:
        raise InvalidRequestError(
            f"{field}.dtype must be one of {sorted(_DTYPES)}, got {message.dtype}", field=field
        )
    shape = tuple(message.shape)
    if len(shape) != 2:  # of more, sizes multiply beyond what PyTorch can hold, also where one of them is 0
        raise InvalidRequestError(
            f"{field}.shape must be [rows, feature_size], got {list(shape)!s:.80}", field=field
        )
    expected = math.prod(shape) * dtype.itemsize
    if len(message.data) != expected:
        raise InvalidRequestError(
            f"{field}.data must hold {expected} bytes for shape {shape}, got {len(message.data)}", field=field
        )
    if expected == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(message.data), dtype=dtype).view(shape)


def _on_the_host(laws: Sequence[SparseDistribution]) -> Sequence[SparseDistribution]:
    """Copies distributions to the host in one transfer, for which probabilities travel as the bits of doubles
    among the token ids. On a CPU returns them as they are."""
    if all(law.token_ids.device.type == "cpu" for law in laws):
        return laws
    ids = [law.token_ids.flatten() for law in laws]
    bits = [law.probabilities.double().flatten().view(torch.int64) for law in laws]
    fetched = torch.split(torch.cat((*ids, *bits)).cpu(), [len(part) for part in (*ids, *bits)])
    return [
        SparseDistribution(
            token_ids=token_ids.view(law.token_ids.shape),
            probabilities=doubles.view(torch.float64).view(law.probabilities.shape).float(),
        )
        for law, token_ids, doubles in zip(laws, fetched[: len(laws)], fetched[len(laws) :], strict=True)
    ]


def _distributions_to_proto(value: SparseDistribution) -> list[drafter_pb2.SparseDistribution]:
    rows = zip(value.token_ids.tolist(), value.probabilities.tolist(), strict=True)
    return [
        drafter_pb2.SparseDistribution(token_ids=ids, probabilities=probabilities)
        for ids, probabilities in rows
    ]
