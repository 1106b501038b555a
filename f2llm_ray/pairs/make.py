"""From passages to a file of pairs: read, ask, leave out what is wrong, write, and account for all of it.

The same passages and answers give the same file, in whatever order the answers came.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from f2llm_ray.base.errors import RunError
from f2llm_ray.base.formatting import plural, ranked
from f2llm_ray.base.progress import say
from f2llm_ray.base.session import connect
from f2llm_ray.data.tokens.tokenizer import BYTES_PER_TOKEN
from f2llm_ray.engine.other_models import NO_MODEL, endpoint_client
from f2llm_ray.model.checkpoint import INFO_FILE
from f2llm_ray.model.described import MODULES_FILE
from f2llm_ray.pairs.ask import Answer, answer_key, ask, read_answers
from f2llm_ray.pairs.passages import Passages, find_passages
from f2llm_ray.pairs.prompts import language_of, prompt
from f2llm_ray.pairs.queries import NoListError, Query, Sieve, parsed
from f2llm_ray.run.folder import Folder

if TYPE_CHECKING:
    from f2llm_ray.data.reading.base import SourceBase
    from f2llm_ray.data.settings import Data

PAIRS_FILE = "pairs.parquet"
ACCOUNT_FILE = "account.json"
ANSWERS = "answers"
PAIRS = pa.schema(
    [
        ("query", pa.string()),
        ("passage", pa.string()),
        ("language", pa.string()),  # of the query; null where the passage's is not known
        ("passage_language", pa.string()),
        ("source", pa.string()),
        ("file", pa.string()),  # that the passage was read from; "" where the source has no files
        ("style", pa.string()),
        ("model", pa.string()),  # that wrote the query
    ]
)
NOT_FOUND = "its passage is not found by it (--check)"


@dataclass(frozen=True, kw_only=True)
class PairJob:
    """What pairs are wanted."""

    sources: Mapping[str, SourceBase]
    """Where the passages are, by name."""
    settings: Data
    """The limits that a passage must keep."""
    model: str
    """URL#NAME of the endpoint that writes the queries."""
    output: str
    languages: tuple[str, ...]
    """Of the queries: codes as rows carry them, or `prompts.SAME`."""
    styles: tuple[str, ...]
    """Of `prompts.STYLES`."""
    per_passage: int
    """Queries that are asked for, for each passage, language and style."""
    limit: int | None = None
    """At most so many passages."""
    requests: int = 4
    """How many are under way at once."""
    check: str | None = None
    """A model folder that must find each query's passage."""
    check_top: int = 1
    """Among how many of its nearest."""


@dataclass(frozen=True)
class Request:
    """One prompt."""

    passage: int
    """Its place among the drawn ones."""
    language: str | None
    style: str
    text: str
    key: bytes


def make_pairs(job: PairJob, *, dry_run: bool = False) -> dict[str, Any] | None:
    """Makes the pairs; a run that was cut off, or one with more passages, asks only for what is missing.

    The output folder gets pairs.parquet, account.json and `answers/`, which has every prompt and answer.

    Returns:
        The account; None for a dry run, which says what would be asked.

    Raises:
        DataError: a source that cannot be read, or a missing package.
        RunError: the endpoint does not answer, the model to check with is none, or no pair is left.
    """
    _, url, name = endpoint_client(job.model)
    output = Folder.at(job.output)
    check = None if job.check is None else _model(job.check)
    connect()
    found = find_passages(job.sources, job.settings, job.limit)
    requests = requests_of(job, name, found)
    answers = read_answers(output / ANSWERS)
    missing = [request.text for request in requests if request.key not in answers]
    say(f"pairs: {_told_passages(found)}")
    say(f"pairs: {_told_prompts(len(requests), missing, name, url)}")
    if dry_run:
        return None
    failed = ask(job.model, missing, output / ANSWERS, job.requests)
    answers = read_answers(output / ANSWERS) if missing else answers
    sieve, unreadable = _sifted(requests, answers, found, job.per_passage)
    kept = sieve.kept
    dropped = Counter(sieve.dropped)
    if check is not None and kept:
        kept = _checked(kept, requests, found, check, job.check_top)
        dropped[NOT_FOUND] = len(sieve.kept) - len(kept)
    account = {
        "model": name,
        "languages": list(job.languages),
        "styles": list(job.styles),
        "per_passage": job.per_passage,
        "limit": job.limit,
        "check": None if check is None else {"model": check.uri, "top": job.check_top},
        "passages": {"read": found.read, "asked": len(found.drawn), "skipped": found.skipped},
        "prompts": {
            "asked": len(requests),
            "read": len(requests) - sum(unreadable.values()) - sum(failed.values()),
            "unreadable": ranked(unreadable),
            "unanswered": ranked(failed),
        },
        "queries": {
            "written": len(kept) + sum(dropped.values()),
            "kept": len(kept),
            "dropped": ranked(dropped),
        },
        "passages_with_queries": len({requests[query.request].passage for query in kept}),
        "tokens": _tokens(requests, answers),
    }
    output.write_table(PAIRS_FILE, [_table(kept, requests, found, name)], PAIRS)
    output.write_json(ACCOUNT_FILE, account)
    if not kept:
        raise RunError(f"{output.uri}: no pair is left: {told(account)}")
    say(f"pairs: {output.uri}/{PAIRS_FILE}: {told(account)}")
    return account


def requests_of(job: PairJob, model: str, found: Passages) -> list[Request]:
    """All prompts, in the order of the passages, languages and styles; each once."""
    requests: list[Request] = []
    for place, passage in enumerate(found.drawn):
        languages = dict.fromkeys(language_of(passage.language, wanted) for wanted in job.languages)
        for language in languages:
            for style in job.styles:
                text = prompt(passage.text, language=language, style=style, count=job.per_passage)
                requests.append(Request(place, language, style, text, answer_key(model, text)))
    return list({request.key: request for request in reversed(requests)}.values())[::-1]


def told(account: Mapping[str, Any]) -> str:
    """The account in one line."""
    passages, prompts, queries = (account[name] for name in ("passages", "prompts", "queries"))
    tokens, dropped = account["tokens"], _reasons("dropped", queries["dropped"])
    no_list = _reasons("of others none can be read", prompts["unreadable"])
    lines = [
        f"{plural(queries['kept'], 'pair')} for {account['passages_with_queries']:,} passages",
        f"queries written {queries['written']:,}{dropped}",
        f"passages read {passages['read']:,}, asked about {passages['asked']:,}",
        f"prompts {prompts['asked']:,}, answers with queries {prompts['read']:,}{no_list}",
    ]
    if prompts["unanswered"]:
        lines.append(f"unanswered, and asked again by the same command{_reasons('', prompts['unanswered'])}")
    if tokens["prompts"]:
        lines.append(
            f"{tokens['prompts']:,} tokens sent and {tokens['answers']:,} received, as the endpoint counts"
        )
    return "; ".join(lines)


def _reasons(what: str, counts: Mapping[str, int]) -> str:
    if not counts:
        return ""
    listed = ", ".join(f"{reason} {count:,}" for reason, count in counts.items())
    return f" ({what}: {listed})" if what else f": {listed}"


def _told_passages(found: Passages) -> str:
    said = f"{plural(found.read, 'passage')} read, {len(found.drawn):,} to ask about"
    return said + _reasons("skipped", found.skipped)


def _told_prompts(prompts: int, missing: Sequence[str], name: str, url: str) -> str:
    tokens = sum(len(text.encode()) for text in missing) / BYTES_PER_TOKEN
    return (
        f"{plural(prompts, 'prompt')}, {prompts - len(missing):,} answered before, {len(missing):,} to send to "
        f"{name} at {url}, of about {tokens:,.0f} tokens together if a token is {BYTES_PER_TOKEN:g} bytes of text"
    )


def _model(path: str) -> Folder:
    folder = Folder.at(path)
    if not (folder.exists(INFO_FILE) or folder.exists(MODULES_FILE)):
        raise RunError(f"{folder.uri}: {NO_MODEL}")
    return folder


def _sifted(
    requests: Sequence[Request], answers: Mapping[bytes, Answer], found: Passages, most: int
) -> tuple[Sieve, Counter[str]]:
    """The queries of all answers, and the answers of which none can be read, by reason."""
    sieve, unreadable = Sieve(), Counter[str]()
    for number, request in enumerate(requests):
        answer = answers.get(request.key)
        if answer is None:
            continue
        try:
            queries = parsed(answer.text)
        except NoListError as error:
            unreadable[str(error)] += 1
            continue
        sieve.add(number, queries, found.drawn[request.passage].text, most)
    return sieve, unreadable


def _checked(
    kept: list[Query], requests: Sequence[Request], found: Passages, model: Folder, top: int
) -> list[Query]:
    from f2llm_ray.pairs.check import found_again

    own_q = np.array([requests[query.request].passage for query in kept], np.int64)
    passages = [passage.text for passage in found.drawn]
    passes = found_again(model, [query.text for query in kept], own_q, passages, top)
    return [query for query, passed in zip(kept, passes, strict=True) if passed]


def _table(kept: Sequence[Query], requests: Sequence[Request], found: Passages, model: str) -> pa.Table:
    rows = []
    for query in kept:
        request = requests[query.request]
        passage = found.drawn[request.passage]
        rows.append(
            {
                "query": query.text,
                "passage": passage.text,
                "language": request.language,
                "passage_language": passage.language,
                "source": passage.source,
                "file": passage.file,
                "style": request.style,
                "model": model,
            }
        )
    return pa.Table.from_pylist(rows, PAIRS)


def _tokens(requests: Sequence[Request], answers: Mapping[bytes, Answer]) -> dict[str, int]:
    found = [answers[request.key] for request in requests if request.key in answers]
    return {
        "prompts": sum(answer.prompt_tokens for answer in found),
        "answers": sum(answer.answer_tokens for answer in found),
    }
