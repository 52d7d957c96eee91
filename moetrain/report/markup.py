"""Pieces of HTML. Every text that goes in is escaped here: names and settings come from files."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

SHORT = 16
"""Characters of a cell below which it stays on one line."""
_SHORT = ' class="short"'


def escape(text: object) -> str:
    """For element content and for attributes in double quotes. Characters that no browser shows become marks."""
    return html.escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", "\ufffd", str(text)))


def slug(text: str) -> str:
    """For an id."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def table(head: Sequence[object], rows: Iterable[Sequence[object]], caption: str, label: bool = False) -> str:
    """A table whose first column names the rows. What is wider than the screen scrolls within, also by keyboard.

    Args:
        caption: what is in it, for everyone if `label`, else for those who cannot see it.
    """
    shown = "" if label else ' class="unseen"'
    names = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "\n".join(_row(row) for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">\n'
        f"<table><caption{shown}>{escape(caption)}</caption>\n"
        f"{f'<tr>{names}</tr>' if names else ''}\n{body}\n</table></div>"
    )


def _row(cells: Sequence[object]) -> str:
    rest = "".join(f"<td{_SHORT if len(str(cell)) < SHORT else ''}>{escape(cell)}</td>" for cell in cells[1:])
    return f'<tr><th scope="row">{escape(cells[0])}</th>{rest}</tr>'


def details(summary: str, inside: str, is_open: bool = False) -> str:
    return f"<details{' open' if is_open else ''}><summary>{escape(summary)}</summary>\n{inside}\n</details>"


def pre(text: str, label: str) -> str:
    return f'<pre class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{escape(text)}</pre>'


def section(title: str, *parts: str) -> str:
    """A section with a heading that the page's list of contents leads to; nothing where all parts are empty."""
    inside = "\n".join(part for part in parts if part)
    name = slug(title)
    return (
        f'<section aria-labelledby="{name}">\n<h2 id="{name}" tabindex="-1">{escape(title)}</h2>\n{inside}\n</section>'
        if inside
        else ""
    )
