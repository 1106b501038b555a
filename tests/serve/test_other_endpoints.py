"""An endpoint as a comparison measures it, over the real client."""

from __future__ import annotations

import numpy as np
import pytest

from f2llm_ray.base.errors import RunError
from f2llm_ray.engine.other_models import TEXTS_PER_REQUEST, RemoteModel
from tests.serve.endpoint import KEYED, TEXTS, Server


def test_vectors_and_tokens_are_those_of_the_engine_behind_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", server.key)
    endpoint = RemoteModel(f"{server.url}{KEYED}/v1#wide")
    assert endpoint.info.dims == (64,)
    texts = [f"{text} {n}" for n in range(TEXTS_PER_REQUEST // 4) for text in TEXTS]
    assert len(texts) > 2 * TEXTS_PER_REQUEST
    found, tokens = endpoint.embed_counted(texts)
    from f2llm_ray.engine.engine import Engine

    expected, counted = Engine(server.folder.parent / "wide").embed_counted(texts)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert tokens == counted


def test_what_it_says_is_told_and_the_key_is_not(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    with pytest.raises(RunError, match="wide does not embed") as error:
        RemoteModel(f"{server.url}{KEYED}/v1#wide")
    assert "sk-wrong" not in str(error.value)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(RunError, match="nothing does not embed"):
        RemoteModel(f"{server.url}/v1#nothing")
    with pytest.raises(RunError, match="expected URL#NAME"):
        RemoteModel(f"{server.url}/v1")
