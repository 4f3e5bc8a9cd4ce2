"""The setting of every test: float64 is available, nothing is promoted silently, one key is fixed, and compiling is cheap."""

import contextlib
import importlib.metadata
import os
import pathlib

# Nearly all the time of the suite is XLA compiling programs that run once. CI runs the suite both ways: set this to 0 for the
# optimised programs that users run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
OPTIMISED = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "0"
# The older code generator, which was JAX's default until 0.10, takes half the time of the newer one for a program.
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) <= (0, 10):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1")
# No test needs the place in the source that an operation of a compiled program comes from.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
os.environ.setdefault("JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS", "0")
# To leave JAX's frames out of a traceback takes JAX a fifth of the time of a test that expects an error.
os.environ.setdefault("JAX_TRACEBACK_FILTERING", "off")
# Compiled programs are cached for the next run on this machine; CI starts without a cache. `rm -r .jax_cache` deletes it.
if "CI" not in os.environ:
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    # For each program that it loads, XLA warns at length of two compile options that are not features of the machine.
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
    """Run each test with more room on the stack, see `stack.with_room`."""
    pyfuncitem.obj = stack.with_room(pyfuncitem.obj)


@pytest.fixture(autouse=True)
def one_place():
    """Do not record where an operation is traced, see `stack.one_place`."""
    with stack.one_place():
        yield


@pytest.fixture(autouse=True)
def strict(request):
    """Make JAX refuse implicit promotions of dtypes and ranks. Tests of other libraries' code opt out with `relaxed`."""
    if request.node.get_closest_marker("relaxed"):
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Free a module's compiled programs, which take gigabytes together."""
    yield
    jax.clear_caches()
    stack.forget_context()


@pytest.fixture
def in_numpy(request):
    """Run a test in NumPy without compiling, see `programs.evaluate.in_numpy`: for tests whose subject is a number.

    If a whole module uses the fixture, tests of the behaviour of compiled programs opt out with `compiled`. If the suite runs
    optimised programs, the fixture does nothing.
    """
    from programs.evaluate import in_numpy

    compiled = OPTIMISED or request.node.get_closest_marker("compiled")
    with contextlib.nullcontext() if compiled else in_numpy():
        yield


@pytest.fixture(scope="session")
def key():
    """The one random key of the suite; tests split it."""
    return jax.random.key(20261122)
