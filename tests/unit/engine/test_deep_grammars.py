"""Grammars that nest deeply, which recursive parsers follow on the stack."""

from __future__ import annotations

import subprocess
import sys

DEEP = """
import json
from dspark_core.engine.grammars import GrammarCompiler, TokenizerDocument
from dspark_core.output_rules import Grammar, GrammarKind, MAX_GRAMMAR_CHARACTERS
from dspark_core.records import GenerateRequest
from dspark_core.tokenization.grammar_checking import GrammarChecker
from tests.support.tiny_tokenizer import END, tiny_tokenizer

rules = "start: r0\\n" + "".join(f"r{i}: r{i + 1}\\n" for i in range(4500)) + 'r4500: "a"'
schemas = {f"a{i}": {"items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(1300)}
schemas["a1300"] = {"type": "null"}
text = json.dumps({"$defs": schemas, "$ref": "#/$defs/a0"})
compiler = GrammarCompiler(lambda: TokenizerDocument(tiny_tokenizer().to_str(), (END,)), 61)
for kind, source in ((GrammarKind.LARK, rules), (GrammarKind.JSON_SCHEMA, text)):
    assert 0.8 * MAX_GRAMMAR_CHARACTERS < len(source) <= MAX_GRAMMAR_CHARACTERS, len(source)
    grammar = Grammar(kind=kind, text=source)
    GrammarChecker().check(grammar, "grammar").result()
    asked = GenerateRequest(request_id="r", prompt_token_ids=(1,), grammar=grammar)
    assert compiler.compile(asked, grammar).result() is not None
"""


def test_deep_grammars_do_not_overflow_a_stack() -> None:
    """In a separate process, which an overflow would kill."""
    done = subprocess.run([sys.executable, "-c", DEEP], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
