"""A pruned vocabulary reads the corpus as before, with new numbers, and can still spell everything else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from f2llm_ray.base.errors import RecipeError, RunError
from f2llm_ray.data.tokens.store import tokenize
from f2llm_ray.data.tokens.tokenizer import load_tokenizer
from f2llm_ray.engine.encode import encode
from f2llm_ray.model.checkpoint import load_backbone, load_info, save_model
from f2llm_ray.model.prune import Kept, prune
from f2llm_ray.model.vocabulary import (
    TokenMap,
    Vocabulary,
    composed,
    count_tokens,
    load_map,
    remap,
    save_map,
)
from f2llm_ray.run.folder import Folder
from tests.encoders import KINDS, tokenizer_of
from tests.tiny import LINES, tiny_model

CORPUS = [*LINES[:3], "sat on the mat", "the rain, the red rain", "der Hund", "manzana"]
OTHERS = [*LINES[3:], "unseen: žluťoučký kůň", ""]


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("parent"))


def counts_of(folder: Path, texts: list[str]) -> np.ndarray:
    tokenizer = load_tokenizer(folder)
    return np.bincount(np.concatenate(tokenize(tokenizer, texts)), minlength=tokenizer.get_vocab_size())


def test_texts_of_the_corpus_get_the_same_tokens_and_vectors(parent: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from transformers import AutoTokenizer

    tokenizer, backbone = load_tokenizer(parent), load_backbone(parent).eval()
    vocabulary = Vocabulary(tokenizer)
    kept = vocabulary.choose(counts_of(parent, CORPUS), None)
    small, table = vocabulary.cut(kept)
    assert 257 < len(kept) < tokenizer.get_vocab_size() - 20
    before = tokenize(tokenizer, CORPUS)
    after = tokenize(small, CORPUS)
    for old, new, mapped in zip(before, after, remap(before, table), strict=True):
        assert new.tolist() == mapped.tolist()
        assert [tokenizer.id_to_token(i) for i in old] == [small.id_to_token(i) for i in new]
    depth = range(backbone.config.num_hidden_layers)
    ffn = tuple(range(backbone.config.intermediate_size))
    whole = Kept(tuple(depth), tuple(range(32)), (ffn,) * 2, ((0, 1),) * 2, tuple(kept.tolist()))
    model = prune(backbone, whole)
    assert model.embed_tokens.weight.shape == (len(kept), 32)
    with torch.no_grad():
        expected = encode(backbone, before, pooling="last", tokens_per_pass=1000)
        assert torch.equal(encode(model, after, pooling="last", tokens_per_pass=1000), expected)
    save_model(tmp_path, model, small, load_info(parent))
    end = small.get_vocab_size() - 1 if kept[-1] == tokenizer.token_to_id("<|endoftext|>") else None
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(CORPUS[0])["input_ids"] == after[0].tolist()
    assert loaded.eos_token_id == after[0][-1] == small.token_to_id("<|endoftext|>")
    assert end is None or end == loaded.eos_token_id
    found = SentenceTransformer(str(tmp_path), device="cpu").encode(CORPUS)
    unit = torch.nn.functional.normalize(expected, dim=-1).numpy()
    np.testing.assert_allclose(found, unit, atol=1e-5)


def test_other_texts_are_spelt_and_read_back(parent: Path) -> None:
    tokenizer = load_tokenizer(parent)
    small, _ = Vocabulary(tokenizer).cut(Vocabulary(tokenizer).choose(counts_of(parent, CORPUS), None))
    for text in OTHERS:
        assert small.decode(small.encode(text).ids) == text


@pytest.mark.parametrize("wanted", [257, 290, 330, 400])
def test_so_many_tokens_as_wanted_and_the_map_spells_the_same_text(parent: Path, wanted: int) -> None:
    tokenizer = load_tokenizer(parent)
    vocabulary = Vocabulary(tokenizer)
    kept = vocabulary.choose(counts_of(parent, CORPUS), wanted)
    small, table = vocabulary.cut(kept)
    assert len(kept) == small.get_vocab_size() == min(wanted, tokenizer.get_vocab_size())
    used = vocabulary.choose(counts_of(parent, CORPUS), None)
    if wanted >= len(used):  # the others are the tokenizer's first
        others = np.setdiff1d(kept, used)
        assert np.isin(used, kept).all()
        assert np.array_equal(others, np.setdiff1d(np.arange(tokenizer.get_vocab_size()), used)[: len(others)])
    texts = [*CORPUS, *OTHERS]
    known = set(kept.tolist())
    before = tokenize(tokenizer, texts)
    for text, old, mapped, new in zip(texts, before, remap(before, table), tokenize(small, texts), strict=True):
        assert small.decode(mapped.tolist()) == text
        assert mapped[-1] == small.token_to_id("<|endoftext|>")
        if known.issuperset(old.tolist()):
            assert mapped.tolist() == new.tolist()


def sentencepiece_like(*, byte_fallback: bool) -> str:
    """A BPE with a word mark, byte tokens, a BOS, and two merges that end in the same token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    parts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    parts += ["▁", "a", "b", "c", "d", "▁a", "ab", "bc", "abc", "▁abc", "cd"]
    merges = [("▁", "a"), ("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc"), ("▁a", "bc"), ("▁", "abc"), ("c", "d")]
    vocabulary = {part: index for index, part in enumerate(parts)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=byte_fallback))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer.to_str()


@pytest.mark.parametrize("kind", KINDS)
def test_encoders_read_the_corpus_as_before(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    counts = np.bincount(np.concatenate(tokenize(tokenizer, CORPUS)), minlength=tokenizer.get_vocab_size())
    vocabulary = Vocabulary(tokenizer)
    kept = vocabulary.choose(counts, None)
    small, table = vocabulary.cut(kept)
    assert len(kept) == small.get_vocab_size() < tokenizer.get_vocab_size()
    before, after = tokenize(tokenizer, CORPUS), tokenize(small, CORPUS)
    for old, new, mapped in zip(before, after, remap(before, table), strict=True):
        assert [tokenizer.id_to_token(i) for i in old] == [small.id_to_token(i) for i in new]
        assert new.tolist() == mapped.tolist()
    for text in [*CORPUS, *OTHERS]:  # nothing becomes unknown that was not, and the text is the same
        old, new = (one.encode(text, add_special_tokens=False) for one in (tokenizer, small))
        unknown = [token for token in old.tokens if "unk" in token.lower()]
        assert [token for token in new.tokens if "unk" in token.lower()] == unknown
        mapped = remap([np.array(old.ids, np.uint32)], table)[0] if old.ids else []
        assert small.decode(list(mapped)) == small.decode(new.ids) == tokenizer.decode(old.ids)


def test_a_piece_that_went_is_spelt_by_the_likeliest_pieces_left() -> None:
    from tokenizers import Tokenizer, models

    scores = [("<unk>", 0.0), ("a", -3.0), ("b", -3.0), ("c", -9.0), ("ab", -4.0), ("bc", -4.5), ("abc", -5.0)]
    tokenizer = Tokenizer(models.Unigram(scores, 0, False))
    vocabulary = Vocabulary(tokenizer)
    small, table = vocabulary.cut(np.array([0, 1, 2, 3, 5]))  # without "ab" and "abc"
    assert small.encode("abc").tokens == ["a", "bc"]
    assert [small.id_to_token(int(i)) for i in remap([np.array([6, 4], np.uint32)], table)[0]] == [
        "a",
        "bc",
        "a",
        "b",
    ]
    counts = np.bincount([6], minlength=7)
    assert vocabulary.choose(counts, None).tolist() == [0, 1, 2, 3, 6]  # characters, and the least likely one


def test_only_what_lies_on_the_way_is_kept_and_dropped_letters_become_bytes() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(sentencepiece_like(byte_fallback=True))
    vocabulary = Vocabulary(tokenizer)
    assert tokenizer.encode("abc").tokens == ["▁abc"]
    assert vocabulary.way_to("▁abc") == {"▁", "a", "b", "c", "▁a", "bc", "▁abc"}
    counts = np.bincount(tokenizer.encode("abc").ids, minlength=tokenizer.get_vocab_size())
    small, table = vocabulary.cut(vocabulary.choose(counts, None))
    assert small.encode("abc").tokens == ["▁abc"]
    assert small.encode("abcd").tokens == ["▁abc", "<0x64>"]
    mapped = remap([np.array(tokenizer.encode("cd").ids, np.uint32)], table)[0]
    assert [small.id_to_token(index) for index in mapped] == ["▁", "c", "<0x64>"]


def test_kinds_that_cannot_be_cut_are_refused(parent: Path) -> None:
    from tokenizers import Tokenizer, models

    with pytest.raises(RecipeError, match=r"the tokenizer's model is WordLevel; only BPE, Unigram, WordPiece can"):
        Vocabulary(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))  # noqa: S106
    with pytest.raises(RecipeError, match="has 1 of the 256 bytes"):
        Vocabulary(Tokenizer(models.BPE({"a": 0}, [])))
    with pytest.raises(RecipeError, match=r"prune\.vocabulary: 100 wanted; characters and special tokens are 257"):
        Vocabulary(load_tokenizer(parent)).choose(counts_of(parent, CORPUS), 100)


def test_a_token_that_is_gone_is_an_error_and_no_map_is_no_change(tmp_path: Path) -> None:
    table = TokenMap(np.array([0, 1, 1, 3]), np.array([0, 1, 1]))
    texts = [np.array([0, 2], np.uint32), np.array([2], np.uint32)]
    assert [text.tolist() for text in remap(texts, table)] == [[0, 1, 1], [1, 1]]
    with pytest.raises(RunError, match="token 1 is not in the pruned vocabulary"):
        remap([np.array([0, 1], np.uint32)], table)
    assert load_map(Folder.at(str(tmp_path))) is None
    assert remap(texts, None) == texts
    save_map(table, tmp_path)
    again = load_map(Folder.at(str(tmp_path)))
    assert again is not None
    assert (again.first.tolist(), again.ids.tolist()) == (table.first.tolist(), table.ids.tolist())


def test_tokens_are_counted_over_all_pieces(tmp_path: Path) -> None:
    for name, tokens in (("000000", [1, 1, 2]), ("000001", []), ("000002", [2, 4])):
        (tmp_path / f"{name}.bin").write_bytes(np.array(tokens, "<u4").tobytes())
    assert count_tokens(tmp_path, 6).tolist() == [0, 2, 2, 0, 1, 0]


@pytest.mark.parametrize("wanted", [None, 300])
def test_a_vocabulary_is_pruned_twice(parent: Path, tmp_path: Path, wanted: int | None) -> None:
    tokenizer = load_tokenizer(parent)
    texts = [*CORPUS, *OTHERS]
    before = tokenize(tokenizer, texts)
    (tmp_path / "000000.bin").write_bytes(np.concatenate(before).astype("<u4").tobytes())
    first, table = Vocabulary(tokenizer).cut(Vocabulary(tokenizer).choose(counts_of(parent, texts), 330))
    counts = count_tokens(tmp_path, 330, table)
    assert counts.tolist() == np.bincount(np.concatenate(remap(before, table)), minlength=330).tolist()
    second = Vocabulary(first)
    small, after = second.cut(second.choose(counts, wanted))
    both = composed(table, after)
    for text, twice in zip(texts, remap(remap(before, table), after), strict=True):
        (once,) = remap([tokenize(tokenizer, [text])[0]], both)
        assert once.tolist() == twice.tolist()
        assert small.decode(once.tolist()) == text
    assert composed(None, after) is after


def test_a_token_that_either_map_cannot_spell_is_gone() -> None:
    table = composed(
        TokenMap(np.array([0, 1, 1, 3, 5]), np.array([0, 1, 2, 2, 0])),
        TokenMap(np.array([0, 2, 2, 3]), np.array([7, 8, 9])),
    )
    assert (table.first.tolist(), table.ids.tolist()) == ([0, 2, 2, 2, 5], [7, 8, 9, 7, 8])
