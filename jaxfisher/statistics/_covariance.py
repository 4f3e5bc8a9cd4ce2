"""Covariances of estimates: the inverse information, the sandwich, and the delta method for functions of the parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Scalar

from jaxfisher._linalg import matmul
from jaxfisher._operators.form import Form
from jaxfisher._operators.formed import dense, from_matrix
from jaxfisher._operators.observations import means, observations
from jaxfisher._operators.operator import Operator, as_operator
from jaxfisher._provenance import Provenance
from jaxfisher._pytree import array_fields
from jaxfisher._solve import solve
from jaxfisher._tree import ParamSpec, cast_like, check_function, joined
from jaxfisher._values import described


@array_fields("finite", "null", "unit", "blur", repr=False)
class Covariance(Form):
    """``lim (A + eps U^2)^-1``: infinite along the null space of A, and a finite matrix elsewhere. ``U`` is diagonal: units.

    The columns of ``null`` are an orthonormal basis of the null space of ``U^-1 A U^-1``, and zeros. Its rows are zero for the
    parameters that A determines. ``blur`` bounds the rounding error of an entry.
    """

    finite: Float[Array, "p p"]
    null: Float[Array, "p p"]
    unit: Float[Array, " p"]
    blur: Scalar
    spec: ParamSpec

    name = "dense"

    @property
    def stack(self) -> tuple[int, ...]:
        return self.unit.shape[:-1]

    def as_matrix(self) -> Float[Array, "p p"]:
        return self._beside(self._axes, self._axes, self.finite)

    def product(self) -> Callable[[Any], Any]:
        def product(v: Any) -> Any:
            flat = self.spec.ravel(v, "v")
            along = matmul(self.finite, flat)[:, None]
            return self.spec.unravel(self._beside(self._axes, self._unseen(flat[None]), along)[:, 0])

        return product

    def inner_products(self, vectors: Any) -> Float[Array, "k k"]:
        rows = jax.vmap(lambda v: self.spec.ravel(v, "v"))(vectors)
        unseen = self._unseen(rows)
        return self._beside(unseen, unseen, matmul(rows, matmul(self.finite, rows.T)))

    @property
    def _axes(self) -> _Unseen:
        return _Unseen(self.null, jnp.ones_like(self.unit))

    def _unseen(self, rows: Float[Array, "k p"]) -> _Unseen:
        scaled = rows / self.unit[None, :]
        sizes = jnp.linalg.norm(scaled, axis=1)
        found = matmul(scaled, self.null)
        return _Unseen(_without_rounding(found, self.blur * sizes), sizes)

    def _beside(self, one: _Unseen, other: _Unseen, finite: Float[Array, "k l"]) -> Float[Array, "k l"]:
        """Infinity with the sign of the product of the unseen parts where it is not zero to rounding, else ``finite``."""
        product = matmul(one.parts, other.parts.T)
        lengths = [jnp.linalg.norm(each.parts, axis=1) for each in (one, other)]
        least = 2 * self.blur * (jnp.outer(lengths[0], other.sizes) + jnp.outer(one.sizes, lengths[1]))
        return jnp.where(product > least, jnp.inf, jnp.where(product < -least, -jnp.inf, finite))

    def diagonal(self) -> Any:
        return self.spec.unravel(jnp.diagonal(self.as_matrix()))

    def scaled(self, factor: Any) -> Covariance:
        return dataclasses.replace(self, finite=factor * self.finite)

    def restrict(self, keep: tuple[bool, ...], treedef: Any) -> Covariance:
        spec = self.spec.restrict(keep, treedef)
        flags = [jnp.full(size, flag) for size, flag in zip(self.spec.sizes, keep, strict=True)]
        index = jnp.flatnonzero(jnp.concatenate(flags), size=spec.size)
        return Covariance(self.finite[jnp.ix_(index, index)], self.null[index], self.unit[index], self.blur, spec)


class _Unseen(NamedTuple):
    """The parts of directions in the null space of A, zero where they are only rounding error, and the directions' lengths."""

    parts: Float[Array, "k p"]
    sizes: Float[Array, " k"]


def _without_rounding(parts: Float[Array, "k p"], blur: Any) -> Float[Array, "k p"]:
    return jnp.where(jnp.linalg.norm(parts, axis=1, keepdims=True) > 4 * jnp.reshape(blur, (-1, 1)), parts, 0)


# An operator of unknown origin, such as `jaxfisher.from_matrix`, may be the information or the covariance. The two functions
# below refuse what is known to be the other one: a covariance by its form, and an information by its mean over examples.


def as_information(fisher: Any, caller: str) -> Operator:
    """The operator, or a `TypeError` if it is a covariance, whose inverse is an information."""
    fisher = as_operator(fisher, caller)
    if isinstance(fisher.form, Covariance):
        raise TypeError(f"{caller} is {fisher}, a covariance; expected the Fisher, whose inverse that is.")
    return fisher


def as_covariance(covariance: Any, caller: str) -> Operator:
    """The operator, or a `TypeError` if it is a mean over examples: an information, whose inverse is a covariance."""
    covariance = as_operator(covariance, caller)
    if means(covariance):
        raise TypeError(
            f"{caller} is {covariance}, the information of examples; expected a covariance. Pass jf.covariance(fisher), or "
            "jf.sandwich(bread, meat)."
        )
    return covariance


def inverse_and_null(fisher: Operator) -> tuple[Float[Array, "p p"], tuple[Float[Array, "p p"], Float[Array, " p"], Scalar]]:
    """The pseudo-inverse of F; a basis of its null space in units in which F has a unit diagonal, these units, and rounding."""
    matrix = dense(fisher).as_matrix()
    diagonal = jnp.abs(jnp.diagonal(matrix))
    unit = jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1))
    equal = from_matrix(matrix / unit[:, None] / unit[None, :], fisher)
    eye = jnp.eye(fisher.size, dtype=matrix.dtype)
    columns, info = jax.vmap(lambda row: solve(equal, fisher.spec.unravel(row), 0.0))(eye)
    inverse = jax.vmap(lambda x: fisher.spec.ravel(x, "x"))(columns)
    inverse = 0.5 * (inverse + inverse.T)
    # For parameters that F determines, a null vector has entries that are zero to rounding over the smallest kept eigenvalue.
    # The eigenvalues that are not kept show how large rounding is.
    values, vectors = jnp.linalg.eigh(equal.as_matrix())
    sizes = jnp.abs(values)  # an observed information may have negative eigenvalues
    smallest = jnp.arange(fisher.size, dtype=jnp.int32) < fisher.size - info.rank[0]
    lost = jnp.zeros(fisher.size, bool).at[jnp.argsort(sizes)].set(smallest)
    eps = float(jnp.finfo(matrix.dtype).eps)
    rounding = 10 * jnp.maximum(fisher.size * eps, jnp.max(sizes, where=lost, initial=0.0))
    blur = jnp.minimum(rounding / jnp.min(sizes, where=~lost, initial=1.0), 0.25 * eps**0.25)
    null = _without_rounding(jnp.where(lost, vectors, 0), blur)
    return inverse / unit[:, None] / unit[None, :], (null, unit, blur)


def covariance(fisher: Operator, n: chex.Numeric | None = None) -> Operator:
    r"""The covariance of estimates from n observations, ``(n F)^-1``: the inverse of the information of all the data.

    .. math:: C = (n F)^{-1}.

    With the exact Fisher at the maximum of the likelihood it is the asymptotic covariance of the estimate, which statsmodels
    uses for generalised linear models; with `jaxfisher.observed_information` it is that of statsmodels' discrete models.

    **When it is the wrong tool.** It is right only if the model is right. If the model may be wrong, use `jaxfisher.sandwich`.
    Multiply it by a dispersion that was estimated: ``phi * jf.covariance(F)``.

    If F is singular, the result is the limit of ``(n F + eps diag F)^-1``. It is infinite for parameters that the data do not
    determine, and in products for such directions. It is finite for the others, such as the difference of two logits.

    Args:
        fisher: an operator, a mean over examples; it is made dense, at ``p^2`` memory and ``p^3`` flops.
        n: the number of observations. None takes that of the operator's own mean; with weights, which say how often an
            observation occurs, it is their sum. A sum of several means needs ``n``: it is 1 for ``n_1 F_1 + n_2 F_2``.

    Returns:
        An operator: ``diagonal()`` has the variances, ``quadratic(v)`` is the variance of ``v . theta``, and ``as_matrix()``
        the whole covariance.

    Raises:
        TypeError: ``fisher`` is not an operator.
        ValueError: ``n`` is not given, and the operator is no mean, or a sum of several means.

    Reference: van der Vaart, Asymptotic Statistics (1998), theorem 5.39.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> F = jf.exact_fisher(lambda mu, x: jf.Normal(mu * x, 2.0))(0.0, jnp.array([1.0, 1.0, 1.0, 1.0]))
    >>> print(jf.covariance(F).as_matrix())  # 2^2 / 4
    [[1.]]
    """
    fisher = as_information(fisher, "covariance: `fisher`")
    total = observations(fisher, n, "covariance")
    inverse, unseen = inverse_and_null(fisher)
    return Operator(Covariance(inverse / total, *unseen, fisher.spec), Provenance("covariance"))


def standard_errors(fisher: Operator, n: chex.Numeric | None = None) -> Any:
    r"""Standard errors of the parameters, ``sqrt diag (n F)^-1``, a pytree like the parameters.

    Args:
        fisher: as in `jaxfisher.covariance`; or a covariance that `jaxfisher.covariance` or `jaxfisher.sandwich` returned.
        n: as in `jaxfisher.covariance`; None for a covariance.

    Returns:
        Standard errors in the units of the parameters and the statistics dtype, infinite for a parameter that the data do not
        determine. For a complex parameter it is ``a + i b``, with the errors of its real and of its imaginary part.

    Raises:
        TypeError: ``fisher`` is not an operator.
        ValueError: ``n`` is not given, and the operator is no mean; or ``n`` is given with a covariance.

    Reference: van der Vaart, Asymptotic Statistics (1998), theorem 5.39.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda p, x: jf.Normal(p["level"] + 0 * p["idle"], 2.0)
    >>> F = jf.exact_fisher(model)({"level": 0.0, "idle": 0.0}, jnp.zeros(4))
    >>> {name: float(error) for name, error in jf.standard_errors(F).items()}
    {'idle': inf, 'level': 1.0}
    """
    fisher = as_operator(fisher, "standard_errors")
    if isinstance(fisher.form, Covariance):
        if n is not None:
            raise ValueError(
                "standard_errors: `n` is given with a covariance, which already is that of n observations. Leave `n` out."
            )
        return _roots(fisher)
    return _roots(covariance(fisher, n))


def _roots(covariance: Operator) -> Any:
    """The roots of the variances; for a complex leaf, those of its real and of its imaginary part."""
    spec = covariance.spec
    return joined(spec.unravel(jnp.sqrt(spec.ravel(covariance.diagonal(), "variances"))))


def sandwich(bread: Operator, meat: Operator, n: chex.Numeric | None = None) -> Operator:
    r"""The covariance of estimates that is valid even if the model is wrong: ``B^-1 M B^-1 / n``.

    .. math:: C = \frac1n B^{-1} M B^{-1}, \qquad B = -\frac1n \sum_i \nabla^2 \log p(x_i), \qquad
        M = \frac1n \sum_i s_i s_i^T.

    With `jaxfisher.observed_information` as bread and `jaxfisher.empirical_fisher` as meat it is White's estimator, HC0 of
    statsmodels. `jaxfisher.statistics.meat` makes the meats of HC1, HC2 and HC3 and of clusters.

    **When it is the wrong tool.** If the model is right it is noisier than `jaxfisher.covariance`. With few observations or few
    clusters it is too small, which HC3 corrects in part. It says how far the estimate is from the best fit of a wrong model;
    that fit may still be useless.

    Args:
        bread: minus the mean Hessian of the log-likelihood, or the exact Fisher; made dense.
        meat: the mean outer product of the scores, over the same parameters; made dense.
        n: the number of observations; None takes that of the bread, as in `jaxfisher.covariance`.

    Returns:
        An operator as `jaxfisher.covariance` returns it, infinite along the null space of the bread.

    Raises:
        TypeError: ``bread`` or ``meat`` is not an operator.
        ValueError: the two are over different parameters; ``n`` is not given, and the bread is no mean.

    Reference: White, Maximum likelihood estimation of misspecified models (Econometrica 1982), theorem 3.2; Huber (1967).

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> log_prob, y = jf.log_likelihood(lambda mu: jf.Normal(mu, 1.0)), jnp.array([2.0, -2.0, 2.0, -2.0])
    >>> B, M = jf.observed_information(log_prob)(0.0, y), jf.empirical_fisher(log_prob)(0.0, y)
    >>> print(jf.sandwich(B, M).as_matrix())  # the variance of y over 4, whatever the model's scale says
    [[1.]]
    """
    bread, meat = as_information(bread, "sandwich: `bread`"), as_information(meat, "sandwich: `meat`")
    bread.spec.check_same(meat.spec, f"sandwich: `bread` is {bread}, and `meat` is {meat}")
    total = observations(bread, n, "sandwich")
    inverse, unseen = inverse_and_null(bread)
    matrix = matmul(inverse, matmul(meat.as_matrix(), inverse)) / total
    return Operator(Covariance(0.5 * (matrix + matrix.T), *unseen, bread.spec), Provenance("sandwich"))


def delta_method(function: Callable[[Any], Any]) -> Callable[[chex.ArrayTree, Operator], tuple[Any, Float[Array, "k k"]]]:
    r"""The value of a function of the parameters, and the covariance that it inherits from theirs.

    .. math:: \mathrm{cov}(f(\hat\theta)) \approx J C J^T, \qquad J = \partial f / \partial \theta \text{ at } \hat\theta.

    **When it is the wrong tool.** It is only the linear part. If f is nonlinear within a standard error, such as a ratio whose
    denominator is near zero, use `jaxfisher.statistics.likelihood_interval`.

    Args:
        function: ``params -> array or pytree of arrays``, of k numbers in all.

    Returns:
        A function ``(params, covariance) -> (value, matrix)``: the value of f, and its covariance, shape ``[k, k]``, in the
        order of `jax.flatten_util.ravel_pytree`, infinite for numbers that the data do not determine.

    Raises:
        TypeError: ``function`` is not a function; (when called) ``covariance`` is no operator, or a Fisher, or the function
            does not return real floating numbers.
        ValueError: (when called) parameters of another structure.

    Reference: van der Vaart, Asymptotic Statistics (1998), theorem 3.1.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> from jaxfisher import statistics
    >>> F = jf.exact_fisher(lambda rate, x: jf.Poisson(jnp.log(rate) + 0 * x))(4.0, jnp.zeros(100))
    >>> value, matrix = statistics.delta_method(jnp.log)(4.0, jf.covariance(F))
    >>> print(round(float(value), 3), matrix)  # log 4, and 1 / (100 rate)
    1.386 [[0.0025]]
    """
    check_function("function", function, "params -> array")

    def inherited(params: chex.ArrayTree, covariance: Operator, /) -> tuple[Any, Float[Array, "k k"]]:
        covariance = as_covariance(covariance, "delta_method: `covariance`")
        spec = covariance.spec
        flat = spec.ravel(params, "params")
        check_real("delta_method", jax.eval_shape(function, params))

        def numbers(flat: Array) -> Array:
            return ravel_pytree(function(cast_like(spec.unravel(flat), params)))[0]

        jacobian = jax.jacrev(numbers)(flat)
        matrix = covariance.form.inner_products(jax.vmap(spec.unravel)(jacobian.astype(spec.dtype)))
        return function(params), matrix

    return inherited


def check_real(caller: str, value: Any) -> None:
    """Raise `TypeError` unless a function of the parameters returned real floating numbers, which have derivatives."""
    for leaf in jax.tree.leaves(value) or [value]:
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            seen = f"dtype {leaf.dtype}" if hasattr(leaf, "dtype") else described(leaf)
            raise TypeError(
                f"{caller}: `function` returned {seen}; expected real floating numbers. Of complex ones return .real or .imag."
            )


def cramer_rao_bound(
    function: Callable[[Any], Any],
) -> Callable[..., Float[Array, "k k"]]:
    r"""The smallest covariance that an unbiased estimate of a function of the parameters can have.

    .. math:: \mathrm{cov}(\hat f) \succeq J (n F)^{-1} J^T.

    **When it is the wrong tool.** A biased estimate may be below the bound, and for few observations no estimate may reach it.

    Args:
        function: ``params -> array or pytree of arrays``, of k numbers in all.

    Returns:
        A function ``(params, fisher, n=None) -> matrix [k, k]``, of the exact Fisher at the parameters. With ``n=None`` the
        bound is for the number of observations in the mean of the Fisher.

    Raises:
        TypeError: ``function`` is not a function; (when called) ``fisher`` is not an operator.
        ValueError: (when called) ``n`` is not given, and the operator is no mean.

    Reference: Lehmann and Casella, Theory of Point Estimation (1998), theorem 2.6.6.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> from jaxfisher import statistics
    >>> F = jf.exact_fisher(lambda log_scale: jf.Normal(0.0, jnp.exp(log_scale)))(0.0)
    >>> print(statistics.cramer_rao_bound(jnp.exp)(0.0, F, n=50))  # scale^2 / (2 n)
    [[0.01]]
    """
    inherited = delta_method(function)

    def bound(params: chex.ArrayTree, fisher: Operator, n: chex.Numeric | None = None) -> Float[Array, "k k"]:
        return inherited(params, covariance(fisher, n))[1]

    return bound
