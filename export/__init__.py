"""Exports of compressed checkpoints to other runtimes; ONNX first."""
