"""The clients that frameworks bring, untouched (slow: they are large and not in the dev extra)."""

from __future__ import annotations

import numpy as np
import pytest

from tests.serve.endpoint import TEXTS, Server

pytestmark = pytest.mark.slow
SHORT = TEXTS[:4]


def test_langchain(server: Server) -> None:
    langchain = pytest.importorskip("langchain_openai")
    # Without check_embedding_ctx_length=False it sends OpenAI's own token ids, which no other model can read.
    client = langchain.OpenAIEmbeddings(
        model="tiny", base_url=f"{server.url}/v1", api_key="none", check_embedding_ctx_length=False
    )
    np.testing.assert_allclose(client.embed_documents(SHORT), server.engine.embed(SHORT), atol=1e-5)
    np.testing.assert_allclose(client.embed_query(SHORT[0]), server.engine.embed(SHORT)[0], atol=1e-5)


def test_llama_index(server: Server) -> None:
    llama = pytest.importorskip("llama_index.embeddings.openai")
    client = llama.OpenAIEmbedding(
        model_name="tiny", api_base=f"{server.url}/v1", api_key="none", dimensions=16, embed_batch_size=2
    )
    ours = client.get_text_embedding_batch(SHORT)
    np.testing.assert_allclose(ours, server.engine.embed(SHORT, dim=16), atol=1e-5)
    np.testing.assert_allclose(client.get_query_embedding(SHORT[0]), ours[0], atol=1e-5)
