"""Examples: how a batch of data is checked, weighted, cut into pieces and fed to a function of one example."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxfisher._tree import ParamSpec, described, dtype_of, param_spec, path_names


def num_examples(data: tuple[Any, ...], name: str) -> int:
    """The common length of the leading axis of every array in ``data``, which messages call ``name``.

    No arrays at all means one example: an unconditional model has no inputs.
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


def _data_paths(data: tuple[Any, ...], name: str) -> list[str]:
    return [name + path for path in path_names(data)]


def _as_arrays(data: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    """``data`` with JAX arrays for leaves, or a `TypeError` that names the leaf which is no array of numbers."""
    leaves, treedef = jax.tree.flatten(data)
    for path, leaf in zip(_data_paths(data, name), leaves, strict=True):
        _check_numbers(path, leaf)
    return jax.tree.unflatten(treedef, [jnp.asarray(leaf) for leaf in leaves])


def _check_numbers(name: str, leaf: Any) -> None:
    """Raise `TypeError` unless JAX takes ``leaf`` as an array: of numbers, booleans or random keys."""
    is_array = isinstance(leaf, (jax.Array, float, int, complex)) or hasattr(leaf, "__array__")
    kinds = (jnp.number, jnp.bool_, jax.dtypes.prng_key)
    if not is_array or not any(jnp.issubdtype(dtype_of(leaf), kind) for kind in kinds):
        raise TypeError(
            f"{name} is {described(leaf)}; expected an array of numbers with a leading axis of examples. Encode it as numbers, "
            "or close over it in your function."
        )


def needs_data(data: tuple[Any, ...], function: str, call: str = "(params, *data)") -> None:
    """Raise where a function of examples was called with none: its ``log_prob`` would be a function of a whole batch."""
    if not jax.tree.leaves(data):
        raise TypeError(
            f"jaxfisher.{function}(log_prob) was called without data. Call it as {call}: `log_prob` takes the parameters and "
            "ONE example, and the library maps it over the leading axis of the data. A log-density that closes over its batch "
            "is a batch mean or sum, and the score of a batch mean is not a score."
        )


@dataclasses.dataclass(frozen=True)
class Batch:
    """Checked examples: the parameters' spec, the data as arrays, weights that sum to one, and what bounds memory."""

    spec: ParamSpec
    size: int
    data: tuple[Any, ...]
    weights: Float[Array, " n"]
    weighted: bool
    batch_size: int | None
    max_bytes: int | None


def make_batch(
    params: chex.ArrayTree, data: tuple[Any, ...], weights: Any, batch_size: int | None = None, max_bytes: int | None = None
) -> Batch:
    """Check what every function of a batch is given, and normalise the weights: ``w_i / sum w``, or ``1 / n`` each.

    A weight of zero is padding: the example is replaced by a real one, so that no number made of it can leak.
    """
    check_batch_size(batch_size)
    check_max_bytes(batch_size, max_bytes)
    spec = param_spec(params)
    if not spec.paths:
        raise ValueError(f"`params` has no leaves ({spec.treedef}). Pass a pytree with at least one floating-point array.")
    data = _as_arrays(data, "data")
    n = num_examples(data, "data")
    if weights is None:
        return Batch(spec, n, data, jnp.full(n, 1 / n, spec.dtype), False, batch_size, max_bytes)
    if not isinstance(weights, (list, tuple)):
        _check_numbers("`weights`", weights)
    weights = jnp.asarray(weights)
    if weights.shape != (n,):
        raise ValueError(
            f"`weights` has shape {weights.shape}, but there are {n} examples. Pass one weight each, shape ({n},)."
        )
    if jnp.issubdtype(weights.dtype, jnp.complexfloating):
        raise TypeError(f"`weights` is complex ({weights.dtype}). Pass real, non-negative weights.")
    weights = weights.astype(spec.dtype)
    # Dividing by the largest first keeps the sum in range for weights near the ends of the dtype.
    weights = weights / jnp.max(weights)
    source = jnp.where(weights != 0, jnp.arange(n), jnp.argmax(weights))
    data = jax.tree.map(lambda leaf: leaf[source], data)
    return Batch(spec, n, data, weights / jnp.sum(weights), True, batch_size, max_bytes)


def check_batch_size(batch_size: int | None) -> None:
    """Raise unless ``batch_size`` is None or a positive whole number known at trace time."""
    if batch_size is None:
        return
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"`batch_size` is {batch_size!r}. Pass a whole number of examples per piece, or None for all at once.")
    if batch_size < 1:
        raise ValueError(
            f"`batch_size` is {batch_size}. Pass a positive number of examples per piece, or None for all at once."
        )


def check_max_bytes(batch_size: int | None, max_bytes: int | None) -> None:
    """Raise unless ``max_bytes`` is None or a positive whole number given instead of a ``batch_size``."""
    if max_bytes is None:
        return
    if batch_size is not None:
        raise ValueError(
            f"both `batch_size` ({batch_size}) and `max_bytes` ({max_bytes}) are given. Give one: each sets the other."
        )
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
        raise TypeError(f"`max_bytes` is {max_bytes!r}. Pass a whole number of bytes, such as 2**30 for 1 GiB, or None.")
    if max_bytes < 1:
        raise ValueError(f"`max_bytes` is {max_bytes}. Pass a positive number of bytes, such as 2**30 for 1 GiB, or None.")


def shape_of_one(data: Any) -> Any:
    """Shapes and dtypes of one example of ``data``."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf)[1:], jnp.result_type(leaf)), data)


def map_examples(function: Any, params: chex.ArrayTree, data: tuple[Any, ...]) -> Any:
    """``function(params, *example)`` of every example, results stacked along a leading axis."""
    axes = (None, *(0 for _ in data))
    return jax.vmap(function, in_axes=axes, axis_size=num_examples(data, "data"))(params, *data)


def map_batches(function: Callable[..., Any], data: tuple[Any, ...], batch_size: int | None) -> Any:
    """``function`` of each piece of ``data``, results joined along their leading axis.

    ``function`` takes a batch; pieces have ``batch_size`` examples, the last one what remains.
    """
    starts, rest = _split(data, batch_size)
    if starts is None:
        return function(*data)
    stacked = jax.lax.map(lambda start: function(*_piece(data, start, batch_size)), starts)
    joined = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]), stacked)
    if rest is None:
        return joined
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), joined, function(*rest))


def sum_batches(function: Callable[..., Any], data: tuple[Any, ...], batch_size: int | None) -> Any:
    """The sum over pieces of ``function`` of each piece: one piece in memory at a time."""
    starts, rest = _split(data, batch_size)
    if starts is None:
        return function(*data)
    shapes = jax.eval_shape(lambda start: function(*_piece(data, start, batch_size)), starts[0])
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def step(total: Any, start: Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(*_piece(data, start, batch_size))), None

    total, _ = jax.lax.scan(step, zero, starts)
    return total if rest is None else jax.tree.map(jnp.add, total, function(*rest))


def _split(data: tuple[Any, ...], batch_size: int | None) -> tuple[Any, Any]:
    """``(where whole pieces start, remainder)``; ``(None, None)`` where one piece holds everything."""
    leaves = jax.tree.leaves(data)
    n = leaves[0].shape[0] if leaves else 1
    if not leaves or batch_size is None or batch_size >= n:
        return None, None
    count = n // batch_size
    rest = None if count * batch_size == n else jax.tree.map(lambda leaf: leaf[count * batch_size :], data)
    return batch_size * jnp.arange(count), rest


def _piece(data: tuple[Any, ...], start: Array, batch_size: int | None) -> tuple[Any, ...]:
    """``batch_size`` examples, cut out when they are needed: the data is not copied."""
    cut: tuple[Any, ...] = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, batch_size or 1), data)
    return cut
