"""Physics-informed networks: Poisson's equation in two dimensions by Levenberg and Marquardt's method, and by Adam."""

from __future__ import annotations

from engine import Row, Sizes, compiled

# isort: split

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Scalar

import jaxfisher as jf

GOAL = 6e-8
"""The error that energy natural gradients reach in 94 to 850 seconds: Dangel, Mueller and Zeinhofer, arXiv 2405.15603."""


def network(params: Any, x: Float[Array, " 2"]) -> Scalar:
    """One hidden layer."""
    value: Scalar = jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
    return value


def solution(x: Float[Array, " 2"]) -> Scalar:
    """What the network should be."""
    return jnp.prod(jnp.sin(jnp.pi * x))


def interior(params: Any, x: Float[Array, " 2"]) -> jf.Normal:
    """The residual of the equation, the Laplacian in forward mode."""

    def slope(x: Array, axis: Array) -> Array:
        along: Array = jax.jvp(lambda x: network(params, x), (x,), (axis,))[1]
        return along

    second = [jax.jvp(functools.partial(slope, axis=axis), (x,), (axis,))[1] for axis in jnp.eye(2)]
    return jf.Normal(second[0] + second[1] + 2 * jnp.pi**2 * solution(x), 1.0)


def boundary(params: Any, x: Float[Array, " 2"]) -> jf.Normal:
    """The residual of the boundary condition."""
    return jf.Normal(network(params, x), 1.0)


def problem(hidden: int, side: int) -> tuple[Any, Array, Array, Array]:
    """Parameters, points inside, points of the boundary, and points to judge by."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"w1": jax.random.normal(keys[0], (2, hidden)) / 2**0.5, "b1": jnp.zeros(hidden)}
    params |= {"w2": jax.random.normal(keys[1], (hidden,)) / hidden**0.5, "b2": jnp.zeros(())}
    grid, edge = jnp.linspace(0, 1, side + 2)[1:-1], jnp.linspace(0, 1, side)
    inside = jnp.stack(jnp.meshgrid(grid, grid), -1).reshape(-1, 2)
    pairs = [pair for c in (0, 1) for pair in ((edge, 0 * edge + c), (0 * edge + c, edge))]
    edges = jnp.concatenate([jnp.stack(pair, 1) for pair in pairs])
    return params, inside, edges, jax.random.uniform(keys[2], (4000, 2))


def descent(
    opt: optax.GradientTransformationExtraArgs, inside: Array, edges: Array, steps: int, curved: bool
) -> Callable[[Any], Any]:
    """The parameters after so many steps."""

    def loss(params: Any) -> Scalar:
        of = lambda f, points: jnp.mean(jax.vmap(f, (None, 0))(params, points).loc ** 2) / 2  # noqa: E731
        return of(interior, inside) + of(boundary, edges)

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        given: dict[str, Any] = {}
        if curved:

            def bend(direction: Any) -> Any:
                both = (jf.acceleration(f)(params, direction, x) for f, x in ((interior, inside), (boundary, edges)))
                return jax.tree.map(jnp.add, *both)

            fisher = jf.exact_fisher(interior)(params, inside) + jf.exact_fisher(boundary)(params, edges)
            given = {"fisher": jf.dense(fisher), "value": value, "value_fn": loss, "acceleration_fn": bend}
        updates, state = opt.update(gradient, state, params, **given)
        return (optax.apply_updates(params, updates), state), None

    def run(params: Any) -> Any:
        return jax.lax.scan(step, (params, opt.init(params)), length=steps)[0][0]

    return run


def timed(run: Callable[[Any], Any], params: Any, points: Array) -> tuple[float, float]:
    """Seconds of a compiled run, and the error where it ends."""
    case = compiled(run, params)
    case()
    start = time.perf_counter()
    end = case()
    seconds = time.perf_counter() - start
    off = jax.vmap(network, (None, 0))(end, points) - jax.vmap(solution)(points)
    return seconds, float(jnp.sqrt(jnp.mean(jnp.square(off))))


def rows(sizes: Sizes) -> list[Row]:
    """Poisson's equation to an error of 6e-8, against Adam for as many gradients as take about as long."""
    hidden, side = sizes.widths(2, 64, 1)[1], 30 if sizes.shrink == 1 else 6
    steps = sizes.examples(400)
    bent = optax.chain(jf.scale_by_fisher(), optax.scale_by_learning_rate(1.0), jf.geodesic_acceleration())
    with jax.enable_x64(True):
        params, inside, edges, points = problem(hidden, side)
        ours = timed(descent(jf.levenberg_marquardt(bent, 1e-2), inside, edges, steps, True), params, points)
        adam = optax.with_extra_args_support(optax.adam(3e-3))
        plain = timed(descent(adam, inside, edges, 10 * steps, False), params, points)
    words = [f"{error:.1e} in {seconds:.2f} s" for seconds, error in (plain, ours)]
    note = f"{steps} steps, and {10 * steps} of Adam"
    reached = "yes" if ours[1] < GOAL else "NO"
    case = f"error, {len(inside)} + {len(edges)} points, {hidden} units"
    return [Row(case, *words, f"{plain[1] / ours[1]:.0f}", f"below {GOAL:.0e}", reached, note)]
