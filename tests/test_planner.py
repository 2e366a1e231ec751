"""A plan's arithmetic: hours, money, storage and power, from constructed stages against values worked out by hand."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from medssl.platform import config, geometry, ledger, plan, planner, statistics
from medssl.platform.planner import Hands, Pace
from medssl.platform.records import Score
from medssl.platform.site import Site
from medssl.platform.splits import Split
from medssl.platform.store import Store, VolumeRecord

SPLIT = Split("seed-0", ("p0", "p1"), ("p2",), ("p3", "p4"), ("p0", "p1"))
HANDS = Hands(cpus=8, gpus=0, machines=1, device="cpu")
# the 24 published scores of the IoU study, arms with pretraining only
STUDY = [
    (0.836, 0.831, 0.834, 0.850), (0.847, 0.831, 0.855, 0.824), (0.854, 0.851, 0.851, 0.857),
    (0.850, 0.855, 0.848, 0.822), (0.815, 0.841, 0.828, 0.812),
]  # fmt: skip


def store() -> Store:
    records = tuple(
        VolumeRecord(f"v{n}", f"p{n}", None, True, 10, 64, 64, 1, (1.0, 1.0, 2.0), None, {}, f"digest{n}") for n in range(5)
    )
    preset = geometry.PRESETS["mr"]
    return Store(Path("nowhere"), "toy", ("background", "organ"), None, "", "", {}, preset, "content", "", (), records)


def experiment(**dotted):
    given = {"pretrain.training.steps": 100, "finetune.training.steps": 10} | dotted
    return plan.resolve(config.build(config.nested(given)), store(), SPLIT)


def chains(k=2, m=2, **dotted):
    return [plan.chain("arm", n, m, experiment(**dotted), store(), SPLIT) for n in range(k)]


def finish(site: Site, chain: plan.Chain, *seconds: float, device="cpu", **done) -> None:
    """The chain's first stages as finished ones."""
    for stage, took in zip(chain.stages, seconds, strict=False):
        folder = site.stage(stage.id)
        folder.mkdir(parents=True)
        run = {"kind": stage.kind, "stage": stage.id, "steps": stage.steps, "parent": stage.parent, "device": device}
        run |= {"store": "nowhere", "split": "seed-0", "encoder_seed": chain.encoder_seed, "config": chain.experiment.tree()}
        (folder / "run.json").write_text(json.dumps(run))
        left = {"status": "finished", "seconds": took, "step": stage.steps if stage.kind == "pretrain" else 3} | done
        (folder / "done.json").write_text(json.dumps(left))


@pytest.fixture
def site(tmp_path) -> Site:
    return Site(tmp_path / "data", tmp_path / "runs")


def lines(site, found, at_once=2, price=None, hands=HANDS, calibrated=None) -> dict[str, str]:
    told = planner.describe(found, site, hands, at_once, planner.Paces(site, calibrated), price)
    return {line.split()[0]: line for line in told}


def test_hours_and_money_follow_from_finished_stages_of_the_same_configuration(site):
    found = chains(k=3)
    finish(site, found[0], 3600.0, 360.0)  # 36 s a step, 36 s a step; a fine-tuning's steps are those of its plan
    told = lines(site, found, price=2.0)
    # left: a fine-tuning of the first chain (0.1 h), and two whole chains of 1.2 h on the two places: 0.1 + 1.2 h
    assert told["hours"].startswith("hours    1:18:00 with 2 at a time")
    assert "2.5 core-hours" in told["hours"]
    assert told["money"].startswith("money    2.60 at 2 per machine and hour")


def test_chains_stay_whole_and_go_where_a_place_is_free_first(site):
    found = chains(k=3, m=0)
    estimate = planner.estimate(found, (), {}, lambda stage, experiment: Pace(1.0, ""), at_once=2)
    assert (estimate.seconds, estimate.worker_seconds, estimate.stages) == (200.0, 300.0, 3)
    begun = {found[0].stages[0].id: 60}
    assert planner.estimate(found, (), begun, lambda stage, experiment: Pace(1.0, ""), at_once=3).worker_seconds == 240.0


def test_how_busy_a_sweep_keeps_its_devices_is_the_mean_over_the_time_of_its_stages(site):
    found = chains(k=2, m=2)  # 2 pretrainings of 100 steps, 4 fine-tunings of 10
    told = {"pretrain": Pace(1.0, "", busy=0.9), "finetune": Pace(0.5, "", fixed=5.0, busy=0.3)}
    seconds = {"pretrain": 2 * 100 * 1.0, "finetune": 4 * (10 * 0.5 + 5.0)}
    estimate = planner.estimate(found, (), {}, lambda stage, experiment: told[stage.kind], at_once=2)
    assert estimate.busy == pytest.approx((0.9 * seconds["pretrain"] + 0.3 * seconds["finetune"]) / sum(seconds.values()))
    half = told | {"finetune": Pace(0.5, "")}
    assert planner.estimate(found, (), {}, lambda stage, experiment: half[stage.kind], at_once=2).busy is None
    small = Hands(16, 2, 1, "a GPU", 24e9)
    measured = {kind: Pace(1.0, "calibrated", memory=2e9, busy=0.25) for kind in ("pretrain", "finetune")}
    known = {planner.keys(kind, found[0].experiment.tree())[1]: pace for kind, pace in measured.items()}
    words = lines(site, found, hands=small, calibrated=known)
    assert "busy 25% of the time" in words["pace"]
    assert "-o resources.gpus=0.25: 4 stages of 2 GB" in words["packing"]


def test_what_a_gpu_says_of_itself_is_heard_while_the_body_runs_and_its_mean_is_taken(tmp_path, monkeypatch):
    """By a program that says what nvidia-smi is documented to say: percent, or [N/A] of a part of a GPU."""
    import torch

    from medssl.platform import calibrate

    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "$*" > "$0.asked"\nfor n in 40 50 60 "[N/A]"; do echo "$n"; done\nexec sleep 60\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12ab"))
    begun = time.perf_counter()
    with calibrate.utilisation(torch.device("cuda")) as heard:
        while len(heard) < 4:
            time.sleep(0.01)
    assert time.perf_counter() - begun < 30, "it was ended with the body"
    asked = program.with_suffix(".asked").read_text()
    assert "--id=GPU-12ab" in asked
    assert "--query-gpu=utilization.gpu" in asked
    assert calibrate.mean_of(heard, begun, time.perf_counter()) == pytest.approx(0.5)
    assert calibrate.mean_of([(0.0, "100"), (1.0, "20\n"), (2.0, "30\n"), (3.0, "100")], 0.5, 2.5) == pytest.approx(0.25)
    assert calibrate.mean_of([(1.0, "[N/A]\n")], 0.0, 2.0) is None
    with calibrate.utilisation(torch.device("cpu")) as heard:
        assert heard == []


def test_a_pretraining_that_two_arms_share_is_counted_once(site):
    first, second = chains(k=1), chains(k=1, **{"data.labelled": 1})
    estimate = planner.estimate([*first, *second], (), {}, lambda stage, experiment: Pace(1.0, ""), at_once=1)
    assert (estimate.stages, estimate.seconds) == (5, 100 + 4 * 10)


def test_workers_count_for_hours_of_cores_and_machines_for_money(site):
    found = chains(k=1, m=0, **{"resources.workers": 2, "resources.cpus": 3})
    told = lines(site, found, 1, 1.5, Hands(12, 0, 4, "cpu"), {key(found[0]): Pace(36.0, "calibrated", running=5e6)})
    assert "6 core-hours" in told["hours"]
    assert "6.00 at 1.5" in told["money"], "one hour of four machines"
    assert "5 MB more" in told["storage"]


def key(chain) -> str:
    return planner.keys("pretrain", chain.experiment.tree())[1]


def test_stages_that_differ_in_rates_and_intervals_tell_each_others_pace_but_sides_and_devices_do_not(site):
    (done,) = chains(k=1, m=0)
    finish(site, done, 50.0)
    paces = planner.Paces(site)

    def pace(device="cpu", **dotted):
        (chain,) = chains(k=1, m=0, **dotted)
        return paces.of(chain.stages[0], chain.experiment, device)

    assert pace().step == 0.5
    assert pace(**{"pretrain.iou": (0.3, 0.6), "pretrain.training.lr": 0.5}).source == "1 finished stage like it"
    assert pace(**{"pretrain.training.steps": 7}).step == 0.5
    for other in ({"pretrain.side": 16}, {"pretrain.training.batch": 3}, {"network.width": 4}, {"pretrain.name": "byol"}):
        assert pace(**other) is None, other
    assert pace(device="NVIDIA H100") is None
    assert pace(device=None) is None


def test_what_has_no_pace_is_named_and_left_out(site):
    found = chains(k=1)
    assert lines(site, found)["hours"] == "hours    unknown"
    finish(site, chains(k=1, seed=5)[0], 100.0)
    told = planner.describe(found, site, HANDS, 1, planner.Paces(site), None)
    assert any("segment of unet" in line and "--calibrate" in line for line in told)
    assert any(line.startswith("hours    0:01:40") and "without 1 kind of stage" in line for line in told)


def test_storage_is_that_of_finished_stages(site):
    found = chains(k=2, m=0)
    finish(site, found[0], 1.0)
    (site.stage(found[0].stages[0].id) / "encoder.pt").write_bytes(bytes(3_000_000))
    assert lines(site, found)["storage"].startswith("storage  3 MB to keep")


def test_a_collapsed_pretraining_counts_with_the_steps_it_did(site):
    found = chains(k=2, m=0)
    finish(site, found[0], 10.0, status="collapsed", step=50)
    assert lines(site, found, 1)["hours"].startswith("hours    0:00:20")


def test_the_published_noise_is_that_of_the_table():
    scores = [[arm[:2], arm[2:]] for arm in STUDY]
    found = statistics.components(scores)
    assert math.sqrt(planner.PUBLISHED.within) == pytest.approx(0.0126, abs=5e-5)
    assert found.between == planner.PUBLISHED.between == 0
    assert math.sqrt(found.within) == pytest.approx(math.sqrt(planner.PUBLISHED.within), abs=5e-5)
    assert (found.df_between, found.df_within) == (planner.PUBLISHED.df_between, planner.PUBLISHED.df_within)


def test_noise_is_estimated_from_the_scores_on_these_data_alone(site):
    contract, means = plan.contract(store(), SPLIT), {}
    for arm, iou in enumerate([(0.0, 0.3), (0.3, 0.6)]):
        for chain in chains(**{"pretrain.iou": iou}):
            finish(site, chain, 1.0, 1.0, 1.0)
            for n, stage in enumerate(chain.finetunings):
                values = [0.5 + 0.1 * arm + 0.03 * chain.index + 0.01 * n, 0.6]
                score = [Score(f"p{3 + i}", f"v{3 + i}", "test", "organ", "dice", value) for i, value in enumerate(values)]
                ledger.write(site.runs, stage.id, contract, score)
                means.setdefault(arm, {}).setdefault(chain.index, []).append(sum(values) / 2)
    (other,) = chains(k=1, m=1, seed=9)
    finish(site, other, 1.0, 1.0)
    ledger.write(site.runs, other.finetunings[0].id, "another", [Score("p3", "v3", "test", "organ", "dice", 0.0)])
    found, pretrainings = planner.noise(site, store(), SPLIT, "dice")
    expected = statistics.components([list(groups.values()) for groups in means.values()])
    assert pretrainings == 4
    assert (found.between_raw, found.within) == pytest.approx((expected.between_raw, expected.within))
    assert planner.noise(site, store(), SPLIT, "nsd") is None


@pytest.mark.parametrize("k", [5, 8, 20])
def test_power_says_what_statistics_say(k):
    noise = statistics.Components(0.0004, 0.0002, 4, 4)
    sd = math.sqrt(0.0004 + 0.0002 / 2)
    first, second, third = planner.power((noise, 8), k, 2, 3, 0.02)
    least = statistics.detectable(sd, k, comparisons=3)
    assert f"a difference of {least:.4f}" in first
    assert f"0.02 wants {statistics.needed(sd, 0.02, comparisons=3)} pretrainings" in second
    assert "sd 0.0200 between pretrainings, 0.0141 within (8 pretrainings scored on these data)" in third


def test_two_pretrainings_can_show_nothing_and_the_plan_says_so():
    first, second, third = planner.power(None, 2, 2, 5, 0.01)
    assert "no difference can be told from chance" in first
    assert f"wants {statistics.needed(0.0126 / math.sqrt(2), 0.01, comparisons=5)} pretrainings" in second
    assert "published for the IoU study" in third


def test_the_machines_at_hand_are_found_without_torch_or_ray(site):
    code = (
        "import sys; from medssl.platform import planner; print(planner.this_machine().cpus)\n"
        "assert not {'torch', 'ray'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == os.cpu_count()
