"""Names of engines."""

from __future__ import annotations

from typing import Literal, get_args

EngineName = Literal["auto", "torch", "onnx", "openvino"]
"""What may be asked for."""
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
GraphName = Literal["openvino", "onnx"]
"""Engines that run a graph from a file, on CPU."""
