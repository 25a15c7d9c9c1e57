"""The one error tree; `services.common` maps each type to a gRPC status and an HTTP code.

Messages name the bad field and its value, because users see them verbatim.
"""

from __future__ import annotations

from typing import Self


class DSparkError(Exception):
    """Base of every error this project raises on purpose."""


class InvalidRequestError(DSparkError):
    """The caller's input is wrong; retrying it unchanged cannot succeed."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field

    def about(self, field: str) -> Self:
        """The same error for a caller that knows the field by another name.

        A leading field name in the message is replaced; otherwise `field` is prepended.
        """
        text = str(self)
        if self.field and text.startswith((f"{self.field} ", f"{self.field}:")):
            return type(self)(field + text.removeprefix(self.field), field=field)
        return type(self)(f"{field}: {text}", field=field)


class UnknownModelError(InvalidRequestError):
    """The request names a model that is not served here."""


class ContextLengthError(InvalidRequestError):
    """The prompt does not fit the context of who raises it, which is `limit` tokens long; 0: not known."""

    def __init__(self, message: str, *, field: str | None = None, limit: int = 0) -> None:
        super().__init__(message, field=field)
        self.limit = limit


class AuthenticationError(DSparkError):
    """No API key, or one that is not known."""


class QueueFullError(DSparkError):
    """A bounded queue is full; the caller may retry after `retry_after_seconds`."""

    def __init__(self, message: str, *, retry_after_seconds: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class QuotaError(QueueFullError):
    """The caller has used up what its key may use; `quota` names which."""

    def __init__(self, message: str, *, quota: str, retry_after_seconds: float) -> None:
        super().__init__(message, retry_after_seconds=retry_after_seconds)
        self.quota = quota


class UnavailableError(DSparkError):
    """Nothing can serve this now: no healthy replica, or this one is draining."""


class UnreachableError(UnavailableError):
    """No connection came about, so nothing was asked."""


class DrainingError(UnavailableError):
    """The service is shutting down and accepts no new work; another replica may."""


class NotLeaderError(UnavailableError):
    """This scheduler is a standby; `leader_address` is the leader's address, if known."""

    def __init__(self, message: str, *, leader_address: str = "") -> None:
        super().__init__(message)
        self.leader_address = leader_address


class NoVerifierError(UnavailableError):
    """This scheduler knows no verifier of the model; one that was split off from it may."""


class DraftUnavailableError(UnavailableError):
    """No drafts this round; the verifier goes on with plain decoding."""


class DeadlineError(DSparkError):
    """The work did not finish within its deadline."""


class ConfigError(DSparkError):
    """A configuration value is wrong; raised at start-up, never while serving."""


class CheckpointError(ConfigError):
    """A checkpoint cannot be read, or does not fit the model it is meant for."""


def require(condition: bool, name: str, value: object, rule: str) -> None:
    """Raises InvalidRequestError naming the field, the rule and the value unless `condition` holds."""
    if not condition:
        raise InvalidRequestError(f"{name} must be {rule}, got {value}", field=name)
