"""Figures as SVG: those of the performance page, from the tables of ``benchmarks/README.md``, and flow charts from text."""

import html
import math
import re
from typing import Any

WIDTH, RIGHT, ROW, TOP = 380, 40, 22, 8
"""The width of a figure, narrow enough for a phone to show it unscaled."""


def figures(benchmarks: str) -> dict[str, str]:
    """Every figure by its name. A table that is missing, or has other columns, is an error."""
    step = [row for row in table(benchmarks, "step") if row["case"].endswith("damping 0.01 of the largest eigenvalue")]
    costs = [(row["case"].split(", damping")[0].replace("64-", "", 1), float(row["ratio"])) for row in step]
    made = {"figure-step": _figure(bars(costs), "Time of one step with `jf.natural_grad`, in gradients of the same batch")}
    tasks = []
    for task in ("digits MLP", "digits autoencoder", "randhie, Poisson"):
        rows = table(benchmarks, task)
        steps = [(row["optimiser"], [_number(seed) for seed in row["steps, by seed"].split(",")]) for row in rows]
        seconds = [(row["optimiser"], [_number(row["seconds"].split(" ")[0])]) for row in rows]
        goal = re.search(rf"^### {task}: (.+?),", benchmarks, re.MULTILINE)
        assert goal is not None
        tasks.append(_figure(dots(steps), f"{task}, steps {goal[1]}, one dot for each seed"))
        tasks.append(_figure(dots(seconds), f"{task}, seconds {goal[1]}"))
    made["figure-training"] = '<div class="figures">\n' + "\n".join(tasks) + "\n</div>"
    return made


def table(text: str, name: str) -> list[dict[str, str]]:
    """The rows of the first table below the heading that begins with a name; there may be prose in between."""
    found = re.search(rf"^### {re.escape(name)}:.*\n(?:(?![#|]).*\n)+((?:\|.*\n)+)", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"benchmarks/README.md has no table below '### {name}:'")
    head, _, *body = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in found[1].splitlines()]
    return [dict(zip(head, row, strict=False)) for row in body]


def bars(rows: list[tuple[str, float]]) -> str:
    """Horizontal bars from zero, with a line at one."""
    left = _left(rows)
    scale = (WIDTH - left - RIGHT) / max(value for _, value in rows)
    parts = []
    for i, (name, value) in enumerate(rows):
        y = TOP + i * ROW
        parts.append(f'<rect class="mark" x="{left}" y="{y + 4}" width="{value * scale:.1f}" height="{ROW - 8}"/>')
        parts.append(_label(name, left, y))
        parts.append(f'<text x="{left + value * scale + 4:.1f}" y="{y + 15}">{value:g}</text>')
    bottom = TOP + len(rows) * ROW
    one = left + scale
    parts.append(f'<line class="axis" x1="{one:.1f}" x2="{one:.1f}" y1="{TOP}" y2="{bottom}" stroke-dasharray="3 3"/>')
    parts.append(f'<text x="{one:.1f}" y="{bottom + 14}" text-anchor="middle">1</text>')
    return _svg(parts, bottom + 20)


def dots(rows: list[tuple[str, list[float]]]) -> str:
    """A dot for each number on a log axis; a label counts missing numbers."""
    known = [value for _, values in rows for value in values if not math.isnan(value)]
    low, high = math.log10(min(known)) - 0.1, math.log10(max(known)) + 0.1
    left = _left(rows)
    scale = (WIDTH - left - RIGHT) / (high - low)
    bottom = TOP + len(rows) * ROW
    parts = []
    for power in range(math.floor(low) - 1, math.ceil(high) + 1):
        for digit in (1, 2, 5):
            tick = digit * 10.0**power
            if low <= math.log10(tick) <= high:
                x = left + (math.log10(tick) - low) * scale
                parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
                parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{tick:g}</text>')
    for i, (name, values) in enumerate(rows):
        y = TOP + i * ROW
        parts.append(_label(name, left, y))
        missing = sum(math.isnan(value) for value in values)
        places = [left + (math.log10(value) - low) * scale for value in values if not math.isnan(value)]
        parts += [f'<circle class="mark" cx="{x:.1f}" cy="{y + 11}" r="4.5"/>' for x in places]
        if missing:
            said = f"{missing} not" if places else "none"
            parts.append(f'<text x="{WIDTH}" y="{y + 15}" text-anchor="end">{said}</text>')
    return _svg(parts, bottom + 20)


QUESTION, ANSWER, LINE = 186, 162, 16
"""Widths of the boxes of a flow chart, and the height of a line in them."""


def flow(text: str) -> str:
    """A column of questions with an answer beside each, from lines ``question | answer``; the last line is the final answer.

    `` / `` separates the lines of a box. The title comes first, on a line of its own.
    """
    title, *rows = [line.strip() for line in text.strip().splitlines()]
    parts, y = [], 4.0
    for row in rows:
        question, answer = ([part.strip() for part in side.split(" / ")] for side in row.split(" | "))
        height = LINE * max(len(question), len(answer)) + 14
        middle = y + height / 2
        parts += _box(0, y, QUESTION, height, question, "box")
        parts += _box(WIDTH - ANSWER, y, ANSWER, height, answer, "answer")
        parts.append(_arrow(QUESTION, middle, WIDTH - ANSWER, middle))
        if row != rows[-1]:
            parts.append(f'<text x="{QUESTION + 6}" y="{middle - 6}">yes</text>')
            parts.append(_arrow(QUESTION / 2, y + height, QUESTION / 2, y + height + 26))
            parts.append(f'<text x="{QUESTION / 2 + 8}" y="{y + height + 16}">no</text>')
        y += height + 26
    svg = _svg(parts, y - 22)
    return f'<figure class="chart"><figcaption><strong>{html.escape(title)}</strong></figcaption>{svg}</figure>'


def _box(x: float, y: float, width: float, height: float, lines: list[str], kind: str) -> list[str]:
    top = y + (height - LINE * len(lines)) / 2 + 12
    made = [f'<rect class="{kind}" x="{x + 1:g}" y="{y:g}" width="{width - 2:g}" height="{height:g}" rx="4"/>']
    for i, line in enumerate(lines):
        style = ' class="code"' if line.startswith("jf.") or "=" in line else ""
        middle = x + width / 2
        made.append(f'<text{style} x="{middle:g}" y="{top + i * LINE:g}" text-anchor="middle">{html.escape(line)}</text>')
    return made


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    head = f"{x2},{y2} {x2 - 6},{y2 - 4} {x2 - 6},{y2 + 4}" if y1 == y2 else f"{x2},{y2} {x2 - 4},{y2 - 6} {x2 + 4},{y2 - 6}"
    return f'<path class="arrow" d="M{x1:g} {y1:g}L{x2:g} {y2:g}"/><polygon class="head" points="{head}"/>'


def _left(rows: list[tuple[str, Any]]) -> float:
    """Room for the longest name, also in a wide font and if its letters are all digits."""
    return 7.4 * max(len(name) for name, _ in rows) + 10


def _number(text: str) -> float:
    return math.nan if text.strip() in {"-", ""} else float(text)


def _label(name: str, left: float, y: float) -> str:
    return f'<text x="{left - 6}" y="{y + 15}" text-anchor="end">{html.escape(name)}</text>'


def _svg(parts: list[str], height: float) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img">{"".join(parts)}</svg>'


def _figure(svg: str, caption: str) -> str:
    caption = re.sub(r"`([^`]*)`", r"<code>\1</code>", caption)
    return f'<figure class="chart">{svg}<figcaption>{caption}</figcaption></figure>'
