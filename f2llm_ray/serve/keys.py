"""API keys: a file of their hashes, a comparison in constant time, and a rate for each key.

    python -m f2llm_ray.serve.keys search-team --file keys.txt --per-minute 6000

prints a new key once and adds its hash to the file. A line is `name:sha256[:requests per minute]`. Keys are 256
random bits, so that no key can be found from its plain SHA-256.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import logging
import math
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from f2llm_ray.base.errors import F2LLMError, RunError
from f2llm_ray.serve.api import ApiError

REREAD_S = 5.0
"""Seconds between looks at the file: an added or removed key counts within seconds, without a new deployment."""
LINE = re.compile(r"(?P<name>[\w.-]+):(?P<hash>[0-9a-f]{64})(?::(?P<per_minute>[1-9]\d*))?")

log = logging.getLogger("ray.serve")


@dataclass
class Key:
    """One key, and the requests that it has left (a bucket that holds a minute's worth)."""

    name: str
    digest: bytes
    per_minute: int | None
    left: float
    filled: float


class Keys:
    """The keys of a file, which may change while they are in use.

    Raises:
        RunError: no such file, a line of another form, a name or a key twice, or no key at all.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._keys = _read(self.path)
        self._changed = self._stamp()
        self._looked = time.monotonic()

    def admit(self, authorization: str | None) -> str:
        """Takes one request from the key in an `Authorization: Bearer` header and returns the key's name.

        Raises:
            ApiError: 401 for no key or an unknown one, 429 where none of its requests are left.
        """
        now = time.monotonic()
        if now - self._looked > REREAD_S:
            self._looked = now
            self._reread()
        scheme, _, given = (authorization or "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).digest()
        # Every key is compared, so that the time says nothing about which one came close.
        matches = [key for key in self._keys if hmac.compare_digest(key.digest, digest)]
        if scheme.lower() != "bearer" or not matches:
            found = "is not known here" if authorization else "is missing"
            raise ApiError(401, "invalid_api_key", f"the API key {found}; send it as Authorization: Bearer <key>")
        key = matches[0]
        if key.per_minute is not None:
            _take(key, key.per_minute, now)
        return key.name

    def _stamp(self) -> tuple[int, int]:
        found = self.path.stat()
        return found.st_mtime_ns, found.st_ino

    def _reread(self) -> None:
        try:
            changed = self._stamp()
            if changed == self._changed:
                return
            keys = _read(self.path)
        except (OSError, RunError) as error:
            log.warning("API keys stay as they were: %s", error)
            return
        used = {(key.name, key.digest): key for key in self._keys}
        for key in keys:
            before = used.get((key.name, key.digest))
            if before is not None and before.per_minute == key.per_minute:
                key.left, key.filled = before.left, before.filled
        self._keys, self._changed = keys, changed


def _take(key: Key, per_minute: int, now: float) -> None:
    key.left = min(per_minute, key.left + (now - key.filled) * per_minute / 60)
    key.filled = now
    if key.left < 1:
        wait = math.ceil((1 - key.left) * 60 / per_minute)
        message = f"key {key.name!r} may make {per_minute} requests a minute; try again in {wait} s"
        raise ApiError(429, "rate_limit_exceeded", message, retry_after=wait)
    key.left -= 1


def _read(path: Path) -> list[Key]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: the file of API keys cannot be read: {error}") from None
    keys: list[Key] = []
    now = time.monotonic()
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = LINE.fullmatch(line.strip())
        if found is None:
            # The line itself is not shown: it may be a key pasted by mistake.
            raise RunError(f"{path}: line {number} is not name:sha256 or name:sha256:requests-per-minute")
        per_minute = int(found["per_minute"]) if found["per_minute"] else None
        keys.append(Key(found["name"], bytes.fromhex(found["hash"]), per_minute, per_minute or 0, now))
    if not keys:
        raise RunError(f"{path}: it holds no API key; python -m f2llm_ray.serve.keys NAME --file {path} makes one")
    for what, values in (("name", [key.name for key in keys]), ("key", [key.digest for key in keys])):
        if len(set(values)) < len(values):
            raise RunError(f"{path}: the same {what} stands there twice")
    return keys


def new_key(path: Path, name: str, per_minute: int | None = None) -> str:
    """Makes a key, adds its hash to the file and returns the key; only its owner can read a new file.

    Raises:
        RunError: the name has other characters or is in the file already, or the file cannot be written.
    """
    key = f"f2-{secrets.token_urlsafe(32)}"
    line = f"{name}:{hashlib.sha256(key.encode()).hexdigest()}" + ("" if per_minute is None else f":{per_minute}")
    if LINE.fullmatch(line) is None:
        raise RunError(
            f"name {name!r}, {per_minute} a minute: expected letters, digits, '.', '_' and '-', and at least 1"
        )
    try:
        path.touch(mode=0o600)
        before = path.read_text(encoding="utf-8")
        if before and name in (known.name for known in _read(path)):
            raise RunError(f"{path}: there is a key of the name {name!r} already")
        with path.open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n" if before and not before.endswith("\n") else f"{line}\n")
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error}") from None
    return key


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m f2llm_ray.serve.keys", description="Makes an API key.")
    parser.add_argument("name", help="who uses the key; the access log has this name")
    parser.add_argument("--file", required=True, type=Path, help="file of hashes that the endpoint reads")
    parser.add_argument("--per-minute", type=int, help="requests a minute that one replica takes from it")
    given = parser.parse_args(arguments)
    try:
        key = new_key(given.file, given.name, given.per_minute)
    except F2LLMError as error:
        parser.exit(1, f"error: {error}\n")
    print(key)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
