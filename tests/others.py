"""Other libraries, if they can be imported: distrax needs TFP, which does not import on every version of JAX."""

import concurrent.futures
import importlib
import importlib.util
import multiprocessing
import warnings

import pytest


def library(name):
    """The module; if it does not import, the test is skipped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except (ImportError, AttributeError) as error:
            pytest.skip(f"{name} does not import here: {error}")


def from_a_process(name, results):
    """The results of a function that uses a library in a separate process. If it returns a string, the test is skipped with it.

    The process is separate because importing NetKet sets a device mesh for all of JAX, which changes array types.
    """
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"no module named {name}")
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(results).result()
    if isinstance(found, str):
        pytest.skip(found)
    return found
