"""A matrix as one HTML page that needs nothing else, or as a table for a document."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from netlab.matrix import Cell, MatrixResult

_STYLE = """
:root { color-scheme: light dark; --page: #fbfbf9; --ink: #1d2126; --dim: #5e666f; --line: #d9dce0;
  --direct: #d3efdf; --relay: #fae7bd; --none: #f4c9c3; --wrong: #bd3a2e; }
@media (prefers-color-scheme: dark) { :root { --page: #15181c; --ink: #e6e8ea; --dim: #9aa3ad;
  --line: #363c44; --direct: #1d4a33; --relay: #54431a; --none: #612a23; --wrong: #ff7a6b; } }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 32px 64px; }
h1 { font-size: 26px; margin: 0; } p { color: var(--dim); margin: 4px 0 18px; }
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 3px; font-size: 13.5px; }
th { font-weight: 600; padding: 4px 8px; white-space: nowrap; }
th.row { text-align: right; }
td { text-align: center; padding: 7px 8px; border-radius: 6px; min-width: 78px; }
td small { display: block; color: var(--dim); font-size: 11.5px; }
.direct { background: var(--direct); } .relay { background: var(--relay); }
.none { background: var(--none); } .wrong { outline: 2px solid var(--wrong); }
i { display: inline-block; width: 14px; height: 10px; border-radius: 2px; margin: 0 6px 0 14px; }
"""


def render_matrix(result: MatrixResult) -> str:
    """Return the page."""
    by_pair = {(cell.left, cell.right): cell for cell in result.cells}
    agreeing = sum(cell.agrees for cell in result.cells)
    head = "".join(f"<th>{escape(name)}</th>" for name in result.right)
    rows = "".join(
        f'<tr><th class="row">{escape(left)}</th>'
        + "".join(_cell(by_pair[left, right]) for right in result.right)
        + "</tr>"
        for left in result.left
    )
    facts = (
        f"{escape(result.pair)} · {result.back_end} back end · {result.seconds:.3g} s · "
        f"seed {result.seed} · {agreeing} of {len(result.cells)} as simple punching predicts"
    )
    legend = (
        '<i class="direct"></i>direct<i class="relay"></i>relay<i class="none"></i>no path'
        '<i class="wrong"></i>not as predicted'
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>NAT pairs</title><style>{_STYLE}</style></head><body><main><h1>NAT pairs</h1>"
        f'<p>{facts}<br>Rows are left, columns right.{legend}</p><div class="scroll"><table>'
        f"<tr><th></th>{head}</tr>{rows}</table></div></main></body></html>"
    )


def _cell(cell: Cell) -> str:
    css = cell.path + ("" if cell.agrees else " wrong")
    time = f"{cell.seconds * 1000:.0f} ms" if cell.seconds is not None else "&nbsp;"
    title = f"{cell.left} and {cell.right}: {cell.path}, predicted {cell.expected} ({cell.letter})"
    if cell.problem:
        title += f"; {cell.problem}"
    return f'<td class="{css}" title="{escape(title)}">{cell.path}<small>{time}</small></td>'


def matrix_markdown(results: Sequence[MatrixResult]) -> str:
    """Return a table in Markdown. Each field has, of each result in turn, the seconds to a direct
    path or how else datagrams travel."""
    cells = [{(cell.left, cell.right): cell for cell in result.cells} for result in results]
    rows = [["", *results[0].right], ["---"] * (len(results[0].right) + 1)]
    for left in results[0].left:
        row = [left]
        for right in results[0].right:
            here = (by_pair[left, right] for by_pair in cells)
            row.append(
                " / ".join(
                    cell.path if cell.seconds is None else f"{cell.seconds:.1f} s" for cell in here
                )
            )
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
