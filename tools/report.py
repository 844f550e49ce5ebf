"""Results as a Markdown table for people, as CSV for spreadsheets, and as pictures of quality against evaluations.

All of them are made from result files only. A row of the table is one point of the matrix over its draws: the mean, and
how far a single draw lies from it (the standard deviation over draws; of a single draw its jackknife standard error).
"""

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distill.pictures import save_figure
from tools.digest import digest_json
from tools.results import Difference, Result, Spread

DEBIASED = ("fd", "relative-fd")  # metrics whose bias is worth a column of its own


@dataclass(frozen=True)
class Row:
    """The draws of one point of the matrix."""

    results: tuple[Result, ...]

    @property
    def name(self) -> str:
        return self.results[0].name

    @property
    def axes(self) -> dict[str, Any]:
        return {axis: value for axis, value in self.results[0].axes.items() if axis != "draw"}

    def spread(self, space: str, metric: str, debiased: bool = False) -> Spread | None:
        """Of a metric over the draws; None where they do not all have it."""
        found = [result.values.get(space, {}).get(metric) for result in self.results]
        known = [estimate for estimate in found if estimate is not None]
        if len(known) < len(found) or (debiased and any(e.debiased is None for e in known)):
            return None
        return Spread.of(known, debiased)


def rows_of(results: Iterable[Result]) -> list[Row]:
    """Draws of one point are one row; the order is that of the results.

    A source that was another when it was judged before (a model that has trained on) is a row of its own, and so are
    numbers of other extractors and references.
    """
    groups: dict[str, list[Result]] = {}
    for result in _merged(results):
        point = {a: v for a, v in result.axes.items() if a != "draw"}
        compared = [result.facts[part] for part in ("extractors", "references")]
        which = (result.name, digest_json(result.inputs["facts"]["source"]), point, result.n, compared)
        groups.setdefault(repr(which), []).append(result)
    return [Row(tuple(group)) for group in groups.values()]


def _merged(results: Iterable[Result]) -> list[Result]:
    """Results of one set of samples are one, with the metrics of all: a metric that was added later is of no new draw.

    Raises ValueError where two of them have other values for one metric.
    """
    found: list[Result] = []
    for result in results:
        of = {part: result.facts[part] for part in ("extractors", "references")}
        for k, known in enumerate(found):
            same = (known.name, known.facts["stream"], known.n) == (result.name, result.facts["stream"], result.n)
            if same and all(known.facts[p].get(s, v) == v for p, spaces in of.items() for s, v in spaces.items()):
                found[k] = _joined(known, result)
                break
        else:
            found.append(result)
    return found


def _joined(a: Result, b: Result) -> Result:
    values = {space: dict(metrics) for space, metrics in a.values.items()}
    for space, metrics in b.values.items():
        for metric, estimate in metrics.items():
            if values.setdefault(space, {}).setdefault(metric, estimate) != estimate:
                raise ValueError(f"result: {a.key} and {b.key} are of the same samples, with another {space} {metric}")
    facts = {part: a.facts[part] | b.facts[part] for part in ("extractors", "references")}
    return replace(a, values=values, facts=a.facts | facts)


def columns_of(results: Sequence[Result]) -> list[tuple[str, str]]:
    """(extractor, metric) of all values, in the order that they first appear in."""
    seen = {(space, metric): None for r in results for space, metrics in r.values.items() for metric in metrics}
    return list(seen)


def markdown_table(results: Sequence[Result]) -> str:
    """The table, what its numbers are of, and the warnings that came with them; ends in a newline."""
    rows, columns = rows_of(results), columns_of(results)
    names = _names(rows)
    axes = _varying(rows)
    many = len({space for space, _ in columns}) > 1
    heads: list[str] = ["", *axes]
    cells: list[list[str]] = [
        [_escaped(name), *(_escaped(_plain(row.axes.get(a))) for a in axes)]
        for name, row in zip(names, rows, strict=True)
    ]
    for space, metric in columns:
        for debiased in (False, True) if metric in DEBIASED else (False,):
            heads.append(f"{space} {metric}" if many else metric)
            heads[-1] += ", debiased" if debiased else ""
            for row, line in zip(rows, cells, strict=True):
                line.append(_written(row.spread(space, metric, debiased)))
    heads += ["NFE", "images/s", "n x draws"]
    for row, line in zip(rows, cells, strict=True):
        first = row.results[0]
        rates = [r.provenance["images_per_second"] for r in row.results if r.provenance.get("images_per_second")]
        speed = f"{statistics.fmean(rates):,.0f}" if rates else "–"
        line += [_plain(first.nfe), speed, f"{first.n} x {len(row.results)}"]
    lines = [_line(heads), _line([":--", *["--:"] * (len(heads) - 1)]), *map(_line, cells), ""]
    lines += [f"- {note}" for note in _notes(results)]
    return "\n".join(lines) + "\n"


def _axes(rows: Sequence[Row]) -> list[str]:
    return list({axis: None for row in rows for axis in row.axes})


def _names(rows: Sequence[Row]) -> list[str]:
    """Names; with a hash of the source where one name stands for several at one point."""
    sources = [digest_json(row.results[0].inputs["facts"]["source"])[:8] for row in rows]
    of_name: dict[str, set[str]] = {}
    for row, source in zip(rows, sources, strict=True):
        of_name.setdefault(f"{row.name} {row.axes}", set()).add(source)
    pairs = zip(rows, sources, strict=True)
    return [
        f"{row.name} [{source}]" if len(of_name[f"{row.name} {row.axes}"]) > 1 else row.name for row, source in pairs
    ]


def _varying(rows: Sequence[Row]) -> list[str]:
    return [a for a in _axes(rows) if len({repr(row.axes[a]) for row in rows if a in row.axes}) > 1]


def _notes(results: Sequence[Result]) -> list[str]:
    names = {space: name for result in results for space, name in result.facts["extractors"].items()}
    notes = [f"{space}: {name}" for space, name in names.items()]
    where = sorted({str(result.inputs["manifest"]["reference"]) for result in results})
    notes.append(f"reference: {', '.join(where)}")
    notes.append(
        "± of several draws is their standard deviation, of one its jackknife error; 95 % intervals: in the CSV"
    )
    warned = {
        f"{space} {metric}: {estimate.warning}": None
        for result in results
        for space, metrics in result.values.items()
        for metric, estimate in metrics.items()
        if estimate.warning
    }
    return [*notes, *(f"warning: {text}" for text in warned)]


def csv_table(results: Sequence[Result]) -> str:
    """One line for each number of each result: the point, the value, and what is known of its error."""
    axes = [*_axes(rows_of(results)), "draw"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    numbers = ("value", "standard_error", "debiased", "low", "high")
    writer.writerow(["name", *axes, "n", "nfe", "extractor", "metric", *numbers, "key"])
    for result in results:
        point = [result.name, *(_blank(result.axes.get(a)) for a in axes), result.n, _blank(result.nfe)]
        for space, metrics in result.values.items():
            for metric, e in metrics.items():
                low, high = e.interval or (None, None)
                values = [_blank(v) for v in (e.value, e.standard_error, e.debiased, low, high)]
                writer.writerow([*point, result.facts["extractors"][space], metric, *values, result.key])
    return out.getvalue()


def plot_quality(results: Sequence[Result], folder: str | Path) -> list[Path]:
    """A picture of every metric against the evaluations a sample, with error bars: NAME.png in `folder`.

    A line is one source with all axes but the steps fixed; what exists already is a level line. Metrics are left out
    where no line has two points. Returns the files.
    """
    from matplotlib.figure import Figure

    files, rows = [], rows_of(results)
    varying, names = _varying(rows), _names(rows)
    for space, metric in columns_of(results):
        lines: dict[str, list[tuple[int, Spread]]] = {}
        levels: dict[str, Spread] = {}
        for name, row in zip(names, rows, strict=True):
            spread = row.spread(space, metric)
            if spread is None:
                continue
            nfe = row.results[0].nfe
            if nfe is None:
                levels[name] = spread
            else:
                lines.setdefault(_label(name, row, varying), []).append((nfe, spread))
        if not any(len(points) > 1 for points in lines.values()):
            continue

        figure = Figure(figsize=(6, 4), layout="constrained")
        axis = figure.subplots()
        for label, points in sorted(lines.items()):
            points.sort(key=lambda point: point[0])
            axis.errorbar(
                [nfe for nfe, _ in points],
                [spread.mean for _, spread in points],
                [spread.spread or 0.0 for _, spread in points],
                label=label,
                marker="o",
                markersize=3,
                capsize=2,
            )
        for label, spread in levels.items():
            axis.axhline(spread.mean, color="gray", linestyle=":", label=label)
            if spread.spread:
                axis.axhspan(spread.mean - spread.spread, spread.mean + spread.spread, color="gray", alpha=0.15)
        axis.set(xlabel="network evaluations a sample", ylabel=f"{space} {metric}", xscale="log")
        evaluations = sorted({nfe for points in lines.values() for nfe, _ in points})
        axis.set_xticks(evaluations, map(str, evaluations))
        axis.minorticks_off()
        axis.legend(frameon=False, fontsize="small")
        files.append(Path(folder) / f"{space}-{metric}.png".replace("/", "_").replace(":", "_"))
        save_figure(figure, files[-1])
    return files


def _label(name: str, row: Row, axes: Sequence[str]) -> str:
    return ", ".join([name, *(f"{a} {_plain(row.axes[a])}" for a in axes if a != "steps" and a in row.axes)])


def difference_table(differences: Sequence[Difference], a: str, b: str) -> str:
    """Markdown of b - a, with its 95 % interval and what that says; ends in a newline."""
    lines = [
        _line(["", _escaped(a), _escaped(b), "difference", "95 % interval", ""]),
        _line([":--", "--:", "--:", "--:", "--:", ":--"]),
    ]
    for d in differences:
        interval, verdict = "–", "–"
        if d.interval is not None:
            interval = f"{d.interval[0]:+.4g} to {d.interval[1]:+.4g}"
            verdict = "differ" if d.interval[0] * d.interval[1] > 0 else "no difference shown"
        cells = [f"{d.extractor} {d.metric}", f"{d.a:.4g}", f"{d.b:.4g}", f"{d.difference:+.4g}", interval, verdict]
        lines.append(_line(cells))
    apart = [f"{d.extractor} {d.metric}" for d in differences if not d.paired]
    notes = ["paired by sample number"] if len(apart) < len(differences) else []
    notes += [f"not paired, the errors of both are added: {', '.join(apart)}"] if apart else []
    if any(d.metric in DEBIASED for d in differences):
        notes.append("differences of fd are of the debiased values")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def _written(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    return f"{spread.mean:.4g}" + ("" if spread.spread is None else f" ± {spread.spread:.2g}")


def _plain(value: Any) -> str:
    return "–" if value is None else str(value)


def _blank(value: Any) -> Any:
    return "" if value is None else value


def _escaped(text: str) -> str:
    return text.replace("|", r"\|")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
