"""The gradient of all trained parameters as one flat tensor.

The sum over ranks is taken here, on one tensor, and not by DistributedDataParallel. Only the adapter is trained, a few
megabytes, so there is nothing to gain from buckets whose exchange overlaps with the backward pass; DDP would broadcast
the frozen base at the start, and divide by the number of ranks, which a loss summed over uneven batches does not want.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Bucket:
    """``gradient`` [N] float32 holds every parameter's ``grad`` as a view, so that summing, measuring and clipping copy
    nothing. ``numbers`` [K] are a step's other sums, which travel between ranks with it; ``flat`` [N + K] is both.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], numbers: int) -> None:
        size = sum(parameter.numel() for parameter in parameters)
        self.flat = torch.zeros(size + numbers, dtype=torch.float32, device=parameters[0].device)
        self.gradient, self.numbers = self.flat[:size], self.flat[size:]
        start = 0
        for parameter in parameters:
            parameter.grad = self.gradient[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    def put(self, first: Tensor, others: Sequence[float]) -> None:
        """Fill ``numbers`` with a 0-d tensor, without waiting for it to be computed, and plain numbers."""
        self.numbers[0] = first
        for place, number in enumerate(others, start=1):  # a tensor of the CPU would wait for the device
            self.numbers[place].fill_(number)

    def read(self) -> list[float]:
        """``numbers`` and the norm of ``gradient``, waiting once for the device."""
        return torch.cat([self.numbers, self.gradient.norm()[None]]).tolist()
