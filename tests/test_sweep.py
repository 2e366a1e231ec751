"""From a command line to a leaderboard, on real NIfTI files, with processes killed on the way."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medssl.platform import catalogue, history, sweep
from medssl.platform.datasets import phantom
from medssl.platform.errors import UsageError
from medssl.platform.site import Site

SPACE = """
QUESTION = "Does overlap matter?"
CONTROL = "from scratch"

def arms():
    return {"from scratch": {"pretrain": None}, "any": {"pretrain.iou": None}, "middle": {"pretrain.iou": (0.3, 0.6)}}

def suggest(trial):
    low = trial.suggest_float("low", 0.0, 0.5)
    return {"pretrain.iou": (low, low + 0.4)}
"""
SMALL = {
    "network": {"width": 4, "levels": 3},
    "pretrain": {"side": 16, "d": 16, "bottleneck": 8, "training": {"steps": 30, "batch": 8}},
    "finetune": {"side": 32, "training": {"steps": 12, "batch": 4, "evaluations": 2}},
    "evaluate": {"inference": "whole"},
    "resources": {"checkpoint_seconds": 0.05},
}


@pytest.fixture(scope="session")
def scans(tmp_path_factory) -> Path:
    """A prepared folder of ten small phantoms, in a data folder of its own."""
    data = tmp_path_factory.mktemp("data")
    source = tmp_path_factory.mktemp("scans") / "tiny"
    phantom.generate(source, patients=10)
    previous = os.environ.get("MEDSSL_DATA")
    os.environ["MEDSSL_DATA"] = str(data)
    catalogue.prepare(str(source), changes={"spacing_mm": (6.0, 6.0, 12.0), "pad": 32}, workers=2, say=lambda text: None)
    os.environ.pop("MEDSSL_DATA") if previous is None else os.environ.update(MEDSSL_DATA=previous)
    return data


@pytest.fixture
def here(scans, tmp_path, monkeypatch) -> Path:
    """A working folder with the space and the settings, and an empty runs folder."""
    import yaml

    monkeypatch.setenv("MEDSSL_DATA", str(scans))
    monkeypatch.setenv("MEDSSL_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "overlap.py").write_text(SPACE)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    return tmp_path


def request(**changes) -> sweep.Request:
    given = {"space": "overlap.py", "data": "tiny", "k": 2, "m": 2, "files": (Path("small.yaml"),)}
    return sweep.Request(**given | changes)


def run(**changes) -> str:
    return sweep.run(request(**changes), time_budget=None, address=None, say=lambda text: None)


def outcome() -> dict[str, float]:
    """The test score of every finished fine-tuning, by stage."""
    site = Site.here()
    return {identity: done["test"] for identity in site.finished() if "test" in (done := site.done(identity))}


@pytest.fixture(scope="session")
def undisturbed(scans, tmp_path_factory, ray_local) -> tuple[dict[str, float], str]:
    """What the sweep gives when nothing happens to it: scores by stage, and the leaderboard as csv."""
    import yaml

    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSSL_DATA", str(scans))
        patch.setenv("MEDSSL_RUNS", str(folder / "runs"))
        patch.chdir(folder)
        (folder / "overlap.py").write_text(SPACE)
        (folder / "small.yaml").write_text(yaml.safe_dump(SMALL))
        table = run()
        assert "from scratch" in table
        return outcome(), sweep.leaderboard(None, "csv", "dice")


@pytest.mark.slow
def test_a_sweep_runs_every_stage_and_ranks_what_they_left(here, undisturbed):
    scores, board = undisturbed
    assert len(scores) == 3 * 2 * 2
    rows = {line.split(",")[0]: line for line in board.splitlines()[1:]}
    assert set(rows) == {"from scratch", "any", "middle"}


@pytest.mark.slow
def test_typed_again_it_looks_everything_up(here, undisturbed, ray_local):
    scores, board = undisturbed
    run()
    assert outcome() == scores, "another folder, the same command: bit-equal scores on a CPU"
    assert sweep.leaderboard(None, "csv", "dice") == board
    before = {file: file.stat().st_mtime_ns for file in Site.here().runs.rglob("done.json")}
    run()
    assert {file: file.stat().st_mtime_ns for file in Site.here().runs.rglob("done.json")} == before


def medssl(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "medssl.cli", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


SWEEP = ("sweep", "overlap.py", "--data", "tiny", "-p", "small.yaml")


def wait_for(condition, seconds: float = 120.0):
    """What `condition` gives once it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    pytest.fail(f"nothing happened in {seconds:.0f} s")


def stages(kind: str, running: bool) -> list[Path]:
    """Folders of stages of a kind that have begun, and are finished or not."""
    begun = [file for file in Site.here().runs.glob("stages/*/run.json") if json.loads(file.read_text())["kind"] == kind]
    return [file.parent for file in begun if file.with_name("done.json").exists() != running]


@pytest.mark.slow
def test_a_driver_killed_in_a_pretraining_loses_nothing_and_repeats_nothing(here, undisturbed):
    scores, board = undisturbed
    driver = medssl(*SWEEP)
    # a pretraining is under way and has a checkpoint; at least one stage is finished
    wait_for(lambda: stages("finetune", False) and [f for f in stages("pretrain", True) if (f / "checkpoint.pt").exists()])
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    interrupted = stages("pretrain", True)
    finished = {file: file.stat().st_mtime_ns for file in Site.here().runs.rglob("done.json")}
    again = medssl(*SWEEP)
    printed, _ = again.communicate(timeout=300)
    assert again.returncode == 0, printed
    assert outcome() == scores, "as if nothing had happened, to the last bit"
    assert sweep.leaderboard(None, "csv", "dice") == board
    assert all(file.stat().st_mtime_ns == when for file, when in finished.items()), "no finished stage ran again"
    for folder in interrupted:
        steps = [json.loads(line)["step"] for line in (folder / "log.txt").read_text().splitlines()]
        assert steps[-1] == SMALL["pretrain"]["training"]["steps"]
        kept = [row["step"] for row in history.read(folder)]
        assert kept == sorted(set(kept)), "the history holds a step once, in order, whatever was repeated"
        assert kept[-1] == steps[-1]


KILLS = 20


def finished() -> dict[Path, int]:
    """When each finished stage was."""
    return {file: file.stat().st_mtime_ns for file in Site.here().runs.rglob("done.json")}


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(here, undisturbed, monkeypatch):
    """From before Ray is up to the last leaderboard; a sweep that gets done between two kills makes way for a new one."""
    scores, board = undisturbed
    moment, killed, sweeps = random.Random(0), 0, 0
    while killed < KILLS or outcome() != scores:
        before, driver = finished(), medssl(*SWEEP)
        try:
            printed, _ = driver.communicate(timeout=moment.uniform(1, 15) if killed < KILLS else 300)
            assert driver.returncode == 0, printed
            assert outcome() == scores, "as if nothing had happened, to the last bit"
            assert sweep.leaderboard(None, "csv", "dice") == board
            if killed < KILLS:
                sweeps += 1
                monkeypatch.setenv("MEDSSL_RUNS", str(here / f"runs-{sweeps}"))
        except subprocess.TimeoutExpired:
            driver.send_signal(signal.SIGKILL)
            driver.wait()
            killed += 1
            now = finished()
            assert all(now[file] == when for file, when in before.items()), "a finished stage ran again"
    assert killed == KILLS


def owner(folder: Path) -> int | None:
    """The process that holds a stage's lock."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(link) == str(folder / ".lock") for link in (process / "fd").iterdir()):
                return int(process.name)
        except OSError:
            continue
    return None


@pytest.mark.slow
def test_a_worker_killed_in_a_fine_tuning_is_replaced_and_its_stage_continued(here, undisturbed):
    scores, board = undisturbed
    driver = medssl(*SWEEP)
    folder = wait_for(lambda: next((f for f in stages("finetune", True) if (f / "checkpoint.pt").exists()), None))
    worker = wait_for(lambda: owner(folder) or (folder / "done.json").exists())
    if worker is not True:
        os.kill(worker, signal.SIGKILL)
    printed, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, printed
    assert outcome() == scores
    assert sweep.leaderboard(None, "csv", "dice") == board


@pytest.mark.slow
def test_a_time_budget_ends_a_sweep_cleanly_and_the_next_call_goes_on(here, undisturbed, ray_local):
    scores, board = undisturbed
    said: list[str] = []
    answer = sweep.run(request(), time_budget="1s", address=None, say=said.append)
    assert "no fine-tuning has finished yet" in answer or "from scratch" in answer
    assert any("of 16 stages to go; type the sweep again" in line for line in said)
    run()
    assert outcome() == scores
    assert sweep.leaderboard(None, "csv", "dice") == board


@pytest.mark.slow
def test_a_cost_limit_ends_a_sweep_cleanly_says_what_is_missing_and_is_not_spent_twice(here, undisturbed, ray_local):
    scores, board = undisturbed
    said: list[str] = []
    limits = {"price": 3600.0, "max_cost": 1.0}  # a second

    def limited() -> list[str]:
        said.clear()
        sweep.run(request(), time_budget=None, address=None, say=said.append, **limits)
        return [line for line in said if "stages to go" in line]

    (told,) = limited()
    assert "of --max-cost 1: type it again with more to continue it" in told
    before = len(Site.here().finished())
    assert before < 16
    (told,) = limited()
    assert len(Site.here().finished()) == before, "earlier starts count"
    run(overrides=("resources.retries=1",))
    assert len(list((Site.here().runs / "sweeps").iterdir())) == 1, "other resources, the same sweep"
    assert outcome() == scores
    assert sweep.leaderboard(None, "csv", "dice") == board
    assert "0 B to keep" in sweep.dry_run(request(), say=print, price=1.0)


@pytest.mark.slow
def test_a_calibrated_plan_has_hours_and_money_and_leaves_nothing_behind(here, monkeypatch):
    from medssl.platform import calibrate

    monkeypatch.setattr(calibrate, "SECONDS", 0.5)
    assert "hours    unknown" in sweep.dry_run(request(), say=print)
    text = sweep.dry_run(request(), say=print, price=2.0, calibrate=True)
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert "steps/s (calibrated)" in lines["pace"]
    busy = [float(word) for word in re.findall(r"busy (\d+)% of the time", text)]
    assert busy, "how busy a stage keeps its core"
    assert all(0 < percent <= 100 for percent in busy)
    assert "unknown" not in text
    assert float(lines["hours"].split()[-2]) > 0
    assert "per machine and hour" in lines["money"]
    assert not (Site.here().runs / "stages").exists()


def test_a_cost_limit_without_a_price_is_refused(here):
    with pytest.raises(UsageError, match="--max-cost needs --price"):
        sweep.run(request(), time_budget=None, address=None, max_cost=1.0, say=print)


@pytest.mark.slow
def test_a_search_adds_arms_to_the_control_and_records_them(here, ray_local):
    table = run(search="tpe", trials=3, k=1, m=1, confirm=0)
    assert "from scratch" in table
    arms = sweep.Sweep.open(Site.here().find_sweep(None)).arms()
    assert len(arms) == 4
    assert all(low < high for low, high in (a["pretrain.iou"] for label, a in arms.items() if label != "from scratch"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["resources.workers=2", "data.stream=ray"])
def test_stages_on_two_workers_and_streamed_stages_finish_where_training_holds_every_core(here, ray_local, how):
    space = SPACE.replace('"any": {"pretrain.iou": None}, ', "")
    (here / "overlap.py").write_text(space)
    table = run(k=1, m=1, overrides=(how,))
    assert "middle" in table
    assert len(outcome()) == 2


def test_a_plan_imports_neither_torch_nor_ray(here):
    code = (
        "import sys; from medssl.platform import sweep; from pathlib import Path\n"
        "print(sweep.dry_run(sweep.Request('overlap.py', 'tiny', 2, 2, files=(Path('small.yaml'),)), say=print))\n"
        "assert not {'torch', 'ray', 'monai'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "4 pretrainings and 12 fine-tunings, 0 done already" in done.stdout
    assert "smallest p" in done.stdout


def test_the_smallest_p_is_that_of_an_exact_test():
    from medssl.platform import statistics

    assert [sweep.smallest_p(k) for k in range(2, 6)] == [statistics.smallest_p(k, k) for k in range(2, 6)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": "iou-intervall"}, r'no space "iou-intervall" in search_spaces/; did you mean iou-interval\?'),
        ({"space": "absent.py"}, "absent.py: no such space file"),
        ({"search": "grit"}, r"--search grit: did you mean grid\?"),
        ({"data": "phanton"}, r'"phanton"; did you mean phantom\?'),
        ({"overrides": ("pretrain.iou=[0, 1]",)}, "that is what overlap.py varies"),
        ({"overrides": ("pretrain.training.stepps=3",)}, r'arm "any": unknown key.*did you mean steps\?'),
        ({"overrides": ("pretrain.side=60",)}, r"crops of 60 px do not fit|overlap by an IoU between"),
        ({"overrides": ("data.labelled=99",)}, "labelled training patients"),
    ],
)
def test_a_request_that_cannot_be_meant_is_refused_before_anything_starts(here, changes, message):
    with pytest.raises(UsageError, match=message):
        sweep.dry_run(request(**changes), say=lambda text: None)


def test_a_space_of_ones_own_must_say_what_it_asks(here):
    (here / "mute.py").write_text("QUESTION = 'hm?'\n")
    with pytest.raises(UsageError, match="needs CONTROL"):
        sweep.load_space("mute.py")


def test_a_leaderboard_without_a_sweep_says_so(here):
    with pytest.raises(UsageError, match="no sweep yet"):
        sweep.leaderboard(None, "table", "dice")


LABELS = """
from medssl.search_spaces.label_fraction import CONTROL, QUESTION, SERIES, compared, curve
MINE = {"from scratch": SERIES["from scratch"], "pretrained": {}}
arms, COMPARE = lambda: curve(MINE), compared(MINE)
"""


@pytest.mark.slow
def test_a_label_curve_compares_each_budget_with_its_own_control(here, ray_local):
    (here / "labels.py").write_text(LABELS)
    said: list[str] = []
    table = sweep.run(request(space="labels.py", k=2, m=1), time_budget=None, address=None, say=said.append)
    kept = sweep.Sweep.open(Site.here().find_sweep(None)).arms()
    rows = {row["arm"]: row for row in json.loads(sweep.leaderboard(None, "json", "dice"))["rows"]}
    assert (
        set(rows) == set(kept) <= {f"{series}, {n}" for series in ("from scratch", "pretrained") for n in (1, 2, 4, 8, "all")}
    )
    assert any("is left out" in line for line in said), "there are fewer than 8 labelled patients"
    for label, row in rows.items():
        series, budget = label.split(", ")
        assert row["control"] == f"from scratch, {budget}"
        assert (row["p"] is None) == (series == "from scratch")
        if series == "pretrained":
            assert row["difference"] == pytest.approx(row["mean"] - rows[f"from scratch, {budget}"]["mean"])
    assert len(stages("pretrain", False)) == 2, "one pretraining serves all budgets, twice"
    assert "its control" in table


SHRUNK = {
    "network": {"width": 4, "levels": 3},
    "pretrain": {"side": 16, "d": 16, "training": {"steps": 3, "batch": 8}},
    "finetune": {"side": 32, "training": {"steps": 3, "batch": 4, "evaluations": 1}},
    "evaluate": {"inference": "whole"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "heads", "methods"),
    [
        ("temperature", {"hidden": 16}, {"simclr"}),
        ("loss-weights", {"hidden": 16}, {"vicreg"}),
        ("label-fraction", {}, {"simsiam", "byol"}),  # which share no other size of their heads
        ("iou-interval", {"bottleneck": 8}, {"simsiam"}),
    ],
)
def test_the_spaces_of_the_questions_run_to_a_leaderboard(here, ray_local, name, heads, methods):
    import yaml

    (here / "small.yaml").write_text(yaml.safe_dump(SHRUNK | {"pretrain": SHRUNK["pretrain"] | heads}))
    run(space=name, k=1, m=1)
    board = json.loads(sweep.leaderboard(None, "json", "dice"))
    asked = sweep.Sweep.open(Site.here().find_sweep(None)).arms()
    assert [row["arm"] for row in board["rows"] if not 0 <= row["mean"] <= 1] == []
    assert {row["arm"] for row in board["rows"]} == set(asked)
    assert len(outcome()) == len(asked) >= 6
    trained = {
        json.loads((folder / "run.json").read_text())["config"]["pretrain"]["name"] for folder in stages("pretrain", False)
    }
    assert trained == methods


@pytest.mark.slow
def test_given_weights_reach_the_workers_of_a_sweep(here, ray_local):
    """Typed as a path relative to here; workers start elsewhere. The four arms of search_spaces/initialisation.py."""
    import torch

    from medssl.methods.networks import unet

    encoder = unet.UNet(1, 2, unet.Config(width=4, levels=3)).encoder
    torch.save(encoder.state_dict(), here / "given.pth")
    table = run(space="initialisation", k=1, m=1, overrides=("start.weights=given.pth",))
    assert all(label in table for label in ("from scratch", "given weights", "self-supervised", "hierarchical"))
    done = {folder.name: json.loads((folder / "done.json").read_text()) for folder in stages("finetune", False)}
    begun = sorted(entry["chain"].split(" -> ")[:-1] for entry in done.values())
    given, own = "given (encoder)", "simsiam:phantom@30"
    assert begun == [[], [given], [given, own], [own]]


RACE = """
QUESTION = "Which overlap?"
CONTROL = "from scratch"

def arms():
    intervals = {"any": None, "none": (0.0, 0.2), "middle": (0.3, 0.6)}
    return {"from scratch": {"pretrain": None}} | {label: {"pretrain.iou": iou} for label, iou in intervals.items()}
"""


@pytest.mark.slow
def test_a_race_killed_and_typed_again_ends_as_an_undisturbed_one_and_ranks_what_it_confirmed(here, ray_local):
    (here / "overlap.py").write_text(RACE)
    small = ("finetune.training.steps=4", "pretrain.training.steps=4", "finetune.training.evaluations=1")
    asked = {"search": "race", "k": 6, "m": 1, "confirm": 2, "overrides": small}
    said: list[str] = []
    stopped = sweep.run(request(**asked), time_budget="2s", address=None, say=said.append)
    before = set(outcome())
    assert "no fine-tuning" in stopped or any("the search to go" in line for line in said)
    answer = sweep.run(request(**asked), time_budget=None, address=None, against="gpu-hours", say=said.append)
    assert "Confirmation: fresh pretrainings" in answer
    assert "by posterior mean" in answer
    assert "gpu-hours" in answer
    found = sweep.Sweep.open(Site.here().find_sweep(None))
    repeats = found.repeats()
    asked_for = sum(len(indices) for phases in repeats.values() for indices in phases.values())
    assert asked_for == len(outcome()) <= 4 * 6 / 2 + 2
    assert before <= set(outcome())
    confirmed = {label for label, phases in repeats.items() if "confirm" in phases}
    assert len(confirmed) == 3
    assert "from scratch" in confirmed
    rows = {line.split(",")[0]: line.split(",")[1] for line in sweep.leaderboard(None, "csv", "dice").splitlines()[1:]}
    assert rows == dict.fromkeys(confirmed, "2"), "the verdict uses the fresh pretrainings only"
    searched = sweep.leaderboard(None, "csv", "dice", phase="search").splitlines()[1:]
    assert len(searched) == 4
    assert {row["arm"] for row in json.loads((found.folder / "pareto.json").read_text())} == set(repeats)
    assert run(**asked)
    assert len(outcome()) == asked_for, "typed again, it looks everything up"


def test_a_race_of_too_few_repeats_is_refused(here):
    with pytest.raises(UsageError, match="at least --pretrainings 4"):
        sweep.dry_run(request(search="race"), say=print)


def test_a_plan_of_a_race_says_what_it_may_spend(here):
    plan = sweep.dry_run(request(search="race", k=12), say=print)
    assert "race     at most 6 of the 36 pretrainings" in plan
    assert "5 fresh pretrainings" in plan
    assert "power    k=5, m=2" in plan, "what the leaderboard will compare: two confirmed arms with the control"
    assert "5% over 2 comparisons" in plan
    assert "smallest p that 5 fresh pretrainings per confirmed arm can give: 0.00794" in plan


def test_a_plan_of_a_search_without_confirmation_counts_the_arms_it_may_ask_for(here):
    plan = sweep.dry_run(request(search="random", k=6, trials=7, confirm=0), say=print)
    assert "power    k=6, m=2" in plan
    assert "5% over 7 comparisons" in plan
