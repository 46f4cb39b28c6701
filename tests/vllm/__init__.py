"""Tests that run vLLM; where it is missing, they are skipped. ``make test-vllm`` has an environment with it."""
