"""Matrices as products of two thin ones: the best of a given rank, and a product made thinner.

Legend: out, in the matrix's rows and columns (of a convolution in * kh * kw columns), r the rank.
The best approximation of rank r, in the Frobenius norm, keeps the r largest singular values (Eckart and Young 1936).
What it keeps is told as a share: the sum of the squares of those kept over the sum of all squares.
"""

import torch
from torch import Tensor

LARGE = 1024
"""Rows and columns from which on all singular values of a matrix take too long."""
SETTLED = 1e-7
"""Rise of the kept share in a round that no longer counts."""
ROUNDS = 100
BLOCK = 512
"""Rows of a large matrix that are in float64 at a time."""


def _halves(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """B [out, r] and A [r, in], each with the roots of the singular values, and the share of the squares kept."""
    root = s[:rank].sqrt()
    total = float(s.square().sum())
    share = float(s[:rank].square().sum()) / total if total else 1.0
    return u[:, :rank] * root, root[:, None] * vh[:rank], share


def factor(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best B A of ``rank`` for a matrix [out, in]: B [out, r], A [r, in], float64, and the share kept.

    A large one by ``_leading``, which keeps less by a few millionths at most, for a small part of the work; where many
    values are asked for, by ``_by_gram``, in the memory of its narrow side's square.
    """
    if min(matrix.shape) > LARGE:
        found = _leading(matrix, rank) if 4 * rank <= LARGE else None
        if found is None:
            return _by_gram(matrix, rank)
        u, s, vh = found
        b, a, _ = _halves(u, s, vh, rank)
        total = sum(float(rows.double().square().sum()) for rows in matrix.split(BLOCK))
        return b, a, float(s[:rank].square().sum()) / total if total else 1.0
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return _halves(u, s, vh, rank)


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The largest singular values and their vectors by subspace iteration (Halko, Martinsson and Tropp 2011,
    arXiv:0909.4061): U [out, k], s [k], V^T [k, in], k > rank, float64. None when they do not settle in ``ROUNDS``.

    A subspace of the inputs is sent through M^T M until the squares that the rank keeps rise by no more than
    ``SETTLED`` of them: in float32, since what is kept falls short by the square of the subspace's error alone. The
    last product is in float64. The start is drawn with a fixed seed.
    """
    narrow, width = matrix.float(), rank + max(16, rank)
    inputs = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(0)).to(matrix.device)
    before = 0.0
    for _ in range(ROUNDS):
        outputs = torch.linalg.qr(narrow @ torch.linalg.qr(inputs)[0])[0]
        inputs = narrow.T @ outputs
        kept = float(torch.linalg.eigvalsh(inputs.T.double() @ inputs.double())[-rank:].sum())
        if kept - before <= SETTLED * kept:
            outputs = torch.linalg.qr(outputs.double())[0]
            pairs = zip(matrix.split(BLOCK), outputs.split(BLOCK), strict=True)
            u, s, vh = torch.linalg.svd(torch.stack([o.T @ m.double() for m, o in pairs]).sum(0), full_matrices=False)
            return outputs @ u, s, vh
        before = kept
    return None


def _by_gram(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """As ``factor``, from the eigenvectors V of M^T M (of M M^T for a wide M), float64: M V V^T is the best there is,
    whatever rounding does to the small singular values."""
    if matrix.shape[0] < matrix.shape[1]:
        a, b, share = _by_gram(matrix.T, rank)
        return b.T, a.T, share
    gram = sum((rows.double().T @ rows.double() for rows in matrix.split(BLOCK)), torch.zeros((), dtype=torch.float64))
    values, vectors = torch.linalg.eigh(gram)
    s, v = values[-rank:].flip(0).clamp_min(0).sqrt(), vectors[:, -rank:].flip(1)
    root = s.sqrt()
    seen = torch.cat([rows.double() @ v for rows in matrix.split(BLOCK)])
    kept, total = float(seen.square().sum()), float(gram.trace())
    b = torch.where(root > 0, seen / root, 0.0)
    return b, root[:, None] * v.T, kept / total if total else 1.0


def thin(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best B' A' of ``rank`` for the product of ``b`` [out, R] and ``a`` [R, in], without forming the product.

    B = Q_b R_b and A^T = Q_a R_a make B A = Q_b (R_b R_a^T) Q_a^T, whose middle is R x R. Returns as ``factor``.
    """
    qb, rb = torch.linalg.qr(b.double())
    qa, ra = torch.linalg.qr(a.double().T)
    u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    return _halves(qb @ u, s, vh @ qa.T, rank)
