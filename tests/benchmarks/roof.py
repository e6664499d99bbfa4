"""The roof: how many floating-point operations a second this machine's matmul reaches, in float32 and bfloat16.

    python -m tests.benchmarks.roof OUT

writes {"fp32": FLOP/s, "bf16": FLOP/s} as JSON. A process of its own, so that nothing of it stays in memory.
"""

import json
import sys
import time
from pathlib import Path

import torch

SIDES = (256, 512, 1024, 2048, 3072)
BUDGET = 1.0
"""Seconds that one matmul may take; a larger one is not tried, since some machines have no bf16 instructions."""
REPEATS = 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def rate(dtype: torch.dtype) -> float:
    """The best FLOP/s of x W' for square matrices over ``SIDES``; 2 n^3 operations each."""
    best = 0.0
    for side in SIDES:
        if best and 2 * side**3 / best > BUDGET:
            break
        a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
        torch.nn.functional.linear(a, b)
        for _ in range(REPEATS):
            began = time.perf_counter()
            torch.nn.functional.linear(a, b)
            best = max(best, 2 * side**3 / (time.perf_counter() - began))
    return best


def main() -> None:
    Path(sys.argv[1]).write_text(json.dumps({name: rate(dtype) for name, dtype in DTYPES.items()}))


if __name__ == "__main__":
    main()
