"""Small GGUF files written here: pre-tokenizers, BOS, token types, refusals by name."""

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from dspark_core.errors import CheckpointError
from dspark_core.tokenization.loading import load_tokenizer
from dspark_core.tokenization.token_bytes import byte_alphabet

BYTES = list(byte_alphabet().values())
SPECIAL = ["<|eos|>", "<|eot_id|>", "<tool>"]
MERGED = ["12", "Ġ1", "123", "ab", "Ġab"]
MERGES = ["1 2", "12 3", "a b", "Ġ ab", "Ġ 1"]


def write(
    path: Path,
    *,
    pre: str | None = "gpt-2",
    model: str = "gpt2",
    merges=MERGES,
    bos: bool | None = None,
    add: Callable[[gguf.GGUFWriter], object] = lambda writer: None,
) -> Path:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list([*SPECIAL, *BYTES, *MERGED, "whole"])
    writer.add_token_types([3, 3, 4, *[1] * (len(BYTES) + len(MERGED) + 1)])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_eot_token_id(1)
    writer.add_chat_template("{{ bos_token }}{{ messages[0].content }}")
    if bos is not None:
        writer.add_add_bos_token(bos)
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "ab 123 1x", ["ab", " ", "123", " 1", "x"]),
        (None, "ab 123 1x", ["ab", " ", "123", " 1", "x"]),
        ("smollm", "ab 123 1x", ["ab", " ", "1", "2", "3", " ", "1", "x"]),
        ("qwen2", "ab 123", ["ab", " ", "1", "2", "3"]),
        ("llama-bpe", "ab 1234", ["ab", " ", "123", "4"]),
        ("llama-bpe", "whole", ["whole"]),
        ("qwen2", "AB'LL ab", ["A", "B", "'", "L", "L", " ab"]),
    ],
)
def test_each_pre_tokenizer_splits_in_its_own_way(tmp_path, pre, text, pieces) -> None:
    tokenizer = load_tokenizer(write(tmp_path / "m.gguf", pre=pre))
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert [tokenizer.decode([token_id]) for token_id in ids] == pieces


def test_qwen_text_is_normalised_before_splitting(tmp_path) -> None:
    tokenizer = load_tokenizer(write(tmp_path / "m.gguf", pre="qwen2"))
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "\u00e9"


@pytest.mark.parametrize(
    ("pre", "bos", "starts_with_bos"),
    [("gpt-2", None, False), ("gpt-2", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_bos_is_added_where_the_file_or_the_family_wants_it(tmp_path, pre, bos, starts_with_bos) -> None:
    tokenizer = load_tokenizer(write(tmp_path / "m.gguf", pre=pre, bos=bos))
    assert (tokenizer.encode("ab")[0] == 0) is starts_with_bos
    assert tokenizer.encode_chat([{"role": "user", "content": "ab"}]).count(0) == 1


def test_control_tokens_are_hidden_and_user_defined_ones_shown(tmp_path) -> None:
    tokenizer = load_tokenizer(write(tmp_path / "m.gguf", pre="gpt-2"))
    assert tokenizer.encode("a<tool>b<|eot_id|>")[1::2] == (2, 1)
    assert tokenizer.decode((0, 2, 1)) == "<tool>"
    assert tokenizer.stop_token_ids == (0, 1)


@pytest.mark.parametrize(
    ("method", "unset"), [("add_uint32", 2**32 - 1), ("add_int32", -1), ("add_uint32", 4000)]
)
def test_special_tokens_that_are_unset_are_absent(tmp_path, method, unset) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        for key in ("padding", "unknown", "eot"):
            name = f"tokenizer.ggml.{key}_token_id"
            writer.kv_data[0].pop(name, None)
            getattr(writer, method)(name, unset)
        writer.kv_data[0].pop("tokenizer.chat_template")
        writer.add_chat_template("{{ pad_token is defined }} {{ unk_token is defined }} {{ eos_token }}")

    tokenizer = load_tokenizer(write(tmp_path / "m.gguf", add=add))
    assert tokenizer.stop_token_ids == (0,)
    assert tokenizer.render_chat([]) == "False False <|eos|>"


def test_a_bos_to_add_that_is_unset_is_refused(tmp_path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop("tokenizer.ggml.bos_token_id")
        writer.add_bos_token_id(2**32 - 1)

    with pytest.raises(CheckpointError, match=r"m\.gguf: tokenizer\.ggml\.bos_token_id names no token"):
        load_tokenizer(write(tmp_path / "m.gguf", bos=True, add=add))


def test_sampling_defaults_are_checked(tmp_path) -> None:
    def sampling(top_k: int, top_p: float) -> Path:
        def add(writer: gguf.GGUFWriter) -> None:
            writer.add_int32("general.sampling.top_k", top_k)
            writer.add_float32("general.sampling.top_p", top_p)

        return write(tmp_path / "m.gguf", add=add)

    defaults = load_tokenizer(sampling(-1, 0.5)).defaults
    assert (defaults.top_k, defaults.top_p) == (0, 0.5)
    with pytest.raises(CheckpointError, match=r"m\.gguf: general\.sampling\.top_p: .* got 0\.0"):
        load_tokenizer(sampling(20, 0.0))


def test_what_is_not_supported_is_refused_by_name(tmp_path) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(CheckpointError, match=r"m\.gguf.*'tekken' is not supported, only default, gpt-2"):
        load_tokenizer(write(path, pre="tekken"))
    with pytest.raises(CheckpointError, match="model 'llama' is not supported, only 'gpt2'"):
        load_tokenizer(write(path, pre="gpt-2", model="llama"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.tokens and merges do not fit"):
        load_tokenizer(write(path, pre="gpt-2", merges=["zz yy"]))


def test_files_that_are_not_gguf_or_hold_no_tokenizer_are_refused(tmp_path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"not a model, but long enough to have a header")
    with pytest.raises(CheckpointError, match=r"m\.gguf cannot be read as GGUF"):
        load_tokenizer(path)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("empty")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"key 'tokenizer\.ggml\.model' is missing"):
        load_tokenizer(path)
