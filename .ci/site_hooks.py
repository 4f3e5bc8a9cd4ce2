"""The parts of the site besides the pages in ``docs/``: notebooks, benchmarks, test modules, mathematics. Run by mkdocs."""

import ast
import base64
import functools
import html
import json
import pathlib
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from site_docstrings import PUBLIC, ROOT
from site_figures import figures, flow

# --- every public name has its entry in the reference ----------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> None:
    """Refuse to build if a public name has no entry or several, or if an entry is for no public name."""
    text = "\n".join(page.read_text() for page in sorted(pathlib.Path(config.docs_dir, "api").glob("*.md")))
    entries = re.findall(r"^::: (jaxfisher[\w.]*)$", text, re.MULTILINE)
    wrong = {
        "without an entry": PUBLIC - set(entries),
        "that are not public": set(entries) - PUBLIC,
        "with several entries": {name for name in entries if entries.count(name) > 1},
    }
    said = [f"names {what} in docs/api: {', '.join(sorted(names))}" for what, names in wrong.items() if names]
    if said:
        raise PluginError("; ".join(said))


# --- pages made from files elsewhere ---------------------------------------------------------------------------------------


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the notebooks with their outputs, and the pages whose text is at the root of the repository."""
    for name, source in (("contributing.md", "CONTRIBUTING.md"), ("changes.md", "CHANGELOG.md")):
        files.append(File.generated(config, name, content=(ROOT / source).read_text()))
    entries: list[Any] = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text, images = notebook(path)
        page = f"notebooks/{path.stem}.md"
        files.append(File.generated(config, page, content=text))
        for name, content in images.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
        entries.append({_title(text, path.stem): page})
    if entries:
        assert config.nav is not None
        place = next(i for i, entry in enumerate(config.nav) if "Reference" in entry)
        config.nav = [*config.nav[:place], {"Notebooks": ["notebooks/index.md", *entries]}, *config.nav[place:]]
        files.append(File.generated(config, "notebooks/index.md", content=_contents(entries)))
    return files


def _title(text: str, otherwise: str) -> str:
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    return found[1].replace("`", "") if found else otherwise


def _contents(entries: list[dict[str, str]]) -> str:
    listed = [f"1. [{title}]({page.removeprefix('notebooks/')})" for entry in entries for title, page in entry.items()]
    return (
        "# Notebooks\n\nShown as they were run: CI runs each from scratch and refuses outputs of other cells. They are in the "
        "repository's `notebooks/`, as Jupyter notebooks and as scripts.\n\n" + "\n".join(listed) + "\n"
    )


def notebook(path: pathlib.Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its images by file name."""
    parts: list[str] = []
    images: dict[str, bytes] = {}
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(_prose(source))
        elif cell["cell_type"] == "code" and source:
            parts.append(f"````python\n{source}\n````")
            parts += [part for output in cell["outputs"] for part in _output(output, path.stem, images)]
    return "\n\n".join(parts) + "\n", images


def _prose(text: str) -> str:
    """A text cell as Markdown: links to other notebooks lead to their pages, and formulas lose the space inside dollars."""
    text = re.sub(r"\(((?:\.\./)*[\w/]+)\.ipynb((?:#[\w-]+)?)\)", r"(\1.md\2)", text)
    parts = text.split("$$")
    parts[::2] = [re.sub(r"(?<!\\)\$([^$]+)\$", lambda m: f"${m[1].strip()}$", part) for part in parts[::2]]
    return "$$".join(parts)


def _output(output: dict[str, Any], stem: str, images: dict[str, bytes]) -> Iterator[str]:
    """One output of a cell as Markdown; its picture, if it is one, goes to ``images``."""
    if output["output_type"] == "stream":
        yield _said("".join(output["text"]))
        return
    if output["output_type"] == "error":
        raise PluginError(f"notebooks/{stem}.ipynb holds an error: {output['ename']}. Run it again.")
    data = output["data"]
    if "image/png" in data:
        name = f"{stem}_{len(images) + 1}.png"
        images[name] = base64.b64decode("".join(data["image/png"]))
        yield f"![Figure {len(images)} of this notebook]({name})"
    elif "text/html" in data:
        yield f'<div class="output" markdown="0">{"".join(data["text/html"])}</div>'
    elif "text/plain" in data:
        yield _said("".join(data["text/plain"]))


def _said(text: str) -> str:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text).strip("\n")
    return f"````{{.text .output}}\n{plain}\n````"


# --- parts of pages made from files elsewhere ------------------------------------------------------------------------------


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace each line ``<!-- made: name -->`` by the part that it names, and each block of ``flow`` by a chart."""
    _check_tolerances(markdown)
    markdown = re.sub(r"^```flow\n(.*?)^```", lambda m: flow(m[1]), markdown, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^<!-- made: ([\w-]+) -->$", lambda m: _made()[m[1]](), markdown, flags=re.MULTILINE)


def _check_tolerances(markdown: str) -> None:
    """Refuse a table that quotes words which the test does not contain: ``| ... | `tests/file.py`: `quote` ... |``."""
    for name, quote in re.findall(r"\| `(tests/\w+\.py)`: `([^`]+)`", markdown):
        if quote not in (ROOT / name).read_text():
            raise PluginError(f"{name} does not hold what the page quotes: {quote}")


@functools.cache
def _made() -> dict[str, Callable[[], str]]:
    benchmarks = (ROOT / "benchmarks/README.md").read_text()
    return {
        "benchmarks": lambda: benchmarks.split("\n", 1)[1],
        "test-modules": _test_modules,
        **{name: functools.partial(str, figure) for name, figure in figures(benchmarks).items()},
    }


def _test_modules() -> str:
    rows = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        said = ast.get_docstring(ast.parse(path.read_text())) or ""
        rows.append(f"| `{path.name}` | {said.split(chr(10) + chr(10))[0].replace(chr(10), ' ').replace('|', chr(92) + '|')} |")
    return "\n".join(["| module | what it holds to what |", "|---|---|", *rows])


# --- mathematics as MathML, which browsers render by themselves ------------------------------------------------------------

_MATH = re.compile(r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.DOTALL)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write every formula as MathML."""
    return _MATH.sub(lambda m: _mathml(m[2], "inline") if m[2] is not None else _mathml(m[3], "block"), html)


@functools.cache
def _mathml(latex: str, display: str) -> str:
    source = html.unescape(latex).strip().replace(r"\arg", r"\operatorname{arg}")
    # The converter drops the exponent of a bracket with a stated size, so such brackets become stretching ones.
    source = re.sub(r"\\[Bb]ig([(\[])(.*?)\\[Bb]ig([)\]])", r"\\left\1\2\\right\3", source)
    made = latex2mathml.converter.convert(source, display=display)
    made = re.sub(r' mathvariant="(?!normal)([a-z-]+)">([A-Za-z])</mi>', lambda m: f">{_letter(m[2], m[1])}</mi>", made)
    for pattern, better in _SPACED:
        made = re.sub(pattern, better, made)
    if "\\" in html.unescape(re.sub(r"<[^>]*>", "", made)):
        raise PluginError(f"a formula has no MathML: {latex}")
    return f'<div class="formula">{made}</div>' if display == "block" else made


_SPACED = (
    # Without attributes, browsers take bars for stretching fences or for relations.
    (r"<mo>&#x02016;", '<mo stretchy="false" lspace="0" rspace="0">&#x02016;'),
    (r'<mo stretchy="false">&#x0007C;', '<mo stretchy="false" lspace="0" rspace="0">&#x0007C;'),
    # Put space between the name of a function and an argument without brackets, and around the bars of a divergence.
    (r"<mi>(log|exp|det|dim|arg)</mi>(?!<mo[^>]*>&#x00028;)", r'<mrow><mi>\1</mi><mspace width="0.167em"/></mrow>'),
    (
        r'<mo fence="false" stretchy="false">&#x02016;</mo>',
        '<mo lspace="0.22em" rspace="0.22em" stretchy="false">&#x02016;</mo>',
    ),
)


def _letter(letter: str, variant: str) -> str:
    """A letter in a mathematical alphabet, since browsers have dropped ``mathvariant``. Some have older names in Unicode."""
    size = "CAPITAL" if letter.isupper() else "SMALL"
    name = f"{variant.upper()} {size} {letter.upper()}"
    try:
        return unicodedata.lookup(f"MATHEMATICAL {name}")
    except KeyError:
        return unicodedata.lookup(name)
