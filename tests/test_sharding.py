"""Examples and parameters sharded over devices: the answers of one device, with bounded communication and memory."""

import inspect
import json
import math
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from sharded import EXAMPLES

import jaxfisher as jf

PARAMETERS = 6 * 8 + 8 + 8 * 3
SHARED, NUMBERS = 128, 21**2 + 25**2 + 24**2 + 5**2
"""The number of examples in `shares.py`, and the size of the largest sum over examples there: that of Kronecker factors."""


def said(script, devices):
    """The lines of JSON that a script prints when it runs on this many virtual devices."""
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={devices}"
    # `NPROC` sets the number of threads, by default one per device. A thread that waits for other devices is blocked, and if
    # devices reach several collective operations in different orders, all of them wait forever.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "NPROC": "64"}
    command = [sys.executable, str(pathlib.Path(__file__).with_name(script))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_give_the_answers_of_one(count):
    """Each process has its own share of the examples, and draws for an example do not depend on the process that holds it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(pathlib.Path(__file__).with_name("processes.py"))]
    # Without the compilation cache: a program that some processes load and others compile was seen to fail.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    running = [subprocess.Popen([*command, str(k), str(count), str(port)], **pipes) for k in range(count)]
    said = [process.communicate(timeout=900) for process in running]
    assert all(process.returncode == 0 for process in running), [errors for _, errors in said]
    # The library that sends numbers between processes prints to the same stream.
    found = [json.loads(line) for line in said[0][0].splitlines() if line.startswith("{")]
    assert [each["name"] for each in found] == ["Kronecker", "in pieces", "natural gradient", "sampled", "step"]
    for each in found:
        # The condition of F + damping is below 1e3.
        assert each["off"] <= 1e3 * np.finfo(np.float64).eps, each


def test_inside_shard_map_each_device_has_the_answers_for_its_own_examples():
    """With ``check_vma=True``, the default, where JAX knows that parameters are replicated and data vary, and without."""
    *found, refused = said("mapped.py", 2)
    assert len(found) == 21
    for each in found:
        # The condition of F + damping is below 1e3.
        assert each["off"] <= 1e3 * np.finfo(np.float64).eps, each
    assert refused["name"] == "LSMR" and "jf.CG()" in refused["says"]


def test_examples_spread_over_explicit_axes_give_the_answers_of_one_device():
    """Explicit axes are the default of ``jax.make_mesh``."""
    found = said("explicit.py", 2)
    assert len(found) == 43
    for each in found:
        # Conjugate gradients stop at a relative residual of 1e-12, for a condition number of about ten.
        assert each["off"] <= (1e-11 if each["name"] == "CG" else 1e3 * np.finfo(np.float64).eps), each


def test_eight_devices_take_the_step_of_one():
    """On meshes with automatic axes and with explicit ones."""
    found = said("sharded.py", 8)
    assert [(each["name"], each["kind"]) for each in found] == [
        ("exact", "Auto"),
        ("exact", "Explicit"),
        ("empirical", "Auto"),
        ("diagonal", "Auto"),
        ("kfac", "Auto"),
        ("residuals", "Auto"),
        ("residuals", "Explicit"),
        ("accumulate", "Auto"),
        ("check_fisher", "Auto"),
    ]
    for each in found:
        # The condition of F + damping is below 1e3. A KL along a short displacement is a difference of near numbers.
        bound = 1e4 if each["name"] == "check_fisher" else 1e3
        assert each["off"] <= bound * np.finfo(np.float64).eps, each
        assert max(each["gathered"], default=0) <= EXAMPLES * EXAMPLES < EXAMPLES * PARAMETERS, each


def test_a_solve_by_rows_that_are_spread_is_the_dense_one_and_no_device_has_the_square():
    *found, whole, pieces, centred, joined = said("spread.py", 8)
    assert len(found) == 8
    for each in found:
        eps = np.finfo(each["dtype"]).eps
        # The largest eigenvalue is below 10.
        bound = 10 / each["damping"] * 100 * eps
        assert each["rest"] <= bound and each["residual"] <= bound and each["converged"], each
    rows, block = 256, 32
    # The factors of all rows, at most 18 wide, and a block of columns of the Cholesky factor; a sum has twice as many.
    for each, size in ((whole, rows), (pieces, rows), (centred, rows), (joined, 2 * rows)):
        assert each["off"] <= 1e4 * np.finfo(np.float64).eps, each
        assert max(each["sent"]["all-gather"]) <= size * block, each
        assert max(each["sent"]["all-reduce"]) <= block**2, each
        assert each["largest"] == size**2 / 8, each
    assert max(pieces["memory"], centred["memory"]) <= 0.6 * whole["memory"]


OFTEN = {"Gram": (7, 5), "product": (2, 4), "moments": (2, 4), "implicit product": (2, 4), "loss": (4, 7)}
"""The bounds for all-gathers and all-reduces in a program from the page on scale; other programs have 2 and 5."""


def test_each_device_works_on_its_share_of_the_examples():
    """Each of eight devices does an eighth of the work, also with weights and in pieces, and sends no example to another.

    Only the Gram matrix needs the factors of all examples on every device: n T (d_in + d_out) numbers for a layer.
    """
    found = said("shares.py", 8)
    assert len(found) == 14
    for each in found:
        assert each["off"] <= 64 * np.finfo(np.float64).eps, each
        gram = each["name"] == "Gram"
        # The work with the n x n matrix, or with a solution, is done on every device, so it is not an eighth.
        share = each["products"] if gram else each["flops"]
        assert share <= (0.17 if each["name"] == "loss" else 1.2 / 8), each
        sent = each["sent"]
        assert max(sent.get("all-gather", []), default=0) <= (SHARED * (24 + 20) if gram else 8), each
        assert max(sent.get("all-reduce", []), default=0) <= (SHARED**2 if gram else NUMBERS), each
        assert set(sent) <= {"all-gather", "all-reduce"} | ({"all-to-all"} if gram else set()), each
        gathers, reduces = OFTEN.get(each["name"], (2, 5))
        assert len(sent["all-gather"]) <= gathers and len(sent["all-reduce"]) <= reduces, each


def test_work_falls_with_the_number_of_devices():
    """The work per device is inverse to the number of devices, within a fifth, for every quantity and a step of `jf.kfac`."""
    found = said("work.py", 8)
    assert len(found) == 10
    for each in found:
        one, *others = each["work"].items()
        assert others, each
        for devices, flops in others:
            assert 1 <= flops * int(devices) / one[1] <= 1.2, each


def test_each_device_inverts_its_own_factors():
    """The numbers are those of one device, also for a run that resumes from a checkpoint on half of the devices, twice.

    Sixteen factors of one size, apart from the row of a bias, are two for each of eight devices. Only the inverses are sent,
    eight of them with a row for the bias. `jf.explain` reports what each device holds.
    """
    *found, one, two, four, eight = said("apart.py", 8)
    assert [each["name"] for each in found] == ["kfac", "memory", "undamped", "factored", "by eigenvectors"]
    for each in found:
        # The condition of a damped factor is below 1e4, and rounding errors grow over seven steps.
        assert each["off"] <= (1e5 if each["name"] == "kfac" else 1e4) * np.finfo(np.float64).eps, each
    numbers, work = 16 * 256**2 + 8 * 257, 16 * 256**3
    for each in (one, two, four, eight):
        share = 1 / each["devices"]
        assert share <= each["flops"] / one["flops"] <= 1.2 * share, each
        # The program has a branch for each device.
        assert each["factored"] == each["devices"] * [work // each["devices"]], each
        assert each["devices"] == 1 or numbers <= sum(each["sent"].pop("all-gather")) <= 1.05 * numbers
        assert not each["sent"], each


def test_what_the_page_on_scale_says_of_costs_is_what_is_compiled():
    """Operations agree within a tenth and received numbers almost exactly, on eight devices and on one with an equal share."""
    *found, memory = said("modelled.py", 8)
    assert memory["held"] == memory["explained"] == memory["on all"] / 8
    assert [each["name"] for each in found] == [name for name in ("gradient", "Gram", "moments") for _ in range(2)]
    for many, one in zip(found[::2], found[1::2], strict=True):
        for each in (many, one):
            assert abs(each["compiled"]["flops"] / each["modelled"]["flops"] - 1) <= 0.1, each
            assert abs(each["compiled"]["received"] - each["modelled"]["received"]) <= 8, each
        # With as many examples on each device, the work per device is the same on more devices, but Gram rows are longer.
        longer = many["modelled"]["flops"] / one["modelled"]["flops"] if many["name"] == "Gram" else 1
        assert abs(many["compiled"]["flops"] / one["compiled"]["flops"] / longer - 1) <= 0.1, (many, one)


OTHERS = {"array_fields", "as_lineax", "check_laws", "family", "fisher_for", "from_matrix", "kl_divergence", "layers", "merge"}
"""The public functions that do not take examples."""


def test_every_public_function_has_the_answers_of_one_device():
    """The public functions that no other script here calls, on eight devices, with three examples of weight zero."""
    found = said("surveyed.py", 8)
    for each in found:
        # The condition of F + damping is below 1e3.
        assert each["off"] <= 1e3 * np.finfo(np.float64).eps, each
    scripts = "explicit mapped sharded shares spread apart processes surveyed work"
    text = "".join(pathlib.Path(__file__).with_name(f"{name}.py").read_text() for name in scripts.split())
    functions = {name for name, value in vars(jf).items() if inspect.isfunction(value) and not name.startswith("_")}
    assert {each["name"] for each in found} | OTHERS <= functions
    assert {name for name in functions if f"jf.{name}(" not in text} == OTHERS


def test_one_process_that_dies_ends_the_other():
    """The other process ends, with an error that says why, soon after the five seconds in which it waits for heartbeats."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(pathlib.Path(__file__).with_name("dying.py"))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": os.environ | {"JAX_PLATFORMS": "cpu"}}
    running = [subprocess.Popen([*command, str(k), str(port)], **pipes) for k in range(2)]
    try:
        said, errors = running[0].communicate(timeout=900)
        ended = time.time()
    finally:
        for process in running:
            process.kill()
            process.communicate()
    *_, (value, last) = (line.split() for line in said.splitlines() if line[0].isdigit())
    assert float(value) == 3.0, errors
    assert running[0].returncode != 0 and "another task died" in errors, errors
    assert ended - float(last) <= 30


def test_what_a_step_holds_is_spread_as_the_parameters_are():
    """The momentum and the change that is judged are sharded as the parameters are; factors and inverses are shared by rows.

    A factor of a layer's inputs and its bias, with 9 or 33 rows, is never gathered as a whole, padded or not, except to
    compute eigenvectors, which are stored with the row of the bias separate. No gather is larger than three directions of one
    layer's weights, and no array on a device is larger than that or its share of the inverses. A running mean of views keeps
    its sharding, and a device gathers for it no more than the factors of all rows for one layer.

    The numbers are those of one device, computed in NumPy. They are checked with some parameters masked, with each factor
    inverted by one device, with factors inverted by halves (also in half precision), and with complex weights.
    """
    found = said("placed.py", 4)
    ways = ("inputs over 2", "outputs over 2", "hidden over 2", "inputs over 4", "inputs and examples over 4", "both over 4")
    names = {"step": ways, "by eigenvectors": ways[4:6], "masked and apart": ways[4:5]}
    names |= {"by halves": ways[4:5], "bfloat16 by halves": ways[4:5], "complex": ways[4:5], "view": ways}
    assert [each["name"] for each in found] == [f"{what}, {way}" for what, some in names.items() for way in some]
    for each in found:
        # The condition of a damped factor is below 1e4.
        bound = 8 * jnp.finfo(jnp.bfloat16).eps if "bfloat16" in each["name"] else 1e4 * np.finfo(np.float64).eps
        assert each["off"] <= bound, each["name"]
        for shape, part, share in each["parts"]:
            assert part <= share, (each["name"], shape, part, share)
        what, layer, devices = each["name"].split(",")[0], (32, 28), int(each["name"][-1])
        joined = [shape for shape in each["gathered"] if {9, 10, 12, 33, 34, 36} & set(shape)]
        assert what == "by eigenvectors" or not joined, (each["name"], joined)
        rows, three = 8 * 28 * sum(layer), 3 * math.prod(layer)
        assert max(map(math.prod, each["gathered"])) <= (rows if what == "view" else three), each["name"]
        if what in ("step", "by eigenvectors"):
            assert each["largest"] <= max(three, 4 * 32**2 // devices), (each["name"], each["largest"])


def test_a_step_is_compiled_once():
    """From the state of `init` on, for every sharding of parameters and examples: each step keeps every array's sharding."""
    found = said("settled.py", 4)
    assert len(found) == 20
    for each in found:
        assert each["programs"] == 1 and not each["moved"], each
