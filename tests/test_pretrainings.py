"""The table of pretrainings says what their folders hold, and what a pretraining should show."""

import csv
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from medssl.platform import atomic, catalogue, config, pretrainings, single, sweep
from medssl.platform.datasets import phantom
from medssl.platform.errors import RunError, UsageError
from medssl.platform.plan import Chain, Stage
from medssl.platform.pretrainings import Row
from medssl.platform.site import Site

BEFORE = {"step": 0, "dice": 0.40, "knn": 0.60, "rank": 5.0, "spread": 0.5}
AFTER = {"step": 90, "dice": 0.55, "knn": 0.70, "rank": 9.0, "spread": 0.6}


@pytest.fixture
def site(tmp_path) -> Site:
    return Site(tmp_path / "data", tmp_path / "runs")


def chain(arm: str, stage: str | None, index: int = 0) -> Chain:
    experiment = config.build(config.stack([config.BASE, {"pretrain": {"name": "byol"} if stage else None}]))
    return Chain(arm, index, experiment, Stage("pretrain", stage, 0, 90, None) if stage else None, ())


def left(site: Site, stage: str, losses: list[tuple[int, float, float]], **done: Any) -> None:
    """A finished pretraining: reports of (step, seconds, loss), and its end."""
    folder = site.stage(stage)
    folder.mkdir(parents=True)
    lines = [{"step": step, "seconds": seconds, "loss/a": loss, "loss/b": 1.0} for step, seconds, loss in losses]
    lines.insert(1, {"step": lines[0]["step"], "seconds": lines[0]["seconds"], "probe/dice": 0.4})
    (folder / "scalars.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monitors = {"collapse": 0.2, "feature_spread": 0.9, "effective_rank": math.nan}
    atomic.write_json(folder / "done.json", {"status": "finished", "step": 90, "losses": {}, "monitors": monitors} | done)


def test_a_row_holds_what_a_pretraining_left(site):
    left(site, "byol-1", [(1, 2.0, 3.0), (40, 8.0, 2.0), (91, 12.0, 0.5)], probe=[BEFORE, AFTER])
    (row,) = pretrainings.rows(site, [chain("from scratch", None), chain("byol", "byol-1")])
    first = pytest.approx((4.0 + 3.0 * 8.1) / 9.1)  # a tenth of 91 steps: the first report is of one of them
    assert row == Row(
        "byol", 0, "byol", "byol-1", "finished", 90, first, 1.5, 0.2, 0.9, None, 0.40, 0.55, 0.60, 0.70, 5.0, 9.0, 9.0
    )


def test_loss_is_the_mean_over_the_first_and_the_last_tenth_of_the_steps(site):
    """Brute force: give every step its report's loss (steps 1, 2-15, 16-92, 93-100), and average ten of them."""
    reports = [(1, 1.0, 1.0), (15, 2.0, 5.0), (92, 3.0, 7.0), (100, 4.0, 4.0)]
    left(site, "moco-1", reports)
    (row,) = pretrainings.rows(site, [chain("moco", "moco-1")])
    steps = [1.0] + [5.0] * 14 + [7.0] * 77 + [4.0] * 8
    assert row.first_loss == pytest.approx(sum(steps[:10]) / 10 + 1), "loss/b adds 1"
    assert row.last_loss == pytest.approx(sum(steps[-10:]) / 10 + 1)


def test_a_shared_pretraining_has_one_row_and_an_unfinished_one_no_numbers(site):
    left(site, "byol-1", [(1, 2.0, 3.0), (90, 12.0, 0.5)])
    found = pretrainings.rows(site, [chain("one label", "byol-1"), chain("two labels", "byol-1"), chain("other", "byol-2", 1)])
    assert [(row.arm, row.index, row.status) for row in found] == [("one label", 0, "finished"), ("other", 1, "not finished")]
    assert found[1] == Row("other", 1, "byol", "byol-2", "not finished")


def test_a_pretraining_without_reports_is_shown_all_the_same(site):
    left(site, "byol-1", [(1, 2.0, 3.0)])
    (site.stage("byol-1") / "scalars.jsonl").unlink()
    (row,) = pretrainings.rows(site, [chain("byol", "byol-1")])
    assert (row.steps, row.first_loss, row.steps_per_second) == (90, None, None)


def test_the_verdict_names_what_fails(site):
    left(site, "good", [(1, 1.0, 3.0), (90, 9.0, 1.0)], probe=[BEFORE, AFTER])
    left(site, "bad", [(1, 1.0, 3.0), (90, 9.0, 3.5)], probe=[BEFORE, AFTER | {"dice": 0.3}], status="collapsed")
    said = pretrainings.verdict(pretrainings.rows(site, [chain("a", "good"), chain("b", "bad"), chain("c", "none")]))
    assert said == [
        "1 of 3 pretrainings have not finished.",
        "The loss fell in 1 of 2: not in b 0.",
        "Features did not collapse (index, or 1 - spread, up to 0.95) in training in 1 of 2: not in b 0.",
        "The probe's Dice is above that of the same encoder before its first step in 1 of 2: not in b 0.",
    ]


def test_a_method_without_an_index_has_collapsed_where_its_features_do_not_spread():
    done = Row("a", 0, "iic", "iic-1", "finished", steps=9)
    rows = [
        dataclasses.replace(done, arm=arm, collapse=index, spread=spread)
        for arm, index, spread in [("spread", None, 0.4), ("point", None, 0.03), ("index", 0.2, 0.03), ("silent", None, None)]
    ]
    assert pretrainings.verdict(rows)[0].endswith("in training in 3 of 4: not in point 0.")


SPACE = """
QUESTION = "Which?"
CONTROL = "from scratch"

def arms():
    return {"from scratch": {"pretrain": None}, "simsiam": {}, "byol": {"pretrain.name": "byol"}}
"""
TINY = ["network.width=4", "network.levels=2", "pretrain.side=8", "pretrain.d=8", "pretrain.training.steps=4"]
TINY += ["pretrain.training.batch=4", "pretrain.training.probes=1", "finetune.side=16"]


@pytest.fixture
def swept(tmp_path, monkeypatch) -> Path:
    """A sweep whose one pretraining of SimSiam has run, and BYOL's not."""
    monkeypatch.setenv("MEDSSL_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("MEDSSL_RUNS", str(tmp_path / "runs"))
    phantom.generate(tmp_path / "tiny", patients=4)
    coarse = {"spacing_mm": (12.0, 12.0, 24.0), "pad": 32}
    store = catalogue.prepare(str(tmp_path / "tiny"), changes=coarse, workers=1, say=lambda text: None)
    (tmp_path / "which.py").write_text(SPACE)
    request = sweep.Request(str(tmp_path / "which.py"), str(tmp_path / "tiny"), 1, 1, "grid", overrides=tuple(TINY))
    bound = sweep._bind(request, sweep.load_space(request.space), store)
    bound.save()
    atomic.write_json(bound.folder / "arms.json", sweep.load_space(request.space).arms())
    single.pretrain("simsiam", None, str(tmp_path / "tiny"), 0, [], TINY, say=lambda text: None)
    return bound.folder


def test_the_table_of_a_real_sweep(swept):
    found = list(csv.DictReader(io.StringIO(pretrainings.table(None, "csv"))))
    assert [(row["arm"], row["method"], row["status"]) for row in found] == [
        ("simsiam", "simsiam", "finished"),
        ("byol", "byol", "not finished"),
    ]
    assert -1 <= float(found[0]["first_loss"]) <= 1, "a cosine"
    assert float(found[0]["rank"]) >= 1
    (first, second) = json.loads(pretrainings.table(swept.name, "json"))
    assert first["steps"] == 4
    assert second["last_loss"] is None
    assert 0 <= first["probe_dice"] <= 1
    assert first["probe_rank_before"] != first["probe_rank"], "it has trained"
    text, markdown = pretrainings.table(swept.name, "table"), pretrainings.table(swept.name, "md")
    assert "1 of 2 pretrainings have not finished." in text
    assert "probe Dice" in text
    assert len({line.count("|") for line in markdown.splitlines() if line.startswith("|")}) == 1
    with pytest.raises(UsageError, match="no format"):
        pretrainings.table(None, "paper")


def test_a_sweep_without_pretraining_is_refused(swept):
    arms = json.loads((swept / "arms.json").read_text())
    atomic.write_json(swept / "arms.json", {"from scratch": arms["from scratch"]})
    with pytest.raises(RunError, match="no arm of it pretrains"):
        pretrainings.table(None, "table")
