"""Forms: the ways to hold a symmetric matrix over the parameters, and the protocol by which an operator uses them.

A form is a pytree, made by `array_fields`: its arrays are leaves, and everything else is static and hashable, so that a form
crosses ``jit`` with one trace. Its methods are traced inside a program of the operator, which has checked the user's arguments:
vectors are trees like the parameters in the statistics dtype, and a damping is a scalar of that dtype.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Scalar

from jaxfisher._engine import Basis
from jaxfisher._inverse import log_determinant
from jaxfisher._linalg import eigenvalues, norm, unit_rank
from jaxfisher._matrix_power import power_mv
from jaxfisher._once import once
from jaxfisher._operators.inverted import Inverted, flat_inverse, solve_matrix
from jaxfisher._scores import Scores
from jaxfisher._system import TRUSTED, Factorise
from jaxfisher._tree import ParamSpec, products

EXACT_LIMIT = 4096
"""The largest p for which a form that holds no matrix makes one, to invert it exactly."""


class Form(abc.ABC):
    """A way to hold a symmetric matrix ``F`` over the parameters, with the computations on it.

    A new form implements `as_matrix`, `product`, `diagonal`, `scaled` and `restrict`. Every other method has a default, which
    makes the matrix for p up to 4096; a form overrides those that it can do better. Users hold a `jaxfisher.Operator`, which
    has a form and a provenance, checks arguments, compiles once and casts results.

    Attributes:
        spec: the shapes, paths and dtypes of the parameters, and the maps between trees and flat vectors:
            ``spec.ravel(v, "v")``, ``spec.unravel(flat)``, ``spec.dtype``, ``spec.sizes``.
        name: how the matrix is held, in the words that `repr` shows.
        averages: whether the mean of two forms of this kind is the mean of their arrays, so that `scale_by_fisher` can take a
            running mean. The shapes of the arrays then do not depend on the number of examples.
        formed: whether the matrix is held, so that `as_matrix` costs nothing for any p.
        halved: whether `inner_products` go through an H of ``F = H^T H``, so that they are accurate where F is small.
        at_once: the most dampings that are solved together; their solutions are in memory at the same time.
    """

    spec: ParamSpec
    name: str
    averages: ClassVar[bool] = False
    formed: ClassVar[bool] = False
    halved: ClassVar[bool] = False
    at_once: ClassVar[int] = 8

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axes that `jax.vmap` or `jax.lax.scan` added to the arrays of the form; () for a single form."""
        return ()

    @abc.abstractmethod
    def as_matrix(self) -> Float[Array, "p p"]:
        """``F`` as a dense matrix, in the order of `jax.flatten_util.ravel_pytree`."""

    @abc.abstractmethod
    def product(self) -> Callable[[Any], Any]:
        """``v -> F v``, with everything that does not depend on ``v`` computed once.

        The returned function is used in the same program; it does not cross ``jit``.
        """

    @abc.abstractmethod
    def diagonal(self) -> Any:
        """The diagonal of ``F``, a pytree like the parameters."""

    @abc.abstractmethod
    def scaled(self, factor: Scalar) -> Form:
        """``factor F`` in the same form."""

    @abc.abstractmethod
    def restrict(self, keep: tuple[bool, ...], treedef: Any) -> Form:
        """The principal submatrix of the parameter leaves that are kept, over vectors of the structure ``treedef``.

        Its spec is ``self.spec.restrict(keep, treedef)``.
        """

    def plus(self, other: Form) -> Form | None:
        """``F + G`` as one form, or None if the two do not combine; a sum then holds both as they are."""
        return None

    def rescaled(self, factors: Sequence[Scalar]) -> Form:
        """``D F D`` in the same form, with one factor for each parameter leaf.

        In forms that hold the matrix, its blocks or its diagonal, a factor may be an array like the leaf.
        """
        if len(factors) == 1:
            return self.scaled(jnp.square(factors[0]))
        raise NotImplementedError(
            f"a damping for each leaf needs a form that can be scaled leaf by leaf; one held {self.name} cannot. "
            "Give one number, or a view that can: jf.diagonal, jf.kronecker, jf.block_diagonal, jf.dense."
        )

    def with_unit_damping(self, dampings: Sequence[Scalar]) -> tuple[Form, tuple[Scalar, ...]]:
        """``F + D = R^-1 (G + I) R^-1`` for dampings ``D`` by leaf: the form ``G = R F R``, and the ``R`` of each leaf."""
        roots = tuple(1 / jnp.sqrt(damping) for damping in dampings)
        return self.rescaled(roots), roots

    def inner_products(self, vectors: Any) -> Float[Array, "k k"]:
        """``v_i^T F v_j`` for vectors stacked along a leading axis.

        A form that holds H of ``F = H^T H`` needs only the halves ``H v_i``, and no product with the transpose.
        """
        return products(vectors, jax.vmap(self.product())(vectors))

    def inverse(self, damping: Scalar) -> Inverted:
        """``v -> (F + damping I)^-1 v``; everything that does not depend on ``v`` is done once."""
        return self.inverses(damping, TRUSTED)(damping)

    def inverses(self, largest: Scalar, factorise: Factorise) -> Callable[[Scalar], Inverted]:
        """`inverse` as a function of dampings up to the largest; everything that depends on none of them is done once."""
        product = self.product()
        exact = lambda x: self.spec.ravel(product(self.spec.unravel(x)), "x")  # noqa: E731
        at = solve_matrix(small_matrix(self, "solve"), exact, factorise)
        return lambda damping: flat_inverse(self.spec, at(damping))

    def logdet(self, damping: Scalar) -> Scalar:
        """``log det (F + damping I)``."""
        return log_determinant(small_matrix(self, "logdet"), damping)

    def power_mv(self, v: Any, power: Scalar, damping: Scalar) -> Any:
        """``(F + damping I)^power v``."""
        flat = self.spec.ravel(v, "v")
        return self.spec.unravel(power_mv(small_matrix(self, "power_mv"), flat, power, damping))

    def trace(self) -> Scalar:
        """The trace of ``F``."""
        return sum((jnp.sum(leaf) for leaf in jax.tree.leaves(self.diagonal())), start=jnp.zeros((), self.spec.dtype))

    def eigvalsh(self) -> Float[Array, " p"]:
        """The p eigenvalues, ascending; those inside rounding error are exactly zero."""
        return eigenvalues(small_matrix(self, "eigvalsh"))

    def frobenius_norm(self) -> Scalar:
        """The Frobenius norm of ``F``."""
        return norm(small_matrix(self, "frobenius_norm").reshape(-1))

    def rank(self) -> Int[Array, ""]:
        """The number of eigenvalues that are not zero to rounding, after F is scaled to a unit diagonal."""
        return unit_rank(small_matrix(self, "rank"))

    def as_scores(self) -> Scores | None:
        """The scores that F is made of; None if it is not held as scores."""
        return None

    def along(self, basis: Basis) -> Float[Array, "groups inputs outputs"]:
        """The diagonal of ``F`` in the basis of a layer whose leaves F is over: ``q^T F q`` for each basis vector q."""
        turn = jax.vmap(lambda row: basis.turned(self.spec.unravel(row)))
        matrix = small_matrix(self, "eigen_kronecker")
        return jnp.sum(turn(matrix) * turn(jnp.eye(len(matrix), dtype=matrix.dtype)), 0)


def small_matrix(form: Form, method: str) -> Float[Array, "p p"]:
    """The matrix, for a method that needs it; raises if it would have to be made and p is above `EXACT_LIMIT`."""
    if form.spec.size > EXACT_LIMIT and not form.formed:
        size = form.spec.size
        raise ValueError(
            f"{method} of a Fisher held {form.name} would make a dense {size} x {size} matrix. "
            "Pass solver=jf.CG(), take a view (jf.diagonal, jf.kronecker), or, if you mean it, jf.dense(F)."
        )
    return _matrix_of(form)


_matrix_of = once(lambda form: form.as_matrix())
