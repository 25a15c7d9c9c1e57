"""The Kubernetes client against an API server: what it writes, and what its errors say."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from dspark_core.errors import ConfigError, UnavailableError
from services.scheduler.leadership.kubernetes_leases import KubernetesLeases
from services.scheduler.leadership.lease_lock import KubernetesLeaderLock, Lease, LeaseConflictError
from tests.support.kubernetes_api import KubernetesApi
from tests.support.scheduler_process import ready_port, scheduler_process

FIRST = Lease(holder="a", address="a:1", duration_seconds=2, transitions=0)


@pytest.fixture
def api() -> Iterator[KubernetesApi]:
    api = KubernetesApi("llm")
    api.start()
    yield api
    api.stop()


@pytest.fixture
async def leases(api: KubernetesApi, tmp_path: Path) -> AsyncIterator[Callable[[], KubernetesLeases]]:
    environ = {"KUBECONFIG": str(api.kubeconfig(tmp_path, "llm"))}
    async with AsyncExitStack() as stack:

        def make(namespace: str | None = None, timeout_seconds: float = 5.0) -> KubernetesLeases:
            one = KubernetesLeases.from_env(
                environ, name="who-leads", namespace=namespace, timeout_seconds=timeout_seconds
            )
            stack.push_async_callback(one.close)
            return one

        yield make


async def test_a_lease_is_what_kubernetes_tools_expect(leases, api: KubernetesApi):
    one = leases()
    assert await one.get() is None
    made = await one.create(FIRST)
    assert (made.holder, made.address, made.duration_seconds, made.transitions) == ("a", "a:1", 2, 0)
    stored = api.leases["llm", "who-leads"]
    assert stored["spec"]["holderIdentity"] == "a"
    assert stored["spec"]["leaseDurationSeconds"] == 2
    assert stored["spec"]["leaseTransitions"] == 0
    renewed = await one.replace(made)
    assert renewed.renewals != made.renewals
    assert renewed.term == made.term
    assert await leases().get() == renewed


async def test_a_lease_without_a_spec_is_free_and_keeps_what_helm_wrote_into_it(leases, api: KubernetesApi):
    metadata = {
        "name": "who-leads",
        "labels": {"app.kubernetes.io/managed-by": "Helm"},
        "annotations": {"meta.helm.sh/release-name": "dspark"},
    }
    api.answer("POST", "/apis/coordination.k8s.io/v1/namespaces/llm/leases", {"metadata": metadata})
    lock = KubernetesLeaderLock(leases(), holder="a", address="a:1", lock_seconds=2.0)
    for _ in range(2):
        assert (await lock.hold()).leading
    stored = api.leases["llm", "who-leads"]
    assert stored["spec"]["holderIdentity"] == "a"
    assert stored["metadata"]["labels"] == metadata["labels"]
    assert stored["metadata"]["annotations"] == {
        **metadata["annotations"],
        "dspark-advertise-address": "a:1",
    }


async def test_a_write_of_an_old_version_is_a_conflict(leases):
    one = leases()
    made = await one.create(FIRST)
    await one.replace(made)
    with pytest.raises(LeaseConflictError):
        await one.replace(made)
    with pytest.raises(LeaseConflictError):
        await one.create(FIRST)


async def test_an_update_of_a_deleted_lease_is_a_conflict(leases, api: KubernetesApi):
    made = await leases().create(FIRST)
    api.leases.clear()
    with pytest.raises(LeaseConflictError):
        await leases().replace(made)


@pytest.mark.parametrize("verb", ["get", "create", "update"])
async def test_a_missing_right_is_named(leases, api: KubernetesApi, verb: str):
    api.denied = {verb}
    lock = KubernetesLeaderLock(leases(), holder="a", address="", lock_seconds=2.0)
    with pytest.raises(ConfigError, match=f"may not {verb} lease 'who-leads' in namespace 'llm'.*verbs get"):
        await lock.hold()


async def test_a_missing_namespace_is_named(leases):
    with pytest.raises(ConfigError, match=r"namespace 'other'.*no such namespace"):
        await leases("other").create(FIRST)


async def test_a_server_that_hangs_is_given_up_within_the_time_limit(leases, api: KubernetesApi):
    one = leases(timeout_seconds=0.2)
    api.answering.clear()
    async with asyncio.timeout(15):
        with pytest.raises(UnavailableError, match="does not answer for lease 'who-leads'"):
            await one.get()
    api.answering.set()
    assert await one.get() is None


async def test_a_server_that_is_gone_is_unavailable(leases, api: KubernetesApi):
    one = leases()
    api.stop()
    with pytest.raises(UnavailableError, match="does not answer"):
        await one.get()


async def test_two_locks_over_the_client(leases):
    first, second = (
        KubernetesLeaderLock(leases(), holder=holder, address=f"{holder}:1", lock_seconds=1.0)
        for holder in "ab"
    )
    held = await first.hold()
    told = await second.hold()
    assert (told.leading, told.leader_address, told.term) == (False, "a:1", held.term)
    async with asyncio.timeout(15):
        while not (taken := await second.hold()).leading:
            await asyncio.sleep(0.02)
    assert taken.term == held.term + 1
    assert not (await first.hold()).leading
    await second.release()
    assert (await first.hold()).term == held.term + 2


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"DSPARK_LEADER_ELECTION": "lease", "KUBECONFIG": "/nowhere"}, "DSPARK_LEADER_ELECTION=lease needs"),
        ({"DSPARK_LEADER_ELECTION": "redis"}, "REDIS_URL must be set"),
        ({"DSPARK_LEADER_ELECTION": "vote"}, "must be one of auto, redis, lease, off, got 'vote'"),
        (
            {"DSPARK_LEADER_ELECTION": "lease", "DSPARK_LEADER_LEASE_NAME": "Who"},
            "DSPARK_LEADER_LEASE_NAME must be a name of lower-case letters, digits, - and ., got 'Who'",
        ),
    ],
)
async def test_a_wrong_setting_ends_the_process_with_a_line_that_names_it(environ, named):
    await _refused(environ, named)


async def test_a_missing_right_ends_the_process_with_a_line_that_names_it(api: KubernetesApi, tmp_path: Path):
    api.denied = {"create"}
    environ = {"DSPARK_LEADER_ELECTION": "lease", "KUBECONFIG": str(api.kubeconfig(tmp_path, "llm"))}
    await _refused(environ, "may not create lease 'dspark-scheduler' in namespace 'llm'")


async def test_a_missing_right_that_shows_after_the_start_ends_the_process_too(
    api: KubernetesApi, tmp_path: Path
):
    api.denied = {"create"}
    api.answering.clear()
    environ = {"DSPARK_LEADER_ELECTION": "lease", "KUBECONFIG": str(api.kubeconfig(tmp_path, "llm"))}
    async with scheduler_process(**environ) as process, asyncio.timeout(120):
        await ready_port(process)  # serving beats refusing, until it is told
        api.answering.set()
        assert process.stderr is not None
        told = (await process.stderr.read()).decode()
        assert await process.wait() == 2
    assert "may not create lease 'dspark-scheduler' in namespace 'llm'" in told
    assert "Traceback" not in told


async def _refused(environ: dict[str, str], named: str) -> None:
    async with scheduler_process(**environ) as process, asyncio.timeout(120):
        assert process.stderr is not None
        told = (await process.stderr.read()).decode()
        assert await process.wait() == 2
    assert named in told
    assert "Traceback" not in told
