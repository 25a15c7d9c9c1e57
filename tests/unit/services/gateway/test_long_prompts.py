"""How long a prompt may be, and how prompts that take long to encode are handled."""

import asyncio
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import aclosing
from typing import Any

import pytest
import tokenizers
from prometheus_client import CollectorRegistry
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from dspark_core.errors import ContextLengthError, DeadlineError, DrainingError
from dspark_core.tokenization.tokenizer import Tokenizer, TokenizerParts
from services.common.lifecycle import end
from services.gateway.admission import Admission
from services.gateway.generation import TextGenerator
from services.gateway.metrics import GatewayMetrics
from services.gateway.preparation import RequestPreparer
from services.gateway.prompt_encoding import LONG_CHARACTERS
from services.gateway.requests import ChatMessage, ChatRole, Conversation, TextRequest
from services.gateway.served_model import ServedModel
from tests.support.byte_tokenizer import END, TEMPLATE, byte_backend
from tests.support.fake_generation import FakeBackend
from tests.support.polling import eventually

ADDED = len("<|im_start|>")  # the longest token of all


def longest(backend: tokenizers.Tokenizer) -> int | None:
    fewest = Tokenizer(TokenizerParts(backend=backend)).fewest_tokens()
    return fewest and fewest.longest_token_bytes


def piece_backend(*, byte_fallback: bool) -> tokenizers.Tokenizer:
    pieces = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁▁▁▁": 256}
    backend = tokenizers.Tokenizer(models.BPE(vocab=pieces, merges=[], byte_fallback=byte_fallback))
    backend.decoder = decoders.ByteFallback()
    return backend


def test_the_longest_token_bounds_what_a_text_can_shrink_to() -> None:
    assert longest(byte_backend()) == ADDED
    backend = byte_backend()
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s"), behavior="isolated"), backend.pre_tokenizer]
    )
    assert longest(backend) == ADDED
    backend.normalizer = normalizers.NFC()
    assert longest(backend) == 4 * ADDED


def test_composed_characters_are_no_shorter_than_is_reckoned_with() -> None:
    """Counts each mark and letter at the size of its longest spelling."""
    spellings: dict[str, int] = {}
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for character in characters:
        parts = unicodedata.normalize("NFD", character)
        if len(parts) == 1:
            spellings[parts] = max(spellings.get(parts, 0), len(character.encode()))
    for character in characters:
        if unicodedata.is_normalized("NFC", character):
            parts = unicodedata.normalize("NFD", character)
            assert sum(spellings[part] for part in parts) <= 4 * len(character.encode())


def test_pieces_count_with_their_marks_of_spaces() -> None:
    assert longest(piece_backend(byte_fallback=True)) == len("▁▁▁▁".encode())
    assert longest(piece_backend(byte_fallback=False)) is None


def test_bytes_that_the_vocabulary_lacks_count_for_nothing() -> None:
    backend = byte_backend()
    backend.model = models.BPE(vocab={"a": 0, "ab": 1, "b": 2}, merges=[("a", "b")])
    fewest = Tokenizer(TokenizerParts(backend=backend)).fewest_tokens()
    assert fewest is not None
    assert fewest.of("ab" * 60 + "\x00é" * 1000) == 10
    backend.normalizer = normalizers.NFC()
    assert longest(backend) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda backend: setattr(backend, "normalizer", normalizers.NFKC()),
        lambda backend: setattr(backend, "normalizer", normalizers.Strip()),
        lambda backend: setattr(backend, "normalizer", normalizers.Replace("ab", "")),
        lambda backend: setattr(backend, "normalizer", normalizers.Replace(Regex(" +"), " ")),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Whitespace()),
        lambda backend: setattr(backend, "pre_tokenizer", None),
        lambda backend: setattr(
            backend,
            "pre_tokenizer",
            pre_tokenizers.Sequence(
                [pre_tokenizers.Split(Regex(r"\s"), behavior="removed"), backend.pre_tokenizer]
            ),
        ),
        lambda backend: backend.enable_truncation(8),
        lambda backend: backend.add_tokens([AddedToken("<mask>", lstrip=True)]),
        lambda backend: backend.add_tokens([AddedToken("<end>", rstrip=True)]),
        lambda backend: setattr(backend, "model", models.WordLevel(vocab={"a": 0}, unk_token="a")),
    ],
)
def test_what_may_drop_text_bounds_nothing(change) -> None:
    backend = byte_backend()
    change(backend)
    assert longest(backend) is None


class SlowTokenizer(Tokenizer):
    """Encoding blocks its thread until the test releases it."""

    def __init__(self) -> None:
        super().__init__(TokenizerParts(backend=byte_backend(), eos_token_ids=(END,), chat_template=TEMPLATE))
        self.begun = threading.Semaphore(0)
        self.go_on = threading.Event()
        self.encoded: list[int] = []

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        self.encoded.append(len(text))
        if len(text) > LONG_CHARACTERS:
            self.begun.release()
            assert self.go_on.wait(20)
        return super().encode(text, add_special_tokens=add_special_tokens)


class Setup:
    def __init__(self, *, timeout_seconds: float = 30.0, max_context_tokens: int = 10**6) -> None:
        self.tokenizer = SlowTokenizer()
        self.backend = FakeBackend(max_context_tokens=max_context_tokens)
        self.admission = Admission(max_running=2, max_waiting=2)
        self.generator = TextGenerator(
            preparer=RequestPreparer(ServedModel("m", self.backend), self.tokenizer),
            backend=self.backend,
            tokenizer=self.tokenizer,
            admission=self.admission,
            metrics=GatewayMetrics(CollectorRegistry()),
            timeout_seconds=timeout_seconds,
        )

    async def answer(self, prompt: str | Conversation) -> str:
        request = TextRequest(request_id="r", model="m", prompt=prompt)
        async with aclosing(self.generator.stream(request)) as deltas:
            return "".join([timed.delta.text async for timed in deltas])

    async def begin_long(self) -> asyncio.Task[str]:
        asked = asyncio.create_task(self.answer(LONG))
        assert await asyncio.to_thread(self.tokenizer.begun.acquire, timeout=20)
        return asked


@pytest.fixture
def make_setup() -> Iterator[Callable[..., Setup]]:
    made: list[Setup] = []

    def make(**options: Any) -> Setup:
        made.append(Setup(**options))
        return made[-1]

    yield make
    for setup in made:
        setup.tokenizer.go_on.set()  # otherwise a failed test would wait for its threads


LONG = "x" * (LONG_CHARACTERS + 1)


def said(text: str) -> Conversation:
    return Conversation(messages=(ChatMessage(role=ChatRole.USER, content=text),))


async def test_short_prompts_do_not_wait_for_long_ones(make_setup) -> None:
    setup = make_setup()
    long = [await setup.begin_long(), *(asyncio.create_task(setup.answer(LONG)) for _ in range(2))]
    await eventually(lambda: setup.admission.waiting == 3)
    async with asyncio.timeout(20):
        assert await setup.answer("hi") == "Hello, world!"
    assert setup.tokenizer.encoded == [len(LONG), 2]  # long ones are encoded one at a time
    setup.tokenizer.go_on.set()
    assert await asyncio.gather(*long) == ["Hello, world!"] * 3


@pytest.mark.parametrize("prompt", [LONG, said(LONG)])
async def test_an_abandoned_prompt_keeps_its_place_until_its_thread_is_done(prompt, make_setup) -> None:
    setup = make_setup()
    begun, waiting = await setup.begin_long(), asyncio.create_task(setup.answer(prompt))
    await eventually(lambda: setup.admission.waiting == 2)
    await asyncio.sleep(0)  # lets the second one's task enter the queue
    await end(waiting)
    assert setup.admission.waiting == 1  # work that had not begun is cancelled
    await end(begun)
    assert setup.admission.waiting == 1
    setup.tokenizer.go_on.set()
    await eventually(lambda: setup.admission.waiting == 0)
    assert setup.tokenizer.encoded == [len(LONG)]
    assert setup.backend.requests == []


async def test_encoding_counts_towards_the_deadline(make_setup) -> None:
    setup = make_setup(timeout_seconds=0.05)
    async with asyncio.timeout(20):
        with pytest.raises(DeadlineError, match=r"within 0\.05 s"):
            await setup.answer(LONG)
    assert setup.admission.waiting == 1
    setup.tokenizer.go_on.set()
    await eventually(lambda: setup.admission.waiting == 0)


async def test_a_gateway_that_ends_does_not_wait_for_prompts(make_setup) -> None:
    setup = make_setup()
    asked = await setup.begin_long()
    setup.admission.shut()
    async with asyncio.timeout(20):
        with pytest.raises(DrainingError):
            await asked


@pytest.mark.parametrize(("prompt", "field"), [("é" * 4000, "prompt"), (said("é" * 4000), "messages")])
async def test_a_text_that_cannot_fit_is_not_encoded(prompt, field, make_setup) -> None:
    setup = make_setup(max_context_tokens=100)
    with pytest.raises(ContextLengthError, match=rf"^{field} has at least 6\d\d tokens") as caught:
        await setup.answer(prompt)
    assert caught.value.field == field
    assert setup.tokenizer.encoded == []
    assert setup.admission.waiting == 0


async def test_a_text_that_might_fit_is_counted_in_tokens(make_setup) -> None:
    setup = make_setup(max_context_tokens=100)
    with pytest.raises(ContextLengthError, match="prompt has 1188 tokens"):
        await setup.answer("x" * 99 * ADDED)
    assert await setup.answer("<|im_start|>" * 99) == "H"
