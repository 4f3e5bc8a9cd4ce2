"""Other libraries, where they can be had: distrax needs TFP, which not every JAX here can import."""

import importlib
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
