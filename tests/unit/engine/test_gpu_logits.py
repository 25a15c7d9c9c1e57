"""Logits in float32: directly from the matrix product where supported, else converted from the decoder's."""

from __future__ import annotations

import pytest
import torch

from dspark_core.engine.gpu import logits as gpu_logits
from dspark_core.engine.gpu.logits import FloatLogits, multiplies_into_float32
from dspark_core.models.config import DecoderConfig
from tests.support.gpu_parts import generator
from tests.unit.engine.tiny import CONFIG, VOCAB, tiny_decoder

HIDDEN = torch.randn(5, CONFIG.hidden_size, generator=generator(4))


@pytest.fixture(params=[None, 3.0], ids=["no cap", "cap"])
def cap(request, monkeypatch):
    """Gemma's soft cap, which changes every logit."""
    monkeypatch.setattr(DecoderConfig, "final_logit_softcap", property(lambda _: request.param))


@pytest.fixture
def asked(monkeypatch):
    """Replaces `torch.mm` by one that behaves as on CUDA; returns the list of requested dtypes."""
    given: list[torch.dtype | None] = []
    mm = torch.mm

    def on_cuda(a, b, *, out_dtype=None, out=None):
        given.append(out_dtype)
        if out_dtype is None:
            return mm(a, b, out=out)
        return mm(a.to(out_dtype), b.to(out_dtype), out=out)

    monkeypatch.setattr(torch, "mm", on_cuda)
    return given


@pytest.mark.parametrize("error", [TypeError, NotImplementedError])  # unknown argument; unsupported product
def test_a_pytorch_without_such_products_is_found_out(monkeypatch, asked, error):
    device = torch.device("cpu")
    assert multiplies_into_float32(torch.bfloat16, device)

    def refusing(a, b, **_):
        raise error("not here")

    monkeypatch.setattr(torch, "mm", refusing)
    assert not multiplies_into_float32(torch.bfloat16, device)


@pytest.mark.usefixtures("cap")
@pytest.mark.parametrize("given", [False, True])
def test_without_such_a_product_they_are_the_decoders_expanded(monkeypatch, given):
    monkeypatch.setattr(gpu_logits, "multiplies_into_float32", lambda dtype, device: False)
    ours = tiny_decoder().bfloat16()
    hidden, out = HIDDEN.bfloat16(), torch.empty(5, VOCAB) if given else None
    logits = FloatLogits(ours)(hidden, out)
    assert torch.equal(logits, ours.logits(hidden).float())
    assert logits.dtype is torch.float32
    assert out is None or logits.data_ptr() == out.data_ptr()


@pytest.mark.usefixtures("cap")
@pytest.mark.parametrize("given", [False, True])
def test_with_it_they_are_not_rounded_to_bfloat16(asked, given):
    ours = tiny_decoder().bfloat16()
    hidden, out = HIDDEN.bfloat16(), torch.empty(5, VOCAB) if given else None
    head = FloatLogits(ours)
    logits = head(hidden, out)
    assert set(asked) == {torch.float32}
    exact = tiny_decoder()
    exact.load_state_dict({name: value.float() for name, value in ours.state_dict().items()})
    torch.testing.assert_close(logits, exact.logits(hidden.float()))
    assert not torch.equal(logits, logits.bfloat16().float())
    assert out is None or logits.data_ptr() == out.data_ptr()


@pytest.mark.usefixtures("cap")
def test_in_float32_they_are_written_where_they_belong(asked):
    ours, out = tiny_decoder(), torch.empty(5, VOCAB)
    logits = FloatLogits(ours)(HIDDEN, out)
    assert asked == [None]
    assert logits.data_ptr() == out.data_ptr()
    torch.testing.assert_close(logits, ours.logits(HIDDEN))
