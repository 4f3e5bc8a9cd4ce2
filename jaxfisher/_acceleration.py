"""The second derivative of a model's predictions along a direction, pulled back to the parameters."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import chex
import jax
from jaxtyping import Array, Float, Shaped

from jaxfisher._examples import Batch, make_batch, map_examples
from jaxfisher._model import MODEL, Model, float_fields, of_one_example, predict, tangent
from jaxfisher._once import once_for
from jaxfisher._pieces import sum_batches
from jaxfisher._tree import cast_like, check_function, split


class AccelerationFunction(Protocol):
    """``(params, direction, *inputs, weights=None, counts=None)`` to a pytree like the parameters."""

    def __call__(
        self,
        params: chex.ArrayTree,
        direction: chex.ArrayTree,
        /,
        *inputs: Any,
        weights: Float[Array, " n"] | None = None,
        counts: Shaped[Array, " n"] | None = None,
    ) -> Any: ...


def acceleration(model: Model, *, batch_size: int | None = None) -> AccelerationFunction:
    r"""The bending of predictions along a direction, as a vector of the parameters, for `jaxfisher.geodesic_acceleration`.

    .. math:: \frac1n \sum_i J_i^T M_i\, z_i'', \qquad z_i'' = \frac{d^2 z_i(\theta + t d)}{dt^2}\Big|_{t = 0},

    with ``z_i`` the fields of the distribution predicted for example i, ``J_i`` their Jacobian and ``M_i`` its Fisher in them,
    as in `jaxfisher.exact_fisher`. It is zero if the fields are linear in the parameters. For `jaxfisher.Normal` of fixed
    scale, which is least squares, a solve for it gives the geodesic of the manifold of predictions; for other families it gives
    the path that is straight in their fields.

    Args:
        model: ``(params, *inputs) -> distribution`` of ONE example.
        batch_size: run the model on at most this many examples at a time.

    Returns:
        A function ``(params, direction, *inputs, weights=None, counts=None)``; ``direction`` and the result are pytrees like
        the parameters, the result in the dtypes of the direction. With weights, means are ``sum w_i (.) / sum w_i``, and
        ``counts`` are those of `jaxfisher.exact_fisher`.

    Raises:
        ValueError: (when called) arrays of different lengths, a direction of another shape.
        TypeError: (when called) a model that returns no distribution, a parameter that is not a floating array.

    Reference: Transtrum and Sethna (arXiv 1201.5885), equation 11.

    >>> import jaxfisher as jf
    >>> model = lambda theta: jf.Normal(theta**2, 1.0)
    >>> print(jf.acceleration(model)(3.0, 1.0))  # 6 times 2
    12.0
    """
    check_function("model", model, MODEL)

    def pulled(
        params: chex.ArrayTree,
        direction: chex.ArrayTree,
        /,
        *inputs: Any,
        weights: Float[Array, " n"] | None = None,
        counts: Shaped[Array, " n"] | None = None,
    ) -> Any:
        batch = make_batch(params, inputs, weights, batch_size, counts=counts)
        along = batch.spec.vector(direction, "direction")
        return cast_like(_pulled(model, split(params), along, batch), direction)

    return pulled


@once_for
def _pulled(model: Model, params: Any, direction: Any, batch: Batch) -> Any:
    direction = cast_like(direction, params)

    def piece(weights: Float[Array, " n"], *inputs: Any) -> Any:
        def fields(params: Any) -> tuple[list[Array], Any]:
            predicted = map_examples(partial(predict, model), params, inputs)
            return float_fields(predicted), predicted

        def along(params: Any) -> list[Array]:
            return jax.jvp(lambda p: fields(p)[0], (params,), (direction,))[1]

        second = jax.jvp(along, (params,), (direction,))[1]
        _, pull_back, predicted = jax.vjp(fields, params, has_aux=True)
        pushed = jax.vmap(lambda one, z: float_fields(one.fisher_mv(tangent(one, z))))(predicted, second)
        weighted = [weights.astype(z.dtype).reshape(-1, *(1,) * (z.ndim - 1)) * z for z in pushed]
        return batch.spec.vector(pull_back(weighted)[0])

    with of_one_example(model, "model", params, batch.data):
        return sum_batches(piece, (batch.weights, *batch.data), batch.batch_size)
