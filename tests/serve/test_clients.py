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


def test_litellm(server: Server) -> None:
    litellm = pytest.importorskip("litellm")
    answer = litellm.embedding(model="openai/tiny", input=SHORT, api_base=f"{server.url}/v1", api_key="none")
    ours = [entry["embedding"] for entry in answer.data]
    np.testing.assert_allclose(ours, server.engine.embed(SHORT), atol=1e-5)


def test_chroma(server: Server) -> None:
    functions = pytest.importorskip("chromadb.utils.embedding_functions")
    ours = functions.OpenAIEmbeddingFunction(model_name="tiny", api_base=f"{server.url}/v1", api_key="none")
    np.testing.assert_allclose(ours(SHORT), server.engine.embed(SHORT), atol=1e-5)
    tei = functions.HuggingFaceEmbeddingServer(url=f"{server.url}/embed")
    np.testing.assert_allclose(tei(SHORT), server.engine.embed(SHORT), atol=1e-5)


def test_haystack(server: Server) -> None:
    embedders = pytest.importorskip("haystack.components.embedders")
    secret = pytest.importorskip("haystack.utils").Secret.from_token("none")
    client = embedders.OpenAITextEmbedder(model="tiny", api_base_url=f"{server.url}/v1", api_key=secret)
    np.testing.assert_allclose(client.run(text=SHORT[0])["embedding"], server.engine.embed(SHORT)[0], atol=1e-5)


def test_cohere(server: Server) -> None:
    cohere = pytest.importorskip("cohere")
    client = cohere.ClientV2(api_key="none", base_url=server.url)
    found = client.embed(model="tiny", texts=SHORT, input_type="search_document", embedding_types=["float"])
    np.testing.assert_allclose(found.embeddings.float_, server.engine.embed(SHORT), atol=1e-5)
    ranked = client.rerank(model="tiny", query=SHORT[0], documents=SHORT, top_n=2)
    assert len(ranked.results) == 2
    assert ranked.results[0].relevance_score >= ranked.results[1].relevance_score


def test_hugging_faces_client(server: Server) -> None:
    hub = pytest.importorskip("huggingface_hub")
    client = hub.InferenceClient(base_url=f"{server.url}/embed")
    np.testing.assert_allclose(client.feature_extraction(SHORT), server.engine.embed(SHORT), atol=1e-5)
