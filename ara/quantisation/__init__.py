"""Rounding of weights to few bits, with as little change of a layer's output as possible."""
