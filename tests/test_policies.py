"""Trust-region updates of policies: losses with advantages of either sign, and a KL radius that holds at every update."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxfisher as jf

pytestmark = pytest.mark.usefixtures("in_numpy")

RADIUS = 0.02


def gaussian(params, seen):
    return jf.Normal(jnp.tanh(seen @ params["w"]) @ params["v"], jnp.exp(params["log_scale"]))


def categorical(params, seen):
    return jf.Categorical(logits=jnp.tanh(seen @ params["w"]) @ params["v"])


def gaussian_kl(old, new):
    ratio = (old.scale / new.scale) ** 2
    return 0.5 * (ratio + ((old.loc - new.loc) / new.scale) ** 2 - 1 - np.log(ratio))


def categorical_kl(old, new):
    logs = [p.logits - np.log(np.sum(np.exp(p.logits), axis=-1, keepdims=True)) for p in (old, new)]
    return np.sum(np.exp(logs[0]) * (logs[0] - logs[1]), axis=-1)


def surrogate_of(policy):
    log_probs = jax.vmap(jf.log_likelihood(policy), (None, 0, 0))

    def surrogate(params, seen, target):
        acted, advantage, old = target
        return -jnp.mean(advantage * jnp.exp(log_probs(params, seen, acted) - old))

    return surrogate, log_probs


def trpo(radius=RADIUS):
    return optax.chain(jf.natural_gradient(1e3, damping=1e-3, radius=0.7 * radius), jf.backtrack_kl(radius))


@pytest.mark.parametrize(
    ("policy", "outputs", "kl"), [(gaussian, (), gaussian_kl), (categorical, (3,), categorical_kl)], ids=["torque", "choice"]
)
def test_every_update_stays_inside_the_radius_and_gains(policy, outputs, kl, key):
    keys = jax.random.split(key, 3)
    params = {"w": jax.random.normal(keys[0], (2, 4)), "v": jax.random.normal(keys[1], (4, *outputs))}
    params |= {} if outputs else {"log_scale": jnp.zeros(())}
    surrogate, log_probs = surrogate_of(policy)
    step = jf.training_step(policy, opt := trpo(), loss=surrogate)

    def one(params, key):
        keys = jax.random.split(key)
        seen = jax.random.normal(keys[0], (60, 2))
        acted = jax.vmap(lambda seen, key: policy(params, seen).sample(key))(seen, jax.random.split(keys[1], 60))
        advantage = jnp.sin(3.0 * acted.astype(seen.dtype) + seen[:, 0])
        target = acted, advantage, log_probs(params, seen, acted)
        new, state, before = step(params, opt.init(params), seen, target)
        predicted = [jax.vmap(policy, (None, 0))(each, seen) for each in (params, new)]
        return new, (state[-1].moved, predicted, before - surrogate(new, seen, target), jnp.min(advantage))

    _, (moved, predicted, gained, least) = jax.jit(lambda: jax.lax.scan(one, params, jax.random.split(keys[2], 4)))()
    by_hand = np.mean(kl(*jax.tree.map(np.asarray, predicted)), axis=-1)
    np.testing.assert_allclose(moved, by_hand, rtol=1e-5)  # the state is in float32
    assert np.all(by_hand > 0.1 * RADIUS) and np.all(by_hand <= RADIUS * (1 + 1e-6))
    assert np.all(gained > 0) and np.all(least < 0)


def test_a_step_of_known_length():
    """The Fisher of a unit normal's mean is one, so the longest step within the radius is the root of twice the radius."""
    policy = lambda mean, seen: jf.Normal(mean + 0.0 * seen, 1.0)  # noqa: E731
    surrogate, log_probs = surrogate_of(policy)
    seen, acted, advantage = jnp.zeros(4), jnp.array([1.0, 2.0, -1.0, 0.5]), jnp.array([-2.0, 1.0, -1.0, 0.5])
    target = acted, advantage, log_probs(0.0, seen, acted)
    opt = jf.natural_gradient(1e3, damping=1e-6, radius=RADIUS)
    new, _, _ = jf.training_step(policy, opt, loss=surrogate)(0.0, opt.init(0.0), seen, target)
    uphill = np.sign(np.mean(np.asarray(advantage) * np.asarray(acted)))
    np.testing.assert_allclose(new, uphill * np.sqrt(2 * RADIUS), rtol=1e-5)
