"""Test certificates and the authorities that issue them, as files."""

from __future__ import annotations

from pathlib import Path

import trustme

from services.common.tls import DEFAULT_NAME, Tls


def write_tls(directory: Path, authority: trustme.CA | None = None, name: str = DEFAULT_NAME) -> Tls:
    """A certificate for `name`, issued by a new authority unless one is given."""
    authority = authority or trustme.CA()
    issued = authority.issue_cert(name)
    directory.mkdir(parents=True, exist_ok=True)
    certificate, key, trusted = (directory / file for file in ("tls.crt", "tls.key", "ca.crt"))
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    authority.cert_pem.write_to_path(trusted)
    return Tls(certificate=certificate, key=key, authority=trusted, name=DEFAULT_NAME)


def tls_environ(tls: Tls) -> dict[str, str]:
    return {
        "DSPARK_TLS_CERT": str(tls.certificate),
        "DSPARK_TLS_KEY": str(tls.key),
        "DSPARK_TLS_CA": str(tls.authority),
        "DSPARK_TLS_NAME": tls.name,
    }
