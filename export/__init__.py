"""Exports of compressed checkpoints to other runtimes; ONNX first."""

import os

# ONNX Runtime's Linux builds report every session to their maker unless told not to (since 1.29); it looks here when it
# is imported. Whoever wants that sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
