r"""Estimates with standard errors for Fishers too large for exact numbers: trace, diagonal, log-determinant, spectral density.

All of them draw random sign vectors ``z``, for which ``E[z z^T] = I``, and use F only through products ``F z``. Every probe
gives one value with the right expectation (with Lanczos steps, to within the error of their quadrature). The mean over probes
is the estimate, and their spread gives its standard error. Probes come in tens, until the error is small enough or the probes
are used up; ``converged`` says which.

Random signs and Krylov spaces are matfree's, an optional extra: ``pip install 'jaxfisher[estimate]'``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Scalar

from jaxfisher._lanczos import gauss, lanczos, log_sums, matfree
from jaxfisher._linalg import norm
from jaxfisher._once import Static, once
from jaxfisher._operators.damping import Damping, checked_damping, entries_of
from jaxfisher._operators.operator import Operator, as_operator
from jaxfisher._tree import all_finite, as_key, described, dot, dtype_of, joined
from jaxfisher._values import count_of, is_array, is_known, nonnegative
from jaxfisher._varying import while_loop

BATCH = 10
"""The number of probes between two checks of the error."""
ENOUGH = 20
"""The number of probes whose spread is trusted by itself. All of them flip a given pair of signs alike once in 500,000 keys;
ten do so once in 500, and then miss what the pair contributes."""


class Estimate(NamedTuple):
    """A number, or a pytree of numbers, estimated from random probes.

    Attributes:
        value: the estimate.
        standard_error: the standard error of the value, in its shape: the standard deviation of one probe over the root of the
            number of probes. Probes are roughly normal only if many eigenvalues matter about equally.
        samples: the number of probes.
        converged: whether the function's own test was met, which its docstring states. The spread of ten probes may be small by
            chance: without ten more the test is met only if the lengths of their products bound the error as well.
    """

    value: Any
    standard_error: Any
    samples: Int[Array, ""]
    converged: Bool[Array, ""]


def estimate_trace(fisher: Operator, key: PRNGKeyArray, *, rtol: chex.Numeric = 0.01, max_samples: int = 1000) -> Estimate:
    r"""The trace of F from products with random signs (Hutchinson's estimator).

    .. math:: \operatorname{tr} F = E[z^T F z], \qquad \operatorname{var}(z^T F z) = 2 \sum_{i \ne j} F_{ij}^2.

    For a diagonal F every probe is exact. Otherwise one probe has a relative error of about ``sqrt(2 / r)``, where
    ``r = tr(F)^2 / |F|_F^2`` is the effective number of eigenvalues, 1 if one of them dominates. `Operator.trace` is exact, at
    the cost of one pass over the examples if F is held as scores; this estimate is for operators known only by products.

    Args:
        fisher: any operator; only its products are used.
        key: a random key.
        rtol: stop when the standard error is at most ``rtol |value|``.
        max_samples: the most probes, of one product each; at least 2, and used in tens.

    Returns:
        An `Estimate`: value and standard error in the units of F, in the statistics dtype. ``converged`` says that the standard
        error is at most ``rtol |value|``. This rule tends to stop when probes lie close together by chance: with ten probes,
        expect the standard error itself to be off by a quarter.

    Raises:
        TypeError: ``fisher`` is not an operator, ``key`` no random key, ``rtol`` no real number.
        ValueError: a negative ``rtol``; ``max_samples`` not a whole number of at least 2.
        ImportError: matfree is not installed.

    Reference: Hutchinson, A stochastic estimator of the trace of the influence matrix (Communications in Statistics 1990).

    >>> import jax, jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda p, x: jf.Normal(p * x, 1.0)
    >>> F = jf.implicit_fisher(model)(jnp.zeros(2), jnp.array([[2.0, 0.0], [0.0, 1.0]]))
    >>> estimate = jf.estimate_trace(F, jax.random.key(0))  # diagonal: 2 and 1/2
    >>> print(estimate.value, estimate.standard_error, estimate.samples, estimate.converged)
    2.5 0.0 20 True
    """
    fisher = as_operator(fisher, "estimate_trace")
    return _hutchinson("estimate_trace", fisher, key, _quadratic, rtol, max_samples)


def estimate_diagonal(fisher: Operator, key: PRNGKeyArray, *, rtol: chex.Numeric = 0.01, max_samples: int = 1000) -> Estimate:
    r"""The diagonal of F from products with random signs.

    .. math:: F_{ii} = E[z_i (F z)_i], \qquad \operatorname{var}(z_i (F z)_i) = \sum_{j \ne i} F_{ij}^2.

    An entry that is small beside the rest of its row has a large error, and its estimate may be negative: read its own standard
    error.

    Args:
        fisher: any operator; only its products are used.
        key: a random key.
        rtol: stop when the norm of all standard errors is at most ``rtol`` times the norm of the diagonal.
        max_samples: the most probes, of one product each; at least 2, and used in tens.

    Returns:
        An `Estimate` whose value and standard error are pytrees like the parameters, in the units of F and the statistics
        dtype. ``converged`` says that the norm of the errors is at most ``rtol`` times that of the values.

    Raises:
        TypeError: ``fisher`` is not an operator, ``key`` no random key, ``rtol`` no real number.
        ValueError: a negative ``rtol``; ``max_samples`` not a whole number of at least 2.
        ImportError: matfree is not installed.

    Reference: Bekas, Kokiopoulou and Saad, An estimator for the diagonal of a matrix (Applied Numerical Mathematics 2007),
    section 2.

    >>> import jax, jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda p, x: jf.Normal(p * x, 1.0)
    >>> F = jf.implicit_fisher(model)(jnp.zeros(2), jnp.array([[2.0, 0.0], [0.0, 1.0]]))
    >>> print(jf.estimate_diagonal(F, jax.random.key(0)).value)
    [2.  0.5]
    """
    fisher = as_operator(fisher, "estimate_diagonal")
    found: Estimate = joined(_hutchinson("estimate_diagonal", fisher, key, _products, rtol, max_samples))
    return found


def estimate_logdet(
    fisher: Operator,
    key: PRNGKeyArray,
    damping: Damping,
    *,
    rtol: chex.Numeric = 0.01,
    max_samples: int = 100,
    num_matvecs: int = 30,
) -> Estimate:
    r"""``log det(F + damping I)`` by stochastic Lanczos quadrature, with two bounds for each probe.

    .. math:: \log\det(F + D) = \log\det D + E[z^T \log(I + M) z], \qquad M = D^{-1/2} F D^{-1/2}.

    Two errors add up. The *standard error* is that of the mean over probes. The *quadrature error* does not shrink with more
    probes: k Lanczos steps replace ``z^T log(I + M) z`` by a sum of k terms, whose accuracy depends on k alone. It improves
    with k, and is exact if k is the number of distinct eigenvalues of M. The quadrature error is bounded, not guessed: Gauss
    quadrature gives an upper bound, and Gauss-Radau quadrature with a node at 0, below which no eigenvalue of M lies, gives a
    lower bound. The value is the mean of the midpoints; half the mean distance between the bounds must pass the same test as
    the standard error.

    Args:
        fisher: any positive semi-definite operator; only its products are used.
        key: a random key.
        damping: above zero: one number, or a pytree like the parameters with one for each leaf.
        rtol: stop when the standard error is at most ``rtol log det(I + M)``. The test is relative to what F adds to the known
            ``log det D``, a number that does not depend on units and is not negative.
        max_samples: the most probes, of ``num_matvecs`` products each; at least 2, and used in tens.
        num_matvecs: the Lanczos steps of each probe, at most p. Probes run in sequence, and each holds that many vectors.

    Returns:
        An `Estimate`, in nats and the statistics dtype. ``converged`` says that three errors are each at most
        ``rtol log det(I + M)``: the standard error, half the mean distance between the bounds, and the mean of
        ``eps |z| |M z|``, the size of the rounding errors of the products. If it is False with probes left, take more steps, a
        wider dtype or more damping; if all probes were used, take more probes. A direction in which F + damping I is negative
        gives NaN if a probe finds it.

    Raises:
        TypeError: ``fisher`` is not an operator, ``key`` no random key, ``damping`` or ``rtol`` not of real numbers.
        ValueError: a ``damping`` of zero or below, or for each leaf of another structure; a negative ``rtol``; ``max_samples``
            not a whole number of at least 2, ``num_matvecs`` of at least 1.
        ImportError: matfree is not installed.

    Reference: Bai, Fahey and Golub, Some large-scale matrix computation problems (J. Comput. Appl. Math. 1996), for the bounds
    and the mean; Golub, Some modified matrix eigenvalue problems (SIAM Review 1973), section 7, for the prescribed node;
    Ubaru, Chen and Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature (SIAM J. Matrix Anal. Appl. 2017).

    >>> import jax, jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda p, x: jf.Normal(p * x, 1.0)
    >>> F = jf.implicit_fisher(model)(jnp.zeros(2), jnp.array([[2.0, 0.0], [0.0, 1.0]]))
    >>> estimate = jf.estimate_logdet(F, jax.random.key(0), 0.5)
    >>> print(f"{estimate.value:.4f}", estimate.converged)  # log(2.5) + log(1)
    0.9163 True
    """
    fisher = as_operator(fisher, "estimate_logdet")
    rtol = nonnegative("rtol", rtol, fisher.spec.dtype)
    key = as_key(key, "estimate_logdet")
    count_of("`max_samples`", max_samples, least=2)
    count_of("`num_matvecs`", num_matvecs)
    return _logdet(fisher, key, _damping_entries(fisher, damping), rtol, Static(max_samples), Static(num_matvecs))


@once
def _logdet(
    fisher: Operator, key: Array, entries: Float[Array, " p"], rtol: Scalar, most: Static[int], num_matvecs: Static[int]
) -> Estimate:
    """`estimate_logdet` with a damping for each parameter."""
    spec = fisher.spec
    jacobi_from = lanczos("estimate_logdet", fisher, jax.lax.rsqrt(entries), num_matvecs.value)
    constant = jnp.sum(jnp.log(entries))

    def probe(z: Float[Array, " p"]) -> _Probe:
        jacobi = jacobi_from(z)
        (upper, square), (lower, _) = log_sums(jacobi), log_sums(jacobi._replace(diagonal=jacobi.radau()))
        lower = jnp.where(jacobi.exhausted, upper, lower)
        rounding = jnp.finfo(spec.dtype).eps * jacobi.image
        value, half_distance, rounding = (spec.size * x for x in (0.5 * upper + 0.5 * lower, 0.5 * (upper - lower), rounding))
        return _Probe(value, jnp.sqrt(2 * spec.size * square), half_distance, rounding)

    draw = _one_by_one("estimate_logdet", fisher, probe)
    mean, found = _until(draw, rtol, key, most.value)
    bounded = jnp.maximum(mean.half_distance, mean.rounding) <= rtol * mean.value
    return found._replace(value=constant + found.value, converged=found.converged & bounded)


def spectral_density(
    fisher: Operator,
    key: PRNGKeyArray,
    points: Float[Array, " x"],
    *,
    width: chex.Numeric,
    num_samples: int = 10,
    num_matvecs: int = 30,
) -> Estimate:
    r"""The density of the eigenvalues of F, smoothed by a Gaussian, by stochastic Lanczos quadrature.

    .. math:: \phi(x) = \frac1p \sum_{j=1}^p N(x; \lambda_j, \sigma^2) = \frac1p E[z^T N(x; F, \sigma^2) z].

    The density integrates to one over the real line. The standard error does not include what k Lanczos steps fail to resolve:
    a kernel narrower than about the range of the eigenvalues over k shows the nodes of the quadrature as peaks.

    Args:
        fisher: any operator; only its products are used.
        key: a random key.
        points: the points at which to evaluate the density, shape ``[x]``, in the units of F.
        width: the standard deviation of the Gaussian, above zero, in the units of F.
        num_samples: the number of probes, at least 2, of ``num_matvecs`` products each.
        num_matvecs: the Lanczos steps of each probe, at most p. Probes run in sequence, and each holds that many vectors.

    Returns:
        An `Estimate` whose value and standard error have shape ``[x]``, in the statistics dtype and one over the units of F.
        ``converged`` says that half the number of steps would give the same to within the standard error, in norm over the
        points, and thus that ``num_matvecs`` is large enough for this width and number of probes.

    Raises:
        TypeError: ``fisher`` is not an operator, ``key`` no random key, ``width`` no real number.
        ValueError: ``points`` not one axis of real numbers; a ``width`` of zero or below; ``num_samples`` not a whole number of
            at least 2, ``num_matvecs`` of at least 1.
        ImportError: matfree is not installed.

    Reference: Lin, Saad and Yang, Approximating spectral densities of large matrices (SIAM Review 2016), section 3.2; Ghorbani,
    Krishnan and Xiao, An investigation into neural net optimization via Hessian eigenvalue density (ICML 2019), section 2.

    >>> import jax, jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda p, x: jf.Normal(p * x, 1.0)
    >>> F = jf.implicit_fisher(model)(jnp.zeros(2), jnp.array([[2.0, 0.0], [0.0, 2.0]]))
    >>> estimate = jf.spectral_density(F, jax.random.key(0), jnp.array([1.0, 2.0]), width=0.5)
    >>> print([f"{value:.3f}" for value in estimate.value])  # both eigenvalues are 2
    ['0.108', '0.798']
    """
    fisher = as_operator(fisher, "spectral_density")
    if not is_array(points) or jnp.ndim(points) != 1 or not jnp.issubdtype(dtype_of(points), jnp.floating):
        raise ValueError(
            f"spectral_density: `points` is {described(points)}; expected an array of real numbers along one axis."
        )
    count_of("`num_samples`", num_samples, least=2)
    count_of("`num_matvecs`", num_matvecs)
    _refuse_zero("width", width, "Without a width the density is a row of spikes.")
    width = nonnegative("width", width, fisher.spec.dtype)
    points, key = jnp.asarray(points).astype(fisher.spec.dtype), as_key(key, "spectral_density")
    return _density(fisher, key, points, width, Static(num_samples), Static(num_matvecs))


@once
def _density(
    fisher: Operator,
    key: Array,
    points: Float[Array, " x"],
    width: Scalar,
    num_samples: Static[int],
    num_matvecs: Static[int],
) -> Estimate:
    """`spectral_density` without its checks."""
    # Work in units of the width, so that squares of relevant numbers do not underflow.
    jacobi_from = lanczos("spectral_density", fisher, jnp.broadcast_to(jax.lax.rsqrt(width), fisher.size), num_matvecs.value)
    points = points / width

    def density(diagonal: Float[Array, " k"], off: Float[Array, " k-1"]) -> Float[Array, " x"]:
        nodes, weights = gauss(diagonal, off)
        kernel = jnp.exp(-0.5 * jnp.square(points[:, None] - nodes[None, :])) / math.sqrt(2 * math.pi)
        return jnp.sum(kernel * weights[None, :], axis=1)

    def probe(z: Float[Array, " p"]) -> tuple[Array, Array]:
        jacobi = jacobi_from(z)
        half = (jacobi.diagonal.size + 1) // 2
        whole = density(jacobi.diagonal, jacobi.off)
        change = whole - density(jacobi.diagonal[:half], jacobi.off[: half - 1])
        return whole, jnp.where(jacobi.exhausted, 0, change)

    draws = _one_by_one("spectral_density", fisher, probe)(key, num_samples.value)
    running = _Running.start(draws).plus(draws)
    (value, change), (error, _) = running.mean, running.standard_error()
    return Estimate(value / width, error / width, running.samples, norm(change) <= norm(error))


# --- means and their errors -----------------------------------------------------------------------------------------------


class _Running(NamedTuple):
    """The mean of the samples so far, and the root of the sum of their squared distances from it."""

    samples: Int[Array, ""]
    mean: Any
    spread: Any

    @staticmethod
    def start(draws: Any) -> _Running:
        """The state before any sample; ``draws`` gives the shapes, with a leading axis of samples."""
        zeros = jax.tree.map(lambda draw: jnp.zeros(draw.shape[1:], draw.dtype), draws)
        return _Running(jnp.zeros((), jnp.int32), zeros, zeros)

    def plus(self, draws: Any) -> _Running:
        """The state after more samples, by the update of Chan, Golub and LeVeque (1983), on roots so that nothing overflows."""
        new = jax.tree.leaves(draws)[0].shape[0]

        def update(mean: Array, spread: Array, draw: Array) -> tuple[Array, Array]:
            before = self.samples.astype(mean.dtype)
            share = new / (before + new)
            # Average differences from the first sample, so that equal samples have no spread, not even from rounding.
            inside = draw[0] + jnp.mean(draw - draw[:1], axis=0)
            shift = inside - mean
            spread = jnp.hypot(jnp.hypot(spread, _length(draw - inside[None])), jnp.sqrt(before * share) * shift)
            return mean + share * shift, spread

        leaves, treedef = jax.tree.flatten(self.mean)
        pairs = map(update, leaves, jax.tree.leaves(self.spread), jax.tree.leaves(draws))
        mean, spread = (jax.tree.unflatten(treedef, side) for side in zip(*pairs, strict=True))
        return _Running(self.samples + new, mean, spread)

    def standard_error(self) -> Any:
        """The standard error of the mean."""

        def error(spread: Array) -> Array:
            count = self.samples.astype(spread.dtype)
            return spread / jnp.sqrt(count * (count - 1))

        return jax.tree.map(error, self.spread)


def _length(x: Float[Array, "samples *shape"]) -> Float[Array, "*shape"]:
    """The Euclidean norm along the first axis, without overflow or underflow in between."""
    largest = jnp.max(jnp.abs(x), axis=0)
    safe = jnp.where(largest > 0, largest, 1)
    return safe * jnp.sqrt(jnp.sum(jnp.square(x / safe[None]), axis=0))


def _until(draw: Callable[[Array, int], _Probe], rtol: Scalar, key: Any, most: int) -> tuple[_Probe, Estimate]:
    """Draw until the error of the value is small: the mean over all probes, and the estimate."""
    new = min(BATCH, most)

    def arrived(running: _Running) -> Array:
        allowed = rtol * _tree_norm(running.mean.value)
        bounded = running.mean.deviation / jnp.sqrt(running.samples.astype(allowed.dtype)) <= allowed
        return (_tree_norm(running.standard_error().value) <= allowed) & (bounded | (running.samples >= ENOUGH))

    def going(running: _Running) -> Array:
        more = running.samples + new <= most
        # Stop if the mean is not finite: more samples cannot change that.
        return (running.samples == 0) | (more & all_finite(running.mean.value) & ~arrived(running))

    start = _Running.start(jax.eval_shape(lambda: draw(key, new)))
    end = while_loop(going, lambda running: running.plus(draw(jax.random.fold_in(key, running.samples), new)), start)
    return end.mean, Estimate(end.mean.value, end.standard_error().value, end.samples, arrived(end))


def _hutchinson(
    caller: str, fisher: Operator, key: Any, form: Callable[[Any, Any], Any], rtol: chex.Numeric, most: int
) -> Estimate:
    """The mean over sign vectors of the value of ``form(z, F z)``, stopped by the norms of error and value."""
    rtol = nonnegative("rtol", rtol, fisher.spec.dtype)
    count_of("`max_samples`", most, least=2)
    return _mean_of(fisher, as_key(key, caller), rtol, Static((caller, form, most)))


@once
def _mean_of(fisher: Operator, key: Array, rtol: Scalar, how: Static[tuple[str, Any, int]]) -> Estimate:
    (caller, form, most), product = how.value, fisher.form.product()

    # Work leaf by leaf: jaxlib 0.10.2 on a CPU compiles the product of a flat z, drawn in the same program, and a concatenated
    # F z to wrong numbers.
    def draw(key: Array, num: int) -> Any:
        return jax.vmap(lambda z: form(z, product(z)))(_signs(caller, fisher.spec.zeros(), key, num))

    return _until(draw, rtol, key, most)[1]


def _quadratic(z: Any, image: Any) -> _Probe:
    return _Probe(dot(z, image), math.sqrt(2) * _tree_norm(image))


def _products(z: Any, image: Any) -> _Probe:
    return _Probe(jax.tree.map(jnp.multiply, z, image), _tree_norm(image))


def _one_by_one(caller: str, fisher: Operator, probe: Callable[[Array], Any]) -> Callable[[Array, int], Any]:
    """From ``(key, num)`` to ``probe`` of ``num`` flat sign vectors, one at a time, since each probe holds many vectors."""
    zeros = jnp.zeros(fisher.size, fisher.spec.dtype)
    return lambda key, num: jax.lax.map(probe, _signs(caller, zeros, key, num))


def _signs(caller: str, like: Any, key: Array, num: int) -> Any:
    """``num`` pytrees of random signs, stacked."""
    return matfree("stochtrace", caller).sampler_signs(like, num=num)(key)


def _tree_norm(tree: Any) -> Scalar:
    return norm(jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(tree)]))


class _Probe(NamedTuple):
    """A value, a number whose mean square is at least its variance, half the distance of two bounds, and the rounding error.

    The variance sums squares off a matrix's diagonal; the mean squared length of its products with signs sums all squares.
    """

    value: Any
    deviation: Float[Array, ""]
    half_distance: Any = ()
    rounding: Any = ()


# --- arguments ------------------------------------------------------------------------------------------------------------


def _damping_entries(fisher: Operator, damping: Damping) -> Float[Array, " p"]:
    """The damping of each parameter, all above zero."""
    known = checked_damping(damping, fisher.spec)
    for leaf in jax.tree.leaves(damping):
        _refuse_zero("damping", leaf, "It bounds the spectrum from below; if F has a lower bound itself, give a small damping.")
    return entries_of(known, fisher.spec)


def _refuse_zero(name: str, value: chex.Numeric, why: str) -> None:
    """Raise if the argument is known to be zero; the value of a JAX array counts as unknown."""
    if is_known(value) and float(value) == 0:
        raise ValueError(f"`{name}` is {value}; expected a number above zero. {why}")
