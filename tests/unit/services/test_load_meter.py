"""What a verifier tells of its requests beside the rounds."""

from contextlib import ExitStack

from dspark_core.engine.rounds.verifier import VerifierStatus
from dspark_core.records import GenerateRequest
from services.verifier.load import MAX_FLOORS, LoadMeter

IDLE = VerifierStatus(running_requests=0, waiting_requests=0, free_kv_fraction=1.0, preemptions=0)


def _request(name: str, floor: float | None = None, *, promised: bool = True) -> GenerateRequest:
    return GenerateRequest(
        request_id=name, prompt_token_ids=(1,), min_tokens_per_second=floor, floor_promised=promised
    )


def test_every_floor_is_told_once_while_a_request_has_it() -> None:
    meter = LoadMeter(8)
    meter.watch(lambda: IDLE)
    with meter.serving(_request("a", 40.0)), meter.serving(_request("plain")):
        with meter.serving(_request("b", 120.0)), meter.serving(_request("c", 40.0)):
            assert meter.take().speed_floors == (120.0, 40.0)
        assert meter.take().speed_floors == (40.0,)
    assert meter.take().speed_floors == ()


def test_wishes_are_not_told() -> None:
    meter = LoadMeter(8)
    meter.watch(lambda: IDLE)
    with meter.serving(_request("a", 40.0)), meter.serving(_request("b", 120.0, promised=False)):
        assert meter.take().speed_floors == (40.0,)


def test_floors_are_told_up_to_a_bound() -> None:
    meter = LoadMeter(8)
    meter.watch(lambda: IDLE)
    with ExitStack() as inside:
        for number in range(1, 2 * MAX_FLOORS + 1):
            inside.enter_context(meter.serving(_request(f"r{number}", float(number))))
        assert meter.take().speed_floors == tuple(map(float, range(2 * MAX_FLOORS, MAX_FLOORS, -1)))
