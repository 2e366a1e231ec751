"""The report: one file that works offline, says everything, and lets no label run."""

import json
import math
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from medssl import cli
from medssl.platform import answers, catalogue, page, report, search, stages, sweep
from medssl.platform.datasets import phantom
from medssl.platform.errors import UsageError
from medssl.platform.site import Site
from medssl.platform.spaces import load_space

pytestmark = pytest.mark.slow  # for the sweep that all of them look at

SCRIPT, ODD = "<script>alert(1)</script>", '$\\frac{a}$ & "b" | `c`'
ARMS = {
    "from scratch": {"pretrain": None},
    SCRIPT: {"pretrain.iou": (0.1, 0.4)},
    ODD: {"pretrain.iou": (0.3, 0.6)},
    "wide": {"pretrain.iou": (0.2, 0.8)},
}
SETTINGS = (
    "network.width=4", "network.levels=2", "pretrain.side=16", "pretrain.d=8",
    "pretrain.training.steps=10", "pretrain.training.batch=8", "finetune.side=16", "finetune.training.steps=4",
    "finetune.training.batch=4", "finetune.training.evaluations=2", "evaluate.inference=whole",
)  # fmt: skip


def computed(name: str, arms: dict, k: int, m: int, *overrides: str) -> sweep.Sweep:
    """A sweep whose stages were run here one after another: what Ray would have left, without Ray."""
    text = f"QUESTION = 'Does <b>overlap</b> matter?'\nCONTROL = 'from scratch'\n\ndef arms():\n    return {arms!r}\n"
    Path(f"{name}.py").write_text(text)
    request = sweep.Request(f"{name}.py", "tiny", k, m, "grid", overrides=(*SETTINGS, *overrides))
    store = catalogue.open_store("tiny", say=print)
    asked, _ = sweep.fitted(request, load_space(request.space), store, arms, print)
    asked.save()
    (asked.folder / "arms.json").write_text(json.dumps(arms))
    work = stages.Work(Site.here(), store.root, catalogue.split(store, asked.split))
    for chain in asked.chains():
        stages.run_chain(chain, work)
    return asked


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a prepared phantom of ten patients and a finished sweep of four arms, two of them with hostile names."""
    root = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSSL_DATA", str(root / "data"))
        patch.setenv("MEDSSL_RUNS", str(root / "runs"))
        patch.chdir(root)
        phantom.generate(root / "tiny", patients=10)
        coarse = {"spacing_mm": (12.0, 12.0, 24.0), "pad": 32}
        catalogue.prepare(str(root / "tiny"), changes=coarse, workers=1, say=lambda text: None)
        yield computed("hostile", ARMS, 2, 2)


@pytest.fixture(scope="module")
def written(here, tmp_path_factory) -> tuple[Path, Path]:
    """The report of the finished sweep, and the folder of its figures."""
    folder = tmp_path_factory.mktemp("written")
    report.write(here.folder.name, folder / "report.html", folder / "figures", "dice", 0.01, say=lambda text: None)
    return folder / "report.html", folder / "figures"


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text, self.raw, self.inside = "", {"script": "", "style": ""}, ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag if tag in self.raw else ""

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside:
            self.raw[self.inside] += data
        else:
            self.text += data


def test_nothing_is_fetched_and_only_the_pages_own_script_can_run(written):
    found = Page(written[0].read_text())
    names = [tag for tag, _ in found.tags]
    assert names.count("script") == 1
    assert found.raw["script"] == page.SCRIPT
    assert not {"link", "iframe", "object", "embed", "form", "base", "svg"} & set(names)
    for tag, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href", "srcset", "action", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:image/")), (tag, attributes)
    assert "url(" not in found.raw["style"]
    assert "@import" not in found.raw["style"]
    (policy,) = (each["content"] for tag, each in found.tags if each.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_every_arm_and_the_answer_are_said_whatever_they_are_called(written, here):
    found = Page(written[0].read_text())
    (board,) = answers.boards([here.folder.name], "dice", 0.01).values()
    for arm in ARMS:
        assert arm in found.text, "escaped exactly once"
    assert "<script>alert" not in written[0].read_text()
    assert "Does <b>overlap</b> matter?" in found.text
    spoken = board.verdict.replace("`", "")
    assert spoken.replace("`", "") in found.text
    assert found.text.index(spoken) < found.text.index("needed for"), "the verdict comes before the table"
    for row in board.rows:
        assert f"{row.mean:.3f}" in found.text


def test_cells_are_told_with_ids_seeds_versions_and_hashes(written, here):
    text = Page(written[0].read_text()).text
    for chain in here.chains():
        for stage in chain.stages:
            assert stage.id in text
    store = catalogue.open_store("tiny", say=print)
    assert store.content_hash in text
    for name, version in json.loads(here.file.read_text())["provenance"]["versions"].items():
        assert f"{name} {version}" in text


def test_the_command_of_a_cell_leads_to_that_cell(here, monkeypatch, capsys):
    for chain in here.chains()[1::2]:
        for number, stage in [(0, chain.pretraining), *enumerate(chain.finetunings)]:
            if stage is None:
                continue
            words = shlex.split(report.command(here, chain, stage, number))
            monkeypatch.setattr(sys, "argv", words)
            before = Site.here().finished()
            with pytest.raises(SystemExit) as end:
                cli.main()
            assert end.value.code == 0
            assert capsys.readouterr().out.startswith(f"{stage.id}:")
            assert Site.here().finished() == before, "it was looked up, not made anew"


def test_figures_are_written_as_png_and_svg_and_come_out_equal(written, here, tmp_path):
    _, figures = written
    names = {file.stem for file in figures.iterdir()}
    expected = {"forest", "over-interval", "classes", "slices", "curves-pretrain", "curves-finetune", "realised-iou", "spent"}
    assert expected <= names
    assert {f"{end}-case-{whose}" for end in ("worst", "best") for whose in ("leading", "control")} & names
    for name in names:
        assert (figures / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (figures / f"{name}.svg").read_bytes()[:600]
    again = tmp_path / "report.html"
    report.write(here.folder.name, again, None, "dice", 0.01, say=lambda text: None)
    assert again.read_bytes() == written[0].read_bytes(), "all of its figures lie in it"


@pytest.mark.parametrize(("metric", "sign"), [("dice", 1), ("hd95_mm", -1)])
def test_the_worst_case_is_the_one_with_the_worst_score(here, metric, sign):
    from medssl.platform import ledger, single

    stage = here.chains()[0].finetunings[0].id
    rows = [row for row in ledger.scores(Site.here().runs, stage) if (row.part, row.metric) == ("test", metric)]
    volumes = {row.volume for row in rows}
    by_volume = [np.mean([r.value for r in rows if r.volume == v and math.isfinite(r.value)] or [math.nan]) for v in volumes]
    worst, best = [score for _, _, score, _ in single.cases(stage, metric)]
    assert sorted([sign * worst, sign * best]) == [sign * worst, sign * best]
    assert sorted([worst, best]) == pytest.approx([np.nanmin(by_volume), np.nanmax(by_volume)])


def test_what_a_figure_lacks_is_said(written):
    text = Page(written[0].read_text()).text
    assert (
        "Left out: no arm varies the number of labelled training patients (data.labelled) or of labelled training slices "
        "(data.labelled_slices)." in text
    )


def test_an_unfinished_sweep_is_reported_with_what_is_missing(here, tmp_path):
    plain = json.loads(here.file.read_text())
    try:
        here.file.write_text(json.dumps(plain | {"k": 3}))
        report.write(here.folder.name, tmp_path / "some.html", None, "dice", 0.01, say=lambda text: None)
    finally:
        here.file.write_text(json.dumps(plain))
    text = Page((tmp_path / "some.html").read_text()).text
    assert "Unfinished: 3 pretrainings and 8 fine-tunings of 33 stages have not been done" in text
    assert "not done" in text


def test_a_sweep_that_has_scored_nothing_yet_has_a_report(here, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDSSL_RUNS", str(tmp_path / "runs"))
    shutil.copytree(here.folder, tmp_path / "runs" / "sweeps" / here.folder.name)
    report.write(None, tmp_path / "none.html", None, "dice", 0.01, say=lambda text: None)
    text = Page((tmp_path / "none.html").read_text()).text
    assert "No answer yet" in text
    assert "Unfinished: 6 pretrainings and 16 fine-tunings of 22 stages" in text
    assert all(arm in text for arm in ARMS)


def test_an_unknown_sweep_or_metric_is_refused(here, tmp_path):
    with pytest.raises(UsageError, match="no sweep 'nonsense'"):
        report.write("nonsense", tmp_path / "x.html", None, "dice", 0.01, say=print)
    with pytest.raises(UsageError, match="did you mean dice"):
        report.write(here.folder.name, tmp_path / "x.html", None, "dize", 0.01, say=print)


def test_a_browser_opens_it_offline_and_photographs_it(written, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    photo = tmp_path / "report.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", "--log-level=0"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", "--window-size=1100,2400"]
    command = [browser, *flags, f"--screenshot={photo}", written[0].as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console, "neither an error of the script nor a breach of the page's policy"
    from matplotlib.image import imread

    picture = imread(photo)[..., :3]
    assert picture.shape == (2400, 1100, 3)
    dark = (picture.mean(-1) < 0.5).mean(1)  # by line: text and figures from top to bottom, on a white page
    assert picture.mean() > 0.8
    assert all((part > 0).any() for part in np.array_split(dark, 8))


def test_a_confirmed_search_is_answered_by_the_confirmation_and_drawn_with_every_arm(here, tmp_path):
    arms = {"from scratch": {"pretrain": None}} | {f"lr {lr}": {"pretrain.training.lr": lr} for lr in (0.01, 0.02, 0.04)}
    found = computed("confirmed", arms, 1, 1)
    fresh = {label: {"confirm": [search.CONFIRM, search.CONFIRM + 1]} for label in ("from scratch", "lr 0.02")}
    (found.folder / "repeats.json").write_text(json.dumps(fresh))
    store = catalogue.open_store("tiny", say=print)
    for chain in found.chains("confirm"):
        stages.run_chain(chain, stages.Work(Site.here(), store.root, catalogue.split(store, found.split)))
    evidence = report.Evidence.gather(Site.here(), found.folder, "dice", 0.01)
    assert evidence.board
    assert {row.arm for row in evidence.board.rows} == set(fresh)
    assert set(evidence.arms) == set(arms)
    report.write(found.folder.name, tmp_path / "report.html", None, "dice", 0.01, say=lambda text: None)
    text = Page((tmp_path / "report.html").read_text()).text
    assert all(title in text for title in ("Arms, confirmed", "Arms of the search", "Confirmation: fresh pretrainings"))
    assert "no number is set to more than two values" not in text, "the search is drawn with all of its arms"
    assert all(stage.id in text for chain in found.chains() for stage in chain.stages), "every cell can be made again"


@pytest.mark.parametrize(
    ("labels", "name"),
    [
        (["simsiam, 4 labelled", "simsiam, 16 labelled"], "simsiam"),
        (["from scratch 1", "from scratch 2"], "from scratch"),
        (["4 labelled patients: byol", "all labelled patients: byol"], "byol"),
        (["4", "8"], "4"),
    ],
)
def test_a_series_is_called_by_what_its_labels_share(labels, name):
    assert report._common(labels) == name


def test_arms_that_vary_their_labelled_patients_give_a_curve(here, tmp_path):
    starts = {"from scratch": {"pretrain": None}, "pretrained": {"pretrain.iou": (0.3, 0.6)}}
    arms = {f"{name} {n}": settings | {"data.labelled": n} for n in (1, 2) for name, settings in starts.items()}
    arms = {"from scratch": {"pretrain": None}} | arms
    few = computed("few", arms, 1, 1)
    report.write(few.folder.name, tmp_path / "few.html", tmp_path, "dice", 0.01, say=lambda text: None)
    assert (tmp_path / "labelled.svg").exists()
    assert "A line per initialisation" in (tmp_path / "few.html").read_text()


@pytest.mark.parametrize(
    ("space", "budgets", "setting", "file", "axis"),
    [
        ("label-fraction", (1, 2, None), "data.labelled", "labelled", "labelled training patients"),
        ("slice-fraction", (3, None), "data.labelled_slices", "labelled-slices", "labelled training slices"),
    ],
)
def test_a_label_fraction_sweep_has_its_curve_in_both_formats(here, tmp_path, monkeypatch, space, budgets, setting, file, axis):
    """The series of the built-in space, at fewer budgets; the axis ends at what there is in all."""
    series = load_space(space).SERIES
    arms = load_space("label-fraction").curve(series, budgets, setting)
    arms = {"from scratch": arms.pop("from scratch, 1", series["from scratch"] | {setting: 1})} | arms
    found = computed(file, arms, 1, 1, "pretrain.training.steps=2")
    monkeypatch.setattr(sys, "argv", ["medssl", "report", found.folder.name, "--figures", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert (tmp_path / f"{file}.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / f"{file}.svg").read_text()
    assert all(f"<!-- {word} -->" in drawn for word in (axis, "from scratch", "simsiam", "byol"))
    store = catalogue.open_store("tiny", say=print)
    patients = catalogue.split(store, found.split).labelled
    slices = sum(volume.slices for volume in store.volumes if volume.patient in patients)
    most = len(patients) if file == "labelled" else slices
    assert f"<!-- {most} -->" in drawn


# --- several sweeps ---


def test_sweeps_of_one_contract_are_one_ranking_and_a_shared_arm_counts_once(here):
    arms = {"from scratch": ARMS["from scratch"], "wide": {"pretrain.iou": (0.5, 0.9)}, "new": {"pretrain.iou": None}}
    other = computed("other", arms, 1, 1)
    names = [here.folder.name, other.folder.name]
    (board,) = answers.boards(names, "dice", 0.01).values()
    labels = {row.arm for row in board.rows}
    assert labels == {"from scratch", SCRIPT, ODD, "new", f"{names[0]}: wide", f"{names[1]}: wide"}
    (alone,) = answers.boards(names[:1], "dice", 0.01).values()
    scratch, same = (next(row for row in each.rows if row.arm == "from scratch") for each in (board, alone))
    assert scratch.scores == same.scores
    assert "`from scratch` is the same in 2 sweeps and counts once." in board.notes


def test_sweeps_of_different_contracts_are_never_one_ranking(here):
    other = computed("elsewhere", {"from scratch": ARMS["from scratch"]}, 1, 1, "data.split=seed-1")
    names = [here.folder.name, other.folder.name]
    assert len(answers.boards(names, "dice", 0.01)) == 2
    for output in ("table", "md", "paper", "html"):
        text = answers.answer(names, output, "dice")
        assert "2 rankings and not one" in text
        assert all(name in text for name in names)
    lines = answers.answer(names, "csv", "dice").splitlines()
    assert lines[0].startswith("title,arm,")
    assert len(lines) == 1 + 4 + 1
    boards = json.loads(answers.answer(names, "json", "dice"))
    assert [len(board["rows"]) for board in boards] == [4, 1]


def test_classes_are_means_over_the_runs_of_an_arm(here):
    from medssl.platform import ledger

    site = Site.here()
    found = answers.scored(site, here.folder, "dice")
    rows = [(found.owners[stage][0], row) for stage in found.owners for row in ledger.scores(site.runs, stage)]
    table = answers.by_class(site, found, "dice")
    for name, arms in table.items():
        for arm, patients in arms.items():
            for patient, value in patients.items():
                hits = [
                    row.value
                    for whose, row in rows
                    if (whose, row.class_name, row.patient) == (arm, name, patient)
                    and row.metric == "dice" and row.part == "test" and math.isfinite(row.value)
                ]  # fmt: skip
                assert value == pytest.approx(np.mean(hits))
