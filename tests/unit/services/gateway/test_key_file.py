"""Keys and tiers from a file."""

import asyncio
import hashlib
from pathlib import Path

import pytest

from dspark_core.errors import AuthenticationError, ConfigError, QuotaError
from services.gateway.callers import key_file
from services.gateway.callers.auth import ApiKeys
from services.gateway.callers.key_file import KeyFile, parse_keys
from services.gateway.callers.quotas import Quota
from services.gateway.config import GatewayConfig
from tests.support.polling import eventually

SECRET = "sk-a-secret"
HASHED = "sha256:" + hashlib.sha256(SECRET.encode()).hexdigest()
FILE = f"""
[tiers.gold]
min_tokens_per_second = 30
max_concurrent_requests = 2
requests_per_minute = 60
tokens_per_minute = 9000

[keys.alice]
key = "{HASHED}"
tier = "gold"

[keys.bob]
key = "sk-b"
"""


def _keys(text: str = FILE) -> ApiKeys:
    keys = ApiKeys(())
    keys.use(parse_keys(text))
    return keys


def test_hashed_and_plain_keys_are_found_with_their_tiers() -> None:
    alice, bob = (_keys().caller_of(f"Bearer {key}") for key in (SECRET, "sk-b"))
    assert (alice.account.name, alice.tier.name, alice.tier.min_tokens_per_second) == ("alice", "gold", 30)
    assert alice.tier.quota == Quota(
        max_concurrent_requests=2, requests_per_minute=60, tokens_per_minute=9000
    )
    assert (bob.account.name, bob.tier.name, bob.tier.quota) == ("bob", "default", Quota())
    for wrong in (HASHED, HASHED.removeprefix("sha256:"), "sk-c"):
        with pytest.raises(AuthenticationError):
            _keys().caller_of(f"Bearer {wrong}")


def test_a_key_has_the_same_cached_prompts_wherever_it_is_named() -> None:
    domains = {
        keys.caller_of(f"Bearer {SECRET}").cache_domain
        for keys in (_keys(), ApiKeys((SECRET,)), _keys(f'[keys.other]\nkey = "{SECRET}"'))
    }
    assert len(domains) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"holds no \[keys.NAME\]"),
        ("[keys", "at the end of a table declaration"),
        ("[keys.a]\nkey = sk", "line 2, column 7"),
        ("[key.a]\nkey = 'x'", "the file must hold tiers, keys only, got 'key'"),
        ("keys = 3", r"\[keys\] must be a table"),
        ("[keys]\nsk-a-secret = 'gold'", r"entry 1 of \[keys\] must be a table"),
        ("[keys.a]\ntier = 'default'", r"\[keys.a\] must hold key"),
        ("[keys.a]\nkey = 'sk-a-secret'\ntier = 'god'", r"unknown tier \(known: default\)"),
        ("[keys.a]\nkey = 'sk-a-secret'\ntier = ['default']", r"unknown tier \(known: default\)"),
        ("[keys.a]\nkey = 'sk-a-secret'\nlimit = 3", "must hold key, tier only, got 'limit'"),
        ("[keys.a]\nkey = 'sha256:abc'", "64 hexadecimal digits"),
        ("[keys.'a b']\nkey = 'sk-a-secret'", "visible ASCII characters, got 'a b'"),
        ("[keys.a]\nkey = 'sk-a-secret'\n[keys.b]\nkey = 'sk-a-secret'", "same key under two names"),
        ("[tiers.Gold]\n[keys.a]\nkey = 'sk-a-secret'", "tier names must be"),
        (
            "".join(f"[tiers.t{n}]\n" for n in range(64)) + "[keys.a]\nkey = 'x'",
            "names 65 tiers, with 'default'",
        ),
        ("[tiers.gold]\nmin_tokens_per_second = '3'", "must be a number, got '3'"),
        ("[tiers.gold]\nmin_tokens_per_second = -3", "the floor of tier gold must be > 0"),
        ("[tiers.gold]\ntokens_per_minute = 0", r"\[tiers.gold\] tokens_per_minute must be a whole"),
        (f"[tiers.gold]\nrequests_per_minute = {10**400}", "requests_per_minute must be a whole"),
        (f"[tiers.gold]\nrequests_per_minute = {'9' * 5000}", "4300 digits"),
        (f"x = {'[' * 5000}", "recursion"),
        ("[tiers.gold]\nmin_tokens_per_second = inf", "the floor of tier gold must be"),
        ("[tiers.gold]\nmin_tokens_per_second = nan", "the floor of tier gold must be"),
        ("[tiers.gold]\nrpm = 3", r"\[tiers.gold\] must hold .* only, got 'rpm'"),
    ],
)
def test_a_wrong_file_is_refused_by_place_and_shows_no_key(text, message) -> None:
    with pytest.raises(ConfigError, match=f"DSPARK_KEYS_FILE: .*{message}") as caught:
        parse_keys(text)
    assert SECRET not in str(caught.value)


async def test_a_changed_file_is_used_at_once_and_a_wrong_one_not(tmp_path, caplog) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(FILE)
    keys = ApiKeys(())
    file = KeyFile(str(path), keys.use)
    used = keys.caller_of(f"Bearer {SECRET}").account
    used.enter(2)
    keeping = asyncio.create_task(file.keep(interval_seconds=0.001))
    try:
        _replace(path, "[keys")
        await eventually(lambda: "keys and tiers stay as they are" in caplog.text)
        assert keys.caller_of("Bearer sk-b").account.name == "bob"
        _replace(path, FILE.replace("sk-b", "sk-new"))
        await eventually(lambda: _accepts(keys, "sk-new"))
    finally:
        keeping.cancel()
    assert not _accepts(keys, "sk-b")
    with pytest.raises(QuotaError):  # what runs still counts
        keys.caller_of(f"Bearer {SECRET}").account.enter(1)
    assert caplog.text.count("stay as they are") == 1


async def test_a_file_still_being_written_is_not_used(tmp_path, monkeypatch) -> None:
    whole, half = FILE.replace("sk-b", "sk-new"), FILE[: FILE.index("[keys.bob]")]
    readings = iter([FILE, half, whole, whole])
    monkeypatch.setattr(key_file, "_read", lambda _: next(readings, whole))
    used: list[set[str]] = []
    file = KeyFile("keys.toml", lambda keys: used.append({key.name for key in keys}))
    keeping = asyncio.create_task(file.keep(interval_seconds=0.001))
    try:
        await eventually(lambda: len(used) == 2)
    finally:
        keeping.cancel()
    assert parse_keys(half)
    assert used == [{"alice", "bob"}, {"alice", "bob"}]


def _replace(path: Path, text: str) -> None:
    """At once, so that no reading sees the file empty."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def _accepts(keys: ApiKeys, key: str) -> bool:
    try:
        keys.caller_of(f"Bearer {key}")
    except AuthenticationError:
        return False
    return True


def test_a_wrong_file_or_two_sources_of_keys_end_the_start(tmp_path) -> None:
    path = tmp_path / "keys.toml"
    with pytest.raises(ConfigError, match=r"DSPARK_KEYS_FILE .* cannot be read"):
        GatewayConfig.from_env({"DSPARK_KEYS_FILE": str(path)})
    path.write_text(FILE)
    assert GatewayConfig.from_env({"DSPARK_KEYS_FILE": str(path)}).keys_file == str(path)
    for other in ("DSPARK_API_KEYS", "DSPARK_TIERS"):
        with pytest.raises(ConfigError, match=f"DSPARK_KEYS_FILE and {other} exclude each other"):
            GatewayConfig.from_env({"DSPARK_KEYS_FILE": str(path), other: "gold:3"})
