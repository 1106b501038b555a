"""OpenVINO: `openvino/openvino_model.xml` and `.bin`, converted from the float32 ONNX file, float32 as well."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from f2llm_ray.base.errors import RunError
from f2llm_ray.base.optional import require
from f2llm_ray.engine.runtimes import onnx_file
from f2llm_ray.engine.runtimes.onnx_file import Output
from f2llm_ray.engine.runtimes.proof import FLOAT, Ints, Run, prove
from f2llm_ray.model.dims import Vectors

if TYPE_CHECKING:
    from f2llm_ray.engine.runtimes.golden import Golden
    from f2llm_ray.engine.runtimes.source import Source
    from f2llm_ray.model.checkpoint import ModelInfo

PACKAGES = ("openvino", "onnx")
FILE = "openvino/openvino_model.xml"


def write(source: Source, folder: Path) -> None:
    """Writes the file of a model into an export's folder; an ONNX file that is there is what it is made from."""
    openvino = require("openvino", extra="export")
    with tempfile.TemporaryDirectory(prefix="f2llm-") as place:
        onnx = folder / onnx_file.FLOAT_FILE
        if not onnx.is_file():
            onnx = Path(place) / onnx_file.FLOAT_FILE
            onnx_file.write_float(source.backbone, source.info.pooling, Path(place))
        (folder / FILE).parent.mkdir(parents=True, exist_ok=True)
        openvino.save_model(openvino.convert_model(onnx), folder / FILE, compress_to_fp16=False)


def open_openvino(path: Path, *, threads: int = 0, output: Output = "sentence_embedding") -> Run:
    """The file as OpenVINO runs it on CPU in float32; threads 0: as many as there are cores.

    Its default takes bf16 where the CPU has it, which is further from the model than the proof allows.

    Raises:
        RunError: it cannot be loaded, or has other inputs and outputs.
    """
    openvino = require("openvino", extra="export")
    hints = {"INFERENCE_PRECISION_HINT": "f32", **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
    try:
        compiled = openvino.Core().compile_model(str(path), "CPU", hints)
        names = [{value.any_name for value in found} for found in (compiled.inputs, compiled.outputs)]
    except RuntimeError as error:
        raise RunError(f"{path}: OpenVINO does not load it: {str(error).strip().splitlines()[-1]}") from None
    if names != [set(onnx_file.INPUTS), set(onnx_file.OUTPUTS)]:
        raise RunError(f"{path}: found {names}, expected {onnx_file.INPUTS} and {onnx_file.OUTPUTS}")
    request = compiled.create_infer_request()

    def run(ids_nt: Ints, mask_nt: Ints) -> Vectors:
        request.infer(dict(zip(onnx_file.INPUTS, (ids_nt, mask_nt), strict=True)))
        return np.array(request.get_tensor(output).data)

    return run


def proofs(folder: Path, golden: Golden, info: ModelInfo) -> dict[str, Any]:
    """The proof of the file (`proof.prove`).

    Raises:
        RunError: it does not hold.
    """
    return {FILE: prove(open_openvino(folder / FILE), golden, info.dims, FLOAT, str(folder / FILE))}
