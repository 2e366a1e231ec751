"""Search spaces: a file of search_spaces/, a Python file, or a YAML file in the W&B sweep schema.

Schema: https://docs.wandb.ai/guides/sweeps/define-sweep-configuration. Taken are `method` (grid, random, bayes), `parameters`
(value, values, min and max with a distribution, nested `parameters`), `metric` (ours, checked), `name` and `description`;
dotted names are settings of medssl. `control` is our own key: the settings of the arm that others are compared with.
What W&B does that a sweep here does otherwise is refused with a sentence, never ignored.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from medssl.platform import find
from medssl.platform.errors import UsageError

METHODS = {"grid": "grid", "random": "random", "bayes": "gp"}
METRICS = ("dice", "legacy-slice-dice")  # what `evaluate.metric` may be
INSTEAD = {
    "early_terminate": "losing arms are stopped by --search race, tpe or gp, and by pretrain.training.probes",
    "run_cap": "--trials bounds the arms",
    "program": "medssl runs its own stages",
    "command": "medssl runs its own stages",
    "project": "the sweep's folder holds its results",
    "entity": "the sweep's folder holds its results",
    "kind": "a file is a sweep",
}
KEYS = ("method", "parameters", "metric", "name", "description", "control")
DISTRIBUTIONS = {  # and the keys that each takes
    "constant": ("value",),
    "categorical": ("values",),
    "int_uniform": ("min", "max"),
    "uniform": ("min", "max"),
    "q_uniform": ("min", "max", "q"),
    "log_uniform_values": ("min", "max"),
    "q_log_uniform_values": ("min", "max", "q"),
}
SCRATCH: dict[str, Any] = {"start.weights": None, "pretrain": None}

Parameter = Mapping[str, Any]


def load_space(name: str) -> ModuleType:
    """The space as a module: QUESTION, CONTROL, arms(); suggest(trial) where it can be searched; SEARCH, its usual search."""
    if name.endswith((".yaml", ".yml")):
        return _yaml(Path(name))
    if not name.endswith(".py"):
        return find.load("space", name)
    path = Path(name)
    spec = spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UsageError(f"{name}: no such space file; a name without .py is looked up in search_spaces/")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    if hasattr(module, "suggest") and not hasattr(module, "arms"):
        _define_by_run(module)
    for needed in ("QUESTION", "CONTROL", "arms"):
        if not hasattr(module, needed):
            raise UsageError(f"{name}: a space file needs {needed} (search_spaces/__init__.py says how one is written)")
    if not module.arms():
        raise UsageError(f"{name}: arms() gives no arm; it gives at least the control")
    return module


def _define_by_run(module: ModuleType) -> None:
    """A file with an Optuna define-by-run function alone: searched by TPE, against from scratch."""
    given: dict[str, Any] = vars(module)
    given.setdefault("QUESTION", f"Which settings of {Path(str(module.__file__)).stem} are best?")
    given.setdefault("CONTROL", "from scratch")
    given.setdefault("SEARCH", "tpe")
    label = given["CONTROL"]
    if label != "from scratch":
        raise UsageError(
            f'{module.__file__}: its control "{label}" needs arms() to say what it is; without, it is from scratch'
        )
    given["arms"] = lambda: {label: dict(SCRATCH)}


def _yaml(path: Path) -> ModuleType:
    import yaml

    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such space file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a YAML file ({str(error).splitlines()[0]})") from error
    if not isinstance(tree, Mapping):
        raise UsageError(f"{path}: expected a mapping with method and parameters")
    try:
        return _module(path, tree)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _module(path: Path, tree: Mapping[str, Any]) -> ModuleType:
    for key in tree:
        if key in INSTEAD:
            raise UsageError(f"`{key}` is not taken: {INSTEAD[key]}; leave it out")
        if key not in KEYS:
            raise UsageError(f'unknown key "{key}"; {find.nearest(str(key), KEYS)}')
    method = tree.get("method", "grid")
    if method not in METHODS:
        raise UsageError(f"method {method!r}; {find.nearest(str(method), METHODS)}")
    _check_metric(tree.get("metric"))
    parameters = dict(_flat(tree.get("parameters"), ""))
    if not any(_choices(parameter) is None or len(_choices(parameter) or ()) > 1 for parameter in parameters.values()):
        raise UsageError("no parameter varies: a sweep needs one with several values, or with min and max")
    control = tree.get("control", SCRATCH)
    if not isinstance(control, Mapping):
        raise UsageError(f"control: expected a mapping of settings, as in `control: {{pretrain: null}}`, got {control!r}")
    module = ModuleType(path.stem)
    varied = ", ".join(name for name, parameter in parameters.items() if "value" not in parameter)
    about = tree.get("description") or tree.get("name") or f"Which {varied} is best?"
    said = "" if "control" in tree else " The control, from scratch, was added."
    grid = _grid(parameters)
    label = next((name for name, settings in grid.items() if settings == dict(control)), _label(control))
    vars(module).update(
        __file__=str(path),
        QUESTION=f"{about}{said}",
        CONTROL=label,
        SEARCH=METHODS[method],
        arms=lambda: {label: dict(control), **grid},
        suggest=_suggest(parameters),
    )
    if method == "grid" and not grid:
        continuous = ", ".join(name for name, parameter in parameters.items() if _choices(parameter) is None)
        raise UsageError(f"method grid needs values of {continuous}, not a range; or choose method random or bayes")
    return module


def _check_metric(metric: Any) -> None:
    """The metric of a sweep is `evaluate.metric` on the validation patients; a file may say so, and may not say otherwise."""
    if metric is None:
        return
    if not isinstance(metric, Mapping) or set(metric) - {"name", "goal"}:
        raise UsageError(f"metric: expected name and goal, got {metric!r}")
    if metric.get("name", "dice") not in METRICS:
        raise UsageError(f"metric.name {metric['name']!r}; {find.nearest(str(metric['name']), METRICS)}; -o evaluate.metric=…")
    if metric.get("goal", "maximize") != "maximize":
        raise UsageError(f"metric.goal {metric['goal']!r}: Dice is better when higher; write maximize")


def _flat(parameters: Any, above: str) -> list[tuple[str, Parameter]]:
    """Parameters by dotted name, nested `parameters` joined, each checked."""
    if not isinstance(parameters, Mapping) or not parameters:
        raise UsageError(
            f"{above or 'parameters'}: expected a mapping of settings, as in `pretrain.training.lr: {{values: [...]}}`"
        )
    found = []
    for name, parameter in parameters.items():
        dotted = f"{above}.{name}" if above else str(name)
        if not isinstance(parameter, Mapping):
            raise UsageError(f"{dotted}: expected value, values, or min and max, got {parameter!r}")
        if "parameters" in parameter:
            if len(parameter) > 1:
                raise UsageError(
                    f"{dotted}: `parameters` stands alone, beside it are {', '.join(sorted(set(parameter) - {'parameters'}))}"
                )
            found += _flat(parameter["parameters"], dotted)
        else:
            found.append((dotted, _checked(dotted, parameter)))
    return found


def _checked(name: str, parameter: Parameter) -> Parameter:
    """The parameter with its distribution written out, as W&B infers it."""
    known = {"distribution", *itertools.chain(*DISTRIBUTIONS.values())}
    for key in parameter:
        if key not in known:
            raise UsageError(f'{name}: unknown key "{key}"; {find.nearest(str(key), known)}')
    usual = "constant" if "value" in parameter else "categorical" if "values" in parameter else "uniform"
    if usual == "uniform" and all(isinstance(parameter.get(end), int) for end in ("min", "max")):
        usual = "int_uniform"
    kind = parameter.get("distribution", usual)
    if kind not in DISTRIBUTIONS:
        raise UsageError(f"{name}: distribution {kind!r}; {find.nearest(str(kind), DISTRIBUTIONS)}")
    needed = DISTRIBUTIONS[kind]
    if set(parameter) - {"distribution"} != set(needed):
        raise UsageError(
            f"{name}: {kind} takes {', '.join(needed)}, got {', '.join(sorted(set(parameter) - {'distribution'}))}"
        )
    if kind == "categorical" and (not isinstance(parameter["values"], list) or not parameter["values"]):
        raise UsageError(f"{name}: values is {parameter['values']!r}, expected a list with at least one")
    if "min" in needed:
        _check_range(name, kind, parameter)
    return {**parameter, "distribution": kind}


def _check_range(name: str, kind: str, parameter: Parameter) -> None:
    low, high, q = parameter["min"], parameter["max"], parameter.get("q", 1)
    if any(isinstance(end, bool) or not isinstance(end, int | float) or not math.isfinite(end) for end in (low, high, q)):
        raise UsageError(
            f"{name}: min {low!r}, max {high!r} and q {q!r} must be numbers (YAML reads 1e-3 as text: write 1.0e-3)"
        )
    if not low < high or q <= 0 or (kind.endswith("log_uniform_values") and low <= 0):
        raise UsageError(
            f"{name}: {kind} from {low} to {high} is empty: min lies below max, q above 0, both ends of a log above 0"
        )
    if kind == "int_uniform" and not (isinstance(low, int) and isinstance(high, int)):
        raise UsageError(f"{name}: int_uniform from {low} to {high}: expected whole numbers")


def _choices(parameter: Parameter) -> list[Any] | None:
    """All values of a parameter; None: a range of reals."""
    if "value" in parameter:
        return [parameter["value"]]
    if "values" in parameter:
        return list(parameter["values"])
    if parameter["distribution"] == "int_uniform":
        return list(range(parameter["min"], parameter["max"] + 1))
    return None


def _grid(parameters: Mapping[str, Parameter]) -> dict[str, dict[str, Any]]:
    """Every combination by label; none where a parameter has infinitely many values."""
    choices = {name: _choices(parameter) for name, parameter in parameters.items()}
    known = {name: values for name, values in choices.items() if values is not None}
    if len(known) < len(choices):
        return {}
    arms = [dict(zip(known, values, strict=True)) for values in itertools.product(*known.values())]
    varied = [name for name, values in known.items() if len(values) > 1]
    return {_label({name: arm[name] for name in varied}): arm for arm in arms}


def _suggest(parameters: Mapping[str, Parameter]) -> Callable[[Any], dict[str, Any]]:
    """The same space for a sampler, in Optuna's words."""

    def suggest(trial: Any) -> dict[str, Any]:
        return {name: _draw(trial, name, parameter) for name, parameter in parameters.items()}

    return suggest


def _draw(trial: Any, name: str, parameter: Parameter) -> Any:
    kind = parameter["distribution"]
    if kind == "constant":
        return parameter["value"]
    if kind == "categorical":
        values = parameter["values"]
        if all(value is None or isinstance(value, bool | int | float | str) for value in values):
            return trial.suggest_categorical(name, values)
        by_text = {str(value): value for value in values}  # Optuna takes scalars as choices
        return by_text[trial.suggest_categorical(name, list(by_text))]
    low, high, q = parameter["min"], parameter["max"], parameter.get("q")
    if kind == "int_uniform":
        return trial.suggest_int(name, low, high)
    value = trial.suggest_float(name, low, high, log=kind.endswith("log_uniform_values"))
    if q:  # W&B rounds to multiples of q; so does this, ends kept
        value = min(max(round(value / q) * q, low), high)
        value = int(value) if all(isinstance(one, int) for one in (low, high, q)) else value
    return value


def _label(settings: Mapping[str, Any]) -> str:
    """A label from the settings that vary."""
    if dict(settings) in (SCRATCH, {"pretrain": None}):
        return "from scratch"
    return ", ".join(f"{name.removeprefix('pretrain.')} {value}" for name, value in settings.items())
