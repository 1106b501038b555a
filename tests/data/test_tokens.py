"""The token store gives back exactly what was put in, from files on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from f2llm_ray.base.errors import RecipeError, RunError
from f2llm_ray.data.keys import shard_of
from f2llm_ray.data.schema import key_numbers, text_key
from f2llm_ray.data.tokens import store as tokens
from f2llm_ray.data.tokens.tokenizer import END, open_tokenizer, save_tokenizer, train_tokenizer

SHARDS = 4


def build(folder: Path, texts: dict[str, list[int]], pieces: int) -> tokens.TokenStore:
    names = list(texts)
    entries = []
    for piece in range(pieces):
        mine = names[piece::pieces]
        lengths = tokens.write_piece(
            folder / f"{piece:06d}.bin", ([np.array(texts[name], np.uint32)] for name in mine)
        )
        key = pa.array([text_key(name) for name in mine], pa.binary(16))
        entries.append(pa.table({"key": key, "piece": pa.array([piece] * len(mine), pa.int64())}))
        entries[-1] = pa.table([*entries[-1].columns, *lengths.columns], ["key", "piece", *lengths.column_names])
    table = pa.concat_tables(entries)
    shard = shard_of(key_numbers(table["key"]), SHARDS)
    for number in range(SHARDS):
        tokens.write_index(folder, number, table.filter(pa.array(shard == number)))
    tokens.write_meta(folder, shards=SHARDS, texts=len(names), tokens=sum(map(len, texts.values())))
    return tokens.TokenStore(folder)


def keys_of(names: list[str]) -> np.ndarray:
    return key_numbers(pa.array([text_key(name) for name in names], pa.binary(16)))


def test_every_text_comes_back_in_the_order_asked(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    texts = {f"text {n}": generator.integers(0, 2**32 - 1, n % 7 + 1).tolist() for n in range(500)}
    store = build(tmp_path, texts, pieces=3)
    asked = [f"text {n}" for n in generator.integers(0, 500, 200)]
    found = store.lookup(keys_of(asked))
    assert [ids.tolist() for ids in found] == [texts[name] for name in asked]
    assert store.texts == 500


def test_texts_whose_keys_share_their_first_half_are_told_apart(tmp_path: Path) -> None:
    keys = [b"\x10" * 8 + bytes([n]) * 8 for n in (1, 2, 3)]
    lengths = tokens.write_piece(tmp_path / "000000.bin", [[np.array([n], np.uint32) for n in (1, 2, 3)]])
    entries = pa.table(
        [pa.array(keys, pa.binary(16)), pa.array([0] * 3), *lengths.columns],
        ["key", "piece", *lengths.column_names],
    )
    tokens.write_index(tmp_path, 0, entries)
    tokens.write_meta(tmp_path, shards=1, texts=3, tokens=3)
    found = tokens.TokenStore(tmp_path).lookup(key_numbers(pa.array(keys[::-1], pa.binary(16))))
    assert [ids.tolist() for ids in found] == [[3], [2], [1]]


def test_an_unknown_key_and_an_unfinished_store_are_refused(tmp_path: Path) -> None:
    store = build(tmp_path, {"a": [1], "b": [2]}, pieces=1)
    with pytest.raises(RunError, match=f"no text with key {text_key('c').hex()}"):
        store.lookup(keys_of(["a", "c"]))
    (tmp_path / tokens.META).unlink()
    with pytest.raises(RunError, match="not a finished token store"):
        tokens.TokenStore(tmp_path)


def test_long_texts_are_cut_with_eos_still_last(tmp_path: Path) -> None:
    assert tokens.cut(np.array([5, 6, 7, 9], np.uint32), 3).tolist() == [5, 6, 9]
    batch = [np.array(ids, np.uint32) for ids in ([5, 6, 7, 9], [5, 6, 9], [9])]
    for _ in range(2):  # written, and found written
        lengths = tokens.write_piece(tmp_path / "000000.bin", [batch], max_tokens=3)
        assert lengths.to_pydict() == {"offset": [0, 3, 6], "length": [3, 3, 1], "whole": [4, 3, 1]}
    stored = np.fromfile(tmp_path / "000000.bin", "<u4")
    assert stored.tolist() == [5, 6, 9, 5, 6, 9, 9]


def test_texts_themselves_can_be_stored() -> None:
    texts = ["", "plain", "猫が👩‍👩‍👧‍👦", "é\x00"]
    assert [tokens.text_of(points) for points in tokens.code_points(texts)] == texts
    assert tokens.cut(np.array([5, 9], np.uint32), 3).tolist() == [5, 9]


def test_a_trained_tokenizer_knows_every_text_and_ends_it(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["hello world", "über Äpfel"] * 20, 300)
    end = tokenizer.token_to_id(END)
    for text in ("", "日本語 🙂 \x00", "hello"):
        ids = tokenizer.encode(text).ids
        assert ids[-1] == end
        assert tokenizer.decode(ids) == text
    save_tokenizer(tmp_path, tokenizer, 32)
    again = open_tokenizer(str(tmp_path))
    assert again.encode("hello").ids == tokenizer.encode("hello").ids, "EOS is not added twice"


def test_a_tokenizer_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be loaded"):
        open_tokenizer(str(tmp_path / "none"))
