"""Execute notebooks/*.py, each from its first cell in a fresh kernel, and check that the .ipynb next to it has the same cells.

    python .ci/notebooks.py [NAMES] [--but NAMES]    run, and fail if a run or the comparison fails
    python .ci/notebooks.py --write [NAMES]  run, and write the outputs to the .ipynb

NAMES are beginnings of file names, such as 01 or 03_empirical; without any, every notebook is run.
"""

import argparse
import base64
import io
import os
import pathlib
import resource
import sys
import time

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "notebooks"
MAX_BYTES = 400_000


def execute(notebook: nbformat.NotebookNode) -> None:
    """Run the cells in place; an exception or anything on stderr, such as a warning, raises."""
    # Without execution times, a run with the same outputs changes no file. The log level hides a warning about unencrypted TCP.
    client = NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],
    )
    client.execute(cwd=str(FOLDER))
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise RuntimeError(f"a cell wrote to stderr:\n{cell.source}\n{output.text}")


def sources(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """The cells as the author wrote them, without outputs."""
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def check_pair(script: pathlib.Path, notebook: nbformat.NotebookNode) -> None:
    """Raise unless the committed .ipynb has the script's cells."""
    paired = script.with_suffix(".ipynb")
    again = f"run python .ci/notebooks.py --write {script.stem}"
    if not paired.exists():
        raise RuntimeError(f"{paired.name} is missing: {again}")
    if sources(nbformat.read(paired, as_version=4)) != sources(notebook):
        raise RuntimeError(f"the cells of {paired.name} are not those of {script.name}: {again}")


def lighten(notebook: nbformat.NotebookNode) -> None:
    """Reduce the pictures to a palette of 256 colours: plots need no more, and take a third of the bytes."""
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if "image/png" in output.get("data", {}):
            picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB")
            small = io.BytesIO()
            picture.quantize(256, dither=Image.Dither.NONE).save(small, "png", optimize=True)
            output.data["image/png"] = base64.b64encode(small.getvalue()).decode()


def write_pair(script: pathlib.Path, notebook: nbformat.NotebookNode) -> None:
    """Write the executed notebook, the same bytes for the same outputs."""
    lighten(notebook)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"  # jupytext draws ids at random
    notebook.metadata.get("language_info", {}).pop("version", None)
    text = nbformat.writes(notebook)
    if len(text) > MAX_BYTES:
        raise RuntimeError(f"{script.stem}.ipynb would have {len(text):,} bytes; {MAX_BYTES:,} are allowed")
    script.with_suffix(".ipynb").write_text(text + "\n")


def processor_seconds() -> float:
    """Processor time of the kernels that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Run the notebooks given on the command line, print the time of each, and exit with 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the .ipynb")
    parser.add_argument("--but", nargs="+", default=[], metavar="NAME", help="not those whose names begin with this")
    parser.add_argument("names", nargs="*", default=[""], help="beginnings of names")
    options = parser.parse_args()

    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # SciPy's BLAS threads compete with XLA's
    failed = []
    for name in options.names:
        scripts = sorted(FOLDER.glob(f"{name}*.py"))
        if not scripts:
            sys.exit(f"no notebook's name begins with {name!r}")
        for script in (script for script in scripts if not script.name.startswith(tuple(options.but))):
            notebook = jupytext.read(script)
            start, used = time.perf_counter(), processor_seconds()
            try:
                if not options.write:
                    check_pair(script, notebook)
                execute(notebook)
                if options.write:
                    write_pair(script, notebook)
            except (CellExecutionError, RuntimeError) as error:
                failed.append(script.stem)
                print(f"{script.stem}: FAILED\n{error}", flush=True)
                continue
            wall, cpu = time.perf_counter() - start, processor_seconds() - used
            print(f"{script.stem}: {wall:.1f} s, {cpu:.1f} s of processor", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
