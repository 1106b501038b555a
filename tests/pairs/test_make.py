"""`f2llm pairs` against a real endpoint on loopback, with faults: nothing is asked twice, all is accounted for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from f2llm_ray.commands.main import main
from f2llm_ray.data.read import read_pairs
from f2llm_ray.data.reading.files import TableSource
from f2llm_ray.data.settings import Data
from f2llm_ray.engine.engine import Engine
from f2llm_ray.engine.other_models import RETRIES
from f2llm_ray.evaluate.vectors import as_queries
from f2llm_ray.pairs.ask import answer_key, read_answers
from f2llm_ray.run.folder import Folder
from tests.openai_server import Chat, openai_endpoint
from tests.tiny import tiny_model

THINGS = ["pump", "valve", "lamp", "motor", "filter", "tank", "sensor", "switch", "cable", "fuse"]
NAME = "writer-1"


pytestmark = pytest.mark.usefixtures("ray_here")


@pytest.fixture
def manual(tmp_path: Path) -> Path:
    """Ten sections with text, one that is too short, one text that stands twice, and two titles without text."""
    folder = tmp_path / "manual"
    folder.mkdir()
    parts = [f"## The {thing}\n{passage(thing)}\n" for thing in THINGS]
    (folder / "a.md").write_text("# Manual\n" + "".join(parts[:5]) + "## Short\nfew\n")
    (folder / "b.md").write_text("# Manual\n" + "".join(parts[5:]) + parts[0])
    return folder


def passage(thing: str) -> str:
    return (
        f"Before you open the cover of the {thing}, turn the main switch off and wait for half a minute at least."
    )


def thing_of(prompt: str) -> str:
    return prompt.rpartition("cover of the ")[2].partition(",")[0]


def good(prompt: str, before: int = 0) -> str:
    del before
    thing = thing_of(prompt)
    return json.dumps([f"How is a {thing} opened safely?", f"{thing} cover safety"])


def pairs(manual: Path, url: str, out: Path, *more: object) -> int:
    arguments = ["--input", manual, "--model", f"{url}#{NAME}", "--output", out, "--language", "eng", *more]
    return main(["pairs", *map(str, arguments)])


def rows_of(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "pairs.parquet").to_pylist()


def checked_account(out: Path) -> dict[str, Any]:
    """The account, whose sums are right."""
    found: dict[str, Any] = json.loads((out / "account.json").read_text())
    passages, prompts, queries = found["passages"], found["prompts"], found["queries"]
    assert passages["read"] == passages["asked"] + sum(passages["skipped"].values())
    left = sum(prompts["unreadable"].values()) + sum(prompts["unanswered"].values())
    assert prompts["asked"] == prompts["read"] + left
    assert queries["written"] == queries["kept"] + sum(queries["dropped"].values())
    assert queries["kept"] == pq.read_metadata(out / "pairs.parquet").num_rows
    return found


def test_pairs_of_a_folder_of_documents(
    manual: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    out = tmp_path / "out"
    with openai_endpoint(chat=good) as endpoint:
        assert pairs(manual, endpoint.url, tmp_path / "dry", "--dry-run") == 0
        assert not endpoint.prompts
        assert not (tmp_path / "dry").exists()
        told = capsys.readouterr().out
        assert "14 passages read, 10 to ask about (skipped: clean: a heading without text 2, " in told
        assert f"10 to send to {NAME} at {endpoint.url}, of about " in told
        assert pairs(manual, endpoint.url, out) == 0
        assert Counter(endpoint.prompts).most_common(1)[0][1] == 1
        assert len(endpoint.prompts) == 10
        told = capsys.readouterr().out
        assert told.index("10 to send") < told.index("pairs: ask")
        account = checked_account(out)
        assert account["passages"]["skipped"] == {
            "clean: a heading without text": 2,
            "a passage that came before": 1,
            "clean: section too short": 1,
        }
        assert account["queries"]["kept"] == 20
        assert account["tokens"]["prompts"] == sum(map(len, endpoint.prompts))
        rows = rows_of(out)
        assert [row["query"] for row in rows[:3]] == [
            "How is a pump opened safely?",
            "pump cover safety",
            "How is a valve opened safely?",
        ]
        assert {row["passage"] for row in rows} == {passage(thing) for thing in THINGS}
        assert {(row["language"], row["style"], row["model"]) for row in rows} == {("eng", "question", NAME)}
        assert Path(rows[0]["file"]).name == "a.md"
        before = (out / "pairs.parquet").read_bytes()
        assert pairs(manual, endpoint.url, out) == 0, "a second run"
        assert len(endpoint.prompts) == 10, "asks nothing"
        assert (out / "pairs.parquet").read_bytes() == before
    source = TableSource(
        format="parquet",
        paths=(str(out / "pairs.parquet"),),
        columns={"language": "language", "passage_language": "passage_language"},
    )
    read = read_pairs("made", source, Data())
    assert sorted(read["query"].to_pylist()) == sorted(row["query"] for row in rows)


def test_faults_of_an_endpoint_are_mended_or_counted(manual: Path, tmp_path: Path) -> None:
    def chat(prompt: str, before: int) -> str | int:
        thing = thing_of(prompt)
        if thing == "pump":
            return 429 if before == 0 else good(prompt)
        if thing == "valve" and len(endpoint.prompts) < 1000:
            return good(prompt) if mended else 500
        if thing == "lamp":
            return "Sorry, I cannot do that."
        if thing == "motor":
            return json.dumps([passage(thing), "", "fuse cover safety", "A motor?"])
        return good(prompt)

    mended = False
    out = tmp_path / "out"
    with openai_endpoint(chat=chat) as endpoint:
        assert pairs(manual, endpoint.url, out, "--requests", 1) == 0
        account = checked_account(out)
        assert account["prompts"] == {
            "asked": 10,
            "read": 8,
            "unreadable": {"no JSON list": 1},
            "unanswered": {"HTTP 500": 1},
        }
        assert account["queries"]["dropped"] == {
            "copied from the passage": 1,
            "empty": 1,
            "the same as an earlier query": 1,
        }
        times = Counter(map(thing_of, endpoint.prompts))
        assert (times["pump"], times["valve"], times["lamp"]) == (2, RETRIES + 1, 1)
        mended, sent = True, len(endpoint.prompts)
        assert pairs(manual, endpoint.url, out) == 0
        assert list(map(thing_of, endpoint.prompts[sent:])) == ["valve"], "only what has no answer is asked again"
        assert not checked_account(out)["prompts"]["unanswered"]


@pytest.mark.parametrize("status", [500, 401])
def test_an_endpoint_that_answers_nothing_is_told_in_one_line(
    status: int, manual: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with openai_endpoint(chat=lambda *_: status) as endpoint:
        assert pairs(manual, endpoint.url, tmp_path / "out", "--requests", 1) == 1
        assert len(set(endpoint.prompts)) < 10, "it is not asked for all of them"
    (line,) = capsys.readouterr().err.splitlines()
    assert f"#{NAME}: does not answer: Error code: {status}" in line
    assert "0 of 10 answers came and are kept" in line
    assert not (tmp_path / "out" / "pairs.parquet").exists()


def test_the_order_of_answers_changes_nothing(manual: Path, tmp_path: Path) -> None:
    def late(last: int) -> Chat:
        def chat(prompt: str, before: int) -> str:
            time.sleep(0.2 * (THINGS.index(thing_of(prompt)) % 3 == last))
            return good(prompt, before)

        return chat

    for last in (0, 1):
        with openai_endpoint(chat=late(last)) as endpoint:
            assert pairs(manual, endpoint.url, tmp_path / str(last), "--requests", 1 + 4 * last) == 0
    for name in ("pairs.parquet", "account.json"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()


def test_other_settings_ask_only_for_what_is_new(manual: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with openai_endpoint(chat=good) as endpoint:
        assert pairs(manual, endpoint.url, out, "--limit", 3) == 0
        few = {row["passage"] for row in rows_of(out)}
        assert len(few) == len(endpoint.prompts) == 3
        assert checked_account(out)["passages"]["skipped"]["not among those drawn (--limit)"] == 7
        assert pairs(manual, endpoint.url, out, "--limit", 5) == 0
        assert few < {row["passage"] for row in rows_of(out)}
        assert len(endpoint.prompts) == 5
        more = ("--limit", 5, "--languages", "same,eng,deu", "--style", "question,title")
        assert pairs(manual, endpoint.url, out, *more) == 0
        assert len(endpoint.prompts) == 5 * 4, "same is eng here, and the questions in it are there"
        assert max(Counter(endpoint.prompts).values()) == 1
        assert sum("Write in German." in prompt for prompt in endpoint.prompts) == 10
        account = checked_account(out)
        assert account["queries"]["dropped"] == {"the same as an earlier query": 30}


def test_tables_and_sources_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "texts.jsonl"
    table.write_text(
        "".join(json.dumps({"id": n, "body": passage(thing)}) + "\n" for n, thing in enumerate(THINGS))
    )
    with openai_endpoint(chat=good) as endpoint:
        assert pairs(table, endpoint.url, tmp_path / "a") == 1
        assert "texts.jsonl: a table; name the column of its passages" in capsys.readouterr().err
        assert pairs(table, endpoint.url, tmp_path / "a", "--column", "body") == 0
        recipe = tmp_path / "ours.yaml"
        source = {"format": "jsonl", "paths": [str(table)], "columns": {"query": "body", "passage": "body"}}
        settings = {
            "extends": "starter",
            "name": "ours",
            "sources": {"pairs": None, "texts": source | {"language": "eng"}},
        }
        recipe.write_text(json.dumps(settings))
        model = f"{endpoint.url}#{NAME}"
        ours = ["pairs", "--recipe", str(recipe), "--model", model, "--output", str(tmp_path / "b")]
        assert main([*ours, "--source", "text"]) == 1
        assert "--source: found 'text', expected one of texts" in capsys.readouterr().err
        assert main(ours) == 0
    for field in ("query", "passage", "language"):
        assert [row[field] for row in rows_of(tmp_path / "a")] == [row[field] for row in rows_of(tmp_path / "b")]
    assert {row["source"] for row in rows_of(tmp_path / "b")} == {"texts"}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--style", "poem"), "--style: found 'poem', expected some of question, keywords, title"),
        (("--languages", "klingonish"), "--languages: found 'klingonish', expected same, or ISO 639 codes"),
        (("--per-passage", 0), "--per-passage: found 0, expected 1 or more"),
        (("--source", "x"), "--source and --set: those of a recipe"),
        (("--recipe", "starter"), "give either --input, or --recipe and its --source"),
        (("--check", "nowhere"), "nowhere: no model; expected"),
        (("--model", "http://127.0.0.1:1/v1"), "expected URL#NAME"),
    ],
)
def test_flags_that_do_not_fit_are_told_in_one_line(
    flags: tuple[object, ...], told: str, manual: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pairs(manual, "http://127.0.0.1:1/v1", tmp_path / "out", *flags) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
    assert not (tmp_path / "out").exists()


def test_the_check_keeps_the_queries_by_which_a_model_finds_their_passage(manual: Path, tmp_path: Path) -> None:
    model, out = tiny_model(tmp_path / "model"), tmp_path / "out"
    with openai_endpoint(chat=good) as endpoint:
        assert pairs(manual, endpoint.url, out) == 0
        everything = rows_of(out)
        for top in (1, 4):
            assert pairs(manual, endpoint.url, out, "--check", model, "--check-top", top) == 0
            account = checked_account(out)
            engine = Engine(model)
            texts = [passage(thing) for thing in THINGS]
            asked = as_queries(
                engine,
                [row["query"] for row in everything],
                "Given a question, retrieve passages that can help answer the question.",
            )
            order = np.argsort(-(engine.embed(asked) @ engine.embed(texts).T), axis=1)[:, :top]
            found = [
                row
                for row, nearest in zip(everything, order, strict=True)
                if texts.index(row["passage"]) in nearest
            ]
            assert rows_of(out) == found
            assert 0 < len(found) < len(everything)
            assert account["queries"]["dropped"] == {
                "its passage is not found by it (--check)": len(everything) - len(found)
            }
        assert len(endpoint.prompts) == 10


def test_a_killed_run_goes_on_and_asks_only_what_is_missing(manual: Path, tmp_path: Path) -> None:
    def slow(prompt: str, before: int) -> str:
        time.sleep(0.5)
        return good(prompt, before)

    out = tmp_path / "out"
    with openai_endpoint(chat=slow) as endpoint:
        command = [sys.executable, "-m", "f2llm_ray", "pairs", "--input", str(manual), "--language", "eng"]
        command += ["--model", f"{endpoint.url}#{NAME}", "--output", str(out), "--requests", "2"]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        run = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
        while len(endpoint.prompts) < 5 and run.poll() is None:
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        time.sleep(1.5)  # what was under way
        sent, kept = list(endpoint.prompts), read_answers(Folder.at(str(out / "answers")))
        assert 0 < len(kept) < 10
        assert len(sent) - len(kept) <= 2, "all but what was under way is kept"
        assert pairs(manual, endpoint.url, out) == 0
        again = [answer_key(NAME, prompt) for prompt in endpoint.prompts[len(sent) :]]
        assert not {*again} & {*kept}
        assert len(again) == len({*again}) == 10 - len(kept)
    assert checked_account(out)["queries"]["kept"] == 20
