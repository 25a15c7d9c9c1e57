"""Mutual TLS between the services: each presents a certificate of one authority and trusts no other.

Off unless files are configured. A server rereads them when they change on disk, as a renewed secret does; a
channel keeps those it was opened with, so a process must be restarted before its first certificate expires.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from dspark_core.errors import ConfigError
from services.common.env import Env

_log = logging.getLogger(__name__)

CERTIFICATE, KEY, AUTHORITY = "DSPARK_TLS_CERT", "DSPARK_TLS_KEY", "DSPARK_TLS_CA"
DEFAULT_NAME = "dspark"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """PEM files. Raises ConfigError for files that cannot be used."""

    certificate: Path
    """With the intermediate certificates of its chain, if any."""
    key: Path
    authority: Path
    name: str = DEFAULT_NAME
    """A DNS name that every service's certificate has. Services reach each other at pod addresses, which
    change and are in no certificate."""

    def __post_init__(self) -> None:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_verify_locations(cafile=self.authority)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"{AUTHORITY}: cannot use {self.authority}: {error}") from error
        try:
            context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"{CERTIFICATE} and {KEY}: cannot use {self.certificate} with {self.key}: {error}"
            ) from error

    @classmethod
    def from_env(cls, env: Env) -> Tls | None:
        """Reads DSPARK_TLS_CERT, _KEY and _CA, all or none of them, and _NAME; None: without TLS."""
        files = {name: env.optional_text(name) for name in (CERTIFICATE, KEY, AUTHORITY)}
        missing = [name for name, file in files.items() if file is None]
        if len(missing) == len(files):
            return None
        if missing:
            raise ConfigError(f"{', '.join(files)} go together; not set: {', '.join(missing)}")
        certificate, key, authority = (Path(file or "") for file in files.values())
        name = env.text("DSPARK_TLS_NAME", DEFAULT_NAME)
        return cls(certificate=certificate, key=key, authority=authority, name=name)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        key, certificate, authority = self._contents()
        return grpc.ssl_channel_credentials(authority, key, certificate)

    def server_credentials(self) -> grpc.ServerCredentials:
        """Clients without a certificate from the authority are refused."""
        newest = _Newest(self._contents)
        return grpc.dynamic_ssl_server_credentials(newest(), newest, require_client_authentication=True)

    def _contents(self) -> tuple[bytes, bytes, bytes]:
        """Key, certificate, authority."""
        return self.key.read_bytes(), self.certificate.read_bytes(), self.authority.read_bytes()


class _Newest:
    """The files' current contents; called at every handshake."""

    def __init__(self, read: Callable[[], tuple[bytes, bytes, bytes]]) -> None:
        self._read = read
        self._known = read()
        self._configuration = _configuration(self._known)

    def __call__(self) -> grpc.ServerCertificateConfiguration:
        try:
            found = self._read()
        except OSError as error:  # a secret that is being replaced; the old one is still valid
            _log.warning("cannot read the certificate again, going on with the old one: %s", error)
            return self._configuration
        if found != self._known:
            _log.info("took a new certificate")
            self._known, self._configuration = found, _configuration(found)
        return self._configuration


def _configuration(contents: tuple[bytes, bytes, bytes]) -> grpc.ServerCertificateConfiguration:
    key, certificate, authority = contents
    return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=authority)
