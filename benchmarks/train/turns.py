"""Peers in turns, each in a process of its own, and our step behind the loader's Ray Data actor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch

from benchmarks.train.peers import CLOCKS, Peer, Step, bare_step, official_step, our_step
from benchmarks.train.setup import Place, tokens_of
from f2llm_ray.base.session import connect
from f2llm_ray.train.loader import TrainBatch, read, stream

KINDS = ("ours", "official", "sentence_transformers", "bare")


def work(kind: str, place: Place, pipe: Connection) -> None:
    """One peer's process: trains on the batches first..first+count when told to, and says how long it took."""
    torch.set_num_threads(1)
    known = list(read(place.table, place.store, rank=0, world=1))
    looked_up = read(place.table, place.store, rank=0, world=1)
    peer = Peer(place) if kind == "sentence_transformers" else None
    makers = {"ours": our_step, "official": official_step, "bare": bare_step}
    step = None if peer is not None else makers[kind](place)
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        first, count = asked
        some = known[first : first + count]
        if peer is not None:
            pipe.send(peer.seconds(some))
        elif step is not None:
            pipe.send(seconds(step, islice(looked_up, count) if kind == "ours" else some, CLOCKS[place.clock]))
        assert torch.get_num_threads() == 1  # noqa: S101 - no library may have changed it meanwhile


def seconds(step: Step, batches: Iterator[TrainBatch] | list[TrainBatch], now: Callable[[], float]) -> float:
    """Seconds that the steps take, taking the batches included."""
    started = now()
    for batch in batches:
        step(batch)
    return now() - started


def streamed(place: Place, first: int, steps: int) -> tuple[float, float]:
    """Real tokens per second, and the share of the time spent waiting, on batches from the loader."""
    torch.set_num_threads(1)
    connect()
    batches = stream(place.table, place.store, first_step=first, rank=0, world=1, prefetch=4)
    step, now = our_step(place), CLOCKS[place.clock]
    step(next(batches))
    taken, waited, started, begun = 0, 0.0, now(), time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        step(batch)
        taken += tokens_of([batch])
    return taken / (now() - started), waited / (time.perf_counter() - begun)


def turns(
    place: Place, known: list[TrainBatch], steps: int, rounds: int, kinds: Sequence[str] = KINDS
) -> dict[str, list[float]]:
    """Real tokens per second of each peer in each round, after a step that warms up."""
    context = get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for kind in kinds:
        pipes[kind], theirs = context.Pipe()
        processes.append(context.Process(target=work, args=(kind, place, theirs), daemon=True))
        processes[-1].start()
        theirs.close()  # so that the end of a process that fails is seen here
        pipes[kind].recv()
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(-1, rounds):
        first, count = (0, 1) if number < 0 else (1 + number * steps, steps)
        for kind, pipe in pipes.items():
            pipe.send((first, count))
            spent = pipe.recv()
            if number >= 0:
                found[kind].append(tokens_of(known[first : first + count]) / spent)
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(None)
        process.join()
    return found
