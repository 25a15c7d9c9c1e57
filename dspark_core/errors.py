"""The one error tree; `services.common` maps each type to a gRPC status and an HTTP code.

Messages name the bad field and its value: they are shown to users as they are.
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
        """The same in the words of who knows its field by another name. A message begins with its field, or
        names none: what it says behind stays as it is."""
        said = str(self)
        if self.field and said.startswith((f"{self.field} ", f"{self.field}:")):
            return type(self)(field + said.removeprefix(self.field), field=field)
        return type(self)(f"{field}: {said}", field=field)


class UnknownModelError(InvalidRequestError):
    """The request names a model that is not served here."""


class ContextLengthError(InvalidRequestError):
    """The prompt does not fit the model's context."""


class AuthenticationError(DSparkError):
    """No API key, or one that is not known."""


class QueueFullError(DSparkError):
    """A bounded queue is full; the caller may retry after `retry_after_seconds`."""

    def __init__(self, message: str, *, retry_after_seconds: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class UnavailableError(DSparkError):
    """Nothing can serve this now: no healthy replica, or this one is draining."""


class DrainingError(UnavailableError):
    """The service that was asked is about to end and takes nothing new; another one may."""


class NotLeaderError(UnavailableError):
    """This scheduler is a standby; the leader, when it is known, is at `leader_address`."""

    def __init__(self, message: str, *, leader_address: str = "") -> None:
        super().__init__(message)
        self.leader_address = leader_address


class DraftUnavailableError(UnavailableError):
    """No drafts this round; the verifier goes on with plain decoding."""


class DeadlineError(DSparkError):
    """The work did not finish within its deadline."""


class ConfigError(DSparkError):
    """A configuration value is wrong; raised at start-up, never while serving."""


class CheckpointError(ConfigError):
    """A checkpoint cannot be read, or does not fit the model it is meant for."""


def require(condition: bool, name: str, value: object, rule: str) -> None:
    """Raises InvalidRequestError that names the field, the rule and the value."""
    if not condition:
        raise InvalidRequestError(f"{name} must be {rule}, got {value}", field=name)
