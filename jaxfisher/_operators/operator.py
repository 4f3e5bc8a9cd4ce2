"""The operator, which is what users hold of a Fisher: a symmetric linear map on parameter pytrees with its kind, n and form.

An operator checks its arguments, runs the method of its form in a program that is compiled once, and casts the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, final

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Scalar

from jaxfisher._absent import OF_OPERATOR, absent
from jaxfisher._damped import by_cholesky
from jaxfisher._linalg import null_vectors
from jaxfisher._once import Static, once
from jaxfisher._operators.damping import Damping, Dampings, checked_damping, damped_inverse, damped_inverse_root, damped_logdet
from jaxfisher._operators.form import Form, small_matrix
from jaxfisher._operators.inverted import reported
from jaxfisher._operators.marginal import schur_complement
from jaxfisher._operators.sum import added
from jaxfisher._provenance import Provenance
from jaxfisher._pytree import array_fields
from jaxfisher._scores import Scores
from jaxfisher._stack import refuse_stack
from jaxfisher._system import Factorise, SolveInfo
from jaxfisher._tree import ParamSpec, cast_like, joined, subtree
from jaxfisher._values import check_number, described, is_known_positive, nonnegative, positive
from jaxfisher._varying import alike


class View(Protocol):
    """``view(fisher) -> Operator`` over the same parameters: a part of a Fisher, or an approximation of it.

    Any function from an operator to an operator is a view, such as `jaxfisher.diagonal`. It is called while JAX traces, so it
    builds its result from the operator's methods, its ``form`` and other views, and cannot branch on numbers.
    """

    def __call__(self, fisher: Operator, /) -> Operator: ...


class Solver(Protocol):
    """``solver(fisher, v, damping) -> (x, info)``: solves ``(F + damping I) x = v``.

    ``v`` is a pytree like the parameters, and so is ``x``, in the leaf dtypes of ``v``. ``damping`` is one number, or a pytree
    like the parameters with one number per leaf. The solver is called while JAX traces. In the `SolveInfo` that it returns,
    ``residual`` must be computed from the returned ``x``, and ``converged`` must never be true of a wrong answer.
    """

    def __call__(self, fisher: Operator, v: chex.ArrayTree, damping: Any) -> tuple[Any, SolveInfo]: ...


VIEW = "operator -> operator, such as jf.diagonal"
"""The expected type of a view, as messages show it."""


@final
@array_fields("form", "provenance", "views_of", repr=False)
class Operator:
    """A symmetric linear operator on pytrees shaped like the parameters; positive semi-definite if it is a Fisher.

    The matrix ``F`` below is over the p parameters in `jax.flatten_util.ravel_pytree` order. A vector ``v`` is a pytree like
    the parameters, of real floating leaves; the result has the leaf dtypes of ``v``. Matrices and scalars have the statistics
    dtype: float32, or float64 if a parameter is float64. ``F + G``, ``c * F`` and ``F / c`` are operators, for a ``c`` that is
    not negative. ``F @ v`` is `mv`, and ``np.asarray(F)`` is `as_matrix`. Costs are stated in products with F. For scores a
    product takes two passes over the held factors, and for `jaxfisher.implicit_fisher` about three gradients of the model.

    `logdet`, `trace`, `diagonal`, `quadratic` and `solve` are differentiable in parameters, data and damping, in forward and
    reverse mode, also where eigenvalues are equal. For an undamped solve with a deficient rank the null space counts as fixed.

    A vector of another structure, shape or dtype raises `ValueError` or `TypeError` with its first bad path. A method that
    would need to make the matrix for p above 4096 raises `ValueError`, and so does an operator that came out of `jax.vmap`.

    Attributes:
        form: how the matrix is held.
        provenance: the kind of the Fisher, and the examples that its mean is over.
        views_of: the operator that views are taken of, if that is not this one.
    """

    form: Form
    provenance: Provenance
    views_of: Operator | None = None

    @property
    def spec(self) -> ParamSpec:
        """The paths, shapes and dtypes of the parameters."""
        return self.form.spec

    @property
    def size(self) -> int:
        """Number of parameters, p."""
        return self.form.spec.size

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix, ``(p, p)``."""
        return self.size, self.size

    @property
    def n(self) -> Scalar:
        """The number of examples in the mean, a floating scalar; for a sum, the total over all terms.

        An example of weight zero is padding, and is not counted.
        """
        return self.provenance.n

    def mv(self, v: chex.ArrayTree) -> chex.ArrayTree:
        """``F v``, a pytree like ``v``, at the cost of one product.

        >>> import jax.numpy as jnp, jaxfisher as jf
        >>> F = jf.exact_fisher(lambda w, x: jf.Normal(x @ w, 1.0))(jnp.zeros(2), jnp.array([[2.0, 0.0], [2.0, 2.0]]))
        >>> print(F.mv(jnp.array([1.0, 0.0])))
        [4. 2.]
        """
        return cast_like(_product(self, self.spec.vector(v)), v)

    def quadratic(self, v: chex.ArrayTree) -> Scalar:
        """``v^T F v``, a scalar: twice the KL divergence of a small step ``v``, in nats, at the cost of at most one product.

        >>> import jax.numpy as jnp, jaxfisher as jf
        >>> F = jf.exact_fisher(lambda mu: jf.Normal(mu, 2.0))(0.0)  # 1/4
        >>> print(F.quadratic(2.0), 2 * jf.kl(lambda mu: jf.Normal(mu, 2.0))(0.0, 2.0))
        1.0 1.0
        """
        return _quadratic(self, self.spec.vector(v))

    def solve(self, v: chex.ArrayTree, damping: Damping) -> chex.ArrayTree:
        """``(F + damping I)^-1 v``, a pytree like ``v``; the minimum-norm solution if F is singular and the damping zero.

        ``damping`` is one number, or a pytree like the parameters with one number above zero for each leaf, or with an array of
        the leaf's shape, one number for each parameter. For such arrays, forms other than dense, block-diagonal and diagonal
        make their matrix. For many right-hand sides use `jax.vmap` over ``v``: the factorisation is then done once. The cost is
        one factorisation (of the smaller of p x p and n x n for scores, of p x p for a matrix, of each factor for a Kronecker
        product) and a few products. `jaxfisher.solve` also returns a report, and takes other solvers.

        >>> import jax.numpy as jnp, jaxfisher as jf
        >>> F = jf.exact_fisher(lambda w, x: jf.Bernoulli(logits=w * x))(0.0, jnp.array([1.0, 3.0]))  # 5/4
        >>> print(F.solve(2.5, damping=1.25))
        1.0
        """
        return exact_solve(self, v, damping)[0]

    def logdet(self, damping: Damping) -> Scalar:
        """``log det (F + damping I)``, a scalar: minus infinity if the matrix is singular, NaN if its determinant is negative.

        It costs one factorisation, as `solve` does. `jaxfisher.estimate_logdet` estimates it from products.

        >>> import jax.numpy as jnp, jaxfisher as jf
        >>> F = jf.scaled_identity(jnp.zeros(3), 0.5)
        >>> print(F.logdet(damping=0.5))  # of the identity
        0.0
        """
        return _log_determinant(self, checked_damping(damping, self.spec))

    def power_mv(self, v: chex.ArrayTree, power: chex.Numeric, damping: chex.Numeric = 0.0) -> chex.ArrayTree:
        """``(F + damping I)^power v``, a pytree like ``v``; at zero damping only along directions where F is not zero.

        An eigenvalue that is zero to rounding counts as zero. It costs an eigendecomposition of the matrix that `solve`
        factors; for a diagonal, and a form held by eigenvectors, it costs one product.

        >>> import jax.numpy as jnp, jaxfisher as jf
        >>> print(jf.scaled_identity(jnp.zeros(2), 4.0).power_mv(jnp.ones(2), power=1.5))
        [8. 8.]
        """
        check_number("power", power)
        power = jnp.asarray(power, self.spec.dtype)
        strength = nonnegative("damping", damping, self.spec.dtype)
        return cast_like(_power_of(self, self.spec.vector(v), power, strength), v)

    def sqrt_mv(self, v: chex.ArrayTree, damping: chex.Numeric = 0.0) -> chex.ArrayTree:
        """``(F + damping I)^(1/2) v``, by the symmetric root: turns white noise into noise with covariance ``F + damping I``.

        The result is a pytree like ``v``, at the cost of `power_mv`.

        >>> import jax.numpy as jnp, jaxfisher as jf
        >>> print(jf.scaled_identity(jnp.zeros(2), 3.0).sqrt_mv(jnp.ones(2), damping=1.0))
        [2. 2.]
        """
        return self.power_mv(v, 0.5, damping)

    def inv_sqrt_mv(self, v: chex.ArrayTree, damping: Damping = 0.0) -> chex.ArrayTree:
        """``(F + damping I)^(-1/2) v``: turns white noise into noise with precision ``F + damping I``, as for Laplace draws.

        At zero damping it acts only along directions in which F is not zero to rounding. The result is a pytree like ``v``, at
        the cost of `power_mv`. With a damping for each leaf or parameter, as in `solve`, it is another root of the inverse,
        ``R (R F R + I)^(-1/2)`` with ``R = damping^(-1/2)``, which is not symmetric.

        >>> import jax.numpy as jnp, jaxfisher as jf
        >>> print(jf.scaled_identity(jnp.zeros(2), 3.0).inv_sqrt_mv(jnp.ones(2), damping=1.0))
        [0.5 0.5]
        """
        return cast_like(_inverse_root(self, self.spec.vector(v), checked_damping(damping, self.spec)), v)

    def as_matrix(self) -> Float[Array, "p p"]:
        """``F`` as a dense matrix, shape ``[p, p]``, for any p. From scores it costs ``n p^2`` flops, else up to p products.

        >>> import jax.numpy as jnp, jaxfisher as jf
        >>> F = jf.exact_fisher(lambda w, x: jf.Normal(x @ w, 1.0))(jnp.zeros(2), jnp.array([[2.0, 0.0], [2.0, 2.0]]))
        >>> print(F.as_matrix())
        [[4. 2.]
         [2. 2.]]
        """
        return _matrix(self)

    def diagonal(self) -> chex.ArrayTree:
        """The diagonal ``F_jj``, a pytree like the parameters in the statistics dtype. From scores it costs about one product.

        >>> import jax.numpy as jnp, jaxfisher as jf
        >>> F = jf.exact_fisher(lambda w, x: jf.Normal(x @ w, 1.0))(jnp.zeros(2), jnp.array([[2.0, 0.0], [2.0, 2.0]]))
        >>> print(F.diagonal())
        [4. 2.]
        """
        return joined(_diagonal(self))

    def trace(self) -> Scalar:
        """``tr F``, a scalar, at the cost of `diagonal` or less; `jaxfisher.estimate_trace` estimates it from products.

        >>> import jax.numpy as jnp, jaxfisher as jf
        >>> F = jf.exact_fisher(lambda w, x: jf.Normal(x @ w, 1.0))(jnp.zeros(2), jnp.array([[2.0, 0.0], [2.0, 2.0]]))
        >>> print(F.trace())
        6.0
        """
        return _trace(self)

    def eigvalsh(self) -> Float[Array, " p"]:
        """The p eigenvalues of ``F``, ascending, shape ``[p]``; those inside rounding error are exactly zero.

        From scores they cost an eigendecomposition of the smaller of p x p and n x n.

        >>> import jax.numpy as jnp, jaxfisher as jf
        >>> F = jf.exact_fisher(lambda w, x: jf.Normal(x @ w, 1.0))(jnp.zeros(2), jnp.array([[2.0, 2.0]]))
        >>> print(F.eigvalsh().round(5))
        [0. 8.]
        """
        return _eigenvalues(self)

    def frobenius_norm(self) -> Scalar:
        """``sqrt(sum_ij F_ij^2)``, a scalar: also the root of the sum of squared eigenvalues.

        From scores it costs the smaller of the matrices ``S^T S`` and ``S S^T``.

        >>> import jax.numpy as jnp, jaxfisher as jf
        >>> print(jf.scaled_identity(jnp.zeros(4), 3.0).frobenius_norm())
        6.0
        """
        return _frobenius_norm(self)

    def rank(self) -> Int[Array, ""]:
        """The number of eigenvalues that are not zero to rounding, after F is scaled to a unit diagonal; an int32 scalar.

        It costs what `eigvalsh` does.

        >>> import jax.numpy as jnp, jaxfisher as jf
        >>> F = jf.exact_fisher(lambda w, x: jf.Normal(x @ w, 1.0))(jnp.zeros(2), jnp.array([[2.0, 2.0]]))
        >>> print(F.rank())
        1
        """
        return _rank(self)

    def null_space(self) -> chex.ArrayTree:
        """An orthonormal basis of the directions in which F is zero to rounding: vectors stacked along a leading axis.

        The data do not identify such directions: no prediction depends on them. Their number depends on the values of F, so
        this method does not run under ``jit``. It costs the matrix and its eigendecomposition.

        >>> import jax.numpy as jnp, jaxfisher as jf
        >>> F = jf.exact_fisher(lambda w, x: jf.Normal(x @ w, 1.0))(jnp.zeros(2), jnp.array([[2.0, 2.0]]))
        >>> print(jnp.abs(F.null_space() @ jnp.array([1.0, -1.0])).round(4))  # the direction of their difference
        [1.4142]
        """
        basis = null_vectors(_small_matrix(self))
        null: chex.ArrayTree = joined(jax.vmap(self.spec.unravel)(basis.T))
        return null

    def restrict(self, keep: Callable[[str], bool]) -> Operator:
        """The information on some of the parameters if the others are known: the block of F over those that are kept.

        ``keep`` is a function from the path of a parameter leaf, such as ``"['layer']['w']"``, to a bool. The vectors of the
        result are trees like the parameters with None for each leaf that was dropped. Nothing is computed.

        >>> import jax.numpy as jnp, jaxfisher as jf
        >>> F = jf.exact_fisher(lambda p, x: jf.Normal(p["a"] * x + p["b"], 1.0))({"a": 1.0, "b": 0.0}, jnp.array([1.0, 3.0]))
        >>> print(F.restrict(lambda path: path == "['a']").as_matrix())
        [[5.]]
        """
        flags = self.spec.flags(keep, "restrict")
        return restricted(self, flags, subtree(self.spec.treedef, flags))

    def marginal(self, keep: Callable[[str], bool]) -> Operator:
        """The information on some of the parameters if the others are unknown: ``F_kk - F_kr F_rr^+ F_rk``, held dense.

        ``keep`` and the vectors of the result are as in `restrict`. It costs the matrix and decompositions of it. From scores
        it also costs three products for each parameter. `jaxfisher.marginal` is the same function, with more documentation.

        >>> import jax.numpy as jnp, jaxfisher as jf
        >>> F = jf.exact_fisher(lambda p, x: jf.Normal(p["a"] * x + p["b"], 1.0))({"a": 1.0, "b": 0.0}, jnp.array([1.0, 3.0]))
        >>> print(F.marginal(lambda path: path == "['a']").as_matrix().round(4))  # variance of x
        [[1.]]
        """
        seen = _looked_at(self)
        return Operator(_schur_complement(seen, Static(seen.spec.flags(keep, "marginal"))), seen.provenance.as_a_whole())

    if not TYPE_CHECKING:  # to a type checker every name would be there
        __getattr__ = absent("a Fisher", OF_OPERATOR)

    # NumPy would take an operator for a scalar and make an array of operators; this makes it use the methods below.
    __array_ufunc__ = None

    def __add__(self, other: Any) -> Operator:
        if type(other) is int and other == 0:  # the start of Python's `sum`
            return self
        if not isinstance(other, Operator):
            raise TypeError(
                f"cannot add a Fisher and {described(other)}: expected two Fishers over the same parameters. A multiple of "
                "the identity is jf.scaled_identity(F, c), or `damping`, an argument of solve, logdet and natural_grad."
            )
        self.spec.check_same(other.spec, f"cannot add to {self} the operator {other}")
        views_of = None if self.views_of is None and other.views_of is None else _looked_at(self) + _looked_at(other)
        return Operator(added(self.form, other.form), self.provenance.plus(other.provenance), views_of)

    __radd__ = __add__

    def __mul__(self, factor: Any) -> Operator:
        c = nonnegative("c` in `c * F", factor, self.spec.dtype)
        views_of = None if self.views_of is None else c * self.views_of
        return Operator(self.form.scaled(c), self.provenance.times(), views_of)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Operator:
        return self * (1 / positive("c` in `F / c", divisor, self.spec.dtype))

    def __sub__(self, other: Any) -> Operator:
        raise TypeError(
            f"cannot subtract {described(other)} from a Fisher: a difference may have negative eigenvalues, and then no root, "
            "no damping and no norm of it is defined. Subtract products, `F @ v - G @ v`, or matrices, `F.as_matrix()`."
        )

    def __matmul__(self, v: chex.ArrayTree) -> chex.ArrayTree:
        return self.mv(v)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return np.asarray(self.as_matrix(), dtype=dtype)

    def __repr__(self) -> str:
        views = "" if self.views_of is None else f"; views of {self.views_of.provenance}"
        return f"Fisher({self.provenance}, params {self.size:,}, {self.form.name}{views})"


def _program(name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
    """The computation of one method on the form of an operator, as one cached program; it refuses a stack of operators."""
    program = once(compute)

    def call(fisher: Operator, *arguments: Any) -> Any:
        refuse_stack(fisher.form.stack, "Operator", name)
        return program(fisher.form, *arguments)

    return call


def _solved(form: Form, v: Any, damping: Dampings, factorise: Static[Factorise | None]) -> tuple[Any, SolveInfo]:
    form, v, damping = alike(form, v, damping)
    return reported(form.spec, damped_inverse(form, damping, factorise.value), v)


def inner_products(fisher: Operator, vectors: Any) -> Float[Array, "k k"]:
    """``v_i^T F v_j`` for vectors stacked along a leading axis, in the statistics dtype, as one program."""
    found: Array = _inner_products(fisher, vectors)
    return found


def _quadratic_of(form: Form, v: Any) -> Scalar:
    return form.inner_products(jax.tree.map(lambda leaf: leaf[None], v))[0, 0]


_product = _program("mv", lambda form, v: form.product()(v))


_quadratic = _program("quadratic", _quadratic_of)
_inner_products = _program("inner_products", lambda form, vectors: form.inner_products(vectors))
_solution = _program("solve", _solved)
_log_determinant = _program("logdet", damped_logdet)
_power_of = _program("power_mv", lambda form, v, power, damping: form.power_mv(v, power, damping))
_inverse_root = _program("inv_sqrt_mv", damped_inverse_root)
_matrix = _program("as_matrix", lambda form: form.as_matrix())
_small_matrix = _program("null_space", lambda form: small_matrix(form, "null_space"))
_diagonal = _program("diagonal", lambda form: form.diagonal())
_trace = _program("trace", lambda form: form.trace())
_eigenvalues = _program("eigvalsh", lambda form: form.eigvalsh())
_frobenius_norm = _program("frobenius_norm", lambda form: form.frobenius_norm())
_rank = _program("rank", lambda form: form.rank())
_schur_complement = _program("marginal", lambda form, flags: schur_complement(form, flags.value))


def restricted(fisher: Operator, keep: tuple[bool, ...], treedef: Any) -> Operator:
    """The block of F over the leaves whose flag is set, on vectors of the structure ``treedef``."""
    part = None if fisher.views_of is None else restricted(fisher.views_of, keep, treedef)
    return Operator(fisher.form.restrict(keep, treedef), fisher.provenance, part)


def exact_solve(
    fisher: Operator, v: chex.ArrayTree, damping: Damping, factorise: Factorise | None = None
) -> tuple[Any, SolveInfo]:
    """The exact solution of ``(F + damping I) x = v`` and a report on it.

    Without ``factorise`` a damping that is known to be positive takes one Cholesky factor, and any other the form's default.
    """
    known = checked_damping(damping, fisher.spec)
    if factorise is None and all(is_known_positive(leaf, fisher.spec.dtype) for leaf in jax.tree.leaves(damping)):
        factorise = by_cholesky(0.0)
    x, info = _solution(fisher, fisher.spec.vector(v), known, Static(factorise))
    return cast_like(x, v), info


def scores_of(fisher: Operator, caller: str) -> Scores:
    """The scores that F is made of, or a `TypeError` that says which Fishers have scores."""
    scores = fisher.form.as_scores()
    if scores is None:
        raise TypeError(
            f"{caller}: {fisher} is not held as scores. Give what jf.exact_fisher, jf.empirical_fisher, jf.sampled_fisher, "
            "jf.implicit_fisher or jf.fisher_from_scores returns."
        )
    return scores


def as_operator(fisher: Any, caller: str) -> Operator:
    """``fisher`` if it is an operator, else a `TypeError` that says how to make one."""
    if isinstance(fisher, Operator):
        refuse_stack(fisher.form.stack, "Operator", caller)
        return fisher
    seen = "a function. Call the function with the parameters and the data first" if callable(fisher) else described(fisher)
    # `optax.inject_hyperparams` calls every argument that is a function, a view included, with the count of steps.
    is_count = isinstance(fisher, jax.Array) and fisher.ndim == 0 and jnp.issubdtype(fisher.dtype, jnp.integer)
    fix = " In `optax.inject_hyperparams`, name `view`, `solver` and `like` in `static_args`." if is_count else ""
    fix = " Pass its `fisher`." if isinstance(getattr(fisher, "fisher", None), Operator) else fix
    expected = "expected a Fisher operator, such as jf.exact_fisher(model)(params, x) returns"
    raise TypeError(f"{caller}: {expected}, got {seen}.{fix}")


def viewed(fisher: Any, caller: str) -> Operator:
    """The operator that views of ``fisher`` are taken of, or the `TypeError` of `as_operator`."""
    return _looked_at(as_operator(fisher, caller))


def _looked_at(fisher: Operator) -> Operator:
    return fisher if fisher.views_of is None else fisher.views_of
