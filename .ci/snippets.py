"""Run every Python block of the Markdown files named, each file's blocks in order in one namespace."""

import pathlib
import re
import sys

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

for name in sys.argv[1:]:
    text = pathlib.Path(name).read_text()
    namespace: dict[str, object] = {}
    blocks = list(BLOCK.finditer(text))
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        # Blank lines in front keep the line numbers of a traceback those of the file.
        exec(compile("\n" * line + block.group(1), name, "exec"), namespace)
    if not blocks:
        sys.exit(f"{name}: no Python blocks found")
    print(f"{name}: {len(blocks)} Python blocks ran")
