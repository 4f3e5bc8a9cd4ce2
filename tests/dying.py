"""One of two processes that work together until the second dies; run by `test_sharding` with its number and a port."""

import os
import signal
import sys
import time

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxfisher as jf

STEPS, DEATH, PATIENCE = 10**6, 3, 5


def model(params, x):
    return jf.Normal(x @ params, 1.0)


def main():
    number, port = map(int, sys.argv[1:])
    patience = {"heartbeat_timeout_seconds": PATIENCE, "shutdown_timeout_seconds": PATIENCE}
    jax.distributed.initialize(f"localhost:{port}", 2, number, **patience)
    mesh = jax.make_mesh((2,), ("examples",), axis_types=(AxisType.Auto,))
    everywhere, apart = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("examples",)))
    x = jax.make_array_from_process_local_data(apart, np.ones((4, 3), np.float32))
    params = jax.make_array_from_process_local_data(everywhere, np.ones(3, np.float32))
    trace = jax.jit(lambda params, x: jf.exact_fisher(model)(params, x).trace(), out_shardings=everywhere)
    for k in range(STEPS):
        print(float(trace(params, x)), time.time(), flush=True)
        if number == 1 and k == DEATH:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
