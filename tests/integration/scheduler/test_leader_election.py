"""Two scheduler processes, over one Redis, a Kubernetes Lease, or both: the standby takes over."""

import asyncio
import itertools
import signal
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis

from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.errors import DSparkError, NotLeaderError, NoVerifierError, UnavailableError
from dspark_core.records import (
    AssignRequest,
    Replica,
    ReplicaKind,
    RequestSurvival,
    Role,
    RoundReport,
    StepTime,
    VerifierLoad,
)
from services.common.channels import open_channel
from services.common.clients import SchedulerClient
from services.common.registration import RegistrationLoop
from services.common.scheduler_link import GrpcSchedulerConnection, SchedulerLink
from services.scheduler.leadership.redis_lock import RedisLeaderLock
from services.scheduler.storage.redis_store import DEFAULT_KEYS
from services.verifier.plans import CoordinatedPlanSource
from tests.support.full_plans import FullPlans
from tests.support.kubernetes_api import KubernetesApi
from tests.support.polling import eventually
from tests.support.ports import free_ports
from tests.support.redis_process import RedisProcess
from tests.support.running_time import RunningTime
from tests.support.scheduler_process import ready_port, scheduler_process

PROFILE = tuple(
    StepTime(requests=1, batch_tokens=tokens, context_tokens=0, seconds=0.02) for tokens in (1, 8)
)
REQUESTS = (RequestSurvival(sequence_id="s", survival=(0.9, 0.8), verify_length=0, accepted=0),)


class Verifier:
    """The parts of one that talk to schedulers: registration, and a report per round."""

    def __init__(self, link: SchedulerLink) -> None:
        self.registration = RegistrationLoop(
            link, lambda: Replica(replica_id="v", role=Role.VERIFIER, address="v:1", model="m")
        )
        self.plans = CoordinatedPlanSource(
            link,
            FullPlans(),
            PROFILE,
            replica_id="v",
            kind=ReplicaKind(model="m", engine="native", hardware="cpu", dtype="bfloat16"),
            load=lambda: VerifierLoad(running_requests=1),
            on_connected=self.registration.renew_soon,
        )
        self.round = 0
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.plans.start()
        self.registration.start()
        self._task = asyncio.create_task(self._rounds())

    async def close(self) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self.plans.close()
        await self.registration.stop()

    async def _rounds(self) -> None:
        while True:
            self.round += 1
            self.plans.report(
                RoundReport(
                    replica_id="v", round=self.round, requests=REQUESTS, batch_tokens=1, step_seconds=0.02
                )
            )
            await asyncio.sleep(0.02)

    def follows(self) -> bool:
        """A plan of a round this side of the last quarter second is at hand."""
        return self.plans.newest_round > self.round - 12


@asynccontextmanager
async def _link(ports: list[int]) -> AsyncIterator[SchedulerLink]:
    link = SchedulerLink([f"127.0.0.1:{port}" for port in ports], GrpcSchedulerConnection)
    yield link
    await link.close()


async def _assigned(link: SchedulerLink, watch: RunningTime) -> tuple[str, float]:
    """Asks until somebody answers: whom it was sent to, and after how many seconds."""
    while True:
        try:
            request = AssignRequest(request_id="r2", model="m", wait_seconds=10.0)
            return (await link.assign(request)).replica_id, watch.seconds
        except DSparkError:
            await asyncio.sleep(0.01)


async def _listed(scheduler: SchedulerClient) -> list[str]:
    try:
        return [one.replica_id for one in await scheduler.list_replicas(Role.VERIFIER)]
    except NotLeaderError:
        return []


@pytest.fixture(params=["redis", "lease", "lease and redis"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The settings by which schedulers find out who leads, and what else they share: with both, a Lease tells
    who leads, and replicas and documents lie in Redis."""
    shared = {}
    if "redis" in request.param:
        shared = {"REDIS_URL": request.getfixturevalue("redis_process").url}
    if "lease" not in request.param:
        yield shared
        return
    api = KubernetesApi("llm")
    api.start()
    kubeconfig = str(api.kubeconfig(tmp_path, "llm"))
    yield {**shared, "DSPARK_LEADER_ELECTION": "lease", "KUBECONFIG": kubeconfig}
    api.stop()


@pytest.mark.parametrize(
    "lost", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM], ids=["killed", "hung", "stopped"]
)
async def test_the_standby_takes_over_within_five_seconds(backend: dict[str, str], lost: signal.Signals):
    ports = free_ports(2)
    async with AsyncExitStack() as stack:
        processes = {}
        for port in ports:
            address = f"127.0.0.1:{port}"
            process = await stack.enter_async_context(
                scheduler_process(**backend, DSPARK_PORT=str(port), DSPARK_ADVERTISE_ADDRESS=address)
            )
            assert await ready_port(process) == port
            processes[port] = process
        leader = await _take_over(stack, processes, lost, shared="REDIS_URL" in backend)
        if backend.keys() >= {"REDIS_URL", "KUBECONFIG"}:
            await _saves_by_the_terms_of_the_lease(leader, backend["REDIS_URL"])


async def _saves_by_the_terms_of_the_lease(leader: asyncio.subprocess.Process, redis_url: str) -> None:
    """The standby that took over writes step times when it ends, as the leader of a later term."""
    leader.send_signal(signal.SIGTERM)
    async with asyncio.timeout(20):
        await leader.wait()
    async with Redis.from_url(redis_url, decode_responses=True) as redis:
        term = int(await redis.get(f"{DEFAULT_KEYS.curves}:term"))
        assert term % 1_000_000 >= 1  # transitions since the lease was made
        assert await redis.hlen(DEFAULT_KEYS.curves) == 1


def _stopped(pid: int) -> bool:
    """All of its threads."""
    threads = Path(f"/proc/{pid}/task").glob("*/stat")
    return all(one.read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "T" for one in threads)


async def _roles(ports: Iterable[int]) -> tuple[int, int]:
    """The ports of leader and standby, by what the standby says. The first leads, unless the machine stopped
    for longer than its lock lasts."""
    async with asyncio.timeout(15):
        while True:
            for leader, standby in itertools.permutations(ports, 2):
                async with open_channel(f"127.0.0.1:{standby}") as channel:
                    try:
                        await SchedulerClient(channel).assign(AssignRequest(request_id="r", model="m"))
                    except NotLeaderError as error:
                        if error.leader_address == f"127.0.0.1:{leader}":
                            return leader, standby
                    except NoVerifierError:
                        pass  # it leads


async def _take_over(
    stack: AsyncExitStack,
    processes: dict[int, asyncio.subprocess.Process],
    lost: signal.Signals,
    *,
    shared: bool,
) -> asyncio.subprocess.Process:
    """Loses the leader. Returns who leads then. `shared`: the standby knows the replicas before they register
    with it."""
    leads, stands_by = await _roles(processes)
    # The verifier asks the standby first and is sent to the leader; the gateway knows both.
    verifier = Verifier(await stack.enter_async_context(_link([stands_by, leads])))
    gateway = await stack.enter_async_context(_link([leads, stands_by]))
    await verifier.start()
    stack.push_async_callback(verifier.close)
    await eventually(lambda: verifier.plans.newest_round > 0)
    await eventually(lambda: verifier.registration.registered)
    assert (await gateway.assign(AssignRequest(request_id="r", model="m"))).replica_id == "v"
    # A gateway that starts waits for a verifier before it assigns any request.
    starting = await stack.enter_async_context(_link([stands_by, leads]))
    assert [one.replica_id for one in await starting.list_replicas(Role.VERIFIER)] == ["v"]

    leads, stands_by = await _roles(processes)
    standby = await stack.enter_async_context(open_channel(f"127.0.0.1:{stands_by}"))
    leader = processes[leads]
    leader.send_signal(lost)
    watch = await stack.enter_async_context(RunningTime.counted())
    if lost is signal.SIGSTOP:  # a signal is heard when its process next runs: until then it may answer
        await eventually(lambda: _stopped(leader.pid))
    if lost is signal.SIGTERM:  # it answers what it can until it ends
        await eventually(lambda: verifier.plans.newest_round == 0)
    asked = asyncio.create_task(_assigned(gateway, watch))
    await eventually(lambda: verifier.plans.newest_round == 0)  # the stream broke
    verifier.plans.plan([PlanRequest(survival=(0.9, 0.8))])
    assert verifier.plans.last_planner == "local"
    await eventually(verifier.follows)
    while "v" not in await _listed(SchedulerClient(standby)):
        await asyncio.sleep(0.01)
    assert watch.seconds < 5.0
    # A gateway that asked before the verifier was known here may have turned to the hung one once more;
    # a real one routes by its last view meanwhile.
    async with asyncio.timeout(30):
        chosen, seconds = await asked
    assert chosen == "v"
    assert seconds < (10.0 if lost is signal.SIGSTOP and not shared else 5.0)
    return processes[stands_by]


@pytest.fixture
async def lock(redis_process: RedisProcess):
    """Makes locks of different holders over one Redis."""
    async with AsyncExitStack() as stack:

        def make(holder: str, seconds: float = 30.0) -> RedisLeaderLock:
            address = f"{holder}:1"
            one = RedisLeaderLock(redis_process.url, holder=holder, address=address, lock_seconds=seconds)
            stack.push_async_callback(one.close)
            return one

        yield make


async def test_one_holds_the_lock_and_terms_grow_over_an_empty_redis(lock, redis_process: RedisProcess):
    before = await lock("a").hold()
    assert (before.leading, before.leader_address) == (True, "a:1")
    assert await lock("a").hold() == before  # renewed, the same term
    told = await lock("b").hold()
    assert (told.leading, told.term, told.leader_address) == (False, before.term, "a:1")
    await lock("a").release()
    after = await lock("b").hold()
    assert after.leading
    assert after.term > before.term
    redis_process.stop()
    with pytest.raises(UnavailableError, match="redis does not answer"):
        await lock("b").hold()
    redis_process.start()
    again = await lock("c").hold()
    assert again.leading
    assert again.term > after.term
    assert not (await lock("b").hold()).leading
    await lock("b").release()  # not its own any more
    assert (await lock("d").hold()).leader_address == "c:1"


async def test_a_lock_nobody_renews_runs_out(lock):
    assert (await lock("a", 0.2).hold()).leading
    other = lock("b", 0.2)
    async with asyncio.timeout(15):
        while not (await other.hold()).leading:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "write",
    [
        ("SET", "junk"),
        ("SET", b"\xff\xfe"),
        ("SET", "[]", "PX", "60000"),
        ("SET", '{"holder": "x", "address": 5, "term": "1"}', "PX", "60000"),
        ("SET", '{"holder": "x", "address": "x:1", "term": "soon"}', "PX", "60000"),
        ("SET", '{"holder": "x", "address": "x:1", "term": "1"}'),  # never runs out
        ("RPUSH", "junk"),
    ],
    ids=str,
)
async def test_what_is_no_lock_keeps_nobody_from_leading(
    lock, redis_process: RedisProcess, caplog: pytest.LogCaptureFixture, write: tuple
):
    command, *values = write
    async with Redis.from_url(redis_process.url) as redis:
        await redis.execute_command(command, DEFAULT_KEYS.leader, *values)
        await lock("a").release()  # not its own
        assert await redis.exists(DEFAULT_KEYS.leader)
        held = await lock("a").hold()
        assert (held.leading, held.leader_address) == (True, "a:1")
        assert 0 < await redis.pttl(DEFAULT_KEYS.leader) <= 30_000
    assert not (await lock("b").hold()).leading
    assert caplog.text.count("it was replaced") == 1
