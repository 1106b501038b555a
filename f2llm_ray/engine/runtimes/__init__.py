"""Other runtimes beside torch: a model as an ONNX or OpenVINO graph, its proof, and the engine that runs it."""
