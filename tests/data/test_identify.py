"""Laws of language identification, with the model that the package brings and with small ones made here."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from f2llm_ray.base.errors import DataError
from f2llm_ray.data.identify import CHARS, FOUND, MISMATCH, Identifier
from f2llm_ray.data.language import macrolanguage
from f2llm_ray.data.reading.base import rows_table
from f2llm_ray.data.schema import ROW
from f2llm_ray.data.settings import LanguageId

# Article 1 of the Universal Declaration of Human Rights, first sentence.
DECLARED = {
    "eng": "All human beings are born free and equal in dignity and rights.",
    "deu": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "fra": "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "tur": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar.",
    "rus": "Все люди рождаются свободными и равными в своём достоинстве и правах.",
    "ell": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "ara": "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.",
    "heb": "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
    "hin": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "tha": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "jpn": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "zho": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
    "kor": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
}


def row(query: str, language: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"query": query, "passage": "p", "language": language, **fields}


def tag(rows: list[dict[str, Any]], **values: Any) -> pa.Table:
    found = Identifier(LanguageId(**values)).tag(rows_table(rows, source="s", task="retrieval"))
    assert found.schema == pa.schema([*ROW, *FOUND])
    found.validate(full=True)
    return found


def column(rows: list[dict[str, Any]], name: str, **values: Any) -> list[Any]:
    return tag(rows, **values)[name].to_pylist()


def test_languages_of_many_scripts_are_found_and_filled_in() -> None:
    found = tag([row(text) for text in DECLARED.values()])
    assert found["detected"].to_pylist() == found["language"].to_pylist() == list(DECLARED)
    assert set(found["verdict"].to_pylist()) == {"filled"}
    assert all(0.5 <= confidence <= 1 for confidence in found["confidence"].to_pylist())
    assert column([row(DECLARED["eng"], "und")], "language") == ["eng"]


def test_claims_are_judged_and_kept_unless_the_recipe_drops_them() -> None:
    english = DECLARED["eng"]
    rows = [
        row(english, "eng"),
        row(english, "deu", passage_language="eng"),
        row(english, "nya"),  # lid.176 has no Chichewa, so what it finds says nothing about the claim
        row(english, "code:python"),
        row(english, "deu", drop="clean: query too short"),
    ]
    found = tag(rows)
    assert found["detected"].to_pylist() == ["eng", "eng", "eng", None, None]
    assert found["verdict"].to_pylist() == ["agrees", "differs", "unjudged", None, None]
    assert found["language"].to_pylist() == [r["language"] for r in rows]
    earlier = "clean: query too short"
    assert found["drop"].to_pylist() == [None, None, None, None, earlier]
    assert column(rows, "drop", drop="mismatch") == [None, MISMATCH, None, None, earlier]


def test_a_passage_tells_what_a_short_query_does_not() -> None:
    """But not where it is in a language of its own, or a label."""
    long = DECLARED["deu"]
    rows = [row("Hilfe", passage=long), row("Hilfe", "eng", passage=long), row(DECLARED["fra"], passage=long)]
    rows += [row("Hilfe", passage=long, passage_language="deu"), row("Hilfe", passage=long, drop="read: no")]
    assert column(rows, "detected") == ["deu", "deu", "fra", None, None]
    assert column(rows, "verdict") == ["filled", "differs", "filled", None, None]
    labelled = rows_table(rows[:1], source="s", task="classification")
    assert Identifier(LanguageId()).tag(labelled)["detected"].to_pylist() == [None]


@pytest.mark.parametrize(
    ("language", "claims"),
    [
        ("zho", ["zho", "cmn", "yue", "wuu"]),
        ("ara", ["ara", "arb", "arz"]),
        ("jpn", ["jpn"]),
        ("ell", ["ell"]),
    ],
)
def test_members_of_a_macrolanguage_agree(language: str, claims: list[str]) -> None:
    assert set(column([row(DECLARED[language], claim) for claim in claims], "verdict")) == {"agrees"}


@pytest.mark.parametrize(
    ("code", "members"),
    [
        ("zho", "cmn yue wuu lzh"),
        ("nor", "nob nno"),
        ("ara", "arb arz"),
        ("msa", "zsm ind"),
        ("swa", "swh"),
        ("est", "ekk"),
        ("lav", "lvs"),
        ("fas", "pes prs"),
        ("hbs", "hrv srp bos"),
        ("tgl", "fil"),
    ],
)
def test_macrolanguages(code: str, members: str) -> None:
    assert {macrolanguage(member) for member in [code, *members.split()]} == {code}


def test_languages_without_a_macrolanguage_are_their_own() -> None:
    assert [macrolanguage(code) for code in ("deu", "xyz", "und")] == ["deu", "xyz", "und"]


def test_short_texts_and_texts_without_letters_are_not_asked_about() -> None:
    short = ["", "a", "字", "Ja", "👩‍💻" * 30, "1234567890 " * 9, "%s %d — … " * 9]
    assert column([row(text, "deu") for text in short], "detected") == [None] * len(short)
    sentence = DECLARED["deu"]
    letters = sum(map(str.isalpha, sentence))
    assert column([row(sentence)], "detected", min_chars=letters) == ["deu"]
    assert column([row(sentence)], "detected", min_chars=letters + 1) == [None]
    long = "".join(f"{i} " for i in range(9)) + sentence * 60
    assert column([row(long)], "detected", min_chars=2 * CHARS) == ["deu"]


def test_each_language_may_have_its_own_threshold() -> None:
    rows = [row(DECLARED["deu"]), row(DECLARED["tur"])]
    assert column(rows, "detected", min_confidence=1, confidence={"deu": 0.5}) == ["deu", None]
    assert column(rows, "detected", min_confidence=0, confidence={"deu": 1}) == [None, "tur"]


def test_a_megabyte_takes_no_second_and_line_ends_do_not_matter() -> None:
    text = DECLARED["fra"]
    started = time.process_time()
    assert column([row(f"{text}\n\n" * (1_000_000 // len(text)))] * 3, "detected") == ["fra"] * 3
    assert time.process_time() - started < 1
    lines = [row(text.replace(" ", end)) for end in (" ", "\n", "\r\n", "\t", "\u2028")]
    assert len(set(column(lines, "confidence"))) == 1


odd = ["Save", "保存", "👩‍💻", "</s>", "__label__en", "\n", "%s", "\u202b", "\0"]
words = st.sampled_from([*DECLARED.values(), *odd])
claims = st.sampled_from([None, "und", "eng", "zho", "cmn", "nya", "code:go", "deu"])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.lists(words, max_size=4).map(" ".join), claims), max_size=12), st.randoms())
def test_a_row_is_judged_alone(entries: list[tuple[str, str | None]], random: Any) -> None:
    rows = [row(*entry) for entry in entries]
    order = random.sample(range(len(rows)), len(rows))
    found = tag(rows, drop="mismatch").to_pylist()
    assert tag([rows[i] for i in order], drop="mismatch").to_pylist() == [found[i] for i in order]
    for before, after in zip(rows, found, strict=True):
        claimed = before["language"]
        assert after["language"] == (after["detected"] if after["verdict"] == "filled" else claimed)
        assert (after["drop"] == MISMATCH) == (after["verdict"] == "differs")
        assert claimed != "code:go" or after["detected"] is None
        if after["verdict"] == "agrees":
            assert macrolanguage(claimed) == macrolanguage(after["detected"])
        assert (after["detected"] is None) == (after["confidence"] is None) == (after["verdict"] is None)


def test_no_rows_are_no_rows() -> None:
    assert len(tag([])) == 0


# --- other models -----------------------------------------------------------------------------------------


def write_model(path: Path, words: dict[str, int], labels: list[str]) -> str:
    """A fastText classifier, version 12, uncompressed, with softmax: each word points at one label."""
    dim = len(labels)
    ends, softmax, supervised = 0, 3, 3
    data = struct.pack("<2i", 793712314, 12)
    data += struct.pack("<12id", dim, 5, 5, 1, 5, 1, softmax, supervised, ends, 0, 0, 100, 1e-4)
    entries = [(word, 0) for word in ["</s>", *words]] + [(f"__label__{label}", 1) for label in labels]
    data += struct.pack("<3i2q", len(entries), len(words) + 1, dim, len(entries), -1)
    for name, kind in entries:
        data += name.encode() + b"\0" + struct.pack("<qb", 1, kind)
    vectors = np.zeros((len(words) + 1, dim), np.float32)
    for place, label in enumerate(words.values(), start=1):
        vectors[place, label] = 20
    for matrix in (vectors, np.eye(dim, dtype=np.float32)):
        data += struct.pack("<?2q", False, *matrix.shape) + matrix.tobytes()
    path.write_bytes(data)
    return str(path)


def test_labels_with_scripts_are_iso_codes(tmp_path: Path) -> None:
    labels = ["als_Latn", "cmn_Hani", "zxx_Zxxx", "und_Latn"]
    path = write_model(tmp_path / "model.bin", {"po": 0, "你": 1, "beep": 2, "blah": 3}, labels)
    rows = [row("po " * 20), row("你 " * 20, "zho"), row("beep " * 20, "eng"), row("blah " * 20, "eng")]
    found = tag(rows, model=path)
    assert found["detected"].to_pylist() == ["als", "cmn", None, None]
    assert found["verdict"].to_pylist() == ["filled", "agrees", None, None]
    assert column(rows[:1], "detected", model=f"local://{path}") == ["als"], "a model in an object store"


def test_labels_of_wikipedias_are_not_iso_codes(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.bin", {"isch": 0, "the": 1, "a": 2}, ["als", "en", "nah"])
    rows = [row(f"{word} " * 20) for word in ("isch", "the", "a")]
    assert column(rows, "detected", model=path) == ["gsw", "eng", None]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no model", None])
def test_a_file_that_is_no_model_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"language_id\.model .*model\.bin: "):
        Identifier(LanguageId(model=str(path)))
    with pytest.raises(DataError, match="Protocol not known"):
        Identifier(LanguageId(model="nowhere://model.bin"))


def test_a_model_that_is_no_classifier_is_named(tmp_path: Path) -> None:
    path = Path(write_model(tmp_path / "model.bin", {"a": 0}, ["en"]))
    data = bytearray(path.read_bytes())
    data[8 + 7 * 4] = 1  # the kind of model: continuous bag of words
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"model\.bin: found a damaged fastText model"):
        tag([row("a " * 20)], model=str(path))
