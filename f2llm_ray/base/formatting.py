"""Numbers and lists in words, as the report, the data card and the terminal show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

NOT_MEASURED = "not measured"


def count(number: int | None) -> str:
    """A whole number with thousands apart."""
    return NOT_MEASURED if number is None else f"{number:,}"


def score(value: float | None) -> str:
    """A metric or loss, to three places."""
    return NOT_MEASURED if value is None else f"{value:.3f}"


def milliseconds(value: float | None) -> str:
    """A time to two digits that count, whole above ten."""
    if value is None:
        return NOT_MEASURED
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def share(part: float | None, whole: float | None) -> str:
    """A part of a whole in percent."""
    if part is None or whole is None:
        return NOT_MEASURED
    return f"{100 * part / whole:.1f} %" if whole else "–"


def size(number: float | None) -> str:
    """A number of parameters in four digits or so."""
    if number is None:
        return "-"
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.1f}{name}"
    return str(number)


def byte_size(number: float | None) -> str:
    """A number of bytes in kB, MB or GB."""
    if number is None:
        return NOT_MEASURED
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number / 1e3:.1f} kB"


def duration(seconds: float) -> str:
    """Seconds in the two largest units that they fill."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours:,} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def plural(number: int, word: str) -> str:
    """A number of things that take a plain s."""
    return f"{number:,} {word}" + ("" if number == 1 else "s")


def listed(parts: Sequence[str]) -> str:
    """One or more parts with commas and a last "and"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def tallied(numbers: Mapping[str, int]) -> str:
    """Names with their numbers, largest first; those of 0 are left out."""
    known = sorted(((name, number) for name, number in numbers.items() if number), key=lambda item: -item[1])
    return " · ".join(f"{name} {count(number)}" for name, number in known)


def ranked(numbers: Mapping[str, int]) -> dict[str, int]:
    """Names with their numbers, largest first and equal ones by name; those of 0 are left out."""
    known = ((name, number) for name, number in numbers.items() if number)
    return dict(sorted(known, key=lambda item: (-item[1], item[0])))


def clip(text: str, width: int) -> str:
    """The text, or its beginning and an ellipsis, in at most `width` characters."""
    return text if len(text) <= width else text[: width - 1] + "…"
