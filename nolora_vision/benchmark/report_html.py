"""A report as one HTML page that opens from disk: sortable tables, figures inside it, nothing from any network."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from nolora_vision.benchmark.report_content import Report
from nolora_vision.benchmark.report_figures import INK
from nolora_vision.benchmark.report_pictures import Picture
from nolora_vision.benchmark.report_tables import Table, Value

OPEN_CELLS = 8
"""So many tables of cells are open at first; the rest are a click away."""

STYLE = """
:root { color-scheme: light dark; --ink: #16181d; --soft: #5c6370; --line: #d9dce3; --back: #ffffff; --card: #f6f7f9;
  --accent: #0a5fa8; --good: #00629a; --bad: #b04a00; --hover: #eef2f7; --blue: #0072b2; --brown: #8c6d1f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ee; --soft: #9aa3b2; --line: #333944; --back: #14161a;
  --card: #1b1e24; --accent: #6db3f2; --good: #6db3f2; --bad: #f0935a; --hover: #22262e;
  --blue: #4ba6e8; --brown: #c8a748; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 1.5rem clamp(1rem, 3vw, 2.5rem) 4rem; background: var(--back);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { margin: 2.8rem 0 .8rem; font-size: 1.35rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
h3 { margin: 0; font-size: 1rem; overflow-wrap: anywhere; display: inline; }
p, li { max-width: 52rem; overflow-wrap: anywhere; }
.soft, .notes, figcaption { color: var(--soft); font-size: .875rem; }
.lead { font-size: 1.06rem; } nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: 1rem 0; }
a { color: var(--accent); } ul { padding-left: 1.2rem; } .notes { margin: .5rem 0 0; }
.summary { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .4rem 1.2rem; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; margin-top: .6rem; }
table { border-collapse: separate; border-spacing: 0; font-size: .85rem; font-variant-numeric: tabular-nums;
  min-width: 100%; }
th, td { padding: .42rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; } td.text, th.text { text-align: left; }
td.long { white-space: normal; min-width: 13rem; text-align: left; }
thead th { background: var(--card); vertical-align: bottom; white-space: normal; min-width: 5rem; padding: 0; }
th button { all: unset; box-sizing: border-box; width: 100%; padding: .5rem .7rem; cursor: pointer; font-weight: 600;
  line-height: 1.3; }
th button:hover { background: var(--hover); }
th button:focus-visible, summary:focus-visible { outline: 2px solid var(--accent); outline-offset: -2px; }
th button::after { content: "↕"; opacity: .3; margin-left: .3em; font-weight: 400; }
th[aria-sort=ascending] button::after { content: "↑"; opacity: 1; }
th[aria-sort=descending] button::after { content: "↓"; opacity: 1; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--back); z-index: 1; min-width: 7rem;
  max-width: 12rem; white-space: normal; }
thead th:first-child { background: var(--card); } tbody tr:hover td { background: var(--hover); }
tr.published td { color: var(--soft); font-style: italic; } td.higher { color: var(--good); font-weight: 600; }
td.lower { color: var(--bad); font-weight: 600; }
details { margin: 1.1rem 0; } summary { cursor: pointer; padding: .2rem 0; }
figure { margin: 1.5rem 0 2rem; } figure .wide { padding: .6rem; }
figure svg { display: block; width: 100%; min-width: 34rem; height: auto; max-width: 60rem; margin: 0 auto; }
@media print { details > * { display: block; } .wide { overflow: visible; } }
"""

SCRIPT = """
document.querySelectorAll("table.sortable").forEach(table => {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0], first = [...body.rows];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const now = head.getAttribute("aria-sort");
    const next = { none: "descending", descending: "ascending", ascending: "none" }[now];
    heads.forEach(other => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", next);
    const sign = next === "ascending" ? 1 : -1;
    const key = row => row.cells[column].dataset.sort;
    const compare = (a, b) => {
      const x = key(a), y = key(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const numbers = x !== y && isFinite(x) && isFinite(y);
      return sign * (numbers ? x - y : x.localeCompare(y));
    };
    body.append(...(next === "none" ? first : [...body.rows].sort(compare)));
  }));
});
"""


def page(report: Report, pictures: Sequence[Picture], *, made: str) -> str:
    """The whole page.

    Args:
        made: when and by what.
    """
    title = escape(report.title)
    sections = [(section.title, _tables(section.tables, closed=section.title == "Cell by cell"))
                for section in report.sections]  # fmt: skip
    if pictures:
        sections.insert(0, ("Figures", "".join(_figure(picture, i) for i, picture in enumerate(pictures))))
    sections.append(("Provenance", _table(report.provenance)))
    if report.warnings:
        sections.append(("Warnings", _list(report.warnings)))
    links = "".join(f'<a href="#{_anchor(name)}">{escape(name)}</a>' for name, _ in sections)
    body = "".join(f'<section id="{_anchor(name)}"><h2>{escape(name)}</h2>{text}</section>' for name, text in sections)
    description = f'<p class="lead">{escape(report.description)}</p>' if report.description else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<header><h1>{title}</h1>{description}</header>\n"
        f"{_summary(report)}<nav>{links}</nav>\n<main>{body}</main>\n"
        f'<footer class="soft"><p>{escape(made)}</p></footer>\n<script>{SCRIPT}</script>\n</body>\n</html>\n'
    )


def _summary(report: Report) -> str:
    parts = [f"<p>{escape(line)}</p>" for line in report.summary]
    if report.by_method:
        every = f"<summary>All {len(report.in_words)} comparisons in words</summary>{_list(report.in_words)}"
        parts += [_list(report.by_method), f"<details>{every}</details>"]
    else:
        parts.append(_list(report.in_words))
    return f'<div class="summary">{"".join(parts)}<p class="soft">{escape(report.rule)}</p></div>\n'


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def _tables(tables: Sequence[Table], *, closed: bool) -> str:
    return "".join(_table(table, closed=closed and i >= OPEN_CELLS) for i, table in enumerate(tables))


def _table(table: Table, *, closed: bool = False) -> str:
    texts = [_is_text(row[i] for row in table.rows) for i in range(len(table.columns))]
    heads = "".join(
        f'<th scope="col" aria-sort="none"{" class=text" * text}><button type="button">{escape(name)}</button></th>'
        for name, text in zip(table.columns, texts, strict=True)
    )
    published = table.published or (False,) * len(table.rows)
    rows = "".join(
        f"<tr{' class=published' * quoted}>{''.join(map(_cell, row, texts))}</tr>"
        for row, quoted in zip(table.rows, published, strict=True)
    )
    notes = "".join(f'<p class="notes">{escape(note)}</p>' for note in table.notes)
    return (
        f"<details{'' if closed else ' open'}><summary><h3>{escape(table.title)}</h3></summary>"
        f'<div class="wide"><table class="sortable"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
        f"{notes}</details>"
    )


def _is_text(column: Iterable[Value]) -> bool:
    return not any(isinstance(value.sort, (int, float)) and value.text for value in column)


def _cell(value: Value, text: bool) -> str:
    sort = "" if not value.text else value.text if value.sort is None else value.sort
    names = ["long" if len(value.text) > 40 else "text"] if text else []
    names += [word for word in ("higher", "lower") if value.text.startswith(f"{word} by ")]
    kind = f' class="{" ".join(names)}"' if names else ""
    return f'<td{kind} data-sort="{escape(str(sort))}">{escape(value.text) or "–"}</td>'


def _figure(picture: Picture, number: int) -> str:
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>f{number}-", picture.svg)  # names are the page's, not the figure's
    for colour, variable in {INK: "ink", "#0072B2": "blue", "#8C6D1F": "brown"}.items():  # too dark for a dark page
        svg = re.sub(colour, f"var(--{variable})", svg, flags=re.IGNORECASE)
    size = re.search(r'viewBox="[^"]*"', svg)
    opening = f'<svg {size and size[0]} xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    opening += f'role="img" aria-label="{escape(picture.title)}">'
    svg = re.sub(r"^<svg [^>]*>", lambda _: opening, svg)
    return (
        f'<figure><h3>{escape(picture.title)}</h3><div class="wide">{svg}</div>'
        f'<figcaption>{escape(picture.caption)} (<a href="{escape(picture.file)}">PNG</a>)</figcaption></figure>'
    )


def _anchor(name: str) -> str:
    return re.sub(r"\W+", "-", name.lower())
