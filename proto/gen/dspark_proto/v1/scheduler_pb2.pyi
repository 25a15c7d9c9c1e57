from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_DRAFTER: _ClassVar[Role]
    ROLE_VERIFIER: _ClassVar[Role]
ROLE_UNSPECIFIED: Role
ROLE_DRAFTER: Role
ROLE_VERIFIER: Role

class Replica(_message.Message):
    __slots__ = ("replica_id", "role", "address", "model", "draining", "running_requests", "waiting_requests", "free_kv_fraction", "weights")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    FREE_KV_FRACTION_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    role: Role
    address: str
    model: str
    draining: bool
    running_requests: int
    waiting_requests: int
    free_kv_fraction: float
    weights: str
    def __init__(self, replica_id: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., address: _Optional[str] = ..., model: _Optional[str] = ..., draining: _Optional[bool] = ..., running_requests: _Optional[int] = ..., waiting_requests: _Optional[int] = ..., free_kv_fraction: _Optional[float] = ..., weights: _Optional[str] = ...) -> None: ...

class RegisterRequest(_message.Message):
    __slots__ = ("replica",)
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    replica: Replica
    def __init__(self, replica: _Optional[_Union[Replica, _Mapping]] = ...) -> None: ...

class RegisterResponse(_message.Message):
    __slots__ = ("lease_seconds",)
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    lease_seconds: float
    def __init__(self, lease_seconds: _Optional[float] = ...) -> None: ...

class DeregisterRequest(_message.Message):
    __slots__ = ("replica_id",)
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    def __init__(self, replica_id: _Optional[str] = ...) -> None: ...

class DeregisterResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListReplicasRequest(_message.Message):
    __slots__ = ("role",)
    ROLE_FIELD_NUMBER: _ClassVar[int]
    role: Role
    def __init__(self, role: _Optional[_Union[Role, str]] = ...) -> None: ...

class ListReplicasResponse(_message.Message):
    __slots__ = ("replicas",)
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    replicas: _containers.RepeatedCompositeFieldContainer[Replica]
    def __init__(self, replicas: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ...) -> None: ...

class AssignRequest(_message.Message):
    __slots__ = ("request_id", "model", "prompt_tokens", "exclude_replica_ids", "prefix_hashes", "min_tokens_per_second", "tier", "wait_seconds", "weights", "floor_promised")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_REPLICA_IDS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HASHES_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    FLOOR_PROMISED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    prompt_tokens: int
    exclude_replica_ids: _containers.RepeatedScalarFieldContainer[str]
    prefix_hashes: _containers.RepeatedScalarFieldContainer[int]
    min_tokens_per_second: float
    tier: str
    wait_seconds: float
    weights: str
    floor_promised: bool
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., exclude_replica_ids: _Optional[_Iterable[str]] = ..., prefix_hashes: _Optional[_Iterable[int]] = ..., min_tokens_per_second: _Optional[float] = ..., tier: _Optional[str] = ..., wait_seconds: _Optional[float] = ..., weights: _Optional[str] = ..., floor_promised: _Optional[bool] = ...) -> None: ...

class AssignResponse(_message.Message):
    __slots__ = ("replica",)
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    replica: Replica
    def __init__(self, replica: _Optional[_Union[Replica, _Mapping]] = ...) -> None: ...

class VerifierLoad(_message.Message):
    __slots__ = ("running_requests", "waiting_requests", "free_kv_fraction", "max_running_requests", "draining", "new_request_ids", "speed_floors")
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    FREE_KV_FRACTION_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    NEW_REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    SPEED_FLOORS_FIELD_NUMBER: _ClassVar[int]
    running_requests: int
    waiting_requests: int
    free_kv_fraction: float
    max_running_requests: int
    draining: bool
    new_request_ids: _containers.RepeatedScalarFieldContainer[str]
    speed_floors: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, running_requests: _Optional[int] = ..., waiting_requests: _Optional[int] = ..., free_kv_fraction: _Optional[float] = ..., max_running_requests: _Optional[int] = ..., draining: _Optional[bool] = ..., new_request_ids: _Optional[_Iterable[str]] = ..., speed_floors: _Optional[_Iterable[float]] = ...) -> None: ...

class RoundReport(_message.Message):
    __slots__ = ("replica_id", "round", "requests", "batch_tokens", "step_seconds", "draft_seconds", "profile", "load", "context_tokens", "kind", "draft_compute_seconds", "drafter_id", "drafter_primed", "hidden_draft_seconds", "cohorts", "loop_seconds")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    DRAFT_COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_ID_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_PRIMED_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_DRAFT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COHORTS_FIELD_NUMBER: _ClassVar[int]
    LOOP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    round: int
    requests: _containers.RepeatedCompositeFieldContainer[RequestSurvival]
    batch_tokens: int
    step_seconds: float
    draft_seconds: float
    profile: _containers.RepeatedCompositeFieldContainer[StepTime]
    load: VerifierLoad
    context_tokens: int
    kind: ReplicaKind
    draft_compute_seconds: float
    drafter_id: str
    drafter_primed: bool
    hidden_draft_seconds: float
    cohorts: int
    loop_seconds: float
    def __init__(self, replica_id: _Optional[str] = ..., round: _Optional[int] = ..., requests: _Optional[_Iterable[_Union[RequestSurvival, _Mapping]]] = ..., batch_tokens: _Optional[int] = ..., step_seconds: _Optional[float] = ..., draft_seconds: _Optional[float] = ..., profile: _Optional[_Iterable[_Union[StepTime, _Mapping]]] = ..., load: _Optional[_Union[VerifierLoad, _Mapping]] = ..., context_tokens: _Optional[int] = ..., kind: _Optional[_Union[ReplicaKind, _Mapping]] = ..., draft_compute_seconds: _Optional[float] = ..., drafter_id: _Optional[str] = ..., drafter_primed: _Optional[bool] = ..., hidden_draft_seconds: _Optional[float] = ..., cohorts: _Optional[int] = ..., loop_seconds: _Optional[float] = ...) -> None: ...

class ReplicaKind(_message.Message):
    __slots__ = ("model", "engine", "hardware", "dtype")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    HARDWARE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    model: str
    engine: str
    hardware: str
    dtype: str
    def __init__(self, model: _Optional[str] = ..., engine: _Optional[str] = ..., hardware: _Optional[str] = ..., dtype: _Optional[str] = ...) -> None: ...

class StepTime(_message.Message):
    __slots__ = ("batch_tokens", "step_seconds", "requests", "context_tokens")
    BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    batch_tokens: int
    step_seconds: float
    requests: int
    context_tokens: int
    def __init__(self, batch_tokens: _Optional[int] = ..., step_seconds: _Optional[float] = ..., requests: _Optional[int] = ..., context_tokens: _Optional[int] = ...) -> None: ...

class RequestSurvival(_message.Message):
    __slots__ = ("sequence_id", "survival", "verify_length", "accepted", "min_tokens_per_second", "looked_up", "temperature")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    SURVIVAL_FIELD_NUMBER: _ClassVar[int]
    VERIFY_LENGTH_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    LOOKED_UP_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    survival: _containers.RepeatedScalarFieldContainer[float]
    verify_length: int
    accepted: int
    min_tokens_per_second: float
    looked_up: bool
    temperature: float
    def __init__(self, sequence_id: _Optional[str] = ..., survival: _Optional[_Iterable[float]] = ..., verify_length: _Optional[int] = ..., accepted: _Optional[int] = ..., min_tokens_per_second: _Optional[float] = ..., looked_up: _Optional[bool] = ..., temperature: _Optional[float] = ...) -> None: ...

class ScalingBand(_message.Message):
    __slots__ = ("up_to_temperature", "temperatures", "biases")
    UP_TO_TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURES_FIELD_NUMBER: _ClassVar[int]
    BIASES_FIELD_NUMBER: _ClassVar[int]
    up_to_temperature: float
    temperatures: _containers.RepeatedScalarFieldContainer[float]
    biases: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, up_to_temperature: _Optional[float] = ..., temperatures: _Optional[_Iterable[float]] = ..., biases: _Optional[_Iterable[float]] = ...) -> None: ...

class VerifyPlan(_message.Message):
    __slots__ = ("based_on_round", "draft_token_capacity", "curve", "scalings", "draft_price", "term")
    BASED_ON_ROUND_FIELD_NUMBER: _ClassVar[int]
    DRAFT_TOKEN_CAPACITY_FIELD_NUMBER: _ClassVar[int]
    CURVE_FIELD_NUMBER: _ClassVar[int]
    SCALINGS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_PRICE_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    based_on_round: int
    draft_token_capacity: int
    curve: _containers.RepeatedCompositeFieldContainer[StepTime]
    scalings: _containers.RepeatedCompositeFieldContainer[ScalingBand]
    draft_price: float
    term: int
    def __init__(self, based_on_round: _Optional[int] = ..., draft_token_capacity: _Optional[int] = ..., curve: _Optional[_Iterable[_Union[StepTime, _Mapping]]] = ..., scalings: _Optional[_Iterable[_Union[ScalingBand, _Mapping]]] = ..., draft_price: _Optional[float] = ..., term: _Optional[int] = ...) -> None: ...
