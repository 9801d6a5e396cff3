"""The results of bench_kernels as a table for a terminal, or as rows for README. Pure text: no device, no torch."""

from __future__ import annotations

from typing import Any, NamedTuple

Result = dict[str, Any]
Ceilings = dict[str, float] | None
SCALE = {"TFLOP/s": 1e12, "GB/s": 1e9}


class Verdict(NamedTuple):
    """One target of one row, or the row itself where it has none or was not measured."""

    row: str
    ours: str
    peer: str
    ratio: str
    hoped: str
    met: str


def speed(implementation: Result, unit: str) -> str:
    """As in "412 TFLOP/s"; what went wrong where there is no speed."""
    for trouble in ("failed", "absent"):
        if trouble in implementation:
            return trouble
    wrong = "" if implementation.get("right", True) else "WRONG "
    hidden = "" if implementation.get("launches_hidden", True) else " (launch-bound)"
    return f"{wrong}{implementation['per_second'] / SCALE[unit]:,.0f} {unit}{hidden}"


def memory(implementation: Result) -> str:
    peak = implementation.get("peak_bytes")
    return "-" if peak is None else f"{peak / 2**20:,.0f} MiB"


def verdicts(result: Result, ceilings: Ceilings) -> list[Verdict]:
    """A line for each target of a row."""
    name, unit = result["name"], result["unit"]
    if "not_measured" in result:
        return [Verdict(name, "not measured", result["not_measured"], "", "", "")]
    if "failed" in result:
        return [Verdict(name, f"failed: {result['failed']}", "", "", "", "no")]
    found = result["implementations"]
    ours = found["ours"]
    if "per_second" not in ours:
        return [Verdict(name, f"failed: {ours.get('failed', ours.get('absent'))}", "", "", "", "no")]
    lines = [_verdict(name, unit, found, target, ceilings) for target in result["targets"]]
    judged = {t["versus"] for t in result["targets"]}
    for other, what in found.items():
        if other != "ours" and other not in judged and "absent" not in what:
            ratio = f"{ours['per_second'] / what['per_second']:.2f}x" if "per_second" in what else ""
            lines.append(Verdict(name, speed(ours, unit), f"{other} {speed(what, unit)}", ratio, "", ""))
    return lines or [Verdict(name, speed(ours, unit), "", "", "", "")]


def _verdict(name: str, unit: str, found: dict[str, Result], target: Result, ceilings: Ceilings) -> Verdict:
    ours, versus, factor = found["ours"], target["versus"], target["factor"]
    right = ours.get("right", True)
    if versus == "copy":
        best = (ceilings or {}).get("copy_bytes_per_second")
        ratio = ours["per_second"] / best if best else None
        peer = f"copy {best / 1e9:,.0f} GB/s" if best else "copy: not measured"
        shown, hoped = ("" if ratio is None else f"{ratio:.0%}"), f">= {factor:.0%}"
        met = ratio is not None and ratio >= factor
        return Verdict(name, speed(ours, unit), peer, shown, hoped, _yes(met and right, ratio))
    theirs = found.get(versus, {"absent": ""})
    if target["memory"]:
        a, b = ours.get("peak_bytes"), theirs.get("peak_bytes")
        ratio = a / b if a is not None and b else None
        shown = "" if ratio is None else f"{ratio:.2f}x"
        met = ratio is not None and ratio <= factor
        return Verdict(
            name, memory(ours), f"{versus} {memory(theirs)}", shown, f"<= {factor:.2f}x", _yes(met and right, ratio)
        )
    ratio = ours["per_second"] / theirs["per_second"] if "per_second" in theirs else None
    shown = "" if ratio is None else f"{ratio:.2f}x"
    # A wrong peer is nothing to be measured by.
    met = ratio is not None and ratio >= factor and right
    known = ratio if theirs.get("right", True) else None
    return Verdict(
        name, speed(ours, unit), f"{versus} {speed(theirs, unit)}", shown, f">= {factor:.2f}x", _yes(met, known)
    )


def _yes(met: bool, ratio: float | None) -> str:
    return "no peer" if ratio is None else "yes" if met else "no"


def table(results: list[Result], ceilings: Ceilings, launches: dict[str, dict[str, Any]] | None) -> list[str]:
    """Lines of a table, widest names first fitted; a row's name stands once."""
    head = Verdict("operation", "ours", "peer", "ratio", "hoped", "met")
    body = [v for result in results for v in verdicts(result, ceilings)]
    widths = [max(len(v[i]) for v in (head, *body)) for i in range(len(head))]
    widths[1] = min(widths[1], 40)
    lines, last = [_line(head, widths)], ""
    for v in body:
        shown = v if v.row != last else v._replace(row="", ours="" if v.ours.endswith("/s") else v.ours)
        lines.append(_line(shown, widths))
        last = v.row
    if ceilings:
        copy, product = ceilings["copy_bytes_per_second"], ceilings["product_flops"]
        lines.append(f"ceilings in this run: copy {copy / 1e9:,.0f} GB/s, matrix product {product / 1e12:,.0f} TFLOP/s")
    if launches:
        asked = ", ".join(f"{op} {t.get('ours', '-')} / {t.get('torch', '-')}" for op, t in launches.items())
        lines.append(f"CPU microseconds to ask for one, ours / torch: {asked}")
    judged = [v.met for v in body if v.met in ("yes", "no")]
    measured = sum("per_second" in r.get("implementations", {}).get("ours", {}) for r in results)
    lines.append(f"{measured} of {len(results)} rows measured; {judged.count('yes')} of {len(judged)} targets met")
    return lines


def _line(v: Verdict, widths: list[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(v, widths, strict=True)).rstrip()


def readme_rows(results: list[Result], ceilings: Ceilings, launches: dict[str, dict[str, Any]] | None) -> list[str]:
    """The same as rows of a Markdown table."""
    lines = ["| operation | ours | peer | ratio | hoped | met |", "|---|---|---|---|---|---|"]
    lines += [f"| {' | '.join(v)} |" for result in results for v in verdicts(result, ceilings)]
    return lines
