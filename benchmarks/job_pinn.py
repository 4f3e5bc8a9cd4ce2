"""Physics-informed networks: three equations whose solutions are known, by Levenberg and Marquardt's method and by Adam."""

from __future__ import annotations

from engine import Row, Sizes, compiled

# isort: split

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
from jaxtyping import Array, Float, Scalar

import jaxfisher as jf

RATES = (1e-3, 3e-3, 1e-2)
"""Learning rates of Adam, of which the table shows the best."""

Field = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Equation:
    """A boundary-value problem in a unit cube.

    Attributes:
        name: the name in the table.
        axes: the number of coordinates of a point.
        solution: the exact solution at one point.
        residual: ``(u, x)`` to the residual of the equation for a function u at a point x.
        faces: the faces on which the solution is given, as pairs of an axis and an end.
        counts: the number of points inside, and on the faces.
        goal: the error to reach.
    """

    name: str
    axes: int
    solution: Field
    residual: Callable[[Field, Array], Array]
    faces: tuple[tuple[int, int], ...]
    counts: tuple[int, int]
    goal: float


def second(u: Field, x: Array, axis: int) -> Array:
    """The second derivative along an axis, in forward mode."""
    along = jnp.eye(len(x))[axis]
    return jax.jvp(lambda x: jax.jvp(u, (x,), (along,))[1], (x,), (along,))[1]


def every_face(axes: int) -> tuple[tuple[int, int], ...]:
    """All faces of a cube."""
    return tuple((axis, end) for axis in range(axes) for end in (0, 1))


def sines(x: Float[Array, " d"]) -> Scalar:
    """A bump that is zero on the boundary."""
    return jnp.prod(jnp.sin(jnp.pi * x))


def cosines(x: Float[Array, " d"]) -> Scalar:
    """A sum of waves."""
    return jnp.sum(jnp.cos(jnp.pi * x))


def cooling(x: Float[Array, " 2"]) -> Scalar:
    """A rod that cools, at a place and a time."""
    return jnp.exp(-(jnp.pi**2) * x[1] / 4) * jnp.sin(jnp.pi * x[0])


def of_heat(u: Field, x: Array) -> Array:
    """``u_t - u_xx / 4``."""
    return jax.jvp(u, (x,), (jnp.array([0.0, 1.0]),))[1] - second(u, x, 0) / 4


def of_poisson(u: Field, x: Array, source: Field) -> Array:
    """The Laplacian plus the source."""
    return sum((second(u, x, axis) for axis in range(len(x))), start=source(x))


EQUATIONS = (
    # Energy natural gradients reach 6e-8 in 94 to 850 seconds: Dangel, Mueller and Zeinhofer, arXiv 2405.15603.
    Equation(
        "Poisson, 2 axes",
        2,
        sines,
        lambda u, x: of_poisson(u, x, lambda x: 2 * jnp.pi**2 * sines(x)),
        every_face(2),
        (900, 120),
        6e-8,
    ),
    Equation("heat, 1 axis and time", 2, cooling, of_heat, ((0, 0), (0, 1), (1, 0)), (900, 120), 1e-6),
    Equation(
        "Poisson, 5 axes",
        5,
        cosines,
        lambda u, x: of_poisson(u, x, lambda x: jnp.pi**2 * cosines(x)),
        every_face(5),
        (1000, 500),
        1e-4,
    ),
)


def network(params: Any, x: Float[Array, " d"]) -> Scalar:
    """A network of one hidden layer."""
    value: Scalar = jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
    return value


def start(axes: int, hidden: int) -> dict[str, Array]:
    """The initial parameters."""
    keys = jax.random.split(jax.random.key(0))
    params = {"w1": jax.random.normal(keys[0], (axes, hidden)) / axes**0.5, "b1": jnp.zeros(hidden)}
    return params | {"w2": jax.random.normal(keys[1], (hidden,)) / hidden**0.5, "b2": jnp.zeros(())}


def spread(axes: int, count: int, seed: int) -> Float[np.ndarray, "n d"]:
    """Points of a cube by Halton's sequence, which are spread more evenly than random ones."""
    return scipy.stats.qmc.Halton(axes, rng=np.random.default_rng(seed)).random(count)


def points_of(equation: Equation, shrink: int) -> dict[str, Array]:
    """Points inside, and the same number on each face."""
    inside, outside = (max(8, count // shrink) for count in equation.counts)
    each = -(-outside // len(equation.faces))
    faces = [np.insert(spread(equation.axes - 1, each, k), a, e, 1) for k, (a, e) in enumerate(equation.faces, start=1)]
    return {"interior": jnp.asarray(spread(equation.axes, inside, 0)), "boundary": jnp.asarray(np.concatenate(faces))}


def problem(equation: Equation) -> jf.Residuals:
    """The residuals of the equation inside, and of the known solution on the faces."""

    def interior(params: Any, x: Array) -> Array:
        return equation.residual(lambda x: network(params, x), x)

    return jf.residuals({"interior": interior, "boundary": lambda params, x: network(params, x) - equation.solution(x)})


@dataclasses.dataclass(frozen=True)
class Run:
    """The processor time and the error of an optimiser, in its second run: the first one warms up."""

    seconds: float
    error: float

    def __str__(self) -> str:
        return f"{self.error:.1e} in {self.seconds:.2f} s"


def run(equation: Equation, optimiser: optax.GradientTransformation, points: Any, params: Any, steps: int) -> Run:
    """Train for ``steps`` steps, and measure the root mean square error at points that were not fitted."""
    step = jf.training_step(problem(equation), optimiser)

    def one(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], Array]:
        *carry, loss = step(*carry, points)
        return tuple(carry), loss

    case = compiled(lambda params: jax.lax.scan(one, (params, step.init(params, points)), length=steps)[0][0], params)
    case()
    begin = time.process_time()
    end = case()
    seconds = time.process_time() - begin
    judged = spread(equation.axes, 4000, 99)
    off = jax.vmap(network, (None, 0))(end, judged) - jax.vmap(equation.solution)(judged)
    return Run(seconds, float(jnp.sqrt(jnp.mean(jnp.square(off)))))


def row(equation: Equation, sizes: Sizes) -> Row:
    """The row of one equation."""
    params = start(equation.axes, sizes.widths(equation.axes, 64, 1)[1])
    points, steps = points_of(equation, sizes.shrink), sizes.examples(400)
    ours = run(equation, jf.levenberg_marquardt(), points, params, steps)
    tried = {rate: run(equation, optax.adam(rate), points, params, 10 * steps) for rate in RATES}
    rate = min(tried, key=lambda rate: tried[rate].error)
    plain = tried[rate]
    case = f"{equation.name}: {len(points['interior'])} + {len(points['boundary'])} points"
    note = f"{steps} steps, and {10 * steps} of Adam, rate {rate:g}"
    reached = "yes" if ours.error < equation.goal else "NO"
    return Row(case, str(plain), str(ours), f"{plain.error / ours.error:.0f}", f"below {equation.goal:.0e}", reached, note)


def rows(sizes: Sizes) -> list[Row]:
    """Errors of three equations and processor time, against the best of three rates of Adam with ten times the steps."""
    with jax.enable_x64(True):
        return [row(equation, sizes) for equation in EQUATIONS]
