"""The trust region: shorten a step until it moves the predictions by at most a given KL divergence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from jaxfisher._operators.operator import Operator
from jaxfisher._transform.places import transformation
from jaxfisher._transform.update_arguments import fisher_for
from jaxfisher._tree import scaled
from jaxfisher._values import check_nonnegative


def scale_to_kl(radius: chex.Numeric) -> optax.GradientTransformationExtraArgs:
    r"""Shorten updates until they move the predictions by a KL divergence, to second order, of at most ``radius``.

    .. math:: u \leftarrow u \cdot \min\left(1, \sqrt{\frac{2\,\text{radius}}{u^T F u}}\right), \qquad
        \text{so that } \tfrac12 u^T F u \le \text{radius}.

    After `scale_by_fisher` with a large learning rate this solves the constrained problem itself: the result is
    ``-sqrt(2 radius / g^T F^-1 g) F^-1 g``, which minimises the linearised loss among steps of that KL. Place it last in the
    chain, after the learning rate, so that it measures the step actually taken::

        opt = optax.chain(jf.scale_by_fisher(damping=1e-3), optax.scale_by_learning_rate(1.0), jf.scale_to_kl(1e-2))

    Args:
        radius: ``>= 0``, in nats per example.

    Returns:
        A stateless gradient transformation whose ``update`` takes ``fisher=``, an operator or a function of no arguments that
        returns one; give the undamped Fisher. A step that is not finite stays that way.

    Raises:
        ValueError: a negative radius; (at update) ``fisher=`` is missing, or not over the parameters of the updates.
        TypeError: (at update) ``fisher=`` is no operator.

    Reference: Schulman et al., Trust region policy optimization (ICML 2015), appendix C; the quadratic form of its constraint.

    >>> import jaxfisher as jf
    >>> opt = jf.scale_to_kl(radius=0.5)
    >>> fisher = jf.exact_fisher(lambda mu: jf.Normal(mu, 2.0))(0.0)  # 1/4
    >>> updates, _ = opt.update(-6.0, opt.init(0.0), fisher=fisher)
    >>> print(updates)  # u^2 / 8 = 1/2
    -2.0
    """
    check_nonnegative("radius", radius)

    def update(
        updates: Any,
        state: optax.EmptyState,
        params: Any = None,
        *,
        fisher: Operator | Callable[[], Operator] | None = None,
        **extra_args: Any,
    ) -> tuple[Any, optax.EmptyState]:
        del params, extra_args
        if not jax.tree.leaves(updates):
            return updates, state
        moved = 0.5 * fisher_for(updates, fisher, "scale_to_kl").quadratic(updates)
        inside = moved <= radius
        factor = jnp.where(inside, 1, jnp.sqrt(radius / jnp.where(inside, 1, moved)))
        return scaled(updates, factor), state

    return transformation(lambda params: optax.EmptyState(), update)
