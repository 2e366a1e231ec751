"""Numbers and names as people read them. A dash stands for what the design cannot give."""

from collections.abc import Callable, Sequence


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def span(low: float | None, high: float | None, write: Callable[[float | None], str] = number) -> str:
    return "–" if low is None or high is None else f"{write(low)}…{write(high)}"


def p_value(value: float | None) -> str:
    return "–" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def chance(value: float | None) -> str:
    """As a percentage, never 0 nor 100: the draws behind it are finite, and so is the model's truth."""
    if value is None:
        return "–"
    return "<1 %" if value < 0.01 else ">99 %" if value > 0.99 else f"{value:.0%}".replace("%", " %")


def count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def between(values: Sequence[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def some(names: Sequence[str], most: int = 5) -> str:
    """Names in backquotes, the first few of many."""
    listed = ", ".join(f"`{name}`" for name in names[:most])
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"
