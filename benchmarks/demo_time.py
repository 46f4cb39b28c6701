"""Says about how long `make demo` will take on this machine, before it begins.

The demo's work is known: passes of SmolLM2-135M over a known number of windows. How fast this machine multiplies
matrices is not, so that is measured for about a second, in the precision that ARA would choose and with the shapes of
that model. Other work on the machine slows both down.
"""

from __future__ import annotations

import time

import torch

from ara.models.placement import choose_placement, torch_dtype

# Multiplications and additions, as if all of the demo (DEMO_FLAGS of the Makefile) were products of this kind: it took
# 269 s in float32 with AVX2 on 2 cores of an AMD EPYC that does 192 GFLOP/s of them.
_WORK = 4.0e13
# What does not depend on that: reading the GGUF file, decomposing, writing, in seconds of that processor.
_REST = 60.0
# Products of the model's widest layer for one window: (tokens, in) × (in, out).
_TOKENS, _IN, _OUT = 512, 576, 1536
_SECONDS = 1.0


def rate(dtype: torch.dtype) -> float:
    """Return how many multiplications and additions per second this machine does, in ``dtype``."""
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
