"""Keys are found by their hash alone, refused alike, counted by the minute, and may change while in use."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from f2llm_ray.base.errors import RunError
from f2llm_ray.serve import keys
from f2llm_ray.serve.api import ApiError
from f2llm_ray.serve.keys import Keys, new_key


class Clock:
    """Stands in for the module's clock, so that a minute passes at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(keys.time, "monotonic", lambda: self.now)


def test_a_key_is_known_and_the_file_does_not_hold_it(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    made = {name: new_key(path, name) for name in ("search", "team-2", "a.b_c")}
    assert len(set(made.values())) == 3
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = path.read_text()
    assert not any(key in text for key in made.values())
    known = Keys(str(path))
    for name, key in made.items():
        assert known.admit(f"Bearer {key}") == name
        assert known.admit(f"bearer  {key} ") == name
    digest = text.split(":")[1][:64]
    for wrong in (
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Basic {key}",
        key,
        f"Bearer {key}x",
        f"Bearer {digest}",
        "Bearer \udc80",
    ):
        with pytest.raises(ApiError) as caught:
            known.admit(wrong)
        assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
        assert key not in caught.value.message


def test_a_rate_is_a_bucket_that_fills_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    path = tmp_path / "keys.txt"
    free, bound = new_key(path, "free"), new_key(path, "bound", per_minute=3)
    known = Keys(str(path))
    for _ in range(3):
        known.admit(f"Bearer {bound}")
    for _ in range(10):
        known.admit(f"Bearer {free}")
    with pytest.raises(ApiError, match="3 requests a minute; try again in 20 s") as caught:
        known.admit(f"Bearer {bound}")
    assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "20"})
    clock.now += 17.5
    with pytest.raises(ApiError, match="try again in 3 s"):
        known.admit(f"Bearer {bound}")
    clock.now += 2.51
    known.admit(f"Bearer {bound}")
    clock.now += 3600  # an hour of rest is worth one minute's requests, not sixty
    for _ in range(3):
        known.admit(f"Bearer {bound}")
    with pytest.raises(ApiError):
        known.admit(f"Bearer {bound}")


def test_the_file_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    path = tmp_path / "keys.txt"
    first, bound = new_key(path, "first"), new_key(path, "bound", per_minute=1)
    known = Keys(str(path))
    known.admit(f"Bearer {bound}")
    second = new_key(path, "second")
    clock.now += 6
    assert known.admit(f"Bearer {second}") == "second"
    with pytest.raises(ApiError, match="a minute"):  # what was used stays used
        known.admit(f"Bearer {bound}")
    path.write_text("not a key\n")
    clock.now += 6
    assert known.admit(f"Bearer {first}") == "first"
    path.write_text("")
    last = new_key(path, "last")
    clock.now += 6
    assert known.admit(f"Bearer {last}") == "last"
    with pytest.raises(ApiError, match="is not known here"):
        known.admit(f"Bearer {first}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "it holds no API key"),
        ("# only words\n", "it holds no API key"),
        ("a:" + "0" * 63, "line 1 is not name:sha256"),
        ("\n# x\nf2-secret-pasted-here\n", "line 3 is not name:sha256"),
        ("a:" + "0" * 64 + ":0", "line 1 is not name:sha256"),
        (f"a:{'0' * 64}\na:{'1' * 64}", "the same name stands there twice"),
        (f"a:{'0' * 64}\nb:{'0' * 64}", "the same key stands there twice"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "keys.txt"
    path.write_text(content)
    with pytest.raises(RunError, match=message) as caught:
        Keys(str(path))
    assert "secret" not in str(caught.value)


def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    command = [sys.executable, "-m", "f2llm_ray.serve.keys", "web", "--file", str(path), "--per-minute", "60"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert Keys(str(path)).admit(f"Bearer {done.stdout.strip()}") == "web"
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr == f"error: {path}: there is a key of the name 'web' already\n"
    for name, rate in (("a b", None), ("a:b", None), ("", None), ("a", 0)):
        with pytest.raises(RunError, match="expected letters"):
            new_key(path, name, rate)
    with pytest.raises(RunError, match="cannot be read"):
        Keys(str(tmp_path / "none"))
