from dspark_proto.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeDrafterRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeDrafterResponse(_message.Message):
    __slots__ = ("fingerprint", "block_size", "feature_size", "vocab_size", "context_window")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    FEATURE_SIZE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_WINDOW_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    block_size: int
    feature_size: int
    vocab_size: int
    context_window: int
    def __init__(self, fingerprint: _Optional[str] = ..., block_size: _Optional[int] = ..., feature_size: _Optional[int] = ..., vocab_size: _Optional[int] = ..., context_window: _Optional[int] = ...) -> None: ...

class DraftRequest(_message.Message):
    __slots__ = ("round", "items", "release")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    round: int
    items: _containers.RepeatedCompositeFieldContainer[DraftItem]
    release: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, round: _Optional[int] = ..., items: _Optional[_Iterable[_Union[DraftItem, _Mapping]]] = ..., release: _Optional[_Iterable[str]] = ...) -> None: ...

class DraftItem(_message.Message):
    __slots__ = ("sequence_id", "anchor_token_id", "anchor_position", "features_start", "features", "sampling", "verification", "token_ids", "traceparent")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    ANCHOR_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    ANCHOR_POSITION_FIELD_NUMBER: _ClassVar[int]
    FEATURES_START_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    VERIFICATION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    anchor_token_id: int
    anchor_position: int
    features_start: int
    features: _common_pb2.Tensor
    sampling: _common_pb2.SamplingParams
    verification: _common_pb2.Verification
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    traceparent: str
    def __init__(self, sequence_id: _Optional[str] = ..., anchor_token_id: _Optional[int] = ..., anchor_position: _Optional[int] = ..., features_start: _Optional[int] = ..., features: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., verification: _Optional[_Union[_common_pb2.Verification, str]] = ..., token_ids: _Optional[_Iterable[int]] = ..., traceparent: _Optional[str] = ...) -> None: ...

class DraftResponse(_message.Message):
    __slots__ = ("round", "blocks", "compute_seconds", "drafter_id")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_ID_FIELD_NUMBER: _ClassVar[int]
    round: int
    blocks: _containers.RepeatedCompositeFieldContainer[DraftBlock]
    compute_seconds: float
    drafter_id: str
    def __init__(self, round: _Optional[int] = ..., blocks: _Optional[_Iterable[_Union[DraftBlock, _Mapping]]] = ..., compute_seconds: _Optional[float] = ..., drafter_id: _Optional[str] = ...) -> None: ...

class DraftBlock(_message.Message):
    __slots__ = ("sequence_id", "token_ids", "confidences", "distributions", "needs_context")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCES_FIELD_NUMBER: _ClassVar[int]
    DISTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    NEEDS_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    confidences: _containers.RepeatedScalarFieldContainer[float]
    distributions: _containers.RepeatedCompositeFieldContainer[SparseDistribution]
    needs_context: bool
    def __init__(self, sequence_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., confidences: _Optional[_Iterable[float]] = ..., distributions: _Optional[_Iterable[_Union[SparseDistribution, _Mapping]]] = ..., needs_context: _Optional[bool] = ...) -> None: ...

class SparseDistribution(_message.Message):
    __slots__ = ("token_ids", "probabilities")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROBABILITIES_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    probabilities: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., probabilities: _Optional[_Iterable[float]] = ...) -> None: ...
