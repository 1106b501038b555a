"""Asking an OpenAI-compatible chat endpoint, and keeping every answer: nothing is asked twice.

An answer is known by the prompt and the name of the model, so that other styles, languages and passages ask only
for what is new. Each is written as it comes, by itself; those of a piece of work are joined into one file at its
end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from f2llm_ray.base.errors import RunError
from f2llm_ray.base.formatting import clip
from f2llm_ray.data.flow import Item, each_on_actors, start_waiting
from f2llm_ray.data.schema import KEY, seeded_key
from f2llm_ray.engine.other_models import endpoint_client
from f2llm_ray.run.folder import Folder

ANSWERS = pa.schema(
    [
        ("key", KEY),
        ("model", pa.string()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("ended", pa.string()),  # as the endpoint says: "stop", "length", ...
        ("prompt_tokens", pa.int64()),  # as the endpoint counts, if it does
        ("answer_tokens", pa.int64()),
    ]
)
PIECE = 16
"""Most prompts of a piece of work."""
FAILURES_IN_A_ROW = 2
"""After so many a piece is given up until the next run."""
SHOWN = 300
"""Characters of what an endpoint says of a failure."""


@dataclass(frozen=True)
class Answer:
    """What the model said to one prompt."""

    text: str
    prompt_tokens: int
    answer_tokens: int


def answer_key(model: str, prompt: str) -> bytes:
    """What an answer is known by."""
    return seeded_key(model, prompt)


def read_answers(folder: Folder) -> dict[bytes, Answer]:
    """All answers in a folder; of two to one prompt always the same one."""
    found: dict[bytes, Answer] = {}
    for name in folder.files(".parquet"):
        for row in folder.read_table(name, ["key", "answer", "prompt_tokens", "answer_tokens"]).to_pylist():
            answer = Answer(row["answer"], row["prompt_tokens"] or 0, row["answer_tokens"] or 0)
            known = found.setdefault(row["key"], answer)
            if (answer.text, answer.answer_tokens) < (known.text, known.answer_tokens):
                found[row["key"]] = answer
    return found


def ask(model: str, prompts: Sequence[str], answers: Folder, requests: int) -> dict[str, int]:
    """Sends prompts and writes the answers as they come, with progress.

    Args:
        model: URL#NAME.
        prompts: what has no answer yet.
        answers: gets a file for each piece of work.
        requests: how many are under way at once.

    Returns:
        Prompts without an answer, by what went wrong after the retries.

    Raises:
        RunError: the endpoint answers nothing any more; what was answered is kept.
    """
    if not prompts:
        return {}
    import ray

    actors = start_waiting(partial(Asker, model, answers), requests)
    try:
        return _asked(model, prompts, actors)
    finally:
        for actor in actors:  # after an error they would go on
            ray.kill(actor)


def _asked(model: str, prompts: Sequence[str], actors: list[Any]) -> dict[str, int]:
    size = max(1, min(PIECE, len(prompts) // (4 * len(actors))))  # few prompts are shared out evenly
    pieces = [list(prompts[first : first + size]) for first in range(0, len(prompts), size)]
    items: list[Item] = [{"texts": piece, "prompts": len(piece)} for piece in pieces]
    failed, in_a_row, answered = Counter[str](), 0, 0
    for number, outcome in enumerate(each_on_actors("pairs: ask", items, actors, counted="prompts"), start=1):
        failed.update(outcome["failed"])
        answered += outcome["answered"]
        in_a_row = 0 if outcome["answered"] else in_a_row + 1
        if in_a_row > len(actors) or (number == len(items) and not answered):
            raise RunError(
                f"{model}: does not answer: {outcome['said']}; {answered:,} of {len(prompts):,} answers came and "
                "are kept, and the same command asks for the others"
            )
    return dict(failed)


class Asker:
    """Asks for the answers to pieces of work, inside an actor; several threads may call it."""

    def __init__(self, model: str, answers: Folder) -> None:
        self.client, self.url, self.name = endpoint_client(model)
        self.answers = answers

    def __call__(self, item: Item) -> Item:
        """Asks one prompt after the other."""
        rows: list[dict[str, Any]] = []
        failed, in_a_row, said = Counter[str](), 0, ""
        for place, text in enumerate(item["texts"]):
            row, reason, message = self._ask(text)
            if row is not None:
                self.answers.write_table(_file([row]), [pa.Table.from_pylist([row], ANSWERS)], ANSWERS)
                rows.append(row)
                in_a_row = 0
                continue
            failed[reason] += 1
            in_a_row, said = in_a_row + 1, message
            if in_a_row == FAILURES_IN_A_ROW:
                failed[reason] += len(item["texts"]) - place - 1
                break
        if len(rows) > 1:
            self.answers.write_table(_file(rows), [pa.Table.from_pylist(rows, ANSWERS)], ANSWERS)
            for row in rows:
                self.answers.filesystem.delete_file(f"{self.answers.path}/{_file([row])}")
        return {"prompts": item["prompts"], "answered": len(rows), "failed": dict(failed), "said": said}

    def _ask(self, prompt: str) -> tuple[dict[str, Any] | None, str, str]:
        """The row of an answer; or None, the reason in short and what the endpoint says."""
        import openai

        try:
            found = self.client.chat.completions.create(
                model=self.name, messages=[{"role": "user", "content": prompt}]
            )
            choice, usage = found.choices[0], found.usage
            row = {
                "key": answer_key(self.name, prompt),
                "model": self.name,
                "prompt": prompt,
                "answer": choice.message.content or "",
                "ended": choice.finish_reason,
                "prompt_tokens": None if usage is None else usage.prompt_tokens,
                "answer_tokens": None if usage is None else usage.completion_tokens,
            }
        except openai.APIStatusError as error:
            return None, f"HTTP {error.status_code}", _short(error)
        except openai.APITimeoutError as error:
            return None, "no answer in time", _short(error)
        except openai.APIConnectionError as error:
            return None, "no connection", _short(error)
        except (openai.OpenAIError, ValueError, TypeError, IndexError, AttributeError) as error:
            return None, "an answer of another shape than OpenAI's", _short(error)
        return row, "", ""


def _short(error: Exception) -> str:
    return clip(" ".join(str(error).split()) or type(error).__name__, SHOWN)


def _file(rows: Sequence[dict[str, Any]]) -> str:
    """Name of the file with these answers."""
    return f"{seeded_key(*(row['key'] for row in rows)).hex()}.parquet"
