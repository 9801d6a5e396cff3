"""`python -m data.prepare diseases`: reads the sources, has the database built, and says what the linter found."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from tqdm import tqdm

from data.disease_sources import find_source, read_source
from data.diseases import Database, build, open_database
from llama.files import atomic_file

_SHOWN = 60  # quarantined rows that are printed; --report and the database hold all
_BEGINS = b'{\n "sources"'  # a report, which a later one may replace


def prepare(args: argparse.Namespace) -> None:
    """Build the database of args.sources at args.out. ValueError, and nothing written, when something is wrong."""
    paths = [find_source(s) for s in args.sources]
    written = [Path(p) for p in (args.out, args.report) if p]
    for out in written:
        for path in paths:
            if out.resolve() == path.resolve() or (out.exists() and os.path.samefile(out, path)):
                raise ValueError(f"{out}: is a source; write to another place, originals are never overwritten")
    if len(written) == 2 and written[0].resolve() == written[1].resolve():
        raise ValueError(f"{args.report}: is the database; give the report another name")
    if args.report and Path(args.report).exists() and not Path(args.report).read_bytes().startswith(_BEGINS):
        raise ValueError(f"{args.report}: exists and is no report; choose another name")
    sources = [read_source(p) for p in tqdm(paths, desc="reading", unit=" sources", disable=None)]
    with tqdm(total=sum(len(s.rows) for s in sources), desc="indexing", unit=" rows", disable=None) as bar:
        build(sources, args.out, bar.update)
    database = open_database(args.out)
    if args.report:
        with atomic_file(args.report) as file:
            file.write_text(json.dumps(database.report(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    summarise(database)


def summarise(database: Database) -> None:
    """Print rows by source, and every quarantined row with its reason."""
    report = database.report()
    print(f"{'source':<24} {'kind':<8} {'rows':>7} {'kept':>7} {'quarantined':>12} {'mended':>7}")
    for s in report["sources"]:
        kept = s["rows"] - s["quarantined"]
        print(f"{s['name']:<24} {s['kind']:<8} {s['rows']:>7,} {kept:>7,} {s['quarantined']:>12,} {s['mended']:>7,}")
    if report["quarantined"]:
        print("\nquarantined: kept in the file, never found by a search")
    for f in report["quarantined"][:_SHOWN]:
        print(f"  [DB {f['entry']}] {f['source']} {f['source_row']}, {f['name'] or '(no name)'}: {f['reason']}")
    if (more := len(report["quarantined"]) - _SHOWN) > 0:
        print(f"  ... and {more:,} more; --report FILE.json lists them")
    removed, noted = len(report["removed"]), len(report["noted"])
    print(
        f"\nmended: {removed:,} times something was removed from a row; {noted:,} rows only noted (--report FILE.json)"
    )
    print(f"wrote {database.path} ({os.path.getsize(database.path) / 1e6:.1f} MB)")
