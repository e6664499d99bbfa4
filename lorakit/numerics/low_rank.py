"""Matrices as products of two thin ones: the best of a given rank, and a product made thinner.

Legend: out, in the matrix's rows and columns (of a convolution in * kh * kw columns), r the rank.
The best approximation of rank r, in the Frobenius norm, keeps the r largest singular values (Eckart and Young 1936).
What it keeps is told as a share: the sum of the squares of those kept over the sum of all squares.
"""

import torch
from torch import Tensor


def _halves(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """B [out, r] and A [r, in], each with the roots of the singular values, and the share of the squares kept."""
    root = s[:rank].sqrt()
    total = float(s.square().sum())
    share = float(s[:rank].square().sum()) / total if total else 1.0
    return u[:, :rank] * root, root[:, None] * vh[:rank], share


def factor(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best B A of ``rank`` for a matrix [out, in]: B [out, r], A [r, in], float64, and the share kept."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return _halves(u, s, vh, rank)


def thin(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best B' A' of ``rank`` for the product of ``b`` [out, R] and ``a`` [R, in], without forming the product.

    B = Q_b R_b and A^T = Q_a R_a make B A = Q_b (R_b R_a^T) Q_a^T, whose middle is R x R. Returns as ``factor``.
    """
    qb, rb = torch.linalg.qr(b.double())
    qa, ra = torch.linalg.qr(a.double().T)
    u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    return _halves(qb @ u, s, vh @ qa.T, rank)
