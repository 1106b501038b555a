"""What the language model is asked: all its texts, which are English and name the language of the queries."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from f2llm_ray.data.language import CODE, UNKNOWN

SAME = "same"
"""The language of the passage, as a choice of languages."""
SENT_CHARS = 6_000
"""Characters of a passage that are sent: what comes later is mostly cut in training too."""


@dataclass(frozen=True)
class Style:
    """A kind of query, in words."""

    one: str
    many: str
    like: str


STYLES = {
    "question": Style("question", "questions", "as a person who looks for this information would ask"),
    "keywords": Style("search", "searches", "of two to six words, as a person would type into a search box"),
    "title": Style("title", "titles", "that say in a few words what the passage is about"),
}
PROMPT = """\
Write {wanted} that the passage below answers, {like}.
Write in {language}. Use your own words and copy no sentence of the passage. Each must make sense to a reader who \
has not seen the passage, so never speak of "the passage" or "the text".
Answer with a JSON list of {count} strings and nothing else.

Passage:
{passage}"""


def prompt(passage: str, *, language: str | None, style: str, count: int) -> str:
    """What is asked for some queries of one passage.

    Args:
        passage: its text, of which `SENT_CHARS` characters are sent.
        language: of the queries, as rows carry it; None for that of the passage, whichever it is.
        style: one of `STYLES`.
        count: queries that are wanted.
    """
    kind = STYLES[style]
    wanted = f"1 {kind.one}" if count == 1 else f"{count} different {kind.many}"
    named = "the language of the passage" if language is None else language_name(language)
    return PROMPT.format(
        wanted=wanted, like=kind.like, language=named, count=count, passage=passage[:SENT_CHARS].strip()
    )


def language_of(passage: str | None, wanted: str) -> str | None:
    """The language of a query: the one that is wanted, or the passage's; of code, English; None where unknown."""
    if wanted != SAME:
        return wanted
    if passage is not None and passage.startswith(CODE):
        return "eng"
    return None if passage == UNKNOWN else passage


@lru_cache(maxsize=512)
def language_name(code: str) -> str:
    """The English name of a language as rows carry it, such as "German" or "Chinese (script Hans)"."""
    import iso639

    language, _, script = code.partition("-")
    name = iso639.Language.from_part3(language).name.partition(" (")[0]
    return f"{name} (script {script})" if script else name
