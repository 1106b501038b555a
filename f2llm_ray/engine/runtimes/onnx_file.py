"""ONNX: `onnx/model.onnx` in float32, and `onnx/model_quantized.onnx` with int8 weights.

The names are those that sentence-transformers and transformers.js look for. torch's tracing exporter writes the
file; docs/decisions.md says why.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from f2llm_ray.base.errors import RunError
from f2llm_ray.base.optional import require
from f2llm_ray.engine.runtimes.proof import FLOAT, INT8, Ints, Run, prove
from f2llm_ray.model.dims import Vectors
from f2llm_ray.model.families import Pooling, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from f2llm_ray.engine.runtimes.golden import Golden
    from f2llm_ray.engine.runtimes.source import Source
    from f2llm_ray.model.checkpoint import ModelInfo

PACKAGES = ("onnx", "onnxruntime", "onnx_ir")
"""The last is what ONNX Runtime's quantization needs."""
INPUTS = ("input_ids", "attention_mask")
Output = Literal["last_hidden_state", "sentence_embedding"]
OUTPUTS: tuple[Output, ...] = get_args(Output)
FLOAT_FILE = "onnx/model.onnx"
INT8_FILE = "onnx/model_quantized.onnx"
OPSET = 17
ONE_FILE = 1_500_000_000
"""Bytes of weights from which they lie beside the graph, in `model.onnx_data`: a file may hold less than 2 GB."""
BLOCK = 32
"""Inputs of a linear map that share a scale in the int8 file."""
FLOAT32 = 1
"""ONNX Runtime's name for float32 activations beside int8 weights."""
TOP = 127
"""What the largest value of an int8 row of embeddings is."""


def write_float(backbone: PreTrainedModel, pooling: Pooling, folder: Path) -> None:
    """Writes the float32 file into an export's folder."""
    import torch

    from f2llm_ray.engine.runtimes.graph import Graph

    onnx = require("onnx", extra="export")
    texts = {0: "batch", 1: "sequence"}
    axes = {**dict.fromkeys(INPUTS, texts), OUTPUTS[0]: texts, OUTPUTS[1]: {0: "batch"}}
    # Shapes that are no 1 and differ, so that none is taken for a constant or for another.
    ids, mask = torch.zeros(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [1, 1, 0]])
    backbone.set_attn_implementation("sdpa")
    with tempfile.TemporaryDirectory(prefix="f2llm-") as place, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of traced Python branches, which the proof is there for
        path = Path(place) / "model.onnx"
        torch.onnx.export(
            Graph(backbone, pooling).eval(),
            (ids, mask),
            str(path),
            input_names=list(INPUTS),
            output_names=list(OUTPUTS),
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )
        save(onnx.load(path), folder / FLOAT_FILE)


def write_int8(folder: Path, embeddings: str) -> None:
    """Writes the int8 file beside the float32 one: weights of linear maps and embeddings, no activations.

    Activations stay float32: ONNX Runtime's dynamic quantization takes one scale for all of a batch, which makes a
    text's vector depend on the texts beside it. Linear maps go by its own tool, which knows no int8 embeddings;
    those are ours, in operators of ONNX's own.

    Args:
        folder: of an export.
        embeddings: the module of the input embeddings.
    """
    onnx = require("onnx", extra="export")
    tools = require("onnxruntime.quantization.matmul_nbits_quantizer", extra="export")
    model = onnx.load(folder / FLOAT_FILE)
    _int8_table(model, f"backbone.{embeddings}.weight")
    config = tools.DefaultWeightOnlyQuantConfig(
        block_size=BLOCK, is_symmetric=True, bits=8, accuracy_level=FLOAT32
    )
    quantizer = tools.MatMulNBitsQuantizer(model, algo_config=config)
    logging.getLogger(tools.__name__).setLevel(logging.WARNING)  # it says a line for every operator
    quantizer.process()
    save(quantizer.model.model, folder / INT8_FILE)


def save(model: Any, path: Path) -> None:
    """Writes an ONNX model, its weights beside it where one file cannot hold them."""
    onnx = require("onnx", extra="export")
    path.parent.mkdir(parents=True, exist_ok=True)
    large = sum(len(weight.raw_data) for weight in model.graph.initializer) > ONE_FILE
    onnx.save_model(
        model,
        path,
        save_as_external_data=large,
        all_tensors_to_one_file=True,
        location=f"{path.name}_data",
    )


def _int8_table(model: Any, name: str) -> None:
    """Makes an embedding int8 with one scale per entry; what is looked up becomes float32 again."""
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    (table,) = (weight for weight in graph.initializer if weight.name == name)
    (place,) = (place for place, node in enumerate(graph.node) if name in node.input)
    node = graph.node[place]
    ids, out = node.input[1], node.output[0]
    values_vd = numpy_helper.to_array(table)
    scale_v1 = np.maximum(np.abs(values_vd).max(1, keepdims=True), np.finfo(np.float32).tiny) / TOP
    codes_vd = np.round(values_vd / scale_v1).astype(np.int8)
    graph.initializer.remove(table)
    for kind, values in (("int8", codes_vd), ("scale", scale_v1.astype(np.float32))):
        graph.initializer.append(numpy_helper.from_array(values, f"{name}_{kind}"))
    del graph.node[place]
    made = [
        helper.make_node("Gather", [f"{name}_int8", ids], [f"{out}_int8"]),
        helper.make_node("Cast", [f"{out}_int8"], [f"{out}_float"], to=TensorProto.FLOAT),
        helper.make_node("Gather", [f"{name}_scale", ids], [f"{out}_scale"]),
        helper.make_node("Mul", [f"{out}_float", f"{out}_scale"], [out]),
    ]
    for number, entry in enumerate(made):
        graph.node.insert(place + number, entry)


def open_onnx(path: Path, *, threads: int = 0, output: Output = "sentence_embedding") -> Run:
    """An ONNX file as ONNX Runtime runs it on CPU; threads 0: as many as there are cores.

    Raises:
        RunError: it cannot be loaded, or has other inputs and outputs.
    """
    runtime = require("onnxruntime", extra="export")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # other work may want the cores
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - its errors have no base of their own
        raise RunError(f"{path}: ONNX Runtime does not load it: {str(error).splitlines()[0]}") from None
    inputs, outputs = ([value.name for value in found] for found in (session.get_inputs(), session.get_outputs()))
    if inputs != list(INPUTS) or outputs != list(OUTPUTS):
        raise RunError(f"{path}: found {inputs} and {outputs}, expected {list(INPUTS)} and {list(OUTPUTS)}")

    def run(ids_nt: Ints, mask_nt: Ints) -> Vectors:
        (values,) = session.run([output], dict(zip(INPUTS, (ids_nt, mask_nt), strict=True)))
        return np.asarray(values)

    return run


def write(source: Source, folder: Path) -> None:
    """Writes both files of a model into an export's folder."""
    write_float(source.backbone, source.info.pooling, folder)
    write_int8(folder, family_of(source.backbone.config).embeddings)


def proofs(folder: Path, golden: Golden, info: ModelInfo) -> dict[str, Any]:
    """The proof of each file (`proof.prove`).

    Raises:
        RunError: one does not hold.
    """
    return {
        name: prove(open_onnx(folder / name), golden, info.dims, bounds, str(folder / name))
        for name, bounds in ((FLOAT_FILE, FLOAT), (INT8_FILE, INT8))
    }
