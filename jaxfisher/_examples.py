"""Examples: a batch of data is checked and weighted, and passed to a function of one example."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Scalar

from jaxfisher._automatic import automatic
from jaxfisher._once import Static, once
from jaxfisher._pytree import array_fields
from jaxfisher._tree import ParamSpec, at_least_float32, param_spec, path_names, refuse_sparse, threefry_key
from jaxfisher._values import check_array, described, dtype_of, is_array, whole

P = typing.ParamSpec("P")
R = TypeVar("R")


def num_examples(data: tuple[Any, ...], name: str) -> int:
    """The common length of the leading axis of every array in ``data``, which messages call ``name``.

    Data without arrays counts as one example: an unconditional model has no inputs.
    """
    leaves = jax.tree.leaves(data)
    if not leaves:
        return 1
    paths = _data_paths(data, name)
    for path, leaf in zip(paths, leaves, strict=True):
        if jnp.ndim(leaf) == 0:
            raise ValueError(
                f"{path} is a scalar; every array of the data needs a leading axis of examples. "
                "The function you gave takes ONE example and the library maps it over that axis. "
                "A Python list is a container of scalars: make an array of it with jnp.asarray."
            )
    n = jnp.shape(leaves[0])[0]
    for path, leaf in zip(paths, leaves, strict=True):
        if jnp.shape(leaf)[0] != n:
            raise ValueError(
                f"{paths[0]} has {n} examples, but {path} has {jnp.shape(leaf)[0]} "
                f"(shapes {jnp.shape(leaves[0])} and {jnp.shape(leaf)}). Give every array the same leading axis."
            )
    if n == 0:
        raise ValueError(f"{paths[0]} has no examples (shape {jnp.shape(leaves[0])}). A mean needs at least one.")
    return n


def batches_of(given: Any, name: str) -> Iterator[tuple[Any, ...]]:
    """The batches of an iterable, one at a time, each as a tuple of its data. A batch of a single array needs no tuple."""
    if not isinstance(given, Iterable) or isinstance(given, dict | str):
        raise TypeError(
            f"{name} is {described(given)}; expected an iterable of batches, each a tuple of arrays such as (x, y)."
        )
    return (tuple(batch) if isinstance(batch, tuple | list) else (batch,) for batch in given)


def _data_paths(data: tuple[Any, ...], name: str) -> list[str]:
    return [name + path for path in path_names(data)]


def as_arrays(data: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    """``data`` with JAX arrays for leaves, or a `TypeError` that names a leaf that is no array of numbers."""
    for i, entry in enumerate(data):
        if entry is None:
            raise TypeError(
                f"{name}[{i}] is None; expected an array of numbers with a leading axis of examples, or a pytree of them. "
                "Leave it out, or close over it in your function."
            )
    refuse_sparse(data, lambda path: name + path)
    leaves, treedef = jax.tree.flatten(data)
    for path, leaf in zip(_data_paths(data, name), leaves, strict=True):
        check_numbers(path, leaf)
    return jax.tree.unflatten(treedef, [jnp.asarray(leaf) for leaf in leaves])


def check_numbers(name: str, leaf: Any) -> None:
    """Raise `TypeError` unless JAX accepts ``leaf`` as an array of numbers, booleans or random keys."""
    check_array(name, leaf)
    kinds = (jnp.number, jnp.bool_, jax.dtypes.prng_key)
    if not is_array(leaf) or not any(jnp.issubdtype(dtype_of(leaf), kind) for kind in kinds):
        raise TypeError(
            f"{name} is {described(leaf)}; expected an array of numbers with a leading axis of examples. Encode it as numbers, "
            "or close over it in your function."
        )


BATCH_SIZE = "it with the function and not with the data: {}."
"""The message, for `refusing`, about a batch size that is passed with the data; the gap is for a correct call."""


class Refusing(typing.Protocol):
    """The type of what `refusing` returns, a decorator."""

    def __call__(self, of_data: Callable[P, R], /) -> Callable[P, R]: ...


def refusing(function: str, **reasons: str) -> Refusing:
    """A decorator of a function of data that makes it refuse the keywords in ``reasons``, with a message.

    A reason is the part of the message that says what is expected and what to do instead. A keyword with the value None counts
    as not given, as everywhere.
    """

    def decorate(of_data: Callable[P, R], /) -> Callable[P, R]:
        @functools.wraps(of_data)
        def checked(*args: P.args, **keywords: P.kwargs) -> R:
            for name in reasons.keys() & keywords.keys():
                value = keywords.pop(name)
                if value is not None:
                    raise TypeError(f"{function}: `{name}` is {described(value)}; expected {reasons[name]}")
            return of_data(*args, **keywords)

        return checked

    return decorate


def needs_data(data: tuple[Any, ...], function: str, call: str = "(params, *data)") -> None:
    """Raise if a function of examples was called without data: its ``log_prob`` would then be a function of a whole batch."""
    if not jax.tree.leaves(data):
        raise TypeError(
            f"jaxfisher.{function}(log_prob) was called without data. Call it as {call}: `log_prob` takes the parameters and "
            "ONE example, and the library maps it over the leading axis of the data. A log-density that closes over its batch "
            "is a batch mean or sum, and the score of a batch mean is not a score."
        )


@array_fields("data", "weights", "live", "mass", "positive")
class Batch:
    """Checked examples: the parameters' spec, the data as arrays, their weights in a mean, and the limits on memory.

    The weights sum to one; if counts were given, the products of weights and counts do. ``live`` is true for examples and false
    for padding. It is None if no weights were given, since then nothing is padding.
    """

    spec: ParamSpec
    size: int
    data: tuple[Any, ...]
    weights: Float[Array, " n"]
    live: Bool[Array, " n"] | None
    batch_size: int | None
    max_bytes: int | None
    mass: Scalar | None = None
    """The sum of the given weights, or with counts the sum of the products of both."""
    positive: Scalar | None = None
    """How many of the given weights are not zero."""
    counted: bool = False
    """Whether counts were given."""

    @property
    def weighted(self) -> bool:
        """Whether weights were given."""
        return self.live is not None

    @property
    def uneven(self) -> Float[Array, " n"] | None:
        """The weights if some were given. Else None, so that functions that take weights do not replace padding."""
        return self.weights if self.weighted else None

    @property
    def count(self) -> Scalar:
        """The number of examples, without padding."""
        return jnp.asarray(self.size if self.positive is None else self.positive, self.spec.dtype)

    @property
    def total(self) -> Scalar:
        """The sum that the mean divides by: the `mass` if there is one, else the number of examples."""
        return jnp.asarray(self.size if self.mass is None else self.mass, self.spec.dtype)


def make_batch(
    params: chex.ArrayTree,
    data: tuple[Any, ...],
    weights: Any,
    batch_size: int | None = None,
    max_bytes: int | None = None,
    counts: Any = None,
) -> Batch:
    """Check the arguments of a function of a batch, and normalise the weights: ``w_i / sum w``, or ``1 / n`` each.

    If each example is a sum of terms, as many as its count, the weights are ``w_i / sum w c``: means are over terms.

    An example of weight zero is padding. It is replaced by a real example, so that no number computed from it can leak into the
    result. The caller must set its rows of scores to zero.
    """
    batch_size = checked_batch_size(batch_size)
    max_bytes = _checked_max_bytes(batch_size, max_bytes)
    spec = param_spec(params)
    if not spec.paths:
        raise ValueError(f"`params` has no leaves ({spec.treedef}). Pass a pytree with at least one floating-point array.")
    data = as_arrays(data, "data")
    n = num_examples(data, "data")
    if weights is None:
        even = Batch(spec, n, data, jnp.full(n, 1 / n, spec.dtype), None, batch_size, max_bytes)
        return even if counts is None else _over_counts(even, counts)
    data, omega, live, mass, count = _weighted(data, checked_weights(weights, n), Static(spec.dtype))
    batch = Batch(spec, n, data, omega, live, batch_size, max_bytes, mass, count)
    return batch if counts is None else _over_counts(batch, counts)


def _over_counts(batch: Batch, counts: Any) -> Batch:
    """The batch with weights for means over the terms of its examples. The weights are NaN if run-time counts are invalid."""
    check_numbers("`counts`", counts)
    _check_known("`counts`", counts, "say how many terms, such as the valid tokens of a sequence, an example is a sum of.")
    counts = jnp.asarray(counts)
    if counts.shape != (batch.size,):
        raise ValueError(
            f"`counts` has shape {counts.shape}, but there are {batch.size} examples. Pass one count each, shape "
            f"({batch.size},), such as the lengths of the sequences."
        )
    weights, mass = _weighted_over_counts(counts.astype(batch.spec.dtype), batch.weights, batch.live, batch.total)
    return dataclasses.replace(batch, weights=weights, mass=mass, counted=True)


def check_centred(center: bool, batch: Batch, of: str) -> None:
    """Raise `ValueError` if scores that are to be centred have counts of terms."""
    if center and batch.counted:
        raise ValueError(
            f"{of}: `counts` are given with center=True; expected one of the two, since the covariance of the score is one "
            "over examples. Leave the counts out, and divide by their mean."
        )


def checked_weights(weights: Any, n: int, name: str = "weights") -> Float[Array, " n"]:
    """The weights as a floating array with one number per example; an error if they are known to be invalid."""
    if isinstance(weights, (list, tuple)):
        wrong = [i for i, weight in enumerate(weights) if not is_array(weight)]
        if wrong:
            raise TypeError(f"`{name}` holds {described(weights[wrong[0]])} at entry {wrong[0]}; expected {n} real numbers.")
    else:
        check_numbers(f"`{name}`", weights)
    _check_known(
        f"`{name}`",
        weights,
        "say how often an example counts. A factor that may be negative, such as an advantage, belongs to the loss: "
        "multiply the log-density by it in your own function, and give the Fisher no weights.",
    )
    weights = jnp.asarray(weights)
    if weights.shape != (n,):
        raise ValueError(f"`{name}` has shape {weights.shape}, but there are {n} examples. Pass one weight each, shape ({n},).")
    if jnp.issubdtype(weights.dtype, jnp.complexfloating):
        raise TypeError(f"`{name}` is complex ({weights.dtype}). Pass real, non-negative weights.")
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        return weights.astype(jnp.result_type(float))
    return weights.astype(at_least_float32(weights.dtype))


def _check_known(name: str, given: Any, meaning: str) -> None:
    """Raise `ValueError` if weights or counts are invalid and their values are known, which they are not under a trace."""
    for leaf in jax.tree.leaves(given):
        if isinstance(leaf, jax.core.Tracer) or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
            return
    values = np.asarray(given)
    if values.size == 0 or values.dtype.kind not in "biuf":
        return
    wrong = np.flatnonzero(~(values >= 0) | (values == np.inf))
    if wrong.size:
        raise ValueError(
            f"{name} is {values.reshape(-1)[wrong[0]]} at entry {wrong[0]}; expected finite numbers of at least zero, which "
            f"{meaning}"
        )
    if not np.any(values > 0):
        raise ValueError(f"{name} are all zero; expected at least one positive number, since the mean divides by their sum.")


def _normalised(weights: Float[Array, " n"]) -> Float[Array, " n"]:
    """``w_i / sum w``, accurate at any scale of the weights; an entry that is no valid weight makes the result NaN."""
    info = jnp.finfo(weights.dtype)
    tiny = float(info.tiny)
    # XLA flushes numbers below `tiny` to zero on a CPU. Read their digits as an integer, in units of `2^-nmant tiny`.
    bits = jax.lax.bitcast_convert_type(weights, jnp.uint32 if info.bits == 32 else jnp.uint64)
    digits = jnp.where(bits < (1 << info.nmant), bits, 0).astype(weights.dtype)
    # XLA compiles a quotient of a quotient to a quotient by a product, which overflows. It leaves products with a reciprocal.
    unit = 1 / jnp.clip(jnp.max(weights), tiny, 0.25 / tiny)
    near_one = jnp.where(digits > 0, digits * (tiny * unit) * float(info.eps), weights * unit)
    near_one = jnp.where((weights >= 0) & (weights < jnp.inf), near_one, jnp.nan)
    return near_one * (1 / jnp.sum(near_one))


def _filled(data: tuple[Any, ...], weights: Float[Array, " n"], live: Bool[Array, " n"]) -> tuple[Any, ...]:
    """The data with padding replaced by a real example, the one with the largest weight."""
    chosen = jnp.arange(weights.size) == jnp.argmax(weights)

    def among_examples(flags: Bool[Array, " n"], leaf: Array) -> Bool[Array, "n ..."]:
        return flags.reshape(-1, *(1,) * (leaf.ndim - 1))

    def filled(leaf: Array) -> Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(filled(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        # Take the example as a sum in which the others are zero: indexing would gather data that is spread over devices.
        alone = jnp.where(among_examples(chosen, leaf), leaf, jnp.zeros((), leaf.dtype))
        real = jnp.any(alone, axis=0) if leaf.dtype == bool else jnp.sum(alone, axis=0, dtype=leaf.dtype)
        return jnp.where(among_examples(live, leaf), leaf, real[None])

    made: tuple[Any, ...] = jax.tree.map(filled, data)
    return made


def _weigh(
    data: tuple[Any, ...], weights: Float[Array, " n"], dtype: Static[jnp.dtype]
) -> tuple[Any, Array, Array, Scalar, Scalar]:
    """The data with padding replaced, the normalised weights, which examples are live, the weights' sum, and their count."""
    omega = _normalised(weights).astype(dtype.value)
    live, wide = omega != 0, max(weights.dtype, dtype.value, key=lambda dtype: jnp.finfo(dtype).bits)
    # One sum for both numbers, so that devices that share the examples communicate once. All padding gives weights of NaN.
    each = jnp.stack([jnp.where(weights >= 0, weights, jnp.nan).astype(wide), (omega > 0).astype(wide)])
    mass, count = jnp.sum(each, 1)
    return _filled(data, omega, live), omega, live, mass.astype(weights.dtype), count.astype(dtype.value)


_weighted = once(_weigh, lambda data, weights, dtype: (data, weights))
"""`_weigh` as one program. Run eagerly it is some twenty-five operations, each compiled for every shape."""


def _weigh_over_counts(counts: Array, weights: Array, live: Array | None, total: Scalar) -> tuple[Array, Scalar]:
    """Weights for means over terms, and the weighted number of terms."""
    counts = counts if live is None else jnp.where(live, counts, 0)
    mean = jnp.sum(weights * counts)
    mean = jnp.where((mean > 0) & jnp.all(counts >= 0), mean, jnp.nan)
    return weights / mean, total * mean


_weighted_over_counts = once(_weigh_over_counts, lambda counts, *_: counts)


def checked_batch_size(batch_size: int | None) -> int | None:
    """``batch_size``; an error unless it is None or a positive whole number known at trace time."""
    if batch_size is None:
        return None
    size = whole(batch_size)
    if size is None:
        raise TypeError(
            f"`batch_size` is {described(batch_size)}. Pass a whole number of examples per piece, or None for all at once."
        )
    if size < 1:
        raise ValueError(f"`batch_size` is {size}. Pass a positive number of examples per piece, or None for all at once.")
    return size


def _checked_max_bytes(batch_size: int | None, max_bytes: int | None) -> int | None:
    """``max_bytes``; an error unless it is None or a positive whole number, given without a ``batch_size``."""
    if max_bytes is None:
        return None
    if batch_size is not None:
        raise ValueError(
            f"both `batch_size` ({batch_size}) and `max_bytes` ({max_bytes}) are given. Give one: each sets the other."
        )
    size = whole(max_bytes)
    if size is None:
        raise TypeError(
            f"`max_bytes` is {described(max_bytes)}. Pass a whole number of bytes, such as 2**30 for 1 GiB, or None."
        )
    if size < 1:
        raise ValueError(f"`max_bytes` is {size}. Pass a positive number of bytes, such as 2**30 for 1 GiB, or None.")
    return size


def shape_of_one(data: Any) -> Any:
    """The shapes and dtypes of one example of ``data``, with the axes of a mesh over which it varies under ``shard_map``."""
    return jax.eval_shape(automatic(lambda data: jax.tree.map(lambda leaf: leaf[0], data)), data)


def example_keys(key: PRNGKeyArray, count: int) -> PRNGKeyArray:
    """A key for each example, ``fold_in(key, i)``: it depends only on the key and on the example's index in the whole batch."""
    return jax.vmap(partial(jax.random.fold_in, threefry_key(key)))(jnp.arange(count))


def map_examples(function: Any, params: chex.ArrayTree, data: tuple[Any, ...]) -> Any:
    """``function(params, *example)`` of every example, results stacked along a leading axis.

    It is written for one example, and cannot say where its results are on a mesh whose axes are explicit: they are automatic.
    """
    axes = (None, *(0 for _ in data))
    count = num_examples(data, "data")
    mapped = lambda params, data: jax.vmap(function, in_axes=axes, axis_size=count)(params, *data)  # noqa: E731
    return automatic(mapped, lambda params, data: data)(params, data)
