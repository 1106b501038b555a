"""The stages `importance` and `pruned`: calibration text from the corpus, scores, and the smaller model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from f2llm_ray.base.progress import say
from f2llm_ray.data.drawn import calibration_tokens
from f2llm_ray.data.tokens.tokenizer import load_tokenizer
from f2llm_ray.engine.settings import Compute
from f2llm_ray.model.checkpoint import load_backbone, load_info, matryoshka_dims, save_model
from f2llm_ray.model.dense import dense_of
from f2llm_ray.model.families import family_of
from f2llm_ray.model.prune import Kept, choose, prune
from f2llm_ray.model.settings import Prune
from f2llm_ray.model.vocabulary import TokenMap, Vocabulary, composed, count_tokens, load_map, remap, save_map
from f2llm_ray.run.folder import Folder
from f2llm_ray.shrink import part_scores

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def score_parts(
    sources: Sequence[str],
    settings: Prune,
    compute: Compute,
    seed: int,
    *,
    prepared: Folder,
    parent: Folder,
    out: Folder,
) -> dict[str, Any]:
    """Scores the parts of the parent model, for any shape it is then pruned to.

    The sources give the calibration text. The stage's folder `out` gets importance.safetensors and .json.

    Returns:
        Facts for the manifest: the calibration's texts and tokens, and a summary of the scores.
    """
    calibration = remap(calibration_tokens(sources, seed, prepared, settings.calibration_rows), load_map(parent))
    say(f"importance: {settings.importance} scores, {len(calibration):,} texts")
    importance = part_scores.score(parent, calibration, settings, compute, seed=seed)
    facts = {
        "importance": settings.importance,
        "texts": len(calibration),
        "tokens": sum(map(len, calibration)),
        **part_scores.summary(importance),
    }
    with out.writing() as folder:
        part_scores.save(importance, folder, facts)
    return facts


def shrink(
    settings: Prune, model_name: str, *, place: str, prepared: Folder, parent: Folder, scored: Folder, out: Folder
) -> dict[str, Any]:
    """Prunes the parent model to the shape that the settings name, by the scores in the folder `scored`.

    `place` is where the recipe says them; `prepared` has the tokens that the texts use. The stage's folder `out`
    gets `model/`, and kept.json with the numbers of the parts that stay.

    Returns:
        Facts for the manifest: the kept layers and tokens.
    """
    with parent.as_local() as folder:
        info, tokenizer, backbone = load_info(folder), load_tokenizer(folder), load_backbone(folder).eval()
    table = load_map(parent)
    with scored.as_local() as folder:
        stays = family_of(backbone.config).first_layer_stays
        kept = choose(part_scores.load(folder), settings, first_layer_stays=stays, place=place)
    if settings.vocabulary is not None:
        wanted = settings.vocabulary if isinstance(settings.vocabulary, int) else None
        kept, tokenizer, table = _fewer_tokens(
            kept, tokenizer, table, prepared, backbone.config.vocab_size, wanted
        )
    small = prune(backbone, kept)
    mapped = dense_of(small) is not None
    dims = info.dims if mapped else matryoshka_dims(len(kept.hidden), info.dims[0])
    # What it was trained to be cut to is there where all of those layers stay, and others after them.
    exits = tuple(n for n in info.exits if n < len(kept.layers) and kept.layers[:n] == tuple(range(n)))
    # What pruning leaves ends near the space that its parent was taught to end in, but not in it.
    named = replace(info, name=model_name, dims=dims, exits=exits, space=None)
    with (out / "model").writing() as path:
        save_model(path, small, tokenizer, named)
        if table is not None:
            save_map(table, path)
    out.write_json("kept.json", {part: getattr(kept, part) for part in ("layers", "hidden", "ffn", "kv_heads")})
    return {"kept_layers": list(kept.layers), "vocabulary": small.config.vocab_size}


def _fewer_tokens(
    kept: Kept, tokenizer: Tokenizer, table: TokenMap | None, prepared: Folder, rows: int, wanted: int | None
) -> tuple[Kept, Tokenizer, TokenMap]:
    """Adds the tokens that stay, and gives their tokenizer and the map from the prepared tokens.

    The parent's vocabulary has so many rows, and its own map where it was pruned before.
    """
    with (prepared / "tokens").as_local() as store:
        counts = count_tokens(store, rows, table)
    vocabulary = Vocabulary(tokenizer)
    ids = vocabulary.choose(counts, wanted)
    small, after = vocabulary.cut(ids)
    return replace(kept, vocabulary=tuple(ids.tolist())), small, composed(table, after)
