"""Run every Python block of Markdown files, and compare the text block that follows it with what it printed.

    python .ci/snippets.py [--write] FILE_OR_FOLDER ...

A file's blocks run in order in one namespace; for a folder, those of every page in it. With ``--write`` the text blocks are
written, one after each block that printed something.
"""

import contextlib
import io
import os
import pathlib
import platform
import re
import sys
import time
import warnings

# Compiling programs that run once takes nearly all the time of these blocks. JAX reads this variable when it is imported.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# A block is written with the instructions of its author's machine, and checked with those that every machine has. These round
# sums of products differently, so digits that depend on the machine, such as those of an offset near zero, are found here.
if "--write" not in sys.argv and platform.machine() == "x86_64":
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_max_isa=SSE4_2"

import jax

BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)


def run(path: pathlib.Path, write: bool) -> int:
    """Run the blocks of one file, and return their number."""
    text = path.read_text()
    namespace: dict[str, object] = {}
    # Warnings are errors, so that no page shows deprecated functions of other libraries.
    warnings.simplefilter("error")

    def run_block(block: re.Match[str]) -> str:
        line = text.count("\n", 0, block.start(1))
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            # Blank lines in front make the line numbers of a traceback those of the file.
            exec(compile("\n" * line + block[1], str(path), "exec"), namespace)
        said = "".join(f"{row.rstrip()}\n" for row in out.getvalue().splitlines())
        if not write and block[2] is not None and said != block[2]:
            sys.exit(f"{path}, line {line}: the block printed\n{said}but the page says\n{block[2]}")
        return f"```python\n{block[1]}```" + (f"\n\n```text\n{said}```" if said else "")

    # A page that turns on float64 must not change the output of later pages, since a reader runs each page by itself.
    float64 = jax.config.read("jax_enable_x64")
    made, count = BLOCK.subn(run_block, text)
    jax.config.update("jax_enable_x64", float64)
    if write and made != text:
        path.write_text(made)
    return count


for given in [pathlib.Path(name) for name in sys.argv[1:] if name != "--write"]:
    for page in sorted(given.rglob("*.md")) if given.is_dir() else [given]:
        start = time.process_time()
        count = run(page, "--write" in sys.argv)
        if count:
            print(f"{page}: {count} Python blocks ran, {time.process_time() - start:.0f} s of CPU", flush=True)
        elif page == given:
            sys.exit(f"{page}: no Python blocks found")
