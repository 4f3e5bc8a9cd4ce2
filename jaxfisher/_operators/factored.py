"""KFAC's own damping of Kronecker factors, each by itself."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Scalar

from jaxfisher._linalg import cholesky, matmul, norm
from jaxfisher._once import once
from jaxfisher._operators.block import BlockDiagonal
from jaxfisher._operators.diagonal import Diagonal
from jaxfisher._operators.form import Form
from jaxfisher._operators.identity import Shifted
from jaxfisher._operators.inverted import reported
from jaxfisher._operators.kronecker import EigenKronecker, Kronecker
from jaxfisher._operators.operator import Operator
from jaxfisher._pytree import array_fields
from jaxfisher._system import Solved, SolveInfo
from jaxfisher._tree import cast_like
from jaxfisher._values import nonnegative


def factored_solve(fisher: Operator, v: chex.ArrayTree, damping: chex.Numeric) -> tuple[Any, SolveInfo]:
    r"""KFAC's own, approximate damping, a solver for `jaxfisher.solve`: each factor is damped instead of the product.

    .. math:: \Big(A + \pi \sqrt{\lambda} I\Big)^{-1} V \Big(G + \tfrac{\sqrt\lambda}{\pi} I\Big)^{-1}, \qquad
        \pi^2 = \frac{\mathrm{tr} A / \dim A}{\mathrm{tr} G / \dim G}.

    This is *not* ``(F + damping I)^-1``: it is the inverse of ``A (x) G`` plus the damping plus cross terms. It needs two
    Cholesky factors a layer where the exact one needs two eigendecompositions. Blocks of other forms are damped exactly. The
    residual in the report is that of ``(F + damping I) x = v``, and shows the difference: ``converged`` is the test of an
    exact solve, and is rarely true.

    Args:
        fisher: a `jaxfisher.kronecker` view.
        v: a pytree shaped like the parameters.
        damping: ``> 0``. A damping that the dtype cannot tell from zero is replaced by the smallest one that it can.

    Raises:
        TypeError: ``fisher`` is no Kronecker view.
        ValueError: a ``damping`` of zero or below.

    Reference: Martens and Grosse (ICML 2015), section 6.3.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda w, x: jf.Normal(x @ w, jnp.ones(2))
    >>> F = jf.kronecker(jf.exact_fisher(model)(jnp.ones((2, 2)), 2.0 * jnp.eye(2)))  # A = 2 I, G = I
    >>> x, _ = jf.solve(F, jnp.ones((2, 2)), damping=1.0, solver=jf.factored_solve)
    >>> print(x.round(4)[0])  # 1 / ((2 + sqrt(2)) (1 + 1 / sqrt(2))), where (F + I)^-1 is 1/3
    [0.1716 0.1716]
    """
    form, shift = (fisher.form.base, fisher.form.shift) if isinstance(fisher.form, Shifted) else (fisher.form, 0)
    if not isinstance(form, BlockDiagonal) or not has_factors(form):
        raise TypeError(f"factored_solve: {fisher} has no Kronecker factors to damp; expected jf.kronecker(fisher).")
    if form is fisher.form and isinstance(damping, (numbers.Real, np.ndarray, np.generic)) and float(damping) == 0:
        raise ValueError(
            "factored_solve: `damping` is 0, without which factors may be singular. Give a number above zero, or leave the "
            "solver out: jf.solve(F, v, 0.0) is then exact."
        )
    x, info = _by_factors(form, form.spec.vector(v), nonnegative("damping", damping, form.spec.dtype) + shift)
    return cast_like(x, v), info


@once
def _by_factors(form: BlockDiagonal, v: Any, damping: Scalar) -> tuple[Any, SolveInfo]:
    """`factored_solve` without its checks."""
    blocks = [_factored_inverse(block, damping) for block in form.blocks]
    product = form.product()

    def inverse(v: Any) -> Solved:
        x = form.join([block(part) for block, part in zip(blocks, form.split(v), strict=True)])
        rest = jax.tree.map(lambda b, f, y: b - f - damping * y, v, product(x), x)
        left, size = (norm(form.spec.ravel(tree, "v")) for tree in (rest, v))
        return Solved(x, rest, jnp.asarray(form.spec.size, jnp.int32), left <= jnp.finfo(form.spec.dtype).eps ** 0.5 * size)

    return reported(form.spec, inverse, v)


def has_factors(form: Form) -> bool:
    """Whether `factored_solve` has something to damp in it."""
    form = form.base if isinstance(form, Shifted) else form
    return isinstance(form, BlockDiagonal) and any(_kronecker_in(block) for block in form.blocks)


@array_fields("blocks", repr=False)
class InvertedBlocks(BlockDiagonal):
    """The inverses of damped blocks, each in the form of the block: products with it are solves."""

    name = "inverses of damped blocks"


def factored_inverse(form: Form, damping: Scalar) -> InvertedBlocks | None:
    """What `factored_solve` solves with, formed: Kronecker factors and diagonals inverted; None for blocks of other forms.

    Factors of equal size are inverted in one call. The rounding of an inverse that is formed grows with the condition of the
    damped factor, which the damping bounds: it is for directions, whose length is found by other means.
    """
    form, shift = (form.base, form.shift) if isinstance(form, Shifted) else (form, 0)
    if not isinstance(form, BlockDiagonal):
        return None
    bare = [block.base if isinstance(block, Shifted) else block for block in form.blocks]
    if not all(isinstance(block, Kronecker | Diagonal) for block in bare) or not any(map(_kronecker_in, bare)):
        return None
    at = [damping + shift + (block.shift if isinstance(block, Shifted) else 0) for block in form.blocks]
    products = [(i, block) for i, block in enumerate(bare) if isinstance(block, Kronecker)]
    sides = _inverses([side for i, block in products for side in block.damped_factors(at[i])])
    made: dict[int, Form] = {
        i: dataclasses.replace(block, inputs=sides[2 * k], outputs=sides[2 * k + 1]) for k, (i, block) in enumerate(products)
    }
    for i, block in enumerate(bare):
        if isinstance(block, Diagonal):
            made[i] = Diagonal(jax.tree.map(lambda leaf, i=i: 1 / (leaf + at[i]), block.entries), block.spec)
    return InvertedBlocks(tuple(made[i] for i in range(len(bare))), form.members, form.spec)


def _inverses(matrices: Sequence[Float[Array, "groups m m"]]) -> list[Float[Array, "groups m m"]]:
    """The inverses of positive definite stacks, those of one size in one call."""
    made: dict[int, Array] = {}
    for size in sorted({matrix.shape[-1] for matrix in matrices}):
        places = [i for i, matrix in enumerate(matrices) if matrix.shape[-1] == size]
        inverted = jax.vmap(_inverse)(jnp.concatenate([matrices[i] for i in places]))
        ends = np.cumsum([len(matrices[i]) for i in places])[:-1]
        made |= dict(zip(places, jnp.split(inverted, ends), strict=True))
    return [made[i] for i in range(len(matrices))]


def _inverse(matrix: Float[Array, "m m"]) -> Float[Array, "m m"]:
    root = jax.lax.linalg.triangular_solve(
        cholesky(matrix), jnp.eye(len(matrix), dtype=matrix.dtype), left_side=True, lower=True
    )
    return matmul(root.T, root)


def _factored_inverse(block: Form, damping: Scalar) -> Callable[[Any], Any]:
    kronecker = _kronecker_in(block)
    if kronecker is None:
        inverse = block.inverse(damping)
        return lambda v: inverse(v).x
    return kronecker.factored_inverse(damping + block.shift if isinstance(block, Shifted) else damping)


def _kronecker_in(block: Form) -> Kronecker | EigenKronecker | None:
    """The Kronecker product that a block is, up to a multiple of the identity; None if there is none."""
    if isinstance(block, Shifted):
        return _kronecker_in(block.base)
    return block if isinstance(block, Kronecker) or (isinstance(block, EigenKronecker) and block.separable) else None
