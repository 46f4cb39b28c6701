"""Allocators: one rank per linear layer under one global budget; one file and one line per method."""

from ara.registry import Entry, Registry

ALLOCATORS = Registry(
    "allocator",
    [
        Entry(
            "uniform", "the same fraction of every layer", "ara.allocation.uniform:Uniform", "SVD-LLM, arXiv 2403.07378"
        ),
        Entry(
            "energy",
            "ranks that keep most of each layer's spectrum, dense where that pays more",
            "ara.allocation.energy:Energy",
            "spectral energy as in SVD-LLM V2, arXiv 2503.12340, with ARA's dense switch",
        ),
        Entry(
            "sensitivity",
            "least loss, estimated for every rank by one backward pass",
            "ara.allocation.sensitivity:Sensitivity",
            "Fisher information of tail sums; the start of ARA",
        ),
        Entry(
            "ara",
            "learned: staircase masks trained under the budget",
            "ara.allocation.ara:Ara",
            "ARA, arXiv 2510.19389",
        ),
        Entry(
            "strs",
            "each layer's least rank below one perplexity, from single-layer probes",
            "ara.allocation.strs:Strs",
            "STRS of ASVD, arXiv 2312.05821",
        ),
        Entry(
            "dp-kl",
            "least sum of KL divergences of single-layer probes",
            "ara.allocation.dp_kl:DpKl",
            "probed KL of Duo-SVD, arXiv 2510.19385; knapsack of ROCKET, arXiv 2602.11008",
        ),
        Entry(
            "gumbel",
            "learned: one binary Gumbel-sigmoid mask per component",
            "ara.allocation.gumbel:Gumbel",
            "ARS, Adaptive Rank Selections, NAACL 2024",
        ),
        Entry(
            "tanh",
            "learned: one soft truncation position per layer",
            "ara.allocation.tanh:Tanh",
            "Dobi-SVD, arXiv 2502.02723",
        ),
    ],
)
