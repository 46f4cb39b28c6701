"""Choosing ranks with the model at hand: switchable layers, sensitivity table, single-layer probes, trainable masks."""
