from datetime import datetime

import pytest

from dspark_core.errors import CheckpointError, ConfigError, InvalidRequestError
from dspark_core.tokenization.chat_template import ChatTemplate

NESTED: list = []
for _ in range(100_000):  # deeper than Python writes
    NESTED = [NESTED]

USER = [{"role": "user", "content": "<b>é & 'x'"}]


def render(source: str, messages=USER) -> str:
    template = ChatTemplate(source, {"bos_token": "<s>"}, lambda: datetime(2026, 7, 4))
    return template.render(messages, arguments={"nested": NESTED})


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ eos_token }}{{ messages[0]['content'] }}", "<s><b>é & 'x'"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "<b>é & \'x\'"}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ strftime_now('%d %b %Y') }}", "04 Jul 2026"),
        ("{% if add_generation_prompt %}go{% endif %}{% if tools %}no{% endif %}", "go"),
        ("{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}", "1"),
        ("{% generation %}{{ messages[0].role }}{% endgeneration %}", "user"),
        ("  {% if true %}\n  a\n  {% endif %}\n", "  a\n"),
    ],
)
def test_templates_see_what_they_expect(source, expected) -> None:
    assert render(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content }}",
        "{{ messages[0].content + 1 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ nested | tojson }}",
    ],
)
def test_what_a_template_cannot_render_is_the_callers_error(source) -> None:
    with pytest.raises(InvalidRequestError, match="messages must fit") as caught:
        render(source)
    assert caught.value.field == "messages"


def test_the_templates_own_message_reaches_the_caller() -> None:
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_a_broken_template_fails_at_load() -> None:
    with pytest.raises(CheckpointError, match="chat template cannot be read"):
        render("{% if %}")


THINKING = "{{ messages[0].role }}:{% if enable_thinking is defined and not enable_thinking %}no{% endif %}"


def test_arguments_are_a_templates_variables_and_a_conversations_own_come_first() -> None:
    assert ChatTemplate(THINKING, {}).render(USER) == "user:"
    assert ChatTemplate(THINKING, {}).render(USER, arguments={"enable_thinking": False}) == "user:no"
    never = ChatTemplate(THINKING, {}, arguments={"enable_thinking": False})
    assert never.render(USER) == "user:no"
    assert never.render(USER, arguments={"enable_thinking": True}) == "user:"


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "bos_token"])
def test_what_every_template_is_given_is_no_argument(name: str) -> None:
    message = f"chat_template_kwargs cannot set '{name}'"
    with pytest.raises(InvalidRequestError, match=message) as caught:
        ChatTemplate(THINKING, {"bos_token": "<s>"}).render(USER, arguments={name: []})
    assert caught.value.field == "chat_template_kwargs"
    with pytest.raises(ConfigError, match=message):
        ChatTemplate(THINKING, {"bos_token": "<s>"}, arguments={name: []})
