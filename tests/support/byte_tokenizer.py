"""A tokenizer whose tokens are single bytes, so that every character outside ASCII spans several."""

from collections.abc import Sequence

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from dspark_core.tokenization.token_bytes import byte_alphabet
from dspark_core.tokenization.tokenizer import GenerationDefaults, Tokenizer, TokenizerParts

END = 256
"""<|im_end|>, the only stop token."""
START = 257
VOCAB = 258

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_backend() -> tokenizers.Tokenizer:
    vocabulary = {character: byte for byte, character in byte_alphabet().items()}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = [AddedToken(text, special=True, normalized=False) for text in ("<|im_end|>", "<|im_start|>")]
    backend.add_special_tokens(specials)
    return backend


def byte_tokenizer(
    *,
    chat_template: str | None = TEMPLATE,
    defaults: GenerationDefaults | None = None,
    added: Sequence[str] = (),
    special: bool = False,
) -> Tokenizer:
    """added: texts that are tokens of their own, from id `VOCAB` on. special: they are control tokens."""
    backend = byte_backend()
    tokens = [AddedToken(text, special=special, normalized=False) for text in added]
    (backend.add_special_tokens if special else backend.add_tokens)(tokens)
    return Tokenizer(
        TokenizerParts(
            backend=backend,
            special_tokens={"eos_token": "<|im_end|>"},
            eos_token_ids=(END,),
            chat_template=chat_template,
            defaults=defaults or GenerationDefaults(),
        )
    )
