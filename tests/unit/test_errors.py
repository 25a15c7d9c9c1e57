"""What an error says once its field has another name."""

import pytest

from dspark_core.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("field", "said", "told"),
    [
        ("grammar", "grammar: a grammar of words", "tools: a grammar of words"),
        ("grammar", "grammar must be a text, got ''", "tools must be a text, got ''"),
        ("grammar", "no such rule in this grammar", "tools: no such rule in this grammar"),
        ("grammar", "grammars have rules", "tools: grammars have rules"),
        (None, "no rules", "tools: no rules"),
    ],
)
def test_only_the_name_of_the_field_becomes_another(field: str | None, said: str, told: str) -> None:
    error = InvalidRequestError(said, field=field).about("tools")
    assert (str(error), error.field) == (told, "tools")
