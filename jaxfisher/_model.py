"""Models as pure functions of one example: their predictions, their log-likelihood, and errors inside them."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from jaxfisher._distributions.base import Distribution
from jaxfisher._distributions.base import float_fields as float_fields
from jaxfisher._distributions.joint import as_prediction as as_prediction
from jaxfisher._examples import Batch, map_examples, shape_of_one
from jaxfisher._pieces import sum_again
from jaxfisher._readings import Around
from jaxfisher._tree import check_function, is_complex, joined

LOG_PROB = "(params, *example) -> the scalar log-density of ONE example"
MODEL = "(params, *inputs) -> the distribution of ONE example's target"
"""The two signatures, as messages show them."""


class LogProb(Protocol):
    """``log_prob(params, *example) -> scalar``: the log-density of ONE example, in nats."""

    def __call__(self, params: chex.ArrayTree, /, *example: Any) -> Float[Array, ""]: ...


class Model(Protocol):
    """``model(params, *inputs) -> distribution`` over the target of ONE example; no inputs for an unconditional family."""

    def __call__(self, params: chex.ArrayTree, /, *inputs: Any) -> Any: ...


@dataclasses.dataclass(frozen=True)
class LogLikelihood(Around):
    """The function that `log_likelihood` returns: equal and hashable if the models are, so that it never causes a new trace."""

    model: Model

    def __call__(self, params: chex.ArrayTree, /, *example: Any) -> Scalar:
        if not example:
            raise TypeError("log_likelihood(model) needs a target: call it as (params, *inputs, target).")
        *inputs, target = example
        return log_prob_of(predict(self.model, params, *inputs), target)


def log_prob_of(predicted: Distribution, target: Any) -> Scalar:
    """The log-density of one target, which must have the shape of a draw."""
    predicted._check_target(target, "one target")
    return jnp.sum(predicted.log_prob(target))


def log_likelihood(model: Model) -> LogLikelihood:
    r"""The log-density that a model defines: ``(params, *inputs, target) -> log p(target | inputs; params)``.

    A predicted distribution with a batch shape is a product of independent ones over one target of that shape, so the
    log-densities are summed:

    .. math:: \log p_\theta(y \mid x) = \sum_k \log p(y_k;\, \mathrm{model}(\theta, x)_k).

    Args:
        model: ``(params, *inputs) -> distribution`` of ONE example.

    Returns:
        A function of ONE example: a scalar, in nats.

    Raises:
        ValueError: (when called) the target's shape is not the distribution's.
        TypeError: (when called) the model returns no distribution, or the target is missing.

    Reference: Martens (JMLR 2020), section 3.

    >>> import jaxfisher as jf
    >>> log_prob = jf.log_likelihood(lambda theta, x: jf.Poisson(log_rate=theta * x))
    >>> float(log_prob(0.0, 1.0, 0.0))  # log of exp(-1)
    -1.0
    """
    check_function("model", model, MODEL)
    return LogLikelihood(model)


def predict(model: Model, params: chex.ArrayTree, *inputs: Any) -> Distribution:
    """The distribution that the model predicts for one example, as one of the library's."""
    return as_prediction(model(joined(params), *inputs))


def tangent(distribution: Distribution, values: list[Array]) -> Distribution:
    """A tangent shaped like the distribution, with these real fields; integer leaves stay, as they have no tangent."""
    leaves, treedef = jax.tree.flatten(distribution)
    rest = iter(values)
    return jax.tree.unflatten(treedef, [next(rest) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf for leaf in leaves])


def scalar(value: Any, name: str, may_be_complex: bool = False) -> Scalar:
    """``value`` if it is a scalar, else an error which explains that functions are of one example.

    It must be real, unless it is said that it may be complex, as the log-amplitude of a wave function is.
    """
    if not hasattr(value, "dtype") and not isinstance(value, (float, int, complex)):
        raise TypeError(f"`{name}` returned a {type(value).__name__}; expected the scalar log-density of one example.")
    if jnp.shape(value) != ():
        raise ValueError(
            f"`{name}` returned shape {jnp.shape(value)}; expected a scalar, the log-density of ONE example. "
            "If the axes are independent parts of one target, sum over them."
        )
    if not (may_be_complex and is_complex(value)):
        check_real(value, name)
    return jnp.asarray(value)


def check_real(value: Any, name: str) -> None:
    """Raise `TypeError` unless the value of a log-density is real and floating."""
    if jnp.issubdtype(jnp.result_type(value), jnp.floating):
        return
    message = f"`{name}` returned dtype {jnp.result_type(value)}; expected a real floating log-density."
    if is_complex(value):
        message += (
            " A complex log-amplitude has no likelihood: jf.scores and jf.empirical_fisher take it as it is, "
            "jf.energy_gradient gives the gradient of an energy, and a log-density is 2 * log_psi(params, x).real."
        )
    raise TypeError(message)


def mean_loss(log_prob: LogProb, params: chex.ArrayTree, data: tuple[Any, ...], weights: Float[Array, " n"]) -> Scalar:
    """``-sum w_i log p(x_i)`` in the dtype of the weights: the mean negative log-likelihood if the weights sum to one."""
    values = map_examples(lambda p, *example: scalar(log_prob(joined(p), *example), "log_prob"), params, data)
    return -jnp.sum(weights * values.astype(weights.dtype))


def batch_loss(log_prob: LogProb, params: chex.ArrayTree, batch: Batch) -> Scalar:
    """`mean_loss` of a batch, in chunks if the batch has a ``batch_size``."""

    def piece(omega: Float[Array, " n"], *data: Any) -> Scalar:
        return mean_loss(log_prob, params, data, omega)

    total: Scalar = sum_again(piece, (batch.weights, *batch.data), batch.batch_size)
    return total


@contextlib.contextmanager
def of_one_example(function: Callable[..., Any], name: str, params: chex.ArrayTree, data: tuple[Any, ...]) -> Iterator[None]:
    """Explain an error inside a user's function of one example: for instance, the function may be written for a batch."""
    try:
        yield
    except _CALL_ERRORS as error:
        mismatch = _mismatch(function, name, data)
        if mismatch is not None:
            raise TypeError(mismatch) from error
        one = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", shape_of_one(data))
        if _takes_only_the_batch(function, params, data):
            raise ValueError(
                f"`{name}` fails on one example, {one}, but accepts the whole batch and returns a scalar: a batch mean or "
                "sum. The score of a batch mean is not a score, and its square is not a Fisher. Write it for ONE example: the "
                "library maps it over the leading axis of the data."
            ) from error
        if data and not _accepts(function, params, shape_of_one(data)) and _accepts(function, params, data):
            raise ValueError(
                f"`{name}` fails on one example, {one}, but accepts the data as they are. The library maps it over the leading "
                "axis of the data, which is that of the examples. Pass a single example as a batch of one, x[None]; if the "
                "function was written for a batch, write it for ONE example."
            ) from error
        given = f"the parameters and ONE example, {one} (no batch axis)" if data else "the parameters alone, without data"
        error.add_note(f"jaxfisher called `{name}` with {given}.")
        raise


_CALL_ERRORS = (TypeError, ValueError, LookupError, AttributeError)
"""The errors of a function that is called with arguments that it was not written for."""


def _mismatch(function: Callable[..., Any], name: str, data: tuple[Any, ...]) -> str | None:
    """The message if a function does not take as many arguments as the parameters and the data; else None."""
    wants_target = isinstance(function, LogLikelihood)
    taken, given = (function.model, data[:-1]) if isinstance(function, LogLikelihood) else (function, data)
    try:
        signature = inspect.signature(taken)
    except (TypeError, ValueError):  # a function written in C may have no signature
        return None
    try:
        signature.bind(None, *given)
        return None
    except TypeError as error:
        reason = str(error)
    usual = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    many = len(given) + 1 > len(usual)
    count = f"{len(data)} {'entry' if len(data) == 1 else 'entries'} of data"
    if wants_target:
        call = f"`log_prob` takes what its model does, {signature}, and then the target; it was given {count}, the target last"
        remedy = "Pass the inputs and then the targets: (params, *inputs, targets)."
    else:
        call = f"`{name}` takes {signature}, and was given the parameters and {count}"
        remedy = "Pass all that it takes: (params, *data)."
    if many and name == "model" and not wants_target:
        remedy = "The model's own predictions take the place of targets: pass its inputs only."
    if many:
        remedy += " Weights go by keyword: weights=w."
    if any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(given)):
        remedy += " In a step with key=, the key of the example is the last of the inputs: model(params, *inputs, key)."
    return f"{call} ({reason}). {remedy}"


def _takes_only_the_batch(function: Callable[..., Any], params: chex.ArrayTree, data: tuple[Any, ...]) -> bool:
    """Whether a function that should be of one example is really a scalar function of the whole batch."""
    return not _gives_scalar(function, params, shape_of_one(data)) and _gives_scalar(function, params, data)


def _accepts(function: Callable[..., Any], params: chex.ArrayTree, data: tuple[Any, ...]) -> bool:
    """Whether a function can be called with the data as they are."""
    try:
        jax.eval_shape(lambda *given: (function(*given), None)[1], params, *data)
    except _CALL_ERRORS:
        return False
    return True


def _gives_scalar(function: Callable[..., Any], params: chex.ArrayTree, example: tuple[Any, ...]) -> bool:
    try:
        result = jax.eval_shape(function, params, *example)
    except _CALL_ERRORS:
        return False
    return getattr(result, "shape", None) == ()
