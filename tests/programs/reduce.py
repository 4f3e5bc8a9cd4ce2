"""A smaller program with the same fault: drop statements, and replace expressions by parts of them, while it still fails."""

import ast
import copy
import dataclasses
import re
import time

from programs.compare import WAYS, Skipped, compare


def reduced(program, faults, seconds=120.0):
    """The smallest program found in the given seconds that fails in the same way as the program's first fault."""
    signature = _signature(faults[0])
    return smallest(program, lambda candidate: _signature_of(candidate, signature[1]) == signature, seconds)


def smallest(program, fails, seconds):
    """The smallest program found in the given seconds for which ``fails`` is true."""
    smaller, deadline = True, time.monotonic() + seconds
    while smaller and time.monotonic() < deadline:
        smaller = False
        for candidate in _candidates(program):
            if time.monotonic() > deadline:
                break
            if fails(candidate):
                program, smaller = candidate, True
                break
    return program


def _signature(fault):
    """A fault's kind and way, and for a crash the error and its place."""
    way = max((way for way in WAYS if fault.where.startswith(way)), key=len)
    return fault.kind, way, re.sub(r"\d+", "#", fault.detail)[-60:] if fault.kind == "crashed" else ""


def _signature_of(program, way):
    try:
        faults = compare(program, ways=(way,))
    except (Skipped, SyntaxError, NameError):
        return None
    return _signature(faults[0]) if faults else None


def _candidates(program):
    """Smaller programs; those that drop statements come first."""
    tree = ast.parse(program.source)
    seen = set()
    for position, change in _changes(tree):
        changed = copy.deepcopy(tree)
        node = list(ast.walk(changed))[position]
        if not change(node, changed):
            continue
        source = ast.unparse(ast.fix_missing_locations(_without_dead(changed))) + "\n"
        if source not in seen and len(source) < len(program.source):
            seen.add(source)
            leaves = {name: leaf for name, leaf in program.leaves.items() if f"p['{name}']" in source}
            if leaves:
                yield dataclasses.replace(program, source=source, leaves=leaves)


def _changes(tree):
    """Pairs of a node's index in the walk and a function that changes it; those that drop statements come first."""
    nodes = list(ast.walk(tree))
    yield from _droppings(nodes)
    yield from _shortenings(nodes)


def _droppings(nodes):
    for i, node in enumerate(nodes):
        if isinstance(node, ast.FunctionDef):
            for k in range(len(node.body) - 1):
                yield i, lambda node, _, k=k: node.body.pop(k)
            for k in range(len(node.decorator_list)):
                yield i, lambda node, _, k=k: node.decorator_list.pop(k)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, _ALIASES):
            yield i, _inlined


def _shortenings(nodes):
    for i, node in enumerate(nodes):
        for name, value in ast.iter_fields(node):
            for k, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(child, ast.expr):
                    for j in range(len(_parts(child))):
                        yield i, lambda node, _, name=name, k=k, j=j: _replace(node, name, k, j)


_ALIASES = ast.Name | ast.Subscript | ast.Attribute


def _inlined(assignment, tree):
    """Replace a name by the expression that it stands for."""
    name, value = assignment.targets[0].id, assignment.value

    class Inline(ast.NodeTransformer):
        def visit_Name(self, node):
            return value if node.id == name and isinstance(node.ctx, ast.Load) else node

    Inline().visit(tree)
    return True


def _parts(node):
    """Parts of this expression that may replace it; numbers and names come last."""
    if isinstance(node, ast.BinOp):
        return [node.left, node.right]
    if isinstance(node, ast.Call):
        return [arg for arg in node.args if not isinstance(arg, ast.Lambda | ast.Starred)] + [
            node.func.value
            for _ in "1"
            if isinstance(node.func, ast.Attribute) and not isinstance(node.func.value, ast.Name | ast.Attribute)
        ]
    if isinstance(node, ast.Subscript) and not (isinstance(node.value, ast.Name) and node.value.id == "p"):
        return [node.value]
    if isinstance(node, ast.UnaryOp):
        return [node.operand]
    if isinstance(node, ast.Attribute) and node.attr == "T":
        return [node.value]
    return []


def _replace(node, name, place, part):
    value = getattr(node, name)
    if place is None:
        setattr(node, name, _parts(value)[part])
    else:
        value[place] = _parts(value[place])[part]
    return True


def _without_dead(tree):
    """The program without assignments and functions that nothing reads."""
    while True:
        read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        dropped = False
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                kept = [statement for statement in node.body if not _dead(statement, read)]
                dropped |= len(kept) < len(node.body)
                node.body = kept
        if not dropped:
            return tree


def _dead(statement, read):
    if isinstance(statement, ast.FunctionDef):
        return statement.name not in read
    if isinstance(statement, ast.Assign):
        names = [node.id for node in ast.walk(statement.targets[0]) if isinstance(node, ast.Name)]
        return not any(name in read for name in names)
    return False
