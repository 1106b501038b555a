"""The Serve configs are what Serve reads and what our builders take, down to the names of deployments."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from f2llm_ray.base.errors import RunError
from f2llm_ray.serve import app, router
from f2llm_ray.serve.router import RouterArguments, find_models
from f2llm_ray.serve.served_model import Arguments, find_model
from tests.tiny import tiny_model

CONFIGS = sorted((Path(__file__).parents[2] / "serve_configs").glob("*.yaml"))


def test_they_are_all_here() -> None:
    assert {path.stem for path in CONFIGS} == {"quickstart", "family", "production"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("run") / "model")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_serve_and_our_builders_take_it(path: Path, folder: Path) -> None:
    content = yaml.safe_load(path.read_text())
    schema = ServeDeploySchema.model_validate(content)
    prefixes = [found.route_prefix for found in schema.applications]
    assert "/" in prefixes

    def local(args: dict[str, Any]) -> dict[str, Any]:
        """The same arguments with a model that is here."""
        models = {name: local(given) for name, given in args.get("models", {}).items()}
        args = {key: value for key, value in args.items() if key != "root"}
        return {**args, "models": models} if models else {**args, "model": str(folder)}

    for found in schema.applications:
        module, _, name = found.import_path.partition(":")
        built = getattr(import_module(module), name)(local(found.args))
        deployment = built._bound_deployment  # noqa: SLF001 (Serve gives its name in no other way)
        assert [override.name for override in found.deployments] == [deployment.name]
        known = set(DEPLOYMENT_FIELDS)
        for given in content["applications"][prefixes.index(found.route_prefix)]["deployments"]:
            assert set(given) <= known  # Serve would pass over a misspelt one


DEPLOYMENT_FIELDS = ServeDeploySchema.model_json_schema()["$defs"]["DeploymentSchema"]["properties"]


def test_the_open_ones_listen_on_loopback_and_the_other_asks_for_keys() -> None:
    for path in CONFIGS:
        content = yaml.safe_load(path.read_text())
        faces = [found for found in content["applications"] if found["route_prefix"] is not None]
        keyed = all(found["args"].get("keys") for found in faces)
        assert keyed or content["http_options"]["host"] == "127.0.0.1", path.name


def test_names_of_a_family_are_told_apart(folder: Path) -> None:
    one = {"model": str(folder), "name": "one"}
    found = find_models(RouterArguments.model_validate({"models": {"a": one, "b": {**one, "name": "two"}}}))
    assert (found.names, found.default) == ({"one": "a", "two": "b"}, "a")
    for args, message in (
        ({"models": {"a": one, "b": one}}, "'a' and 'b' are both asked for by the name 'one'"),
        ({"models": {"a": one, "b": {**one, "name": "x", "aliases": ["one"]}}}, "by the name 'one'"),
        ({"models": {"a": one}, "default": "b"}, "default: 'b' is not one of models: a"),
        ({"models": {}}, "models: Dictionary should have at least 1 item"),
        ({"models": {"a": {"name": "x"}}}, r"models\.a: .*set exactly one of root and model"),
        ({"models": {"a": one}, "start_wait_s": 0}, "start_wait_s: Input should be greater than 0"),
        ({"models": {"a": {"model": "/no"}}}, "/no: not a model folder"),
    ):
        with pytest.raises(RunError, match=message):
            router.build(args)


def test_a_card_without_a_report(folder: Path) -> None:
    card = find_model(Arguments(model=str(folder), max_tokens=10)).card
    assert (card.id, card.max_tokens, card.parameters, card.scores) == ("tiny", 10, None, {})
    assert "int8" not in card.embedding_types
    (folder.parent / "report.json").write_text(json.dumps({"models": [{"name": "x", "folder": "model"}]}))
    assert find_model(Arguments(root=str(folder.parent))).card.id == "tiny"
    broken = folder.parent / "broken"
    broken.mkdir()
    (broken / "f2llm.json").write_text("{}")
    with pytest.raises(RunError, match="not the facts of a model"):
        app.build({"model": str(broken)})
