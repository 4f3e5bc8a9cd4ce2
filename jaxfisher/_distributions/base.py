"""The base of all distributions of the library: a frozen pytree of arrays with a density, a sampler, a KL and a Fisher.

Conventions of this folder. A distribution has *fields* (its parameters), all real floating arrays of one dtype. Each field has
shape ``[*batch, *event of the field]``; fields are broadcast to one batch shape when the distribution is made. A batch
is a product of independent distributions: ``log_prob``, ``kl`` and ``mean`` keep the batch axes, and callers that need the
joint law of the product sum over them. Logarithms are natural, divergences in nats.

The Fisher information of a distribution in its own fields is stated once, as a square root ``B`` with ``F = B B^T``. This makes
it positive semi-definite by construction, and gives the scores: column ``j`` of ``B`` pulled back through the model is row
``j`` of the exact Fisher's score matrix. Products and the dense matrix follow from it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from jaxfisher._absent import OF_DISTRIBUTION, absent
from jaxfisher._distributions.root import Root, narrowed
from jaxfisher._linalg import matmul
from jaxfisher._once import once
from jaxfisher._tree import as_key
from jaxfisher._values import check_array, checked_shape, described, is_array, is_known

S = TypeVar("S", bound=Callable[..., Any])


@dataclass_transform(frozen_default=True)
def family(cls: type) -> type:
    """Make a subclass of `Distribution` a frozen dataclass and a pytree whose leaves are its fields.

    The constructor turns the fields into arrays of one floating dtype and one batch shape, and checks them. Unflattening does
    neither, since JAX puts tracers, ``None`` and batched arrays into pytrees.

    Args:
        cls: a class with annotated fields, ``field_ndims``, ``event_ndim``, ``log_prob``, ``sample``, ``kl``, ``mean``,
            ``variance``, ``mode`` and ``fisher_sqrt_mv``, the root ``B`` of the Fisher ``F = B B^T`` in the fields.

    Returns:
        The class, frozen and registered. Outside ``jit`` each of its methods is one compiled program.

    Reference: Martens (JMLR 2020), section 9.2, for the Fisher in the fields of an output.

    >>> import jax, jax.numpy as jnp, jaxfisher as jf
    >>> @jf.family
    ... class UnitNormal(jf.Distribution):
    ...     loc: jax.Array
    ...     field_ndims, event_ndim = (0,), 0
    ...     def fisher_sqrt_mv(self, u):
    ...         return u
    >>> print(UnitNormal(jnp.zeros(2)).fisher_matrix())
    [[1. 0.]
     [0. 1.]]
    """
    cls = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    _compile_once(cls)
    names = tuple(field.name for field in dataclasses.fields(cls))
    keys = tuple(jax.tree_util.GetAttrKey(name) for name in names)

    def flatten_with_keys(self: Any) -> tuple[tuple[Any, ...], None]:
        return tuple((key, getattr(self, name)) for key, name in zip(keys, names, strict=True)), None

    def flatten(self: Any) -> tuple[tuple[Any, ...], None]:
        return tuple(getattr(self, name) for name in names), None

    def unflatten(_: None, children: Any) -> Any:
        self: Any = object.__new__(cls)
        for name, child in zip(names, children, strict=True):
            object.__setattr__(self, name, child)
        return self

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


_PROGRAMS = (
    *("log_prob", "kl", "entropy", "mean", "variance", "covariance", "mode"),
    *("fisher_sqrt_mv", "fisher_mv", "fisher_matrix"),
)
"""The methods of a distribution that compute. Each is one program outside ``jit`` too, so that `jax_debug_infs` looks only at
the result, and not at infinite intermediate numbers."""


def _compile_once(cls: type) -> None:
    for name in _PROGRAMS:
        member = vars(cls).get(name)
        if isinstance(member, property):
            assert member.fget is not None
            setattr(cls, name, property(once(member.fget)))
        elif member is not None:
            setattr(cls, name, of_a_target(once(member)) if name == "log_prob" else once(member))
    if "sample" in vars(cls):
        setattr(cls, "sample", of_a_key(vars(cls)["sample"]))  # noqa: B010


def of_a_target(log_prob: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A density that checks its argument first, so that the error names it."""

    @functools.wraps(log_prob)
    def call(self: Any, x: Any) -> Any:
        check_array(f"{type(self).__name__}.log_prob: `x`", x)
        return log_prob(self, x)

    return call


def of_a_key(sample: Callable[..., Any]) -> Callable[..., Any]:
    """A sampler that checks its arguments first, so that the error names them."""

    @functools.wraps(sample)
    def call(self: Any, key: Any, shape: Any = ()) -> Any:
        caller = f"{type(self).__name__}.sample"
        return sample(self, as_key(key, caller), checked_shape(caller, shape))

    return call


def of_plain_bits(sample: S) -> S:
    """Mark a sampler that only draws uniform bits, and therefore works with keys of any implementation."""
    sample.of_plain_bits = True  # type: ignore[attr-defined]
    return sample


class Distribution:
    """A distribution over one target, or a batch of independent ones.

    Subclasses are made with `family` and define the fields, ``field_ndims``, ``event_ndim``, `log_prob`, `sample`, `kl`, `mean`
    and `fisher_sqrt_mv`.
    """

    field_ndims: ClassVar[tuple[int, ...]]
    """The number of event axes of each field, in the order of the fields: ``(1, 2)`` for a mean vector and a matrix."""
    event_ndim: ClassVar[int]
    """The number of axes of one draw: 0 for scalars, 1 for vectors."""
    positive: ClassVar[tuple[str, ...]] = ()
    """The fields whose entries must be above zero; for a matrix, the entries on its diagonal."""

    def __post_init__(self) -> None:
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        values = [self._field(name) for name in names]
        dtype = jnp.result_type(*values)
        batches, events = [], []
        for name, value, ndim in zip(names, values, self.field_ndims, strict=True):
            if value.ndim < ndim:
                raise ValueError(
                    f"{type(self).__name__}: `{name}` has shape {value.shape}, but needs at least {ndim} axes "
                    f"(batch axes first, then {ndim} of its own)."
                )
            split = value.ndim - ndim
            batches.append(value.shape[:split])
            events.append(value.shape[split:])
        try:
            batch = jnp.broadcast_shapes(*batches)
        except ValueError as error:
            seen = ", ".join(f"{name} {value.shape}" for name, value in zip(names, values, strict=True))
            raise ValueError(
                f"{type(self).__name__}: the batch shapes of its fields do not broadcast together: {seen}. "
                "Give fields of equal shape, or scalars."
            ) from error
        for name, value, event in zip(names, values, events, strict=True):
            object.__setattr__(self, name, jnp.broadcast_to(value.astype(dtype), batch + event))
        self._check_fields()

    def _field(self, name: str) -> Array:
        """A field as an array. A number that must be positive and is not raises if it is known, and turns to NaN if not."""
        given = getattr(self, name)
        value = _as_field(type(self).__name__, name, given)
        if name not in self.positive:
            return value
        which = np.broadcast_to(_must_be_positive(value.shape, self._ndim_of(name)), value.shape)
        # The value of a JAX array counts as unknown, since looking at it would wait for the device.
        if not is_known(given):
            return jnp.where(which & (value < 0), jnp.nan, value)
        entries = np.asarray(given, float)[which]
        if np.any(entries <= 0):
            raise ValueError(
                f"{type(self).__name__}: `{name}` holds {entries[np.argmax(entries <= 0)]}; expected numbers above zero"
                f"{' on the diagonal' if self._ndim_of(name) == 2 else ''}. For unbounded numbers, pass their jnp.exp or "
                "jax.nn.softplus."
            )
        return value

    def _ndim_of(self, name: str) -> int:
        """The number of event axes of a field."""
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return self.field_ndims[names.index(name)]

    def _check_fields(self) -> None:
        """Raise `ValueError` for field shapes that the family cannot have. The fields are arrays of one batch shape by then."""

    if not TYPE_CHECKING:  # to a type checker every name would be there
        __getattr__ = absent("a distribution", OF_DISTRIBUTION)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The shape of the batch of independent distributions; ``()`` for one."""
        first: Array = getattr(self, dataclasses.fields(self)[0].name)  # type: ignore[arg-type]
        return first.shape[: first.ndim - self.field_ndims[0]]

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one draw from one distribution of the batch."""
        return self.mean.shape[len(self.batch_shape) :]

    @property
    def _takes_any_key(self) -> bool:
        """Whether `sample` takes keys of any implementation; `jax.random.poisson`, for example, takes only threefry keys."""
        return getattr(type(self).sample, "of_plain_bits", False)

    @property
    def mean(self) -> Float[Array, "*batch_and_event"]:
        """The expectation of a draw, shape ``[*batch, *event]``."""
        raise NotImplementedError

    @property
    def variance(self) -> Float[Array, "*batch_and_event"]:
        """The variance of a draw, shape ``[*batch, *event]``; for a vector, the variance of each entry."""
        raise NotImplementedError

    @property
    def mode(self) -> Shaped[Array, "*batch_and_event"]:
        """The point of largest density or probability, shape ``[*batch, *event]``; NaN if there is no such point."""
        raise NotImplementedError

    def entropy(self) -> Float[Array, "*batch"]:
        """``-E[log p]`` in nats, one for each distribution of the batch.

        Raises:
            NotImplementedError: the family has no closed form, as for `jaxfisher.Poisson` and `jaxfisher.NegativeBinomial`.
        """
        name = type(self).__name__
        raise NotImplementedError(
            f"{name}.entropy: the entropy of this family has no closed form. Estimate it from draws: "
            "-jnp.mean(p.log_prob(p.sample(key, (n,))), axis=0)."
        )

    @property
    def fisher_source(self) -> str:
        """The source of the Fisher: ``"closed form"`` in every family of the library."""
        return "closed form"

    def log_prob(self, x: Shaped[Array, "*batch_and_event"]) -> Float[Array, "*batch"]:
        """The natural logarithm of the density (or probability) at ``x``, one for each distribution of the batch."""
        raise NotImplementedError

    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> Shaped[Array, "*shape_batch_event"]:
        """Independent draws, shape ``[*shape, *batch, *event]``.

        Raises:
            TypeError: a ``key`` that is no random key, a ``shape`` that is no tuple of whole numbers.
        """
        raise NotImplementedError

    def kl(self, other: Self) -> Float[Array, "*batch"]:
        """``KL(self || other) = E_self[log self - log other]`` in nats, one for each distribution of the batch."""
        raise NotImplementedError

    def fisher_noise(self) -> Any:
        """Zeros of the space that `fisher_sqrt_mv` acts on: a pytree, here one like the distribution itself."""
        return jax.tree.map(jnp.zeros_like, self)

    def fisher_sqrt_mv(self, u: Any) -> Self:
        """``B u``, linear in ``u``, where ``B B^T`` is the Fisher information in the fields.

        ``u`` is like `fisher_noise`; the result is a pytree like the distribution, each field holding the derivative with
        respect to that field.
        """
        raise NotImplementedError

    def fisher_root(self, moving: tuple[bool, ...]) -> tuple[Any, Root]:
        """The root ``B`` if only some fields depend on parameters: zeros for ``u``, with few columns, and ``u -> B u``.

        ``moving`` has a flag for each field. The root returns a list of all fields; values of fields that do not move are
        arbitrary.
        """
        # The noise has a part for each field, unless the family has a noise of its own.
        own = type(self).fisher_noise is Distribution.fisher_noise
        numbers = tuple(own and ndim == 0 for ndim in self.field_ndims)
        return narrowed(self.fisher_sqrt_mv, self.fisher_noise(), moving, numbers)

    @once
    def fisher_mv(self, v: Self) -> Self:
        """``F v = B (B^T v)`` for a tangent ``v`` in the fields (a pytree like the distribution)."""
        (u,) = jax.linear_transpose(self.fisher_sqrt_mv, self.fisher_noise())(v)
        # Without the barrier XLA merges the divisions by a scale in `B^T` and in `B` into one by its square, which underflows.
        return self.fisher_sqrt_mv(jax.lax.optimization_barrier(u))

    @once
    def fisher_matrix(self) -> Float[Array, "fields fields"]:
        """The Fisher information over the fields flattened in `jax.flatten_util.ravel_pytree` order.

        It is summed over the batch of independent distributions: block-diagonal in batch elements up to the ordering.
        """
        noise, unravel = ravel_pytree(self.fisher_noise())
        columns = jax.vmap(lambda u: ravel_pytree(self.fisher_sqrt_mv(unravel(u)))[0])(jnp.eye(noise.size, dtype=noise.dtype))
        return matmul(columns.T, columns)

    def _check_fisher(self) -> None:
        """Raise if the Fisher in the fields would not be that of the distribution."""

    def _check_target(self, target: Any, name: str) -> None:
        """Raise `ValueError` unless a target has the shape of a draw; ``name`` is the name of the target in messages."""
        expected = self.batch_shape + self.event_shape
        if not is_array(target):
            raise TypeError(f"{name} is {described(target)}; expected an array of shape {expected}, for {self}.")
        if jnp.shape(target) != expected:
            raise ValueError(
                f"{name} has shape {jnp.shape(target)}, but the model's {type(self).__name__} is over {expected}. "
                "They are not broadcast against each other, since that would count a target several times: "
                "reshape the target or the model's output (a final axis of length one is the usual culprit)."
            )

    def _same_family(self, other: Any) -> Self:
        """``other``, if `kl` to it is defined here; else raise."""
        if type(other) is not type(self):
            raise TypeError(
                f"{type(self).__name__}.kl: expected another {type(self).__name__}, got {type(other).__name__}. "
                "For two families, estimate the divergence with jf.monte_carlo_kl."
            )
        if self._own_shapes() != other._own_shapes():
            raise ValueError(
                f"{type(self).__name__}.kl: the two are over different spaces: {self} and {other}. "
                "Give both the same number of classes or dimensions."
            )
        return other

    def _own_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the fields without their batch axes."""
        shapes = [getattr(self, field.name).shape for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return tuple(shape[len(shape) - ndim :] for shape, ndim in zip(shapes, self.field_ndims, strict=True))

    def _make(self, *fields: Array) -> Self:
        """A pytree like the distribution with the given values as fields, unchecked, such as tangents."""
        made: Self = jax.tree.unflatten(jax.tree.structure(self), fields)
        return made

    def __repr__(self) -> str:
        inside = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            inside.append(f"{field.name}={_describe(value)}")
        return f"{type(self).__name__}({', '.join(inside)})"


def float_fields(distribution: Distribution) -> list[Array]:
    """The real fields of a distribution, in pytree order: the coordinates of its Fisher."""
    return [leaf for leaf in jax.tree.leaves(distribution) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def one_of(owner: str, given: dict[str, Any], convert: Callable[[Array], Array]) -> Any:
    """A field that may be given in two ways: directly, or by a second argument that is converted. Exactly one must be given."""
    (name, value), (other, instead) = given.items()
    if (value is None) == (instead is None):
        seen = "neither" if value is None else "both"
        raise TypeError(f"{owner}: got {seen} of `{name}` and `{other}`; give one of the two.")
    return value if instead is None else convert(_as_field(owner, other, instead))


def _must_be_positive(shape: tuple[int, ...], ndim: int) -> np.ndarray:
    """Which entries of a positive field must be above zero: all, or for a matrix those on its diagonal."""
    return np.eye(*shape[-2:], dtype=bool) if ndim == 2 and len(shape) > 1 else np.ones((), bool)


def _as_field(owner: str, name: str, value: Any) -> Array:
    if not isinstance(value, (jax.Array, int, float, complex)) and not hasattr(value, "__array__"):
        raise TypeError(f"{owner}: `{name}` is {described(value)}; expected a number or an array of them.")
    check_array(f"{owner}: `{name}`", value)
    # A Python integer is a literal like 0.0, and takes the dtype of the other fields.
    array = jnp.asarray(float(value) if isinstance(value, int) else value)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"{owner}: `{name}` is complex ({array.dtype}); its parameters are real.")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(jnp.result_type(float))
    return array


def _describe(value: Any) -> str:
    if isinstance(value, jax.Array):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return repr(value)
