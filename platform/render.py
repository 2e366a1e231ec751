"""A leaderboard as text: for a terminal, for a README, as the IoU study prints it, for a browser, for programs."""

import csv
import dataclasses
import io
import json
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from medssl.platform import page, words
from medssl.platform.errors import UsageError
from medssl.platform.find import nearest
from medssl.platform.leaderboard import Leaderboard, Row
from medssl.platform.metrics import LEGACY

FORMATS = ("table", "paper", "md", "csv", "json", "html")
WIDTH = 100  # columns of the table


def render(board: Leaderboard, format: str = "table") -> str:
    """The leaderboard as text: `table` for people, `paper` as the IoU study prints it, `md`, `csv`, `json`, `html`.

    People's formats round to 3 decimals; csv and json keep every digit, None as an empty cell and null.
    Raises UsageError for another format.
    """
    formats = {"table": _table, "paper": _paper, "md": _markdown, "csv": _csv, "json": _json, "html": _html}
    if format not in formats:
        raise UsageError(f'no leaderboard format "{format}"; {nearest(format, formats)}')
    return formats[format](board)


def several(boards: Mapping[str, Leaderboard], format: str, why: str) -> str:
    """Leaderboards that cannot be one, by title, one after another; csv and json say the title beside each row and board.

    why    they are not one, in a sentence
    Raises UsageError for an unknown format.
    """
    if format == "json":
        plain = [{"title": title, **dataclasses.asdict(board)} for title, board in boards.items()]
        return json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if format == "csv":
        return _lines([(title, row) for title, board in boards.items() for row in board.rows])
    if format == "html":
        parts = (f"<h2>{page.escape(title)}</h2>{html(board)}" for title, board in boards.items())
        return page.page("Leaderboards", f"<p>{page.escape(why)}</p>" + "".join(parts))
    heading = "## " if format in ("md", "paper") else ""
    return "\n".join([*(f"{heading}{title}\n\n{render(board, format)}" for title, board in boards.items()), why + "\n"])


def html(board: Leaderboard) -> str:
    """The verdict, a table that sorts by any column, and the notes, as a part of a page."""
    notes = "".join(f"<li>{page.prose(note)}</li>" for note in board.notes)
    return f'<p class="verdict">{page.prose(board.verdict)}</p>{html_table(board)}<ul class="notes">{notes}</ul>'


def html_table(board: Leaderboard) -> str:
    """The rows alone."""
    head = ["arm", "k×m", f"mean {board.metric}", "95 % interval", "sd between", "sd within", "to control", "95 % interval"]
    head += ["p", "p (Holm)", "p patients", "best", "group", f"needed for {words.number(board.wanted)}"]
    rows = []
    for row in board.rows:
        control = row.arm == row.control
        cells = [page.Cell(row.arm), page.Cell(_repeats(row), row.runs), page.Cell(words.number(row.mean), row.mean)]
        cells += [page.Cell(words.span(row.low, row.high), row.low), page.Cell(words.number(row.sd_between), row.sd_between)]
        cells += [page.Cell(words.number(row.sd_within), row.sd_within)]
        cells += [page.Cell("control" if control else words.signed(row.difference), 0.0 if control else row.difference)]
        cells += [page.Cell(words.span(row.difference_low, row.difference_high, words.signed), row.difference_low)]
        cells += [page.Cell(words.p_value(row.p), row.p), page.Cell(words.p_value(row.p_holm), row.p_holm)]
        cells += [page.Cell(words.p_value(row.p_patients), row.p_patients)]
        cells += [page.Cell(words.chance(row.best_probability), row.best_probability), page.Cell(row.letters or "–")]
        cells += [page.Cell("–" if row.needed is None else f"{row.needed:,}", row.needed)]
        rows.append(page.Line(cells, "told" if row.told else "control" if control else ""))
    return page.table(head, rows)


def _table(board: Leaderboard) -> str:
    """For a terminal, at most 100 columns; in colour when standard output is one."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column(Text(f"\narm ({board.metric})"), overflow="fold", min_width=8)
    titles = ["\nk×m", "\nmean", "95 %\ninterval", "sd\nbetw.", "sd\nwithin", "to\ncontrol", "95 %\ninterval"]
    for title in [*titles, "\np", "\nHolm", "\nbest"]:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("\ngroup", overflow="fold")
    for row in board.rows:
        cells = [row.arm, _repeats(row), words.number(row.mean), words.span(row.low, row.high)]
        gap = "control" if row.arm == row.control else words.signed(row.difference)
        cells += [words.number(row.sd_between), words.number(row.sd_within), gap]
        cells += [
            words.span(row.difference_low, row.difference_high, words.signed),
            words.p_value(row.p),
            words.p_value(row.p_holm),
        ]
        style = "bold" if row.told else "dim" if row.arm == row.control else None
        table.add_row(*map(Text, [*cells, words.chance(row.best_probability), row.letters or "–"]), style=style)
    out, colour = io.StringIO(), sys.stdout.isatty()
    console = Console(file=out, width=WIDTH, force_terminal=colour, color_system="auto" if colour else None)
    console.print(table)
    console.print(Text(f"\n{board.verdict}\n", style="bold"))
    for note in board.notes:
        console.print(Text(f"· {note}", style="dim"))
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def _paper(board: Leaderboard) -> str:
    """The table of the IoU study (Markdown): pretrainings, mean ± population deviation of all runs, and every score."""
    score = "DSC" if board.metric in ("dice", LEGACY) else board.metric
    most = max(row.runs for row in board.rows)
    lines = [["arm", "pretrainings", f"mean {score}", *(f"{score} {index + 1}" for index in range(most))]]
    for row in board.rows:
        scores = [score for group in row.scores for score in group]
        mean = f"{np.mean(scores):.3f} ± {np.std(scores):.3f}" if scores else "–"
        lines.append([row.arm, str(row.k), mean, *map(words.number, scores), *["–"] * (most - len(scores))])
    return (
        f"{_pipes(lines)}\nMean ± population standard deviation of all runs, as the IoU study prints it: neither an interval "
        f"nor a standard error. Scores in order of pretraining.\n\n{board.verdict}\n"
    )


def _markdown(board: Leaderboard) -> str:
    """For a README or an issue: every column, the verdict, the notes."""
    arm = ["arm", "k", "m", f"mean {board.metric}", "95 % interval", "sd between", "sd within"]
    gap = [f"difference to {board.called.strip('`')}", "95 % interval", "p", "p (Holm)", "p patients", "best", "group"]
    lines = [[*arm, *gap, f"pretrainings needed for {words.number(board.wanted)}"]]
    for row in board.rows:
        cells = [row.arm, str(row.k), str(row.m), words.number(row.mean), words.span(row.low, row.high)]
        cells += [words.number(row.sd_between), words.number(row.sd_within), words.signed(row.difference)]
        cells += [
            words.span(row.difference_low, row.difference_high, words.signed),
            words.p_value(row.p),
            words.p_value(row.p_holm),
            words.p_value(row.p_patients),
        ]
        lines.append([*cells, words.chance(row.best_probability), row.letters or "–", str(row.needed or "–")])
    return f"{_pipes(lines)}\n**{board.verdict}**\n\n" + "".join(f"- {note}\n" for note in board.notes)


def _csv(board: Leaderboard) -> str:
    """One line per arm; `scores` separates fine-tunings by spaces and pretrainings by semicolons."""
    return _lines([(None, row) for row in board.rows])


def _lines(rows: Sequence[tuple[str | None, Row]]) -> str:
    """Rows as csv, behind the title of their leaderboard where there is one."""
    out = io.StringIO()
    names = [field.name for field in dataclasses.fields(Row)]
    titled = any(title is not None for title, _ in rows)
    writer = csv.DictWriter(out, ["title", *names] if titled else names, lineterminator="\n", restval="")
    writer.writeheader()
    for title, row in rows:
        scores = "; ".join(" ".join(map(repr, group)) for group in row.scores)
        writer.writerow(
            {name: getattr(row, name) for name in names} | {"scores": scores} | ({"title": title} if titled else {})
        )
    return out.getvalue()


def _json(board: Leaderboard) -> str:
    return json.dumps(dataclasses.asdict(board), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _html(board: Leaderboard) -> str:
    """A page that works offline."""
    return page.page(f"Leaderboard: {board.metric}", html(board))


def _pipes(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is its head."""
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines]
    return rows[0] + "|---" * len(lines[0]) + "|\n" + "".join(rows[1:])


def _repeats(row: Row) -> str:
    """k×m, with ≤ where fine-tunings are missing."""
    return f"{row.k}×{'≤' if row.runs < row.k * row.m else ''}{row.m}"
