"""Data spread over devices: the same steps, and nothing of the size of all gradients is sent around."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
from sharded import EXAMPLES

RUN = pathlib.Path(__file__).with_name("sharded.py")
PARAMETERS = 6 * 8 + 8 + 8 * 3


def test_eight_devices_take_the_step_of_one():
    """On meshes with automatic axes as it is, with explicit ones through ``jax.sharding.auto_axes``."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    run = subprocess.run([sys.executable, str(RUN)], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert [(each["name"], each["kind"]) for each in found] == [
        ("exact", "Auto"),
        ("exact", "Explicit"),
        ("empirical", "Auto"),
        ("diagonal", "Auto"),
        ("kfac", "Auto"),
    ]
    for each in found:
        # The condition of F + damping is below 1e3.
        assert each["off"] <= 1e3 * np.finfo(np.float64).eps, each
        assert max(each["gathered"], default=0) <= EXAMPLES * EXAMPLES < EXAMPLES * PARAMETERS, each
