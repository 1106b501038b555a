"""Language codes: what catalogs and locales call a language, as the ISO 639-3 code that rows carry."""

from __future__ import annotations

import re
from functools import lru_cache

from f2llm_ray.base.optional import require

UNKNOWN = "und"
CODE = "code:"
"""What the language of a programming language begins with, as in "code:python"."""

# Filipino is the standard form of Tagalog: catalogs and models use either code, and ISO 639-3 joins them nowhere.
_SAME = {"fil": "tgl"}


@lru_cache(maxsize=4096)
def iso639_3(code: str) -> str:
    """ISO 639-3 code of a language code or locale, such as "de", "pt_BR", "zh_Hans", "sr@latin", "ger".

    Script and territory are left out: rows tell languages apart, not their variants. Codes that ISO has
    withdrawn ("iw", "mo") are followed to their successor. A code that names no language gives "und".

    Raises:
        DataError: pycountry or Babel is missing.
    """
    language = re.split(r"[_\-@.]", code.strip(), maxsplit=1)[0].lower()
    aliases = require("babel.core", extra="quickstart").get_global("language_aliases")
    return _assigned(language) or _assigned(aliases.get(language, "").partition("_")[0]) or UNKNOWN


@lru_cache(maxsize=16_384)
def macrolanguage(language: str) -> str:
    """ISO 639-3 code of the macrolanguage that a language belongs to ("cmn" gives "zho"), or the language itself.

    Raises:
        DataError: python-iso639 is missing.
    """
    library = require("iso639", extra="language-id")
    try:
        found = library.Language.from_part3(language).macrolanguage
    except library.LanguageNotFoundError:
        found = None
    return str(found or _SAME.get(language, language))


def _assigned(language: str) -> str | None:
    languages = require("pycountry", extra="quickstart").languages
    for standard in {2: ("alpha_2",), 3: ("alpha_3", "bibliographic")}.get(len(language), ()):
        entry = languages.get(**{standard: language})
        if entry is not None:
            return str(entry.alpha_3)
    return None
