"""The card as one HTML file that needs nothing else: tables, plots drawn as SVG, readable by day and by night."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from data.evaluation.card import (
    COLUMNS,
    EXAM_TITLES,
    EXAMS,
    PEER_COLUMNS,
    PEER_NOTE,
    READING,
    WARNING,
    Results,
    facts,
    figures_of,
    peer_rows,
    row,
    shown,
    verdict,
)
from data.evaluation.figures import Figure
from data.evaluation.peers import PEERS

_STYLE = """
:root { color-scheme: light dark; --back: #fcfcfb; --ink: #1d2125; --soft: #5b646d; --line: #d9dde1; --mark: #1462a8;
  --good: #1a7f4b; --flat: #8a6d00; --bad: #b3372f; }
@media (prefers-color-scheme: dark) { :root { --back: #15181b; --ink: #e4e7ea; --soft: #9aa4ae; --line: #343a40;
  --mark: #6cb4f5; --good: #5cc98d; --flat: #d9b84a; --bad: #f0847c; } }
body { background: var(--back); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto;
  max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.warning { border-left: 4px solid var(--bad); padding: .3rem .8rem; } .verdict { font-weight: 600; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; width: 100%; }
th, td { text-align: left; padding: .3rem .55rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; } td.number { white-space: nowrap; font-variant-numeric: tabular-nums; }
code { font-size: 12px; } .better { color: var(--good); } .indistinguishable { color: var(--flat); }
.worse { color: var(--bad); } .not { color: var(--soft); }
dt { color: var(--soft); float: left; width: 7.5rem; clear: left; }
dd { margin: 0 0 .15rem 8rem; overflow-wrap: anywhere; } svg { max-width: 100%; height: auto; margin: .6rem 0; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; } svg .soft { fill: var(--soft); }
svg .axis { stroke: var(--line); } svg .range { stroke: var(--mark); stroke-width: 3; } svg .dot { fill: var(--mark); }
svg .floor { stroke: var(--bad); stroke-width: 2.5; } svg .peer { fill: var(--soft); opacity: .75; }
details { margin: .4rem 0; } summary { cursor: pointer; color: var(--soft); } ul { padding-left: 1.2rem; }
"""
LEFT, WIDTH, ROW = 250, 520, 24  # of a plot, in pixels


def page(results: Results) -> str:
    """The card as HTML."""
    title = f"Evaluation of {results['checkpoint']['path']}"
    body = [f"<h1>{escape(title)}</h1>", f'<p class="warning">{escape(WARNING)}</p>']
    body += [f'<p class="verdict">{escape(verdict(results))}</p>', "<dl>"]
    body += [f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts(results)]
    body += ["</dl>", *_peers(results)]
    for part in results["parts"]:
        body += _part(part)
    if results["left_out"]:
        body += ["<h2>Left out</h2>", _list(f"{item['part']}: {item['why']}" for item in results["left_out"])]
    body += ["<h2>How to read this</h2>", _list(READING)]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head><body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _part(part: Mapping[str, Any]) -> list[str]:
    figures = figures_of(part)
    shares = [f for f in figures if f.unit == "share"]
    made = [f"<h2>{escape(part['title'])}</h2>"]
    if shares:
        made.append(plot(shares))
    made.append(_table(COLUMNS, [row(f) for f in figures]))
    for f in figures:
        if len(f.groups) > 1:
            ordered = sorted(f.groups.items(), key=lambda g: g[1][0])
            rows = [(name, shown(value, f.unit), f"{n:,}") for name, (value, n) in ordered]
            made.append(f"<details><summary>{escape(f.name)} by group ({len(rows)})</summary>")
            made += [_table(("group", "value", "n"), rows), "</details>"]
    return [*made, _list(part["notes"])] if part["notes"] else made


def plot(figures: Sequence[Figure]) -> str:
    """Shares with their intervals from 0 to 100 %, and a red stroke where the floor is."""
    rows = []
    for i, f in enumerate(figures):
        y = i * ROW + 14
        floor = f.floor if f.floor is not None else next(iter(f.floors.values()), None)
        low, high = (_x(v) for v in f.interval)
        said = f"{f.name}: {shown(f.value, f.unit)}, {shown(f.interval[0], f.unit)} to {shown(f.interval[1], f.unit)}"
        rows.append(f"<g><title>{escape(said)}</title>")
        rows.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{escape(f.name)}</text>')
        rows.append(f'<line class="range" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>')
        rows.append(f'<circle class="dot" cx="{_x(f.value):.1f}" cy="{y}" r="5"/>')
        if floor is not None:
            rows.append(f'<line class="floor" x1="{_x(floor):.1f}" x2="{_x(floor):.1f}" y1="{y - 8}" y2="{y + 8}"/>')
        rows.append("</g>")
    return _framed(rows, len(figures), "dot: value; bar: 95 % interval; red stroke: floor")


def _peers(results: Results) -> list[str]:
    rows = peer_rows(results)
    if not rows:
        return []
    by_name = {f.name: f for part in results["parts"] for f in figures_of(part)}
    drawn = []
    for i, exam in enumerate(EXAMS):
        y = i * ROW + 14
        drawn.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{EXAM_TITLES[i]}</text>')
        for peer in PEERS:
            score = (peer.medqa, peer.medmcqa, peer.pubmedqa, peer.mmlu)[i]
            if score is not None:
                told = escape(f"{peer.model}: {score} ({peer.protocol}; {peer.source})")
                drawn.append(
                    f'<circle class="peer" cx="{_x(score / 100):.1f}" cy="{y}" r="3"><title>{told}</title></circle>'
                )
        if (f := by_name.get(f"{exam}.labels.acc")) is not None:
            low, high = (_x(v) for v in f.interval)
            drawn.append(f'<line class="range" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>')
            drawn.append(f'<circle class="dot" cx="{_x(f.value):.1f}" cy="{y}" r="5"/>')
            if f.floor is not None:
                drawn.append(
                    f'<line class="floor" x1="{_x(f.floor):.1f}" x2="{_x(f.floor):.1f}" y1="{y - 8}" y2="{y + 8}"/>'
                )
    key = "large: this model with its 95 % interval; red stroke: its floor; small: published models"
    plain = [tuple(cell.replace("**", "") for cell in cells) for cells in rows]
    return [
        "<h2>Beside published figures (accuracy, %)</h2>",
        _framed(drawn, len(EXAMS), key),
        f"<details><summary>as a table</summary>{_table(PEER_COLUMNS, plain)}</details>",
        f"<p>{escape(PEER_NOTE)}</p>",
    ]


def _framed(rows: Sequence[str], count: int, key: str) -> str:
    """Rows over an axis from 0 to 100 %."""
    bottom = count * ROW + 4
    axis = []
    for percent in range(0, 101, 20):
        x = _x(percent / 100)
        axis.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom}"/>')
        axis.append(f'<text class="soft" x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{percent} %</text>')
    axis.append(f'<text class="soft" x="{LEFT}" y="{bottom + 32}">{escape(key)}</text>')
    width, height = LEFT + WIDTH + 110, bottom + 40
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img">' + "".join([*axis, *rows]) + "</svg>"


def _x(share: float) -> float:
    return LEFT + WIDTH * min(1.0, max(0.0, share))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    made = ["<tr>" + "".join(f"<th>{escape(h)}</th>" for h in head) + "</tr>"]
    for cells in rows:
        tds = []
        for h, cell in zip(head, cells, strict=True):
            if h == "against the floor":
                tds.append(f'<td class="{cell.split()[0]}">{escape(cell)}</td>')
            elif h == "figure" or (h == "protocol" and head is COLUMNS):
                tds.append(f"<td><code>{escape(cell)}</code></td>")
            else:
                kind = ' class="number"' if h in ("value", "95 %", "n") else ""
                tds.append(f"<td{kind}>{escape(cell)}</td>")
        made.append("<tr>" + "".join(tds) + "</tr>")
    return f'<div class="wide"><table>{"".join(made)}</table></div>'


def _list(lines: Any) -> str:
    return "<ul>" + "".join(f"<li>{escape(line).replace('**', '')}</li>" for line in lines) + "</ul>"
