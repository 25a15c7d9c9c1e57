"""What follows from a caller's key and tier: a request's speed floor, and whose cached prompts it may use."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_core.errors import AuthenticationError, ConfigError, InvalidRequestError
from services.gateway.callers.auth import ApiKeys, PrefixSharing
from services.gateway.callers.tiers import Caller, Tier, floor_from_header, tiers_from_text
from services.gateway.requests import TextRequest

GOLD = Tier(name="gold", min_tokens_per_second=30.0)


def _request(floor: float | None = None) -> TextRequest:
    return TextRequest(request_id="r", model="m", prompt="hello", min_tokens_per_second=floor)


@pytest.mark.parametrize(
    ("body", "header", "floor"),
    [(None, None, 30.0), (None, 20.0, 20.0), (10.0, 20.0, 10.0), (30.0, None, 30.0)],
)
def test_the_body_wins_over_the_header_and_the_header_over_the_tier(body, header, floor):
    sent = Caller(tier=GOLD, asked_floor=header).sends(_request(body))
    assert (sent.min_tokens_per_second, sent.tier, sent.floor_promised) == (floor, "gold", True)


@pytest.mark.parametrize(
    ("body", "header", "field"),
    [(30.5, None, "min_tokens_per_second"), (None, 31.0, "X-Min-Tokens-Per-Second")],
)
def test_more_than_the_tier_promises_is_refused_by_field_and_value(body, header, field):
    with pytest.raises(InvalidRequestError, match=rf"{field} must be at most 30.*got 3") as caught:
        Caller(tier=GOLD, asked_floor=header).sends(_request(body))
    assert caught.value.field == field


@given(floor=st.floats(min_value=0.001, max_value=1e6))
def test_a_tier_without_a_floor_bounds_nothing_and_promises_nothing(floor):
    sent = Caller().sends(_request(floor))
    assert (sent.min_tokens_per_second, sent.floor_promised) == (floor, False)


@pytest.mark.parametrize("floor", [0.0, -1.0, float("nan"), float("inf"), 1e9])
def test_impossible_floors_are_refused(floor):
    with pytest.raises(InvalidRequestError, match="min_tokens_per_second must be > 0"):
        _request(floor)


@pytest.mark.parametrize("text", ["fast", "0", "-3", "nan", "1e400"])
def test_headers_that_are_no_floor_are_refused_with_their_value(text):
    with pytest.raises(InvalidRequestError, match="X-Min-Tokens-Per-Second must be") as caught:
        floor_from_header(text)
    assert caught.value.field == "X-Min-Tokens-Per-Second"


@pytest.mark.parametrize(("text", "floor"), [(None, None), ("", None), (" 12.5 ", 12.5)])
def test_headers(text, floor):
    assert floor_from_header(text) == floor


def test_keys_find_their_tier():
    keys = ApiKeys(("sk-1@gold", "sk-2"), tiers_from_text("gold:30, default:5"))
    assert keys.caller_of("Bearer sk-1").tier == GOLD
    assert keys.caller_of("Bearer sk-2").tier.min_tokens_per_second == 5.0
    with pytest.raises(AuthenticationError):
        keys.caller_of("Bearer sk-1@gold")


def test_a_key_may_hold_the_sign_that_its_tier_follows():
    keys = ApiKeys(("k@3@gold", "k@4@"), tiers_from_text("gold:30, default:5"))
    assert keys.caller_of("Bearer k@3").tier == GOLD
    assert keys.caller_of("Bearer k@4").tier.min_tokens_per_second == 5.0


def test_without_keys_everyone_has_the_default_tier():
    assert ApiKeys((), tiers_from_text("default:5")).caller_of(None).tier.min_tokens_per_second == 5.0


@pytest.mark.parametrize(
    "text", ["gold", "gold:", "gold:fast", "gold:-1", "Gold Tier:5", ":5", "gold:5,gold:6"]
)
def test_wrong_tiers_are_refused_at_start(text):
    with pytest.raises(ConfigError, match=r"DSPARK_TIERS.*tier"):
        tiers_from_text(text)


def test_there_are_no_more_tiers_than_the_scheduler_can_tell_apart():
    most = ",".join(f"t{number}:5" for number in range(63))
    assert len(tiers_from_text(most)) == len(tiers_from_text(f"{most},default:3")) - 1 == 63
    with pytest.raises(ConfigError, match="DSPARK_TIERS names 65 tiers, with 'default', where 64 are"):
        tiers_from_text(f"{most},gold:5")


@pytest.mark.parametrize("entry", ["secret@god", "se@cret", "se@cret@god"])
def test_a_key_of_an_unknown_tier_is_told_by_its_place_and_not_shown(entry):
    """If no tier was intended, what follows the @ is part of the key."""
    with pytest.raises(ConfigError, match=r"entry 2 names a tier.* \(known: default, gold\)") as caught:
        ApiKeys(("sk-1", entry), {"gold": GOLD})
    assert not [part for part in entry.split("@") if part in str(caught.value)]


def test_a_key_that_is_given_twice_is_told_by_its_places_and_not_shown():
    with pytest.raises(ConfigError, match="entries 1 and 3 are the same key") as caught:
        ApiKeys(("secret@gold", "sk-2", "secret"), {"gold": GOLD})
    assert "secret" not in str(caught.value)


def _salts(sharing: PrefixSharing, *clients: tuple[str, str | None]) -> list[str]:
    keys = ApiKeys(("a@gold", "b@gold", "c"), tiers_from_text("gold:30"), sharing)
    return [
        keys.caller_of(f"Bearer {key}").sends(replace(_request(), cache_salt=salt)).full_cache_salt
        for key, salt in clients
    ]


def test_each_key_has_cached_prompts_of_its_own():
    first, again, other, plain = _salts(PrefixSharing.KEY, ("a", None), ("a", None), ("b", None), ("c", None))
    assert first == again
    assert len({first, other, plain}) == 3
    assert "" not in (first, other, plain)


def test_a_salt_divides_what_a_key_has_and_leads_into_nothing_of_another():
    (domain,) = _salts(PrefixSharing.KEY, ("b", None))
    salts = _salts(PrefixSharing.KEY, ("a", None), ("a", "x"), ("a", "y"), ("b", "x"), ("a", domain))
    assert len({*salts, domain}) == 6


@pytest.mark.parametrize(
    ("sharing", "different"), [(PrefixSharing.KEY, 3), (PrefixSharing.TIER, 2), (PrefixSharing.ALL, 1)]
)
def test_keys_share_cached_prompts_as_told(sharing, different):
    assert len(set(_salts(sharing, ("a", None), ("b", None), ("c", None)))) == different


def test_without_keys_all_share_cached_prompts_but_for_their_salts():
    caller = ApiKeys((), {}).caller_of(None)
    assert caller.sends(_request()).full_cache_salt == ""
    assert caller.sends(replace(_request(), cache_salt="x")).full_cache_salt not in ("", "x")


@pytest.mark.parametrize("salt", ["", "x" * 257])
def test_salts_are_bounded(salt):
    with pytest.raises(InvalidRequestError, match="cache_salt must have 1 to 256 characters") as caught:
        replace(_request(), cache_salt=salt)
    assert caught.value.field == "cache_salt"
