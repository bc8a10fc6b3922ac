"""How many rows a batch runs with."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from layertap_server.engine.packing import MIN_ROW_STEP, Packing, fill_up
from layertap_server.enums import DType
from layertap_server.plan import OutputPlan, Work


@given(st.integers(1, 20_000))
def test_rows_hold_the_tokens_and_little_more(num_tokens: int) -> None:
    num_rows = fill_up(num_tokens)
    assert num_tokens <= num_rows < num_tokens + max(num_tokens / 16, MIN_ROW_STEP)


def test_there_are_few_sizes() -> None:
    assert len({fill_up(num_tokens) for num_tokens in range(1, 2049)}) <= 96


def test_padding_counts_every_text_as_the_longest() -> None:
    plan = OutputPlan(DType.FLOAT32, last_hidden_state=True)
    packing = Packing.of([Work(np.arange(length), None, plan, ()) for length in (3, 9, 2)])
    assert (packing.total_tokens, packing.num_padded_rows) == (14, 27)
