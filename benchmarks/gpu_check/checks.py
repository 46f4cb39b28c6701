"""The checks, in the order in which they run."""

from __future__ import annotations

from benchmarks.gpu_check.running import CheckEntry

_HERE = "benchmarks.gpu_check"
# Seconds on one H100. With the installation from a warm cache of wheels, all of it is to take less than 8 minutes.
CHECKS = (
    CheckEntry("tests", "the tests marked gpu", f"{_HERE}.marked:marked_tests", 60),
    CheckEntry("stages", "from decompose to eval: equal to the CPU", f"{_HERE}.stages:stages", 110),
    CheckEntry("parity", "ONNX fp16 graphs: equal to torch", f"{_HERE}.graphs:parity", 50),
    CheckEntry("binding", "ONNX: caches bound on the device", f"{_HERE}.graphs:binding", 15),
    CheckEntry("genai", "ONNX Runtime GenAI generates", f"{_HERE}.graphs:genai", 15),
    CheckEntry("speed-torch", "speed of LLaMA-7B's layers in torch", f"{_HERE}.speed:in_torch", 35),
    CheckEntry("speed-onnx", "speed of LLaMA-7B's layers in ONNX Runtime", f"{_HERE}.speed:in_onnx", 55),
    CheckEntry("vllm", "vLLM with the plugin: equal to torch", f"{_HERE}.serving:vllm", 60, with_vllm=True),
)
BUDGET = sum(check.seconds for check in CHECKS)
