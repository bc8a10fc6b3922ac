"""`layertap.sklearn` with the real scikit-learn: its checks of estimators, pipelines, searches in several processes."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="scikit-learn is not installed: make test-ecosystem")

from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils import estimator_checks

from layertap import TLS, Client, InvalidArgument, Unauthenticated
from layertap.sklearn import LayertapVectorizer

from .conftest import KeepingEncoder

TEXTS = ["ab", "abcdef", "zzzz"]
# Texts of one character: the fake's vectors of these tell them apart.
MANY, LABELS = [*"aaaaaaaa", *"zzzzzzzz"], [0] * 8 + [1] * 8


@pytest.fixture
def vectorizer(address: str) -> LayertapVectorizer:
    return LayertapVectorizer(address)


def test_vectors_are_those_of_the_client(vectorizer: LayertapVectorizer, address: str) -> None:
    with Client(address) as client:
        expected = client.embed(TEXTS)
    assert vectorizer.fit(TEXTS) is vectorizer
    for texts in (TEXTS, tuple(TEXTS), np.array(TEXTS), np.array(TEXTS, object), iter(TEXTS)):
        vectors = vectorizer.transform(texts)
        assert vectors.dtype == np.float32
        np.testing.assert_array_equal(vectors, expected)
    np.testing.assert_array_equal(vectorizer.fit_transform(TEXTS), expected)
    assert vectorizer.transform([]).shape[0] == 0
    np.testing.assert_array_equal(LayertapVectorizer(address).transform(TEXTS), expected)  # not fitted


def test_feature_names(vectorizer: LayertapVectorizer) -> None:
    vectorizer.fit(TEXTS)
    assert list(vectorizer.get_feature_names_out()) == [f"layertapvectorizer{index}" for index in range(4)]
    vectorizer.set_params(dimensions=2).fit(TEXTS)
    assert len(vectorizer.get_feature_names_out()) == vectorizer.transform(TEXTS).shape[1] == 2


def test_parameters_reach_the_server(fake: KeepingEncoder, address: str) -> None:
    vectorizer = LayertapVectorizer(address, "fake", normalize=False, truncation="end", prompt_name="query")
    vectorizer.transform(TEXTS)
    (request,) = fake.requests
    assert (request.model, request.prompt_name, request.prompt) == ("fake", "query", "")
    assert request.truncation
    assert not request.outputs.embeddings[0].normalize
    vectorizer.set_params(prompt_name="", prompt="find: ").transform(TEXTS)
    assert fake.requests[-1].prompt == "find: "


def test_clones_and_pickles(vectorizer: LayertapVectorizer, address: str) -> None:
    vectorizer.set_params(dimensions=2, tls=TLS(ca="somewhere.pem"))
    copied = clone(vectorizer)
    assert copied.get_params() == vectorizer.get_params()
    vectorizer.set_params(tls=None)
    vectorizer.fit(TEXTS)
    again = pickle.loads(pickle.dumps(vectorizer))
    np.testing.assert_array_equal(again.transform(TEXTS), vectorizer.transform(TEXTS))
    assert list(again.get_feature_names_out()) == list(vectorizer.get_feature_names_out())
    assert address in repr(vectorizer)


def test_pipelines(vectorizer: LayertapVectorizer) -> None:
    model = make_pipeline(vectorizer, LogisticRegression()).fit(MANY, LABELS)
    assert list(model.predict(["a", "z"])) == [0, 1]
    table = np.array([["ab", "c"], ["d", "ef"]], object)
    both = make_column_transformer((clone(vectorizer), 0), (clone(vectorizer), 1)).fit(table)
    assert both.transform(table).shape == (2, 8)
    assert len(both.get_feature_names_out()) == 8


@pytest.mark.long
@pytest.mark.timeout(280)
def test_a_search_in_two_processes(vectorizer: LayertapVectorizer) -> None:
    vectorizer.fit_transform(MANY)  # its connection does not go along
    search = GridSearchCV(
        make_pipeline(vectorizer, LogisticRegression()),
        {"layertapvectorizer__dimensions": [2, 4]},
        cv=2,
        n_jobs=2,
        error_score="raise",
    ).fit(MANY, LABELS)
    assert search.best_score_ == 1
    assert list(search.predict(["a", "z"])) == [0, 1]
    assert min(cross_val_score(search.best_estimator_, MANY, LABELS, cv=2)) == 1


# `check_estimator` runs only the first of these for a transformer of texts: the others it keeps for tables of numbers.
@pytest.mark.parametrize(
    "name",
    [
        "estimator_cloneable",
        "do_not_raise_errors_in_init_or_set_params",
        "estimator_repr",
        "estimator_tags_renamed",
        "get_params_invariance",
        "mixin_order",
        "no_attributes_set_in_init",
        "parameters_default_constructible",
        "set_params",
        "valid_tag_types",
    ],
)
def test_scikit_learns_checks(name: str, vectorizer: LayertapVectorizer) -> None:
    check = getattr(estimator_checks, f"check_{name}")
    check(type(vectorizer).__name__, vectorizer)


def test_check_estimator(vectorizer: LayertapVectorizer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of what it leaves out
        estimator_checks.check_estimator(vectorizer)


def test_errors_are_those_of_the_sdk(vectorizer: LayertapVectorizer) -> None:
    with pytest.raises(InvalidArgument) as caught:
        vectorizer.fit_transform(["a", "poison"])
    assert caught.value.input_index == 1
    for texts in ("a text", np.array([["a"], ["b"]], object)):
        with pytest.raises(TypeError, match="inputs"):
            vectorizer.fit(texts)
        with pytest.raises(TypeError, match="inputs"):
            vectorizer.transform(texts)
    with pytest.raises(TypeError, match=r"inputs\[1\]"):
        vectorizer.transform(["a", None])  # type: ignore[list-item]
    wrong: Any = {"dimensions": 0, "timeout": -1, "truncation": "middle", "normalize": "yes", "model": 3}
    for name, value in wrong.items():
        with pytest.raises((TypeError, ValueError), match=name):
            clone(vectorizer).set_params(**{name: value}).fit(TEXTS)


def test_the_token_is_only_in_the_environment(
    vectorizer: LayertapVectorizer, fake: KeepingEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.token = "secret-of-mine"
    with pytest.raises(Unauthenticated):
        vectorizer.transform(TEXTS)
    monkeypatch.setenv("LAYERTAP_TOKEN", "secret-of-mine")
    vectorizer.fit_transform(TEXTS)
    for form in (repr(vectorizer), repr(vars(vectorizer)), repr(pickle.dumps(vectorizer))):
        assert "secret" not in form
    monkeypatch.delenv("LAYERTAP_TOKEN")
    monkeypatch.setenv("OTHER_TOKEN", "secret-of-mine")
    vectorizer.set_params(token_variable="OTHER_TOKEN").transform(TEXTS)
