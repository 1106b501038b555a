"""Language codes: what catalogs and locales call a language, as the ISO 639-3 code that rows carry."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

UNKNOWN = "und"
CODE = "code:"
"""What the language of a programming language begins with, as in "code:python"."""

PROGRAMMING = frozenset(
    [
        "bash",
        "c",
        "c#",
        "c++",
        "cpp",
        "csharp",
        "dart",
        "elixir",
        "go",
        "haskell",
        "html",
        "java",
        "javascript",
        "js",
        "julia",
        "kotlin",
        "matlab",
        "objective-c",
        "perl",
        "php",
        "powershell",
        "python",
        "r",
        "ruby",
        "rust",
        "scala",
        "shell",
        "sql",
        "swift",
        "typescript",
    ]
)
"""Programming languages that data name without `CODE`, as CodeSearchNet and The Stack do. ISO has none of them;
"lua" and "ts" are codes of it, and so not here."""

SCRIPTS = {
    "aze",
    "bos",
    "hau",
    "kas",
    "kaz",
    "kir",
    "kur",
    "mon",
    "msa",
    "pan",
    "snd",
    "srp",
    "tat",
    "tgk",
    "tuk",
    "uig",
    "uzb",
    "zho",
    "cmn",
    "yue",
}
"""Languages that are written in several scripts, where the script tells texts apart."""

# Codes of two letters that ISO 639-1 has withdrawn or given to a group; its tables no longer list them.
_WITHDRAWN = {"bh": "bho", "in": "ind", "iw": "heb", "ji": "yid", "jw": "jav", "mo": "ron"}
_GROUPS_OF_ISO_639_2 = """
afa alg apa art ath aus bad bai bat ber bih bnt btk cai cau cel cmc cpe cpf cpp crp cus day dra fiu gem gme ijo inc
ine ira iro kar khi kro map mkh mno mun myn nah nai nic nub oto paa phi pra roa sai sal sem sgn sio sit sla smi son
ssa tai tup tut wak wen ypk znd"""
# Catalogs use them ("nah", "ber"): they name no one language, and are no mistake either.
_GROUPS = frozenset(_GROUPS_OF_ISO_639_2.split())
# Filipino is the standard form of Tagalog: catalogs and models use either code, and ISO 639-3 joins them nowhere.
_SAME = {"fil": "tgl"}


@lru_cache(maxsize=4096)
def iso639_3(code: str) -> str:
    """ISO 639-3 code of a language code or locale, such as "de", "pt_BR", "zh_Hans", "sr@latin", "ger".

    Script and territory are left out: rows tell languages apart, not their variants. Codes that ISO has
    withdrawn ("iw", "mol") are followed to their successor. A code that names no one language gives "und".
    """
    language = re.split(r"[_\-@.]", code.strip(), maxsplit=1)[0].lower()
    found = _entry(_WITHDRAWN.get(language, language))
    if found is None:
        return UNKNOWN
    return str(found.part3 if found.retire_date is None else found.retire_change_to or UNKNOWN)


@lru_cache(maxsize=4096)
def normal(said: str) -> str | None:
    """What data call a language, as rows carry it: ISO 639-3, with the script where it tells ("zho-Hans").

    It may be a code or a locale (`iso639_3`), a name of ISO 639-3 in English ("german"), or a programming
    language, as "code:<name>" or one of `PROGRAMMING`. The code of a group of languages gives "und".

    Returns:
        None for what names none.
    """
    text = said.strip()
    if text.lower().startswith(CODE):
        return text.lower()
    if text.lower() in PROGRAMMING:
        return f"{CODE}{text.lower()}"
    subtags = re.split(r"[_\-@.]", text)
    language = iso639_3(text)
    if language == UNKNOWN and subtags[0].lower() not in (UNKNOWN, *_GROUPS):
        named = _named(text)
        if named is None:
            return None
        language = str(named.part3)
    script = next((tag.title() for tag in subtags[1:] if re.fullmatch(r"[A-Za-z]{4}", tag)), None)
    return f"{language}-{script}" if script is not None and language in SCRIPTS else language


def _named(name: str) -> Any:
    import iso639

    for spelled in (name, name.title()):
        try:
            return iso639.Language.from_name(spelled)
        except iso639.LanguageNotFoundError:
            continue
    return None


@lru_cache(maxsize=4096)
def shortest(language: str) -> str:
    """The code of two letters of an ISO 639-3 one, by which the hub lists models; itself where there is none."""
    found = _entry(language)
    return str((found and found.part1) or language)


@lru_cache(maxsize=16_384)
def macrolanguage(language: str) -> str:
    """ISO 639-3 code of the macrolanguage that a language belongs to ("cmn" gives "zho"), or its own."""
    found = _entry(language)
    return str((found and found.macrolanguage) or _SAME.get(language, language))


def _entry(code: str) -> Any:
    """The language with this code in ISO 639-3, 639-2 (bibliographic) or 639-1; None for no such code."""
    import iso639  # 0.2 s, so not for those who read no row

    languages = iso639.Language
    for find in (languages.from_part3, languages.from_part2b, languages.from_part1):
        try:
            return find(code)
        except iso639.LanguageNotFoundError:
            continue
    return None
