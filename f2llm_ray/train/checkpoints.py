"""Checkpoints: weights, optimizer, random state and history of a step; each rank writes a part and its checksum.

DeepSpeed's own checkpoints are pickles of its flat partitions: they tie a run to its world size and to code that a
file may name. Ours hold, by parameter, what AdamW needs: the float32 weight and two moments, in safetensors. Whole
parameters are dealt out over the ranks, so that each writes about as much and any number of workers can read it.
12 bytes per trained parameter in all, as DeepSpeed's; gathering costs one all-reduce per tensor.

A checkpoint is a folder of `part-<rank>-of-<world>.safetensors`, and for each a `.json` with its size and SHA-256,
written after it: a part that was cut off or changed is found when it is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyarrow import fs

from f2llm_ray.base.checksum import sha256_of
from f2llm_ray.base.errors import RunError
from f2llm_ray.run.folder import Folder
from f2llm_ray.train.deepspeed import link_moments, read_state, set_learning_rate, trained, write_state
from f2llm_ray.train.lora import changed
from f2llm_ray.train.settings import Lora

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine

KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""What is saved of a parameter: its value, and the moments of AdamW by their names in torch."""
RAY_LIST = "checkpoint_manager_snapshot.json"
"""Ray Train's list of checkpoints (ray 2.60), beside the checkpoints."""
PART = re.compile(r"part-(\d+)-of-(\d+)\.json")

History = dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint with a file for each part; whether the parts are intact is checked when it is opened."""

    folder: Folder
    step: int
    """Steps done when it was written."""
    world: int
    history: History
    """The history that was passed to `save`."""

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.folder.path.rsplit("/", 1)[-1]


def save(engine: DeepSpeedEngine, folder: Path, *, rank: int, world: int, step: int, history: History) -> None:
    """Writes this rank's part of a checkpoint after `step` steps into an existing folder; every rank must call it.

    `history` has JSON values that belong to the step, the same on all ranks; the first one writes them.
    """
    import torch
    from safetensors.torch import save_file

    link_moments(engine)
    parameters = trained(engine.module)
    # `ds_numel`: of a parameter that ZeRO-3 has partitioned.
    owners = deal([int(getattr(value, "ds_numel", value.numel())) for _, value in parameters], world)
    tensors: dict[str, torch.Tensor] = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    for (name, parameter), owner in zip(parameters, owners, strict=True):
        for kind in KINDS:
            value = read_state(engine, parameter, kind)
            if owner == rank:
                tensors[f"{kind}/{name}"] = value.detach().cpu().contiguous()
    part = folder / f"{_part(rank, world)}.safetensors"
    save_file(tensors, part)
    seal: dict[str, Any] = {"step": step, "bytes": part.stat().st_size, "sha256": sha256_of(part)}
    if rank == 0:
        seal["history"] = history
    (folder / f"{_part(rank, world)}.json").write_text(json.dumps(seal))


def restore(engine: DeepSpeedEngine, checkpoint: Checkpoint, *, rank: int, world: int) -> None:
    """Restores the state of a checkpoint that `opened` has yielded; every rank must call it.

    The number of workers may differ from that at the time of writing. Where it is the same, the random state is
    restored too; otherwise it starts from the seed that the worker has set.
    """
    import torch
    from safetensors import safe_open

    _make_state(engine)
    path = Path(checkpoint.folder.path)
    parts = [_part(number, checkpoint.world) for number in range(checkpoint.world)]
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path / f"{part}.safetensors", "pt")) for part in parts]
        holder = {name: file for file in files for name in file.keys() if not name.startswith("random/")}  # noqa: SIM118
        for name, parameter in trained(engine.module):
            for kind in KINDS:
                write_state(engine, parameter, kind, holder[f"{kind}/{name}"].get_tensor(f"{kind}/{name}"))
        # ZeRO wraps the optimizer.
        for state in getattr(engine.optimizer, "optimizer", engine.optimizer).state.values():
            state["step"].fill_(checkpoint.step)
        if checkpoint.world == world:
            torch.set_rng_state(files[rank].get_tensor("random/cpu"))
            if torch.cuda.is_available() and "random/cuda" in files[rank].keys():  # noqa: SIM118
                torch.cuda.set_rng_state(files[rank].get_tensor("random/cuda"))


def _make_state(engine: DeepSpeedEngine) -> None:
    """Makes AdamW create its moments without moving a weight: a step of rate 0 along a gradient of 0."""
    import numpy as np

    set_learning_rate(engine, 0.0)
    engine.backward(engine([np.zeros(1, np.uint32)]).float().sum() * 0)
    engine.step()
    link_moments(engine)


def deal(sizes: Sequence[int], world: int) -> list[int]:
    """The rank that writes each parameter: from the largest on, each goes to the rank with the fewest elements."""
    owners, load = [0] * len(sizes), [0] * world
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        owners[index] = load.index(min(load))
        load[owners[index]] += sizes[index]
    return owners


def listed(folder: Folder) -> list[Checkpoint]:
    """The checkpoints in a folder that have all their parts, the latest step first."""
    found = []
    for checkpoint in map(folder.__truediv__, _folders(folder)):
        seals = [PART.fullmatch(name) for name in checkpoint.files(".json")]
        ranks = {int(seal[1]): int(seal[2]) for seal in seals if seal}
        world = len(ranks)
        if not world or ranks != dict.fromkeys(range(world), world):
            continue
        try:
            first = json.loads(checkpoint.read_bytes(f"{_part(0, world)}.json"))
            found.append(Checkpoint(checkpoint, int(first["step"]), world, first["history"]))
        except (OSError, ValueError, KeyError):
            continue
    return sorted(found, key=lambda c: (c.step, c.name), reverse=True)


@contextmanager
def opened(
    candidates: Sequence[Checkpoint], *, rank: int, world: int, say: Callable[[str], None]
) -> Iterator[Checkpoint | None]:
    """The first of the candidates whose parts are all intact, in a local folder while the context lasts, or None.

    Every rank must call it: each reads a share of the parts, and all take the same checkpoint.

    Args:
        candidates: checkpoints, the preferred one first; only those passed on the first rank count.
        rank: this worker.
        world: number of workers.
        say: prints a sentence for each checkpoint that is skipped, on the first rank.
    """
    with ExitStack() as stack:
        for checkpoint in _of_all(list(candidates), world)[0]:
            attempt = stack.enter_context(ExitStack())
            path = attempt.enter_context(_local(checkpoint.folder))
            numbers = range(rank, checkpoint.world, world)
            own = [flaw for number in numbers if (flaw := flaw_of(path, number, checkpoint.world))]
            flaws = list(chain(*_of_all(own, world)))
            if not flaws:
                yield replace(checkpoint, folder=Folder.at(str(path)))
                return
            attempt.close()
            if rank == 0:
                where = f"checkpoint {checkpoint.name} of step {checkpoint.step:,}"
                say(f"{where} is damaged ({flaws[0]}), passed over")
        yield None


@contextmanager
def weights(
    checkpoint: Checkpoint, lora: Lora | None = None
) -> Iterator[Callable[[str, torch.Tensor], torch.Tensor]]:
    """Reads single float32 weights of a checkpoint by their names in the backbone, outside of any engine.

    The function that it yields takes a name, and the weight's value before training: what training leaves as it
    was (`freeze_embeddings`) the checkpoint does not have, and with LoRA it has the change alone.

    Args:
        checkpoint: the checkpoint.
        lora: that of the stage.

    Raises:
        RunError: a part is damaged.
    """
    from safetensors import safe_open

    with _local(checkpoint.folder) as path, ExitStack() as stack:
        holder: dict[str, Any] = {}
        for number in range(checkpoint.world):
            flaw = flaw_of(path, number, checkpoint.world)
            if flaw is not None:
                raise RunError(
                    f"{checkpoint.folder.uri}: the checkpoint of step {checkpoint.step:,} is damaged: {flaw}"
                )
            part = path / f"{_part(number, checkpoint.world)}.safetensors"
            file = stack.enter_context(safe_open(part, "pt"))
            holder |= {name: file for name in file.keys() if name.startswith("weight/")}  # noqa: SIM118

        def find(name: str) -> torch.Tensor | None:
            key = f"weight/backbone.{name}"
            return holder[key].get_tensor(key) if key in holder else None

        yield lambda name, left: changed(name, left, lora, find)


def flaw_of(folder: Path, number: int, world: int) -> str | None:
    """What is wrong with a part of a checkpoint; None for an intact one."""
    part = folder / f"{_part(number, world)}.safetensors"
    try:
        seal = json.loads((folder / f"{_part(number, world)}.json").read_text())
        wanted, digest = int(seal["bytes"]), str(seal["sha256"])
        size = part.stat().st_size
        if size != wanted:
            return f"{part.name} has {size:,} bytes, not {wanted:,}"
        return None if sha256_of(part) == digest else f"{part.name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{part.name}: {type(error).__name__}"


def settle(folder: Folder, keep: int) -> None:
    """Repairs a folder of checkpoints before any worker starts.

    Ray Train refuses to start with a list of checkpoints that is damaged or names a deleted folder, which a kill
    at the wrong moment leaves behind. Such a list is deleted: `listed` finds checkpoints without it. Then folders
    that the list does not name are deleted, except the last `keep` complete ones.
    """
    names = _folders(folder)
    try:
        state = json.loads(folder.read_bytes(RAY_LIST)) if folder.exists(RAY_LIST) else {"checkpoint_results": []}
        known = {result["checkpoint_dir_name"] for result in state["checkpoint_results"]}
        sound = known <= set(names)
    except (ValueError, KeyError, TypeError):
        known, sound = set(), False
    if not sound:
        folder.filesystem.delete_file(f"{folder.path}/{RAY_LIST}")
        known = set()
    spared = {checkpoint.name for checkpoint in listed(folder)[:keep]}
    for name in set(names) - known - spared:
        folder.filesystem.delete_dir(f"{folder.path}/{name}")


def _folders(folder: Folder) -> list[str]:
    entries = folder.filesystem.get_file_info(fs.FileSelector(folder.path, allow_not_found=True))
    return sorted(
        e.base_name for e in entries if e.type == fs.FileType.Directory and e.base_name.startswith("checkpoint_")
    )


@contextmanager
def _local(folder: Folder) -> Iterator[Path]:
    if folder.local is not None:
        yield folder.local
        return
    import ray.train

    # Ray downloads once per node, however many workers it has.
    with ray.train.Checkpoint(folder.path, filesystem=folder.filesystem).as_directory() as path:
        yield Path(path)


def _of_all(value: Any, world: int) -> list[Any]:
    """The values of all ranks, in their order."""
    import torch

    values = [value]
    if world > 1:
        values = [None] * world
        torch.distributed.all_gather_object(values, value)
    return values


def _part(rank: int, world: int) -> str:
    return f"part-{rank:05d}-of-{world:05d}"
