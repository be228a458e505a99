"""What a run of the suite shows: a line for each case on the terminal, pictures, and one page that holds it all."""

from __future__ import annotations

import base64
import statistics
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastloss import plot
from fastloss.model import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MEMORY = 48e6  # bytes of an array, from which on passes over it are taken as bound by the memory, not by caches


def check() -> None:
    """Raise if a report could not be made here."""
    plot.figure_class()
    _environment()


def _environment() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise ImportError('a report needs Jinja2: pip install "fastloss[bench]"') from error
    loader = jinja2.PackageLoader("fastloss.bench", "")
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)


# --- a line for each case ------------------------------------------------------------------------------------------
def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _our_row(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    return next((row for row in entry["rows"] if row["peer"].startswith("fastloss") and "ms" in row), {})


def verdict(check: Mapping[str, Any]) -> str:
    """A bar in words: what was found, what is asked for, and whether it was met."""
    found = ", again ".join(_number(figure) for figure in check["figures"])
    sign = "at least" if check["at_least"] else "at most"
    state = {True: "met", False: "missed", None: "nothing to compare with"}[check["met"]]
    return f"{check['bar']} {found} ({sign} {check['bound']:g}): {state}"


def cells(entry: Mapping[str, Any]) -> dict[str, str]:
    """What is said of a case."""
    ours, floor = _our_row(entry), entry["floor"]
    best: Mapping[str, Any] = next((row for row in entry["rows"] if row["peer"] == entry["best"]), {})
    return {
        "case": entry["case"],
        "ms": _number(ours.get("ms")),
        "floor": _number(floor["ms"]) if floor else "–",
        "by": floor["by"] if floor else "",
        "to_floor": _number(ours.get("ratio_to_floor")),
        "best": entry["best"] or "–",
        "to_best": _number(best.get("ratio_to_base")),
    }


def heading(section: str) -> str:
    return f"{section}\n  {'':<40}{'ms':>9}{'floor':>9}{'/ floor':>9}  {'best peer':<14}{'ratio':>6}  bars"


def line(entry: Mapping[str, Any]) -> str:
    """A case in a line, and in further lines the bars that it missed, at first or at last, and what failed."""
    if entry["left_out"]:
        return f"  {entry['case']:<40}left out: {entry['left_out']}"
    c = cells(entry)
    missed = [check for check in entry["checks"] if check["met"] is False]
    state = "MISSED" if missed else "met" if any(check["met"] for check in entry["checks"]) else "–"
    numbers = f"{c['ms']:>9}{c['floor']:>9}{c['to_floor']:>9}  {c['best']:<14}{c['to_best']:>6}"
    lines = [f"  {c['case']:<40}{numbers}  {state}"]
    lines += [f"  {'':<6}{verdict(check)}" for check in entry["checks"] if check in missed or len(check["figures"]) > 1]
    lines += [
        f"  {'':<6}{row['peer']} failed: {problem}"
        for row in (*entry["controls"], *entry["rows"])
        for problem in row["problems"]
    ]
    return "\n".join(lines)


# --- pictures ------------------------------------------------------------------------------------------------------
def _control(entry: Mapping[str, Any], name: str) -> float | None:
    """Milliseconds of a control of a case."""
    return next((row["ms"] for row in entry["controls"] if row["peer"] == name and "ms" in row), None)


def _rates(entries: Iterable[Mapping[str, Any]], control: str, per_ms: str, times: float) -> list[float]:
    """A control's rates in units of 10⁹ a second: `times` what the entries say under `per_ms`."""
    found = [(entry, _control(entry, control)) for entry in entries]
    return [times * entry[per_ms] / ms / 1e6 for entry, ms in found if ms is not None]


def _ceilings(entries: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, float], float | None]:
    """Bandwidths in GB/s and peaks in Gflop/s as measured; and the operations that an exponential counts for."""
    largest = max(entry["bytes"] for entry in entries)
    far = [entry for entry in entries if entry["bytes"] >= min(_MEMORY, largest / 4)]
    near = [entry for entry in entries if 1e6 < entry["bytes"] < 4e6]
    single = [entry for entry in entries if entry["dtype"] != "float64"]
    bandwidths = {
        "one read, memory": _rates(far, "read", "bytes", 1),
        "copy, memory": _rates(far, "copy", "bytes", 2),
        "copy, in cache": _rates(near, "copy", "bytes", 2),
    }
    peak = _rates(single, "multiply-add", "multiply_adds", 2)
    exps = _rates((entry for entry in single if entry["exponentials"]), "exponentials", "exponentials", 1)
    peaks = {"multiply-add, float32": statistics.median(peak)} if peak else {}
    worth = statistics.median(peak) / max(exps) if peak and exps else None
    return {name: statistics.median(rates) for name, rates in bandwidths.items() if rates}, peaks, worth


#: Sections that the picture leaves out: cases that are not of its ceilings' type, or of no size.
_NOT_DRAWN = ("Small", "Throughput", "Other", "Extreme", "In place")


def roofline(entries: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Each case among the measured ceilings; None where a control is missing."""
    bandwidths, peaks, worth = _ceilings(entries)
    if worth is None or not bandwidths:
        return None
    groups: dict[str, dict[str, tuple[float, float]]] = {}
    for entry in entries:
        ours = _our_row(entry)
        if ours and not entry["section"].startswith(_NOT_DRAWN) and entry["dtype"] != "float64":
            work = 2 * entry["multiply_adds"] + worth * entry["exponentials"]
            point = (work / entry["moved"], work / ours["ms"] / 1e6)
            groups.setdefault(entry["section"], {})[entry["case"]] = point
    return plot.roofline(groups, bandwidths, peaks) if groups else None


def classes(entries: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Throughput over the number of classes; None where no case is of a sweep."""
    curves: dict[str, list[tuple[int, float, float | None, bool]]] = {}
    for entry in entries:
        ours, copy = _our_row(entry), _control(entry, "copy")
        if ours and "to_neighbours" in entry:
            beside = None if copy is None else 2 * entry["bytes"] / copy / 1e6
            cliff = any(check["bar"] == "neighbours" and check["met"] is False for check in entry["checks"])
            loss = entry["case"].partition("-")[0]
            curves.setdefault(loss, []).append((entry["classes"], entry["moved"] / ours["ms"] / 1e6, beside, cliff))
    return plot.throughput(curves) if curves else None


# --- files ---------------------------------------------------------------------------------------------------------
#: Cases for a first look.
_FIRST = {
    "softmax-65536x10": "softmax,\n65536 × 10",
    "softmax-65536x100": "softmax,\n65536 × 100",
    "softmax-16384x1000": "softmax,\n16384 × 1000",
    "linear-softmax-50000x3072x10": "linear softmax,\n50000 × 3072 × 10",
}


def peers(entries: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Times of a few cases beside those of the peers; None where none of them was measured beside one."""
    jobs: dict[str, dict[str, float]] = {}
    for entry in entries:
        times = {row["peer"].partition("-cython")[0]: row["ms"] for row in entry["rows"] if "ms" in row}
        if entry["case"] in _FIRST and len(times) > 1:
            jobs[_FIRST[entry["case"]]] = times
    return plot.times(jobs) if jobs else None


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def write(content: Mapping[str, Any], folder: Path) -> None:
    """peers.png, roofline.png and classes.png, where there is something to draw, and report.html, which holds them."""
    entries = content["cases"]
    figures = {"peers.png": peers(entries), "roofline.png": roofline(entries), "classes.png": classes(entries)}
    pictures = {name: _png(figure) for name, figure in figures.items() if figure is not None}
    sections: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        checks = [{"met": check["met"], "text": verdict(check)} for check in entry["checks"]]
        problems = [
            f"{row['peer']}: {text}" for row in (*entry["controls"], *entry["rows"]) for text in row["problems"]
        ]  # fmt: skip
        times = {row["peer"]: _number(row["ms"]) for row in (*entry["controls"], *entry["rows"]) if "ms" in row}
        shown = {"cells": cells(entry), "checks": checks, "problems": problems, "times": times}
        sections.setdefault(entry["section"], []).append(shown | {"left_out": entry["left_out"]})
    checks = [check for entry in entries for check in entry["checks"] if check["met"] is not None]
    page = _environment().get_template("report.html.j2").render(
        content=content, sections=sections, met=sum(check["met"] for check in checks), bars=len(checks),
        pictures={name: base64.b64encode(data).decode() for name, data in pictures.items()},
    )  # fmt: skip
    for name, data in (pictures | {"report.html": page.encode()}).items():
        with replacing(folder / name) as file:
            file.write(data)
