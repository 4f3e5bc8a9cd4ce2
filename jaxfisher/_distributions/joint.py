"""Several independent distributions as one, for models with several heads, each with its own likelihood."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxfisher._distributions.base import Distribution, float_fields, of_a_key
from jaxfisher._distributions.foreign import as_distribution
from jaxfisher._distributions.libraries import library_of
from jaxfisher._distributions.root import Root
from jaxfisher._pytree import array_fields
from jaxfisher._values import described


@array_fields("parts", repr=False, eq=False)
class Joint(Distribution):
    r"""Independent distributions of several targets in one container, for models with several heads.

    .. math:: \log p(x) = \sum_k \log p_k(x_k), \qquad KL(p \,\|\, q) = \sum_k KL(p_k \,\|\, q_k), \qquad
        F = \mathrm{diag}(F_1, F_2, \dots).

    The target is the same container with a target in the place of each distribution: for ``{"label": p, "box": q}`` it is
    ``{"label": y, "box": z}``. Draws, means, variances and modes are such containers, and the square root of the Fisher has the
    columns of the parts side by side. A model may return the container itself, which stands for its `Joint`. The batch axes are
    the leading axes that all parts share; the other axes of a part belong to one target, and are summed over.

    Args:
        parts: a dict, tuple, list or other pytree of distributions, of this library or of another one.

    Raises:
        TypeError: a leaf of ``parts`` is no distribution.
        ValueError: ``parts`` has no leaves; (when called) a target, or another `Joint`, in a container of another structure.

    Reference: Martens, New insights and perspectives on the natural gradient method (JMLR 2020), section 9: the Fisher of a
    product of independent distributions is block-diagonal.

    >>> import jaxfisher as jf
    >>> p = jf.Joint({"label": jf.Bernoulli(logits=0.0), "size": jf.Normal(0.0, 1.0)})
    >>> print(p.log_prob({"label": 1, "size": 0.0}).round(4), p.mean["size"])
    -1.6121 0.0
    """

    parts: Any

    field_ndims = ()
    event_ndim = 0

    def __post_init__(self) -> None:
        found, outer = jax.tree_util.tree_flatten_with_path(self.parts, is_leaf=_is_distribution)
        if not found:
            raise ValueError(f"Joint: `parts` is {self.parts!r}, without a distribution; expected at least one.")
        made = []
        for path, part in found:
            if not _is_distribution(part):
                raise TypeError(
                    f"Joint: the part at {jax.tree_util.keystr(path)} is {described(part)}; expected a distribution. If it is "
                    "an auxiliary output, return (distribution, aux), and give jf.training_step has_aux=True and no loss of "
                    "your own. Everything else, and a step with a loss of your own, takes the distribution alone, "
                    "lambda params, x: model(params, x)[0]."
                )
            made.append(as_distribution(part))
        object.__setattr__(self, "parts", jax.tree.unflatten(outer, made))

    @property
    def _outer(self) -> Any:
        """The structure of the container, its distributions as leaves."""
        return jax.tree.structure(self.parts, is_leaf=_is_distribution)

    @property
    def _each(self) -> list[Distribution]:
        return jax.tree.leaves(self.parts, is_leaf=_is_distribution)

    def _mapped(self, function: Callable[[Distribution], Any]) -> Any:
        """The container with a function applied to each part."""
        return jax.tree.map(function, self.parts, is_leaf=_is_distribution)

    def _entries(self, container: Any, what: str) -> list[Any]:
        """The entries of a container in the places of the parts, or a `ValueError` that says where it differs."""
        try:
            entries: list[Any] = self._outer.flatten_up_to(container)
        except ValueError as error:
            raise ValueError(f"{what} {self._difference(container)}. Use the same container as the distributions.") from error
        return entries

    def _difference(self, container: Any) -> str:
        """The first place in which a container differs from that of the parts, in words."""
        expected, _ = jax.tree_util.tree_flatten_with_path(self.parts, is_leaf=_is_distribution)
        seen = [path for path, _ in jax.tree_util.tree_flatten_with_path(container)[0]]
        for path, _ in expected:
            if not any(other[: len(path)] == path for other in seen):
                return f"is {_kind(container)}, and has nothing at {jax.tree_util.keystr(path)}, where there is a distribution"
        for other in seen:
            if not any(other[: len(path)] == path for path, _ in expected):
                return f"is {_kind(container)}, and has {jax.tree_util.keystr(other)}, where there is no distribution"
        return f"is {_kind(container)}; expected {_kind(self.parts)}"

    @property
    def batch_shape(self) -> tuple[int, ...]:
        shapes = [part.batch_shape for part in self._each]
        shared = 0
        for sizes in zip(*shapes, strict=False):
            if len(set(sizes)) > 1:
                break
            shared += 1
        return shapes[0][:shared]

    @property
    def event_shape(self) -> Any:
        """The shape of one draw from each part, in the container."""
        shared = len(self.batch_shape)
        return self._mapped(lambda part: part.batch_shape[shared:] + part.event_shape)

    @property
    def fisher_source(self) -> str:
        return " and ".join(dict.fromkeys(part.fisher_source for part in self._each))

    @property
    def mean(self) -> Any:
        """The means of the parts, in the container."""
        return self._mapped(lambda part: part.mean)

    @property
    def variance(self) -> Any:
        """The variances of the parts, in the container."""
        return self._mapped(lambda part: part.variance)

    @property
    def mode(self) -> Any:
        """The modes of the parts, in the container."""
        return self._mapped(lambda part: part.mode)

    def _total(self, values: Iterator[Array]) -> Float[Array, "*batch"]:
        """The sum of the parts' values, also over batch axes that the parts do not share."""
        shared = len(self.batch_shape)
        own = [len(part.batch_shape) - shared for part in self._each]
        sums = [jnp.sum(value, axis=tuple(range(-axes, 0))) for value, axes in zip(values, own, strict=True)]
        return sum(sums[1:], start=sums[0])

    def entropy(self) -> Float[Array, "*batch"]:
        """The sum of the parts' entropies."""
        return self._total(part.entropy() for part in self._each)

    def log_prob(self, x: Any) -> Float[Array, "*batch"]:
        entries = self._entries(x, "Joint.log_prob: `x`")
        return self._total(part.log_prob(entry) for part, entry in zip(self._each, entries, strict=True))

    @property
    def _takes_any_key(self) -> bool:
        return all(part._takes_any_key for part in self._each)

    @of_a_key
    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> Any:
        """Independent draws from each part, ``[*shape, *batch, *event]``, in the container."""
        parts = self._each
        keys = jax.random.split(key, len(parts))
        return jax.tree.unflatten(self._outer, [part.sample(k, shape) for part, k in zip(parts, keys, strict=True)])

    def kl(self, other: Joint) -> Float[Array, "*batch"]:
        """The sum of the parts' divergences."""
        other = self._same_family(other)
        return self._total(p.kl(q) for p, q in zip(self._each, other._each, strict=True))

    def fisher_noise(self) -> tuple[Any, ...]:
        """The noises of the parts."""
        return tuple(part.fisher_noise() for part in self._each)

    def fisher_sqrt_mv(self, u: tuple[Any, ...]) -> Joint:
        return self._tangent([part.fisher_sqrt_mv(noise) for part, noise in zip(self._each, u, strict=True)])

    def fisher_root(self, moving: tuple[bool, ...]) -> tuple[Any, Root]:
        flags, noises, roots = iter(moving), [], []
        for part in self._each:
            fields = float_fields(part)
            noise, root = _root_of(part, tuple(next(flags) for _ in fields))
            noises.append(noise)
            roots.append(root)
        return noises, lambda u: [field for root, own in zip(roots, u, strict=True) for field in root(own)]

    def fisher_mv(self, v: Joint) -> Joint:
        tangents = self._outer.flatten_up_to(v.parts)
        return self._tangent([part.fisher_mv(tangent) for part, tangent in zip(self._each, tangents, strict=True)])

    def fisher_matrix(self) -> Float[Array, "fields fields"]:
        return jax.scipy.linalg.block_diag(*(part.fisher_matrix() for part in self._each))

    def _tangent(self, tangents: list[Any]) -> Joint:
        """A pytree like this one, with tangents in the places of the parts."""
        made: Joint = object.__new__(Joint)
        object.__setattr__(made, "parts", jax.tree.unflatten(self._outer, tangents))
        return made

    def _check_fisher(self) -> None:
        for part in self._each:
            part._check_fisher()

    def _check_target(self, target: Any, name: str) -> None:
        entries = self._entries(target, name)
        paths, _ = jax.tree_util.tree_flatten_with_path(self.parts, is_leaf=_is_distribution)
        for (path, part), entry in zip(paths, entries, strict=True):
            part._check_target(entry, f"{name} at {jax.tree_util.keystr(path)}")

    def _same_family(self, other: Any) -> Joint:
        if not isinstance(other, Joint):
            raise TypeError(f"Joint.kl: expected another Joint, got {type(other).__name__}.")
        other._entries(self.parts, "Joint.kl: this one")
        for part, theirs in zip(self._each, self._entries(other.parts, "Joint.kl: `other`"), strict=True):
            part._same_family(theirs)
        return other

    def _own_shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(shape for part in self._each for shape in part._own_shapes())

    def __repr__(self) -> str:
        return f"Joint({self.parts!r})"


def as_prediction(obj: Any) -> Distribution:
    """The distribution that a model returned, as one of the library's; a container of distributions becomes their `Joint`."""
    leaves = jax.tree.leaves(obj, is_leaf=_is_distribution)
    if not _is_distribution(obj) and any(map(_is_distribution, leaves)):
        return Joint(obj)
    return as_distribution(obj)


def _is_distribution(obj: Any) -> bool:
    return isinstance(obj, Distribution) or library_of(type(obj)) is not None


def _root_of(part: Distribution, moving: tuple[bool, ...]) -> tuple[Any, Root]:
    """The root of one part; without columns if none of its fields move."""
    if any(moving):
        return part.fisher_root(moving)
    return (), lambda _: [jnp.zeros_like(field) for field in float_fields(part)]


def _kind(container: Any) -> str:
    """A container as a message shows it."""
    if isinstance(container, dict):
        return f"a dict with the keys {list(container)}"
    if isinstance(container, (tuple, list)):
        return f"a {type(container).__name__} of length {len(container)}"
    return f"one array of shape {container.shape}" if hasattr(container, "shape") else described(container)
