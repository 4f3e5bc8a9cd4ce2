"""The table of families under test, a row per family and parameter point; each row gets every law of `laws.check_family`.

A row states two parameter points in float64, `fields` and `other`. The distribution under test is at `fields`; `other` is the
second argument of its KL; a batch runs along the straight line between the two (every parameter space is convex).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import scipy.stats

from jaxfisher._distributions.base import Distribution, family
from jaxfisher._distributions.bernoulli import Bernoulli
from jaxfisher._distributions.beta import Beta
from jaxfisher._distributions.categorical import Categorical
from jaxfisher._distributions.dirichlet import Dirichlet
from jaxfisher._distributions.exponential import Exponential
from jaxfisher._distributions.gamma import Gamma
from jaxfisher._distributions.joint import Joint
from jaxfisher._distributions.laplace import Laplace
from jaxfisher._distributions.multivariate_normal import MultivariateNormal
from jaxfisher._distributions.negative_binomial import NegativeBinomial
from jaxfisher._distributions.normal import Normal
from jaxfisher._distributions.poisson import Poisson
from jaxfisher._distributions.student_t import StudentT


@dataclasses.dataclass(frozen=True)
class Case:
    """One family at one parameter point."""

    name: str
    family: type[Distribution]
    fields: tuple[Any, ...]
    other: tuple[Any, ...]
    rule: Callable[[], oracle.Rule]
    """Nodes and weights of the support (see `oracle`), enough for sums and integrals under `fields` to 1e-11."""
    reference: Callable[..., Any] | None = None
    """The scipy.stats distribution of the fields."""
    outside: tuple[Any, ...] = ()
    """Values that are not in the support: log_prob is -inf there."""
    regular: bool = True
    """log_prob is twice differentiable in the fields wherever there is mass: minus its expected Hessian is the Fisher."""
    second_moment: bool = True
    """Draws have a finite fourth moment, so that their second moment can be tested by its z-score."""
    extremes: tuple[tuple[tuple[Any, ...], tuple[Any, ...], Any], ...] = ()
    """Triples (fields, fields of the other, x) at the ends of float32, all finite, to compare with float64."""
    rtol32: float = 1e-5
    """The relative error of float32 allowed at the extremes: about 100 eps, more if a comment in the row says why."""
    self32: float = 0.0
    """In float32 the divergence to itself is at most the square of this, and its slope towards `other` at most this."""

    def make(self, dtype=jnp.float64, batch=()):
        """The distribution at `fields`, or a batch along the line from `fields` to `other`."""
        count = math.prod(batch)
        along = np.linspace(0, 1, count) if batch else np.zeros(1)
        return self.family(*(line(a, b, along, batch, dtype) for a, b in zip(self.fields, self.other, strict=True)))

    def make_other(self, dtype=jnp.float64):
        """The distribution at `other`."""
        return self.family(*(jnp.asarray(value, dtype) for value in self.other))

    def scipy(self):
        """The reference distribution at `fields`."""
        return self.reference(*(np.asarray(value, float) for value in self.fields))


def line(start, end, along, batch, dtype):
    """Points on the line from `start` to `end`, shaped ``[*batch, *event]``."""
    start, end = np.asarray(start, float), np.asarray(end, float)
    weights = along.reshape((-1,) + (1,) * start.ndim)
    return jnp.asarray((start + weights * (end - start)).reshape(batch + start.shape), dtype)


def logit(p):
    return math.log(p / (1 - p))


def softmax(z):
    z = np.exp(z - np.max(z))
    return z / z.sum()


@family
class Heads(Distribution):
    """A `Joint` of a number and a flag as a family over pairs of numbers, so that the laws of families test it."""

    loc: Any
    scale: Any
    logits: Any

    field_ndims = (0, 0, 0)
    event_ndim = 1

    @property
    def joint(self):
        return Joint((Normal(self.loc, self.scale), Bernoulli(self.logits)))

    mean = property(lambda self: jnp.stack(self.joint.mean, -1))
    variance = property(lambda self: jnp.stack(self.joint.variance, -1))
    mode = property(lambda self: jnp.stack([value.astype(self.loc.dtype) for value in self.joint.mode], -1))

    def entropy(self):
        return self.joint.entropy()

    def log_prob(self, x):
        return self.joint.log_prob((x[..., 0], x[..., 1]))

    def sample(self, key, shape=()):
        return jnp.stack([draw.astype(self.loc.dtype) for draw in self.joint.sample(key, shape)], -1)

    def kl(self, other):
        return self.joint.kl(other.joint)

    def fisher_noise(self):
        return self.joint.fisher_noise()

    def fisher_root(self, moving):
        return self.joint.fisher_root(moving)

    def fisher_sqrt_mv(self, u):
        return self._make(*jax.tree.leaves(self.joint.fisher_sqrt_mv(u)))

    def fisher_mv(self, v):
        tangent = jax.tree.unflatten(jax.tree.structure(self.joint), jax.tree.leaves(v))
        return self._make(*jax.tree.leaves(self.joint.fisher_mv(tangent)))

    def fisher_matrix(self):
        return self.joint.fisher_matrix()


def pairs(numbers, flags):
    """The product of two rules."""
    first, second = (grid.reshape(-1) for grid in np.meshgrid(numbers.nodes, flags.nodes, indexing="ij"))
    return oracle.Rule(np.stack([first, second], -1).astype(float), np.outer(numbers.weights, flags.weights).reshape(-1))


TRIL = ((1.5, 0.0, 0.0), (-0.7, 0.4, 0.0), (0.2, 1.1, 2.0))
OTHER_TRIL = ((1.0, 0.0, 0.0), (0.3, 0.9, 0.0), (-0.5, 0.2, 1.4))
# Junk above the diagonal: every member must ignore it in the same way.
JUNK_TRIL = ((0.8, 7.0), (-0.6, 1.3))

CASES = [
    Case(
        "Normal",
        Normal,
        (0.7, 1.6),
        (-0.4, 0.9),
        lambda: oracle.real_line(0.7, scale=1.6),
        scipy.stats.norm,
        extremes=(
            ((0.0, 1e-20), (1e-20, 2e-20), 0.0),
            ((0.0, 1e-20), (1.0, 1e20), 1e-20),
            ((1e20, 1e20), (-1e20, 3e20), 2e20),
            ((0.0, 1e20), (0.0, 1e-20), 1.0),
        ),
    ),
    Case(
        "Categorical",
        Categorical,
        ((0.3, -1.2, 2.0, 0.1),),
        ((1.0, 0.5, -0.3, 0.0),),
        lambda: oracle.outcomes(4),
        lambda z: scipy.stats.rv_discrete(values=(np.arange(4), softmax(z))),
        extremes=(
            (((1e4, 0.0, -1e4),), ((1e4, 1.0, -1e4),), 0),
            (((-1e4, 0.0, 1e4),), ((1e4, 0.0, -1e4),), 1),
        ),
    ),
    Case(
        "Bernoulli",
        Bernoulli,
        (logit(0.3),),
        (1.1,),
        lambda: oracle.outcomes(2),
        lambda z: scipy.stats.bernoulli(1 / (1 + np.exp(-z))),
        outside=(-1, 2, 0.5, math.inf, -math.inf),
        extremes=(
            ((1e4,), (1e4,), 1),
            ((1e4,), (-1e4,), 0),
            ((-1e4,), (1e4,), 1),
            ((-1e4,), (-0.9e4,), 0),
            ((30.0,), (29.5,), 1),
            ((-30.0,), (-27.0,), 0),
        ),
    ),
    Case(
        "Bernoulli, rare",
        Bernoulli,
        (-12.0,),
        (-11.5,),
        lambda: oracle.outcomes(2),
        lambda z: scipy.stats.bernoulli(1 / (1 + np.exp(-z))),
    ),
    Case(
        "Poisson",
        Poisson,
        (math.log(2.5),),
        (math.log(4.0),),
        lambda: oracle.outcomes(80),
        lambda log_rate: scipy.stats.poisson(np.exp(log_rate)),
        outside=(-1, 2.5, math.inf),
        extremes=(
            ((46.0,), (46.5,), 0),
            ((-46.0,), (-45.0,), 0),
            ((-46.0,), (46.0,), 3),
            ((46.0,), (-46.0,), 1),
            ((math.log(1e6),), (math.log(1.001e6),), 1_000_500),
        ),
        # The rate is the exponential of a field near 46, so its error is 46 eps, which the saddle point amplifies at 1e6.
        rtol32=1e-3,
    ),
    Case(
        "Poisson, counts in the hundreds",
        Poisson,
        (math.log(300.0),),
        (math.log(280.0),),
        lambda: oracle.outcomes(700),
        lambda log_rate: scipy.stats.poisson(np.exp(log_rate)),
    ),
    Case(
        "Exponential",
        Exponential,
        (0.4,),
        (-0.3,),
        lambda: oracle.half_line(0.0, scale=math.exp(-0.4)),
        lambda log_rate: scipy.stats.expon(scale=np.exp(-log_rate)),
        outside=(-1.0, -1e-20),
        extremes=(
            ((46.0,), (46.5,), 1e-20),
            ((-46.0,), (-45.5,), 1e20),
            ((46.0,), (-46.0,), 0.0),
        ),
    ),
    Case(
        "Laplace",
        Laplace,
        (0.7, 1.6),
        (-0.4, 0.9),
        lambda: oracle.real_line(0.7, -0.4, scale=1.6),  # one kink at each location
        lambda loc, scale: scipy.stats.laplace(loc, scale),
        regular=False,  # log_prob has a kink at loc
        extremes=(
            ((0.0, 1e-20), (1e-20, 2e-20), 0.0),
            ((0.0, 1e-20), (1.0, 1e20), 1e-20),
            ((1e20, 1e20), (-1e20, 3e20), 2e20),
            ((0.0, 1e20), (2e20, 1e-20), 1.0),
        ),
    ),
    Case(
        "MultivariateNormal, junk above the diagonal",
        MultivariateNormal,
        ((0.5, -1.0), JUNK_TRIL),
        ((0.1, 0.2), ((1.1, -3.0), (0.4, 0.7))),
        lambda: oracle.gaussian_grid((0.5, -1.0), np.tril(JUNK_TRIL)),
        lambda loc, tril: scipy.stats.multivariate_normal(loc, np.tril(tril) @ np.tril(tril).T),
        extremes=(
            (
                ((0.0, 0.0), ((1e-20, 0.0), (1e-20, 2e-20))),
                ((1e-20, 0.0), ((2e-20, 0.0), (0.0, 1e-20))),
                (0.0, 1e-20),
            ),
            (((0.0, 1e20), ((1e20, 0.0), (-1e20, 2e20))), ((1e20, 0.0), ((2e20, 0.0), (1e20, 1e20))), (0.0, 1e20)),
        ),
    ),
    Case(
        "MultivariateNormal, three axes",
        MultivariateNormal,
        ((0.5, -1.0, 2.0), TRIL),
        ((0.1, 0.2, 1.0), OTHER_TRIL),
        lambda: oracle.gaussian_grid((0.5, -1.0, 2.0), np.array(TRIL)),
        lambda loc, tril: scipy.stats.multivariate_normal(loc, tril @ tril.T),
    ),
    Case(
        "Gamma",
        Gamma,
        (2.5, 1.7),
        (4.0, 0.9),
        lambda: oracle.half_line(0.0, scale=1.5),
        lambda a, b: scipy.stats.gamma(a, scale=1 / b),
        outside=(-1.0, -1e-20),
        extremes=(
            ((1e8, 1e8), (1.0001e8, 1e8), 1.0001),
            # Powers of two make rate * x exact: otherwise its rounding error is the score in the concentration.
            ((2.0**27, 2.0**-13), (0.5, 1e-6), 2.0**40),
            ((1e-6, 1.0), (2e-6, 3.0), 1e-20),
            ((1e-6, 1e-15), (1e3, 1e-15), 1.0),
            ((3.0, 1e-20), (3.0, 2e-20), 1e20),
            ((3.0, 1e20), (3.0, 0.5e20), 1e-20),
        ),
        # The density at a concentration of 1e8 magnifies the rounding of x and of the fields by its square root, 1e4.
        rtol32=1e-4,
    ),
    Case(
        "Gamma, concentration below one",
        Gamma,
        (0.6, 0.8),
        (0.5, 1.1),
        lambda: oracle.half_line(0.0, scale=1.0),
        lambda a, b: scipy.stats.gamma(a, scale=1 / b),
    ),
    Case(
        "Beta",
        Beta,
        (2.5, 1.7),
        (1.2, 3.3),
        lambda: oracle.interval(0.0, 1.0),
        scipy.stats.beta,
        outside=(-0.1, 1.1),
        extremes=(
            ((1e8, 2e8), (1.0001e8, 2e8), 0.3333),
            ((1e-6, 2e-6), (2e-6, 1e-6), 0.25),
            ((1e6, 1e-6), (1.0, 1.0), 0.5),
            ((1.0, 1.5), (1e8, 1e-6), 0.5),
            ((0.5, 0.5), (0.5, 0.5), 0.125),
        ),
        # With one class at 1e-6 of the other the root's rows nearly cancel; their derivatives do so twice.
        rtol32=1e-3,
    ),
    Case(
        "Dirichlet",
        Dirichlet,
        ((2.5, 0.8, 1.7),),
        ((1.2, 3.3, 0.9),),
        oracle.simplex3,
        outside=((0.5, 0.7, -0.2), (0.5, 0.3, 0.3)),
        extremes=(
            (((1e8, 2e8, 1e8),), ((1.0001e8, 2e8, 1e8),), (0.25, 0.5, 0.25)),
            (((1e-6, 2e-6, 1e-6),), ((1e-6, 1e-6, 1e-6),), (0.25, 0.5, 0.25)),
            (((1e6, 1e-6, 1.0),), ((1.0, 1.0, 1.0),), (0.25, 0.5, 0.25)),
        ),
    ),
    Case(
        "StudentT",
        StudentT,
        (5.0, 0.7, 1.6),
        (6.5, -0.4, 0.9),
        lambda: oracle.real_line(0.7, scale=1.6),
        scipy.stats.t,
        extremes=(
            ((1e8, 0.0, 1.0), (1e8, 0.5, 1.5), 3.0),
            ((1.1, 0.0, 1.0), (1.2, 1.0, 2.0), 1e15),
            ((3.0, 0.0, 1e-15), (3.0, 1e-15, 2e-15), 1e-15),
            ((3.0, 0.0, 1e15), (3.0, 1e15, 2e15), 1e15),
        ),
        # The derivatives of the root's three entries in df have both signs, and their sum is a hundredth of them.
        rtol32=1e-3,
        self32=float(np.finfo(np.float32).eps),  # the divergence is a sum over nodes
    ),
    Case(
        "NegativeBinomial",
        NegativeBinomial,
        (math.log(2.5), math.log(0.4)),
        (math.log(4.0), math.log(0.7)),
        lambda: oracle.outcomes(400),
        lambda m, d: scipy.stats.nbinom(np.exp(-d), 1 / (1 + np.exp(m + d))),
        outside=(-1, 2.5, math.inf),
        extremes=(
            ((1.0, -46.0), (1.5, -45.0), 3),
            ((46.0, -46.0), (46.5, -45.0), 0),
            ((-46.0, 0.0), (-45.0, 1.0), 2),
            ((1.0, 14.0), (1.5, 13.0), 5),
        ),
    ),
    Case(
        "Joint",
        Heads,
        (0.7, 1.6, logit(0.3)),
        (-0.4, 0.9, 1.1),
        lambda: pairs(oracle.real_line(0.7, scale=1.6), oracle.outcomes(2)),
        outside=((0.3, 2.0), (0.3, 0.5)),
        extremes=(
            ((0.0, 1e-20, 1e4), (1e-20, 2e-20, -1e4), (0.0, 1.0)),
            ((1e20, 1e20, -30.0), (-1e20, 3e20, -27.0), (2e20, 0.0)),
        ),
    ),
]
