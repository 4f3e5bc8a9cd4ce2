# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The ground state of a quantum magnet
#
# At the end you will know how to fit a wave function to a Hamiltonian from the wave function's own samples, what the natural
# gradient does there, and how complex amplitudes and complex parameters are handled.
#
# The magnet is Heisenberg's chain of ten spins in a ring,
#
# $$H = \sum_i \sigma^x_i \sigma^x_{i+1} + \sigma^y_i \sigma^y_{i+1} + \sigma^z_i \sigma^z_{i+1}.$$
#
# Opposite neighbours have the lowest energy, but quantum mechanics does not let all neighbours be opposite. A state is an
# amplitude for each configuration of up and down spins. Ten spins have 1024 configurations, few enough to compute the exact
# answer, which is out of reach in real problems.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxfisher as jf

jax.config.update("jax_enable_x64", True)
plt.rcParams["figure.dpi"] = 90

SITES, HIDDEN, CHAINS, STEPS = 10, 10, 400, 100

# %% [markdown]
# ## An amplitude
#
# The amplitude is a restricted Boltzmann machine with complex weights, a pure function of ONE configuration. It is holomorphic
# in its parameters, but the library needs no flag for that. The machine must also learn the signs of the amplitudes.


# %%
def log_psi(params, spins):
    return spins @ params["visible"] + jnp.sum(jnp.log(jnp.cosh(spins @ params["w"] + params["hidden"])))


def first(key):
    shapes = {"visible": (SITES,), "hidden": (HIDDEN,), "w": (SITES, HIDDEN)}
    keys = jax.random.split(key, len(shapes))
    draw = lambda key, shape: 0.05 * jax.lax.complex(*jax.random.normal(key, (2, *shape)))
    return {name: draw(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


# %% [markdown]
# ## Samples and local energies
#
# We sample by Metropolis' method: every chain proposes to exchange two spins, and accepts with probability
# $\min(1, |\psi'/\psi|^2)$. A configuration contributes the local energy $E(s) = (H\psi)(s) / \psi(s)$: each pair of opposite
# neighbours can be exchanged, with the matrix element 2.


# %%
def exchanged(spins, i, j):
    return spins.at[i].set(spins[j]).at[j].set(spins[i])


def local_energy(params, spins):
    left = jnp.arange(SITES)
    right = (left + 1) % SITES
    new = jax.vmap(exchanged, (None, 0, 0))(spins, left, right)
    ratios = jnp.exp(jax.vmap(log_psi, (None, 0))(params, new) - log_psi(params, spins))
    signs = spins[left] * spins[right]
    return jnp.sum(signs + jnp.where(signs < 0, 2 * ratios, 0))


def moved(params, spins, key):
    """One proposal for every chain."""
    keys = jax.random.split(key)
    i, j = jax.random.randint(keys[0], (2, CHAINS), 0, SITES)
    new = jax.vmap(exchanged)(spins, i, j)
    value = jax.vmap(lambda s: log_psi(params, s).real, 0)
    taken = jnp.log(jax.random.uniform(keys[1], (CHAINS,))) < 2 * (value(new) - value(spins))
    return jnp.where(taken[:, None], new, spins)


def sampled(params, spins, key):
    keys = jax.random.split(key, 2 * SITES)
    return jax.lax.scan(lambda spins, key: (moved(params, spins, key), None), spins, keys)[0]


# %% [markdown]
# ## Stochastic reconfiguration
#
# `jf.energy_gradient` computes the gradient of the energy from the local energies. The curvature is the covariance of the
# derivatives of `log_psi` over the samples, the geometric tensor; each sample has two rows, one for the real and one for the
# imaginary part. The tensor is an operator like any Fisher, and you pass it to the optimiser in the same way. A trust region
# keeps the early steps short, when samples say little. With `momentum=` of `jf.scale_by_fisher` the method would be SPRING.


# %%
def trained(opt, natural, seed=1):
    keys = jax.random.split(jax.random.key(seed), 3)

    @jax.jit
    def whole(params, spins):
        def step(carry, key):
            params, state, spins = carry
            spins = sampled(params, spins, key)
            energies = jax.vmap(local_energy, (None, 0))(params, spins)
            gradient = jf.energy_gradient(log_psi)(params, spins, energies)
            given = {"fisher": jf.empirical_fisher(log_psi, center=True)(params, spins)} if natural else {}
            updates, state = opt.update(gradient, state, params, **given)
            return (optax.apply_updates(params, updates), state, spins), (jnp.mean(energies.real), jnp.std(energies))

        carry, path = jax.lax.scan(step, (params, opt.init(params), spins), jax.random.split(keys[2], STEPS))
        return carry[0], path

    antiparallel = jnp.tile(jnp.array([1.0, -1.0]), SITES // 2)
    spins = jax.vmap(lambda key: jax.random.permutation(key, antiparallel))(jax.random.split(keys[1], CHAINS))
    return whole(first(keys[0]), spins)


rate = optax.scale_by_learning_rate(0.02)
runs = {
    "gradient": trained(rate, natural=False),
    "natural gradient": trained(optax.chain(jf.scale_by_fisher(1e-2), rate, jf.scale_to_kl(3e-3)), natural=True),
}

# %% [markdown]
# ## Against the exact answer
#
# The exact answer is the lowest eigenvector of the Hamiltonian, written as a matrix.


# %%
def matrix():
    paulis = [np.array([[0, 1], [1, 0]]), np.array([[0, -1j], [1j, 0]]), np.array([[1, 0], [0, -1]])]
    whole = np.zeros((2**SITES, 2**SITES))
    for i in range(SITES):
        for pauli in paulis:
            parts = [pauli if k in (i, (i + 1) % SITES) else np.eye(2) for k in range(SITES)]
            product = parts[0]
            for part in parts[1:]:
                product = np.kron(product, part)
            whole += product.real
    return whole


values, vectors = np.linalg.eigh(matrix())
exact, ground = values[0], vectors[:, 0]
states = jnp.array([[1.0 - 2 * (n >> (SITES - 1 - k) & 1) for k in range(SITES)] for n in range(2**SITES)])


def correlations(weights):
    """Of a spin with those 1 to 5 sites on."""
    return [float(jnp.sum(weights * states[:, 0] * states[:, r]) / jnp.sum(weights)) for r in range(1, SITES // 2 + 1)]


allowed = jnp.sum(states, 1) == 0  # exchanges keep the number of spins that are up
for name, (params, (energy, _)) in runs.items():
    psi = jnp.where(allowed, jnp.exp(jax.vmap(log_psi, (None, 0))(params, states)), 0)
    overlap = abs(np.vdot(ground, psi)) ** 2 / float(jnp.vdot(psi, psi).real)
    print(f"{name}: energy {float(jnp.mean(energy[-10:])):.3f} of {exact:.3f}, overlap with the ground state {overlap:.4f}")

# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
distances = np.arange(1, SITES // 2 + 1)
for name, (params, (energy, spread)) in runs.items():
    axes[0].semilogy(np.abs(energy - exact) / abs(exact), label=name)
    axes[1].semilogy(spread / abs(exact), label=name)
    psi = jnp.where(allowed, jnp.exp(jax.vmap(log_psi, (None, 0))(params, states)), 0)
    axes[2].plot(distances, correlations(jnp.abs(psi) ** 2), "o-", label=name)
axes[2].plot(distances, correlations(jnp.asarray(ground) ** 2), "k_", markersize=16, label="exact")
axes[0].set(xlabel="step", ylabel="relative error of the energy", title="The energy")
axes[1].set(xlabel="step", ylabel="spread of local energies, relative", title="It falls as the state arrives")
axes[2].set(xlabel="distance", ylabel="correlation of two spins", title="What the state knows")
axes[2].set_xticks(distances)
axes[2].legend(fontsize=8)
plt.show()

# %% [markdown]
# Both runs have the same rate, number of samples and initial parameters. The spread of the local energies, in the middle, needs
# no exact answer: at an eigenstate every configuration has the same local energy, so a spread near zero says that the run has
# converged. That is also why samples are enough: the noise of the gradient vanishes with the spread.
#
# ## What to remember
#
# - A wave function is a function of one configuration; `jf.empirical_fisher(log_psi, center=True)` is its geometric tensor.
# - Complex weights are two real numbers each. Holomorphic amplitudes need no flag, and other amplitudes lose no derivatives.
# - `jf.energy_gradient` returns a direction of steepest ascent. `jax.grad` of a loss of your own returns its conjugate.
# - The library does not sample. The page of the documentation on this job says what else it leaves to others.
