"""EncodeStream: frames of any size and order, splitting, falling back, failing and giving up."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

import layertap
from layertap import Attentions, Client, Embedding, Result, _streams
from layertap._pipeline import MAX_GROUP_INPUTS, MAX_INPUTS_IN_FLIGHT
from layertap._unary import MAX_UNARY_INPUTS

from . import fake_server
from .fake_server import FakeEncoder, token_ids


def texts(count: int) -> list[str]:
    return ["x" * (number % 7) + str(number) for number in range(count)]


def assert_right(text: str, result: Result) -> None:
    np.testing.assert_array_equal(result.last_hidden_state, fake_server.hidden_states(token_ids(text))[-1])


@pytest.mark.parametrize("frame_bytes", [1, 7, 64, 1 << 20])
def test_frames_of_any_size(client: Client, fake: FakeEncoder, frame_bytes: int) -> None:
    fake.frame_bytes = frame_bytes
    options = {
        "last_hidden_state": True,
        "pooler_output": True,
        "hidden_states": [0, -1],
        "attentions": Attentions(heads=[1], query_positions=[0]),
        "embeddings": [Embedding(), Embedding(encoding="int8"), Embedding(encoding="bfloat16")],
        "tokens": True,
    }
    inputs = texts(20)
    expected = client.encode(inputs, **options)
    got = dict(client.stream(inputs, ordered=False, **options))
    assert sorted(got) == list(range(20))
    for index, one in enumerate(expected):
        other = got[index]
        assert (one.token_count, one.tokens.tokens) == (other.token_count, other.tokens.tokens)
        assert list(one.arrays()) == list(other.arrays())
        for name, array in one.arrays().items():
            np.testing.assert_array_equal(array, other.arrays()[name], err_msg=name)
            assert array.dtype == other.arrays()[name].dtype
    assert got[0].timing.total_ns == 7


def test_results_are_handed_out_while_the_iterable_is_slow(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More inputs may be in flight, but the caller does not wait until they are."""
    monkeypatch.setattr(_streams, "SLOW_S", 0.0)
    got: list[int] = []
    num_given = 0

    def slow() -> Iterator[str]:
        nonlocal num_given
        pause, until = threading.Event(), time.monotonic() + 60
        while not got and time.monotonic() < until:
            num_given += 1
            yield f"text {num_given}" if num_given < MAX_INPUTS_IN_FLIGHT - 1 else "past the limit"
            pause.wait(0.05)

    for index, _ in client.stream(slow(), last_hidden_state=True):
        got.append(index)
    assert got == list(range(num_given))
    assert num_given < MAX_INPUTS_IN_FLIGHT


@pytest.mark.parametrize("count", [1, 3, MAX_GROUP_INPUTS, 200])
def test_slow_iterables_of_any_length(client: Client, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(_streams, "SLOW_S", -1.0)
    inputs = texts(count)
    got = dict(client.stream(iter(inputs), last_hidden_state=True))
    assert list(got) == list(range(count))
    for text, result in zip(inputs, got.values(), strict=True):
        assert_right(text, result)


def test_a_slow_iterable_and_the_time_limit(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_streams, "SLOW_S", 0.0)

    def slow() -> Iterator[str]:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            yield "hang"
            threading.Event().wait(0.1)

    with pytest.raises(layertap.DeadlineExceeded):
        list(client.stream(slow(), last_hidden_state=True, timeout=0.3))


def test_order(client: Client) -> None:
    inputs = ["slow", *texts(20)]
    assert [index for index, _ in client.stream(inputs, tokens=True)] == list(range(21))
    completed = [index for index, _ in client.stream(inputs, tokens=True, ordered=False)]
    assert sorted(completed) == list(range(21))
    assert completed[-1] == 0


def test_small_results_share_requests_and_values_stay_right(client: Client, fake: FakeEncoder) -> None:
    inputs = texts(600)
    for index, result in client.stream(inputs, last_hidden_state=True):
        assert_right(inputs[index], result)
    sizes = [count for rpc, count in fake.calls if rpc == "stream"]
    assert sum(sizes) == 600
    assert max(sizes) == MAX_GROUP_INPUTS
    fake.calls.clear()
    fake.max_inputs = 5
    with_limit = client.stream(inputs, tokens=True, model="plain")
    assert [index for index, _ in with_limit] == list(range(600))
    assert max(count for rpc, count in fake.calls if rpc == "stream") == 5


def test_no_inputs(client: Client) -> None:
    assert list(client.stream([], tokens=True)) == []


def test_a_slow_reader_holds_little(client: Client) -> None:
    num_read = 0

    def source() -> Iterator[str]:
        nonlocal num_read
        while True:
            num_read += 1
            yield str(num_read)

    results = client.stream(source(), tokens=True)
    for index, _ in itertools.islice(results, 300):
        assert num_read - index <= MAX_INPUTS_IN_FLIGHT + MAX_GROUP_INPUTS
    results.close()


def test_encode_streams_what_does_not_fit_one_message(client: Client, fake: FakeEncoder) -> None:
    fake.max_message_bytes = 400
    inputs = texts(10)
    for text, result in zip(inputs, client.encode(inputs, last_hidden_state=True), strict=True):
        assert_right(text, result)
    assert_right("a" * 500, client.encode("a" * 500, last_hidden_state=True))
    rpcs = [rpc for rpc, _ in fake.calls if rpc != "stream"]
    assert rpcs == ["Encode", "GetModel", "EncodeStream", "Encode", "EncodeStream"]


def test_encode_splits_what_is_too_much_for_one_request(client: Client, fake: FakeEncoder) -> None:
    fake.max_inputs = 10
    inputs = texts(MAX_UNARY_INPUTS + 1)
    for text, result in zip(inputs, client.encode(inputs, last_hidden_state=True), strict=True):
        assert_right(text, result)
    assert "Encode" not in dict(fake.calls)
    # A limit smaller than any that the client expects: it learns it from the error.
    for text, result in zip(inputs, client.encode(inputs[:12], last_hidden_state=True), strict=False):
        assert_right(text, result)
    assert [rpc for rpc, _ in fake.calls].count("GetModel") == 1
    assert max(count for rpc, count in fake.calls if rpc == "stream") <= 10


def test_long_texts_go_in_requests_of_their_own(
    client: Client, fake: FakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layertap._pipeline.GROUP_BYTES", 1000)
    monkeypatch.setattr("layertap._pipeline._FIRST_GUESS_BYTES", 1)
    inputs = ["a", "b", *["c" * 400] * 6, "d"]
    assert [result.token_count for _, result in client.stream(inputs, pooler_output=True)] == [
        3,
        3,
        *[402] * 6,
        3,
    ]
    assert [count for rpc, count in fake.calls if rpc == "stream"] == [4, 2, 3]


def test_a_failed_request_raises_with_its_inputs_own_index(client: Client) -> None:
    inputs = [*texts(400), "poison"]
    with pytest.raises(layertap.InvalidArgument) as caught:
        list(client.stream(inputs, tokens=True))
    assert caught.value.violations == (("inputs[400].text", "is poison"),)
    with pytest.raises(layertap.InvalidArgument, match=r"inputs\[400\].text: is poison"):
        client.encode(inputs, tokens=True)


def test_a_busy_server_is_asked_again(client: Client, fake: FakeEncoder) -> None:
    fake.num_busy = 7
    inputs = texts(300)
    got = list(client.stream(inputs, last_hidden_state=True))
    assert [index for index, _ in got] == list(range(300))
    for text, (_, result) in zip(inputs, got, strict=True):
        assert_right(text, result)
    assert fake.num_busy == 0


def test_dropping_while_the_server_is_busy(client: Client, fake: FakeEncoder) -> None:
    results = client.stream(["a", "busy"], tokens=True)
    assert next(results)[0] == 0
    results.close()
    assert fake.stream_over.wait(10)


def test_dropping_the_iterator_cancels(client: Client, fake: FakeEncoder) -> None:
    results = client.stream(itertools.chain(["a", "hang"], map(str, itertools.count())), tokens=True)
    assert next(results)[0] == 0
    del results
    assert fake.stream_over.wait(10)


def test_an_error_in_the_callers_iterable_comes_after_what_is_finished(
    client: Client, fake: FakeEncoder
) -> None:
    def failing() -> Iterator[str]:
        yield from texts(100)
        raise ZeroDivisionError

    got: dict[int, Result] = {}
    with pytest.raises(ZeroDivisionError):
        got.update(client.stream(failing(), tokens=True))
    assert list(got) == list(range(100))
    assert fake.stream_over.wait(10)


def test_timeout_of_a_stream(client: Client) -> None:
    with pytest.raises(layertap.DeadlineExceeded):
        list(client.stream(["hang"], tokens=True, timeout=0.2))
