"""The checks, in the order in which they run."""

from __future__ import annotations

from benchmarks.gpu_check.running import CheckEntry

_HERE = "benchmarks.gpu_check"
# Seconds: most of 8 minutes, of which the installation takes the rest.
BUDGET = 390
# The shares are meant for one H100. The last check gets what the others leave of the budget.
CHECKS = (
    CheckEntry("tests", "the tests marked gpu", f"{_HERE}.marked:marked_tests", 60),
    CheckEntry("stages", "from decompose to eval: equal to the CPU", f"{_HERE}.stages:stages", 100),
    CheckEntry("parity", "ONNX fp16 graphs: equal to torch", f"{_HERE}.graphs:parity", 50),
    CheckEntry("binding", "ONNX: caches bound on the device", f"{_HERE}.graphs:binding", 15),
    CheckEntry("genai", "ONNX Runtime GenAI generates", f"{_HERE}.graphs:genai", 15),
    CheckEntry("speed-torch", "speed of LLaMA-7B's layers in torch", f"{_HERE}.speed:in_torch", 60),
    CheckEntry("speed-onnx", "speed of LLaMA-7B's layers in ONNX Runtime", f"{_HERE}.speed:in_onnx", 60),
    CheckEntry("vllm", "vLLM with the plugin: equal to torch", f"{_HERE}.serving:vllm", 60, with_vllm=True),
)
