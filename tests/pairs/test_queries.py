"""Answers into queries: what a model may write around its list, and which queries are left out."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from f2llm_ray.pairs.prompts import PROMPT, SENT_CHARS, STYLES, language_of, prompt
from f2llm_ray.pairs.queries import LONGEST, NoListError, Sieve, copied_shares, parsed

PASSAGE = "The pump stops by itself when the water in the tank falls below the lower mark, and a red lamp is lit."


@pytest.mark.parametrize(
    "answer",
    [
        '["one", "two"]',
        '```json\n["one", "two"]\n```',
        'Here [as asked] they are:\n["one",\n "two"]\nAsk me for more [if you like].',
        '<think>Maybe ["three"] is better.</think>\n["one", "two"]',
        '{"queries": ["one", "two"]}',
        '[{"query": "one"}, {"question": "two", "id": 7}]',
        '[[1, 2], ["one", "two"]]',
    ],
)
def test_a_list_is_found_in_whatever_stands_around_it(answer: str) -> None:
    if answer.startswith("[["):
        with pytest.raises(NoListError, match="a list of something else than texts"):
            parsed(answer)
    else:
        assert parsed(answer) == ["one", "two"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (" \n", "an empty answer"),
        ("<think>hm</think>", "an empty answer"),
        ("1. one\n2. two", "no JSON list"),
        ('["one", "tw', "no JSON list"),
        ("[1, 2]", "a list of something else than texts"),
        ("[]", "a list of something else than texts"),
        (r'["\ud83d"]', "a list of something else than texts"),
        ("[" * 5000, "no JSON list"),
    ],
)
def test_why_an_answer_has_no_queries(answer: str, reason: str) -> None:
    with pytest.raises(NoListError, match=reason):
        parsed(answer)


@given(st.text(alphabet='[]{}",:\\u 1a\n'))
def test_no_answer_breaks_a_run(answer: str) -> None:
    with suppress(NoListError):
        assert all(isinstance(text, str) for text in parsed(answer))


@given(st.lists(st.text(max_size=20), min_size=1), st.text(), st.text())
def test_what_json_writes_is_read(queries: list[str], before: str, after: str) -> None:
    assert parsed(f"{before.replace('[', '(')}\n{json.dumps(queries)}{after}") == queries


def test_what_is_copied_is_known_by_runs_of_words() -> None:
    shares = copied_shares(
        [
            "the pump stops by itself when the water in the tank falls",
            "Why does the pump stop when there is too little water?",
            "what does it mean that a red lamp is lit",
            "the lower mark",
        ],
        PASSAGE,
    )
    assert shares[0] == 1
    assert shares[1] == 0
    assert 0 < shares[2] < 0.6
    assert shares[3] == 0, "a few words in a row are no copy"
    copied, own = copied_shares(
        ["猫が窓のそばで眠っている", "動物はどこで休みますか"], "猫が窓のそばで眠っています。"
    )
    assert copied > 0.6 > own == 0


def test_every_query_is_kept_or_counted_by_reason() -> None:
    sieve = Sieve()
    sieve.add(
        0, ["  When does it\nstop? ", "", "x" * (LONGEST + 1), PASSAGE.upper(), "WHEN does it\nstop?"], PASSAGE, 2
    )
    sieve.add(1, ["when does it\nstop?", "One", "Two", "Three"], PASSAGE, 2)
    assert [(query.request, query.text) for query in sieve.kept] == [
        (0, "When does it\nstop?"),
        (1, "One"),
        (1, "Two"),
    ]
    assert sieve.dropped == {
        "empty": 1,
        "longer than 300 characters": 1,
        "copied from the passage": 1,
        "the same as an earlier query": 2,
        "more than were asked for": 1,
    }


@given(st.lists(st.lists(st.sampled_from(["a", "A", "b c", "", PASSAGE, "y" * 400]), max_size=5), max_size=6))
def test_nothing_is_lost_and_nothing_comes_twice(answers: list[list[str]]) -> None:
    sieve = Sieve()
    for number, queries in enumerate(answers):
        sieve.add(number, queries, PASSAGE, 2)
    assert len(sieve.kept) + sum(sieve.dropped.values()) == sum(map(len, answers))
    texts = [query.text.casefold() for query in sieve.kept]
    assert len(texts) == len(set(texts))


def test_a_prompt_says_language_style_and_number() -> None:
    text = prompt(PASSAGE, language="ell", style="keywords", count=3)
    assert "3 different searches" in text
    assert "Write in Modern Greek." in text
    assert text.endswith(PASSAGE)
    assert "Write in Chinese (script Hans)." in prompt(PASSAGE, language="zho-Hans", style="title", count=2)
    one = prompt("x" * 9000, language=None, style="question", count=1)
    assert "Write 1 question that" in one
    assert "Write in the language of the passage." in one
    assert len(one) < SENT_CHARS + len(PROMPT) + 200
    assert len({prompt(PASSAGE, language="deu", style=style, count=2) for style in STYLES}) == len(STYLES)


def test_the_language_of_a_query() -> None:
    assert language_of("deu", "same") == "deu"
    assert language_of("deu", "eng") == "eng"
    assert language_of("code:python", "same") == "eng"
    assert language_of(None, "same") is language_of("und", "same") is None
