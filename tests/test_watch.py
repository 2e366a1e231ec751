"""Watching a sweep: counts, spending and ETA from constructed folders, the view, and what a look costs."""

import dataclasses
import io
import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from medssl.platform import config, plan, spending, watch
from medssl.platform.errors import UsageError
from medssl.platform.plan import Chain
from medssl.platform.site import Progress, Site, spent
from medssl.platform.sweep import Sweep

EXPERIMENT = config.build({"pretrain": {"training": {"steps": 100}}, "finetune": {"training": {"steps": 10}}})


def chains(arms: int = 2) -> list[Chain]:
    """From scratch and arms of 2 pretrainings, 2 fine-tunings each."""
    found = []
    for arm in range(arms):
        for index in range(2):
            first = plan.Stage("pretrain", f"pre-{arm}-{index}", index, 100, None) if arm else None
            tuned = tuple(plan.Stage("finetune", f"fine-{arm}-{index}-{n}", n, 10, first and first.id) for n in range(2))
            found.append(Chain(f"arm {arm}", index, EXPERIMENT, first, tuned))
    return found


@pytest.fixture
def standing(tmp_path, monkeypatch) -> tuple[Site, Path]:
    """A sweep of two arms: from scratch finished once, a pretraining half way, 40 s for 50 steps."""
    site, folder = Site(tmp_path / "data", tmp_path / "runs"), tmp_path / "runs" / "sweeps" / "toy"
    folder.mkdir(parents=True)
    sweep = Sweep("toy", "Is it so?", "arm 0", "grid", {}, {}, 2, 2, tmp_path, "seed-0", folder)
    monkeypatch.setattr(Sweep, "chains", lambda self: chains())  # the plan itself has its own tests
    monkeypatch.setattr("medssl.platform.sweep.provenance", dict)
    sweep.save()
    for number, score in ((0, 0.8), (1, 0.9)):
        finish(site, f"fine-0-0-{number}", validation=score, step=4)
    run(site, "pre-1-0", step=50, took=40.0)
    return site, folder


def finish(site: Site, stage: str, **done) -> None:
    site.stage(stage).mkdir(parents=True)
    (site.stage(stage) / "done.json").write_text(json.dumps({"status": "finished", "seconds": 5.0} | done))


def run(site: Site, stage: str, step: int, took: float) -> None:
    site.stage(stage).mkdir(parents=True)
    now = time.time()
    seen = {"step": step, "from": 0, "total": 100, "text": "loss 0.5 collapse 0.1", "begun": now - took, "at": now}
    (site.stage(stage) / "progress.json").write_text(json.dumps(seen))


def test_a_look_counts_arms_and_extrapolates_the_paces_of_both_kinds(standing):
    now = watch.state(*standing)
    assert (now["stages"], len(now["finished"]), len(now["running"])) == (10, 2, 1)
    scratch, other = now["arms"]
    assert scratch == {"arm": "arm 0", "pretrainings": [0, 0], "finetunings": [2, 4], "validation": pytest.approx(0.85)}
    assert (other["pretrainings"], other["finetunings"], other["validation"]) == ([0, 2], [0, 4], None)
    # 150 steps of pretraining at 0.8 s and 60 of fine-tuning at 0.5 s, one stage at a time
    assert now["seconds_left"] == pytest.approx(150 * 0.8 + 60 * 0.5)
    json.dumps(now)


def test_spending_adds_up_over_starts_and_prices_every_machine(standing):
    _, folder = standing
    for _ in range(2):  # two starts
        meter = spending.Meter(folder, price=3.0, machines=lambda: 2)
        meter.last -= 1800
        meter.tick()
    now = watch.state(*standing)["spending"]
    assert now["hours"] == pytest.approx(1.0, abs=1e-3)
    assert now["machine_hours"] == pytest.approx(2.0, abs=2e-3)
    assert now["money"] == pytest.approx(6.0, abs=6e-3)
    assert now["money_left"] == pytest.approx(150 / 3600 * 2 * 3)
    assert now["stage_hours"] == pytest.approx((5 + 5 + 40) / 3600)
    assert spending.Meter(folder).now.price == 3.0, "a later start without a price keeps it"


@pytest.mark.parametrize(("limit", "exhausted"), [(None, False), (1.01, False), (0.99, True)])
def test_a_limit_is_reached_by_the_hours_of_all_starts(tmp_path, limit, exhausted):
    earlier = spending.Spending(seconds=3600.0, machine_seconds=3600.0)
    (tmp_path / "spending.json").write_text(json.dumps(dataclasses.asdict(earlier)))
    assert spending.Meter(tmp_path, price=1.0, limit=limit).exhausted == exhausted


def opened(monkeypatch) -> list[str]:
    """Every file that pathlib reads from now on."""
    names: list[str] = []
    read = Path.read_text

    def counted(self, *arguments, **keywords):
        names.append(f"{self.parent.name}/{self.name}")
        return read(self, *arguments, **keywords)

    monkeypatch.setattr(Path, "read_text", counted)
    return names


def test_a_second_look_reads_no_finished_stage_and_no_stage_that_has_not_begun(standing, monkeypatch):
    site, folder = standing
    lookout = watch.Lookout(site, folder)
    first = lookout.look()
    names = opened(monkeypatch)
    second = lookout.look()
    assert sorted(names) == ["pre-1-0/done.json", "pre-1-0/progress.json", "toy/spending.json"]
    assert second["finished"] == first["finished"]
    finish(site, "fine-0-1-0", validation=0.7, step=2)
    assert len(lookout.look()["finished"]) == 3


def test_an_arm_that_a_search_adds_is_seen(standing, monkeypatch):
    site, folder = standing
    lookout = watch.Lookout(site, folder)
    assert lookout.look()["stages"] == 10
    monkeypatch.setattr(Sweep, "chains", lambda self: chains(3))
    assert lookout.look()["stages"] == 10, "its files have not changed"
    (folder / "arms.json").write_text("{}")
    assert lookout.look()["stages"] == 16


def drawn(now: dict, width: int = 90, rows: int = 40) -> list[str]:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(watch.view(now, rows))
    return console.file.getvalue().splitlines()


def test_the_view_has_a_line_for_every_arm_and_every_running_stage(standing):
    meter = spending.Meter(standing[1], price=2.0)
    meter.places(4)
    meter.tick()
    lines = drawn(watch.state(*standing))
    assert lines[0].startswith("toy: 2 of 10 stages, about 0:02:30 left; spent 0:00:00 = 0.00, 0.08 to come")
    (scratch,) = [line for line in lines if line.split()[:2] == ["arm", "0"]]
    assert scratch.split()[2:] == ["none", "2/4", "0.850"]
    assert any("running: 1 of 4" in line for line in lines)
    (running,) = [line for line in lines if "pretrain " in line]
    assert running.split()[:7] == ["arm", "1", "#1", "pretrain", "50/100", "0:00:40", "loss"]
    assert max(map(len, lines)) <= 90


def test_the_view_fits_a_low_terminal(standing, monkeypatch):
    monkeypatch.setattr(Sweep, "chains", lambda self: chains(60))
    lines = drawn(watch.state(*standing), rows=24)
    assert len(lines) <= 24
    assert any("and 48 more arms" in line for line in lines)


def test_watching_from_afar_wants_a_terminal(standing):
    with pytest.raises(UsageError, match="status --json"):
        watch.attach(*standing)


def test_the_time_of_a_killed_stage_is_not_forgotten(tmp_path, monkeypatch):
    clock = iter([100.0, 160.0, 1000.0, 1030.0])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    for step in (0, 30):
        progress = Progress(tmp_path, 100)
        progress.show(step, "starting")
        progress.show(step + 50, "")
    assert spent(tmp_path) == 60 + 30
    assert json.loads((tmp_path / "progress.json").read_text())["from"] == 30


def test_optuna_dashboard_opens_the_study_of_a_sweep(tmp_path):
    dashboard = pytest.importorskip("optuna_dashboard", reason="extra [dashboard] is not installed")
    from medssl.platform import search

    study = search.open_study(tmp_path, "grid", seed=0)
    study.tell(study.ask({}), 0.5)
    app, answers = dashboard.wsgi(f"sqlite:///{tmp_path / 'study.db'}"), []
    asked = {"REQUEST_METHOD": "GET", "PATH_INFO": "/api/studies", "SERVER_NAME": "here", "SERVER_PORT": "80"}
    asked |= {"wsgi.url_scheme": "http", "wsgi.input": io.BytesIO(), "wsgi.errors": io.StringIO(), "QUERY_STRING": ""}
    body = b"".join(app(asked, lambda status, headers, error=None: answers.append(status)))
    assert answers == ["200 OK"]
    assert tmp_path.name in body.decode()
