"""The report shows the numbers it was given, stands alone, and takes any part as missing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from f2llm_ray.model.checkpoint import load_info
from f2llm_ray.report.model_card import model_card
from f2llm_ray.report.report import headline, write_report
from f2llm_ray.report.report import render as render_with
from f2llm_ray.report.report_plots import plots_of
from f2llm_ray.report.resources import by_resources
from f2llm_ray.report.terminal import TERMINAL_COLUMNS, terminal_table
from f2llm_ray.run.folder import Folder
from tests.tiny import tiny_model


def render(report: dict[str, Any]) -> str:
    return render_with(report, plots_of(report))


LANGUAGES = [f"l{i:02}" for i in range(45)]
HOSTILE = "<script>alert('$x^2$')</script>&\"_"


def model(
    name: str, quality: float, dim: int, sets: tuple[str, ...], kind: str = "train", made_from: str | None = None
) -> dict[str, Any]:
    def scores(value: float) -> dict[str, Any]:
        return {
            "ndcg@10": value,
            "acc@1": value * 0.8,
            "recall@10": value * 1.1,
            "ci": [value - 0.02, value + 0.02],
            "macro": value,
        }

    return {
        "name": name,
        "kind": kind,
        "made_from": made_from,
        "folder": f"{name}-0a1b2c3d/model",
        "sources": [] if name == "untrained" else ["web"],
        "parameters": dim * 50_000,
        "non_embedding_parameters": dim * 20_000,
        "bytes": dim * 200_000,
        "scores": {s: {str(dim // n): scores(quality / n**0.1) for n in (1, 2, 4, 8)} for s in sets},
        "types": {
            s: {str(dim): {"float": quality, "int8": quality - 0.001, "binary": quality - 0.05}} for s in sets
        },
        "query_ms": 2.345,
        "languages": {
            s: {
                str(dim): {
                    lang: {"queries": 7 + i, **scores(quality - i / 500)} for i, lang in enumerate(LANGUAGES)
                }
            }
            for s in sets
        },
    }


def full_report(sets: tuple[str, ...] = ("manual", "phrases")) -> dict[str, Any]:
    models = [
        ("untrained", 0.051, 256, sets, "untrained", None),
        ("stage1", 0.602, 256, sets, "train", "untrained"),
        ("stage2", 0.741, 256, sets, "train", "stage1"),
        ("pruned", 0.322, 192, sets, "prune", "stage2"),
        ("distilled", 0.713, 192, sets, "distill", "pruned"),
    ]
    return {
        "name": "a run",
        "created": "2026-01-02T03:04:05Z",
        "root": "runs/a",
        "device": "cpu (x86_64)",
        "libraries": {"python": "3.11.9", "torch": "2.13.0"},
        "rows": [
            {"step": "read", "in": 5000, "out": 5000, "dropped": {}},
            {"step": "clean", "in": 5000, "out": 4321, "dropped": {"too short": 600, "same": 79, "long": 0}},
        ],
        "languages": {lang: 2000 - 10 * i for i, lang in enumerate(LANGUAGES)},
        "sources": {"web": {"task": "retrieval", "rows": 4321, "licence": None}},
        "seconds": {"prepare": 12.34, "stage1": 3723.0},
        "training": {
            "stage1": {
                "steps": 900,
                "tokens": 1_234_567,
                "tokens_per_second": 8123.4,
                "final_loss": 1.2345,
                "loss": [[step, 5 / step] for step in range(1, 901)],
                "loss_at_64": [[step, 6 / step] for step in range(1, 901)],
                "score": [[450, 0.5], [900, 0.6]],
                "validation": [[450, 1.5], [900, None]],
            }
        },
        "models": [model(*facts) for facts in models],
        "reference": "stage2",
        "sets": {s: {"kind": "retrieval", "queries": 1234, "corpus": 56789} for s in sets},
        "missing": [],
        "serving": {"model": "distilled"},
        "commands": {"serve": "serve run app"},
    }


class Cells(HTMLParser):
    """Collects the text of table rows and all attributes that could load something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [value or "" for name, value in attrs if name.split(":")[-1] in {"src", "href", "srcset"}]
        self.cell = tag in {"td", "span"} and (tag == "td" or self.cell)
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag != "td"

    def handle_data(self, data: str) -> None:
        if self.cell:
            self.rows[-1][-1] += data


def test_a_full_report_shows_its_numbers(tmp_path: Path) -> None:
    report = full_report()
    write_report(Folder.at(str(tmp_path)), report)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    page = (tmp_path / "report.html").read_text()
    rows = Cells(page).rows
    assert ["stage2", "256", "0.741", "0.721 to 0.761", "0.593", "0.815", ""] in rows
    assert ["distilled", "192", "0.713", "0.693 to 0.733", "0.570", "0.784", "96.2 %"] in rows
    assert ["distilled", "9,600,000", "3,840,000", "38.4 MB", "2.3", "distilled-0a1b2c3d/model"] in rows
    by_type = [["192", "float", "0.713", "768"], ["192", "int8", "0.712", "192"], ["192", "binary", "0.663", "24"]]
    assert all(row in rows for row in by_type)
    assert ["clean", "5,000", "4,321", "too short 600 · same 79"] in rows
    assert ["web", "retrieval", "4,321", "not stated"] in rows
    assert ["stage1", "900", "1,234,567", "8,123", "1.234"] in rows
    assert ["stage1", "1 h 2 min", ""] in rows
    of_languages = [row for row in rows if len(row) == 8 and row[0] in LANGUAGES]
    assert [row[0] for row in of_languages[: len(LANGUAGES)]] == LANGUAGES[::-1], "the weakest first"
    assert of_languages[0] == ["l44", "1,560", "51", "0.625", "0.605 to 0.645", "0.500", "0.688", "95.7 %"]
    assert of_languages[len(LANGUAGES) - 1][:5] == ["l00", "2,000", "7", "0.713", ""], "of 7 queries, no interval"
    assert "the largest 40 of 45" in page
    assert "retrieval, 1,234 asked among 56,789" in page
    assert "not measured" not in page
    assert page.count("<svg") == 7, "two sets by dim and by size, the languages, one loss, one held-out score"
    assert "64 dims" in page
    # The more training rows, the better here; l00 to l02 have too few queries to count.
    assert ["high", "14", "1,840 to 1,970", "0.694", "96.1 %"] in rows
    assert ["low", "14", "1,560 to 1,690", "0.638", "95.8 %"] in rows


def test_baselines_and_failing_queries_are_shown() -> None:
    report = full_report(("manual",))
    facts = {"ndcg@10": 0.3, "acc@1": 0.2, "recall@10": 0.4, "ci": [0.28, 0.32]}
    languages = {"manual": {"0": {"deu": {"queries": 20, **facts}}}}
    report["baselines"] = [
        {
            "name": "bm25",
            "kind": "bm25",
            "model": None,
            "scores": {"manual": {"0": facts}},
            "languages": languages,
        },
        {"name": "e5", "kind": "model", "model": "a/e5", "scores": {}, "languages": {}},
    ]
    report["models"][-1]["languages"]["manual"]["192"]["deu"] = {"queries": 20, "ndcg@10": 0.1}
    failure = {"language": "deu", "query": HOSTILE, "expected": "right", "found": "wrong", "rank": 1234}
    report["failures"] = {"manual": [failure]}
    report |= {"texts": 1000, "cut_texts": {"web": 100}, "max_tokens": 48}
    page = render(report)
    rows = Cells(page).rows
    assert ["bm25", "–", "0.300", "0.280 to 0.320", "0.200", "0.400", ""] in rows
    assert ["deu (German)", HOSTILE, "right", "1,234", "wrong"] in rows
    assert "<script" not in page
    none = "not measured"
    assert ["deu (German)", "0", "20", "0.100", "", none, none, "0.300", none] in rows, "BM25 beside the model"
    assert "10.0 % of the texts were cut at 48 tokens, most of web" in page
    assert "100 of 1,000 distinct texts (10.0 %) are longer than data.max_tokens (48)" in page


def test_weak_languages_and_missing_stages_are_said_first() -> None:
    words = " ".join(headline({**full_report(), "missing": ["evaluate-pruned", "distilled"]}))
    assert (
        "The distilled model is weakest on manual in l44 0.625, l43 0.627, l42 0.629, l41 0.631 and l40 0.633, "
        "and strongest in l03 0.707, l04 0.705 and l05 0.703;" in words
    )
    # Three of the 45 have fewer than ten queries.
    assert "the language in the middle of 42 has 0.667" in words
    assert "Not finished: evaluate-pruned and distilled." in words
    page = render({**full_report(), "missing": ["evaluate-pruned"]})
    assert "<li>evaluate-pruned</li>" in page
    assert "Not finished" not in render(full_report())


def test_resource_classes_share_out_all_languages() -> None:
    scores = {name: {"ndcg@10": value} for name, value in zip("abcdefg", range(7), strict=True)}
    groups = by_resources(scores, {"a": 5, "b": 50, "c": 5, "d": 500, "x": 9})
    assert [(group.name, group.languages) for group in groups] == [
        ("high", ("d", "b")),
        ("mid", ("a",)),
        ("low", ("c",)),
        ("none", ("e", "f", "g")),
    ]
    assert [group.mean(scores, "ndcg@10") for group in groups] == [2, 0, 2, 5]
    assert groups[0].mean({"d": {"ndcg@10": 1.0}}, "ndcg@10") is None, (
        "not the mean of those that happen to be known"
    )
    assert by_resources({}, {"a": 1}) == []


def test_a_model_folder_gets_a_card_that_the_hub_can_read(tmp_path: Path) -> None:
    report = full_report(("manual", "a|b"))
    report |= {"backbone": "Qwen/Qwen3-0.6B", "languages": {"deu": 5, "zho-Hant": 2, "code:python": 3, "und": 1}}
    report["models"][-1]["folder"] = "distilled/model"
    tiny_model(tmp_path / "distilled" / "model")
    write_report(Folder.at(str(tmp_path)), report)
    card = (tmp_path / "distilled" / "model" / "README.md").read_text()
    assert list(tmp_path.rglob("README.md")) == [tmp_path / "distilled" / "model" / "README.md"]
    _, front, text = card.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["language"] == ["de", "zh"]
    assert facts["base_model"] == "Qwen/Qwen3-0.6B"
    assert {"sentence-transformers", "feature-extraction", "code"} <= set(facts["tags"])
    results = facts["model-index"][0]["results"]
    assert [result["dataset"]["name"] for result in results] == ["manual", "a|b"]
    first = {"type": "ndcg_at_10", "name": "ndcg@10, 192 dims", "value": 0.713}
    assert results[0]["metrics"][0] == first
    assert "| a\\|b | this model | 192 | ndcg@10 | 0.713 | 0.693 to 0.733 |" in text
    assert "- manual (ndcg@10, the full dim), of 45 languages: l44 0.625 (51 queries), l43" in text
    assert "dims: 8, 16, 32" in text
    assert "| web | retrieval | 4,321 | not stated |" in text
    untrained = model_card(report, report["models"][0], load_info(tmp_path / "distilled" / "model"))
    assert "Trained on" not in untrained
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCard(card).data
    assert data.model_name == "tiny"
    assert data.eval_results[0].metric_value == 0.713
    assert {"language", "license", "base_model", "tags", "metrics"} <= set(data.to_dict())


def test_the_code_of_a_card_runs(tmp_path: Path) -> None:
    """Both ways to load the model give the engine's vectors."""
    from f2llm_ray.engine.engine import Engine

    folder = tiny_model(tmp_path)
    card = model_card(full_report(), full_report()["models"][-1], load_info(folder))
    stock, plain = re.findall(r"```python\n(.*?)```", card.replace("MODEL_FOLDER", str(folder)), flags=re.DOTALL)
    engine = Engine(folder)
    query = engine.embed(["Passwort ändern"], prompt=engine.info.prompts["query"])
    found: dict[str, Any] = {}
    exec(plain, found)  # noqa: S102 - our own text
    assert abs(found["vectors"].numpy() - query).max() < 1e-5
    exec(stock, found)  # noqa: S102
    assert abs(found["queries"] - query).max() < 1e-5


def test_every_plot_of_the_page_is_a_picture_too(tmp_path: Path) -> None:
    """As many as the page has, the same bytes again, and none of an earlier report."""
    report = full_report()
    root = Folder.at(str(tmp_path))
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "earlier.png").write_bytes(b"")
    write_report(root, report)
    pictures = {file.name: file.read_bytes() for file in (tmp_path / "plots").iterdir()}
    assert len(pictures) == (tmp_path / "report.html").read_text().count("<svg role")
    assert "ndcg-10-by-dim-on-manual.png" in pictures
    assert all(content.startswith(b"\x89PNG") for content in pictures.values())
    write_report(root, report)
    assert pictures == {file.name: file.read_bytes() for file in (tmp_path / "plots").iterdir()}


def test_the_page_stands_alone() -> None:
    page = render(full_report())
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", page)
    assert all(target.startswith("#") for target in Cells(page).loads)
    ids = re.findall(r' id="([^"]+)"', page)
    assert ids
    assert len(ids) == len(set(ids)), "plots share ids"


@pytest.mark.parametrize("missing", [*full_report(), None])
def test_any_part_may_be_missing(missing: str | None) -> None:
    whole = {**full_report(("manual",)), "languages": {"eng": 2}}
    report = {} if missing is None else {key: part for key, part in whole.items() if key != missing}
    page = render(report)
    headline(report)
    if missing in {None, "rows", "models", "training", "seconds", "languages", "sources", "libraries"}:
        assert "not measured" in page
    assert ("not measured" in terminal_table(report)) == (missing in {None, "models"})


def test_models_without_numbers_are_shown_as_not_measured() -> None:
    report = {
        "models": [
            {"name": "stage1", "scores": {"manual": {"64": {"ndcg@10": 0.5}}}},
            {"name": "pruned", "kind": "prune", "scores": {"manual": {}}, "languages": None},
            {"name": "distilled", "kind": "distill", "made_from": "pruned", "scores": None},
        ],
        "reference": "stage1",
        "rows": [{"step": "read"}],
        "training": {"stage1": {}},
    }
    rows = Cells(render(report)).rows
    none = "not measured"
    assert ["stage1", "64", "0.500", "", ""] in rows
    assert ["pruned", none, none, "", none] in rows
    assert ["distilled", none, none, "", none] in rows
    assert ["distilled", none, none, none, ""] in rows, "no time where none was measured"
    assert ["stage1", none, none, none, none] in rows
    assert terminal_table(report).splitlines()[2].split() == ["stage1", "-", "-", "0.500"]


def test_each_set_shows_the_metrics_of_its_kind() -> None:
    report = full_report(("manual",))
    for facts in report["models"]:
        facts["scores"]["names"] = {"64": {"f1": 0.25, "accuracy": 0.3, "ci": [0.2, 0.3]}}
        facts["languages"]["names"] = {"64": {lang: {"queries": 20, "f1": 0.2} for lang in LANGUAGES}}
    page = render(report)
    assert ["distilled", "64", "0.250", "0.200 to 0.300", "0.300", "100.0 %"] in Cells(page).rows
    assert "f1 by dim on names" in page
    assert "f1 0.250 on names" in " ".join(headline(report))
    assert re.search(r"ndcg@10 acc@1 recall@10 .* f1 accuracy", terminal_table(report))


def test_models_are_known_by_what_they_are_made_from_and_not_by_name() -> None:
    report = full_report(("manual",))
    names = {"untrained": "base", "stage1": "a", "stage2": "b", "pruned": "c", "distilled": "d"}
    for facts in report["models"]:
        facts["name"] = names[facts["name"]]
        facts["made_from"] = names.get(facts["made_from"])
    report["models"] += [
        model("e", 0.6, 128, ("manual",), "prune", "d"),
        model("b small", 0.74, 256, ("manual",), "int8", "b"),
        model("f", 0.65, 128, ("manual",), "distill", "e"),
    ]
    report["reference"] = "b"
    rows = Cells(render(report)).rows
    shares = {row[0]: row[-1] for row in rows if len(row) == 7}
    assert shares == {
        "base": "", "a": "", "b": "", "c": "43.5 %", "d": "96.2 %", "e": "81.0 %", "b small": "", "f": "87.7 %",
    }  # fmt: skip
    words = " ".join(headline(report))
    assert "The b model has ndcg@10 0.741 on manual (0.051 untrained)" in words
    assert "The f model, with 50.0 % of the parameters (50.0 % outside the embeddings), keeps 87.7 % of" in words


def test_a_report_of_models_that_do_not_say_what_they_are_made_from_compares_none() -> None:
    report = full_report()
    for facts in report["models"]:
        del facts["kind"], facts["made_from"]
    rows = Cells(render(report)).rows
    assert ["distilled", "192", "0.713", "0.693 to 0.733", "0.570", "0.784"] in rows
    assert "The distilled model has ndcg@10 0.713 on manual" in " ".join(headline(report))


def test_a_set_that_came_after_the_data_shows_what_is_clean_of_it() -> None:
    report = full_report()
    report["overlap"] = {"phrases": {"rows": 12, "queries": 8, "of": 400}}
    report["models"][-1]["clean"] = {"phrases": {"192": 0.7012, "96": 0.6}}
    page = render(report)
    sentence = "The training rows are not screened for it: 12 training rows hold a text of it, 8 of 400 queries;"
    assert page.count(sentence) == 1
    assert "the clean part&#39;s ndcg@10 is in the column clean." in page
    rows = Cells(page).rows
    known = ["distilled", "192", "0.713", "0.693 to 0.733", "0.570", "0.784"]
    assert [*known, "96.2 %"] in rows, "the other set"
    assert [*known, "0.701", "96.2 %"] in rows
    assert ["pruned", "192", "0.322", "0.302 to 0.342", "0.258", "0.354", "not measured", "43.5 %"] in rows
    assert "not measured of not measured queries." in render({**report, "overlap": {"manual": {}}})
    del report["models"][-1]["clean"]
    page = render(report)
    assert f"{sentence[:-1]}." in page
    assert "column clean" not in page
    assert [*known, "0.701", "96.2 %"] not in Cells(page).rows


def test_hostile_text_is_shown_as_text() -> None:
    report = full_report((HOSTILE,))
    report |= dict.fromkeys(("name", "device", "root", "created"), HOSTILE)
    report["languages"] = {HOSTILE: 3}
    report["commands"] = {HOSTILE: HOSTILE}
    report["sources"] = {HOSTILE: {"task": HOSTILE, "rows": 1, "licence": HOSTILE}}
    report["training"] = {HOSTILE: report["training"]["stage1"]}
    report["seconds"] = {HOSTILE: 1.0}
    for facts in report["models"]:
        facts["name"] = HOSTILE + facts["name"]
    page = render(report)
    assert "<script" not in page
    assert "script" not in Cells(page).tags
    svgs = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert any("&lt;script&gt;alert('$x^2$')&lt;/script&gt;" in svg for svg in svgs), "not read as mathematics"


def test_terminal_table_holds_the_numbers_and_fits() -> None:
    report = full_report()
    lines = terminal_table(report).splitlines()
    assert max(map(len, lines)) <= TERMINAL_COLUMNS
    for line, facts in zip(lines[2:], report["models"], strict=True):
        expected = [facts["name"]]
        expected += [f"{facts[key] / 1e6:.1f}M" for key in ("parameters", "non_embedding_parameters")]
        for scores in facts["scores"].values():
            full, *smaller = scores.values()
            expected += [f"{full[metric]:.3f}" for metric in ("ndcg@10", "acc@1", "recall@10")]
            expected += [f"{values['ndcg@10']:.3f}" for values in smaller]
        assert line.split() == expected


def test_more_sets_than_fit_follow_below() -> None:
    table = terminal_table(full_report(tuple(f"set{i}" for i in range(5))))
    assert max(map(len, table.splitlines())) <= TERMINAL_COLUMNS
    assert table.count("distilled") == 3
    assert re.findall(r"set\d", table) == [f"set{i}" for i in range(5)]


def test_a_better_model_that_is_not_the_last_is_named() -> None:
    report = full_report()
    report["models"][1] = model("stage1", 0.8, 256, ("manual",), "train", "untrained")
    words = " ".join(headline(report))
    assert "Better than both: stage1 on manual (0.800)." in words
    assert "Better than both" not in " ".join(headline(full_report()))


def test_headline_says_what_was_gained_and_kept() -> None:
    words = " ".join(headline(full_report()))
    assert "4,321 training rows in 45 languages, of 5,000 read." in words
    assert "The stage2 model has ndcg@10 0.741 on manual (0.051 untrained)" in words
    assert "with 75.0 % of the parameters (75.0 % outside the embeddings), keeps 96.2 % of" in words
    assert "96.2 % of the score of stage2 on manual" in words
    assert "Its stages took 1 h 2 min on cpu (x86_64)." in words


def test_exits_are_shown_by_layers_and_dims(tmp_path: Path) -> None:
    report = full_report(("manual",))
    entry = report["models"][2]
    half = {"manual": {"256": {"ndcg@10": 0.7}, "32": {"ndcg@10": 0.6}}}
    entry |= {"layers": 28, "exits": {"14": half, "7": {"manual": {"256": {"ndcg@10": 0.5}}}}}
    page = render(report)
    assert "stage2 on manual: ndcg@10" in page
    rows = Cells(page).rows
    whole = ["28", "0.741", "0.691", "0.645", "0.602"]
    assert ["7", "0.500", *["not measured"] * 3] in rows
    assert ["14", "0.700", "not measured", "not measured", "0.600"] in rows
    assert whole in rows
    told = terminal_table(report).splitlines()
    at = told.index("stage2 on manual: ndcg@10 by layers and dims")
    assert told[at + 1].split() == ["layers", "256", "dims", "128", "dims", "64", "dims", "32", "dims"]
    assert [line.split()[0] for line in told[at + 2 : at + 5]] == ["7", "14", "28"]
    assert told[at + 4].split() == whole
    card = model_card(report, entry, load_info(tiny_model(tmp_path)))
    assert "f2llm cut --model MODEL_FOLDER --layers 7 --output FOLDER" in card
    assert "| layers | 256 dims | 128 dims | 64 dims | 32 dims |\n|---|---|---|---|---|\n| 7 | 0.500 |" in card
    other = model_card(report, report["models"][1], load_info(tmp_path))
    assert "Fewer layers" not in other
