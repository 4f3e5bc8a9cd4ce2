"""Least squares on residuals of several kinds, each with its own points: loss, Gauss-Newton matrix and acceleration."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Scalar

from jaxfisher._acceleration import acceleration
from jaxfisher._distributions.normal import Normal
from jaxfisher._divergence import kl
from jaxfisher._examples import Batch, as_arrays, checked_weights, make_batch, num_examples
from jaxfisher._fisher import exact_fisher
from jaxfisher._linalg import power_of_two
from jaxfisher._model import mean_loss, of_one_example
from jaxfisher._once import once_for
from jaxfisher._operators.operator import Operator
from jaxfisher._readings import Around
from jaxfisher._tree import check_function, described, param_spec
from jaxfisher._values import nonnegative

RESIDUAL = "(params, *point) -> the residual at ONE point, a real floating array"
"""The signature of a residual, as messages show it."""

Residual = Callable[..., Array]


@dataclasses.dataclass(frozen=True)
class _Value(Around):
    """A residual function with a check of its value."""

    residual: Residual

    def __call__(self, params: chex.ArrayTree, /, *point: Any) -> Array:
        value = self.residual(params, *point)
        if isinstance(value, (float, jax.Array, np.ndarray)) and jnp.issubdtype(jnp.result_type(value), jnp.floating):
            return jnp.asarray(value)
        raise TypeError(f"residuals: a residual returned {described(value)}; expected a real floating array: {RESIDUAL}.")


@dataclasses.dataclass(frozen=True)
class _Model(Around):
    """Least squares as a likelihood: a normal distribution of scale one around the residual."""

    value: _Value

    def __call__(self, params: chex.ArrayTree, /, *point: Any) -> Normal:
        value = self.value(params, *point)
        return Normal(value, jnp.ones((), value.dtype))


@dataclasses.dataclass(frozen=True)
class Residuals:
    """A least-squares problem with residuals of several kinds, as `jaxfisher.residuals` makes it.

    Attributes:
        kinds: the functions of one point, by the names of their kinds.
        batch_size: the most points that a function runs on at a time, in the matrix and in the acceleration.
    """

    kinds: Mapping[str, Residual]
    batch_size: int | None = None

    def loss(self, params: chex.ArrayTree, points: Any, scales: Any = None, *, weights: Any = None) -> Scalar:
        """``sum_k c_k / 2 mean_i |r_k(x_ki)|^2``, a scalar in the statistics dtype.

        >>> import jax.numpy as jnp, jaxfisher as jf
        >>> problem = jf.residuals({"data": lambda w, x, y: w * x - y, "prior": lambda w: w})
        >>> points = {"data": (jnp.array([1.0, 2.0]), jnp.array([3.0, 5.0])), "prior": ()}
        >>> print(problem.loss(2.0, points, {"prior": 0.5}))  # (1 + 1) / 4 + 0.5 * 4 / 2
        1.5
        """

        def one(kind: Residual, scale: Any, weights: Any, inputs: tuple[Any, ...]) -> Scalar:
            batch = make_batch(params, inputs, weights)
            found: Scalar = _half_squares(_Value(kind), params, batch, scale)
            return found

        return self._total(one, params, points, scales, weights)

    def gauss_newton(self, params: chex.ArrayTree, points: Any, scales: Any = None, *, weights: Any = None) -> Operator:
        """``sum_k c_k mean_i J_ki^T J_ki``, with ``J_ki`` the Jacobian of a residual at a point: a sum of one Fisher per kind.

        It is an operator like any other, exact as scores, and works with every view and solve.

        >>> import jax.numpy as jnp, jaxfisher as jf
        >>> problem = jf.residuals({"data": lambda w, x, y: w * x - y, "prior": lambda w: w})
        >>> points = {"data": (jnp.array([1.0, 2.0]), jnp.array([3.0, 5.0])), "prior": ()}
        >>> print(problem.gauss_newton(2.0, points, {"prior": 0.5}).as_matrix())  # (1 + 4) / 2 + 0.5
        [[3.]]
        """

        def one(kind: Residual, scale: Any, weights: Any, inputs: tuple[Any, ...]) -> Operator:
            found: Operator = scale * exact_fisher(_Model(_Value(kind)), batch_size=self.batch_size)(
                params, *inputs, weights=weights
            )
            return found

        return self._total(one, params, points, scales, weights)

    def acceleration(
        self, params: chex.ArrayTree, direction: chex.ArrayTree, points: Any, scales: Any = None, *, weights: Any = None
    ) -> Any:
        """``sum_k c_k mean_i J_ki^T r_ki''`` along a direction, for `jaxfisher.geodesic_acceleration`.

        >>> import jax.numpy as jnp, jaxfisher as jf
        >>> print(jf.residuals({"data": lambda w, x: w**2 * x}).acceleration(3.0, 1.0, {"data": jnp.ones(2)}))  # 6 times 2
        12.0
        """

        def one(kind: Residual, scale: Any, weights: Any, inputs: tuple[Any, ...]) -> Any:
            found = acceleration(_Model(_Value(kind)), batch_size=self.batch_size)(params, direction, *inputs, weights=weights)
            return jax.tree.map(lambda leaf: scale * leaf, found)

        return self._total(one, params, points, scales, weights)

    def kl(
        self, params: chex.ArrayTree, other: chex.ArrayTree, points: Any, scales: Any = None, *, weights: Any = None
    ) -> Scalar:
        """``sum_k c_k / 2 mean_i |r_k(x_ki; params) - r_k(x_ki; other)|^2``, the measure of a step in `jaxfisher.backtrack_kl`.

        >>> import jax.numpy as jnp, jaxfisher as jf
        >>> print(jf.residuals({"data": lambda w, x: w * x}).kl(1.0, 3.0, {"data": jnp.ones(2)}))
        2.0
        """

        def one(kind: Residual, scale: Any, weights: Any, inputs: tuple[Any, ...]) -> Scalar:
            found: Scalar = scale * kl(_Model(_Value(kind)))(params, other, *inputs, weights=weights)
            return found

        return self._total(one, params, points, scales, weights)

    def _total(self, one: Callable[..., Any], params: Any, points: Any, scales: Any, weights: Any) -> Any:
        """The sum over the kinds of ``one(function, scale, weights, inputs)``."""
        of_points = self._by_kind("points", points, all_of_them=True)
        of_weights = self._by_kind("weights", {} if weights is None else weights)
        of_scales = self._by_kind("scales", {} if scales is None else scales)
        dtype = param_spec(params).dtype
        parts = []
        for name, kind in self.kinds.items():
            inputs, scale = of_points[name], of_scales.get(name, 1.0)
            scale = nonnegative(f"scales[{name!r}]", scale, dtype)
            data = as_arrays(inputs if type(inputs) is tuple else (inputs,), f"points[{name!r}]")
            n, weighed = num_examples(data, f"points[{name!r}]"), of_weights.get(name)
            if weighed is not None:
                weighed = checked_weights(weighed, n, f"weights[{name!r}]")
            parts.append(one(kind, scale, weighed, data))
        # Operators are added as operators, and pytrees leaf by leaf.
        if isinstance(parts[0], Operator):
            return functools.reduce(lambda a, b: a + b, parts)
        return jax.tree.map(lambda *leaves: sum(leaves[1:], start=leaves[0]), *parts)

    def _by_kind(self, name: str, given: Any, all_of_them: bool = False) -> Mapping[str, Any]:
        if not isinstance(given, Mapping):
            raise TypeError(f"residuals: `{name}` is {described(given)}; expected a dict by the kinds {list(self.kinds)}.")
        unknown, missing = [k for k in given if k not in self.kinds], [k for k in self.kinds if k not in given]
        if unknown or (all_of_them and missing):
            wrong = f"has {unknown[0]!r}, which is no kind" if unknown else f"has no {missing[0]!r}"
            raise ValueError(f"residuals: `{name}` {wrong}; expected a dict by the kinds {list(self.kinds)}.")
        return given


def residuals(kinds: Mapping[str, Residual], *, batch_size: int | None = None) -> Residuals:
    r"""Least squares on residuals of several kinds, each with its own points, weights and scale.

    .. math:: L(\theta) = \sum_k \frac{c_k}{2} \sum_i \omega_{ki}\, |r_k(\theta, x_{ki})|^2, \qquad
        G = \sum_k c_k \sum_i \omega_{ki}\, J_{ki}^T J_{ki},

    where ``omega_ki`` is ``1 / n_k``, or ``w_ki / sum_i w_ki``. The kinds may be the equation of a physics-informed network in
    the interior, its boundary condition, initial values, measured points, or a prior: they need to share only the parameters. A
    residual may take derivatives in the inputs by `jax.jvp`, `jax.grad` or `jax.hessian`; the scores of weights stay factored
    through them. In `jaxfisher.training_step` the problem takes the place of the model, and the data are the points, followed
    by the scales if there are any::

        problem = jf.residuals({"interior": interior, "boundary": boundary})
        step = jf.training_step(problem, jf.levenberg_marquardt())
        params, state, loss = step(params, state, {"interior": inside, "boundary": edges})

    Args:
        kinds: a dict of functions by name, ``(params, *point) -> residual`` of ONE point, a real floating array of any shape.
        batch_size: run a residual on at most this many points at a time, in the matrix and in the acceleration.

    Returns:
        A `Residuals`, with the methods ``loss``, ``gauss_newton``, ``acceleration`` and ``kl``. ``points`` is a dict by kind:
        an array, or a tuple of the arguments that the residual takes after the parameters; ``()`` if it takes none. ``weights``
        is a dict of arrays with one number per point, and ``scales`` a dict of the ``c_k``, at least zero. Weights and scales
        that are left out count as one.

    Raises:
        TypeError: ``kinds`` is no dict of functions; (when called) points, weights or scales are no dict, or a residual is not
            real and floating.
        ValueError: ``kinds`` is empty; (when called) a kind has no points, a kind is unknown, or a scale is negative (if only
            known at run time, it gives NaN).

    Reference: Raissi, Perdikaris and Karniadakis, Physics-informed neural networks (Journal of Computational Physics 2019),
    section 3; Mueller and Zeinhofer, Achieving high accuracy with PINNs via energy natural gradient descent (ICML 2023).

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> problem = jf.residuals({"slope": lambda p, t: p["a"] - 2.0 + 0 * t, "start": lambda p: p["b"] - 1.0})
    >>> points, params = {"slope": jnp.arange(3.0), "start": ()}, {"a": 0.0, "b": 0.0}
    >>> print(problem.loss(params, points), problem.gauss_newton(params, points).trace())
    2.5 2.0
    """
    if not isinstance(kinds, Mapping):
        raise TypeError(f"residuals: `kinds` is {described(kinds)}; expected a dict of functions, each {RESIDUAL}.")
    if not kinds:
        raise ValueError(f"residuals: `kinds` is empty; expected at least one function, {RESIDUAL}.")
    for name, kind in kinds.items():
        check_function(f"kinds[{name!r}]", kind, RESIDUAL)
    return Residuals(dict(kinds), batch_size)


@once_for
def _half_squares(value: _Value, params: Any, batch: Batch, scale: Scalar) -> Float[Array, ""]:
    """The scale times half the mean square. The root of the scale, as a power of two, multiplies residuals before squares."""
    root = power_of_two(jnp.sqrt(jnp.where(scale > 0, scale, 1)))

    def scaled(params: chex.ArrayTree, /, *point: Any) -> Scalar:
        residual = value(params, *point)
        return -0.5 * jnp.sum(jnp.square(root.astype(residual.dtype) * residual))

    with of_one_example(value.residual, "residual", params, batch.data):
        return scale / root / root * mean_loss(scaled, params, batch.data, batch.weights)
