"""Allocators: which rank each linear layer gets under one global budget; one file and one line per method."""

from ara.registry import Entry, Registry

ALLOCATORS = Registry(
    "allocator",
    [
        Entry(
            "uniform",
            "the same fraction of every layer",
            "ara.allocation.uniform:Uniform",
            "SVD-LLM, arXiv 2403.07378",
        ),
        Entry(
            "energy",
            "ranks that keep most of each layer's spectrum, dense where that pays more",
            "ara.allocation.energy:Energy",
            "spectral energy as in SVD-LLM V2, arXiv 2503.12340, with ARA's dense switch",
        ),
    ],
)
