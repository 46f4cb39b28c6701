"""Export to ONNX: the graph, its weights, the comparison with torch, and running it in ONNX Runtime."""

import os

# Since 1.29, ONNX Runtime on Linux sends telemetry unless this variable is set before the import. Only this package
# imports ONNX Runtime. Users who want telemetry set the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
