"""Variational Monte Carlo: the ground state of Heisenberg's chain of 22 spins, beside NetKet with the same amplitude."""

from __future__ import annotations

from engine import Row, Sizes

# isort: split

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Scalar
from peers import Unsuited, netket

import jaxfisher as jf

SITES, FILTERS, SAMPLES = 22, 4, 1000
EXACT, NEAR = -39.14752260706246, 1e-3
"""The energy of the chain of 22, with bonds that are products of Pauli matrices, and the error to reach."""
SPREAD, DAMPING, RATES, RADIUS = 0.05, 1e-3, (0.03, 0.02), 1e-2
"""Our run takes the first rate, and NetKet's the better of both. The radius is that of our trust region; NetKet has none."""
TOGETHER, MOST = 10, 300
"""The number of steps between two evaluations of the energy, and the number after which a run ends."""
SEEDS = 3


def even(angles: Float[Array, "*b dk"]) -> Float[Array, "*b"]:
    """The sum of ``log 2 cosh`` over hidden units."""
    size = jnp.abs(angles)
    return jnp.sum(size + jnp.log1p(jnp.exp(-2 * size)), -1)


def log_psi(params: Float[Array, "d k"], spins: Float[Array, " d"]) -> Scalar:
    """A restricted Boltzmann machine that is invariant under rotations of the ring and under flipping all spins.

    The signs of the amplitudes follow Marshall's rule, and are absorbed into the Hamiltonian.
    """
    sites = jnp.arange(len(spins))
    return jnp.sum(even(spins[(sites[:, None] + sites) % len(spins)] @ params))


def ring_of(params: Float[Array, "d k"]) -> Float[Array, "d dk"]:
    """The weights of each site to all hidden units, one per filter and place: ``log_psi`` is ``even(spins @ weights)``."""
    sites = jnp.arange(len(params))
    return params[(sites[:, None] - sites) % len(sites)].reshape(len(sites), -1)


def local_energy(params: Array, spins: Float[Array, " d"]) -> Scalar:
    """``(H psi)(s) / psi(s)``. Exchanging opposite neighbours changes the hidden units by the weights of these two sites."""
    weights, signs = ring_of(params), spins * jnp.roll(spins, -1)
    here = spins @ weights
    there = here - 2 * spins[:, None] * (weights - jnp.roll(weights, -1, 0))
    return jnp.sum(signs - jnp.where(signs < 0, 2 * jnp.exp(even(there) - even(here)), 0))


def exchanged(spins: Float[Array, " d"], site: Array) -> Float[Array, " d"]:
    """The spins with that of a site and that of the next one exchanged."""
    pair = jnp.stack([site, (site + 1) % len(spins)])
    return spins.at[pair].set(spins[pair[::-1]])


def sampled(params: Array, spins: Float[Array, "n d"], key: PRNGKeyArray) -> Float[Array, "n d"]:
    """One sweep of Metropolis' method: as many proposals as there are sites, with one chain per sample."""
    weights = ring_of(params)

    def move(carry: tuple[Array, Array], key: PRNGKeyArray) -> tuple[tuple[Array, Array], None]:
        spins, old = carry
        keys = jax.random.split(key)
        tried = jax.vmap(exchanged)(spins, jax.random.randint(keys[0], (len(spins),), 0, spins.shape[1]))
        new = even(tried @ weights)
        taken = jnp.log(jax.random.uniform(keys[1], (len(spins),))) < 2 * (new - old)
        return (jnp.where(taken[:, None], tried, spins), jnp.where(taken, new, old)), None

    return jax.lax.scan(move, (spins, even(spins @ weights)), jax.random.split(key, spins.shape[1]))[0][0]


def optimiser() -> optax.GradientTransformationExtraArgs:
    """Stochastic reconfiguration in a trust region."""
    return optax.chain(
        jf.scale_by_fisher(DAMPING, view=jf.dense), optax.scale_by_learning_rate(RATES[0]), jf.scale_to_kl(RADIUS)
    )


@jax.jit
def advance(params: Array, state: Any, spins: Array, key: PRNGKeyArray) -> tuple[Array, Any, Array]:
    """`TOGETHER` steps as one program."""

    def step(carry: tuple[Any, Any, Any], key: PRNGKeyArray) -> tuple[tuple[Any, Any, Any], None]:
        params, state, spins = carry
        spins = sampled(params, spins, key)
        energies = jax.vmap(local_energy, (None, 0))(params, spins)
        gradient = jf.energy_gradient(log_psi)(params, spins, energies)
        tensor = jf.empirical_fisher(log_psi, center=True)(params, spins)
        updates, state = optimiser().update(gradient, state, params, fisher=tensor)
        return (optax.apply_updates(params, updates), state, spins), None

    return jax.lax.scan(step, (params, state, spins), jax.random.split(key, TOGETHER))[0]


def ours(seed: int, sites: int, samples: int) -> Iterator[Array]:
    """The first parameters, once everything is compiled, and then those after every `TOGETHER` steps."""
    keys = jax.random.split(jax.random.key(seed), 2)
    params = SPREAD * jax.random.normal(keys[0], (sites, FILTERS))
    half = jnp.tile(jnp.array([1.0, -1.0]), sites // 2)
    spins = jax.vmap(lambda key: jax.random.permutation(key, half))(jax.random.split(keys[1], samples))
    state = optimiser().init(params)
    jax.block_until_ready(advance(params, state, spins, keys[0]))
    yield params
    for k in range(MOST // TOGETHER):
        params, state, spins = advance(params, state, spins, jax.random.key(MOST * seed + k + 1))
        yield jax.block_until_ready(params)


def theirs(rate: float, seed: int, sites: int, samples: int) -> Iterator[Array]:
    """`ours` by NetKet: its driver, its exchange sampler, its symmetric machine."""
    nk = netket()
    ring = nk.graph.Chain(sites)
    hilbert = nk.hilbert.Spin(0.5, sites, total_sz=0)
    hamiltonian = nk.operator.Heisenberg(hilbert, ring, sign_rule=True).to_jax_operator()
    machine = nk.models.RBMSymm(
        ring.translation_group(),
        alpha=FILTERS,
        use_hidden_bias=False,
        use_visible_bias=False,
        kernel_init=jax.nn.initializers.normal(SPREAD),
        param_dtype=float,
    )
    sampler = nk.sampler.MetropolisExchange(hilbert, graph=ring, n_chains=samples, sweep_size=sites)
    state = nk.vqs.MCState(sampler, machine, n_samples=samples, n_discard_per_chain=0, seed=seed)
    driver = nk.driver.VMC_SR(hamiltonian, optax.sgd(rate), diag_shift=DAMPING, variational_state=state, use_ntk=False)
    first = state.parameters
    for k in range(1 + MOST // TOGETHER):
        driver.run(TOGETHER, out=nk.logging.RuntimeLog(), show_progress=False)
        (kernel,) = jax.tree.leaves(jax.block_until_ready(state.parameters))
        yield jnp.reshape(kernel, (FILTERS, sites)).T
        if k == 0:  # the first steps were for compiling: start again
            state.parameters = first
            state.reset()


# --- the energy, by a sum over all configurations up to the symmetries of the ring --------------------------------------------


@dataclasses.dataclass(frozen=True)
class Configurations:
    """The configurations with as many spins up as down, one for each orbit of rotations and of flipping all spins.

    Attributes:
        spins: the spins of each configuration.
        sizes: the number of configurations in its orbit.
        leads_to: for each site, the index of the configuration to which exchanging the spins there leads.
        active: for each site, whether the spins there are opposite.
    """

    spins: Float[np.ndarray, "n d"]
    sizes: Int[np.ndarray, " n"]
    leads_to: Int[np.ndarray, "n d"]
    active: Bool[np.ndarray, "n d"]


def canonical(states: Int[np.ndarray, "..."], sites: int) -> Int[np.ndarray, "..."]:
    """The least number in the orbit of each state, which is a number with one bit per spin."""
    every = (1 << sites) - 1
    turned = [((states << k) | (states >> (sites - k))) & every for k in range(sites)]
    return functools.reduce(np.minimum, [either for t in turned for either in (t, every ^ t)])


@functools.cache
def configurations(sites: int) -> Configurations:
    """The configurations of a ring."""
    numbers = np.arange(1 << sites)
    ups = sum((numbers >> k) & 1 for k in range(sites))
    states, sizes = np.unique(canonical(numbers[ups == sites // 2], sites), return_counts=True)
    spins = 1.0 - 2 * ((states[:, None] >> np.arange(sites)) & 1)
    pairs = np.array([1 << k | 1 << (k + 1) % sites for k in range(sites)])
    active = spins != np.roll(spins, -1, 1)
    new = np.where(active, states[:, None] ^ pairs, states[:, None])
    return Configurations(spins, sizes, np.searchsorted(states, canonical(new, sites)), active)


def exact_energy(params: Array) -> float:
    """The energy of the amplitude, without sampling."""
    all_ = configurations(len(params))
    value = np.asarray(jax.jit(jax.vmap(log_psi, (None, 0)))(params, all_.spins))
    psi = np.exp(value - np.max(value))
    acted = psi * np.sum(all_.spins * np.roll(all_.spins, -1, 1), 1) - 2 * np.sum(all_.active * psi[all_.leads_to], 1)
    return float(np.sum(all_.sizes * psi * acted) / np.sum(all_.sizes * psi**2))


@dataclasses.dataclass(frozen=True)
class Arrival:
    """The time and the steps that a run took to come near the energy, or in all, and its last error."""

    seconds: float
    steps: int
    error: float

    @property
    def near(self) -> bool:
        """Whether the run arrived."""
        return abs(self.error) < NEAR

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s, {self.steps} steps{'' if self.near else f', at {self.error:.1e}'}"


def arrival(run: Callable[[], Iterator[Array]], target: float) -> Arrival:
    """Run until the energy is near. The seconds are processor time of all threads, without compiling and evaluating."""
    going = run()
    next(going)
    seconds, steps, error = 0.0, 0, np.inf
    begin = time.process_time()
    for params in going:
        seconds, steps = seconds + time.process_time() - begin, steps + TOGETHER
        error = exact_energy(params) - target
        if abs(error) < NEAR or not np.isfinite(error):
            break
        begin = time.process_time()
    return Arrival(seconds, steps, error)


def rows(sizes: Sizes) -> list[Row]:
    """Processor time until the energy of a chain of 22 is within 1e-3, summed over all configurations, beside NetKet."""
    sites, samples = (SITES, SAMPLES) if sizes.shrink == 1 else (8, 100)
    with jax.enable_x64(True):
        target = EXACT if sites == SITES else exact_energy(list(ours(0, sites, samples))[-1])
        return [line(seed, sites, samples, target) for seed in range(SEEDS if sites == SITES else 1)]


def line(seed: int, sites: int, samples: int, target: float) -> Row:
    """A row: both libraries from one seed, NetKet at its better rate."""
    case = f"{sites} sites, seed {seed}"
    mine = arrival(lambda: ours(seed, sites, samples), target)
    try:
        tried = [arrival(functools.partial(theirs, rate, seed, sites, samples), target) for rate in RATES]
    except Unsuited as reason:
        return Row(case, "", str(mine), "", f"within {NEAR:g}", "yes" if mine.near else "NO", str(reason))
    peer = min(tried, key=lambda run: (not run.near, run.seconds))
    reached = "yes" if mine.near and not (peer.near and peer.seconds < mine.seconds) else "NO"
    note = f"{samples} samples, {FILTERS} filters"
    return Row(case, str(peer), str(mine), f"{peer.seconds / mine.seconds:.1f}", "at least 1", reached, note)
