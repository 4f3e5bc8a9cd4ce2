"""Adapters for distributions of distrax, NumPyro and TFP-on-JAX.

None of the three is imported here: the class of an object says which library it comes from, and its own methods do the work. An
object with an exact counterpart among our families becomes that family, and has our closed-form Fisher. Others are wrapped in
`Foreign`, whose Fisher comes from a sum over its outcomes, from its library's KL, or from samples; ``fisher_source`` says
which.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from jaxfisher._dataflow import moved_by
from jaxfisher._distributions.base import Distribution, of_a_key, of_a_target
from jaxfisher._distributions.excess import exp_excess
from jaxfisher._distributions.libraries import (
    LIBRARIES,
    Library,
    independent,
    kl_is_flat,
    library_of,
    translate,
    why_without_fisher,
)
from jaxfisher._distributions.outcomes import Outcomes, outcomes_of
from jaxfisher._distributions.root import Root, triangle
from jaxfisher._linalg import matmul, unit_root
from jaxfisher._pytree import array_fields
from jaxfisher._tree import at_least_float32

_NUM_SAMPLES = 1024
_SAMPLE_SEED = 20261123
_FROM_KL = "Hessian of the KL"
_FROM_SAMPLES = f"{_NUM_SAMPLES} samples"

_EXPECTED = (
    "A model returns a distribution over one target: one of jaxfisher's (jf.Categorical(logits=...), jf.Normal(loc, scale), "
    "...) or one of distrax, NumPyro or TFP-on-JAX."
)


def as_distribution(obj: Any) -> Distribution:
    """The distribution that a model returned, as one of ours.

    Ours come back as they are. One of distrax, NumPyro or TFP-on-JAX becomes the same family of ours if there is one, and is
    wrapped in `Foreign` if not. An ``Independent`` or NumPyro's ``expand`` around a family that we have becomes a batch of that
    family: here a batch is a product of independent distributions, and `log_prob` and `kl` keep its axes.

    Args:
        obj: the output of the model.

    Raises:
        TypeError: ``obj`` is no distribution over one target.

    >>> import jaxfisher as jf
    >>> as_distribution(jf.Normal(0.0, 1.0)).fisher_source
    'closed form'
    """
    if isinstance(obj, Distribution):
        return obj
    library = library_of(type(obj))
    if library is None:
        raise TypeError(f"Expected a distribution, got {_seen(obj)}. {_EXPECTED}")
    translated = translate(obj)
    if translated is not None:
        return translated
    # Our batch already means a product of independent distributions, so unwrap the `Independent`.
    _check_parts(obj, library)
    inside = independent(obj)
    return _wrap(obj, library) if inside is None else as_distribution(inside)


@dataclasses.dataclass(frozen=True)
class _Form:
    """The static part of a foreign object: enough to rebuild the object from its leaves."""

    library: str
    name: str
    treedef: Any
    is_float: tuple[bool, ...]
    outcomes: Outcomes | None


@array_fields("fields", "carried", eq=False, repr=False)
class Foreign(Distribution):
    r"""A distribution of another library that has no counterpart among ours. Made by `as_distribution`, not by hand.

    Its fields are the floating leaves of the foreign object's pytree, in its order. Other leaves (counts, masks) are
    carried along and have no tangent (``float0``, as everywhere in JAX). Density, draws, mean and KL are the library's own,
    with its batch axes. The Fisher is in the fields, summed over the batch:

    .. math:: F = \sum_{x} p(x)\, s(x) s(x)^T, \quad s = \nabla \log p, \quad\text{or}\quad
        F = \nabla^2_{q} \mathrm{KL}(p \,\|\, q)\big|_{q = p} \quad\text{or}\quad
        F \approx \tfrac1N \sum_{n} s(x_n) s(x_n)^T, \; x_n \sim p, \; N = 1024.

    The first is used if the outcomes are finitely many, at most 4096, and known when the model is traced
    (``fisher_source == "sum over 4 outcomes"``), as for NumPyro's ``OrderedLogistic``; the KL is then such a sum as well. A
    ``Binomial`` whose number of trials is data does not qualify.

    The second (``"Hessian of the KL"``) needs a KL rule that reads every field that the density reads. Some rules do not:
    distrax gives two transformed distributions the KL of their bases, whatever the parameters of their bijectors. If the rule
    is missing or does not read all fields, the third is used (``"1024 samples"``), with one fixed random key, the same for
    every example, and rank at most 1024. A diagonal entry has a relative standard error of ``sqrt((k - 1) / 1024)`` for a
    score of kurtosis k: 4 % for a normal score (k = 3), 9 % for an exponential one (k = 9), 15 % for k = 24. Of NumPyro's
    distributions of counts, as ``Geometric`` or ``ZeroInflatedPoisson``, only the outcomes beyond the first 4096, shared among
    the members of a batch, come from samples (``"sum over 4096 outcomes, 1024 samples beyond"``).

    The square root of the Hessian is computed from eigenvalues, after scaling the diagonal to one; eigenvalues below
    ``eps * size`` of the largest are rounding errors and set to zero. If the KL is not stationary at ``q = p``, its Hessian is
    no Fisher, and the result is NaN. This happens if the support moves with a parameter, as in ``Uniform``, or if an object
    caches a function of its parameters beside them. From samples it is NaN for the fields by which NumPyro's support moves.

    Parameters that are no leaves, such as those that a function inside the object has closed over, have no place in the
    fields: the log-density and its derivatives are right, and a Fisher in the fields is refused.

    An object that came out of ``jax.vmap`` has batched leaves without knowing it: use it under ``jax.vmap``.

    Reference: Martens, New insights and perspectives on the natural gradient method (JMLR 2020), section 5.
    """

    fields: tuple[Float[Array, "..."], ...]
    carried: tuple[Any, ...]
    form: _Form

    def __post_init__(self) -> None:
        """Nothing to check or broadcast: the other library has done so, and JAX unflattens through here."""

    @property
    def event_ndim(self) -> int:  # type: ignore[override]
        return len(self.event_shape)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self._object().batch_shape)

    @property
    def event_shape(self) -> tuple[int, ...]:
        return tuple(self._object().event_shape)

    def _own_shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self.event_shape,)

    @property
    def mean(self) -> Float[Array, "*batch_and_event"]:
        try:
            value = self._object().mean  # an attribute in NumPyro, a method elsewhere
            mean: Array = value() if callable(value) else value
        except NotImplementedError as error:
            raise NotImplementedError(
                f"{self._title} has no mean. Use a distribution that has one, or an average over draws."
            ) from error
        return mean

    @property
    def fisher_source(self) -> str:
        if self._all_outcomes is not None:
            return f"sum over {len(self._all_outcomes)} outcomes"
        if self._kl_gap(self) is None:
            return _FROM_KL
        first = self.form.outcomes
        return _FROM_SAMPLES if first is None else f"sum over {len(first)} outcomes, {_FROM_SAMPLES} beyond"

    @of_a_target
    def log_prob(self, x: Shaped[Array, "*batch_and_event"]) -> Float[Array, "*batch"]:
        value: Array = self._object().log_prob(x)
        return value

    @of_a_key
    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> Shaped[Array, "*shape_batch_event"]:
        draws: Array = self._library.sample(self._object(), key, shape)
        return draws

    def kl(self, other: Foreign) -> Float[Array, "*batch"]:
        """The KL as a sum over the outcomes if they are known, else by the other library's rule.

        Raises:
            NotImplementedError: the library has no rule for this pair, or one that does not read all fields of the density.
        """
        other = self._same_family(other)
        if self._all_outcomes is not None and self._all_outcomes == other._all_outcomes:
            return self._kl_by_outcomes(other)
        gap = self._kl_gap(other)
        if gap is not None:
            raise NotImplementedError(
                f"No KL from {self._title} to {other._title}: {gap} Estimate the divergence with jf.monte_carlo_kl."
            )
        value: Array = self._library.kl(self._object(), other._object())
        return value

    def fisher_noise(self) -> Float[Array, " columns"]:
        """Zeros, one for each column of the root: at most one a field from outcomes, one a field from a Hessian, or 1024."""
        return jnp.zeros(jax.eval_shape(self._root).shape[1], ravel_pytree(self.fields)[0].dtype)

    def fisher_sqrt_mv(self, u: Float[Array, " columns"]) -> Foreign:
        return self._tangent(matmul(self._root(), u))

    def fisher_root(self, moving: tuple[bool, ...]) -> tuple[Float[Array, " columns"], Root]:
        sizes = [field.size for field in self.fields]
        entries = np.flatnonzero(np.repeat(moving, sizes))
        flat, unravel = ravel_pytree(self.fields)
        root = triangle(self._root(entries))

        def fields(u: Array) -> list[Array]:
            return list(unravel(jnp.zeros_like(flat).at[entries].set(matmul(root, u))))

        return jnp.zeros(root.shape[1], root.dtype), fields

    def fisher_mv(self, v: Foreign) -> Foreign:
        root = self._root()
        return self._tangent(matmul(root, matmul(ravel_pytree(v.fields)[0], root)))

    def fisher_matrix(self) -> Float[Array, "fields fields"]:
        root = self._root()
        return matmul(root, root.T)

    @property
    def _all_outcomes(self) -> Outcomes | None:
        """The outcomes, if they are known and finitely many."""
        known = self.form.outcomes
        return None if known is None or known.beyond else known

    @property
    def _library(self) -> Library:
        return LIBRARIES[self.form.library]

    @property
    def _title(self) -> str:
        return f"{self.form.library}'s {self.form.name}"

    def _object(self, fields: tuple[Array, ...] | None = None) -> Any:
        """The foreign object, with these fields if they are given, else its own."""
        floats, others = iter(self.fields if fields is None else fields), iter(self.carried)
        leaves = [next(floats) if is_float else next(others) for is_float in self.form.is_float]
        return jax.tree.unflatten(self.form.treedef, leaves)

    def _tangent(self, flat: Float[Array, " fields"]) -> Foreign:
        _, unravel = ravel_pytree(self.fields)
        without = tuple(np.zeros(np.shape(leaf), jax.dtypes.float0) for leaf in self.carried)
        return Foreign(unravel(flat), without, self.form)

    def _kl_gap(self, other: Foreign) -> str | None:
        """Why the library's KL to ``other`` cannot be relied on; None if it can. This only traces."""
        p = self._object()
        for part in _parts(p):
            if kl_is_flat(part):
                return f"the rule of {self.form.library} for {type(part).__name__} has wrong derivatives at equal arguments."
        try:
            used = _reads(lambda fields: self._library.kl(p, other._object(fields)), other.fields)
        except NotImplementedError:
            return f"{self.form.library} has no rule for it."
        draw = jax.eval_shape(other.sample, jax.random.key(0))
        needed = _reads(lambda fields, x: other._object(fields).log_prob(x), other.fields, draw)
        if needed <= used:
            return None
        return f"the rule of {self.form.library} does not read {len(needed - used)} of the fields that its density reads."

    def _root(self, entries: Any = slice(None)) -> Float[Array, "fields columns"]:
        """The root, of these entries of the fields alone."""
        source, outcomes = self.fisher_source, self.form.outcomes
        if source == _FROM_KL:
            return self._root_of_kl(entries)
        return (self._root_of_scores() if outcomes is None else self._root_of_outcomes(outcomes))[entries]

    def _check_fisher(self) -> None:
        """Raise if this has no Fisher, or if its density reads parameters that are no fields, which a Fisher would miss."""
        reason = why_without_fisher(self._object())
        if reason:
            raise NotImplementedError(f"{self._title} has no Fisher: {reason}")
        draw = jax.eval_shape(self.sample, jax.random.key(0))
        density = jax.make_jaxpr(lambda fields, others, x: Foreign(fields, others, self.form).log_prob(x))
        read = density(self.fields, self.carried, draw).consts
        if any(isinstance(value, jax.core.Tracer) for value in read):
            raise TypeError(
                f"{self._title}: its log-density reads parameters that are no leaves of it as a pytree, such as numbers that a "
                "function inside it has closed over, and its Fisher would miss them. Use a distribution that stores its "
                "parameters, or jf.sampled_fisher, which differentiates the log-density."
            )

    def _values(self, outcomes: Outcomes) -> Shaped[Array, "outcomes *batch_and_event"]:
        """Every outcome, for all members of the batch."""
        draw = jax.eval_shape(self.sample, jax.random.key(0))
        values = jnp.asarray(outcomes.values, draw.dtype)
        whole = values.reshape(len(outcomes), *(1,) * len(self.batch_shape), *self.event_shape)
        return jnp.broadcast_to(whole, (len(outcomes), *draw.shape))

    def _root_of_outcomes(self, outcomes: Outcomes) -> Float[Array, "fields columns"]:
        """``sqrt(p(x)) s(x)`` of every outcome, and of draws beyond them: a triangle with the same square."""
        flat, unravel = ravel_pytree(self.fields)
        wide = at_least_float32(flat.dtype)

        def log_prob(flat: Array, x: Array) -> Array:
            return self._object(unravel(flat)).log_prob(x).astype(wide)

        def rows(values: Array, shares: Array) -> Array:
            # The score of an outcome of probability zero may be anything, NaN included.
            scores = jax.vmap(jax.jacrev(log_prob), (None, 0))(flat, values).astype(wide)
            return jnp.where(shares[..., None] > 0, shares[..., None] * scores, 0).reshape(-1, flat.size)

        values = self._values(outcomes)
        found = rows(values, jnp.exp(0.5 * jax.vmap(log_prob, (None, 0))(flat, values)))
        if outcomes.beyond:
            draws = self._draws()
            above = jnp.where(draws > outcomes.values[-1], _NUM_SAMPLES**-0.5, 0).astype(wide)
            found = jnp.concatenate([found, rows(draws, above)])
        return triangle(found.T).astype(flat.dtype)

    def _draws(self) -> Shaped[Array, "samples *batch_and_event"]:
        return jax.lax.stop_gradient(self.sample(jax.random.key(_SAMPLE_SEED), (_NUM_SAMPLES,)))

    def _kl_by_outcomes(self, other: Foreign) -> Float[Array, "*batch"]:
        """``sum q - p - p log(q/p)``: no term is negative, so nothing cancels near equality."""
        assert self.form.outcomes is not None
        values = self._values(self.form.outcomes)
        mine, theirs = (jax.vmap(p.log_prob)(values) for p in (self, other))
        happens = mine > -jnp.inf
        log_p = jnp.where(happens, mine, 0)
        gap = jnp.where(happens, theirs - log_p, 0)
        near = gap <= 1
        p, q = jnp.exp(log_p), jnp.exp(theirs)
        terms = jnp.where(near, p * exp_excess(jnp.where(near, gap, 0)), q - p * (1 + gap))
        return jnp.sum(jnp.where(happens, terms, q), axis=0)

    def _root_of_kl(self, entries: Any) -> Float[Array, "fields fields"]:
        flat, unravel = ravel_pytree(self.fields)
        p = self._object()

        def divergence(q: Array) -> Array:
            return jnp.sum(self._library.kl(p, self._object(unravel(flat.at[entries].set(q)))))

        # A field that stands still may be one by which the support would move.
        here = flat[entries]
        slope, hessian = jax.grad(divergence)(here), jax.hessian(divergence)(here)
        return jnp.where(_is_stationary(here, slope, hessian), unit_root(hessian, 0.0), jnp.nan)

    def _root_of_scores(self) -> Float[Array, "fields samples"]:
        flat, unravel = ravel_pytree(self.fields)

        def score(x: Array) -> Array:
            return jax.grad(lambda fields: jnp.sum(self._object(unravel(fields)).log_prob(x)))(flat)

        edges = _reads(lambda fields: jax.tree.leaves(getattr(self._object(fields), "support", None)), self.fields)
        moving = np.repeat([place in edges for place in range(len(self.fields))], [field.size for field in self.fields])
        return jnp.where(moving[:, None], jnp.nan, jax.vmap(score)(self._draws()).T / _NUM_SAMPLES**0.5)

    def __repr__(self) -> str:
        inside = ", ".join(f"{field.dtype}[{','.join(map(str, field.shape))}]" for field in self.fields)
        return f"Foreign({self._title}: {inside})"


def _wrap(obj: Any, library: str) -> Foreign:
    name = type(obj).__name__
    for shape in (obj.batch_shape, obj.event_shape):
        # A joint distribution has a tree of shapes here.
        if not isinstance(shape, dict) and all(isinstance(size, int) for size in shape):
            continue
        raise TypeError(f"{library}'s {name} is over several targets: its batch or event shape is {shape}. {_EXPECTED}")
    leaves, treedef = jax.tree.flatten(obj)
    for leaf in leaves:
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float):
            raise TypeError(
                f"{library}'s {name} cannot be used: as a pytree it has a leaf of type {type(leaf).__name__}, and needs "
                f"arrays only (a class of your own must be registered as a pytree). {_EXPECTED}"
            )
        if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
            raise TypeError(f"{library}'s {name} has a complex parameter ({jnp.result_type(leaf)}); parameters are real.")
    is_float = tuple(bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating)) for leaf in leaves)
    fields = tuple(jnp.asarray(leaf) for leaf, yes in zip(leaves, is_float, strict=True) if yes)
    carried = tuple(jnp.asarray(leaf) for leaf, yes in zip(leaves, is_float, strict=True) if not yes)
    return Foreign(fields, carried, _Form(library, name, treedef, is_float, outcomes_of(obj, library)))


def _check_parts(obj: Any, library: str) -> None:
    """Raise `TypeError` if a distribution inside another has lost its parameters."""
    for part in reversed([*_parts(obj)]):  # inner ones first: they are the cause
        # distrax does this to distributions from TFP, and their derivatives would silently be zero.
        if not jax.tree.leaves(part):
            raise TypeError(
                f"{library}'s {type(obj).__name__} cannot be used: {type(part).__name__} in it has no leaves as a pytree, so "
                f"its parameters cannot be differentiated. Build it from the distributions of one library. {_EXPECTED}"
            )


def _parts(obj: Any) -> Iterator[Any]:
    """A distribution and the distributions inside it."""
    yield obj
    for value in vars(obj).values():
        if library_of(type(value)) is not None:
            yield from _parts(value)


def _reads(function: Callable[..., Any], fields: tuple[Array, ...], *rest: Any) -> frozenset[int]:
    """The places of the fields on which the result depends."""
    return frozenset().union(*moved_by(function, fields, *rest)) & frozenset(range(len(fields)))


def _is_stationary(flat: Array, slope: Array, hessian: Array) -> Array:
    """Whether the slope of the KL is zero up to rounding.

    The slope is minus a mean score, which is at most the root of the Fisher's diagonal, so it is compared with that root. The
    floor is for a Fisher that is itself zero up to rounding, as at a saturated softmax: there the slope is the rounding error
    of terms of order one per relative change of the field.
    """
    eps = float(jnp.finfo(flat.dtype).eps)
    allowed = jnp.sqrt(eps * jnp.abs(jnp.diagonal(hessian)))
    floor = 1e3 * eps / (1 + jnp.abs(flat))
    # `~any(a > b)`, so that a NaN does not count as a slope; it passes on into the root.
    return ~jnp.any(jnp.abs(slope) > jnp.maximum(allowed, floor))


def _seen(obj: Any) -> str:
    if isinstance(obj, type):
        return f"the class {obj.__name__} itself, not an object of it"
    if isinstance(obj, jax.Array | np.ndarray):
        return f"an array of shape {obj.shape} and dtype {obj.dtype}"
    if isinstance(obj, tuple | list):
        return f"a {type(obj).__name__} of ({', '.join(_seen(item) for item in obj[:3])}{', ...' if len(obj) > 3 else ''})"
    if obj is None:
        return "None (a missing `return`?)"
    return f"an object of type {type(obj).__module__}.{type(obj).__qualname__}"
