r"""Rows: what one example contributes to a score matrix.

Each of three Fishers has its kind of rows, behind one protocol: an example has ``seeds``, one for each of its rows, and ``row``
maps the parameters, a seed and the example to a parameter-shaped gradient. The sum of ``row row^T`` over an example's rows is
what that example adds to the Fisher. The row functions are frozen dataclasses, equal if the user's functions are, so that
``jit`` traces functions of objects that hold one only once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PRNGKeyArray, Scalar

from jaxfisher._dataflow import moved_by
from jaxfisher._examples import shape_of_one
from jaxfisher._model import LogProb, Model, float_fields, predict, scalar
from jaxfisher._readings import Around
from jaxfisher._tree import is_complex, joined
from jaxfisher._varying import alike


class Rows(Protocol):
    """A row function; ``function`` is the user's function, and ``name`` its name in messages."""

    @property
    def function(self) -> Callable[..., Any]: ...

    @property
    def name(self) -> str: ...

    @property
    def own(self) -> int:
        """How many entries at the start of an example are the library's own and are not passed to the user's function."""
        ...

    def seeds(self, params: chex.ArrayTree, /, *example: Any) -> Array:
        """The seeds that distinguish the rows of one example, stacked along a leading axis."""
        ...

    def row(self, params: chex.ArrayTree, seed: Any, /, *example: Any) -> tuple[tuple[Array, ...], Any]:
        """Auxiliary numbers, and the row, which is a pytree like the parameters."""
        ...

    def known(self, numbers: tuple[Any, ...], /) -> Rows:
        """The row function to use, given the shapes and dtypes of the auxiliary numbers of a first trace."""
        ...


@dataclasses.dataclass(frozen=True)
class ScoreRows(Around):
    """One row: the score ``grad log p`` at the datum, with the log-density as auxiliary number.

    A complex log-amplitude has two rows, of its real part and of its imaginary part.
    """

    function: LogProb
    parts: int = 1
    name = "log_prob"
    own = 0

    def seeds(self, params: chex.ArrayTree, /, *example: Any) -> Array:
        return jnp.zeros(1) if self.parts == 1 else jnp.eye(self.parts)

    def known(self, numbers: tuple[Any, ...], /) -> ScoreRows:
        return dataclasses.replace(self, parts=2 if is_complex(numbers[0]) else 1)

    def row(self, params: chex.ArrayTree, seed: Any, /, *example: Any) -> tuple[tuple[Array, ...], Any]:
        def value_of(params: chex.ArrayTree) -> Array:
            return scalar(self.function(joined(params), *example), self.name, may_be_complex=True)

        value, pull_back = jax.vjp(value_of, params)
        # For u + i v the cotangent a - i b gives a du + b dv.
        cotangent = jnp.ones(()) if self.parts == 1 else jax.lax.complex(seed[0], -seed[1])
        # Inside `shard_map` values of the examples vary over devices, and so must their cotangents.
        _, cotangent = alike(value, cotangent.astype(value.dtype))
        return (value,), pull_back(cotangent)[0]


@dataclasses.dataclass(frozen=True)
class ExactRows(Around):
    r"""One row for each column of the output metric's square root: ``J^T B e_j``, so that the rows give ``J^T (B B^T) J``.

    ``J`` is the Jacobian of the predicted distribution's fields, and ``B B^T`` the distribution's own Fisher in those fields
    that are ``moving`` with the parameters: see `prediction`.
    """

    function: Model
    moving: tuple[bool, ...]
    name = "model"
    own = 0

    def known(self, numbers: tuple[Any, ...], /) -> ExactRows:
        return self

    def seeds(self, params: chex.ArrayTree, /, *inputs: Any) -> Array:
        noise, _ = ravel_pytree(predict(self.function, params, *inputs).fisher_root(self.moving)[0])
        return jnp.eye(noise.size, dtype=noise.dtype)

    def row(self, params: chex.ArrayTree, seed: Any, /, *inputs: Any) -> tuple[tuple[Array, ...], Any]:
        def fields(p: chex.ArrayTree) -> Any:
            predicted = predict(self.function, p, *inputs)
            return float_fields(predicted), predicted

        _, pull_back, predicted = jax.vjp(fields, params, has_aux=True)
        noise, root = predicted.fisher_root(self.moving)
        return (), pull_back(root(ravel_pytree(noise)[1](seed)))[0]


class Prediction(NamedTuple):
    """What is known of a model's predictions when it is traced.

    Attributes:
        source: where the Fisher of the predicted distribution comes from, in words.
        moving: which real fields of the distribution depend on the parameters.
        takes_any_key: whether targets may be drawn with keys of any implementation.
    """

    source: str
    moving: tuple[bool, ...]
    takes_any_key: bool


def prediction(model: Model, params: chex.ArrayTree, data: tuple[Any, ...]) -> Prediction:
    """The prediction of a model, at the parameters and a batch of inputs."""
    known: list[tuple[str, bool]] = []

    def fields(params: chex.ArrayTree, *inputs: Any) -> list[Array]:
        predicted = predict(model, params, *inputs)
        predicted._check_fisher()
        # This is done inside the trace, since finding the source of another library's Fisher may need computation.
        known.append((predicted.fisher_source, predicted._takes_any_key))
        return float_fields(predicted)

    own = frozenset(range(len(jax.tree.leaves(params))))
    moving = tuple(not own.isdisjoint(places) for places in moved_by(fields, params, *shape_of_one(data)))
    if not moving:
        raise TypeError(
            "`model` returns a distribution without real parameters, which no Fisher is defined for; expected one that depends "
            "on the parameters of the model, such as jf.Categorical(logits=...)."
        )
    # If no field moves, the Fisher is zero, and rows of zeros represent it.
    source, takes_any_key = known[-1]
    return Prediction(source, moving if any(moving) else (True,) * len(moving), takes_any_key)


@dataclasses.dataclass(frozen=True)
class SampledRows(Around):
    """``num_samples`` rows: scores at targets drawn from the model, each divided by ``sqrt(num_samples)``.

    The first argument after the parameters is the example's own key.
    """

    function: Model
    num_samples: int
    name = "model"
    own = 1

    def known(self, numbers: tuple[Any, ...], /) -> SampledRows:
        return self

    def seeds(self, params: chex.ArrayTree, key: PRNGKeyArray, /, *inputs: Any) -> Array:
        return jax.random.split(key, self.num_samples)

    def row(self, params: chex.ArrayTree, seed: Any, key: Any, /, *inputs: Any) -> tuple[tuple[Array, ...], Any]:
        def log_prob(p: chex.ArrayTree) -> Scalar:
            predicted = predict(self.function, p, *inputs)
            target = jax.lax.stop_gradient(predicted.sample(seed))
            return jnp.sum(predicted.log_prob(target)) * self.num_samples**-0.5

        return (), jax.grad(log_prob)(params)


@dataclasses.dataclass(frozen=True)
class DrawnRow(SampledRows):
    """One sampled row, drawn with the example's own key itself instead of keys split from it."""

    num_samples: int = 1

    def seeds(self, params: chex.ArrayTree, key: PRNGKeyArray, /, *inputs: Any) -> Array:
        return key[None]
