"""Every setting of a recipe says, where it is defined, whether it can change what its stage makes."""

from __future__ import annotations

import pytest

from f2llm_ray.base.section import Content, Neutral, Output, Section, effect_of
from f2llm_ray.recipe.files import sections_of
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.train.settings import Distill, TrainStage


def test_every_setting_is_marked() -> None:
    fields = [
        (section, name, field) for section in sections_of(Recipe) for name, field in section.model_fields.items()
    ]
    assert len(fields) > 150
    unmarked = [
        f"{section.__name__}.{name}"
        for section, name, field in fields
        if effect_of(field) is None and not sections_of(field)
    ]
    assert not unmarked, "mark them as Output, Batches, Neutral or Content (f2llm_ray/base/section.py)"


def test_settings_that_others_turn_on_name_such_a_setting() -> None:
    for section in sections_of(Recipe):
        for name, field in section.model_fields.items():
            effect = effect_of(field)
            if effect is not None and effect.only_with is not None:
                assert effect.only_with in section.model_fields, f"{section.__name__}.{name}"


class Inner(Section):
    """A section in a section."""

    depth: Output[int] = 1
    label: Neutral[str] = "x"


class Outer(Section):
    """One of each mark."""

    size: Output[int] = 2
    place: Content[str] = "here"
    inner: Inner = Inner()
    more: dict[str, Inner] = {}
    none: Inner | None = None


def test_the_identity_holds_what_can_change_the_output_and_nothing_else() -> None:
    assert Outer().identity() == {"size": 2, "inner": {"depth": 1}, "more": {}, "none": None}
    changed = Outer(place="there", inner=Inner(label="y"), more={"a": Inner(depth=3, label="z")})
    assert changed.identity() == {"size": 2, "inner": {"depth": 1}, "more": {"a": {"depth": 3}}, "none": None}


def test_an_unmarked_setting_has_no_identity() -> None:
    class Forgotten(Section):
        size: int = 1

    with pytest.raises(TypeError, match=r"Forgotten\.size: not marked"):
        Forgotten().identity()


def test_checkpoints_decide_the_model_only_where_the_best_one_is_exported() -> None:
    plain, other = TrainStage(checkpoint_every=10), TrainStage(checkpoint_every=20)
    assert plain.identity() == other.identity()
    best = [stage.model_copy(update={"keep_best": True}).identity() for stage in (plain, other)]
    assert best[0] != best[1]


def test_a_teachers_vectors_hang_on_the_batches_alone() -> None:
    def batches(**settings: object) -> dict[str, object]:
        return Distill.model_validate({"teacher": "a", **settings}).identity(lambda effect: effect.batches)

    assert batches() == batches(lr=1.0, mse_weight=0.5, temperature=0.1, keep_best=True, projection=True)
    for setting in ({"epochs": 2}, {"global_batch": 8}, {"negatives": {"retrieval": 1}}, {"instructions": False}):
        assert batches() != batches(**setting)
