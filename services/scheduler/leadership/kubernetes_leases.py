"""One Lease at a Kubernetes API server. The client's calls block, so they run in threads, with deadlines.

Imported only if a Lease is configured: the client is an optional dependency (`dspark[kubernetes]`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import urllib3
from kubernetes import client
from kubernetes.config.config_exception import ConfigException
from kubernetes.config.incluster_config import (
    SERVICE_CERT_FILENAME,
    SERVICE_HOST_ENV_NAME,
    SERVICE_TOKEN_FILENAME,
    InClusterConfigLoader,
)
from kubernetes.config.kube_config import list_kube_config_contexts, load_kube_config

from dspark_core.errors import ConfigError, UnavailableError
from services.scheduler.leadership.lease_lock import Lease, LeaseConflictError

_T = TypeVar("_T")

ADDRESS_ANNOTATION = "dspark-advertise-address"
_NAMESPACE_FILE = Path(SERVICE_TOKEN_FILENAME).with_name("namespace")
_THREADS = 2
_GRACE_SECONDS = 0.5
"""Added to the client's own timeout, which does not cover a hanging DNS lookup."""


class KubernetesLeases:
    """`Leases` on top of `kubernetes.client`."""

    def __init__(
        self, configuration: client.Configuration, *, name: str, namespace: str, timeout_seconds: float = 1.0
    ) -> None:
        configuration.retries = False  # the caller retries soon, and must learn of a refused connection
        self._api_client = client.ApiClient(configuration)
        self._api = client.CoordinationV1Api(self._api_client)
        self._name = name
        self._namespace = namespace
        self._timeout_seconds = timeout_seconds
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="lease")
        self._others = client.V1ObjectMeta()
        """What others keep in the Lease's metadata, as last seen. An update replaces all of it."""

    @classmethod
    def from_env(
        cls, environ: Mapping[str, str], *, name: str, namespace: str | None, timeout_seconds: float
    ) -> KubernetesLeases:
        """Takes API server and credentials from the pod's service account, outside a pod from KUBECONFIG.
        `namespace` None: the pod's or the current context's."""
        configuration = client.Configuration()
        kubeconfig = environ.get("KUBECONFIG") or None
        try:
            if environ.get(SERVICE_HOST_ENV_NAME):
                InClusterConfigLoader(
                    SERVICE_TOKEN_FILENAME, SERVICE_CERT_FILENAME, environ=environ
                ).load_and_set(configuration)
                namespace = namespace or _NAMESPACE_FILE.read_text(encoding="utf-8").strip()
            else:
                load_kube_config(config_file=kubeconfig, client_configuration=configuration)
                current = list_kube_config_contexts(config_file=kubeconfig)[1]
                namespace = namespace or current["context"].get("namespace") or "default"
        except (ConfigException, OSError) as error:
            raise ConfigError(
                f"DSPARK_LEADER_ELECTION=lease needs a Kubernetes API server, by a service account or "
                f"KUBECONFIG: {error}"
            ) from error
        return cls(configuration, name=name, namespace=str(namespace), timeout_seconds=timeout_seconds)

    async def get(self) -> Lease | None:
        def ask() -> client.V1Lease | None:
            try:
                return self._api.read_namespaced_lease(
                    self._name, self._namespace, _request_timeout=self._timeout_seconds
                )
            except client.ApiException as error:
                if error.status == 404:
                    return None
                raise

        found = await self._in_thread("get", ask)
        return None if found is None else self._from_api(found)

    async def create(self, lease: Lease) -> Lease:
        body = self._to_api(lease)
        made = await self._in_thread(
            "create",
            lambda: self._api.create_namespaced_lease(
                self._namespace, body, _request_timeout=self._timeout_seconds
            ),
        )
        return self._from_api(made)

    async def replace(self, lease: Lease) -> Lease:
        body = self._to_api(lease)
        made = await self._in_thread(
            "update",
            lambda: self._api.replace_namespaced_lease(
                self._name, self._namespace, body, _request_timeout=self._timeout_seconds
            ),
        )
        return self._from_api(made)

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._api_client.close()

    def _from_api(self, found: Any) -> Lease:  # noqa: ANN401 - the client's models are untyped
        metadata, spec = found.metadata, found.spec or client.V1LeaseSpec()
        self._others = metadata
        return Lease(
            holder=spec.holder_identity or "",
            address=(metadata.annotations or {}).get(ADDRESS_ANNOTATION, ""),
            duration_seconds=spec.lease_duration_seconds or 1,
            transitions=spec.lease_transitions or 0,
            renewals=str(spec.renew_time),
            created_seconds=int(metadata.creation_timestamp.timestamp()),
            version=metadata.resource_version,
        )

    async def _in_thread(self, verb: str, ask: Callable[[], _T]) -> _T:
        where = f"lease {self._name!r} in namespace {self._namespace!r}"
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout_seconds + _GRACE_SECONDS):
                return await loop.run_in_executor(self._threads, ask)
        except client.ApiException as error:
            raise _translated(error, verb, where) from error
        except (urllib3.exceptions.HTTPError, TimeoutError, OSError) as error:
            raise UnavailableError(
                f"the Kubernetes API server does not answer for {where}: {error!r}"
            ) from error

    def _to_api(self, lease: Lease) -> client.V1Lease:
        now = datetime.now(UTC)
        # The API rejects a time without fractional seconds.
        now = now.replace(microsecond=max(1, now.microsecond))
        return client.V1Lease(
            metadata=client.V1ObjectMeta(
                name=self._name,
                namespace=self._namespace,
                resource_version=lease.version or None,
                annotations={**(self._others.annotations or {}), ADDRESS_ANNOTATION: lease.address},
                labels=self._others.labels,
                owner_references=self._others.owner_references,
                finalizers=self._others.finalizers,
            ),
            spec=client.V1LeaseSpec(
                holder_identity=lease.holder,
                lease_duration_seconds=lease.duration_seconds,
                lease_transitions=lease.transitions,
                renew_time=now,
            ),
        )


def _translated(error: client.ApiException, verb: str, where: str) -> Exception:
    if error.status == 403:
        return ConfigError(
            f"this scheduler may not {verb} {where}: its service account needs the verbs get, create and "
            f"update on leases.coordination.k8s.io there"
        )
    if error.status == 401:
        return ConfigError(f"this scheduler may not {verb} {where}: the API server does not accept its token")
    # 404 for an update: it was deleted. 410 is returned only to watches, not to these calls.
    if error.status == 409 or (error.status == 404 and verb == "update"):
        return LeaseConflictError(f"{where} was changed by somebody else")
    if error.status == 404:
        return ConfigError(f"cannot {verb} {where}: no such namespace, or no leases.coordination.k8s.io/v1")
    if error.status == 422:
        return ConfigError(f"{where} is refused: {error.body}")
    return UnavailableError(
        f"the Kubernetes API server fails to {verb} {where}: {error.status} {error.reason}"
    )
