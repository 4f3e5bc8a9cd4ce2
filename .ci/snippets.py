"""Run every Python block of Markdown files, and hold the text block that follows one to what it printed.

    python .ci/snippets.py [--write] FILE_OR_FOLDER ...

A file's blocks run in order in one namespace; of a folder, those of every page in it. With ``--write`` the text blocks are
made: one after each block that printed something.
"""

import contextlib
import io
import os
import pathlib
import re
import sys
import time
import warnings

# Nearly all the time of these blocks is XLA compiling programs that run once. JAX reads this when it is imported.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax

BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)


def run(path: pathlib.Path, write: bool) -> int:
    """Run the blocks of one file; how many there are."""
    text = path.read_text()
    namespace: dict[str, object] = {}
    # What another library deprecates must not stay on a page for readers to copy.
    warnings.simplefilter("error")

    def run_block(block: re.Match[str]) -> str:
        line = text.count("\n", 0, block.start(1))
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            # Blank lines in front keep the line numbers of a traceback those of the file.
            exec(compile("\n" * line + block[1], str(path), "exec"), namespace)
        said = "".join(f"{row.rstrip()}\n" for row in out.getvalue().splitlines())
        if not write and block[2] is not None and said != block[2]:
            sys.exit(f"{path}, line {line}: the block printed\n{said}but the page says\n{block[2]}")
        return f"```python\n{block[1]}```" + (f"\n\n```text\n{said}```" if said else "")

    # A page that turns on float64 must not change what the pages after it print: a reader starts each of them afresh.
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
