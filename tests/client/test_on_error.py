"""One bad input fails alone: what is raised and when, what is returned, and what is kept."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

import layertap
from layertap import AsyncClient, Client, LayertapError
from layertap._unary import MAX_UNARY_INPUTS

from . import fake_server
from .fake_server import FakeEncoder, serving, token_ids


@pytest.fixture(params=["server of today", "server without fail_each_alone"])
def fake(request: pytest.FixtureRequest) -> FakeEncoder:
    fake = FakeEncoder()
    fake.knows_fail_each_alone = request.param == "server of today"
    return fake


def texts(count: int, **others: str) -> list[Any]:
    """Numbers, with other texts at some places: `texts(3, at_1="poison")`."""
    found = list(map(str, range(count)))
    for place, text in others.items():
        found[int(place.removeprefix("at_"))] = text
    return found


def assert_right(inputs: list[str], outcomes: dict[int, Any], *failed: int) -> None:
    """Every input has its result, but those that failed an error that names them."""
    for index, outcome in outcomes.items():
        if index in failed:
            assert isinstance(outcome, LayertapError), index
            assert outcome.input_index == index
            assert f"inputs[{index}]" in str(outcome)
        else:
            expected = fake_server.hidden_states(token_ids(inputs[index]))[-1]
            np.testing.assert_array_equal(outcome.last_hidden_state, expected)


@pytest.mark.parametrize("count", [20, 200, MAX_UNARY_INPUTS + 50])
def test_encode_returns_errors_in_their_places(client: Client, count: int) -> None:
    failing = {3: "poison", 7: "bug", count - 2: "poison"}
    inputs = texts(count, **{f"at_{index}": text for index, text in failing.items()})
    outcomes = client.encode(inputs, last_hidden_state=True, on_error="return")
    assert len(outcomes) == count
    assert_right(inputs, dict(enumerate(outcomes)), *failing)
    assert isinstance(outcomes[3], layertap.InvalidArgument)
    assert outcomes[3].violations == (("inputs[3].text", "is poison"),)
    assert outcomes[3].reason == "INVALID_FIELD"
    assert isinstance(outcomes[7], layertap.InternalError)
    assert str(outcomes[7]) == "inputs[7]: internal error 1f"


def test_encode_returns_the_error_of_one_input(client: Client) -> None:
    error = client.encode("poison", tokens=True, on_error="return")
    assert isinstance(error, layertap.InvalidArgument)
    assert client.encode("a", tokens=True, on_error="return").token_count == 3


@pytest.mark.parametrize("ordered", [True, False])
def test_stream_returns_errors_in_their_places(client: Client, ordered: bool) -> None:
    inputs = texts(300, at_0="poison", at_130="bug", at_131="poison", at_299="poison")
    pairs = list(client.stream(inputs, last_hidden_state=True, on_error="return", ordered=ordered))
    assert sorted(index for index, _ in pairs) == list(range(300))
    if ordered:
        assert [index for index, _ in pairs] == list(range(300))
    assert_right(inputs, dict(pairs), 0, 130, 131, 299)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("at", [0, 1, 100, 299])
def test_stream_gives_all_results_before_the_error(client: Client, at: int, ordered: bool) -> None:
    inputs = texts(300, **{f"at_{at}": "poison"})
    got: dict[int, Any] = {}
    with pytest.raises(layertap.InvalidArgument) as caught:
        got.update(client.stream(inputs, last_hidden_state=True, ordered=ordered))
    assert caught.value.input_index == at
    assert caught.value.violations == ((f"inputs[{at}].text", "is poison"),)
    assert_right(inputs, got)
    assert set(range(at)) <= set(got)
    if ordered:
        assert list(got) == list(range(at))


def test_the_first_of_several_failures_is_raised(client: Client) -> None:
    inputs = texts(120, at_50="slow", at_60="poison", at_70="bug")
    for ordered in (True, False):
        got: dict[int, Any] = {}
        with pytest.raises(layertap.InvalidArgument) as caught:
            got.update(client.stream(iter(inputs), tokens=True, ordered=ordered))
        assert caught.value.input_index == 60
        assert set(range(60)) <= set(got)


def test_what_encode_had_is_kept_in_the_error(client: Client, fake: FakeEncoder) -> None:
    inputs = texts(MAX_UNARY_INPUTS + 50, at_150="poison")
    with pytest.raises(layertap.InvalidArgument) as caught:
        client.encode(inputs, last_hidden_state=True)
    assert set(range(150)) <= set(caught.value.results)
    assert_right(inputs, caught.value.results)
    with pytest.raises(layertap.InvalidArgument) as caught:
        client.encode(texts(5, at_1="poison"), last_hidden_state=True)
    assert caught.value.results == {}
    fake.lose_connection_at = "last"
    with pytest.raises(layertap.Unavailable) as lost:
        client.encode(texts(MAX_UNARY_INPUTS + 1, at_256="last"), last_hidden_state=True)
    assert len(lost.value.results) > 100


def test_what_is_not_of_one_input_is_raised(client: Client, fake: FakeEncoder) -> None:
    for options in ({"model": "nobody"}, {"model": "plain", "pooler_output": True}):
        with pytest.raises((layertap.NotFound, layertap.FailedPrecondition)) as caught:
            client.encode(texts(3), tokens=True, on_error="return", **options)
        assert caught.value.input_index is None
        with pytest.raises((layertap.NotFound, layertap.FailedPrecondition)):
            list(client.stream(texts(3), tokens=True, on_error="return", **options))
    fake.lose_connection_at = "5"
    with pytest.raises(layertap.Unavailable):
        list(client.stream(texts(10), tokens=True, on_error="return"))
    with pytest.raises(layertap.DeadlineExceeded):
        list(client.stream(["hang"], tokens=True, on_error="return", timeout=0.2))


WRONG = [None, float("nan"), b"bytes", 3, "a\ud800b", layertap.TokenIds([-1]), layertap.Words("a b")]


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_what_the_sdk_refuses_fails_alone_as_well(client: Client, wrong: Any) -> None:
    inputs = [*texts(40), wrong, *texts(5)]
    for outcomes in (
        dict(enumerate(client.encode(inputs, last_hidden_state=True, on_error="return"))),
        dict(client.stream(inputs, last_hidden_state=True, on_error="return")),
        dict(client.stream(iter(inputs), last_hidden_state=True, on_error="return", ordered=False)),
    ):
        assert sorted(outcomes) == list(range(46))
        assert_right(inputs, outcomes, 40)
        assert isinstance(outcomes[40], layertap.InvalidArgument)
    got: dict[int, Any] = {}
    with pytest.raises((TypeError, ValueError), match=r"inputs\[40\]"):
        got.update(client.stream(inputs, tokens=True))
    assert list(got) == list(range(40))
    (only,) = client.encode([wrong], tokens=True, on_error="return")
    assert isinstance(only, layertap.InvalidArgument)


def test_nothing_more_is_asked_after_a_failure(client: Client) -> None:
    num_read = 0

    def source() -> Iterator[str]:
        nonlocal num_read
        while True:
            num_read += 1
            yield "poison" if num_read == 20 else "a"

    with pytest.raises(layertap.InvalidArgument):
        for _ in client.stream(source(), tokens=True):
            pass
    assert num_read < 400


def test_results_too_large_together_come_one_by_one(client: Client, fake: FakeEncoder) -> None:
    fake.max_result_bytes = 800
    inputs = texts(100)
    expected = ["x" * 60 if index == 90 else text for index, text in enumerate(inputs)]
    outcomes = dict(client.stream(expected, last_hidden_state=True, on_error="return"))
    assert_right(expected, outcomes, 90)
    assert isinstance(outcomes[90], layertap.OutOfRange)


async def take(got: dict[int, Any], results: AsyncIterator[tuple[int, Any]]) -> None:
    async for index, result in results:
        got[index] = result  # noqa: PERF403  (keeps what comes before an error)


async def test_the_same_of_the_other_client(async_client: AsyncClient, client: Client) -> None:
    inputs = texts(100, at_30="poison", at_77="bug")
    outcomes = await async_client.encode(inputs, last_hidden_state=True, on_error="return")
    assert_right(inputs, dict(enumerate(outcomes)), 30, 77)

    async def source() -> AsyncIterator[Any]:
        for text in [*inputs, None]:
            yield text

    pairs = [pair async for pair in async_client.stream(source(), last_hidden_state=True, on_error="return")]
    assert [index for index, _ in pairs] == list(range(101))
    assert_right([*inputs, ""], dict(pairs), 30, 77, 100)
    got: dict[int, Any] = {}
    with pytest.raises(layertap.InvalidArgument, match=r"inputs\[30\]"):
        await take(got, async_client.stream(source(), tokens=True))
    assert list(got) == list(range(30))
    error = await async_client.encode("poison", tokens=True, on_error="return")
    assert isinstance(error, layertap.InvalidArgument)
    many = texts(MAX_UNARY_INPUTS + 50, at_150="poison")
    with pytest.raises(layertap.InvalidArgument) as caught:
        await async_client.encode(many, last_hidden_state=True)
    assert set(range(150)) <= set(caught.value.results)

    async def failing() -> AsyncIterator[str]:
        for text in texts(100):
            yield text
        raise ZeroDivisionError

    got.clear()
    with pytest.raises(ZeroDivisionError):
        await take(got, async_client.stream(failing(), tokens=True))
    assert list(got) == list(range(100))


def test_frames_that_are_whole(fake: FakeEncoder) -> None:
    fake.sends_whole = True
    with serving(fake) as address, Client(address) as client:
        inputs = texts(100, at_30="poison", at_77="bug")
        outcomes = dict(client.stream(inputs, last_hidden_state=True, on_error="return"))
        assert_right(inputs, outcomes, 30, 77)
        with pytest.raises(layertap.InvalidArgument, match=r"inputs\[30\]"):
            list(client.stream(inputs, last_hidden_state=True))


@pytest.mark.parametrize("on_error", ["ignore", None, True])
def test_unknown_choices(client: Client, on_error: Any) -> None:
    with pytest.raises(ValueError, match="give 'raise' or 'return'"):
        client.encode("a", tokens=True, on_error=on_error)
    with pytest.raises(ValueError, match="on_error="):
        client.stream(["a"], tokens=True, on_error=on_error)


def test_an_error_names_its_input() -> None:
    error = layertap.InternalError("internal error 1f", input_index=4)
    assert str(error) == "inputs[4]: internal error 1f"
    assert error.code is grpc.StatusCode.INTERNAL
