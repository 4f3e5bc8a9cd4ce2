"""Factors of matrices, and solves with them, in NumPy."""

import numpy as np


def cholesky(x, **_):
    try:
        return np.linalg.cholesky(x)
    except np.linalg.LinAlgError:
        if x.ndim == 2:
            return np.full_like(x, np.nan)
        return np.stack([cholesky(matrix) for matrix in x])


def triangular_solve(a, b, *, left_side, lower, transpose_a, conjugate_a, unit_diagonal):
    if not left_side:
        b, transpose_a = b.swapaxes(-1, -2), not transpose_a
    if transpose_a:
        a, lower = a.swapaxes(-1, -2), not lower
    if conjugate_a:
        a = a.conj()
    x = np.zeros_like(b)
    count = a.shape[-1]
    for i in range(count) if lower else reversed(range(count)):
        done = slice(0, i) if lower else slice(i + 1, count)
        rest = b[..., i, :] - (a[..., i : i + 1, done] @ x[..., done, :])[..., 0, :]
        x[..., i, :] = rest if unit_diagonal else rest / a[..., i, i, None]
    return x if left_side else x.swapaxes(-1, -2)
