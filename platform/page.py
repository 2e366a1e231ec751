"""A page that stands alone: text and pictures inside one file, nothing fetched, tables that sort, fit to be printed.

Everything that comes from outside goes through `escape`. Should a label slip past it all the same, the page's own policy
lets a browser run the one script below, known by its hash, and fetch nothing.
"""

import base64
import hashlib
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

STYLE = """
:root { color-scheme: light; --ink: #1c2126; --soft: #5b6670; --line: #d9dee3; --wash: #f5f7f9; --blue: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 70rem; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", Arial, sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .5rem; max-width: 48rem; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p, ul, dl { max-width: 48rem; }
a { color: var(--blue); }
.kicker { color: var(--soft); margin: 0 0 .25rem; font-size: .875rem; }
.verdict { font-size: 1.125rem; border-left: 4px solid var(--blue); padding: .5rem 1rem; background: var(--wash);
  margin: 1rem 0 1.5rem; }
.missing { border-left: 4px solid #e69f00; padding: .5rem 1rem; background: #fdf6e7; }
.notes, .left-out, figcaption, .small { color: var(--soft); font-size: .875rem; }
.notes { padding-left: 1.1rem; }
nav { font-size: .875rem; margin: 1rem 0; } nav a { margin-right: 1rem; white-space: nowrap; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.25rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .8125rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .35rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; white-space: normal; border-bottom: 2px solid var(--ink); }
th:first-child, td:first-child, .text td, .text th { text-align: left; }
td:first-child { white-space: normal; min-width: 7rem; overflow-wrap: anywhere; }
tr.told td { font-weight: 600; } tr.control td { color: var(--soft); background: var(--wash); }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--blue); }
th[aria-sort=ascending] button::after { content: " \\2191"; } th[aria-sort=descending] button::after { content: " \\2193"; }
figure { margin: 1rem 0 1.75rem; } figure img { max-width: 100%; height: auto; display: block; }
code, pre { font: .8125rem/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--wash); padding: .6rem .8rem; margin: .4rem 0; }
p code, li code { font-size: .875em; }
details { margin: .4rem 0; } summary { cursor: pointer; overflow-wrap: anywhere; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } nav { display: none; } .wide { overflow: visible; }
  table { font-size: 7pt; } th, td { padding: 2pt 3pt; } figure, tr, .verdict { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  @page { margin: 15mm; } }
"""

SCRIPT = """
document.querySelectorAll("table.sortable").forEach(function (table) {
  table.querySelectorAll("th").forEach(function (head, column) {
    head.querySelector("button").addEventListener("click", function () {
      var up = head.getAttribute("aria-sort") !== "ascending";
      table.querySelectorAll("th").forEach(function (other) { other.removeAttribute("aria-sort"); });
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      var body = table.tBodies[0];
      var key = function (row) { return row.cells[column].dataset.value; };
      Array.from(body.rows).sort(function (a, b) {
        var x = key(a), y = key(b);
        if (x === "" || y === "") return (x === "") - (y === "");  // what is unknown stays last
        var order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
        return up ? order : -order;
      }).forEach(function (row) { body.appendChild(row); });
    });
  });
});
"""


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and the number that it is sorted by; without one, by its text, a dash last."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Line:
    """A row of a table, and its class in the style."""

    cells: Sequence[Cell]
    kind: str = ""


def escape(text: object) -> str:
    """As text between tags or in a quoted attribute, whatever it holds."""
    return html.escape(str(text), quote=True)


def prose(text: str) -> str:
    """A sentence as text, what it has in backquotes as code."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", escape(text))


def page(title: str, body: str) -> str:
    """The whole file around a body that is HTML already."""
    trusted = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{trusted}'"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def table(head: Sequence[str], lines: Sequence[Line], *, kind: str = "") -> str:
    """A table whose columns sort when their heads are clicked; `kind` "text" aligns all of it left."""
    heads = "".join(f'<th scope="col"><button>{escape(name)}</button></th>' for name in head)
    body = "".join(f'<tr class="{escape(line.kind)}">{"".join(map(_cell, line.cells))}</tr>\n' for line in lines)
    classes = f"sortable {kind}".strip()
    return f'<div class="wide"><table class="{classes}"><thead><tr>{heads}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _cell(cell: Cell) -> str:
    key = "" if cell.text == "–" else cell.text if cell.value is None else repr(float(cell.value))
    return f'<td data-value="{escape(key)}">{escape(cell.text)}</td>'


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and what is known of them."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs) + "</dl>"


def picture(content: bytes, kind: str, caption: str) -> str:
    """A figure inside the file; `kind` is svg+xml or png. As an image, an SVG can run nothing and its ids meet no others."""
    data = base64.b64encode(content).decode()
    said = escape(caption)
    return f'<figure><img alt="{said}" src="data:image/{kind};base64,{data}"><figcaption>{said}</figcaption></figure>'
