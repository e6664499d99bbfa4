"""The trained parameters and their gradient as flat tensors.

An adapter is hundreds of small matrices. As one tensor they are updated by one kernel instead of hundreds, which took
the 8-bit optimizers between a third and a twentieth of the time, and their gradient is summed over ranks, measured and
clipped as one. (PyTorch's FSDP calls such a tensor a FlatParameter.)

The sum over ranks is taken here and not by DistributedDataParallel: of a few megabytes there is nothing to gain from
buckets whose exchange overlaps with the backward pass; DDP would broadcast the frozen base at the start, and divide by
the number of ranks, which a loss summed over uneven batches does not want.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

BLOCK = 256
"""Each parameter begins at a multiple of so many numbers: the 8-bit optimizers' blocks of 256, which share a scale,
reach over no two matrices, so that state and update are those of the matrix by itself."""


class FlatParameters:
    """Parameters of one device, float32, in groups of one peak rate each.

    ``groups`` holds each group as one parameter, for the optimizer; the given ones become views of it, and their
    ``grad`` of ``gradient`` [N], so that nothing is copied between them. Zeros, which stay, fill the gaps. ``numbers``
    [K] are a step's other sums, which travel between ranks with the gradient; ``sums`` [N + K] is both.
    """

    def __init__(self, groups: Sequence[tuple[list[nn.Parameter], float]], numbers: int) -> None:
        sizes = [sum(map(_room, parameters)) for parameters, _ in groups]
        self.sums = torch.zeros(sum(sizes) + numbers, dtype=torch.float32, device=groups[0][0][0].device)
        self.gradient, self.numbers = self.sums[: sum(sizes)], self.sums[sum(sizes) :]
        self.groups: list[tuple[list[nn.Parameter], float]] = []
        place = 0
        for size, (parameters, rate) in zip(sizes, groups, strict=True):
            whole = nn.Parameter(torch.zeros_like(self.gradient[:size]))
            whole.grad = self.gradient[place : place + size]
            start = 0
            for parameter in parameters:
                end = start + parameter.numel()
                whole.data[start:end] = parameter.data.flatten()
                parameter.data = whole.data[start:end].view(parameter.shape)
                parameter.grad = whole.grad[start:end].view(parameter.shape)
                start += _room(parameter)
            self.groups.append(([whole], rate))
            place += size

    def put(self, first: Tensor, others: Sequence[float]) -> None:
        """Fill ``numbers`` with a 0-d tensor, without waiting for it to be computed, and plain numbers."""
        self.numbers[0] = first
        for place, number in enumerate(others, start=1):  # a tensor of the CPU would wait for the device
            self.numbers[place].fill_(number)

    def read(self) -> list[float]:
        """``numbers`` and the norm of ``gradient``, waiting once for the device."""
        return torch.cat([self.numbers, self.gradient.norm()[None]]).tolist()


def _room(parameter: nn.Parameter) -> int:
    return -(-parameter.numel() // BLOCK) * BLOCK
