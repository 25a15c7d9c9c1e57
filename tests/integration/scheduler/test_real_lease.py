"""The leader lock against a real Kubernetes API server."""

import asyncio
from pathlib import Path

import pytest

from services.scheduler.leadership.kubernetes_leases import KubernetesLeases
from services.scheduler.leadership.lease_lock import KubernetesLeaderLock
from tests.support.kube_apiserver import kube_apiserver


@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")  # its certificate is its own
async def test_two_locks_over_a_real_api_server(tmp_path: Path):
    with kube_apiserver(tmp_path) as kubeconfig:
        environ = {"KUBECONFIG": str(kubeconfig)}
        leases = [
            KubernetesLeases.from_env(environ, name="who-leads", namespace=None, timeout_seconds=5.0)
            for _ in "ab"
        ]
        first, second = (
            KubernetesLeaderLock(one, holder=holder, address=f"{holder}:1", lock_seconds=1.0)
            for one, holder in zip(leases, "ab", strict=True)
        )
        held = await first.hold()
        assert held.leading
        assert (await first.hold()).term == held.term
        told = await second.hold()
        assert (told.leading, told.leader_address, told.term) == (False, "a:1", held.term)
        async with asyncio.timeout(20):
            while not (taken := await second.hold()).leading:
                await asyncio.sleep(0.1)
        assert taken.term == held.term + 1
        assert not (await first.hold()).leading
        await second.release()
        assert (await first.hold()).term == held.term + 2
        for lock in (first, second):
            await lock.close()
