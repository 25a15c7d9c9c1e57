"""The demo model's tokenizer, built from GGUF metadata, against the one transformers builds."""

import os
import random
import threading
import time
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dspark_core.model_paths import resolve_model_path
from dspark_core.tokenization.detokenizer import IncrementalDetokenizer
from dspark_core.tokenization.loading import load_tokenizer
from dspark_core.tokenization.tokenizer import Tokenizer

TEXTS = [
    "Hello, world! It's 12345 and I'll pay $9.99, won't I?",
    "naïve café Straße 日本語テキスト 한국어 Ελληνικά русский עברית العربية हिन्दी 🙂👩‍👩‍👧‍👦🏳️‍🌈 é é",
    "def f(x):\n    if x > 0x1F:\n\t\treturn [i**2 for i in range(10)]  # squares\n\n\nclass A(B): pass\r\n",
    "  leading   runs \t of\n\n \n whitespace\u00a0\u3000 and trailing   ",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<|endoftext|>x<repo_name>y<empty_output>",
    "x2+y3=1 1,000,000 3.14e-10 v1.2.3 (1) [2]",
    "{'json': [1, 2, {\"k\": null}]} <b>html&amp;</b> \\frac{a}{b} $$E=mc^2$$",
    "",
    "\x00\x01\x7f\ufffd\u200b\ufeff",
]
MESSAGES = [
    [{"role": "user", "content": "What is 2+2?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  Hi <|im_end|> there\n"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "日本"},
        {"role": "user", "content": "c"},
    ],
]

SPECIAL_TOKENS = 17
"""The vocabulary's first ones."""


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return load_tokenizer(resolve_model_path())


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers")
    path = resolve_model_path()
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def random_texts(seed: int, count: int) -> list[str]:
    """Mixtures of scripts, punctuation and whitespace, without numbers."""
    rng = random.Random(seed)
    pieces = [
        "a",
        "The",
        "'s",
        " ",
        "\n",
        "\t",
        "。",
        "漢字",
        "é",
        "ß",
        "🙂",
        "$",
        "==",
        "->",
        "Ж",
        "qu",
        "_",
    ]
    texts = []
    for _ in range(count):
        parts = [rng.choice([*pieces, chr(rng.randrange(32, 0x2FFF))]) for _ in range(rng.randrange(60))]
        texts.append("".join(parts))
    return [text for text in texts if not any(character.isnumeric() for character in text)]


def test_encoding_equals_transformers(ours, theirs) -> None:
    texts = [*TEXTS, *random_texts(1, 400)]
    assert [ours.encode(text) for text in texts] == [tuple(theirs(text)["input_ids"]) for text in texts]


def test_numbers_split_as_the_model_was_trained(ours, theirs) -> None:
    """transformers drops the digit splitter when it converts a GGUF; with it put back, all is equal.

    It matters for runs of spaces before a number, and for numbers outside ASCII.
    """
    import tokenizers
    from tokenizers import pre_tokenizers

    trained = tokenizers.Tokenizer.from_str(theirs.backend_tokenizer.to_str())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    texts = ["   1", "a  12  b", "x² ½ Ⅷ ٣٤", "if x:\n        42", *TEXTS]
    assert [ours.encode(text) for text in texts] == [tuple(trained.encode(text).ids) for text in texts]
    assert ours.encode("   1") != tuple(theirs("   1")["input_ids"])


def test_decoding_equals_transformers_special_tokens_left_out(ours, theirs) -> None:
    rng = random.Random(2)
    sequences = [[rng.randrange(ours.vocab_size) for _ in range(40)] for _ in range(200)]
    backend = theirs.backend_tokenizer
    assert [ours.decode(ids) for ids in sequences] == [backend.decode(ids) for ids in sequences]


@pytest.mark.parametrize("messages", MESSAGES)
def test_chat_prompts_equal_transformers(ours, theirs, messages) -> None:
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.render_chat(messages) == rendered
    without = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    assert ours.render_chat(messages, add_generation_prompt=False) == without
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ours.encode_chat(messages) == tuple(expected)


def test_generation_stops_at_the_end_of_a_turn(ours) -> None:
    assert ours.stop_token_ids == (2,)
    assert ours.decode(ours.stop_token_ids) == ""
    assert ours.decode(range(SPECIAL_TOKENS)) == ""


@settings(max_examples=200)
@given(data=st.data())
def test_pieces_of_any_token_stream_join_to_the_whole_text(ours, data) -> None:
    """Random ids are mostly invalid UTF-8, split anywhere."""
    ids = data.draw(st.lists(st.integers(0, 49_151), max_size=40))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=8)))
    detokenizer = ours.detokenizer()
    pieces = [detokenizer.push(ids[a:b]) for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    assert "".join(pieces) + detokenizer.flush() == ours.decode(ids)


@settings(max_examples=200)
@given(text=st.text(max_size=60))
def test_text_survives_a_round_trip_token_by_token(ours, text) -> None:
    """Characters this vocabulary has no bytes for (some controls and higher planes) are left out.

    So is text that spells a special token: it is read as one, and those are not shown.
    """
    assume(all(token_id >= SPECIAL_TOKENS for token_id in ours.encode(text)))
    text = "".join(character for character in text if ours.decode(ours.encode(character)) == character)
    detokenizer = ours.detokenizer()
    pieces = [detokenizer.push([token_id]) for token_id in ours.encode(text)]
    assert detokenizer.flush() == ""
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_tokens_begin_where_the_text_of_those_before_ends(ours: Tokenizer) -> None:
    text = "né 👩‍👩‍👧 — 日本 🙂🙂!"
    detokenizer, begun = ours.detokenizer(), b""
    split = 0
    for token_id in ours.encode(text):
        # As many characters are whole before it, whatever the bytes of the next one lie in.
        whole = begun.decode(errors="ignore")
        assert detokenizer.place(token_id) == len(whole)
        split += whole.encode() != begun
        detokenizer.push((token_id,))
        begun += ours.token_bytes(token_id)
    assert begun.decode() == text
    assert split > 3


@pytest.mark.parametrize(
    ("pieces", "places", "text"),
    [
        ((b"\xf0\x9f", b"a"), (0, 1), "\ufffda"),  # cut off by another character
        ((b"\xc3", b"\xc3", b"\xa9"), (0, 1, 1), "\ufffdé"),  # and by the beginning of one
        (
            (b"a\xf0\x9f", b"", b"\x99\x82b", b"c"),
            (0, 1, 1, 3),
            "a🙂bc",
        ),  # a token shared by two; one not shown
        ((b"\xef\xbf", b"\xbd", b"a"), (0, 0, 1), "\ufffda"),  # the character that looks like an error
        ((b"\x80", b"a"), (0, 1), "\ufffda"),
    ],
)
def test_a_token_begins_at_the_character_its_first_byte_is_of(
    pieces: tuple[bytes, ...], places: tuple[int, ...], text: str
) -> None:
    detokenizer = IncrementalDetokenizer(pieces.__getitem__)
    found, shown = [], ""
    for token_id in range(len(pieces)):
        found.append(detokenizer.place(token_id))
        shown += detokenizer.push((token_id,))
    assert (tuple(found), shown + detokenizer.flush()) == (places, text)


def test_places_are_of_the_text_without_the_space_a_tokenizer_puts_before_it() -> None:
    detokenizer = IncrementalDetokenizer((b" Hi", b" you").__getitem__, strip_leading_space=True)
    assert (detokenizer.place(0), detokenizer.push((0,)), detokenizer.place(1)) == (0, "Hi", 2)


def test_ids_beyond_the_vocabulary_add_no_text(ours) -> None:
    assert ours.decode([*ours.encode("ab"), ours.vocab_size, 10**9]) == "ab"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of memory maps")
def test_the_file_is_closed_after_loading(ours) -> None:
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert os.fspath(resolve_model_path()) not in maps


def test_long_texts_have_the_same_ids_as_short_ones(ours: Tokenizer) -> None:
    """They are encoded in another way, which must not show."""
    piece = "".join(TEXTS) + " done.\n"
    long = piece * 20
    assert len(piece) < 2048 < len(long)
    assert ours.encode(long) == ours.encode(piece) * 20
    assert ours.encode(long, add_special_tokens=False) == ours.encode(piece, add_special_tokens=False) * 20


def test_encoding_a_long_text_lets_other_threads_run(ours: Tokenizer) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 8000

    def longest_pause_over_duration() -> float:
        encoding = threading.Thread(target=ours.encode, args=(text,))
        began = last = time.monotonic()
        encoding.start()
        longest = 0.0
        while encoding.is_alive():
            time.sleep(0.001)
            now = time.monotonic()
            longest, last = max(longest, now - last), now
        return longest / (last - began)

    # Held throughout, the share is near 1; other processes may cause a pause or two.
    assert min(longest_pause_over_duration() for _ in range(5)) < 0.6
