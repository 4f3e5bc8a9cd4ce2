"""What every Fisher is: a symmetric linear operator on parameter pytrees that knows its kind, its n and its form.

Operators are frozen dataclasses and pytrees: arrays are leaves, everything else is static and hashable, so one crosses ``jit``
with one trace. Public methods check and cast; the private ones that subclasses give work on flat or parameter-shaped
vectors in the statistics dtype.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, ClassVar, Self

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Scalar

from jaxfisher._engine import Basis
from jaxfisher._inverse import Factorise, by_invert, log_determinant
from jaxfisher._linalg import eigenvalues, norm, null_vectors, spectral_mv, unit_rank
from jaxfisher._once import once
from jaxfisher._operators.damping import Damping, Dampings, is_one_damping
from jaxfisher._operators.inverted import Inverted, by_leaf, flat_inverse, solve_matrix
from jaxfisher._operators.provenance import Provenance
from jaxfisher._scores import Scores
from jaxfisher._stack import of_one, refuse_stack
from jaxfisher._system import SolveInfo, direct_info
from jaxfisher._tree import ParamSpec, cast_like, dot
from jaxfisher._values import check_number, described, nonnegative
from jaxfisher._varying import alike

EXACT_LIMIT = 4096
"""Largest p for which an operator that holds no matrix makes one in order to invert it exactly."""


View = Callable[["Operator"], "Operator"]
VIEW = "operator -> operator, such as jf.diagonal"
"""What a view is, as messages show it."""


class Operator(abc.ABC):
    """A symmetric operator on pytrees shaped like the parameters; positive semi-definite if it is a Fisher.

    The matrix ``F`` below is over the parameters in `jax.flatten_util.ravel_pytree` order. Vectors go in and come out as
    pytrees; results take the leaf dtypes of the vector they are made from, matrices and scalars the statistics dtype (at least
    float32). ``F + G`` and ``c * F`` are operators; ``c`` must not be negative. ``F @ v`` is `mv`, and
    ``np.asarray(F)`` is `as_matrix`.

    `logdet`, `trace`, `diagonal`, `quadratic` and `solve` are differentiable in parameters, data and damping, forward and in
    reverse, also where eigenvalues are equal. Of an undamped solve with a deficient rank the null space counts as fixed.
    """

    form: ClassVar[str]
    """How it is held, as `repr` says it."""
    averages: ClassVar[bool] = False
    """Whether running means are taken of what is held, which then has one shape whatever the number of examples."""

    held: ClassVar[tuple[str, ...]] = ()
    """The fields that a running mean is taken of."""
    takes_sums: ClassVar[int] = 0
    """Of two terms, the one with the larger number makes the sum."""

    spec: ParamSpec
    provenance: Provenance

    def __init_subclass__(cls, **options: Any) -> None:
        """Each of the numbers that a form computes in its own way is one program, compiled once."""
        super().__init_subclass__(**options)
        for name in ("as_matrix", "diagonal", "trace", "eigvalsh", "frobenius_norm", "rank"):
            if name in vars(cls):
                setattr(cls, name, _program(name, vars(cls)[name]))

    @property
    def size(self) -> int:
        """Number of parameters, p."""
        return self.spec.size

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix, ``(p, p)``."""
        return self.size, self.size

    @property
    def n(self) -> int:
        """The number of examples that the mean was taken over; of a sum, those of all terms."""
        return self.provenance.examples

    @property
    def stack(self) -> tuple[int, ...]:
        """The axes that `jax.vmap` or `jax.lax.scan` has put before those of what is held; () of one operator."""
        return ()

    @property
    def full_rank(self) -> Int[Array, ""]:
        """The rank of ``F + damping I`` with damping: p."""
        return jnp.asarray(self.size, jnp.int32)

    @property
    def arrays(self) -> tuple[Any, ...]:
        """What is held, of an operator that averages, without what is known of it."""
        return tuple(getattr(self, name) for name in self.held)

    def with_arrays(self, arrays: tuple[Any, ...]) -> Self:
        """The same kind of operator holding other arrays."""
        return dataclasses.replace(self, **dict(zip(self.held, arrays, strict=True)))  # type: ignore[type-var]

    @property
    def viewed(self) -> Operator:
        """What views of it are taken of."""
        return self

    def pieces(self) -> tuple[tuple[tuple[int, ...], Operator], ...]:
        """What it is the sum of, each with the places of the leaves that it is over: what views with factors are taken of."""
        return ((tuple(range(len(self.spec.paths))), self),)

    @property
    def scored(self) -> Scores | None:
        """The scores that F is made of; None where it is not held as scores."""
        return None

    def along(self, basis: Basis) -> Float[Array, "groups inputs outputs"]:
        """The diagonal of ``F`` in the basis of a layer that F is a part of: ``q^T F q`` for each of its vectors q."""
        turn = jax.vmap(lambda row: basis.turned(self.spec.unravel(row)))
        matrix = self._small_matrix("eigen_kronecker")
        return jnp.sum(turn(matrix) * turn(jnp.eye(len(matrix), dtype=matrix.dtype)), 0)

    def factorised(self) -> Operator:
        """The same operator held so that solves with it, at any damping, take products only, where its form has such a form."""
        return self

    def mv(self, v: chex.ArrayTree) -> Any:
        """``F v``."""
        return cast_like(_product(self, self._vector(v)), v)

    def quadratic(self, v: chex.ArrayTree) -> Scalar:
        """``v^T F v``: twice the KL divergence moved by a small step ``v``, in nats."""
        return _quadratic(self, self._vector(v))

    def solve(self, v: chex.ArrayTree, damping: Damping) -> Any:
        """``(F + damping I)^-1 v``; the minimum-norm solution where F is singular and the damping zero.

        ``damping`` is one number, or a pytree like the parameters with one number a leaf. For many right-hand sides, `jax.vmap`
        over ``v``: what does not depend on it is factored once. `jaxfisher.solve` also tells how the solve went.
        """
        return self.solve_with_info(v, damping)[0]

    def solve_with_info(self, v: chex.ArrayTree, damping: Damping) -> tuple[Any, SolveInfo]:
        """The exact solution and a report on it."""
        known = self.dampings(damping)
        x, info = _solution(self, self._vector(v), known)
        return cast_like(x, v), info

    def report(self, inverse: Inverted, v: Any) -> tuple[Any, SolveInfo]:
        """What an `inverse` finds for ``v``, and the report on it."""
        found = inverse(v)
        flat = found._replace(x=self.spec.ravel(found.x, "x"), rest=self.spec.ravel(found.rest, "v"))
        return found.x, direct_info(flat, self.spec.ravel(v, "v"))

    def dampings(self, damping: Damping) -> Dampings:
        """The argument checked: one number, or those of the leaves."""
        if is_one_damping(damping, self.spec):
            return nonnegative("damping", damping, self.spec.dtype)
        return tuple(nonnegative("damping", leaf, self.spec.dtype) for leaf in jax.tree.leaves(damping))

    def inverse(self, damping: Dampings) -> Inverted:
        """``v -> (F + damping I)^-1 v`` on vectors in the statistics dtype; what does not depend on ``v`` is done once.

        For use inside one ``jit``; what it returns is not meant to cross one.
        """
        return self._inverse_by_leaf(damping) if isinstance(damping, tuple) else self._inverse(damping)

    def power_mv(self, v: chex.ArrayTree, power: chex.Numeric, damping: chex.Numeric = 0.0) -> Any:
        """``(F + damping I)^power v``; at zero damping, only along directions in which F is not zero to rounding."""
        check_number("power", power)
        power = jnp.asarray(power, self.spec.dtype)
        strength = nonnegative("damping", damping, self.spec.dtype)
        return cast_like(_power_of(self, self._vector(v), power, strength), v)

    def sqrt_mv(self, v: chex.ArrayTree, damping: chex.Numeric = 0.0) -> Any:
        """``(F + damping I)^(1/2) v``, the symmetric root: of white noise, noise with covariance ``F + damping I``."""
        return self.power_mv(v, 0.5, damping)

    def inv_sqrt_mv(self, v: chex.ArrayTree, damping: chex.Numeric = 0.0) -> Any:
        """``(F + damping I)^(-1/2) v``: of white noise, noise with precision ``F + damping I``, as a Laplace posterior draws.

        At zero damping only along directions in which F is not zero to rounding.
        """
        return self.power_mv(v, -0.5, damping)

    @abc.abstractmethod
    def as_matrix(self) -> Float[Array, "p p"]:
        """``F`` as a dense matrix, shape ``[p, p]``."""

    @abc.abstractmethod
    def diagonal(self) -> Any:
        """The diagonal of ``F``, a pytree like the parameters."""

    @abc.abstractmethod
    def linearised(self) -> Callable[[Any], Any]:
        """``v -> F v`` on vectors in the statistics dtype, with everything that does not depend on ``v`` computed once.

        For use inside one ``jit``; what it returns is not meant to cross one.
        """

    @abc.abstractmethod
    def restrict(self, keep: tuple[bool, ...], treedef: Any) -> Operator:
        """The principal sub-operator of the kept parameter leaves, for vectors with structure ``treedef``."""

    @abc.abstractmethod
    def _scaled(self, factor: Any) -> Operator:
        """``factor * F`` in the same form."""

    @once
    @of_one("trace")
    def trace(self) -> Scalar:
        """The trace of ``F``."""
        return sum((jnp.sum(leaf) for leaf in jax.tree.leaves(self.diagonal())), start=jnp.zeros((), self.spec.dtype))

    @once
    @of_one("eigvalsh")
    def eigvalsh(self) -> Float[Array, " p"]:
        """The p eigenvalues of ``F``, ascending; those inside rounding error are exactly zero."""
        return eigenvalues(self._small_matrix("eigvalsh"))

    def logdet(self, damping: Damping) -> Scalar:
        """``log det (F + damping I)``: minus infinity where it is singular, NaN where it is negative."""
        return _log_determinant(self, self.dampings(damping))

    @once
    @of_one("frobenius_norm")
    def frobenius_norm(self) -> Scalar:
        """The Frobenius norm of ``F``: the root of the sum of its squared entries, or of its squared eigenvalues."""
        return norm(self._small_matrix("frobenius_norm").reshape(-1))

    @once
    @of_one("rank")
    def rank(self) -> Int[Array, ""]:
        """The number of eigenvalues that are not zero to rounding, after F is scaled to a unit diagonal."""
        return unit_rank(self._small_matrix("rank"))

    def null_space(self) -> Any:
        """An orthonormal basis of the directions in which F is zero to rounding, stacked along a leading axis.

        Such directions are not identified by the data: no prediction depends on them. How many there are is known only when F
        is, so this does not run under ``jit``.
        """
        basis = null_vectors(self._small_matrix("null_space"))
        return jax.vmap(self.spec.unravel)(basis.T)

    def root_size(self, product: Callable[[Float[Array, " p"]], Float[Array, " p"]]) -> Scalar:
        """The order of magnitude of the root of the largest eigenvalue; zero where it cannot be told.

        ``product`` is that with F on flat vectors, perhaps damped.
        """
        # A vector so small that the product is finite also where F itself is beyond the dtype.
        small = 2.0**-40
        trial = jnp.cos(jnp.arange(self.size, dtype=self.spec.dtype)) * (small / self.size**0.5)
        return jnp.sqrt(norm(product(trial))) * small**-0.5

    def _quadratic(self, v: Any) -> Scalar:
        return dot(v, self.linearised()(v))

    def _inverse(self, damping: Scalar) -> Inverted:
        return self.inverses(damping, by_invert)(damping)

    def inverses(self, largest: Scalar, factorise: Factorise) -> Callable[[Scalar], Inverted]:
        """`inverse` for dampings up to the largest, everything done once that depends on none of them."""
        product = self.linearised()
        exact = lambda x: self.spec.ravel(product(self.spec.unravel(x)), "x")  # noqa: E731
        at = solve_matrix(self._small_matrix("solve"), exact, factorise)
        return lambda damping: flat_inverse(self.spec, at(damping))

    def _logdet(self, damping: Scalar) -> Scalar:
        return log_determinant(self._small_matrix("logdet"), damping)

    def _inverse_by_leaf(self, dampings: tuple[Scalar, ...]) -> Inverted:
        roots = [1 / jnp.sqrt(d) for d in dampings]
        inside = self.rescaled(roots)._inverse(jnp.ones((), self.spec.dtype))
        return by_leaf(self.spec, inside, self.linearised(), roots, dampings)

    def _logdet_by_leaf(self, dampings: tuple[Scalar, ...]) -> Scalar:
        inside = self.rescaled([1 / jnp.sqrt(d) for d in dampings])._logdet(jnp.ones((), self.spec.dtype))
        return inside + sum(size * jnp.log(d) for size, d in zip(self.spec.sizes, dampings, strict=True))

    def rescaled(self, factors: Sequence[Scalar]) -> Operator:
        """``D F D`` in the same form, with one factor for each parameter leaf."""
        raise NotImplementedError(
            f"{self}: a damping for each leaf needs a form that can be scaled leaf by leaf; one held {self.form} cannot. "
            "Give one number, or a view that can: jf.diagonal, jf.kronecker, jf.block_diagonal, jf.dense."
        )

    def _power_mv(self, v: Any, power: Scalar, damping: Scalar) -> Any:
        flat = self.spec.ravel(v, "v")
        return self.spec.unravel(spectral_mv(self._small_matrix("power_mv"), flat, power, damping))

    def rows(self, method: str) -> Scores:
        """The scores that F is made of, or an error."""
        scores = self.scored
        if scores is None:
            raise TypeError(
                f"{method}: {self} is not held as scores. Give what jf.exact_fisher, jf.empirical_fisher, jf.sampled_fisher, "
                "jf.implicit_fisher or jf.fisher_from_scores returns."
            )
        return scores

    def _small_matrix(self, method: str) -> Float[Array, "p p"]:
        if self.size > EXACT_LIMIT:
            raise ValueError(
                f"{method} of a Fisher held {self.form} would make a dense {self.size} x {self.size} matrix. "
                "Pass solver=jf.CG(), take a view (jf.diagonal, jf.kronecker), or, if you mean it, jf.dense(F)."
            )
        return self.as_matrix()

    def _vector(self, v: chex.ArrayTree) -> Any:
        return self.spec.tree(self.spec.leaves(v, "v"))

    # NumPy would take an operator for a scalar and make an array of operators: this hands the arithmetic to the methods below.
    __array_ufunc__ = None

    def __add__(self, other: Any) -> Operator:
        if not isinstance(other, Operator):
            raise TypeError(
                f"cannot add a Fisher and {described(other)}: expected two Fishers over the same parameters. A multiple of "
                "the identity is jf.scaled_identity(F, c), or `damping`, an argument of solve, logdet and natural_grad."
            )
        self.spec.check_same(other.spec, f"cannot add to {self} the operator {other}")
        return self._plus(other) if self.takes_sums >= other.takes_sums else other._plus(self)

    __radd__ = __add__

    def _plus(self, other: Operator) -> Operator:
        return Sum((self, other), self.spec, self.provenance.plus(other.provenance))

    def __matmul__(self, v: chex.ArrayTree) -> Any:
        return self.mv(v)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return np.asarray(self.as_matrix(), dtype=dtype)

    def __mul__(self, factor: Any) -> Operator:
        return self._scaled(nonnegative("c` in `c * F", factor, self.spec.dtype))

    __rmul__ = __mul__

    def __repr__(self) -> str:
        return f"Fisher({self.provenance}, params {self.size:,}, {self.form})"


def _program(name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
    """What a method computes, without its checks: one program, of one operator."""
    return once(of_one(name)(compute))


def _solved(fisher: Operator, v: Any, damping: Dampings) -> tuple[Any, SolveInfo]:
    fisher, v, damping = alike(fisher, v, damping)
    return fisher.report(fisher.inverse(damping), v)


def _log_determinant_of(fisher: Operator, damping: Dampings) -> Scalar:
    return fisher._logdet_by_leaf(damping) if isinstance(damping, tuple) else fisher._logdet(damping)


_product = _program("mv", lambda fisher, v: fisher.linearised()(v))
_quadratic = _program("quadratic", lambda fisher, v: fisher._quadratic(v))
_solution = _program("solve", _solved)
_power_of = _program("power_mv", lambda fisher, v, power, damping: fisher._power_mv(v, power, damping))
_log_determinant = _program("logdet", _log_determinant_of)


@partial(jax.tree_util.register_dataclass, data_fields=("terms",), meta_fields=("spec", "provenance"))
@dataclasses.dataclass(frozen=True, repr=False)
class Sum(Operator):
    """The sum of operators whose forms do not combine: every term stays as it is held."""

    terms: tuple[Operator, ...]
    spec: ParamSpec
    provenance: Provenance

    @property
    def form(self) -> str:  # type: ignore[override]
        """The forms of the terms."""
        return " + ".join(term.form for term in self.terms)

    @property
    def averages(self) -> bool:  # type: ignore[override]
        """Whether every term averages."""
        return all(term.averages for term in self.terms)

    @property
    def arrays(self) -> tuple[Any, ...]:
        return tuple(term.arrays for term in self.terms)

    def with_arrays(self, arrays: tuple[Any, ...]) -> Sum:
        terms = tuple(term.with_arrays(part) for term, part in zip(self.terms, arrays, strict=True))
        return dataclasses.replace(self, terms=terms)

    @property
    def viewed(self) -> Sum:
        return dataclasses.replace(self, terms=tuple(term.viewed for term in self.terms))

    def pieces(self) -> tuple[tuple[tuple[int, ...], Operator], ...]:
        return tuple(piece for term in self.terms for piece in term.pieces())

    @property
    def stack(self) -> tuple[int, ...]:
        return self.terms[0].stack

    def as_matrix(self) -> Float[Array, "p p"]:
        return _total(term.as_matrix() for term in self.terms)

    def diagonal(self) -> Any:
        return _total(term.diagonal() for term in self.terms)

    def linearised(self) -> Callable[[Any], Any]:
        products = [term.linearised() for term in self.terms]
        return lambda v: _total(product(v) for product in products)

    def restrict(self, keep: tuple[bool, ...], treedef: Any) -> Sum:
        terms = tuple(term.restrict(keep, treedef) for term in self.terms)
        return Sum(terms, self.spec.restrict(keep, treedef), self.provenance)

    def rescaled(self, factors: Sequence[Scalar]) -> Sum:
        return Sum(tuple(term.rescaled(factors) for term in self.terms), self.spec, self.provenance)

    def _scaled(self, factor: Any) -> Sum:
        return Sum(tuple(term._scaled(factor) for term in self.terms), self.spec, self.provenance.times())

    def _quadratic(self, v: Any) -> Scalar:
        return _total(term._quadratic(v) for term in self.terms)


def _total(parts: Iterable[Any]) -> Any:
    return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), parts)


def as_operator(fisher: Any, caller: str) -> Operator:
    """``fisher`` if it is an operator, else a `TypeError` that says what makes one."""
    if isinstance(fisher, Operator):
        refuse_stack(fisher, caller)
        return fisher
    seen = "a function. Call the function with the parameters and the data first" if callable(fisher) else described(fisher)
    raise TypeError(f"{caller}: expected a Fisher operator, such as jf.exact_fisher(model)(params, x) returns, got {seen}.")
