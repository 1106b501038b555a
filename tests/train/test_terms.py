"""The terms beside the contrastive loss equal slow float64 references, values and gradients, on 1 and 2 ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from f2llm_ray.train.losses import TextPlaces
from f2llm_ray.train.settings import Distill, TrainStage
from f2llm_ray.train.terms import TERMS, TermInputs, added_terms
from tests.train.ranks import on_two_ranks
from tests.train.test_losses import D, close, plain_side, side

WIDE, PROJECTED = D + 8, D + 5
PAPER = Distill(teacher="teacher")
LESSONS = {
    "paper": PAPER,
    "cosine": Distill(teacher="teacher", mse_weight=0, cosine_weight=1),
    "similarity": Distill(teacher="teacher", mse_weight=0, similarity_weight=1, similarity_temperature=0.2),
    "margin": Distill(teacher="teacher", mse_weight=0, margin_weight=1),
    "spread": Distill(teacher="teacher", mse_weight=0, spread_weight=1),
    "score_margin": Distill(teacher="teacher", mse_weight=0, score_margin_weight=1, score_scale=0.5),
    "score_kl": Distill(teacher="teacher", mse_weight=0, score_kl_weight=1, temperature=0.3),
    "all, weighted": Distill(
        teacher="teacher",
        mse_weight=0.5,
        cosine_weight=0.3,
        similarity_weight=0.2,
        similarity_temperature=0.1,
        margin_weight=0.4,
        spread_weight=0.6,
        score_margin_weight=0.01,
        score_kl_weight=0.1,
        temperatures={"retrieval": 0.2},
    ),
}
Side = tuple[torch.Tensor, torch.Tensor, torch.Tensor, TextPlaces]


def learner(seed: int) -> Side:
    """One rank's student vectors, their projections, the teacher's vectors, and places, some texts twice."""
    v_nd, places = side(seed)
    generator = torch.Generator().manual_seed(100 + seed)
    matrix = torch.randn(D, PROJECTED, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    teacher = torch.randn(len(v_nd), WIDE, dtype=torch.float64, generator=generator)
    return v_nd, v_nd @ matrix, teacher, places


def scores_of(places: TextPlaces) -> torch.Tensor:
    """A score of each row's passage and negatives [b, 1 + k]; some negatives were mined, and have none."""
    rows, count = places.negative_bk.shape
    generator = torch.Generator().manual_seed(int(places.query_id_b.sum()))
    scores_bk = 3 * torch.randn(rows, 1 + count, dtype=torch.float64, generator=generator)
    scores_bk[:, 1:][places.negative_bk < 0] = math.nan
    scores_bk[3, 1] = math.nan
    scores_bk[4, 1:] = math.nan
    return scores_bk


def terms_of(
    v_nd: torch.Tensor, matched: torch.Tensor, teacher: torch.Tensor, places: TextPlaces, lesson: Distill
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return added_terms(
        TermInputs(
            v_nd=v_nd,
            places=places,
            settings=lesson,
            scores_bk=scores_of(places),
            matched_nD=matched,
            teacher_nD=teacher,
        )
    )


def reference(sides: list[Side], lesson: Distill) -> tuple[torch.Tensor, dict[str, float]]:
    """The terms of the global batch, one text and one pair at a time."""
    errors, angles, rows, margins, score_margins, score_rows = [], [], [], [], [], []
    passages = [(v[p], t[p]) for v, _, t, places in sides for p in places.passage_b]
    for v, matched, teacher, places in sides:
        texts = [*places.query_b, *places.passage_b, *(n for n in places.negative_bk.flatten() if n >= 0)]
        for n in texts:
            mine, theirs = matched[n], teacher[n][: matched.shape[1]]
            errors.append(sum((a - b) ** 2 for a, b in zip(mine, theirs, strict=True)) / len(mine))
            angles.append(1 - (mine @ theirs) / (mine.norm() * theirs.norm()))
        for q in places.query_b:
            own, others = (
                torch.stack([x[q] @ p[at] / (x[q].norm() * p[at].norm()) for p in passages])
                for at, x in enumerate((v, teacher))
            )
            own, others = own / lesson.similarity_temperature, others / lesson.similarity_temperature
            own, others = own - own.exp().sum().log(), others - others.exp().sum().log()
            rows.append((others.exp() * (others - own)).sum())
        for row, column in (places.negative_bk >= 0).nonzero().tolist():
            q, p, n = places.query_b[row], places.passage_b[row], places.negative_bk[row, column]
            mine, theirs = (cosine(x[q], x[p]) - cosine(x[q], x[n]) for x in (v, teacher))
            margins.append((mine - theirs) ** 2)
        temperature = lesson.temperatures.get("retrieval", lesson.temperature)
        for q, p, negatives, scores in zip(
            places.query_b, places.passage_b, places.negative_bk, scores_of(places), strict=True
        ):
            own = [(p, scores[0]), *((n, s) for n, s in zip(negatives, scores[1:], strict=True) if not s.isnan())]
            if len(own) == 1:
                continue
            logits = [cosine(v[q], v[text]) / temperature for text, _ in own]
            wanted = [score * lesson.score_scale for _, score in own]
            score_margins += [
                ((logits[0] - mine) - (wanted[0] - theirs)) ** 2
                for mine, theirs in zip(logits[1:], wanted[1:], strict=True)
            ]
            student, target = (torch.stack(x) - torch.stack(x).exp().sum().log() for x in (logits, wanted))
            score_rows.append((target.exp() * (target - student)).sum())
    spread = []
    for role in ("query", "passage"):
        texts = [
            (v[place], int(number))
            for v, _, _, places in sides
            for place, number in zip(getattr(places, f"{role}_b"), getattr(places, f"{role}_id_b"), strict=True)
        ]
        spread.append(torch.stack([cosine(a, b) ** 2 for a, i in texts for b, j in texts if i != j]).mean())
    found = {"mse": errors, "cosine": angles, "similarity": rows, "margin": margins}
    found |= {"score_margin": score_margins, "score_kl": score_rows}
    means = {name: torch.stack(x).mean() for name, x in found.items()} | {"spread": sum(spread, torch.tensor(0.0))}
    total = torch.stack([getattr(lesson, f"{name}_weight") * mean for name, mean in means.items()]).sum()
    used = {name: float(mean.detach()) for name, mean in means.items() if getattr(lesson, f"{name}_weight")}
    return total, used


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a @ b) / (a.norm() * b.norm())


def ours(one: Side, lesson: Distill, *, project: bool) -> dict[str, Any]:
    v_nd, matched, teacher, places = one
    v_nd = v_nd.clone().requires_grad_()
    matched = matched.clone().requires_grad_() if project else v_nd
    loss, terms = terms_of(v_nd, matched, teacher, places, lesson)
    loss.backward()
    gradients = [x.grad if x.grad is not None else torch.zeros_like(x) for x in (v_nd, matched)]
    return {"loss": loss.detach(), "gradients": gradients, "terms": terms}


def expected(
    sides: list[Side], lesson: Distill, *, project: bool
) -> tuple[torch.Tensor, dict[str, float], list[Any]]:
    leaves = []
    for v, matched, _, _ in sides:
        v = v.clone().requires_grad_()  # noqa: PLW2901
        leaves.append((v, matched.clone().requires_grad_() if project else v))
    total, terms = reference([(*leaf, t, p) for leaf, (_, _, t, p) in zip(leaves, sides, strict=True)], lesson)
    total.backward()
    gradients = [[x.grad if x.grad is not None else torch.zeros_like(x) for x in leaf] for leaf in leaves]
    return total.detach(), terms, gradients


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("name", LESSONS)
def test_one_rank_equals_the_reference(name: str, *, project: bool) -> None:
    one = learner(1)
    total, terms, gradients = expected([one], LESSONS[name], project=project)
    found = ours(one, LESSONS[name], project=project)
    close(found["loss"], total)
    assert {term: float(value) for term, value in found["terms"].items()} == pytest.approx(terms, abs=1e-9)
    for mine, slow in zip(found["gradients"], gradients[0], strict=True):
        close(mine, slow)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_ranks(_rank, tmp_path_factory.mktemp("ranks"))


def _rank(rank: int, port: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for name, lesson in LESSONS.items():
        for project in (False, True):
            found[f"{name} {project}"] = ours(learner(rank + 1), lesson, project=project)
    without = LESSONS["similarity"].model_copy(update={"gather_gradient": False})
    found["no gradient"] = ours(learner(rank + 1), without, project=False)
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("name", LESSONS)
def test_two_ranks_equal_the_reference(name: str, two_ranks: list[dict[str, Any]], *, project: bool) -> None:
    """Though the ranks have other numbers of texts: the mean over ranks is the global batch's."""
    sides = [learner(1), learner(2)]
    total, terms, gradients = expected(sides, LESSONS[name], project=project)
    found = [rank[f"{name} {project}"] for rank in two_ranks]
    close((found[0]["loss"] + found[1]["loss"]) / 2, total)
    for term, value in terms.items():
        assert float(found[0]["terms"][term] + found[1]["terms"][term]) / 2 == pytest.approx(value, abs=1e-9)
    for rank, slow in zip(found, gradients, strict=True):
        for mine, theirs in zip(rank["gradients"], slow, strict=True):
            close(mine / 2, theirs)  # the engine averages over ranks, which the reference has done


def test_gathered_passages_get_no_gradient_where_the_recipe_says_so(two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        close(rank["no gradient"]["loss"], rank["similarity False"]["loss"])
        assert not torch.allclose(rank["no gradient"]["gradients"][0], rank["similarity False"]["gradients"][0])


def test_the_papers_mse() -> None:
    """Where no text stands twice: the mean over all vectors as they are, against the teacher's first dims."""
    v_nd, places = plain_side(seed=1)
    teacher = torch.randn(len(v_nd), WIDE, dtype=torch.float64)
    loss, terms = terms_of(v_nd, v_nd, teacher, places, PAPER)
    close(loss, ((v_nd - teacher[:, :D]) ** 2).mean())
    assert list(terms) == ["mse"]


def test_a_student_like_its_teacher_has_nothing_to_learn() -> None:
    v_nd, _, _, places = learner(1)
    lesson = PAPER.model_copy(update={"cosine_weight": 1.0, "similarity_weight": 1.0, "margin_weight": 1.0})
    loss, _ = terms_of(v_nd, v_nd, v_nd.clone(), places, lesson)
    close(loss, torch.zeros((), dtype=torch.float64))
    # Cosine and similarity do not see lengths, the MSE does.
    loss, terms = terms_of(2 * v_nd, 2 * v_nd, v_nd.clone(), places, lesson)
    assert math.isclose(float(loss), float(terms["mse"]), abs_tol=1e-9)
    assert float(loss) > 0.1


def test_a_model_that_scores_as_the_scores_say_has_nothing_to_learn() -> None:
    """Whatever is added to all scores of a row: a cross-encoder's have no fixed zero."""
    v_nd, _, _, places = learner(1)
    unit_nd = torch.nn.functional.normalize(v_nd, dim=1)
    text_bk = torch.cat([places.passage_b[:, None], places.negative_bk], dim=1)
    logits_bk = (unit_nd[places.query_b][:, None] * unit_nd[text_bk]).sum(2) / 0.05
    scores_bk = (logits_bk + torch.arange(len(logits_bk))[:, None]).masked_fill(text_bk < 0, math.nan)
    stage = TrainStage(score_margin_weight=1, score_kl_weight=1)
    inputs = TermInputs(v_nd=v_nd, places=places, settings=stage, scores_bk=scores_bk)
    close(added_terms(inputs)[0], torch.zeros((), dtype=torch.float64))
    inputs = TermInputs(v_nd=v_nd, places=places, settings=stage, scores_bk=-scores_bk)
    assert min(added_terms(inputs)[1].values()) > 1


def test_every_term_has_a_weight_that_is_a_setting() -> None:
    assert {f"{name}_weight" for name in TERMS} <= Distill.model_fields.keys()
