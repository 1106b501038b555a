"""Publishing: what is sent is checked, named and licensed; what may not be sent is refused, and nothing is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.numpy import load_file, save_file

from f2llm_ray.base.errors import RunError
from f2llm_ray.commands.command_line import main
from f2llm_ray.commands.publish import parser, run
from f2llm_ray.engine.engine import Engine
from f2llm_ray.engine.text_engine import calibrate, save_calibration
from f2llm_ray.export.publish import Address, hub_upload, publish
from f2llm_ray.model.checkpoint import CALIBRATION_FILE, load_info
from f2llm_ray.report.model_card import model_card
from f2llm_ray.run.folder import Folder
from tests.tiny import LINES, tiny_model

REPO = "team/tiny-embed"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_model(tmp_path_factory.mktemp("made") / "model")
    engine = Engine(folder)
    save_calibration(Folder.at(str(folder)), calibrate(engine, engine.tokenize(LINES)))
    report = {"name": "run", "created": "2026-01-01", "languages": {"deu": 3, "eng": 5}}
    (folder / "README.md").write_text(model_card(report, {"name": "distilled"}, load_info(folder)))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


class Sent:
    """What reached the other end."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def __call__(self, folder: Path, repo: str) -> Address:
        self.files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}
        return Address(f"sent to {repo}", "c0ffee")


def test_the_copy_has_name_and_licence_and_the_folder_stays(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    sent = Sent()
    done = publish(folder, REPO, "apache-2.0", sent)

    assert done.address == (f"sent to {REPO}", "c0ffee")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert {name: len(content) for name, content in sent.files.items()} == done.files
    assert sent.files["model.safetensors"] == before[folder / "model.safetensors"]
    card = sent.files["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["license"], front["language"]) == ("apache-2.0", ["de", "en"])
    assert "license_name" not in front
    assert "MODEL_FOLDER" not in card
    assert f'SentenceTransformer("{REPO}"' in card


def test_a_dry_run_checks_and_lists(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(folder), "--repo", REPO, "--licence", "mit", "--dry-run"]
    assert main(parser(), run, argv) == 0
    told = capsys.readouterr().out
    assert "model.safetensors" in told
    assert "a dry run sends nothing" in told


def _no_card(folder: Path) -> None:
    (folder / "README.md").unlink()


def _field_gone(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("pipeline_tag: feature-extraction\n", ""))


def _other_licence(folder: Path) -> None:
    card = (folder / "README.md").read_text().replace("license: other\n", "license: cc-by-nc-4.0\n")
    (folder / "README.md").write_text(card)


def _pickled(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"")


def _link(folder: Path) -> None:
    (folder / "secret.txt").symlink_to("/etc/hostname")


def _no_calibration(folder: Path) -> None:
    (folder / CALIBRATION_FILE).unlink()


def _other_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: -value for name, value in weights.items()}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_no_card, "there is no model card"),
        (_field_gone, "no pipeline_tag"),
        (_other_licence, "'cc-by-nc-4.0', not 'apache-2.0'"),
        (_pickled, "ending in '.bin'"),
        (_link, "leads out of the folder"),
        (_no_calibration, "cannot be checked"),
        (_other_weights, "self-check failed"),
    ],
)
def test_what_must_not_be_sent_is_refused(folder: Path, harm: Callable[[Path], None], message: str) -> None:
    harm(folder)
    sent = Sent()
    with pytest.raises(RunError, match=message):
        publish(folder, REPO, "apache-2.0", sent)
    assert not sent.files


@pytest.mark.parametrize(
    ("repo", "licence"), [("tiny", "mit"), ("a/b/c", "mit"), (REPO, "other"), (REPO, "My own")]
)
def test_names_that_the_hub_would_not_take(folder: Path, repo: str, licence: str) -> None:
    with pytest.raises(RunError, match=r"^(repo|licence): found"):
        publish(folder, repo, licence)


def test_a_hub_that_is_not_there_is_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants
    from huggingface_hub import HfApi

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(HfApi, "token", "hf_planted", raising=False)
    with pytest.raises(RunError, match="the hub did not take it") as refused:
        publish(folder, REPO, "mit", hub_upload(private=True))
    assert "hf_planted" not in str(refused.value)
