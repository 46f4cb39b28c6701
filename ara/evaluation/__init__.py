"""Evaluation: what a compressed model is worth (perplexity and speed), beside the dense one."""
