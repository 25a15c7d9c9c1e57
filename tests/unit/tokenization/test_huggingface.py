"""Tokenizers of Hugging Face directories: byte-level and SentencePiece-like, settings, bad files."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from dspark_core.errors import CheckpointError, InvalidRequestError
from dspark_core.tokenization.loading import load_tokenizer

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def byte_level() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat and the hat, naïve 日本"], trainer)
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return backend


def sentence_piece() -> tokenizers.Tokenizer:
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "▁a",
        "▁ab",
        "é",
    ]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁a", "b")]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def write(directory: Path, backend: tokenizers.Tokenizer, **files: object) -> Path:
    backend.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


@settings(max_examples=100)
@given(text=st.text(max_size=40), ids=st.lists(st.integers(0, 330), max_size=30))
def test_byte_level_text_and_any_ids_decode_as_the_library_does(tmp_path_factory, text, ids) -> None:
    backend = byte_level()
    tokenizer = load_tokenizer(write(tmp_path_factory.mktemp("model"), backend))
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("<|end|>", "")
    assert tokenizer.decode(ids) == backend.decode(ids)


@pytest.mark.parametrize("text", ["a ab b", " ab", "é a", "日本 b🙂", "a  b"])
def test_sentence_piece_text_decodes_as_the_library_does(tmp_path, text) -> None:
    backend = sentence_piece()
    tokenizer = load_tokenizer(write(tmp_path, backend))
    ids = tokenizer.encode(text)
    assert ids[0] == 1  # the post-processor's BOS
    assert tokenizer.decode(ids) == backend.decode(list(ids)) == text
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.push([token_id]) for token_id in ids]
    assert "".join(pieces) == " " + text  # continues a prompt: the space belongs to the text


# Without bytes that are no character by themselves, for which the library drops others around them.
@settings(max_examples=100)
@given(
    text=st.text("ab é\n🙂", max_size=20),
    ids=st.lists(st.sampled_from([*range(131), *range(259, 270)]), max_size=20),
)
def test_added_pieces_of_sentence_piece_are_text_like_others(tmp_path_factory, text, ids) -> None:
    backend = sentence_piece()
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    pieces = ("▁▁", "▁▁▁▁", "\n\n", "<think>")  # as Gemma has them
    backend.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in pieces])
    backend.add_special_tokens(["<▁>"])
    tokenizer = load_tokenizer(write(tmp_path_factory.mktemp("model"), backend))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(ids) == backend.decode(ids)
    spaces, special = backend.token_to_id("▁▁▁▁"), backend.token_to_id("<▁>")
    assert tokenizer.token_bytes(spaces) == b"    "
    assert tokenizer.token_bytes(special) == "<▁>".encode()  # as it is written
    assert tokenizer.detokenizer(shown=[spaces, special]).push([spaces, special]) == "    <▁>"


def test_added_tokens_are_shown_unless_special(tmp_path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, byte_level()))
    ids = tokenizer.encode("<|im_start|><think>cat<|im_end|>")
    assert len(ids) < 7
    assert tokenizer.decode(ids) == "<think>cat"


def entry(text: str, **flags: bool) -> dict[str, object]:
    plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word", "special"), False)
    return {"content": text, **plain, **flags}


ADDED = {
    "new tokens": {
        "tokenizer_config": {"added_tokens_decoder": {"284": entry("d a"), "283": entry("a hat")}}
    },
    "a special one": {"tokenizer_config": {"added_tokens_decoder": {"283": entry("t and", special=True)}}},
    "a known one": {
        "tokenizer_config": {"added_tokens_decoder": {"265": entry("hat"), "0": entry("<|end|>")}}
    },
    "the older file": {"tokenizer_config": {}, "added_tokens": {"hat a": 284, "at!": 283, "<think>": 282}},
}


@pytest.mark.parametrize("name", ADDED)
def test_added_tokens_declared_beside_the_tokenizer_are_those_of_transformers(tmp_path, name) -> None:
    backend = byte_level()
    assert backend.get_vocab_size() == 283
    files = ADDED[name]
    files["tokenizer_config"]["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer = load_tokenizer(write(tmp_path, backend, config={"model_type": "llama"}, **files))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "a hat and a cat!! <|end|><think>"
    ids = theirs(text)["input_ids"]
    assert list(tokenizer.encode(text)) == ids
    assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ids != backend.encode(text).ids


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (
            {"tokenizer_config": {"added_tokens_decoder": {"299": entry("hats")}}},
            r"tokenizer_config\.json: token 'hats' is not in .*, and its id 299 does not continue the 283",
        ),
        ({"added_tokens": {"hats": 5}}, r"added_tokens\.json: token 'hats' .* id 5 does not continue"),
        ({"added_tokens": {"hat": "5"}}, r"added_tokens\.json: 'hat' must have a token id, got '5'"),
        ({"tokenizer_config": {"added_tokens_decoder": []}}, "added_tokens_decoder must be an object, got"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"297": "hat"}}},
            "'297' must be an id with",
        ),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"x": entry("a")}}},
            "'x' must be an id with",
        ),
    ],
)
def test_added_tokens_that_do_not_fit_are_refused(tmp_path, files, problem) -> None:
    with pytest.raises(CheckpointError, match=problem):
        load_tokenizer(write(tmp_path, byte_level(), **files))


def test_settings_come_from_the_files_beside_the_tokenizer(tmp_path) -> None:
    write(
        tmp_path,
        byte_level(),
        tokenizer_config={
            "eos_token": {"content": "<|im_end|>"},
            "bos_token": "<|end|>",
            "chat_template": "old",
        },
        generation_config={"eos_token_id": [0, 2], "temperature": 0.6, "top_k": 20, "top_p": 0.95},
        config={"eos_token_id": 77},
    )
    (tmp_path / "chat_template.jinja").write_text(
        "{{ bos_token }}{{ messages[0].content }}", encoding="utf-8"
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.stop_token_ids == (0, 2)
    assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == "<|end|>x"
    assert (tokenizer.defaults.temperature, tokenizer.defaults.top_k) == (0.6, 20)
    assert (tokenizer.defaults.top_p, tokenizer.defaults.min_p) == (0.95, None)


def test_special_tokens_may_be_named_in_their_own_file(tmp_path) -> None:
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }} {{ image_token }} {{ sep_token }}"
    write(
        tmp_path,
        byte_level(),
        tokenizer_config={"chat_template": template, "sep_token": "<|im_start|>", "add_bos_token": True},
        special_tokens_map={
            "bos_token": "<|end|>",
            "eos_token": {"content": "<|im_end|>", "lstrip": False},
            "image_token": "<think>",
            "sep_token": "other",
        },
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.stop_token_ids == (2,)
    prompt = tokenizer.render_chat([{"role": "user", "content": "x"}])
    assert prompt == "<|end|>x<|im_end|> <think> <|im_start|>"


def test_a_special_token_that_the_tokenizer_config_denies_stays_absent(tmp_path) -> None:
    write(tmp_path, byte_level(), tokenizer_config={"eos_token": None}, special_tokens_map={"eos_token": "a"})
    assert load_tokenizer(tmp_path).stop_token_ids == ()


def test_a_model_without_end_tokens_is_warned_of(tmp_path, caplog) -> None:
    load_tokenizer(write(tmp_path, byte_level()))
    (record,) = caplog.records
    assert "no end token is known" in record.getMessage()


def test_a_top_k_of_minus_one_is_off(tmp_path) -> None:
    write(tmp_path, byte_level(), generation_config={"top_k": -1, "temperature": 0})
    defaults = load_tokenizer(tmp_path).defaults
    assert (defaults.top_k, defaults.temperature) == (0, 0)


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("top_p", 0.0, r"top_p must be in \(0, 1\], got 0.0"),
        ("top_k", -2, r"top_k must be >= 0 \(0: off\), got -2"),
        ("top_k", 50.0, "top_k must be an integer, got 50.0"),
        ("temperature", "0.6", "temperature must be a number, got '0.6'"),
        ("temperature", float("nan"), "temperature must be in .*, got nan"),
        ("min_p", True, "min_p must be a number, got True"),
    ],
)
def test_a_sampling_default_that_no_request_may_have_is_refused(tmp_path, field, value, problem) -> None:
    write(tmp_path, byte_level(), generation_config={field: value})
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: .*{problem}"):
        load_tokenizer(tmp_path)


def test_the_text_part_of_a_larger_model_says_what_ends_an_answer(tmp_path) -> None:
    write(tmp_path, byte_level(), config={"eos_token_id": None, "text_config": {"eos_token_id": [0, 2]}})
    assert load_tokenizer(tmp_path).stop_token_ids == (0, 2)


def test_end_tokens_that_the_tokenizer_lacks_are_ignored_with_a_warning(tmp_path, caplog) -> None:
    ids = [1, 4000, 2**32 - 1, 2**70, -1]
    write(tmp_path, byte_level(), generation_config={"eos_token_id": ids})
    assert load_tokenizer(tmp_path).stop_token_ids == (1,)
    (record,) = caplog.records
    assert f"end tokens {sorted(ids[1:])} are ignored" in record.getMessage()


@pytest.mark.parametrize("ids", ["2", [0, "2"], {"a": 2}, 2.0, True])
def test_end_tokens_that_are_no_ids_are_refused(tmp_path, ids) -> None:
    write(tmp_path, byte_level(), generation_config={"eos_token_id": ids})
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id must be a token id"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "template", [TEMPLATE, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]]
)
def test_the_token_that_ends_a_turn_stops_even_when_it_is_not_the_eos(tmp_path, template) -> None:
    write(tmp_path, byte_level(), tokenizer_config={"chat_template": template}, config={"eos_token_id": 0})
    assert load_tokenizer(tmp_path).stop_token_ids == (0, 2)


def test_chat_prompts_do_not_get_a_second_bos(tmp_path) -> None:
    template = "{{ bos_token }}{{ messages[0].content }}"
    write(tmp_path, sentence_piece(), tokenizer_config={"bos_token": "<s>", "chat_template": template})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_chat([{"role": "user", "content": "a"}]).count(1) == 1


def test_a_model_without_template_refuses_messages_by_name(tmp_path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, byte_level()))
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError, match="no chat template") as caught:
        tokenizer.encode_chat([{"role": "user", "content": "a"}])
    assert caught.value.field == "messages"


def test_unusable_files_are_named(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)
    write(tmp_path, byte_level())
    (tmp_path / "generation_config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"generation_config\.json must hold a JSON object, got list"):
        load_tokenizer(tmp_path)
    other = tmp_path / "model.bin"
    other.touch()
    with pytest.raises(CheckpointError, match=r"neither a directory nor a \.gguf file"):
        load_tokenizer(other)


@pytest.mark.parametrize(
    "template",
    [5, {"default": TEMPLATE}, [{"name": "default"}], [TEMPLATE], [{"name": "default", "template": 5}]],
)
def test_a_chat_template_that_is_none_is_refused_with_its_file(tmp_path, template) -> None:
    write(tmp_path, byte_level(), tokenizer_config={"chat_template": template})
    with pytest.raises(
        CheckpointError, match=r"tokenizer_config\.json: chat_template must be text, or a list"
    ):
        load_tokenizer(tmp_path)


def test_a_chat_template_that_is_no_text_is_refused_with_its_file(tmp_path) -> None:
    write(tmp_path, byte_level())
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read: 'utf-8'"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("decoder", "message"), [(decoders.WordPiece(), "WordPiece"), (None, "has no decoder")]
)
def test_a_decoder_that_cannot_stream_is_refused(tmp_path, decoder, message) -> None:
    backend = byte_level()
    backend.decoder = decoder
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(write(tmp_path, backend))
