"""The Fisher information of one vector of data with a Gaussian likelihood, priors, errors and biases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxfisher._linalg import matmul
from jaxfisher._operators.dense import Dense
from jaxfisher._operators.formed import from_matrix
from jaxfisher._operators.observations import observations
from jaxfisher._operators.operator import Operator
from jaxfisher._provenance import Provenance
from jaxfisher._tree import HIGHEST, ParamSpec, cast_like, check_function, joined, param_spec
from jaxfisher._values import check_array, check_definite, described, real_array
from jaxfisher.statistics._covariance import as_information

Simulator = Callable[[Any], Float[Array, " d"]]
Spread = Callable[[Any], Float[Array, "d d"]] | Float[Array, "d d"]


class _Whitened(NamedTuple):
    """Derivatives of mean and covariance, in units in which the covariance is the identity."""

    mean: Float[Array, "d p"]
    covariance: Float[Array, "p d d"]
    root: Float[Array, "d d"]

    def apart(self, effect: Float[Array, " d"]) -> Float[Array, " d"]:
        return jax.scipy.linalg.solve_triangular(self.root, effect, lower=True)

    def both_sides(self, matrix: Float[Array, "d d"]) -> Float[Array, "d d"]:
        half = jax.scipy.linalg.solve_triangular(self.root, matrix, lower=True)
        return jax.scipy.linalg.solve_triangular(self.root, half.T, lower=True).T


def _whitened(caller: str, mean: Simulator, covariance: Spread, params: Any, spec: ParamSpec) -> _Whitened:
    flat = spec.ravel(params, "params")
    if not callable(covariance):
        check_array(f"{caller}: `covariance`", covariance)

    def spread(params: Any) -> Any:
        return covariance(params) if callable(covariance) else covariance

    shapes = jax.eval_shape(mean, params), jax.eval_shape(spread, params)
    for name, shape in zip(("mean", "covariance"), shapes, strict=True):
        if not hasattr(shape, "dtype"):
            raise TypeError(f"{caller}: `{name}` gives {described(shape)}; expected one array. Join it, as by jnp.stack.")
    size = jnp.shape(shapes[0])
    if len(size) != 1 or jnp.shape(shapes[1]) != size * 2:
        raise ValueError(
            f"{caller}: `mean` gives shape {size} and `covariance` {jnp.shape(shapes[1])}; expected one vector of data, "
            "(d,), and its covariance, (d, d). Flatten the data; for independent data give a diagonal matrix."
        )

    check_definite(f"{caller}: `covariance`", covariance)
    for name, shape in zip(("mean", "covariance"), shapes, strict=True):
        if jnp.issubdtype(shape.dtype, jnp.complexfloating):
            raise TypeError(
                f"{caller}: `{name}` gives numbers of dtype {shape.dtype}; expected real ones. For complex data give real and "
                "imaginary parts, one after the other."
            )

    def at(flat: Array) -> tuple[Array, Array]:
        here = cast_like(spec.unravel(flat), params)
        return jnp.asarray(mean(here)).astype(spec.dtype), jnp.asarray(spread(here)).astype(spec.dtype)

    (along_mean, along_spread), spread_there = jax.jacfwd(at)(flat), at(flat)[1]
    bare = _Whitened(along_mean, jnp.moveaxis(along_spread, 2, 0), jnp.linalg.cholesky(spread_there))
    return bare._replace(mean=jax.vmap(bare.apart, 1, 1)(bare.mean), covariance=jax.vmap(bare.both_sides)(bare.covariance))


def gaussian_fisher(mean: Simulator, covariance: Spread) -> Callable[[chex.ArrayTree], Operator]:
    r"""The Fisher information of a normal vector of data, whose mean and covariance a simulator gives.

    .. math:: F_{ij} = \mu_{,i}^T C^{-1} \mu_{,j} + \tfrac12 \mathrm{tr}(C^{-1} C_{,i} C^{-1} C_{,j}).

    It takes p forward derivatives together, so that the simulator runs only a few times, whatever the number of data.

    **When it is the wrong tool.** Its errors are the smallest possible ones, and those of a long or bent posterior are larger:
    if errors are not small, look at the likelihood itself. For counts or classes write a model and use
    `jaxfisher.exact_fisher`.

    Args:
        mean: ``params -> [d]``, the expected data.
        covariance: ``params -> [d, d]``, or one array that does not depend on the parameters.

    Returns:
        A function ``params -> operator``, the information of one such vector (n is one). Add the operators of independent data
        and of priors. `jaxfisher.standard_errors` gives the errors with all else fitted.

    Raises:
        ValueError: (when called) shapes that are not those of a vector and its covariance, a covariance that is known not to be
            positive definite (if unknown, it gives NaN).
        TypeError: ``mean`` is not a function; (when called) a parameter that is not a real floating array, complex data.

    Reference: Tegmark, Taylor and Heavens, Karhunen-Loeve eigenvalue problems in cosmology (1997), equation 15.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> from jaxfisher import forecasts
    >>> times = jnp.arange(4.0)
    >>> fisher = forecasts.gaussian_fisher(lambda p: p["rate"] * times, lambda p: jnp.exp(p["log_power"]) * jnp.eye(4))
    >>> F = fisher({"rate": 1.0, "log_power": 0.0})
    >>> print(F.diagonal()["rate"], F.diagonal()["log_power"])  # sum t^2, and d / 2
    14.0 2.0
    """
    check_function("mean", mean, "params -> [d]")

    def fisher_of(params: chex.ArrayTree, /) -> Operator:
        spec = param_spec(params)
        made = _whitened("gaussian_fisher", mean, covariance, params, spec)
        turns = made.covariance.reshape(spec.size, -1)
        matrix = matmul(made.mean.T, made.mean) + 0.5 * matmul(turns, turns.T)
        return Operator(Dense(0.5 * (matrix + matrix.T), spec), Provenance("Gaussian forecast", jnp.ones((), spec.dtype)))

    return fisher_of


def gaussian_prior(like: Operator | chex.ArrayTree, errors: chex.ArrayTree) -> Operator:
    r"""Independent Gaussian priors as an operator to add to a Fisher: ``diag(1 / error^2)``.

    Args:
        like: an operator over the parameters, or the parameters.
        errors: a pytree of standard deviations like the parameters; infinite for a parameter without a prior. One that turns
            out at run time not to be above zero gives NaN.

    Returns:
        An operator, in the units of the information of all the data. Add it to a Fisher that is a mean over n examples as
        ``(1 / n) * prior``.

    Raises:
        ValueError: ``errors`` of another structure, or known not to be above zero.
        TypeError: a parameter that is not a real floating array.

    Reference: Tegmark, Taylor and Heavens (1997), section 2.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> from jaxfisher import forecasts
    >>> prior = forecasts.gaussian_prior({"a": 0.0, "b": 0.0}, {"a": 0.5, "b": jnp.inf})
    >>> print(prior.as_matrix())
    [[4. 0.]
     [0. 0.]]
    """
    spec = like.spec if isinstance(like, Operator) else param_spec(like)
    deviations = spec.ravel(errors, "errors")
    for leaf in jax.tree.leaves(errors):
        parts = [] if isinstance(leaf, jax.Array) else [np.real(leaf)] + [np.imag(leaf)] * np.iscomplexobj(leaf)
        if any(np.any(part <= 0) for part in parts):
            raise ValueError(
                f"gaussian_prior: `errors` holds {np.min(leaf)}; expected standard deviations above zero, infinite for no "
                "prior. Leave out of the Fisher what is known exactly: F.restrict(lambda path: ...)."
            )
    # An error that turns out at run time not to be above zero gives NaN.
    return from_matrix(jnp.diag(1 / jnp.square(jnp.where(deviations > 0, deviations, jnp.nan))), spec.zeros())


def conditional_errors(fisher: Operator, n: chex.Numeric | None = None) -> Any:
    r"""The error of each parameter if all the others are known: ``1 / sqrt(n F_jj)``.

    The errors with the others fitted too, `jaxfisher.standard_errors`, are never smaller.

    Args:
        fisher: an operator, a mean over observations, or the information of all the data.
        n: the number of observations, as in `jaxfisher.covariance`: None takes that of the operator's own mean, and 1 is for
            the information of all the data.

    Returns:
        A pytree like the parameters, infinite where the data have no information.

    Raises:
        TypeError: ``fisher`` is not an operator.
        ValueError: ``n`` is not given, and the operator is no mean, or a sum of several means.

    Reference: Tegmark, Taylor and Heavens (1997), section 2.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> from jaxfisher import forecasts
    >>> F = jf.from_matrix(jnp.array([[4.0, 1.0], [1.0, 1.0]]), jnp.zeros(2))
    >>> print(forecasts.conditional_errors(F, n=1))
    [0.5 1. ]
    """
    fisher = as_information(fisher, "conditional_errors: `fisher`")
    total = observations(fisher, n, "conditional_errors")
    spec = fisher.spec
    return joined(spec.unravel(1 / jnp.sqrt(total * spec.ravel(fisher.diagonal(), "diagonal"))))


def bias(mean: Simulator, covariance: Spread) -> Callable[..., Any]:
    r"""The shift of the estimates by an effect that the simulator leaves out.

    .. math:: \delta\theta = F^{-1} b, \qquad b_i = \mu_{,i}^T C^{-1} \delta\mu
        + \tfrac12 \mathrm{tr}(C^{-1} C_{,i} C^{-1} \delta C).

    It is the first step of a Newton iteration on data that contain the effect; compare it with the standard errors.

    **When it is the wrong tool.** It is linear in the effect. An effect that moves estimates by several errors needs a fit.

    Args:
        mean: as in `jaxfisher.forecasts.gaussian_fisher`.
        covariance: as in `jaxfisher.forecasts.gaussian_fisher`.

    Returns:
        A function ``(params, fisher, effect, covariance_effect=None)`` that returns a pytree like the parameters. ``effect`` is
        the part that is missing in the mean, shape ``[d]``, and ``covariance_effect`` that in the covariance, shape ``[d, d]``.
        ``fisher`` is the Fisher of the analysis, with its priors.

    Raises:
        ValueError: (when called) an effect of another shape than the data.
        TypeError: ``mean`` is not a function; (when called) ``fisher`` is no operator, or a covariance; an effect that is not
            real.

    Reference: Huterer and Takada, Calibrating the nonlinear matter power spectrum (2005), equation 10; Amara and Refregier
    (2008).

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> from jaxfisher import forecasts
    >>> mean, times = lambda rate: rate * jnp.arange(3.0), jnp.arange(3.0)
    >>> F = forecasts.gaussian_fisher(mean, jnp.eye(3))(1.0)
    >>> moved = forecasts.bias(mean, jnp.eye(3))(1.0, F, 0.1 * jnp.ones(3))
    >>> print(round(float(moved), 4))  # 0.1 sum t / sum t^2
    0.06
    """
    check_function("mean", mean, "params -> [d]")

    def moved(params: chex.ArrayTree, fisher: Operator, /, effect: Any, covariance_effect: Any = None) -> Any:
        fisher = as_information(fisher, "bias: `fisher`")
        spec = fisher.spec
        made = _whitened("bias", mean, covariance, params, spec)
        size = made.mean.shape[0]
        given: list[tuple[str, Any, tuple[int, ...]]] = [("effect", effect, (size,))]
        given += [] if covariance_effect is None else [("covariance_effect", covariance_effect, (size, size))]
        for name, value, shape in given:
            if jnp.shape(value) != shape:
                raise ValueError(
                    f"bias: `{name}` is {described(value)}; expected shape {shape}, as the data have {size} numbers."
                )
        shift, *spread = (real_array(f"bias: `{name}`", value).astype(spec.dtype) for name, value, _ in given)
        pulled = matmul(made.mean.T, made.apart(shift))
        for turned in map(made.both_sides, spread):
            pulled = pulled + 0.5 * jnp.einsum("kij,ij->k", made.covariance, turned, precision=HIGHEST)
        return cast_like(fisher.solve(spec.unravel(pulled), 0.0), params)

    return moved
