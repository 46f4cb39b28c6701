"""Export to ONNX: the graph, its weights, its proof, and running it in ONNX Runtime."""
