"""Other libraries, where they can be had: distrax needs TFP, which not every JAX here can import."""

import concurrent.futures
import importlib
import importlib.util
import multiprocessing
import warnings

import pytest


def library(name):
    """The module, or a visible skip."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except (ImportError, AttributeError) as error:
            pytest.skip(f"{name} does not import here: {error}")


def from_a_process(name, results):
    """What a function finds with a library in a process of its own, or a visible skip where it gives a string that says why.

    NetKet's import sets a device mesh for all of JAX, which changes array types.
    """
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"no module named {name}")
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(results).result()
    if isinstance(found, str):
        pytest.skip(found)
    return found
