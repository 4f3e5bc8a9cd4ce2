"""The trust region on the actual divergence: halve a step until the predictions stay near and the loss goes down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Scalar

from jaxfisher._once import repeat
from jaxfisher._transform.places import transformation
from jaxfisher._transform.update_arguments import check_state, completing, function_for, value_for
from jaxfisher._tree import scaled, select
from jaxfisher._values import check_nonnegative


class BacktrackKLState(NamedTuple):
    """State of `backtrack_kl`. It is only a report: no update depends on it.

    Attributes:
        halvings: how often the last step was halved.
        accepted: whether the step was taken at any length; if not, the parameters stay as they are.
        moved: the KL divergence of the step taken, in nats per example; zero if none was.
    """

    halvings: Int[Array, ""]
    accepted: Bool[Array, ""]
    moved: Float[Array, ""]


def backtrack_kl(radius: chex.Numeric, max_halvings: chex.Numeric = 10) -> optax.GradientTransformationExtraArgs:
    r"""Halve a step until the KL divergence it moves the predictions by is at most ``radius`` and the loss goes down.

    .. math:: u \leftarrow 2^{-k} u \quad \text{with the least } k \le K \text{ such that } KL(\theta \| \theta + 2^{-k} u)
        \le \text{radius}, \quad L(\theta + 2^{-k} u) < L(\theta); \qquad u \leftarrow 0 \text{ if there is none}.

    Where `scale_to_kl` trusts the quadratic form, this transformation evaluates the divergence itself, as trust-region policy
    optimisation does. Place it last, so that the incoming step is the one that would be applied, learning rate and sign
    included::

        opt = optax.chain(jf.natural_gradient(1.0, damping=1e-3, radius=0.01), jf.backtrack_kl(0.01))
        updates, state = opt.update(grads, state, params, fisher=F, value=value,
            value_fn=lambda new: loss(new, x, y), kl_fn=lambda new: jf.kl(model)(params, new, x))

    Args:
        radius: ``>= 0``, in nats per example.
        max_halvings: K, after which the step is given up.

    Returns:
        A gradient transformation whose ``update`` takes ``params`` and, by keyword, ``value_fn`` (parameters to the loss),
        ``kl_fn`` (new parameters to the mean KL divergence from the old) and, if known, ``value``, the loss at ``params``;
        inside `optax.masked` or `optax.partition` also ``all_params``, since both functions take all parameters. A step that is
        not finite, or leads to a loss or divergence that is not finite, is never taken.

    Raises:
        ValueError: a negative radius; (at update) ``params``, ``value_fn`` or ``kl_fn`` is missing.

    Reference: Schulman et al., Trust region policy optimization (ICML 2015), appendix C.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda mu: jf.Normal(mu, 1.0)  # KL(0, u) = u^2 / 2
    >>> opt = jf.backtrack_kl(radius=0.5)
    >>> loss = lambda mu: (mu - 3.0) ** 2
    >>> updates, state = opt.update(3.0, opt.init(0.0), 0.0, value_fn=loss, kl_fn=lambda mu: jf.kl(model)(0.0, mu))
    >>> print(updates, state.halvings)  # 3 and 1.5 are too far
    0.75 2
    """
    check_nonnegative("radius", radius)
    check_nonnegative("max_halvings", max_halvings)

    def init(params: chex.ArrayTree) -> BacktrackKLState:
        del params
        return BacktrackKLState(jnp.zeros((), jnp.int32), jnp.asarray(True), jnp.zeros((), jnp.float32))

    def update(
        updates: Any,
        state: BacktrackKLState,
        params: Any = None,
        *,
        value: chex.Numeric | None = None,
        value_fn: Callable[[Any], chex.Numeric] | None = None,
        kl_fn: Callable[[Any], chex.Numeric] | None = None,
        all_params: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, BacktrackKLState]:
        del extra_args
        check_state(state, BacktrackKLState, "backtrack_kl")
        whole = completing(params, all_params, "backtrack_kl")
        loss = function_for("value_fn", value_fn, "from parameters to the loss", "backtrack_kl", whole)
        divergence = function_for("kl_fn", kl_fn, "such as lambda new: jf.kl(model)(params, new, x)", "backtrack_kl", whole)
        start = value_for(value, loss, params, "backtrack_kl")

        def at_length(halvings: Int[Array, ""]) -> Any:
            return scaled(updates, jnp.exp2(-halvings.astype(jnp.float32)))

        def tried(halvings: Int[Array, ""]) -> tuple[Array, Bool[Array, ""], Scalar]:
            new = optax.apply_updates(params, at_length(halvings))
            moved = divergence(new)
            # Comparisons with a NaN are false, so such a step is not taken.
            return halvings, (moved <= radius) & (loss(new) < start), moved.astype(jnp.float32)

        end = repeat(lambda at: ~at[1] & (at[0] < max_halvings), lambda at: tried(at[0] + 1), tried(jnp.zeros((), jnp.int32)))
        halvings, accepted, moved = end
        step = select(accepted, at_length(halvings), jax.tree.map(jnp.zeros_like, updates))
        return step, BacktrackKLState(halvings, accepted, jnp.where(accepted, moved, 0))

    return transformation(init, update)
