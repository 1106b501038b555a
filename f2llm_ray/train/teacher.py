"""The teacher: its vectors of each text computed once, before the student trains, or beside it.

batches (of the student's stage) -> keys (of the distinct texts in them) -> vectors (in pieces, by actors that each
load the teacher, or ask it). Every step writes a file whole or not at all; a run that was cut off goes on with
those that are missing.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from f2llm_ray.base.errors import RunError
from f2llm_ray.base.progress import say
from f2llm_ray.base.session import connect
from f2llm_ray.data.batches.table import ORDER, BatchTable
from f2llm_ray.data.flow import Item, each, each_on_actors, start_actors
from f2llm_ray.data.keyed import META
from f2llm_ray.data.keys import distinct_keys
from f2llm_ray.data.schema import key_numbers
from f2llm_ray.data.tokens.build import INSTRUCTED, QUERY, read_prompts, write_own_store, write_store
from f2llm_ray.data.tokens.store import TokenStore, cut
from f2llm_ray.data.tokens.tokenizer import TOKENIZER, differences
from f2llm_ray.model.checkpoint import INFO_FILE, Space, check_prompts, fingerprint, load_info
from f2llm_ray.run.folder import Folder
from f2llm_ray.train import teacher_store, teachers
from f2llm_ray.train.loader import TrainBatch
from f2llm_ray.train.settings import Distill, TrainStage, is_endpoint
from f2llm_ray.train.teachers import (
    ChunkEncoder,
    Earlier,
    PieceEncoder,
    Teacher,
    chunk_keys,
    join_chunks,
    look_at,
    missing_chunks,
)
from f2llm_ray.train.training import Training, write_batches

if TYPE_CHECKING:
    import torch

    from f2llm_ray.engine.engine import Engine

BATCHES, VECTORS = "batches", "vectors"
"""Folders of the stage: the batch tables of the student's stage, and the store of the teacher's vectors."""
PLAN = "plan.json"


def teach(
    training: Training,
    *,
    prepared: Folder,
    mined: Folder | None,
    teacher: Folder | str,
    student: Folder,
    instructions: Mapping[str, str],
    max_tokens: int,
    shards: int,
    out: Folder,
    earlier: Folder | None = None,
) -> dict[str, Any]:
    """Computes the teacher's vectors of every text in the distillation's batches, held-out rows included.

    Args:
        training: the student's training, whose settings are `Distill`.
        prepared: folder of the prepare stage.
        mined: folder of the mining stage, where the student trains on its negatives.
        teacher: the teacher's model folder, or what else gives vectors (`teachers.look_at`).
        student: the student's model folder.
        instructions: the instruction of every prepared source by name, for a teacher that reads the texts anew.
        max_tokens: tokens after which its texts are cut, where it has a tokenizer.
        shards: number of key ranges of the stores.
        out: the stage's folder. It gets `batches/`, `vectors/`, `keys/`, and `tokens/` where the teacher reads
            other tokens than those of the prepared data, or the texts themselves.
        earlier: folder of an earlier stage in which the same teacher read the same texts in the same way; the
            vectors that it has are copied.

    Returns:
        Facts for the manifest: `texts` (distinct), `dims`, `bytes`, `own_tokenizer`; of this call `encoded_texts`,
        `encoded_tokens`, `texts_per_second` and the `seconds` of each step.

    Raises:
        RunError: no teacher, the texts that it needs are missing, or its vectors are too large for float16.
    """
    import ray

    settings, compute = training.settings, training.compute
    assert isinstance(settings, Distill)  # noqa: S101 - no other training has a teacher
    connect()
    seconds, started = {}, time.perf_counter()

    def lap(step: str) -> None:
        nonlocal started
        seconds[step], started = round(time.perf_counter() - started, 2), time.perf_counter()

    found = look_at(teacher, settings, read_prompts(prepared), out / "table")
    tokens = prepared / "tokens"
    own = _reads_anew(found, teacher, settings, prepared)
    if own:
        write = partial(
            write_store,
            instructions if found.instructed else dict.fromkeys(instructions),
            max_tokens,
            shards,
            found.tokenizer,
            prepared,
            prompts=found.prompts,
            # The others are no texts of this stage, and may read like one that has another prompt.
            queries=(INSTRUCTED,) if settings.instructions else (QUERY,),
        )
        name = teacher if isinstance(teacher, str) else teacher.uri
        tokens = write_own_store(write, name, prepared, out / "tokens")
        lap("tokens")
    vectors, threads = out / VECTORS, compute.threads_per_worker
    dims = learned_dims(settings, found.dims, load_info(student).dims[-1])
    known = None if earlier is None else earlier / VECTORS
    make: Callable[[], Callable[[Item], Item]]
    if found.texts is not None:
        make = partial(ChunkEncoder, found.texts, tokens, vectors, threads, dims, known)
    else:
        assert isinstance(teacher, Folder)  # noqa: S101 - what reads tokens is a model folder
        make = partial(PieceEncoder, teacher, tokens, vectors, threads, dims, compute.engine, known)
    gpus = compute.gpus_per_worker if found.local else 0
    start = partial(start_actors, make, compute.workers, num_cpus=compute.cpus_per_worker, num_gpus=gpus)
    # They load the model while the batches are made, where that leaves a core to make them with.
    spare = ray.cluster_resources().get("CPU", 0) - compute.workers * compute.cpus_per_worker
    actors = start() if spare >= 1 else None
    write_batches(training, prepared=prepared, mined=mined, out=out / BATCHES)
    lap("batches")
    counts = _collect_keys(tuple(training.sources), shards, out)
    lap("keys")
    pieces = _missing_pieces(counts, vectors)
    waiting = pieces if found.texts is None else missing_chunks(pieces, vectors)
    if isinstance(teacher, str) and is_endpoint(teacher):
        _say_what_is_sent(teacher, waiting, prepared, vectors, known, dims)
    done = list(each_on_actors("taught: encode", waiting, actors or start(), counted="texts"))
    if found.texts is not None:
        list(each("taught: join", pieces, partial(join_chunks, vectors=vectors), num_cpus=0.5))
    lap("encode")
    texts, nested = sum(counts.values()), len(found.dims) > 1
    trained = [dim for dim in found.dims if dim <= dims]
    facts = {"shards": len(counts), "texts": texts, "dims": dims, "nested": nested, "trained": trained}
    vectors.write_json(META, facts)
    encoded = sum(item["texts"] for item in done)
    return {
        "texts": texts,
        "dims": dims,
        "bytes": 2 * texts * dims,
        "own_tokenizer": own,
        "encoded_texts": encoded,
        "encoded_tokens": sum(item["tokens"] for item in done),
        "texts_per_second": round(encoded / max(seconds["encode"], 1e-9), 1) if encoded else None,
        "seconds": seconds,
    }


def _reads_anew(found: Teacher, teacher: Folder | str, settings: Distill, prepared: Folder) -> bool:
    """Whether the prepared tokens are not those that the teacher reads."""
    if isinstance(teacher, str) or found.texts is not None:
        return True
    other = found.prompts != read_prompts(prepared) or (settings.instructions and not found.instructed)
    return other or bool(differences(prepared / "tokenizer", teacher))


def _missing_pieces(counts: dict[int, int], vectors: Folder) -> list[Item]:
    """The pieces of the store that no earlier try has written."""
    there = set(vectors.files())
    return [
        {"shard": shard, "piece": piece, "texts": texts, "chunk": teachers.CHUNK}
        for shard, piece, texts in teacher_store.pieces(counts)
        if teacher_store.piece_file(shard, piece) not in there
    ]


def learned_dims(settings: Distill, teacher: Sequence[int], student: int) -> int:
    """How many of the teacher's dims the student learns from, given the dims that it was trained for.

    The first dims of a teacher that was not trained with matryoshka dims say little: of that one it learns all.
    """
    return min(student, teacher[-1]) if settings.teacher_is_cut and len(teacher) > 1 else teacher[-1]


def _say_what_is_sent(
    name: str, chunks: list[Item], prepared: Folder, vectors: Folder, earlier: Folder | None, dims: int
) -> None:
    """Says what an endpoint will be asked for, before it is: somebody may pay for it."""
    work = partial(_count_tokens, tokens=prepared / "tokens", vectors=vectors, earlier=earlier, dims=dims)
    counts = list(each("taught: count", chunks, work, num_cpus=0.5))
    texts, counted = (sum(item[what] for item in counts) for what in ("texts", "tokens"))
    say(f"taught: {name} is asked for {texts:,} texts of about {counted:,} tokens (by the run's tokenizer)")


def _count_tokens(item: Item, *, tokens: Folder, vectors: Folder, earlier: Folder | None, dims: int) -> Item:
    keys = Earlier(earlier, dims).missing(chunk_keys(vectors, item))
    with tokens.as_local() as folder:
        lengths = TokenStore(folder).lengths(keys)
    return {"texts": len(keys), "tokens": int(lengths.sum())}


def _collect_keys(sources: tuple[str, ...], shards: int, out: Folder) -> dict[int, int]:
    """Writes the distinct keys of all batches by range, and returns the number of keys of each range.

    Each epoch of each source is written as a sorted file first, so that a range is a slice of every one of them.
    """
    folder = out / "keys"
    if not folder.exists(PLAN):
        with (out / BATCHES).as_local() as batches:
            used: list[Item] = [
                {
                    "split": split,
                    "epoch": epoch,
                    "source": source,
                    "batches": numbers,
                    "part": f"{split}-{epoch}-{at}",
                }
                for split in ("train", "validation")
                for (epoch, at), numbers in _used(BatchTable(batches / split, sources)).items()
                for source in [sources[at]]
            ]
        list(each("taught: keys", used, partial(_part_keys, out=out), num_cpus=0.5))
        merge = partial(_shard_keys, out=out, parts=[item["part"] for item in used], shards=shards)
        found = list(each("taught: merge", [{"shard": shard} for shard in range(shards)], merge, num_cpus=0.5))
        folder.write_json(PLAN, {str(item["shard"]): item["texts"] for item in found})
    return {int(shard): count for shard, count in folder.read_json(PLAN).items()}


def _used(table: BatchTable) -> dict[tuple[int, int], list[int]]:
    """The batches that are trained on, by epoch and source: `max_steps` may leave some of the last epoch out."""
    used = defaultdict(list)
    for entry in table.order():
        used[int(entry["epoch"]), int(entry["source"])].append(int(entry["batch"]))
    return used


def _part_keys(item: Item, *, out: Folder) -> Item:
    with (out / BATCHES).as_local() as batches:
        table = BatchTable(batches / item["split"], (item["source"],))
        parts = []
        for number in item["batches"]:
            batch = table.batch(np.array((item["epoch"], 0, number), ORDER))
            columns = (batch["query"], batch["passage"], batch["negatives"].flatten())
            parts += [key_numbers(column) for column in columns]
        keys_n2, _ = distinct_keys(np.concatenate(parts))
    (out / "keys").write_array(f"{item['part']}.npy", np.ascontiguousarray(keys_n2.T))
    return {"part": item["part"]}


def _shard_keys(item: Item, *, out: Folder, parts: list[str], shards: int) -> Item:
    keys = ((out / "keys").read_array(f"{part}.npy") for part in parts)
    return {**item, "texts": teacher_store.write_keys(out / VECTORS, item["shard"], shards, keys)}


# While the student trains.


class TeacherVectors:
    """The vectors that the student learns to match.

    Args:
        dims: how many dims they have.
        nested: whether the first ones of them are vectors too, as matryoshka training makes them.
        engine: a frozen model that runs on the batch's texts, in bf16 on a GPU; without one, vectors that were
            computed before come with the batch.
    """

    def __init__(self, dims: int, engine: Engine | None = None, *, nested: bool = True) -> None:
        self.dims, self.engine, self.nested = dims, engine, nested

    def __call__(self, batch: TrainBatch) -> torch.Tensor:
        """Vectors [n, dims] of a batch's texts before normalization, in float32."""
        import torch

        if self.engine is None:
            assert batch.teacher is not None  # noqa: S101 - the loader was given the store
            return torch.from_numpy(batch.teacher.astype(np.float32))
        longest = self.engine.info.max_tokens
        with torch.no_grad():
            return self.engine.encode([cut(ids, longest) for ids in batch.tokens])


def teacher_of(*, model: Folder | None, vectors: Path | None, tokens_per_pass: int) -> TeacherVectors | None:
    """The teacher's vectors in a worker, of a model that runs there or from a store; None without a teacher.

    Args:
        model: model folder of an online teacher.
        vectors: the store of a cached one.
        tokens_per_pass: token budget of a forward pass.
    """
    if vectors is not None:
        store = teacher_store.TeacherStore(vectors)
        return TeacherVectors(store.dims, nested=store.nested)
    if model is None:
        return None
    from f2llm_ray.engine.engine import Engine

    with model.as_local() as folder:
        engine = Engine(folder, tokens_per_pass=tokens_per_pass)
    return TeacherVectors(engine.info.dims[-1], engine, nested=len(engine.info.dims) > 1)


def space_dims(settings: TrainStage, *, model: Folder | None, vectors: Folder | None) -> tuple[int, ...] | None:
    """The dims of the teacher, smallest first, where the student ends in its space; None where it does not.

    Args:
        settings: of the stage.
        model: model folder of an online teacher.
        vectors: the store of a cached one.
    """
    if not isinstance(settings, Distill) or not settings.joins_teacher:
        return None
    if vectors is not None:
        return teacher_store.trained_dims(vectors.read_json(META))
    assert model is not None  # noqa: S101 - the settings ask for the teacher's vectors
    return load_info(model).dims


def space_of(teacher: Folder) -> Space:
    """The space of a teacher that is a model folder."""
    name = load_info(teacher).name if teacher.exists(INFO_FILE) else teacher.path.rstrip("/").rpartition("/")[2]
    return Space(model=name, checksum=fingerprint(teacher))


def check_online(prepared: Folder, teacher: Folder) -> None:
    """Raises RunError for a teacher with another tokenizer or other prompts than the prepared data.

    It cannot read a batch.
    """
    other = differences(prepared / "tokenizer", teacher)
    if other:
        raise RunError(
            f"{teacher.uri}/{TOKENIZER}: not the tokenizer of the prepared data in {prepared.uri}; they differ in "
            f"{', '.join(other)}. A batch has the prepared tokens alone: set distill.teacher_vectors to cached"
        )
    advice = ": set distill.teacher_vectors to cached"
    check_prompts(load_info(teacher), read_prompts(prepared), teacher, advice)
