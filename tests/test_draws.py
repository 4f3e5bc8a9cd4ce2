"""Keys by hashing: their numbers are uniform, and independent of those of other positions, examples, steps and seeds."""

import jax
import jax.numpy as jnp
import numpy as np
from programs.evaluate import evaluated

import jaxfisher as jf
from jaxfisher._draws import draw_keys

SEEDS, STEPS, EXAMPLES, PLACES = 4, 16, 64, 32


def words(keys):
    return np.asarray(jax.vmap(lambda key: jax.random.bits(key, (PLACES,), jnp.uint32))(keys.reshape(-1)))


def all_keys():
    """Keys of consecutive seeds, steps and examples."""
    made = [[draw_keys(seed, jnp.asarray(t), EXAMPLES, hashed=True) for t in range(STEPS)] for seed in range(SEEDS)]
    return jnp.stack([jnp.stack(row) for row in made])


def bits_of(keys):
    """The bits of each number, as -1 and 1, shape ``[seeds, steps, examples, places, 32]``."""
    numbers = words(keys).reshape(*keys.shape[:3], PLACES)
    return 2.0 * ((numbers[..., None] >> np.arange(32)) & 1) - 1


def test_every_bit_is_a_fair_coin_alone_and_beside_its_neighbours():
    """Means, and products of numbers that differ by one position, example, step or seed, within five standard errors.

    The same holds for keys that were split or folded, and for products of their numbers with those of the original keys.
    """
    keys = all_keys()
    for made in (keys, jax.vmap(lambda key: jax.random.split(key, 16))(keys[0, 0]).T[None], folded(keys)):
        assert_fair(bits_of(made))
    near = bits_of(keys[:, :, :1]) * bits_of(folded(keys)[:, :, :1])
    assert np.max(np.abs(np.mean(near, (0, 1, 2, 3)))) < 5 / np.sqrt(near[..., 0].size)


def folded(keys):
    fold = jax.random.fold_in
    for _ in range(3):
        fold = jax.vmap(fold, (0, None))
    return fold(keys, 1)


def assert_fair(bits):
    count = bits[..., 0].size
    assert np.max(np.abs(np.mean(bits, (0, 1, 2, 3)))) < 5 / np.sqrt(count)
    for axis in range(4):
        if bits.shape[axis] > 1:
            product = bits * np.roll(bits, 1, axis)
            assert np.max(np.abs(np.mean(product, (0, 1, 2, 3)))) < 5 / np.sqrt(count), axis
    # Pairs of bits of one number.
    pairs = bits.reshape(-1, 32).T @ bits.reshape(-1, 32) / count
    assert np.max(np.abs(pairs - np.eye(32))) < 5.5 / np.sqrt(count)


def test_numbers_of_sixty_four_and_of_eight_bits_are_whole():
    keys = draw_keys(0, jnp.asarray(0), 512, hashed=True)
    for dtype, width in ((jnp.uint64, 64), (jnp.uint8, 8)):
        numbers = np.asarray(jax.vmap(lambda key, dtype=dtype: jax.random.bits(key, (64,), dtype))(keys))
        bits = (numbers[..., None] >> np.arange(width, dtype=numbers.dtype)) & 1
        assert numbers.dtype == dtype and np.max(np.abs(np.mean(bits, (0, 1)) - 0.5)) < 5 * 0.5 / np.sqrt(numbers.size)


def test_targets_are_drawn_from_the_prediction():
    """The frequencies of three classes over a million draws at neighbouring keys, within five standard errors."""
    probs = jnp.array([0.1, 0.3, 0.6])
    draw = jax.jit(jax.vmap(jf.Categorical(jnp.log(probs)).sample))
    counts = np.bincount(np.asarray(draw(draw_keys(3, jnp.asarray(9), 10**6, hashed=True))), minlength=3)
    np.testing.assert_array_less(np.abs(counts / 1e6 - probs), 5 * np.sqrt(probs * (1 - probs) / 1e6))


def test_a_family_that_needs_threefry_has_it():
    """`jax.random.poisson` takes only threefry keys. With three counts per example, a step has factors of drawn targets."""
    model = lambda w, x: jf.Poisson(x @ w)  # noqa: E731
    x, y = jnp.ones((4, 2)), jnp.ones((4, 3), jnp.int32)
    step = jf.training_step(model, jf.kfac())
    w = jnp.zeros((2, 3))
    new, _, loss = jax.jit(step)(w, step.init(w, x, y), x, y)
    assert np.all(np.isfinite(new)) and loss == 3
    assert not jf.Joint((jf.Poisson(0.0), jf.Normal(0.0, 1.0)))._takes_any_key
    assert jf.Joint((jf.Bernoulli(0.0), jf.Normal(0.0, 1.0)))._takes_any_key


def test_bits_in_numpy_are_those_of_jax():
    """Other tests rely on these: bits of every width, from one key and from several."""
    keys = jax.random.split(jax.random.key(5), 6).reshape(2, 3)
    for dtype in (jnp.uint8, jnp.uint16, jnp.uint32, jnp.uint64):
        draw = lambda keys, dtype=dtype: (  # noqa: E731
            jax.vmap(jax.vmap(lambda key: jax.random.bits(key, (3, 2), dtype)))(keys),
            jax.random.bits(keys[0, 0], (), dtype),
        )
        for ours, theirs in zip(evaluated(draw, keys), jax.jit(draw)(keys), strict=True):
            assert ours.dtype == dtype and np.array_equal(ours, theirs)
