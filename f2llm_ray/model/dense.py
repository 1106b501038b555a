"""A linear map from a text's pooled vector to its own: the `Dense` module of sentence-transformers.

It is part of the backbone here (`backbone.dense`), so that whatever trains, gathers, merges or moves a backbone's
weights does so with the map too; `engine.encode` puts it after pooling. In a folder it lies beside the backbone,
as sentence-transformers has it: a config.json and a model.safetensors of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from f2llm_ray.base.errors import RunError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from f2llm_ray.model.dims import Vectors

NAME = "dense"
"""Of the module in the backbone."""
PREFIX = f"{NAME}."
"""What the names of its weights start with in the backbone's state."""
KIND = "Dense"
WEIGHTS_FILE = "model.safetensors"
LINEAR = "linear."
"""What the names of its weights start with in its file."""
IDENTITY = "torch.nn.modules.linear.Identity"
SENTENCE = "sentence_embedding"
"""What sentence-transformers calls a text's vector among the features that modules hand on."""


@dataclass(frozen=True)
class Dense:
    """What a folder says of its map."""

    path: str
    """Its folder in the model's."""
    inputs: int
    outputs: int
    bias: bool

    @property
    def weights(self) -> str:
        """The file of its weights."""
        return f"{self.path}/{WEIGHTS_FILE}"


def dense_among(
    modules: Sequence[Mapping[str, Any]], read: Callable[[str], Any], place: str, files: tuple[str, str]
) -> Dense | None:
    """The map among a model's modules; None where it has none.

    Args:
        modules: the entries of modules.json.
        read: reads a JSON file of the model; None where it has none.
        place: what errors call the model.
        files: the names of the files that list the modules, and that hold the settings of one.

    Raises:
        RunError: there are several, one at another place than after pooling, or one that is no linear map alone.
    """
    kinds = [str(entry["type"]).rpartition(".")[2] for entry in modules]
    if KIND not in kinds:
        return None
    at = kinds.index(KIND)
    if kinds.count(KIND) > 1 or kinds[at - 1] != "Pooling":
        raise RunError(f"{place}/{files[0]}: found {', '.join(kinds)}; expected one Dense, right after Pooling")
    path = str(modules[at].get("path") or "")
    said = read(f"{path}/{files[1]}") or {}
    where = f"{place}/{path}/{files[1]}"
    inputs, outputs = said.get("in_features"), said.get("out_features")
    if not isinstance(inputs, int) or not isinstance(outputs, int):
        raise RunError(f"{where}: found in_features {inputs!r} and out_features {outputs!r}, expected numbers")
    activation = str(said.get("activation_function", "none said, which is Tanh"))
    if not (activation.startswith("torch.") and activation.endswith(".Identity")):
        raise RunError(f"{where}: found activation_function {activation}, expected {IDENTITY}: a linear map alone")
    if said.get("use_residual"):
        raise RunError(f"{where}: found use_residual true, expected false: a linear map alone")
    for name in ("module_input_name", "module_output_name"):
        if said.get(name) not in (None, SENTENCE):
            raise RunError(f"{where}: found {name} {said[name]!r}, expected {SENTENCE!r}")
    return Dense(path, inputs, outputs, bool(said.get("bias", True)))


def read_linear(said: Dense, path: str, dtype: torch.dtype) -> torch.nn.Linear:
    """The map from the file of its weights.

    Raises:
        RunError: the file cannot be read, or holds other weights than the config says.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: cannot be loaded: {error}") from None
    expected = {f"{LINEAR}weight": [said.outputs, said.inputs]} | (
        {f"{LINEAR}bias": [said.outputs]} if said.bias else {}
    )
    found = {name: list(value.shape) for name, value in state.items()}
    if found != expected:
        raise RunError(f"{path}: found weights {found}, expected {expected}")
    linear = torch.nn.Linear(said.inputs, said.outputs, bias=said.bias)
    linear.load_state_dict({name.removeprefix(LINEAR): value for name, value in state.items()})
    return linear.to(dtype)


def write_dense(folder: Path, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Writes the map's weights into its folder, and returns what its config.json says.

    Args:
        folder: gets the file.
        state: its weights by their names in the backbone.
    """
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    named = {LINEAR + name.removeprefix(PREFIX): value.contiguous() for name, value in state.items()}
    save_file(named, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    outputs, inputs = named[f"{LINEAR}weight"].shape
    return {
        "in_features": inputs,
        "out_features": outputs,
        "bias": f"{LINEAR}bias" in named,
        "activation_function": IDENTITY,
    }


def dense_of(backbone: PreTrainedModel) -> torch.nn.Module | None:
    """The map of a backbone; None where a text's vector is the pooled one."""
    found: torch.nn.Module | None = getattr(backbone, NAME, None)
    return found


def put_dense(backbone: PreTrainedModel, linear: torch.nn.Module) -> None:
    """Makes a map part of a backbone."""
    backbone.add_module(NAME, linear)


def end_in(backbone: PreTrainedModel, dims: int, place: str, mean: Vectors | None = None) -> None:
    """Makes a backbone's vectors have so many dims, by a new map where it has none: the identity at the start.

    Args:
        backbone: gets the map.
        dims: of its vectors.
        place: what errors call it.
        mean: what the bias starts as, 0 when unset: the mean of the vectors to learn. Those of many teachers lie
            close around it, and a cosine with it alone would be most of what the first steps learn.

    Raises:
        RunError: it has a map already, to another number of dims.
    """
    import torch

    has = vector_dims(backbone)
    if dense_of(backbone) is None:
        linear = torch.nn.Linear(has, dims)
        torch.nn.init.eye_(linear.weight)
        with torch.no_grad():
            linear.bias.copy_(torch.zeros(dims) if mean is None else torch.from_numpy(mean))
        put_dense(backbone, linear)
    elif has != dims:
        raise RunError(
            f"{place}: the student ends in a Dense module of {has} dims, its teacher's vectors have {dims}"
        )


def keep_dims(backbone: PreTrainedModel, dims: int) -> None:
    """Cuts a backbone's vectors to their first dims: rows of its map, or of the identity where it has none."""
    import torch

    has, hidden = dense_of(backbone), int(backbone.config.hidden_size)
    linear = torch.nn.Linear(hidden, dims, bias=getattr(has, "bias", None) is not None, dtype=backbone.dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(dims, hidden) if has is None else has.get_parameter("weight")[:dims])
        if linear.bias is not None and has is not None:
            linear.bias.copy_(has.get_parameter("bias")[:dims])
    put_dense(backbone, linear)


def vector_dims(backbone: PreTrainedModel) -> int:
    """The number of dims of a model's vectors: what its map gives, else the hidden size."""
    dense = dense_of(backbone)
    return int(backbone.config.hidden_size if dense is None else dense.out_features)  # type: ignore[arg-type]


def parts_of(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of a backbone's state without its map, and those of the map."""
    dense = {name: value for name, value in state.items() if name.startswith(PREFIX)}
    return {name: value for name, value in state.items() if name not in dense}, dense
