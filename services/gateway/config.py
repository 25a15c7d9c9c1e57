"""The gateway's configuration, read from the environment once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from dspark_core.errors import ConfigError
from dspark_core.model_paths import DEFAULT_MODEL
from dspark_core.tokenization.tool_formats import ToolFormat
from services.common.env import Env
from services.common.limits import LEAST_BODY_BYTES, MOST_MESSAGE_BYTES, MOST_SECONDS
from services.common.options import ServerOptions
from services.common.tls import Tls
from services.gateway.callers.auth import PrefixSharing
from services.gateway.callers.key_file import SETTING, read_keys
from services.gateway.callers.tiers import Tier, tiers_from_text
from services.gateway.requests import DEFAULT_MAX_CHOICES

TOOL_FORMATS = ("auto", *(one.value for one in ToolFormat))
REASONING = ("auto", "none")

DEFAULT_KEEP_ALIVE_SECONDS = 75
"""More than the 60 s of common load balancers."""
_ARRIVING_BYTES = 64 * 2**20
"""Enough for 16 of the longest requests by default, which take milliseconds to arrive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayLimits:
    """Load limits of one gateway; beyond them, requests are refused at once instead of piling up."""

    max_running_requests: int = 256
    """Requests sent to verifiers at the same time."""
    max_waiting_requests: int = 1024
    """Requests waiting for one of those places; any more get 429."""
    max_choices: int = DEFAULT_MAX_CHOICES
    """Answers per client request; each counts as one request in the two limits above."""
    max_body_bytes: int = 4 * 2**20
    request_timeout_seconds: float = 600.0
    """From arrival to the last token, including time in the queue."""
    admission_wait_seconds: float = 10.0
    """How long a request may wait at the scheduler until speed floors admit it; then 429."""
    max_context_tokens: int | None = None
    """Lowers the verifiers' own limit; None: use theirs."""

    def __post_init__(self) -> None:
        for name in ("max_running_requests", "max_choices", "max_body_bytes", "max_context_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be >= 1, got {value}")
        if self.max_waiting_requests < 0:
            raise ConfigError(f"max_waiting_requests must be >= 0, got {self.max_waiting_requests}")
        if not self.request_timeout_seconds > 0:
            raise ConfigError(f"request_timeout_seconds must be > 0, got {self.request_timeout_seconds}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    target_model: str = DEFAULT_MODEL
    """Name or path of the model whose tokenizer is used; verifiers register under the same string."""
    served_model_name: str = ""
    """What clients call it; empty: the last part of `target_model`."""
    http_host: str = "0.0.0.0"
    http_port: int = 8000
    http_keep_alive_seconds: int = DEFAULT_KEEP_ALIVE_SECONDS
    """How long a client may keep an idle connection. Proxies must close theirs first, or lose requests that
    they send just as this end closes."""
    grpc: ServerOptions = field(
        default_factory=lambda: ServerOptions(
            port=50051,
            max_message_bytes=GatewayLimits().max_body_bytes,
            max_arriving_bytes=_ARRIVING_BYTES,
        )
    )
    scheduler_address: str = "127.0.0.1:50052"
    tls: Tls | None = None
    """For calls to the scheduler and verifiers; the ports for clients do not use it. None: plaintext."""
    limits: GatewayLimits = GatewayLimits()
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Clients must send one of these, each `key` or `key@tier`; empty: everyone may call."""
    keys_file: str = ""
    """Names keys and tiers in place of `api_keys` and `tiers`; see `key_file`."""
    tiers: Mapping[str, Tier] = field(default_factory=dict)
    """By name; `default` applies to callers without another one."""
    prefix_sharing: PrefixSharing = PrefixSharing.KEY
    tool_format: ToolFormat | None = None
    """How the model writes tool calls; None: as its chat template does."""
    reasoning: bool = True
    """Tell thoughts from answers, if the chat template says how they are marked; False: they are text."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Extra variables for the chat template; those of a request take precedence."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose web pages may call; `*`: all. Empty: only the gateway's own page."""

    def __post_init__(self) -> None:
        if not 0 <= self.http_port <= 65535:
            raise ConfigError(f"http_port must be in [0, 65535], got {self.http_port}")

    @property
    def model_name(self) -> str:
        return self.served_model_name or PurePath(self.target_model).name

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> GatewayConfig:
        env = Env(environ)
        own, limits = cls(), GatewayLimits()
        max_body_bytes = env.integer(
            "DSPARK_MAX_BODY_BYTES",
            limits.max_body_bytes,
            minimum=LEAST_BODY_BYTES,
            maximum=MOST_MESSAGE_BYTES,
        )
        return cls(
            target_model=env.text("DSPARK_TARGET_MODEL", own.target_model),
            served_model_name=env.text("DSPARK_SERVED_MODEL_NAME", ""),
            http_host=env.text("DSPARK_HOST", own.http_host),
            http_port=env.integer("DSPARK_HTTP_PORT", own.http_port, minimum=0, maximum=65535),
            http_keep_alive_seconds=_keep_alive_seconds(env, own.http_keep_alive_seconds),
            grpc=ServerOptions(
                port=env.integer("DSPARK_PORT", own.grpc.port, minimum=0, maximum=65535),
                host=env.text("DSPARK_HOST", own.grpc.host),
                drain_seconds=env.number(
                    "DSPARK_DRAIN_SECONDS", own.grpc.drain_seconds, minimum=0, maximum=MOST_SECONDS
                ),
                max_message_bytes=max_body_bytes,
                max_arriving_bytes=_ARRIVING_BYTES,
            ),
            scheduler_address=env.address("DSPARK_SCHEDULER_ADDRESS", own.scheduler_address, several=True),
            tls=Tls.from_env(env),
            limits=GatewayLimits(
                max_running_requests=env.integer(
                    "DSPARK_MAX_RUNNING_REQUESTS", limits.max_running_requests, minimum=1
                ),
                max_waiting_requests=env.integer(
                    "DSPARK_MAX_WAITING_REQUESTS", limits.max_waiting_requests, minimum=0
                ),
                max_choices=env.integer("DSPARK_MAX_CHOICES", limits.max_choices, minimum=1),
                max_body_bytes=max_body_bytes,
                request_timeout_seconds=env.number(
                    "DSPARK_REQUEST_TIMEOUT_SECONDS",
                    limits.request_timeout_seconds,
                    minimum=0.001,
                    maximum=MOST_SECONDS,
                ),
                admission_wait_seconds=env.number(
                    "DSPARK_ADMISSION_WAIT_SECONDS", limits.admission_wait_seconds, minimum=0, maximum=3600
                ),
                max_context_tokens=env.optional_integer("DSPARK_MAX_CONTEXT_TOKENS", minimum=2),
            ),
            keys_file=_keys_file(env),
            api_keys=_keys(env.optional_text("DSPARK_API_KEYS")),
            tiers=tiers_from_text(env.text("DSPARK_TIERS", "")),
            prefix_sharing=PrefixSharing(
                env.choice(
                    "DSPARK_PREFIX_SHARING", own.prefix_sharing.value, [one.value for one in PrefixSharing]
                )
            ),
            tool_format=tool_format_of(env.text("DSPARK_TOOL_FORMAT", "auto"), "DSPARK_TOOL_FORMAT"),
            reasoning=reasoning_of(env.text("DSPARK_REASONING", "auto"), "DSPARK_REASONING"),
            chat_template_kwargs=env.json_object("DSPARK_CHAT_TEMPLATE_KWARGS"),
            cors_origins=_origins(env.text("DSPARK_CORS_ORIGINS", "")),
        )


def tool_format_of(text: str, setting: str) -> ToolFormat | None:
    """Raises ConfigError naming the setting."""
    if text == TOOL_FORMATS[0]:
        return None
    try:
        return ToolFormat(text)
    except ValueError:
        raise ConfigError(f"{setting} must be one of {', '.join(TOOL_FORMATS)}, got {text!r}") from None


def reasoning_of(text: str, setting: str) -> bool:
    """Raises ConfigError naming the setting."""
    if text not in REASONING:
        raise ConfigError(f"{setting} must be one of {', '.join(REASONING)}, got {text!r}")
    return text == REASONING[0]


def _listed(text: str) -> tuple[str, ...]:
    return tuple(entry for part in text.split(",") if (entry := part.strip()))


def _keys(text: str | None) -> tuple[str, ...]:
    keys = _listed(text or "")
    if text is not None and not keys:  # keys were intended: do not leave the gateway open
        raise ConfigError(f"DSPARK_API_KEYS holds no key, only commas: {text!r}")
    return keys


def _keys_file(env: Env) -> str:
    """Checks the file: a model need not be loaded to find out that it is wrong."""
    path = env.text(SETTING, "")
    if path:
        for other in ("DSPARK_API_KEYS", "DSPARK_TIERS"):
            if env.optional_text(other) is not None:
                raise ConfigError(f"{SETTING} and {other} exclude each other: the file holds keys and tiers")
        read_keys(path)
    return path


def _keep_alive_seconds(env: Env, default: int) -> int:
    return env.integer("DSPARK_HTTP_KEEP_ALIVE_SECONDS", default, minimum=1, maximum=3600)


def _origins(text: str) -> tuple[str, ...]:
    origins = _listed(text)
    for origin in origins:
        # Browsers send scheme, host and port only: anything longer would never match.
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s]+", origin):
            raise ConfigError(
                f"DSPARK_CORS_ORIGINS must list origins like https://chat.example.org, got {origin!r}"
            )
    return origins
