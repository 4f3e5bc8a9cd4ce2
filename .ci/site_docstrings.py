"""Docstrings for the site: converts directives, doctests and cross-references to Markdown. Loaded by mkdocstrings."""

import ast
import pathlib
import re
import textwrap
from collections.abc import Container
from typing import Any

import griffe

ROOT = pathlib.Path(__file__).resolve().parent.parent


def public_names(package: str) -> dict[str, str]:
    """The names that a package's ``__init__`` imports from its own rooms, in order, and the module of each."""
    tree = ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text())
    return {
        alias.asname or alias.name: node.module or ""
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxfisher")
        for alias in node.names
    }


AT_THE_TOP = public_names("jaxfisher")
PUBLIC = {f"jaxfisher.{name}" for name in AT_THE_TOP}
ROOMS = sorted(path.parent.name for path in (ROOT / "jaxfisher").glob("[a-z]*/__init__.py"))
PUBLIC |= {
    f"jaxfisher.{room}.{name}"
    for room in ROOMS
    for name in public_names(f"jaxfisher.{room}")
    # A name that the package itself exports has its entry there.
    if not AT_THE_TOP.get(name, "").startswith(f"jaxfisher.{room}")
}

_DIRECTIVE = re.compile(r"^( *)\.\. math:: (.+(?:\n *\S.*)*)", re.MULTILINE)
_LITERAL = re.compile(r"::\n((?:\n| {4}.*\n)+)")
_DOCTEST = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)
_REFERENCE = re.compile(r"^Reference: (.*(?:\n(?!\s*$).*)*)", re.MULTILINE)
_NAME = re.compile(rf"(?<![`\w])`(jaxfisher\.)?((?:(?:{'|'.join(ROOMS)})\.)?[A-Za-z_]+)`(?![`\w])")


def markdown(text: str, own: Container[str] = ()) -> str:
    """A docstring with Sphinx's directives as Markdown. Its sections are unchanged; ``own`` are the names of its class."""
    text = _DIRECTIVE.sub(lambda m: f"\n{m[1]}$${' '.join(m[2].split())}$$\n", text)
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    text = _NAME.sub(lambda m: m[0] if m[2] in own and not m[1] else _linked(m), text)
    text = _REFERENCE.sub(lambda m: "*Reference:* " + " ".join(m[1].split()), text)
    text = _LITERAL.sub(lambda m: f":\n\n```python\n{textwrap.dedent(m[1]).strip()}\n```\n\n", text + "\n")
    return _DOCTEST.sub(lambda m: f"```pycon\n{m[0]}\n```", text).rstrip()


def _linked(match: re.Match[str]) -> str:
    name = f"jaxfisher.{match[2]}"
    return f"[`{match[2]}`][{name}]" if name in PUBLIC else match[0]


class Docstrings(griffe.Extension):
    """An extension that rewrites every docstring before it is parsed into sections."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object; called once for each."""
        if obj.docstring is not None:
            owner = obj if obj.is_class else obj.parent
            own = owner.members if owner is not None and owner.is_class else ()
            obj.docstring.value = markdown(obj.docstring.value, own)

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Add a constructor to classes that our own decorators make dataclasses: its parameters are the fields."""
        if any(str(decorator.value).partition("(")[0] in ("family", "array_fields") for decorator in cls.decorators):
            fields = [
                griffe.Parameter(name, annotation=member.annotation, kind=griffe.ParameterKind.positional_or_keyword)
                for name, member in cls.members.items()
                if isinstance(member, griffe.Attribute) and member.annotation is not None
            ]
            self_ = griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)
            cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(self_, *fields)))
