"""The page: a table of claims, tables of every seed, and the pictures, in one file without links to others."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Final

from equipoise_trainer.reproduction.claims import Claim

STYLE: Final = """
body{font:16px/1.5 system-ui,sans-serif;color:#1b1f24;max-width:1480px;margin:2.5rem auto;padding:0 1.2rem}
h1{font-size:1.8rem;margin-bottom:.2rem}h2{margin-top:2.4rem}p.lead{color:#4b5563}
p{max-width:64rem}p:has(img){max-width:none}
table{border-collapse:collapse;display:block;overflow-x:auto;font-size:.86rem;margin:.8rem 0}
th,td{text-align:left;vertical-align:top;padding:.4rem .6rem;border-bottom:1px solid #e5e7eb}
th{color:#6b7280;font-weight:600}td.number{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
td.why{color:#4b5563}.verdict{border-radius:.6rem;padding:.05rem .55rem;font-weight:600;white-space:nowrap}
.yes{background:#dcfce7;color:#166534}.partly{background:#fef9c3;color:#854d0e}.no{background:#fee2e2;color:#991b1b}
.not-run{background:#f3f4f6;color:#6b7280}img{max-width:100%}pre{background:#f3f4f6;padding:.7rem;overflow-x:auto}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page.

    Attributes:
        title: its heading.
        text: paragraphs, plain text.
        headings: of its table; empty: none.
        rows: cells of its table, plain text.
        pictures: PNG files, put into the page.
    """

    title: str
    text: tuple[str, ...] = ()
    headings: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    pictures: tuple[Path, ...] = ()


def write_page(path: Path, *, claims: Sequence[Claim], sections: Sequence[Section], lead: str) -> None:
    """Writes the page."""
    body = [
        "<h1>Towards Optimal Learning of Language Models, repeated</h1>",
        f'<p class="lead">{escape(lead)}</p>',
        "<h2>Paper, ours, reproduced?</h2>",
        _claims(claims),
        *(_section(section) for section in sections),
    ]
    head = f'<meta charset="utf-8"><title>arXiv 2402.17759, repeated</title><style>{STYLE}</style>'
    view = '<meta name="viewport" content="width=device-width,initial-scale=1">'
    document = f"<!doctype html><html lang=en><head>{head}{view}</head><body>{''.join(body)}</body></html>\n"
    path.write_text(document, encoding="utf-8")


def _claims(claims: Sequence[Claim]) -> str:
    rows = [
        f"<tr><td>{escape(claim.what)}</td><td>{escape(claim.paper)}</td><td>{escape(claim.ours)}</td>"
        f'<td><span class="verdict {claim.verdict.replace(" ", "-")}">{claim.verdict}</span></td>'
        f'<td class="why">{escape(claim.why)}</td></tr>'
        for claim in claims
    ]
    headings = "".join(f"<th>{name}</th>" for name in ("claim", "paper", "ours", "reproduced?", "why"))
    return f"<table><tr>{headings}</tr>{''.join(rows)}</table>"


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>", *(f"<p>{escape(each)}</p>" for each in section.text)]
    if section.headings:
        headings = "".join(f"<th>{escape(name)}</th>" for name in section.headings)
        rows = ("".join(_cell(cell, place) for place, cell in enumerate(row)) for row in section.rows)
        parts.append(f"<table><tr>{headings}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>")
    parts += [
        f'<p><img alt="{escape(picture.stem)}" src="data:image/png;base64,{_encoded(picture)}"></p>'
        for picture in section.pictures
    ]
    return "".join(parts)


def _cell(text: str, place: int) -> str:
    return f'<td class="number">{escape(text)}</td>' if place else f"<td>{escape(text)}</td>"


def _encoded(picture: Path) -> str:
    return base64.b64encode(picture.read_bytes()).decode("ascii")
