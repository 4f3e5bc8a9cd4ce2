r"""Laplace's approximation: a Gaussian posterior over weights from a Fisher and a prior, its predictions and its evidence.

Near the parameters of largest posterior density the log-likelihood of n examples has the curvature ``-n F``. With a Gaussian
prior of mean zero and precision ``A``, one number or one for each leaf or parameter, the posterior is close to

.. math:: N(\theta, P^{-1}), \qquad P = n F + A.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Scalar

from jaxfisher._damped import by_cholesky
from jaxfisher._distributions.base import Distribution
from jaxfisher._distributions.marginalised import bound, free, integrated, output_of
from jaxfisher._examples import Batch, make_batch, map_examples
from jaxfisher._fisher import FisherFunction, exact_fisher
from jaxfisher._model import MODEL, LogProb, Model, batch_loss, log_likelihood, of_one_example, predict
from jaxfisher._once import Static, once, once_for
from jaxfisher._operators.damping import (
    Damping,
    checked_damping,
    damped_inverse,
    damped_inverse_root,
    entries_of,
    restricted_damping,
)
from jaxfisher._operators.diagonal import Diagonal
from jaxfisher._operators.identity import scaled_identity
from jaxfisher._operators.operator import VIEW, Operator, View, as_operator
from jaxfisher._pieces import map_batches
from jaxfisher._provenance import Provenance
from jaxfisher._pytree import array_fields
from jaxfisher._stack import refuse_stack
from jaxfisher._targets import given_with, taken_by
from jaxfisher._tree import as_key, check_function, joined, products, split, subtree
from jaxfisher._values import checked_shape, count_of, is_known_zero
from jaxfisher._varying import cond

NUMBERS_AT_ONCE = 2**24
"""The most entries of the outputs' derivatives that predictions hold at a time."""


@array_fields("params", "fisher", "examples", "prior", "log_likelihood", repr=False, eq=False)
class Posterior:
    r"""The Gaussian ``N(params, P^-1)`` with ``P = n F + A``, over the weights of a model, as `laplace` returns it.

    It is a pytree and crosses ``jit``; the results of its methods are differentiable in its arrays.

    Attributes:
        params: the mean, with all of the model's parameters.
        fisher: F, a mean over examples, over the uncertain parameters.
        examples: n, the number of examples or the sum of their weights, a scalar.
        prior: A: one number, or a pytree like the uncertain parameters with a number or an array for each leaf.
        log_likelihood: the log-likelihood of all the data at ``params``, in nats, a scalar.
        model: ``(params, *inputs) -> distribution`` of ONE example.
        uncertain: a flag for each leaf of the parameters; leaves without it are known.
    """

    params: Any
    fisher: Operator
    examples: Scalar
    prior: Any
    log_likelihood: Scalar
    model: Model
    uncertain: tuple[bool, ...]

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axes that `jax.vmap` or `jax.lax.scan` added to the arrays; () for a single posterior."""
        return jnp.shape(self.examples)

    def precision(self) -> Operator:
        """``P = n F + A`` as an operator over the uncertain parameters; in the form of F if the prior is one number."""
        whole = self.examples * self.fisher
        if is_one(self.prior):
            return whole + scaled_identity(self.fisher, self.prior)
        spec = self.fisher.spec
        entries = jax.tree.map(lambda alpha, like: alpha + jnp.zeros_like(like), self.prior, spec.zeros())
        return whole + Operator(Diagonal(entries, spec), Provenance("prior"))

    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> Any:
        """Independent draws of all parameters: a pytree like them with leading axes ``shape``, in their dtypes.

        Known parameters are the same in each draw. The cost is that of one root of the precision, an eigendecomposition of the
        matrix that a solve would factor, and one product for each draw.

        Raises:
            TypeError: a ``key`` that is no random key, a ``shape`` that is no tuple of whole numbers.
        """
        shape = checked_shape("Posterior.sample", shape)
        count = math.prod(shape)
        deviations = _deviations(self, as_key(key, "Posterior.sample"), Static(count))
        drawn = jax.vmap(lambda u: self._with(jax.tree.map(jnp.add, self._wide, u)))(deviations)
        like = lambda leaf, own: leaf.astype(own.dtype).reshape(*shape, *own.shape)  # noqa: E731
        found: Any = jax.tree.map(like, joined(drawn), self.params)
        return found

    def log_evidence(self, prior: Damping | None = None) -> Scalar:
        r"""The log-evidence: the log-probability of the data with the weights integrated out, in nats, a scalar.

        .. math:: \log Z = \log p(y \mid \theta) - \tfrac12 \theta^T A \theta + \tfrac12 \log\det A - \tfrac12 \log\det P.

        With ``prior`` it is the evidence of another prior with the same mean, and differentiable in it:
        ``jax.grad(posterior.log_evidence)``. It costs one factorisation of the precision. Reference: MacKay (Neural Computation
        1992), equation 4.

        Raises:
            ValueError: a prior known to be zero or negative.
            TypeError: a prior of another structure or shape.
        """
        prior = self.prior if prior is None else _checked_prior(prior, self.fisher)
        spec = self.fisher.spec
        entries = entries_of(checked_damping(prior, spec), spec)
        mean = spec.ravel(self._wide, "params")
        fit = self.log_likelihood - 0.5 * jnp.sum(entries * jnp.square(mean)) + 0.5 * jnp.sum(jnp.log(entries))
        volume = self.fisher.logdet(_over(prior, self)) + spec.size * jnp.log(self.examples)
        return fit - 0.5 * volume

    def output_covariance(self, *inputs: Any) -> Float[Array, "n outputs outputs"]:
        """``J P^-1 J^T`` for each example: the covariance of the model's outputs, linearised at the mean.

        Outputs are the location of a normal distribution and the logits of a Bernoulli or categorical one. The derivatives of a
        few examples at a time are held, ``outputs x p`` numbers for each, computed by as many vjps as there are outputs. For a
        model with very many outputs see `sample_predictive`, which needs only jvps.

        Raises:
            ValueError: arrays of different lengths.
            TypeError: a family without such outputs.
        """
        return _output_covariance(self, _checked(self, inputs))

    def predictive(self, *inputs: Any) -> Distribution:
        r"""The distribution of the target for each example, with the weights integrated out of the linearised model.

        Let ``S = J P^-1 J^T`` be the covariance of the outputs. A normal distribution gets the variance ``scale^2 + S``, which
        is exact for a linear model. The logits ``z`` of a Bernoulli or categorical one become

        .. math:: z \, (1 + \tfrac\pi8 \operatorname{diag} S)^{-1/2},

        by the probit approximation. The arrays of ``inputs`` have a leading axis of n examples, and so has the distribution.
        Only a multivariate normal distribution keeps correlations between the outputs of one example.

        Raises:
            ValueError: arrays of different lengths.
            TypeError: another family; use `sample_predictive` for it.

        Reference: MacKay, The evidence framework applied to classification networks (Neural Computation 1992), section 2;
        Immer, Korzepa and Bauer, Improving predictions of Bayesian neural nets via local linearization (AISTATS 2021).
        """
        made: Distribution = _predictive(self, _checked(self, inputs))
        return made

    def sample_predictive(self, key: PRNGKeyArray, *inputs: Any, num_samples: int = 100) -> Distribution:
        """Predictions of the linearised model for draws of the weights: distributions with batch axes ``[num_samples, n]``.

        Averages over the first axis, such as ``jnp.mean(p.probs, 0)``, are averages over the posterior. Each draw takes one jvp
        for all examples, so the cost does not depend on the number of outputs. Positive fields, such as a scale, are linearised
        in their logarithm. To evaluate the model itself at draws, map it over `sample`; its predictions are often too wide.

        Raises:
            ValueError: arrays of different lengths, fewer than one draw.
        """
        count = count_of("`num_samples`", num_samples, "a whole number of draws,")
        key = as_key(key, "Posterior.sample_predictive")
        made: Distribution = _sample_predictive(self, key, _checked(self, inputs), Static(count))
        return made

    @property
    def mean(self) -> Any:
        """The mean of the uncertain parameters: a pytree like the vectors of ``fisher``, real and imaginary parts apart."""
        leaves = zip(jax.tree.leaves(split(self.params)), self.uncertain, strict=True)
        return self.fisher.spec.tree([leaf for leaf, flag in leaves if flag])

    @property
    def _wide(self) -> Any:
        """The mean in the statistics dtype."""
        return jax.tree.map(lambda leaf: leaf.astype(self.fisher.spec.dtype), self.mean)

    def _with(self, uncertain: Any) -> Any:
        """All parameters, with these for the uncertain ones."""
        moved, held = iter(jax.tree.leaves(uncertain)), split(self.params)
        leaves = [next(moved) if flag else leaf for leaf, flag in zip(jax.tree.leaves(held), self.uncertain, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(held), leaves)

    def __repr__(self) -> str:
        known = len(self.uncertain) - sum(self.uncertain)
        return f"Posterior({self.fisher}{f', {known} leaves known' if known else ''})"


def laplace(
    model: Model,
    params: chex.ArrayTree,
    /,
    *data: Any,
    prior: Damping,
    view: View | None = None,
    fisher: FisherFunction | None = None,
    keep: Callable[[str], bool] | None = None,
    weights: Float[Array, " n"] | None = None,
    batch_size: int | None = None,
) -> Posterior:
    r"""Laplace's approximation of the posterior over weights: a Gaussian at ``params`` with precision ``n F + A``.

    .. math:: p(\theta \mid \text{data}) \approx N(\theta, P^{-1}), \qquad P = n F(\theta) + A, \qquad p(\theta) = N(0, A^{-1}).

    The mean is taken as given. It should be a point where the gradient of the log posterior is zero, as after training to the
    end with ``A / n`` as weight decay. For a linear model with known noise the result is exact.

    **When it is the wrong one.** If the posterior has several maxima, or the mean is no maximum; or if the model's predictions
    far from the data matter more than its error bars there.

    Args:
        model: ``(params, *inputs) -> distribution`` of ONE example.
        params: the mean.
        *data: the inputs and, last, the targets; every array has a leading axis of n examples.
        prior: A, above zero: one number; or a pytree like the parameters, possibly with None for those that ``keep`` leaves
            out, with one number for each leaf, or an array of the leaf's shape with one for each parameter.
        view: a view of F: `jaxfisher.dense`, `jaxfisher.kronecker`, `jaxfisher.eigen_kronecker`, `jaxfisher.diagonal`,
            ``lambda F: jf.low_rank(F, 20)``; None for F itself, exact as scores.
        fisher: a Fisher function as in `jaxfisher.natural_grad`; None for `jaxfisher.exact_fisher` of the model, which is also
            its generalised Gauss-Newton matrix.
        keep: which parameter leaves are uncertain: a function from the path of a leaf, such as ``"['last']['w']"``, to a bool.
            The others are known. Under ``jit``, computations that only they need are dropped.
        weights: how often each example counts, shape ``[n]``; then n is their sum. Zero marks padding.
        batch_size: work on chunks of at most this many examples, which bounds memory.

    Returns:
        A `Posterior`, with draws, predictions and the evidence.

    Raises:
        ValueError: arrays of different lengths, a prior known to be zero or negative, a ``keep`` that keeps no leaf or all.
        TypeError: a model that returns no distribution, a prior of another structure or shape, a ``fisher`` or ``view`` that
            returns no operator.

    Reference: MacKay, A practical Bayesian framework for backpropagation networks (Neural Computation 1992); Daxberger et al.,
    Laplace redux (NeurIPS 2021).

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda w, x: jf.Normal(w * x, 1.0)
    >>> x, y = jnp.array([1.0, 1.0, 1.0]), jnp.array([1.0, 2.0, 3.0])
    >>> posterior = jf.laplace(model, 1.5, x, y, prior=1.0)  # the mean is 6 / (3 + 1)
    >>> print(posterior.precision().as_matrix())
    [[4.]]
    >>> print(posterior.predictive(jnp.array([2.0])).variance.round(3))  # 1 + 2 * 2 / 4
    [2.]
    >>> print(f"{posterior.log_evidence():.3f}")
    -5.950
    """
    check_function("model", model, MODEL)
    if not jax.tree.leaves(data):
        raise TypeError("laplace was called without data. Call it as laplace(model, params, *inputs, targets, prior=...).")
    if view is not None:
        check_function("view", view, VIEW)
    batch = make_batch(params, data, weights, batch_size)
    params = jax.tree.map(jnp.asarray, params)
    found = _fisher_of(model, fisher, params, data, weights, batch_size)
    batch.spec.check_same(found.spec, f"laplace: `fisher` returned {found}, which is not over `params`")
    flags = (True,) * len(batch.spec.paths)
    if keep is not None:
        flags, found = batch.spec.flags(keep, "laplace"), found.restrict(keep)
        prior = restricted_damping(prior, batch.spec, flags, "prior")
    if view is not None:
        found = as_operator(view(found), "laplace: `view`")
        spec = batch.spec.restrict(flags, subtree(batch.spec.treedef, flags))
        spec.check_same(found.spec, f"laplace: `view` returned {found}, which is over other parameters")
    log_prob = log_likelihood(model)
    fit = batch.total * _mean_log_likelihood(log_prob, params, batch)
    return Posterior(params, found, batch.total, _checked_prior(prior, found), fit, model, flags)


def _fisher_of(
    model: Model, fisher: FisherFunction | None, params: Any, data: tuple[Any, ...], weights: Any, batch_size: int | None
) -> Operator:
    if fisher is None:
        fisher = exact_fisher(model, batch_size=batch_size)
    else:
        check_function("fisher", fisher, "(params, *data) -> operator")
    taken = taken_by(fisher, data, data)
    return as_operator(fisher(params, *taken, **given_with(taken, {"weights": weights})), "laplace: `fisher`")


@once_for
def _mean_log_likelihood(log_prob: LogProb, params: Any, batch: Batch) -> Scalar:
    with of_one_example(log_prob, "model", params, batch.data):
        return -batch_loss(log_prob, params, batch)


def _checked_prior(prior: Damping, fisher: Operator) -> Any:
    """The prior's precision checked and cast: one number, or a pytree with a number or an array for each leaf."""
    for leaf in jax.tree.leaves(prior):
        if is_known_zero(leaf, fisher.spec.dtype):
            raise ValueError("`prior` is zero; expected precisions above zero: a flat prior has no evidence.")
    checked = checked_damping(prior, fisher.spec, "prior")
    return fisher.spec.tree(list(checked)) if isinstance(checked, tuple) else checked


def is_one(prior: Any) -> bool:
    """Whether the precision is one number for all parameters."""
    return isinstance(prior, jax.Array) and prior.ndim == 0


def _over(prior: Any, posterior: Posterior) -> Any:
    """The damping ``A / n``, with which the damped F is the precision over n."""
    return jax.tree.map(lambda alpha: alpha / posterior.examples, prior)


@once
def _deviations(posterior: Posterior, key: PRNGKeyArray, count: Static[int]) -> Any:
    """Draws from ``N(0, P^-1)``, stacked along a leading axis."""
    refuse_stack(posterior.stack, "Posterior", "laplace")
    fisher, damping = posterior.fisher, _over(posterior.prior, posterior)
    noise = jax.random.normal(key, (count.value, fisher.size), fisher.spec.dtype)
    root = lambda z: fisher.inv_sqrt_mv(fisher.spec.unravel(z), damping)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf / jnp.sqrt(posterior.examples), jax.vmap(root)(noise))


# --- predictions ---------------------------------------------------------------------------------------------------------


def _checked(posterior: Posterior, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    refuse_stack(posterior.stack, "Posterior", "laplace")
    return make_batch(posterior.params, inputs, None).data


def _covariances(posterior: Posterior, data: tuple[Any, ...], result: Callable[[Any, Array], Any]) -> Any:
    """``result`` of each example's prediction and the covariance of its outputs, stacked."""
    fisher, model = posterior.fisher, posterior.model
    # Factor F once for all examples; the prior is above zero. The accuracy is what a standard error needs.
    rtol = 100 * float(jnp.finfo(fisher.spec.dtype).eps)
    damping = checked_damping(_over(posterior.prior, posterior), fisher.spec)
    inverse = damped_inverse(fisher.form, damping, None if isinstance(damping, tuple) else by_cholesky(rtol))

    # A solve takes a prior that rounding hides for none, and leaves out what the data do not determine, of which the prior is
    # all that is known. A root by eigenvectors does not, and takes longer.
    told = inverse(fisher.spec.zeros()).rank == fisher.size

    def inner(rows: Any) -> Array:
        def by_roots() -> Array:
            halves = jax.vmap(lambda row: damped_inverse_root(fisher.form, row, damping, transposed=True))(rows)
            return products(halves, halves)

        return cond(told, lambda: products(rows, jax.vmap(lambda row: inverse(row).x)(rows)), by_roots)

    def of_one(*example: Any) -> Any:
        def outputs(uncertain: Any) -> tuple[Array, Any]:
            predicted = predict(model, posterior._with(uncertain), *example)
            return output_of(predicted).reshape(-1), predicted

        out, pull_back, predicted = jax.vjp(outputs, posterior.mean, has_aux=True)
        rows = jax.vmap(lambda e: fisher.spec.vector(pull_back(e)[0]))(jnp.eye(out.size, dtype=out.dtype))
        return result(predicted, (inner(rows) / posterior.examples).astype(out.dtype))

    with of_one_example(model, "model", posterior.params, data):
        count = _output_size(posterior, data)
        at_once = max(1, NUMBERS_AT_ONCE // (count * fisher.size))
        if not data:
            return jax.tree.map(lambda leaf: leaf[None], of_one())
        return map_batches(lambda *piece: jax.vmap(of_one)(*piece), data, at_once)


def _output_size(posterior: Posterior, data: tuple[Any, ...]) -> int:
    """The number of outputs of one example."""
    first = jax.tree.map(lambda leaf: leaf[0], data)
    shape: Any = jax.eval_shape(
        lambda params, *example: output_of(predict(posterior.model, params, *example)), posterior.params, *first
    )
    return max(1, math.prod(shape.shape))


_output_covariance = once(lambda posterior, data: _covariances(posterior, data, lambda predicted, covariance: covariance))
_predictive = once(lambda posterior, data: _covariances(posterior, data, integrated))


@once
def _sample_predictive(posterior: Posterior, key: PRNGKeyArray, data: tuple[Any, ...], count: Static[int]) -> Any:
    mean = posterior.mean

    def coordinates(uncertain: Any) -> Any:
        return map_examples(
            lambda params, *example: free(predict(posterior.model, params, *example)), posterior._with(uncertain), data
        )

    def along(u: Any) -> Any:
        moved = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), u, mean)
        at, change = jax.jvp(coordinates, (mean,), (moved,))
        return bound(jax.tree.map(lambda x, dx: x + dx if jnp.issubdtype(x.dtype, jnp.floating) else x, at, change))

    with of_one_example(posterior.model, "model", posterior.params, data):
        return jax.lax.map(along, _deviations(posterior, key, count))
