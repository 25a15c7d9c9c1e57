import pytest

from dspark_core.errors import ConfigError
from dspark_core.tokenization.tool_formats import ToolFormat
from services.gateway.config import GatewayConfig, GatewayLimits


def test_defaults_need_no_environment() -> None:
    config = GatewayConfig.from_env({})
    assert config == GatewayConfig()
    assert config.model_name == "smollm2-135m-instruct"
    assert config.api_keys == ()


def test_every_setting_comes_from_its_variable() -> None:
    config = GatewayConfig.from_env(
        {
            "DSPARK_TARGET_MODEL": "/models/qwen3-4b",
            "DSPARK_HTTP_PORT": "8080",
            "DSPARK_HTTP_KEEP_ALIVE_SECONDS": "400",
            "DSPARK_PORT": "6000",
            "DSPARK_HOST": "127.0.0.1",
            "DSPARK_SCHEDULER_ADDRESS": "scheduler:50052",
            "DSPARK_MAX_RUNNING_REQUESTS": "8",
            "DSPARK_MAX_WAITING_REQUESTS": "0",
            "DSPARK_MAX_CHOICES": "4",
            "DSPARK_MAX_BODY_BYTES": "1000",
            "DSPARK_REQUEST_TIMEOUT_SECONDS": "5",
            "DSPARK_MAX_CONTEXT_TOKENS": "4096",
            "DSPARK_DRAIN_SECONDS": "3",
            "DSPARK_API_KEYS": "key-1, key-2,,",
            "DSPARK_TOOL_FORMAT": "llama3_json",
            "DSPARK_REASONING": "none",
            "DSPARK_CORS_ORIGINS": "https://chat.example.org, http://localhost:3000",
        }
    )
    assert config.model_name == "qwen3-4b"
    assert (config.http_host, config.http_port) == ("127.0.0.1", 8080)
    assert config.http_keep_alive_seconds == 400
    assert (config.grpc.host, config.grpc.port, config.grpc.drain_seconds) == ("127.0.0.1", 6000, 3.0)
    assert config.grpc.max_message_bytes == 1000
    assert config.scheduler_address == "scheduler:50052"
    assert config.limits == GatewayLimits(
        max_running_requests=8,
        max_waiting_requests=0,
        max_choices=4,
        max_body_bytes=1000,
        request_timeout_seconds=5.0,
        max_context_tokens=4096,
    )
    assert config.api_keys == ("key-1", "key-2")
    assert "key-1" not in repr(config)
    assert config.tool_format is ToolFormat.LLAMA3_JSON
    assert not config.reasoning
    assert config.cors_origins == ("https://chat.example.org", "http://localhost:3000")


def test_a_served_name_hides_the_path() -> None:
    environ = {"DSPARK_TARGET_MODEL": "/models/a.gguf", "DSPARK_SERVED_MODEL_NAME": "demo"}
    assert GatewayConfig.from_env(environ).model_name == "demo"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DSPARK_HTTP_PORT", "70000"),
        ("DSPARK_HTTP_KEEP_ALIVE_SECONDS", "0"),
        ("DSPARK_MAX_RUNNING_REQUESTS", "0"),
        ("DSPARK_MAX_WAITING_REQUESTS", "-1"),
        ("DSPARK_MAX_CHOICES", "0"),
        ("DSPARK_TOOL_FORMAT", "xml"),
        ("DSPARK_REASONING", "high"),
        ("DSPARK_MAX_BODY_BYTES", "big"),
        ("DSPARK_REQUEST_TIMEOUT_SECONDS", "0"),
        ("DSPARK_MAX_CONTEXT_TOKENS", "0"),
        ("DSPARK_API_KEYS", ","),
        ("DSPARK_CORS_ORIGINS", "chat.example.org"),
        ("DSPARK_CORS_ORIGINS", "https://chat.example.org/app"),
    ],
)
def test_a_bad_value_is_refused_with_its_variable(name, value) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*{value}"):
        GatewayConfig.from_env({name: value})


@pytest.mark.parametrize(
    "limits",
    [
        {"max_running_requests": 0},
        {"max_waiting_requests": -1},
        {"max_body_bytes": 0},
        {"request_timeout_seconds": 0},
        {"max_context_tokens": 0},
    ],
)
def test_limits_are_checked_without_an_environment_too(limits) -> None:
    with pytest.raises(ConfigError, match=next(iter(limits))):
        GatewayLimits(**limits)
