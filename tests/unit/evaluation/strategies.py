"""Random rounds as a round loop could have recorded them."""

from __future__ import annotations

from hypothesis import strategies as st

from dspark_core.evaluation.round_table import DraftRound


@st.composite
def draft_rounds(draw: st.DrawFn, *, confident: bool = True, block_size: int = 5) -> DraftRound:
    drafted = draw(st.integers(0, block_size))
    verified = draw(st.integers(0, drafted))
    accepted = draw(st.integers(0, verified))
    stopped = accepted > 0 and draw(st.booleans())
    # Few distinct values, so that ties are common.
    conditional = draw(
        st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]), min_size=drafted, max_size=drafted)
    )
    survival, product = [], 1.0
    for confidence in conditional:
        product *= confidence
        survival.append(product)
    return DraftRound(
        drafted=drafted,
        verified=verified,
        accepted=accepted,
        committed=accepted if stopped else accepted + 1,
        stopped=stopped,
        survival=tuple(survival) if confident else (),
    )
