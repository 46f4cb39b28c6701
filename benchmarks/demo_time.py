"""Estimates how long `make demo` will take on this machine.

The work of the demo is known: passes of SmolLM2-135M over a known number of windows. The speed of the machine is
measured for about a second: matrix products in the precision that ARA would choose, with the shapes of that model.
Other work on the machine slows both down.
"""

from __future__ import annotations

import time

import torch

from ara.models.placement import choose_placement, torch_dtype

# Multiplications and additions of the demo (DEMO_FLAGS of the Makefile), as if it were matrix products only: it took
# about 490 s in float32 with AVX2 on 2 cores of an AMD EPYC, whose speed for such products is 192 GFLOP/s.
_WORK = 7.7e13
# Other work, in seconds on that processor: reading the GGUF file, decomposing, eigenproblems of the repair, writing.
_REST = 90.0
# Products of the model's widest layer for one window: (tokens, in) × (in, out).
_TOKENS, _IN, _OUT = 512, 576, 1536
_SECONDS = 1.0


def rate(dtype: torch.dtype) -> float:
    """Return the speed of matrix products on this machine in ``dtype``: multiplications and additions per second."""
    x, w = torch.randn(_TOKENS, _IN).to(dtype), torch.randn(_IN, _OUT).to(dtype)
    best = 0.0
    start = time.perf_counter()
    while time.perf_counter() - start < _SECONDS:
        began = time.perf_counter()
        for _ in range(5):
            x @ w
        best = max(best, 5 * 2 * _TOKENS * _IN * _OUT / (time.perf_counter() - began))
    return best


def main() -> None:
    placement = choose_placement("auto", "auto")
    if placement.device != "cpu":
        return
    minutes = (_WORK / rate(torch_dtype(placement.dtype)) + _REST) / 60
    print(f"This will take about {max(1, round(minutes))} minutes on this machine ({placement.why})", flush=True)


if __name__ == "__main__":
    main()
