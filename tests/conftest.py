"""What holds for every test: float64 available, no silent promotion, one fixed key, and compiling kept cheap."""

import os
import pathlib

# Nearly all the time of the suite is XLA compiling programs that run once. CI runs the suite both ways: set this to 0 for the
# optimised programs that users run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# What was compiled once is kept for the next run on this machine; CI compiles everything anew. `rm -r .jax_cache` forgets it.
if "CI" not in os.environ:
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    # XLA tells at length, for each program it loads, of two preferences that it compiled with and that are no features.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import pytest

jax.config.update("jax_enable_x64", True)


@pytest.fixture(autouse=True)
def strict(request):
    """Every dtype and rank promotion in our code is written out; tests of other libraries' code opt out with `relaxed`."""
    if request.node.get_closest_marker("relaxed"):
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Let go of a module's compiled programs, which take gigabytes together."""
    yield
    jax.clear_caches()


@pytest.fixture
def key():
    """The one random key of the suite; tests split it."""
    return jax.random.key(20261122)
