"""What a benchmark leaves: records, as lines of JSON, as a Markdown table and as a picture.

Imports neither torch nor transformers: on Linux the peak memory of a process starts at that of the
process that started it, so whoever starts a measurement has to be small.
"""

import argparse
import importlib.metadata
import json
import statistics
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from parts.files import json_lines, read_rows

OURS = "ours"
MIB = 2**20


@dataclass(frozen=True)
class Record:
    """What one contestant did in one row of the table.

    row       what was to be done
    who       "ours", a peer, or "floor": what no implementation could be faster than
    unit      of the values: "s", of which less is better, or "tokens/s"
    values    one for each repeat; the values of one repeat were measured right after each other
    peak_mib  the most memory that its own process took, in MiB; None: not measured
    note      what to know of it, or why there is no value
    """

    row: str
    who: str
    unit: str = "s"
    values: tuple[float, ...] = ()
    peak_mib: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Target:
    """What a row is to reach beside a contestant.

    times   ours is to be so many times as fast; beside the floor, it may take so many times as long
    memory  ours is to take at most this share of its peak; None: no target
    """

    times: float
    memory: float | None = None


def report(found: Iterable[Record], as_json: bool) -> None:
    """Print records: each as a line of JSON as soon as it is there, or all of them as a table."""
    records = []
    for record in found:
        if as_json:
            print(json_lines([asdict(record)]), end="", flush=True)
        records.append(record)
    if not as_json:
        print(table(records))


def parse(line: str) -> Record:
    """Return the record in a line of JSON."""
    fields = json.loads(line)
    return Record(**{**fields, "values": tuple(fields["values"])})


def read(path: Path) -> list[Record]:
    """Return the records of a file; of those for the same row and contestant, the last."""
    found: dict[tuple[str, str], Record] = {}
    for row in read_rows(path):
        if "machine" not in row:
            record = parse(json.dumps(row))
            found[record.row, record.who] = record
    return list(found.values())


def peer_version(package: str) -> str | None:
    """Return the installed version of a package, None where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing(row: str, who: str, package: str) -> Record:
    """Return the record of a peer that is not there."""
    return Record(row, who, note=f"{package} is not installed (bench/requirements.txt)")


def add_common_flags(parser: argparse.ArgumentParser, repeats: int) -> None:
    """Add the flags that every script has."""
    parser.add_argument("--repeats", type=int, default=repeats, help="measurements of each")
    parser.add_argument("--json", action="store_true", help="print records as lines of JSON")


def ratios(ours: Record, other: Record) -> list[float]:
    """Return, repeat by repeat, how many times as fast ours is as the other.

    >>> ratios(Record("a", "ours", "s", (1.0, 2.0)), Record("a", "peer", "s", (3.0, 3.0)))
    [3.0, 1.5]
    >>> ratios(Record("a", "ours", "tokens/s", (6.0,)), Record("a", "peer", "tokens/s", (3.0,)))
    [2.0]
    """
    pairs = zip(ours.values, other.values, strict=True)
    if ours.unit == "s":
        return [theirs / mine for mine, theirs in pairs]
    return [mine / theirs for mine, theirs in pairs]


def spread(values: Iterable[float], digits: int) -> str:
    """Return the median, with the smallest and the largest value behind it.

    >>> spread([1.0, 4.0, 2.0], 1)
    '2.0 (1.0 to 4.0)'
    """
    values = list(values)
    ends = f"{min(values):,.{digits}f} to {max(values):,.{digits}f}"
    return f"{statistics.median(values):,.{digits}f} ({ends})"


def _rows(records: Iterable[Record]) -> dict[str, dict[str, Record]]:
    """Return each row's records by contestant, in the order in which they came."""
    rows: dict[str, dict[str, Record]] = {}
    for record in records:
        rows.setdefault(record.row, {})[record.who] = record
    return rows


def _beside(ours: Record | None, other: Record) -> str:
    """Say in a cell of the table how ours compares to the other in time."""
    if ours is None or not ours.values or not other.values:
        return ""
    times = ratios(ours, other)
    if other.who == "floor":
        return f"{spread([1 / ratio for ratio in times], 2)} x its time"
    return f"{spread(times, 2)} x as fast"


def _memory_beside(ours: Record | None, other: Record) -> str:
    if ours is None or not ours.peak_mib or not other.peak_mib:
        return ""
    return f"{ours.peak_mib / other.peak_mib:.2f}"


def reached(ours: Record, other: Record, target: Target) -> bool:
    """Say whether the medians reach the target."""
    ratio = statistics.median(ratios(ours, other))
    fast = 1 / ratio <= target.times if other.who == "floor" else ratio >= target.times
    if target.memory is None:
        return fast
    peaks = ours.peak_mib and other.peak_mib
    return fast and bool(peaks) and (ours.peak_mib or 0) <= target.memory * (other.peak_mib or 0)


def _target_text(ours: Record | None, other: Record, target: Target | None) -> str:
    if target is None:
        return ""
    text = f"{target.times:g} x"
    if other.who == "floor":
        text = f"at most {text}"
    if target.memory is not None:
        text += f", {target.memory:g} of its memory"
    if ours is None or not ours.values or not other.values:
        return text
    return f"{text}: {'reached' if reached(ours, other, target) else 'missed'}"


def _values_text(record: Record) -> str:
    if not record.values:
        return record.note or "nothing measured"
    digits = 1 if statistics.median(record.values) >= 10 else 4
    return f"{spread(record.values, digits)} {record.unit}"


def table(records: Iterable[Record], targets: dict[tuple[str, str], Target] | None = None) -> str:
    """Return a Markdown table: a line for each contestant of each row, ours first.

    targets  by row and contestant
    """
    titles = (
        "row",
        "who",
        "median (from to)",
        "ours beside it",
        "peak MiB",
        "ours takes of it",
        "target",
    )
    lines = [" | ".join(titles), " | ".join("---" for _ in titles)]
    notes = []
    for row, by_who in _rows(records).items():
        ours = by_who.get(OURS)
        for who in sorted(by_who, key=lambda name: (name != OURS, name)):
            record = by_who[who]
            other = who != OURS
            target = (targets or {}).get((row, who))
            cells = [
                row,
                who,
                _values_text(record),
                _beside(ours, record) if other else "",
                f"{record.peak_mib:,.0f}" if record.peak_mib else "",
                _memory_beside(ours, record) if other else "",
                _target_text(ours, record, target),
            ]
            lines.append(" | ".join(cells))
            if record.values and record.note:
                notes.append(f"- {row}, {who}: {record.note}")
    text = "\n".join(f"| {line} |" for line in lines)
    return "\n\n".join([text, "\n".join(notes)]) if notes else text


def picture(records: Iterable[Record], targets: dict[tuple[str, str], Target], path: Path) -> None:
    """Draw how many times as fast ours is as each other contestant, row by row, into a PNG file.

    The line of a bar spans the repeats, and a red tick is the target. Where nothing can be
    compared, the picture says so.
    """
    # Here, not above: whoever starts measurements has to be small, and draws only at the end.
    from matplotlib.figure import Figure

    bars = []
    for row, by_who in _rows(records).items():
        ours = by_who.get(OURS)
        for who, other in by_who.items():
            if who != OURS and ours is not None and ours.values and other.values:
                bars.append((f"{row}, {who}", ratios(ours, other), targets.get((row, who))))
    figure = Figure(figsize=(9, 1.6 + 0.32 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    for place, (label, times, target) in enumerate(bars):
        floor = label.endswith(", floor")
        middle = statistics.median(times)
        color = "0.65" if floor else "tab:blue"
        axes.barh(place, middle, height=0.62, color=color)
        axes.plot([min(times), max(times)], [place, place], color="black", linewidth=1)
        axes.annotate(f" {middle:.2f}", (max(times), place), va="center", fontsize=8)
        if target is not None:
            wanted = 1 / target.times if floor else target.times
            axes.plot([wanted, wanted], [place - 0.4, place + 0.4], color="tab:red", linewidth=2)
    axes.set_yticks(range(len(bars)), [label for label, _, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel("so many times as fast as the other; nothing beats a floor (grey); red: target")
    axes.set_title("Ours beside its peers and its floors" if bars else "Nothing to compare")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)
