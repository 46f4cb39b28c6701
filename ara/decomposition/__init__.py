"""Decompositions: each method is one file and one line of this table.

A method turns a weight and statistics of its inputs into factors ``A`` (r, n) and ``B`` (m, r) with components in order
of importance: for every k, the first k components are the method's best approximation of rank k.
"""

from ara.registry import Entry, Registry

DECOMPOSITIONS = Registry(
    "decomposition",
    [
        Entry(
            "whitened",
            "least error of the layer's outputs on calibration text",
            "ara.decomposition.whitened:Whitened",
            "SVD-LLM, arXiv 2403.07378, truncation-aware whitening; computed without inverse or Cholesky",
        ),
        Entry(
            "two-sided",
            "least effect on the loss: weighted by inputs and by output gradients",
            "ara.decomposition.two_sided:TwoSided",
            "GFWSVD, arXiv 2505.17974; IO-SVD, arXiv 2605.15626; K-FAC, arXiv 1503.05671",
        ),
        Entry(
            "plain",
            "least error of the weight itself; needs no text",
            "ara.decomposition.plain:Plain",
            "Eckart and Young 1936",
        ),
        Entry(
            "asvd",
            "least error of the weight, columns scaled by mean activation",
            "ara.decomposition.asvd:ActivationScaled",
            "ASVD, arXiv 2312.05821",
        ),
    ],
)
