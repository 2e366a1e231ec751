"""The figures of a report, each a function of plain data, and one function that writes any of them as PNG and SVG.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), told apart with any colour vision; the control is
grey and dashed throughout. Equal data give equal bytes: no dates, no random ids, no style but the one below. Labels are
text and never formulas, whatever they hold.
"""

import contextlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from medssl.platform import atomic, history, words
from medssl.platform.leaderboard import Leaderboard, Row

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # without black and the yellow, too pale on white
CONTROL, OTHERS = "#4d4d4d", "#bcc3ca"
INK, SOFT, LINE = "#1c2126", "#5b6670", "#e3e7ea"
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "medssl",
    "svg.fonttype": "path",
    "hatch.linewidth": 0.6,
}
WIDTH = 7.2  # inches: both columns of a journal's page
MOST = 40  # arms in the forest plot
BOXES = 8  # arms in a panel of box plots
PANELS = 12  # histograms, classes or parameters in one figure
LETTERS = (108, 0)  # points from where "0.802  [-0.123, 0.456]" begins to the letters behind it
POINTS = 250  # of a curve; more cannot be seen


@dataclass(frozen=True)
class Curve:
    """What one stage reported while it trained."""

    arm: str
    kind: str  # "pretrain" or "finetune"
    rows: Sequence[history.Row]


@dataclass(frozen=True)
class Histogram:
    """Realised IoU of an arm's pairs, counted in equal bins over [0, 1], and the interval that was asked for."""

    arm: str
    counts: Sequence[int]
    exactly_0: int
    asked: tuple[float, float] | None


@dataclass(frozen=True)
class Distribution:
    """How often something of a data set is how large: counts between edges."""

    title: str
    unit: str
    edges: Sequence[float]
    counts: Sequence[int]


@dataclass(frozen=True)
class Spent:
    """The stages of one kind: planned and done, and their hours so far and to come (None: not known yet)."""

    kind: str
    planned: int
    done: int
    hours: float
    hours_left: float | None


def save(figure: Figure, folder: Path, name: str) -> tuple[Path, Path]:
    """Write a figure as PNG and as SVG."""
    written = folder / f"{name}.png", folder / f"{name}.svg"
    for path, content in zip(written, (png(figure), svg(figure)), strict=True):
        atomic.write(path, lambda file, content=content: file.write(content))  # type: ignore[misc]
    return written


def png(figure: Figure, dpi: float = 200) -> bytes:
    return _bytes(figure, "png", {"Software": None}, dpi)


def svg(figure: Figure) -> bytes:
    return _bytes(figure, "svg", {"Date": None, "Creator": None})


def _bytes(figure: Figure, kind: str, metadata: Mapping[str, None], dpi: float = 200) -> bytes:
    out = io.BytesIO()
    with _styled():
        figure.savefig(out, format=kind, metadata=dict(metadata), dpi=dpi)
    return out.getvalue()


@contextlib.contextmanager
def _styled() -> Iterator[None]:
    """The style of this file on top of matplotlib's own, whatever the user's."""
    with style.context(["default", STYLE]):
        yield


def _figure(height: float, width: float = WIDTH) -> Figure:
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)  # without pyplot, which would keep every figure
    return figure


def colours(arms: Sequence[str], control: str) -> dict[str, str]:
    """A colour per arm: the control grey, the first six others their own, further ones a pale grey together."""
    others = [arm for arm in arms if arm != control]
    found = {arm: PALETTE[number] if number < len(PALETTE) else OTHERS for number, arm in enumerate(others)}
    return {arm: CONTROL if arm == control else found[arm] for arm in arms}


# --- scores ---


def forest(board: Leaderboard) -> Figure:
    """Every arm's mean with its 95 % interval, each pretraining's mean as a dot, the control as a line, and the groups.

    An interval that leaves the axis ends in an arrow. Of more than MOST arms the first ones are drawn, and the control.
    """
    rows = [row for row in board.rows if row.mean is not None]
    rows = [row for number, row in enumerate(rows) if number < MOST or row.arm == board.control]
    with _styled():
        figure = _figure(0.9 + 0.36 * len(rows))
        axes, beside = figure.subplots(1, 2, sharey=True, width_ratios=(3.0, 1.65))
        axes.set_xlim(*_limits(rows))
        reference = next((row.mean for row in rows if row.arm == board.control), None)
        if reference is not None:
            axes.axvline(reference, color=CONTROL, linestyle=(0, (4, 3)), linewidth=1, gid="control", zorder=1)
        for y, row in enumerate(rows):
            colour = CONTROL if row.arm == board.control else PALETTE[0]
            _interval(axes, y, row, colour)
            units = [float(np.mean(group)) for group in row.scores]
            axes.plot(units, [y + 0.24] * len(units), "o", color=colour, markersize=3, alpha=0.6, markeredgewidth=0, gid="dots")
            beside.text(0, y, f"{words.number(row.mean)}  {_bracketed(row)}", va="center", fontsize=8)
            letters = beside.annotate(
                _short(row.letters, 8), (0, y), LETTERS, textcoords="offset points", va="center", fontsize=8
            )
            letters.set_gid("letters")
        beside.text(0, -0.85, "mean  [95 % interval]", va="center", fontsize=8, color=SOFT)
        beside.annotate("group", (0, -0.85), LETTERS, textcoords="offset points", va="center", fontsize=8, color=SOFT,
                        annotation_clip=False)  # fmt: skip
        beside.set_axis_off()
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), [f"{_short(row.arm)}  {row.k}×{row.m}" for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set_xlabel(f"{_named(board.metric)}, mean over test patients")
    return figure


def _interval(axes: Axes, y: float, row: Row, colour: str) -> None:
    """An arm's mean and interval at height y, arrows where the axis ends before it does."""
    assert row.mean is not None
    if row.low is not None and row.high is not None:
        left, right = axes.get_xlim()
        low, high = max(row.low, left), min(row.high, right)
        axes.plot([low, high], [y, y], color=colour, linewidth=1.8, solid_capstyle="butt", gid="interval", zorder=3)
        for end, cut, marker in ((low, row.low < left, "<"), (high, row.high > right, ">")):
            axes.plot(end, y, marker if cut else "|", color=colour, markersize=5, clip_on=False, zorder=3)
    axes.plot(row.mean, y, "s", color=colour, markersize=5.5, gid="mean", zorder=4)


def _limits(rows: Sequence[Row]) -> tuple[float, float]:
    """What an axis of scores shows: all pretrainings, and of the intervals as much as leaves these readable."""
    units = [float(np.mean(group)) for row in rows for group in row.scores]
    lows = [row.low for row in rows if row.low is not None]
    highs = [row.high for row in rows if row.high is not None]
    least, most = min(units), max(units)
    room = 1.5 * max(most - least, 0.005)
    low = min(least, max(min(lows, default=least), least - room))
    high = max(most, min(max(highs, default=most), most + room))
    edge = 0.04 * (high - low) or 0.01
    return low - edge, high + edge


def over_interval(board: Leaderboard, intervals: Mapping[str, tuple[float, float]]) -> Figure:
    """Score over IoU interval: a bar spans each arm's interval at the height of its mean, its 95 % interval in the middle.

    Arms without an interval, the control among them, are lines from side to side.
    """
    rows = [row for row in board.rows if row.mean is not None]
    named = sum(row.arm in intervals for row in rows) <= 8
    with _styled():
        figure = _figure(3.6)
        axes = figure.subplots()
        low, high = _limits(rows)
        axes.set(xlim=(-0.02, 1.02), ylim=(low, high), xlabel="IoU of the two crops of a pair", ylabel=_named(board.metric))
        lines, taken = [], []
        for row in rows:
            assert row.mean is not None
            if row.arm not in intervals:
                colour = CONTROL if row.arm == board.control else PALETTE[4]
                axes.axhline(row.mean, color=colour, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
                lines.append((row.mean, row.arm, colour))
                continue
            start, end = intervals[row.arm]
            axes.plot([start, end], [row.mean] * 2, color=PALETTE[0], linewidth=5, solid_capstyle="butt", alpha=0.55, gid="bar")
            middle = (start + end) / 2
            axes.plot(middle, row.mean, "o", color=PALETTE[0], markersize=5, zorder=4)
            if row.low is not None and row.high is not None:
                axes.plot([middle] * 2, [row.low, row.high], color=PALETTE[0], linewidth=1.2, zorder=3)
            taken.append((start, row.mean, row.arm))
        for start, mean, arm in taken if named else ():
            axes.annotate(_short(arm), (start, mean), (6, 5), textcoords="offset points", fontsize=8)
        for mean, (at, arm, colour) in zip(
            _apart([line[0] for line in lines], 0.055 * (high - low)), sorted(lines), strict=True
        ):
            del at
            axes.annotate(_short(arm), (1.02, mean), (4, 0), textcoords="offset points", fontsize=8, color=colour, va="center",
                          annotation_clip=False)  # fmt: skip
        axes.grid(axis="y")
    return figure


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """The values in ascending order, moved up as far as they need to stand `gap` apart."""
    placed: list[float] = []
    for value in sorted(values):
        placed.append(max(value, placed[-1] + gap) if placed else value)
    return placed


def slices(board: Leaderboard, parameters: Mapping[str, Mapping[str, float]]) -> Figure:
    """Score over each searched parameter, a panel each: mean and 95 % interval of every arm that sets it.

    parameters   name -> arm -> value; on a logarithmic axis where the values span more than two decades
    """
    chosen = list(parameters.items())[:PANELS]
    rows = {row.arm: row for row in board.rows if row.mean is not None}
    columns = min(3, len(chosen))
    lines = -(-len(chosen) // columns)
    with _styled():
        figure = _figure(0.4 + 2.5 * lines, WIDTH if columns > 1 else 5.0)
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
        low, high = _limits(list(rows.values()))
        reference = rows.get(board.control)
        for axes, (name, values) in zip(grid.flat, chosen, strict=False):
            for arm, x in values.items():
                if arm in rows:
                    row = rows[arm]
                    if row.low is not None and row.high is not None:
                        axes.plot([x, x], [row.low, row.high], color=PALETTE[0], linewidth=1, alpha=0.45, zorder=2)
                    axes.plot(x, row.mean, "o", color=PALETTE[0], markersize=4.5, gid="arm", zorder=3)
            if reference is not None and reference.mean is not None:
                axes.axhline(reference.mean, color=CONTROL, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
            _scale(axes, list(values.values()))
            axes.set(xlabel=name, ylim=(low, high))
            axes.grid(axis="y")
        for axes in grid[:, 0]:
            axes.set_ylabel(_named(board.metric))
        for axes in list(grid.flat)[len(chosen) :]:
            axes.set_visible(False)
        if reference is not None:
            grid.flat[0].annotate(
                f"control: {_short(board.control)}", (0.02, reference.mean), (0, 3), color=CONTROL, fontsize=8,
                xycoords=grid.flat[0].get_yaxis_transform(), textcoords="offset points",
            )  # fmt: skip
    return figure


def plane(board: Leaderboard, names: tuple[str, str], points: Mapping[str, tuple[float, float]]) -> Figure:
    """Score over two parameters: every arm a point in the colour of its mean, over contours where there are enough."""
    rows = [row for row in board.rows if row.arm in points and row.mean is not None]
    x, y = np.array([points[row.arm] for row in rows]).T
    means = np.array([row.mean for row in rows], float)
    with _styled():
        figure = _figure(3.8, 5.4)
        axes = figure.subplots()
        limits = {"vmin": means.min(), "vmax": means.max()}
        if len(rows) >= 10:
            with contextlib.suppress(RuntimeError, ValueError):  # points in one line have no triangles between them
                axes.tricontourf(x, y, means, levels=12, cmap="cividis", alpha=0.55, **limits)
        drawn = axes.scatter(x, y, c=means, cmap="cividis", s=42, edgecolors="white", linewidths=0.8, zorder=3, **limits)
        best = min(range(len(rows)), key=lambda index: board.rows.index(rows[index]))
        axes.plot(x[best], y[best], "o", markersize=11, markerfacecolor="none", markeredgecolor=PALETTE[1], gid="best")
        axes.annotate("best mean", (x[best], y[best]), (9, 6), textcoords="offset points", fontsize=8, color=PALETTE[1])
        axes.set(xlabel=names[0], ylabel=names[1])
        axes.use_sticky_edges = False
        axes.margins(0.08)
        figure.colorbar(drawn, ax=axes, label=_named(board.metric))
    return figure


def parallel(board: Leaderboard, parameters: Mapping[str, Mapping[str, float | str]]) -> Figure:
    """Parallel coordinates: a line per arm through its parameters to its score, in the colour of the score, the best on top."""
    names = list(parameters)[:PANELS]
    rows = [row for row in board.rows if row.mean is not None and all(row.arm in parameters[name] for name in names)]
    means = [row.mean for row in rows if row.mean is not None]
    with _styled():
        from matplotlib import colormaps

        figure = _figure(3.6)
        axes = figure.subplots()
        scales = [_unit([parameters[name][row.arm] for row in rows]) for name in names] + [_unit(list(means))]
        shade = scales[-1][0]
        for index in range(len(rows) - 1, -1, -1):  # the best last, on top
            heights = [scale[0][index] for scale in scales]
            best = index == 0
            colour = PALETTE[1] if best else colormaps["cividis"](0.95 * shade[index])
            axes.plot(
                range(len(scales)), heights, color=colour, linewidth=2.2 if best else 1.1, alpha=1 if best else 0.75, gid="arm"
            )
        for at, (_, ticks) in enumerate(scales):
            axes.axvline(at, color=SOFT, linewidth=0.8, zorder=0)
            for height, text in ticks:
                axes.annotate(text, (at, height), (3, 0), textcoords="offset points", fontsize=7.5, va="center",
                              bbox={"facecolor": "white", "alpha": 0.8, "pad": 0.6, "linewidth": 0})  # fmt: skip
        axes.set_xticks(range(len(scales)), [*map(_short, names), _named(board.metric)])
        axes.set_yticks([])
        axes.set_xlim(-0.1, len(scales) - 0.6)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        axes.tick_params(axis="x", length=0)
    return figure


def _unit(values: Sequence[float | str]) -> tuple[list[float], list[tuple[float, str]]]:
    """Values on [0, 1] with the ticks of their axis: categories evenly, numbers linearly, or by logarithm over 2 decades."""
    if any(isinstance(value, str) for value in values):
        kinds = sorted({str(value) for value in values})
        at = {kind: (number + 0.5) / len(kinds) for number, kind in enumerate(kinds)}
        return [at[str(value)] for value in values], [(at[kind], _short(kind)) for kind in kinds]
    numbers = np.array(values, float)
    shown = np.log10(numbers) if _decades(numbers) else numbers
    low, high = shown.min(), shown.max()
    if high == low:
        return [0.5] * len(values), [(0.5, f"{numbers[0]:.3g}")]
    heights = (shown - low) / (high - low)
    texts = (numbers.min(), numbers.max())
    return heights.tolist(), [(0.0, f"{texts[0]:.3g}"), (1.0, f"{texts[1]:.3g}")]


def importance(shares: Mapping[str, float], trials: int) -> Figure:
    """How much each searched parameter decides whether a trial is among the best; shares add up to 1."""
    ranked = sorted(shares.items(), key=lambda item: item[1])
    with _styled():
        figure = _figure(0.9 + 0.3 * len(ranked), 5.4)
        axes = figure.subplots()
        axes.barh([_short(name) for name, _ in ranked], [share for _, share in ranked], color=PALETTE[0], height=0.6)
        axes.set(xlabel=f"importance (PED-ANOVA), {trials} trials", xlim=(0, 1))
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
    return figure


def classes(scores: Mapping[str, Mapping[str, Mapping[str, float]]], arms: Sequence[str], control: str, metric: str) -> Figure:
    """Box plots over patients, a panel per class and a box per arm; dots are patients.

    scores   class -> arm -> patient -> mean over the arm's runs
    arms     in the order of drawing; of more than BOXES the first ones and the control
    """
    leading = [arm for arm in arms if arm != control][: BOXES - 1]
    shown = [arm for arm in arms if arm in leading or arm == control]
    paint = colours(shown, control)
    names = list(scores)
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    with _styled():
        figure = _figure(0.5 + lines * (0.55 + 0.24 * len(shown)))
        grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        for axes, name in zip(grid.flat, names, strict=False):
            for y, arm in enumerate(shown):
                values = list(scores[name].get(arm, {}).values())
                if not values:
                    continue
                colour = paint[arm]
                boxes = axes.boxplot(
                    values, positions=[y], orientation="horizontal", widths=0.55, showfliers=False, patch_artist=True,
                    boxprops={"facecolor": colour, "alpha": 0.28, "edgecolor": colour}, manage_ticks=False,
                    whiskerprops={"color": colour}, capprops={"color": colour}, medianprops={"color": colour, "linewidth": 1.8},
                )  # fmt: skip
                boxes["medians"][0].set_gid(f"median {name} {y}")
                if len(values) <= 50:
                    axes.plot(values, [y] * len(values), "o", color=colour, markersize=2, alpha=0.7, markeredgewidth=0)
            axes.set_title(f"{_short(name)}")
            axes.grid(axis="x")
        for axes in grid[:, 0]:
            axes.set_yticks(range(len(shown)), list(map(_short, shown)))
            axes.set_ylim(len(shown) - 0.4, -0.6)
        for axes in grid.flat:
            axes.tick_params(axis="y", length=0)
        _below(grid, len(names), _named(metric))
    return figure


def labelled(
    series: Mapping[str, Sequence[tuple[float, Row]]],
    control: str | None,
    metric: str,
    unit: str = "labelled training patients",
) -> Figure:
    """Score over the number of labelled patients or slices, logarithmic, a line per initialisation; bands are 95 % intervals.

    control   the initialisation that is drawn as the control; None: none of them
    """
    paint = colours(list(series), control or "")
    with _styled():
        figure = _figure(3.6, 5.6)
        axes = figure.subplots()
        axes.set_ylim(*_limits([row for points in series.values() for _, row in points]))
        for name, points in series.items():
            drawn = [(x, row.mean, row.low, row.high) for x, row in points if row.mean is not None]
            ordered = sorted(drawn, key=lambda point: point[0])
            known = [(x, low, high) for x, _, low, high in ordered if low is not None and high is not None]
            if known:
                x, low, high = zip(*known, strict=True)
                axes.fill_between(x, low, high, color=paint[name], alpha=0.16, linewidth=0)
            look: Any = {"linestyle": (0, (4, 3)) if name == control else "solid", "color": paint[name], "label": _short(name)}
            axes.plot(
                [x for x, *_ in ordered], [mean for _, mean, *_ in ordered], marker="o", markersize=4.5, linewidth=1.6, **look
            )
        amounts = sorted({x for points in series.values() for x, _ in points})
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(amounts))
        axes.xaxis.set_major_formatter(FixedFormatter([f"{x:g}" for x in amounts]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel=unit, ylabel=_named(metric))
        axes.grid(axis="y")
        axes.legend(loc="best")
    return figure


# --- training ---


def curves(stages: Sequence[Curve], names: Sequence[str], arms: Sequence[str], control: str) -> Figure:
    """Scalars over steps, a panel each, a line per stage in the colour of its arm."""
    paint = colours(arms, control)
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    with _styled():
        figure = _figure(0.75 + 2.1 * lines)
        grid = figure.subplots(lines, columns, squeeze=False)
        seen: list[str] = []
        for axes, name in zip(grid.flat, names, strict=False):
            for curve in sorted(stages, key=lambda curve: paint[curve.arm] != OTHERS):  # the pale ones below
                steps, values = history.series(list(curve.rows), name)
                if not steps:
                    continue
                keep = slice(None, None, -(-len(steps) // POINTS))
                dash: Any = (0, (4, 2)) if curve.arm == control else "solid"
                (line,) = axes.plot(steps[keep], values[keep], color=paint[curve.arm], linewidth=1, alpha=0.75, linestyle=dash)
                line.set_rasterized(len(stages) > 120)  # a vector of each would make the file heavy
                line.set_gid(curve.arm)
                seen.append(curve.arm)
            axes.set_title(_scalar(name))
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.grid(axis="y")
        for axes in list(grid.flat)[len(names) :]:
            axes.set_visible(False)
        for axes in list(grid.flat)[max(0, len(names) - columns) : len(names)]:
            axes.set_xlabel("step")
        _legend(figure, {arm: paint[arm] for arm in arms if arm in seen}, control)
    return figure


def realised(histograms: Sequence[Histogram]) -> Figure:
    """Realised IoU of the pairs of the first batches, a panel per arm; the shade is the interval that was asked for."""
    shown = histograms[:PANELS]
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    with _styled():
        figure = _figure(0.5 + 1.6 * lines)
        grid = figure.subplots(lines, columns, squeeze=False, sharex=True)
        for axes, histogram in zip(grid.flat, shown, strict=False):
            counts = np.array(histogram.counts, float)
            total = max(counts.sum(), 1)
            if histogram.asked:
                low, high = histogram.asked
                axes.axvspan(low - 0.004, high + 0.004, color=PALETTE[4], alpha=0.22, linewidth=0, gid="asked")
            axes.stairs(100 * counts / total, np.linspace(0, 1, len(counts) + 1), fill=True, color=PALETTE[0])
            apart = f", {100 * histogram.exactly_0 / total:.0f} % apart" if histogram.exactly_0 else ""
            axes.set_title(_short(histogram.arm) + apart, fontsize=8.5)
            axes.set(xlim=(-0.02, 1.02), ylim=(0, None))
            axes.yaxis.set_major_locator(MaxNLocator(3))
        for axes in grid[:, 0]:
            axes.set_ylabel("pairs (%)")
        _below(grid, len(shown), "IoU of the two crops of a pair")
    return figure


def distributions(panels: Sequence[Distribution]) -> Figure:
    """A histogram per panel, three in a row; counts from 0."""
    with _styled():
        rows = -(-len(panels) // 3)
        figure = _figure(0.2 + 1.75 * rows)
        grid = figure.subplots(rows, min(len(panels), 3), squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            axes.bar(panel.edges[:-1], panel.counts, np.diff(panel.edges), align="edge", color=PALETTE[0], linewidth=0)
            axes.set_title(panel.title)
            axes.set_xlabel(panel.unit)
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.grid(axis="y")
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_axis_off()
    return figure


def frequencies(shares: Mapping[str, float], label: str) -> Figure:
    """A bar per name, on a logarithmic axis where they differ by more than a hundredfold; what is 0 has none."""
    with _styled():
        figure = _figure(0.6 + 0.24 * len(shares))
        axes = figure.subplots()
        axes.barh(range(len(shares)), list(shares.values()), color=PALETTE[0], height=0.7)
        axes.set_yticks(range(len(shares)), [_short(name) for name in shares])
        axes.invert_yaxis()
        above = [share for share in shares.values() if share > 0]
        if above and max(above) > 100 * min(above):
            axes.set_xscale("log")
        axes.grid(axis="x")
        axes.set_xlabel(label)
    return figure


def spent(kinds: Sequence[Spent]) -> Figure:
    """The plan against what was spent: stages done of those planned, and the time so far with that to come, by kind."""
    hours = max(kind.hours + (kind.hours_left or 0.0) for kind in kinds) >= 1
    factor, unit = (1, "hours") if hours else (60, "minutes")
    with _styled():
        figure = _figure(0.95 + 0.38 * len(kinds))
        left, right = figure.subplots(1, 2, sharey=True)
        for y, kind in enumerate(kinds):
            for axes, done, open_, said in (
                (left, kind.done, kind.planned - kind.done, f"{kind.done} of {kind.planned}"),
                (right, factor * kind.hours, factor * (kind.hours_left or 0.0), _time(kind, factor)),
            ):
                axes.barh(y, done, color=PALETTE[0], height=0.55)
                axes.barh(
                    y, open_, left=done, facecolor="white", edgecolor=PALETTE[0], hatch="////", height=0.55, linewidth=0.8
                )
                axes.annotate(said, (done + open_, y), (4, 0), textcoords="offset points", va="center", fontsize=8)
        left.set_yticks(range(len(kinds)), [kind.kind for kind in kinds])
        left.set_ylim(len(kinds) - 0.4, -0.6)
        left.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        left.set_xlabel("stages")
        right.set_xlabel(f"{unit} of a worker group")
        for axes in (left, right):
            axes.set_xlim(0, 1.32 * max(axes.get_xlim()[1], 1e-3))
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="x")
        if any(kind.done < kind.planned for kind in kinds):
            keys = [
                Patch(color=PALETTE[0], label="done"),
                Patch(facecolor="white", edgecolor=PALETTE[0], hatch="////", label="to come"),
            ]
            figure.legend(handles=keys, loc="outside lower center", ncols=2)
    return figure


def _time(kind: Spent, factor: int) -> str:
    if kind.done == kind.planned:
        return f"{factor * kind.hours:.3g}"
    left = "" if kind.hours_left is None else f", about {factor * kind.hours_left:.2g} to come"
    return f"{factor * kind.hours:.3g} so far{left}"


# --- what they share ---


def _below(grid: Any, count: int, label: str) -> None:
    """Hide the panels that are not used, and name the x axis under the last of every column."""
    columns = grid.shape[1]
    for number, axes in enumerate(grid.flat):
        axes.set_visible(number < count)
        if number < count and number + columns >= count:
            axes.set_xlabel(label)
            axes.tick_params(axis="x", labelbottom=True)


def _legend(figure: Figure, paint: Mapping[str, str], control: str) -> None:
    """Below all panels: the arms by colour, the pale ones together."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, linestyle=(0, (4, 2)) if arm == control else "solid", label=_short(arm))
        for arm, colour in paint.items()
        if colour != OTHERS
    ]
    if OTHERS in paint.values():
        handles.append(Line2D([], [], color=OTHERS, label=words.count(list(paint.values()).count(OTHERS), "other arm")))
    widest = 36 + 4.7 * max(len(str(handle.get_label())) for handle in handles)  # points, at 8 of them a letter
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, min(4, len(handles), int(72 * WIDTH / widest))))


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis where values span more than two decades, with its powers written out."""
    if not _decades(values):
        axes.xaxis.set_major_locator(MaxNLocator(4))
        return
    axes.set_xscale("log")
    powers = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
    axes.xaxis.set_major_locator(FixedLocator([10.0**power for power in powers]))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{10.0**power:g}" for power in powers]))


def _decades(values: Any) -> bool:
    return min(values) > 0 and max(values) / min(values) >= 100


def _bracketed(row: Row) -> str:
    return "[no interval]" if row.low is None else f"[{words.number(row.low)}, {words.number(row.high)}]"


def _named(metric: str) -> str:
    """A metric as an axis says it, with its unit."""
    known = {
        "dice": "Dice",
        "nsd": "NSD",
        "hd95_mm": "HD95 (mm)",
        "asd_mm": "ASD (mm)",
        "legacy-slice-dice": "slice-wise Dice of the IoU study",
    }
    return known.get(metric, metric)


def _scalar(name: str) -> str:
    """`loss/total` as a title."""
    return name.replace("loss/", "loss: ").replace("_", " ")


def _short(label: str, most: int = 34) -> str:
    """A label on one line, its end cut where it would leave no room for the figure."""
    line = " ".join(label.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
