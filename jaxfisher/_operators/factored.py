"""KFAC's own damping, which damps each Kronecker factor by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from jaxfisher._bordered import Bordered
from jaxfisher._linalg import batched, norm
from jaxfisher._once import once
from jaxfisher._operators.apart import bare, damped_blocks, made_of
from jaxfisher._operators.block import BlockDiagonal
from jaxfisher._operators.damping import check_one_damping
from jaxfisher._operators.diagonal import Diagonal
from jaxfisher._operators.form import Form
from jaxfisher._operators.identity import Shifted
from jaxfisher._operators.inverted import reported
from jaxfisher._operators.kronecker import EigenKronecker, Kronecker
from jaxfisher._operators.operator import Operator
from jaxfisher._operators.pair import inverse_of_pair, pair_of
from jaxfisher._operators.side import roots
from jaxfisher._pytree import array_fields
from jaxfisher._system import Solved, SolveInfo
from jaxfisher._tree import cast_like
from jaxfisher._values import is_known, nonnegative


def factored_solve(fisher: Operator, v: chex.ArrayTree, damping: chex.Numeric) -> tuple[Any, SolveInfo]:
    r"""KFAC's own, approximate damping, as a solver for `jaxfisher.solve`: it damps each factor instead of the product.

    .. math:: \Big(A + \pi \sqrt{\lambda} I\Big)^{-1} V \Big(G + \tfrac{\sqrt\lambda}{\pi} I\Big)^{-1}, \qquad
        \pi^2 = \frac{\mathrm{tr} A / \dim A}{\mathrm{tr} G / \dim G}.

    This is *not* ``(F + damping I)^-1``: it is the inverse of ``A (x) G`` plus the damping plus cross terms. It needs two
    Cholesky factors per layer where the exact inverse needs two eigendecompositions. Blocks of other forms are damped exactly.
    The residual in the report is that of ``(F + damping I) x = v``, and shows the difference: ``converged`` is the test of an
    exact solve, and is rarely true.

    In the sum ``F + G`` of two Kronecker views a layer has two products. Each product is damped in this way with half of the
    damping. The sum of the two is inverted in one basis of the inputs that makes both input factors diagonal, and one such
    basis of the outputs. At a damping of zero this is exact, for layers of any size and without an iteration.
    ``(F + G + damping I)^-1`` cannot be computed like that, since no basis makes three products diagonal at once.

    Args:
        fisher: a `jaxfisher.kronecker` view, or the sum of two.
        v: a pytree shaped like the parameters.
        damping: ``> 0``. A damping that the dtype cannot tell from zero is replaced by the smallest one that it can. For a sum
            of two views it may be zero: directions along which both have inputs or outputs of zero are then left out.

    Raises:
        TypeError: ``fisher`` is neither a Kronecker view nor a sum of two.
        ValueError: a ``damping`` below zero, or of zero if a layer has one product.

    Reference: Martens and Grosse (ICML 2015), section 6.3; Golub and Van Loan, Matrix Computations (2013), section 8.7.1, for
    the basis of two matrices.

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
    check_one_damping(damping, fisher.spec, "factored_solve")
    zero = is_known(damping) and float(damping) == 0
    if zero and form is fisher.form and any(_kronecker_in(block) for block in form.blocks):
        raise ValueError(
            "factored_solve: `damping` is 0, and without damping factors may be singular. Give a number above zero, or leave "
            "the solver out: jf.solve(F, v, 0.0) is then exact."
        )
    x, info = _by_factors(form, form.spec.vector(v), nonnegative("damping", damping, form.spec.dtype) + shift)
    return cast_like(x, v), info


@once
def _by_factors(form: BlockDiagonal, v: Any, damping: Scalar) -> tuple[Any, SolveInfo]:
    """`factored_solve` without its checks."""
    parts = damped_blocks(form, damping)
    factors = [side.shifted(shift).whole() for side, shift in _shifted_factors(parts)]
    found = iter(made_of(form, roots, factors))
    blocks = [_factored_inverse(block, at, found) for block, at in parts]
    product = form.product()

    def inverse(v: Any) -> Solved:
        x = form.join([block(part) for block, part in zip(blocks, form.split(v), strict=True)])
        rest = jax.tree.map(lambda b, f, y: b - f - damping * y, v, product(x), x)
        left, size = (norm(form.spec.ravel(tree, "v")) for tree in (rest, v))
        return Solved(x, rest, jnp.asarray(form.spec.size, jnp.int32), left <= jnp.finfo(form.spec.dtype).eps ** 0.5 * size)

    return reported(form.spec, inverse, v)


def has_factors(form: Form) -> bool:
    """Whether a form has Kronecker factors that `factored_solve` can damp."""
    form = bare(form)
    return isinstance(form, BlockDiagonal) and any(_kronecker_in(block) or _pair_in(block) for block in form.blocks)


@array_fields("blocks", repr=False)
class InvertedBlocks(BlockDiagonal):
    """The inverses of damped blocks, each in the form of its block: products with this form are solves."""

    name = "inverses of damped blocks"


def is_invertible(form: Form) -> bool:
    """Whether the inverse of a form with damped factors has the same form: all blocks are Kronecker products or diagonals."""
    form = bare(form)
    if not isinstance(form, BlockDiagonal):
        return False
    blocks = [bare(block) for block in form.blocks]
    return all(isinstance(block, Kronecker | Diagonal) for block in blocks) and any(map(_kronecker_in, blocks))


def shifted_factors(form: Form, damping: Scalar) -> list[tuple[Bordered, Float[Array, " groups"]]]:
    """The factors of blocks that are Kronecker products, each with the number that `factored_solve` adds to its diagonal."""
    return _shifted_factors(damped_blocks(form, damping))


def _shifted_factors(parts: Sequence[tuple[Form, Scalar]]) -> list[tuple[Bordered, Float[Array, " groups"]]]:
    return [factor for block, at in parts if isinstance(block, Kronecker) for factor in block.shifted_factors(at)]


def with_inverses(form: Form, held: Sequence[Bordered], damping: Scalar) -> InvertedBlocks:
    """The form of the inverse in `factored_solve`, from inverses of the damped factors; diagonals are inverted here.

    The rounding error of an explicit inverse grows with the condition number of the damped factor, which the damping bounds. So
    this serves directions, whose length is found by other means.
    """
    whole = bare(form)
    assert isinstance(whole, BlockDiagonal)
    sides, made = iter(held), list[Form]()
    for block, at in damped_blocks(form, damping):
        if isinstance(block, Kronecker):
            made.append(dataclasses.replace(block, input_side=next(sides), outputs=next(sides).core))
        else:
            assert isinstance(block, Diagonal)
            made.append(Diagonal(jax.tree.map(lambda leaf, at=at: 1 / (leaf + at), block.entries), block.spec))
    return InvertedBlocks(tuple(made), whole.members, whole.spec)


HALVED = 256
"""The largest matrix that is inverted whole. Larger ones are halved, since LAPACK runs at a fraction of the rate of products.

On two cores, halving cuts an inverse of 512 rows from 5.7 ms to 3.8, and one of 1024 rows from 37 ms to 18.
"""


def inverses(matrices: Bordered) -> Bordered:
    """The inverses of positive definite matrices, by Cholesky factors."""
    return matrices.inverses(_inverses)


# These two are jitted and not inlined, so that the program has one body for each size.
@jax.jit
def _inverses(x: Float[Array, "groups m m"]) -> Float[Array, "groups m m"]:
    """The inverses, from those of the Cholesky factors; products with their upper halves, which are zero, are skipped."""
    if x.shape[1] <= HALVED:
        root = _inverted_roots(x)
        return batched(root, root, (1, 1))
    first, below, second = _inverted_halves(x)
    top, side, corner = (batched(a, b, (1, 1)) for a, b in ((below, below), (below, second), (second, second)))
    return _joined(batched(first, first, (1, 1)) + top, side, side.swapaxes(1, 2), corner)


@jax.jit
def _inverted_roots(x: Float[Array, "groups m m"]) -> Float[Array, "groups m m"]:
    """The inverses of the Cholesky factors of positive definite matrices."""
    if x.shape[1] > HALVED:
        first, below, second = _inverted_halves(x)
        return _joined(first, jnp.zeros_like(below.swapaxes(1, 2)), below, second)
    unit = jnp.broadcast_to(jnp.eye(x.shape[1], dtype=x.dtype), x.shape)
    return jax.lax.linalg.triangular_solve(roots(x), unit, left_side=True, lower=True)


def _inverted_halves(x: Float[Array, "groups m m"]) -> tuple[Array, Array, Array]:
    """The three blocks of the inverses of the Cholesky factors: of the first half, below it, and of the second half.

    The second half is factored after subtracting the product of the block below the first half with its own transpose, as in
    Cholesky's algorithm.
    """
    half = (x.shape[1] + 1) // 2
    first = _inverted_roots(x[:, :half, :half])
    along = batched(x[:, half:, :half], first, (2, 2))
    second = _inverted_roots(x[:, half:, half:] - batched(along, along, (2, 2)))
    return first, -batched(batched(second, along), first), second


def _joined(a: Array, b: Array, c: Array, d: Array) -> Float[Array, "groups m m"]:
    """The matrices made of four blocks, given row by row."""
    return jnp.concatenate([jnp.concatenate([a, b], 2), jnp.concatenate([c, d], 2)], 1)


def _factored_inverse(block: Form, damping: Scalar, found: Iterator[Array]) -> Callable[[Any], Any]:
    """The inverse of a block; that of a Kronecker product uses the next two of the Cholesky roots in ``found``."""
    pair = pair_of(block)
    if pair is not None:
        return inverse_of_pair(*pair, damping)
    if isinstance(block, Kronecker):
        return block.inverse_by_roots([next(found), next(found)])
    if isinstance(block, EigenKronecker) and block.separable:
        return block.factored_inverse(damping)
    inverse = block.inverse(damping)
    return lambda v: inverse(v).x


def _kronecker_in(block: Form) -> Kronecker | EigenKronecker | None:
    """The Kronecker product of a block that is one, up to a multiple of the identity; else None."""
    if isinstance(block, Shifted):
        return _kronecker_in(block.base)
    return block if isinstance(block, Kronecker) or (isinstance(block, EigenKronecker) and block.separable) else None


def _pair_in(block: Form) -> tuple[Kronecker, Kronecker] | None:
    """The two Kronecker products of a block that is their sum, up to a multiple of the identity; else None."""
    return pair_of(bare(block))
