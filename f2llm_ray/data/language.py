"""Language codes: what catalogs and locales call a language, as the ISO 639-3 code that rows carry."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from f2llm_ray.base.optional import require

UNKNOWN = "und"
CODE = "code:"
"""What the language of a programming language begins with, as in "code:python"."""

# Codes of two letters that ISO 639-1 has withdrawn or given to a group; its tables no longer list them.
_WITHDRAWN = {"bh": "bho", "in": "ind", "iw": "heb", "ji": "yid", "jw": "jav", "mo": "ron"}
# Filipino is the standard form of Tagalog: catalogs and models use either code, and ISO 639-3 joins them nowhere.
_SAME = {"fil": "tgl"}


@lru_cache(maxsize=4096)
def iso639_3(code: str) -> str:
    """ISO 639-3 code of a language code or locale, such as "de", "pt_BR", "zh_Hans", "sr@latin", "ger".

    Script and territory are left out: rows tell languages apart, not their variants. Codes that ISO has
    withdrawn ("iw", "mol") are followed to their successor. A code that names no one language gives "und".

    Raises:
        DataError: python-iso639 is missing.
    """
    language = re.split(r"[_\-@.]", code.strip(), maxsplit=1)[0].lower()
    found = _entry(_WITHDRAWN.get(language, language))
    if found is None:
        return UNKNOWN
    return str(found.part3 if found.retire_date is None else found.retire_change_to or UNKNOWN)


@lru_cache(maxsize=4096)
def shortest(language: str) -> str:
    """The code of two letters of an ISO 639-3 one, by which the hub lists models; itself where there is none.

    Raises:
        DataError: python-iso639 is missing.
    """
    found = _entry(language)
    return str((found and found.part1) or language)


@lru_cache(maxsize=16_384)
def macrolanguage(language: str) -> str:
    """ISO 639-3 code of the macrolanguage that a language belongs to ("cmn" gives "zho"), or the language itself.

    Raises:
        DataError: python-iso639 is missing.
    """
    found = _entry(language)
    return str((found and found.macrolanguage) or _SAME.get(language, language))


def _entry(code: str) -> Any:
    """The language with this code in ISO 639-3, 639-2 (bibliographic) or 639-1; None for no such code."""
    library = require("iso639", extra="language-id")
    languages = library.Language
    for find in (languages.from_part3, languages.from_part2b, languages.from_part1):
        try:
            return find(code)
        except library.LanguageNotFoundError:
            continue
    return None
