"""Languages as a person reads them: the name in English beside the code."""

from __future__ import annotations

import re
from functools import lru_cache

from f2llm_ray.data.language import UNKNOWN


@lru_cache(maxsize=4096)
def named(language: str) -> str:
    """A language as rows carry it with its name, such as "deu (German)" or "zho-Hans (Chinese)".

    What ISO 639-3 has no name of stays as it is, such as "code:python".
    """
    import iso639

    if language == UNKNOWN:
        return f"{language} (not known)"
    try:
        name = iso639.Language.from_part3(language.partition("-")[0]).name
    except iso639.LanguageNotFoundError:
        return language
    return f"{language} ({re.sub(r' [(].*', '', name)})"  # without "(macrolanguage)" or years
