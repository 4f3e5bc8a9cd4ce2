"""What holds for every test: float64 available, no silent promotion, one fixed key, and compiling kept cheap."""

import contextlib
import importlib.metadata
import os
import pathlib

# Nearly all the time of the suite is XLA compiling programs that run once. CI runs the suite both ways: set this to 0 for the
# optimised programs that users run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
OPTIMISED = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "0"
# A program takes the older code generator, which JAX had until 0.10, half the time that it takes the newer one.
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) <= (0, 10):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1")
# No test reads where in the source an operation of a compiled program comes from.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
os.environ.setdefault("JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS", "0")
# What was compiled once is kept for the next run on this machine; CI begins with nothing. `rm -r .jax_cache` forgets it.
if "CI" not in os.environ:
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    # XLA tells at length, for each program it loads, of two preferences that it compiled with and that are no features.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import pytest
import stack

jax.config.update("jax_enable_x64", True)
stack.lower_in_one_context()


def pytest_collection_finish():
    stack.look_for_garbage_seldom()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run each test with room on the stack."""
    pyfuncitem.obj = stack.with_room(pyfuncitem.obj)


@pytest.fixture(autouse=True)
def one_place():
    """Do not look where an operation is traced, see `stack.one_place`."""
    with stack.one_place():
        yield


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
    stack.forget_context()


@pytest.fixture
def in_numpy(request):
    """For tests of numbers, which are the same whoever computes them: nothing is compiled, see `programs.evaluate.in_numpy`.

    Where a whole module asks for it, tests of what compiled programs do opt out with `compiled`. Where the optimised programs
    are tested, those of such tests are too.
    """
    from programs.evaluate import in_numpy

    compiled = OPTIMISED or request.node.get_closest_marker("compiled")
    with contextlib.nullcontext() if compiled else in_numpy():
        yield


@pytest.fixture(scope="session")
def key():
    """The one random key of the suite; tests split it."""
    return jax.random.key(20261122)
