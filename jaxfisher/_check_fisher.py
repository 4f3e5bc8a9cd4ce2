"""A verdict on a model: whether its divergence, its log-density, its draws and its Fisher agree, at given parameters."""

from __future__ import annotations

import dataclasses
import math
import re
from functools import partial
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Scalar, Shaped

from jaxfisher._check_scores import Product, products
from jaxfisher._divergence import kl
from jaxfisher._examples import Batch, make_batch, map_examples, shape_of_one
from jaxfisher._fisher import exact_fisher
from jaxfisher._model import MODEL, Model, float_fields, log_likelihood, of_one_example, predict, tangent
from jaxfisher._once import Static, once_for
from jaxfisher._scores import scores
from jaxfisher._tree import as_key, cast_like, check_function, dot, split
from jaxfisher._values import count_of
from jaxfisher._verdict import Check, Verdict

LENGTHS = 0.5 ** np.arange(1, 13)
"""The lengths of the displacements, in standard deviations of one draw: one half, halved again and again."""
POINTS = 4
"""The number of parameter points, one rounding apart, at which a number is computed to see its rounding error."""
SAFETY = 4
"""The factor on a range of four numbers, and on a typical rounding error, beyond which a number is called wrong."""
Z = 5
"""The tolerance in standard errors: one false alarm in two million normal numbers."""
RARE = 15
"""The expected number of occurrences of an outcome that makes its absence as improbable: minus the log of the probability."""


DRAWS = 1024
"""The number of draws made together, unless there are more examples."""


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class FisherCheck(Verdict):
    """A verdict on the Fisher of a model at its parameters; ``print`` it for a table.

    Attributes:
        checks: one entry for each property that must hold.
        notes: why a check could not be decided.
        reason: the likely cause of the failures; empty if there are none.
        lengths: the lengths of the displacements t d, in units in which ``d^T F d = 1``.
        quotients: ``KL(theta || theta + t d) / (1/2 t^2 d^T F d)``, shape ``[directions, lengths]``; empty without a KL.
        leaves: the paths of the parameters whose scores, as the library holds them, differ from JAX's own; empty if none do.
    """

    agreement = "Fisher, KL, density and draws agree"

    reason: str
    lengths: np.ndarray
    quotients: np.ndarray
    leaves: tuple[str, ...] = ()

    def _failure(self) -> str:
        return self.reason


ZERO, QUOTIENT, HESSIAN, MEAN, SQUARE = (
    "KL(theta || theta), nats",
    "KL / (1/2 t^2 d^T F d) as t -> 0",
    "d^T (Hessian of KL) d / d^T F d",
    "E[score . d] = 0, standard errors",
    "E[(score . d)^2] / d^T F d",
)
FORWARD, BY_LEAF, BACKWARD = (
    "S v less JAX's own, of its size",
    "leaves of S v less JAX's own",
    "leaves of S^T w less JAX's own",
)


class CheckFunction(Protocol):
    """``check(params, key, *inputs, weights=None, counts=None) -> FisherCheck``."""

    def __call__(
        self,
        params: chex.ArrayTree,
        key: PRNGKeyArray,
        /,
        *inputs: Any,
        weights: Float[Array, " n"] | None = None,
        counts: Shaped[Array, " n"] | None = None,
    ) -> FisherCheck: ...


def check_fisher(model: Model, *, num_directions: int = 4, num_samples: int = 16384) -> CheckFunction:
    r"""Check whether the exact Fisher of a model agrees with its KL divergence, its log-density and its draws.

    Along random directions d, with ``d^T F d = 1``:

    .. math:: KL(\theta \| \theta) = 0, \quad \frac{KL(\theta \| \theta + t d)}{\frac12 t^2 d^T F d} = 1 + O(t), \quad
        \frac{d^T \nabla_q^2 KL(\theta \| q)|_\theta\, d}{d^T F d} = 1, \quad E[s] = 0, \quad
        \frac{E[(s \cdot d)^2]}{d^T F d} = 1.

    Also the scores ``S`` as the library holds them must be JAX's own: ``S v`` must equal the result of `jax.jvp`, and ``S^T w``
    that of `jax.vjp`, for random ``v`` and ``w`` and leaf by leaf.

    The first three properties are exact up to rounding and, for the quotient, up to the remainder of the KL. Both errors are
    measured, from numbers one rounding apart and by halving t. The last two properties are means over draws, accurate to some
    ten percent; only they can tell a wrong KL from a wrong Fisher. In each leaf d is random with the leaf's mean Fisher
    diagonal as its precision, so that the units of one leaf do not hide another. A property that holds along some directions
    may fail along others: use other keys for more directions. A property that cannot be decided, such as for the scores of a
    saturated prediction, is no failure, and is reported.

    Args:
        model: ``(params, *inputs) -> distribution`` of ONE example.
        num_directions: the number of directions.
        num_samples: the number of draws from the model in all, at least one for each example.

    Returns:
        A function ``(params, key, *inputs, weights=None, counts=None)``. The random key is for directions and draws, and the
        inputs are arrays with a leading axis of n examples. ``weights`` and ``counts`` are those of the Fisher to be checked,
        as in `exact_fisher`. The function returns a `FisherCheck`; ``print`` it for a table, and test ``.passed``. For four
        directions it costs some 200 KL divergences of the batch, the scores of the draws and one compilation. A foreign
        distribution without a KL is checked by draws alone.

    Raises:
        TypeError: (when called) a model that returns no distribution; a parameter that is not a floating array; a ``key`` that
            is no random key; a call under ``jit``, where there are no numbers to judge.
        ValueError: a count that is not a whole number of at least one; (when called) arrays of different lengths.

    Reference: Amari, Information Geometry and Its Applications (2016), section 1.3, for the limit; Lehmann and Casella, Theory
    of Point Estimation (1998), lemma 2.5.3, for the score.

    >>> import jax, jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda w, x: jf.Poisson(log_rate=w * x)
    >>> verdict = jf.check_fisher(model)(0.5, jax.random.key(0), jnp.array([1.0, -2.0]))
    >>> verdict
    FisherCheck(passed)
    """
    check_function("model", model, MODEL)
    for name, count in (("num_directions", num_directions), ("num_samples", num_samples)):
        count_of(f"`{name}`", count)

    def check(
        params: chex.ArrayTree,
        key: PRNGKeyArray,
        /,
        *inputs: Any,
        weights: Float[Array, " n"] | None = None,
        counts: Shaped[Array, " n"] | None = None,
    ) -> FisherCheck:
        given = {name: value for name, value in (("weights", weights), ("counts", counts)) if value is not None}
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, inputs, key, given))):
            raise TypeError(
                "check_fisher returns a verdict on numbers, and there are none under jit, vmap or grad. Call it outside."
            )
        return _verdict(model, split(params), as_key(key, "check_fisher"), inputs, given, num_directions, num_samples)

    return check


def _verdict(
    model: Model,
    params: chex.ArrayTree,
    key: PRNGKeyArray,
    inputs: tuple[Any, ...],
    given: dict[str, Any],
    num_directions: int,
    num_samples: int,
) -> FisherCheck:
    keys = jax.random.split(key, 3)
    batch = make_batch(params, inputs, **({"weights": None} | given))
    given = {name: jnp.asarray(value) for name, value in given.items()}
    sources: list[str] = []

    def look(params: Any, *example: Any) -> Any:
        predicted = predict(model, params, *example)
        sources.append(predicted.fisher_source)
        return float_fields(predicted)

    with of_one_example(model, "model", params, batch.data):
        fields = jax.eval_shape(look, params, *shape_of_one(batch.data))
    # The dtype with the largest eps of all that take part sets the size of rounding errors.
    dtypes = (*batch.spec.dtypes, *(field.dtype for field in fields))
    eps = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)

    has_kl = _has_kl(model, params, batch)

    # Draw random numbers outside the program of the model, so that their programs serve the next model too.
    size, dtype = batch.spec.size, batch.spec.dtype
    noise = jax.random.normal(keys[0], (num_directions, size), dtype)
    nudges = 2 * eps * jax.random.rademacher(keys[1], (POINTS, size), dtype).at[0].set(0)
    # If there are few examples, draw for each of them many times at once.
    together = batch.size * max(1, min(num_samples, DRAWS) // batch.size)
    draw_keys = jax.random.split(keys[2], (-(-num_samples // together), together))
    noise, nudges = map(jax.vmap(batch.spec.unravel), (noise, nudges))
    found = _found(model, batch, given, Static(has_kl), params, noise, nudges, draw_keys)
    measured, along, log_probs, compared = jax.tree.map(partial(np.asarray, dtype=float), found)
    rounding = SAFETY * math.sqrt(batch.spec.size + batch.size) * eps
    # If the metric of a part comes from samples, its source says from how many.
    from_samples = min(map(int, re.findall(r"(\d+) samples", sources[-1])), default=math.inf)
    # Silence NumPy's warnings about numbers that are not finite: the checks below report them.
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        share = float(jnp.max(batch.weights) / jnp.sum(batch.weights))
        exact = _exact_checks(measured, share, rounding, np.mean(np.abs(log_probs))) if has_kl else ()
        engine, leaves = _engine_checks(compared, batch.spec.paths, rounding)
        by_draws, apart = _sampled_checks(along, from_samples, measured.hessians[0] if has_kl else np.ones(num_directions))
        checks = (*exact, *by_draws, *engine)
    notes: tuple[str, ...] = () if has_kl else ("the distribution has no KL divergence: checked by draws alone",)
    if any(check.passed is None for check in checks):
        notes += ("not told: rounding or the remainder is too large, kinks too near, or what matters too rare among the draws",)
    return FisherCheck(checks, notes, _reason(checks, leaves, apart), LENGTHS, measured.quotients[0], leaves)


class _Measured(NamedTuple):
    """The measurements at one parameter point: unit directions, and the numbers along them."""

    directions: Any
    zero: Float[Array, ""]
    fields: Float[Array, ""]
    quotients: Float[Array, "directions lengths"]
    hessians: Float[Array, " directions"]


@once_for
def _found(
    model: Model,
    batch: Batch,
    given: dict[str, Array],
    has_kl: Static[bool],
    params: Any,
    noise: Any,
    nudges: Any,
    keys: Array,
) -> tuple[_Measured, Array, Array, tuple[Product, Product, Product]]:
    """The measurements at some points near the parameters, those from draws, and the scores compared with JAX's own."""
    at = partial(_measure, model, batch, given, has_kl.value)
    measured = jax.lax.map(lambda nudge: at(_nudged(params, nudge), noise), nudges)
    directions = jax.tree.map(lambda leaf: leaf[0], measured.directions)
    one, near = (jax.tree.map(lambda leaf, i=i: leaf[i], tree) for tree, i in ((directions, 0), (nudges, 1)))
    compared = products(model, batch, params, _nudged(params, near), one, keys[0, : batch.size])
    return measured, *_draws(model, batch, params, directions, keys), compared


def _nudged(params: chex.ArrayTree, nudge: Any) -> Any:
    """The parameters, each multiplied by one plus its nudge."""
    return cast_like(jax.tree.map(lambda leaf, change: leaf * (1 + change), _wide(params, nudge), nudge), params)


def _wide(params: chex.ArrayTree, like: Any) -> Any:
    return cast_like(jax.tree.map(jnp.asarray, params), like)


def _measure(
    model: Model, batch: Batch, given: dict[str, Array], has_kl: bool, params: chex.ArrayTree, noise: Any
) -> _Measured:
    """The measurements along the noise scaled to unit directions: KL over its quadratic, ratio of second derivatives."""
    fisher = exact_fisher(model)(params, *batch.data, **given)
    means = jax.tree.map(jnp.mean, split(fisher.diagonal()))
    largest = jnp.max(jnp.stack(jax.tree.leaves(means)))
    precisions = jax.tree.map(lambda mean: jnp.where(mean > 0, mean, largest), means)
    directions = jax.tree.map(lambda leaf, precision: leaf / jnp.sqrt(precision), noise, precisions)
    lengths = jnp.sqrt(jax.vmap(fisher.quadratic)(directions))
    directions = jax.vmap(lambda v, length: jax.tree.map(lambda leaf: leaf / length, v))(directions, lengths)
    divergence = lambda q: kl(model)(params, q, *batch.data, **given)  # noqa: E731

    def quotient(v: Any, t: Scalar) -> Scalar:
        moved = cast_like(jax.tree.map(lambda leaf, x: leaf + t * x, _wide(params, v), v), params)
        # The moved parameters are rounded, so compute the quadratic of the displacement as it really is.
        moved = jax.lax.optimization_barrier(moved)
        step = jax.tree.map(jnp.subtract, _wide(moved, v), _wide(params, v))
        return divergence(moved) / (0.5 * fisher.quadratic(step))

    def along(v: Any) -> tuple[Array, Scalar]:
        _, product = jax.jvp(jax.grad(divergence), (params,), (cast_like(v, params),))
        ts = jnp.asarray(LENGTHS, batch.spec.dtype)
        return jax.lax.map(partial(quotient, v), ts), dot(v, _wide(product, v))

    def rounded_kl(params: Any, *example: Any) -> Scalar:
        """The KL to the same prediction with fields moved by one rounding."""
        predicted = predict(model, params, *example)
        values = [field * (1 + 2 * jnp.finfo(field.dtype).eps) for field in float_fields(predicted)]
        return jnp.sum(predicted.kl(tangent(predicted, values)))

    if not has_kl:
        return _Measured(directions, *(jnp.zeros(0),) * 4)
    rounded = jnp.sum(batch.weights * map_examples(rounded_kl, params, batch.data))
    return _Measured(directions, divergence(params), rounded, *jax.lax.map(along, directions))


def _has_kl(model: Model, params: chex.ArrayTree, batch: Batch) -> bool:
    try:
        jax.eval_shape(lambda p: kl(model)(p, p, *batch.data), params)
    except NotImplementedError:
        return False
    return True


def _draws(
    model: Model, batch: Batch, params: chex.ArrayTree, directions: Any, keys: PRNGKeyArray
) -> tuple[Float[Array, "draws directions"], Float[Array, " draws"]]:
    """The scores along the directions and the log-densities of one draw a key; rows of keys have a multiple of n entries.

    Each score is multiplied by the root of its example's weight over the mean weight, so that squares have the weighted mean.
    """
    log_prob, source = log_likelihood(model), jnp.arange(keys.shape[1]) % batch.size
    inputs = jax.tree.map(lambda leaf: leaf[source], batch.data)
    roots = jnp.sqrt(batch.size * batch.weights)[source]

    def drawn_once(keys: PRNGKeyArray) -> tuple[Array, Array]:
        targets = map_examples(lambda p, key, *example: predict(model, p, *example).sample(key), params, (keys, *inputs))
        drawn = scores(log_prob)(params, *inputs, targets)
        along = roots[:, None] * jax.vmap(drawn.mv)(directions).T
        return along, map_examples(log_prob, params, (*inputs, targets))

    along, log_probs = jax.lax.map(drawn_once, keys)
    return along.reshape(-1, along.shape[-1]), log_probs.reshape(-1)


def _exact_checks(measured: Any, share: float, rounding: float, log_prob: float) -> tuple[Check, ...]:
    """The checks without chance. Arrays have a leading axis of points, of which the first is the user's own.

    ``share`` is the largest share that one example has in a mean.
    """

    def scatter(values: np.ndarray) -> np.ndarray:
        """The rounding error of the numbers along each direction."""
        return SAFETY * np.max(np.ptp(values, axis=0), axis=0)

    # q(t) = 1 + O(t), so 2 q(t/2) - q(t) is off by O(t^2) if the model is smooth, and still by O(t) if it has kinks, like a
    # network of relus. The slope of q over the last four lengths, times t, bounds both. Take the length at which the rounding
    # error plus t is least. Rounding shows in parameters one rounding apart, and in fields, which lose digits as t shrinks.
    quotients, lengths = measured.quotients, LENGTHS[3:]
    limits = (2 * quotients[..., 1:] - quotients[..., :-1])[..., 2:]
    last, four = limits[0], np.lib.stride_tricks.sliding_window_view(quotients[0], 4, axis=-1)
    slopes = np.abs(four - last[..., None]) / np.lib.stride_tricks.sliding_window_view(LENGTHS, 4)
    noise = scatter(limits) + rounding + SAFETY * np.sqrt(2 * np.max(np.abs(measured.fields))) / lengths
    cost = np.where(np.isfinite(last), np.nan_to_num(noise, nan=np.inf) + lengths, np.inf)
    best = np.argmin(cost, axis=-1)[:, None]
    found = (last, np.max(slopes, axis=-1) * 2 * lengths + noise)
    limit, within = (np.take_along_axis(x, best, axis=-1)[:, 0] for x in found)
    # If the values still change like a power of t, no length was short enough for the series, and the limit is unknown.
    settled = within < 0.25 * np.abs(limit)
    # It is also unknown if the derivatives agree and a few examples may lie closer to a kink than the shortest length.
    hessian = _check(HESSIAN, measured.hessians[0], 1, np.full(len(limit), scatter(measured.hessians) + rounding))
    settled &= ~((np.abs(limit - 1) > within) & (np.abs(limit - 1) < min(SAFETY * share, 0.1)) & bool(hessian.passed))
    # A KL is a difference of two mean log-densities, so its rounding error has their size.
    return (
        _check(ZERO, measured.zero, 0, np.full(measured.zero.shape, rounding * (1 + log_prob))),
        _check(QUOTIENT, limit, 1, np.where(settled, within, np.inf), settled),
        hessian,
    )


def _sampled_checks(
    along: Float[np.ndarray, "draws directions"], behind: float, hessians: Float[np.ndarray, " directions"]
) -> tuple[tuple[Check, ...], bool]:
    """The checks by averages over draws: with the true Fisher, scores have a variance of one along every direction.

    ``behind`` is the number of samples that the Fisher itself was made from. Also whether the draws rule out the second
    derivatives of the KL, ``hessians``.
    """
    count, total, squares = len(along), np.sum(along, axis=0), np.square(along)
    second = np.mean(squares, axis=0)
    # Use a variance of one, or that of the draws if it is larger: a rare outcome that was drawn by chance is no failure.
    z = total / np.sqrt(count * np.maximum(second, 1))
    # The tolerance is the standard error plus a term for rare outcomes, too few of which are drawn for a standard error.
    spread = np.std(squares, axis=0)
    within = Z * spread * math.sqrt(1 / count + 1 / behind) + RARE * np.maximum(np.max(squares, axis=0), 1) / count
    # If the mean score is zero within the Fisher's variance, but not within that of the draws, rare outcomes were not drawn.
    missed = (np.abs(total) > Z * np.sqrt(count * second)) & (np.abs(z) <= Z)
    checks = (
        _check(MEAN, z, 0, np.full(len(z), float(Z))),
        _check(SQUARE, second, 1, np.where(missed, np.inf, within), ~missed & (within < 1)),
    )
    return checks, bool(np.any(np.abs(second - hessians) > within))


def _engine_checks(
    compared: tuple[Product, Product, Product], paths: tuple[str, ...], rounding: float
) -> tuple[tuple[Check, ...], tuple[str, ...]]:
    """The engine's products with the scores against JAX's own, and the paths of the leaves that are off."""
    checks, off = [], []
    for name, product in zip((FORWARD, BY_LEAF, BACKWARD), compared, strict=True):
        apart, size, moved = map(np.asarray, product)
        # A part of size zero must be exactly zero.
        size = np.where(size > 0, size, 1)
        within = rounding + SAFETY * moved / size
        checks.append(_check(name, apart / size, 0, within))
        off.append(~(apart / size <= within))
    return tuple(checks), tuple(path for path, *wrong in zip(paths, *off[1:], strict=True) if any(wrong))


def _check(name: str, values: np.ndarray, expected: float, within: np.ndarray, told: Any = True) -> Check:
    """A check of numbers along directions: fails if one of them is off, undecided (None) if one could not be decided."""
    off = np.abs(values - expected)
    right = off <= within
    told = np.broadcast_to(told, right.shape)
    passed = None if np.all(right) and not np.all(told) else bool(np.all(right))
    # Report the worst: wrong numbers rank above undecided ones, and these above right ones. A tolerance may be zero.
    rank = np.where(right, np.where(told, off / np.where(within > 0, within, 1), 2), np.inf)
    worst = int(np.argmax(rank))
    return Check(name, float(values[worst]), expected, float(within[worst]), passed)


def _reason(checks: tuple[Check, ...], leaves: tuple[str, ...], apart: bool) -> str:
    """The likely cause of the failures; ``apart`` says that the draws rule out the KL."""
    passed = {check.name: check.passed for check in checks}
    wrong = {name for name, right in passed.items() if right is False}
    if any(check.name in wrong and not math.isfinite(check.value) for check in checks):
        return (
            "a number is not finite: predictions are not, or d^T F d is zero along a random direction, where they are constant"
        )
    # Check this first: if the model changes from call to call, the scores by the library and by JAX are of two models.
    if ZERO in wrong:
        return (
            "two calls of the model at the same parameters differ (it is not a pure function of them: hidden state, random "
            "numbers without a key), or `kl` of a distribution and itself is not zero"
        )
    if {FORWARD, BY_LEAF, BACKWARD} & wrong:
        return (
            f"the library's scores by {', '.join(leaves) or 'the parameters'} are not JAX's own derivatives of the same "
            "log-density. This is a fault of jaxfisher, and no other line of this table can be trusted: please report the model"
        )
    found = []
    if HESSIAN in wrong and not passed[QUOTIENT]:
        by_draws = {
            True: "`kl` is wrong: the Fisher agrees with the scores of draws, and the KL does not",
            False: "the closed-form Fisher (`fisher_sqrt_mv`) is wrong: it agrees neither with the KL nor with draws",
            None: "`kl` or the closed-form Fisher is wrong",
        }
        # Draws are accurate to some ten percent: if they agree with both, they do not tell which is wrong.
        told = passed[SQUARE] is not True or apart
        found.append(by_draws[passed[SQUARE] if told and MEAN not in wrong else None])
    elif QUOTIENT in wrong:
        found.append("derivatives do not see what the parameters do: a stop_gradient, a rounding, a custom derivative rule")
    elif HESSIAN in wrong:
        found.append(
            "the second derivative of `kl` is not that of its values: a stop_gradient or a custom derivative rule in it"
        )
    elif SQUARE in wrong and MEAN not in wrong:
        found.append("`log_prob` or `sample` is not that of the KL and the Fisher, which agree with each other")
    if MEAN in wrong:
        found.append("`log_prob` lacks a normalisation that depends on the parameters, or `sample` draws from another law")
    return "; and ".join(found)
