"""Environment values become typed values, and every refusal names the variable and the value."""

import pytest

from dspark_core.errors import ConfigError
from services.common.env import Env
from services.common.options import ServerOptions


def test_empty_counts_as_unset():
    env = Env({"A": "", "B": "  "})
    assert env.integer("A", 7) == 7
    assert env.text("B", "fallback") == "fallback"
    assert env.optional_text("A") is None


@pytest.mark.parametrize(("text", "value"), [("1", True), ("TRUE", True), ("off", False), ("no", False)])
def test_flags(text: str, value: bool):
    assert Env({"F": text}).flag("F", not value) is value


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("many", lambda env: env.integer("V", 1)),
        ("0", lambda env: env.integer("V", 1, minimum=1)),
        ("70000", lambda env: env.integer("V", 1, maximum=65535)),
        ("nan", lambda env: env.number("V", 1.0)),
        ("inf", lambda env: env.number("V", 1.0)),
        ("-1", lambda env: env.number("V", 1.0, minimum=0)),
        ("perhaps", lambda env: env.flag("V", True)),
        ("xml", lambda env: env.choice("V", "json", ("json", "plain"))),
        ("scheduler", lambda env: env.address("V", "localhost:1")),
        (":50052", lambda env: env.optional_address("V")),
        ("scheduler:grpc", lambda env: env.optional_address("V")),
        ("scheduler:70000", lambda env: env.optional_address("V")),
        ("a:1,b:2", lambda env: env.optional_address("V")),
        ("a:1,b", lambda env: env.optional_address("V", several=True)),
    ],
)
def test_bad_values_are_named(value: str, read):
    with pytest.raises(ConfigError) as caught:
        read(Env({"V": value}))
    assert "V must" in str(caught.value)
    assert value in str(caught.value)


@pytest.mark.parametrize("value", ["scheduler:50052", "[::1]:50052", "dns:///scheduler.llm:50052"])
def test_addresses_have_a_port(value: str):
    assert Env({"V": value}).optional_address("V") == value
    assert Env({"V": f"{value}, b:1"}).address("V", "", several=True) == f"{value}, b:1"
    assert Env({}).optional_address("V") is None
    assert Env({}).address("V", "a:1") == "a:1"


def test_a_bare_ipv6_address_gets_its_brackets():
    assert Env({"V": "fd00::7:50053"}).optional_address("V") == "[fd00::7]:50053"
    assert Env({"V": "a:1,fd00::7:2"}).address("V", "", several=True) == "a:1,[fd00::7]:2"


def test_a_required_variable_is_named():
    with pytest.raises(ConfigError, match="DSPARK_MODEL must be set"):
        Env({}).text("DSPARK_MODEL")


def test_server_options_take_defaults_and_overrides():
    options = ServerOptions.from_env(Env({}), port=50052, metrics_port=9052)
    assert (options.port, options.host, options.metrics_port) == (50052, "0.0.0.0", 9052)
    options = ServerOptions.from_env(
        Env({"DSPARK_PORT": "1234", "DSPARK_METRICS_PORT": "off", "DSPARK_DRAIN_SECONDS": "3.5"}),
        port=50052,
        metrics_port=9052,
    )
    assert (options.port, options.drain_seconds, options.metrics_port) == (1234, 3.5, None)


@pytest.mark.parametrize(
    "fields", [{"port": 65536}, {"port": 1, "drain_seconds": -1.0}, {"port": 1, "max_calls": 0}]
)
def test_server_options_refuse_what_cannot_work(fields: dict):
    with pytest.raises(ConfigError, match=list(fields)[-1]):
        ServerOptions(**fields)
