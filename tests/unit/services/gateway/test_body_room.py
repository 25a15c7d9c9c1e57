"""Bodies that arrive share a bounded room; small ones need none of it."""

import pytest

from dspark_core.errors import QueueFullError
from services.gateway.http.body_room import FREE_BYTES, BodyRoom

LIMIT = 1000


def room(total: int = 3 * LIMIT, key: int = 2 * LIMIT) -> BodyRoom:
    return BodyRoom(LIMIT, total_bytes=total, key_bytes=key)


def test_a_key_and_all_keys_together_are_bounded() -> None:
    bodies = room()
    with bodies.place("alice") as first, bodies.place("alice") as second, bodies.place("bob") as third:
        first.hold(FREE_BYTES + LIMIT)
        second.hold(FREE_BYTES + LIMIT)
        with pytest.raises(QueueFullError, match="this key sends at this time need more than 2000 b"):
            second.hold(FREE_BYTES + LIMIT + 1)
        third.hold(FREE_BYTES + LIMIT)
        with pytest.raises(QueueFullError, match="that arrive at this time need more than 3000 bytes"):
            third.hold(FREE_BYTES + LIMIT + 1)


def test_small_bodies_always_have_room() -> None:
    bodies = room()
    with bodies.place("") as large:
        large.hold(FREE_BYTES + 3 * LIMIT)
        with bodies.place("") as small:
            small.hold(FREE_BYTES)
            with pytest.raises(QueueFullError):
                small.hold(FREE_BYTES + 1)


def test_room_comes_back_also_after_a_refusal() -> None:
    bodies = room()

    def receive(size: int) -> None:
        with bodies.place("alice") as place:
            place.hold(FREE_BYTES + 2 * LIMIT)
            place.hold(FREE_BYTES + size)

    for _ in range(3):
        with pytest.raises(QueueFullError, match="this key sends"):
            receive(3 * LIMIT)
    receive(2 * LIMIT)


def test_there_is_always_room_for_the_largest_body() -> None:
    bodies = room(total=10, key=1)
    with bodies.place("alice") as place:
        place.hold(FREE_BYTES + LIMIT)
