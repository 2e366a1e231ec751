"""What a user types: every command has help, and every bad input ends in one sentence and the right exit code."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medssl import cli
from medssl.platform import find

README = (find.ROOT / "README.md").read_text()
COMMANDS = [
    "doctor", "methods", "data list", "data prepare", "data check", "data split", "data card", "data download", "data show",
    "pretrain", "finetune", "evaluate", "predict", "export", "sweep", "status", "stop", "leaderboard", "report", "bench",
]  # fmt: skip
Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture
def typed(monkeypatch, capsys, tmp_path) -> Typed:
    """Types a command; gives exit code, output and errors. Data and runs lie in tmp_path."""
    monkeypatch.setenv("MEDSSL_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("MEDSSL_RUNS", str(tmp_path / "runs"))

    def type_(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["medssl", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return type_


def decathlon(root: Path, patients: int = 4, classes: tuple[str, ...] = ("background", "blob")) -> Path:
    """A small labelled data set: a bright ellipsoid per volume."""
    rng = np.random.default_rng(0)
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (24, 20, 6)), indexing="ij"))
    for number in range(patients):
        radius = 0.4 + 0.1 * number
        label = ((grid**2).sum(0) < radius**2).astype(np.uint8)
        image = (label * 100 + rng.normal(0, 10, label.shape)).astype(np.float32)
        for folder, array in (("imagesTr", image), ("labelsTr", label)):
            nibabel.Nifti1Image(array, np.diag([1.0, 1, 2, 1])).to_filename(root / folder / f"case_{number}.nii.gz")
    labels = {str(number): name for number, name in enumerate(classes)}
    facts = {"name": "blobs", "modality": {"0": "MRI"}, "labels": labels, "tensorImageSize": "3D"}
    (root / "dataset.json").write_text(json.dumps(facts))
    return root


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    nifti = nibabel.load(path)
    nibabel.Nifti1Image(change(np.asarray(nifti.dataobj).copy()), nifti.affine).to_filename(path)


def with_nan(array: np.ndarray) -> np.ndarray:
    array[0, 0, 0] = np.nan
    return array


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


IMAGE, LABEL = "imagesTr/case_1.nii.gz", "labelsTr/case_1.nii.gz"
BROKEN = {
    "a missing label": (lambda root: (root / LABEL).unlink(), "case_1", "label"),
    "a label of another shape": (lambda root: rewrite(root / LABEL, lambda a: a[:-1]), LABEL, "shape|24|23"),
    "a NaN voxel": (lambda root: rewrite(root / IMAGE, with_nan), IMAGE, "NaN|finite"),
    "4D where 3D is meant": (lambda root: rewrite(root / IMAGE, lambda a: np.stack([a, a], -1)), IMAGE, "4D"),
    "an unknown class id": (lambda root: rewrite(root / LABEL, lambda a: a * 7), LABEL, "7"),
    "a truncated gzip": (lambda root: truncate(root / IMAGE), IMAGE, "truncated|cut|gzip|end"),
    "a file that is no NIfTI": (lambda root: (root / IMAGE).write_bytes(gzip.compress(b"hello")), IMAGE, "NIfTI|read"),
    "an empty folder": (lambda root: [shutil.rmtree(root / f) for f in ("imagesTr", "labelsTr")], "", "imagesTr|volume"),
    "a truncated dataset.json": (lambda root: truncate(root / "dataset.json"), "dataset.json", "JSON"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_scan_is_refused_in_one_sentence_and_nothing_counts_as_prepared(typed, tmp_path, what):
    damage, file, message = BROKEN[what]
    root = decathlon(tmp_path / "blobs")
    damage(root)
    code, _, error = typed("data", "prepare", root)
    assert code in (1, 2)
    *_, last = error.splitlines()  # before it, how far the preparation was
    assert last.startswith("error: ")
    assert error.count("error: ") == 1, error
    assert file in error
    assert any(word in error for word in message.split("|")), error
    assert not (tmp_path / "data" / "blobs" / "manifest.json").exists()
    code, out, error = typed("data", "check", root)
    assert code in (1, 2)
    assert Path(file).name in out + error


def test_a_whole_data_set_is_prepared_checked_shown_and_listed(typed, tmp_path):
    root = decathlon(tmp_path / "blobs")
    code, out, _ = typed("data", "prepare", root)
    assert (code, "split seed-0: 2 train (2 labelled), 1 val, 1 test" in out) == (0, True), out
    assert typed("data", "check", root)[:2] == (0, "no problem found\n")
    code, out, _ = typed("data", "show", root, "--out", tmp_path / "slices.png")
    assert code == 0
    assert (tmp_path / "slices.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = typed("data", "card", root, "--out", tmp_path / "card.html")
    assert (code, "Sample slices" in (tmp_path / "card.html").read_text()) == (0, True)
    code, out, _ = typed("data", "list", "--json")
    assert json.loads(out)["prepared"]["blobs"]["volumes"] == 4


def test_check_tells_errors_from_warnings_and_its_exit_code_follows_the_errors(typed, tmp_path):
    root = decathlon(tmp_path / "blobs")
    rewrite(root / LABEL, np.zeros_like)
    code, out, error = typed("data", "check", root, "--workers", 1)
    assert (code, "warning: " in out, "its label marks no class" in out) == (0, True, True)
    assert "checking blobs: 4 of 4 volumes" in error
    rewrite(root / IMAGE, with_nan)
    code, out, _ = typed("data", "check", root, "--json", "--workers", 1)
    assert code == 1
    said = {key: [each["kind"] for each in value] for key, value in json.loads(out).items() if key in ("errors", "warnings")}
    assert said == {"errors": ["image"], "warnings": ["empty label"]}


def test_a_split_is_drawn_by_its_name_and_trained_on(typed, tmp_path):
    root = decathlon(tmp_path / "blobs")
    code, out, _ = typed("data", "split", root, "fold-1-of-4-seed-0", "--json")
    assert (code, len(json.loads(out)["test"])) == (0, 1)
    code, out, error = typed("finetune", "--data", root, "-o", "data.split=fold-1-of-4-sed-0", *TINY)
    assert (code, "did you mean fold-1-of-4-seed-0?" in error) == (2, True), error
    assert "fold-I-of-K-seed-N" in typed("data", "split", "--help")[1]


def test_another_preset_is_refused_where_one_lies_already(typed, tmp_path):
    root = decathlon(tmp_path / "blobs")
    assert typed("data", "prepare", root)[0] == 0
    code, _, error = typed("data", "prepare", root, "-o", "pad=64")
    assert (code, "--overwrite" in error) == (2, True), error
    assert typed("data", "prepare", root, "-o", "pad=64", "--overwrite")[0] == 0


WRONG = {
    "a data set that is not open": (
        ("data", "download", "acdc"),
        "acdc has no open, direct source: get it at https://humanheart",
    ),
    "an unknown download": (("data", "download", "Task04_Hipocampus"), "did you mean Task04_Hippocampus?"),
    "an unknown method": (("pretrain", "simsaim"), "did you mean simsiam?"),
    "an unknown space": (("sweep", "iou-intervals"), "did you mean iou-interval?"),
    "an unknown key": (("pretrain", "simsiam", "-o", "pretrain.iuo=1"), "did you mean iou?"),
    "an unknown section": (("pretrain", "simsiam", "-o", "pretrian.iou=1"), "did you mean pretrain?"),
    "a wrong type": (("pretrain", "simsiam", "-o", "pretrain.training.lr=fast"), "pretrain.training.lr: "),
    "a value out of range": (("pretrain", "simsiam", "-o", "pretrain.training.batch=0"), "more than 0"),
    "an override without a value": (("pretrain", "simsiam", "-o", "seed"), "expected key=value"),
    "an unknown data set": (("sweep", "iou-interval", "--data", "phantoom", "--dry-run"), "did you mean phantom?"),
    "an unknown bench": (("bench", "pears"), "did you mean pairs?"),
    "a time without a unit": (("sweep", "iou-interval", "--time-budget", "10"), "30m"),
    "a run that is not there": (("evaluate", "segment-123"), "no run"),
    "a sweep that is not there": (("leaderboard",), "no sweep yet"),
    "a report of a sweep that is not there": (("report",), "no sweep yet"),
    "an unknown format": (("leaderboard", "--format", "htm"), "did you mean html?"),
    "an unknown command": (("sweeep",), "No such command"),
    "a preset's unknown key": (("data", "prepare", ".", "-o", "spacing=1"), "dataset.json|did you mean"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_usage_is_exit_code_2_and_names_what_was_meant(typed, what):
    words, message = WRONG[what]
    code, _, error = typed(*words)
    assert code == 2
    assert any(part in error for part in message.split("|")), error


def test_a_store_without_a_manifest_is_not_prepared(typed, tmp_path):
    root = decathlon(tmp_path / "blobs")
    assert typed("data", "prepare", root)[0] == 0
    (tmp_path / "data" / "blobs" / "manifest.json").unlink()
    shutil.move(root, tmp_path / "elsewhere")
    code, _, error = typed("data", "show", "blobs", "--out", tmp_path / "slices.png")
    assert code == 2
    assert "blobs" in error


def test_an_interval_out_of_reach_names_the_reachable_range(typed, tmp_path):
    root = decathlon(tmp_path / "blobs")
    settings = ("-o", "pretrain.side=16", "-o", "pretrain.iou=[0, 0]")
    code, _, error = typed("pretrain", "simsiam", "--data", root, *settings)
    assert code == 2
    assert "overlap by an IoU between 0.231 and 1" in error, error  # 8 x 12 shared pixels of 16 x 16


def test_a_patient_in_two_parts_is_refused(typed, tmp_path):
    root = decathlon(tmp_path / "blobs")
    assert typed("data", "prepare", root)[0] == 0
    file = tmp_path / "data" / "blobs" / "splits" / "seed-0.json"
    split = json.loads(file.read_text())
    split["test"] = split["train"][:1]
    file.write_text(json.dumps(split))
    code, _, error = typed("pretrain", "simsiam", "--data", root)
    assert (code, split["test"][0] in error) == (2, True), error


TINY = [
    "-o", "network.width=8", "-o", "network.levels=2", "-o", "pretrain.side=8", "-o", "pretrain.d=8",
    "-o", "pretrain.bottleneck=4", "-o", "pretrain.training.steps=3", "-o", "pretrain.training.batch=4",
    "-o", "finetune.side=16", "-o", "finetune.training.steps=200", "-o", "finetune.training.batch=4",
    "-o", "finetune.training.evaluations=2", "-o", "finetune.training.lr=0.01",
]  # fmt: skip


def test_pretrain_finetune_evaluate_predict(typed, tmp_path):
    root = decathlon(tmp_path / "blobs")
    code, out, error = typed("pretrain", "simsiam", "--data", root, *TINY)
    assert code == 0, error
    pretrained = out.splitlines()[-1].partition(":")[0]
    code, out, error = typed("finetune", "--from", pretrained, "--data", root, *TINY)
    assert code == 0, error
    run = out.splitlines()[-1].partition(":")[0]
    code, out, error = typed("evaluate", run, "--json", "--pictures", tmp_path)
    assert code == 0, error
    summary = json.loads(out)
    assert summary["test"]["mean"]["dice"] > 0.8, "a bright blob is easily found"
    assert len(list(tmp_path.glob("*.png"))) == 2
    source = root / "imagesTr" / "case_3.nii.gz"
    code, out, error = typed("predict", run, source, "--out", tmp_path / "out")
    assert code == 0, error
    predicted, label = nibabel.load(tmp_path / "out" / "case_3.nii.gz"), nibabel.load(root / "labelsTr" / "case_3.nii.gz")
    assert np.allclose(predicted.affine, nibabel.load(source).affine)
    assert (np.asarray(predicted.dataobj) == np.asarray(label.dataobj)).mean() > 0.95
    code, _, error = typed("finetune", "--from", run, "--data", root, *TINY)
    assert (code, "not a finished pretraining; of a fine-tuning, give its file" in error, "best.pt" in error) == (2, True, True)


def test_the_seed_is_the_options_else_the_files_else_0(typed, tmp_path):
    root, runs = decathlon(tmp_path / "blobs"), Path(os.environ["MEDSSL_RUNS"])
    (tmp_path / "seven.yaml").write_text("seed: 7\n")
    ways = {"": 0, "-o seed=3": 3, f"-p {tmp_path}/seven.yaml": 7, "--seed 5 -o seed=3": 5}
    for words, seed in ways.items():
        code, out, error = typed("pretrain", "simsiam", "--data", root, *TINY, *words.split())
        assert code == 0, error
        run = json.loads((runs / "stages" / out.splitlines()[-1].partition(":")[0] / "run.json").read_text())
        assert (run["config"]["seed"], run["seed"]) == (seed, 1000 * seed), words


def test_a_checkpoint_of_another_architecture_is_refused(typed, tmp_path):
    root = decathlon(tmp_path / "blobs")
    code, out, error = typed("pretrain", "simsiam", "--data", root, *TINY)
    assert code == 0, error
    stage = tmp_path / "runs" / "stages" / out.splitlines()[-1].partition(":")[0]
    (stage / "done.json").unlink()
    other = ["-o", "network.width=4"]
    code, out, error = typed("pretrain", "simsiam", "--data", root, *TINY, *other)
    assert code == 0, error
    another = tmp_path / "runs" / "stages" / out.splitlines()[-1].partition(":")[0]
    shutil.copy(another / "encoder.pt", stage / "encoder.pt")
    (stage / "done.json").write_text((another / "done.json").read_text())
    code, _, error = typed("finetune", "--from", stage.name, "--data", root, *TINY)
    assert code == 1
    assert "shape" in error, error


def test_a_full_disk_is_said_and_leaves_nothing_half_written(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        root = decathlon(tmp_path / "blobs", patients=12)
        command = [sys.executable, "-m", "medssl.cli", "data", "prepare", root]
        where = os.environ | {"MEDSSL_DATA": str(small)}
        done = subprocess.run(command, env=where, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "no space left" in done.stderr
        assert not list(small.rglob("manifest.json"))
        assert not list(small.rglob("part-*.parquet"))
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_is_in_the_readme(typed, command):
    code, out, _ = typed(*command.split(), "--help")
    assert code == 0
    assert "Usage" in out
    assert f"medssl {command}" in README


def test_doctor_tells_versions_devices_and_what_the_processor_executes(typed):
    code, out, _ = typed("doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["processor"]["fp32"] == "works"
    assert {"torch", "ray", "optuna"} <= found["versions"].keys()


SHORT = [
    "-o", "network.width=8", "-o", "network.levels=2", "-o", "pretrain.side=8", "-o", "pretrain.d=8",
    "-o", "pretrain.training.steps=4", "-o", "pretrain.training.batch=4", "-o", "finetune.side=16",
    "-o", "finetune.training.steps=3", "-o", "finetune.training.batch=4", "-o", "finetune.training.evaluations=1",
]  # fmt: skip


def stage_of(out: str) -> str:
    return out.splitlines()[-1].partition(":")[0]


def test_pretraining_upon_pretraining_upon_a_file_is_chained_and_recorded(typed, tmp_path):
    """A file, SimSiam on A, BYOL on B, fine-tuning on B: each begins where the one before ended, and the card says so."""
    import torch

    from medssl.methods.networks import unet
    from medssl.platform import checkpoint

    for name in "ab":
        file = decathlon(tmp_path / name) / "dataset.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"name": name}))
    encoder = unet.UNet(3, 2, unet.Config(width=8, levels=2)).encoder  # of three channels, as of photographs
    torch.save(
        {"state_dict": {f"encoder.{key}": value for key, value in encoder.state_dict().items()}}, tmp_path / "photos.pth"
    )
    first = ("pretrain", "simsiam", "--from", tmp_path / "photos.pth", "--data", tmp_path / "a", *SHORT)
    code, out, error = typed(*first, "-o", "pretrain.bottleneck=4", "-o", "pretrain.training.lr=0")
    assert code == 2, "end_lr is above lr"
    still = ("-o", "pretrain.training.lr=0.0000000001", "-o", "pretrain.training.end_lr=0", "-o", "pretrain.bottleneck=4")
    code, out, error = typed(*first, *still)
    assert code == 0, error
    assert out.rstrip().endswith("photos (whole network) -> simsiam:a@4")
    stages = tmp_path / "runs" / "stages"
    simsiam = stages / stage_of(out)
    kept = checkpoint.load(simsiam / "encoder.pt")["encoder"]
    for key, value in encoder.state_dict().items():
        begun = value.sum(1, keepdim=True) if key == "blocks.0.0.weight" else value
        assert torch.allclose(kept[key], begun, atol=1e-5), "a pretraining that hardly learns leaves what it was given"

    code, out, error = typed("pretrain", "byol", "--from", simsiam.name[:10], "--data", tmp_path / "b", *SHORT)
    assert code == 0, error
    assert out.rstrip().endswith("photos (whole network) -> simsiam:a@4 -> byol:b@4")
    byol = stages / stage_of(out)
    assert json.loads((byol / "run.json").read_text())["parent"] == simsiam.name
    card = checkpoint.load(byol / "encoder.pt")["card"]
    assert card["chain"] == "photos (whole network) -> simsiam:a@4 -> byol:b@4"
    assert card["start"] == simsiam.name
    code, out, error = typed("pretrain", "byol", "--data", tmp_path / "b", *SHORT)
    assert (code, stage_of(out) != byol.name) == (0, True), "another beginning is another stage"

    code, out, error = typed("finetune", "--from", byol.name, "--data", tmp_path / "b", *SHORT)
    assert code == 0, error
    tuned = stages / stage_of(out)
    assert checkpoint.load(tuned / "best.pt")["chain"].endswith("byol:b@4 -> segment:b")
    code, out, error = typed("finetune", "--from", byol / "encoder.pt", "--data", tmp_path / "b", *SHORT)
    assert (code, stage_of(out)) == (0, tuned.name), "the pretraining by another name"
    code, out, error = typed("pretrain", "byol", "--from", tuned / "best.pt", "--data", tmp_path / "b", *SHORT)
    assert code == 0, error
    assert out.rstrip().endswith("byol:b@4 -> segment:b -> byol:b@4"), "supervised weights of our own"


def test_a_snapshot_is_kept_and_fine_tuned_from(typed, tmp_path):
    from medssl.platform import checkpoint

    root = decathlon(tmp_path / "blobs")
    words = ("simsiam", "--data", root, *SHORT, "-o", "pretrain.bottleneck=4")
    code, out, error = typed("pretrain", *words, "-o", "pretrain.training.snapshots=[0.5, 3]")
    assert code == 0, error
    folder = tmp_path / "runs" / "stages" / stage_of(out)
    assert sorted(file.name for file in folder.glob("encoder*")) == ["encoder.pt", "encoder@2.pt", "encoder@3.pt"]
    early, end = (checkpoint.load(folder / name) for name in ("encoder@2.pt", "encoder.pt"))
    assert early["card"]["chain"] == "simsiam:blobs@2"
    assert checkpoint.digest(early["encoder"]) != checkpoint.digest(end["encoder"])
    tuned = {}
    for step in ("0.5", "2", "3", "4", "null"):
        code, out, error = typed("finetune", "--from", folder.name, "--data", root, *SHORT, "-o", f"start.step={step}")
        assert code == 0, error
        tuned[step] = stage_of(out)
    assert tuned["0.5"] == tuned["2"]
    assert tuned["4"] == tuned["null"]
    assert len(set(tuned.values())) == 3
    best = checkpoint.load(tmp_path / "runs" / "stages" / tuned["2"] / "best.pt")
    assert best["chain"] == "simsiam:blobs@2 -> segment:blobs"
    code, _, error = typed("finetune", "--from", folder.name, "--data", root, *SHORT, "-o", "start.step=1")
    assert (code, "no snapshot at step 1 (kept: 2, 3, and its end)" in error) == (2, True), error
    code, out, error = typed("pretrain", *words, "--from", folder / "encoder@2.pt")
    assert code == 0, error
    assert out.rstrip().endswith("simsiam:blobs@2 -> simsiam:blobs@4")


def test_weights_that_do_not_fit_are_refused_and_part_of_them_taken_when_asked_for(typed, tmp_path):
    import torch

    from medssl.methods.networks import unet

    root = decathlon(tmp_path / "blobs")
    deeper = unet.UNet(1, 2, unet.Config(width=8, levels=3)).encoder.state_dict()
    torch.save(deeper, tmp_path / "deeper.pth")
    words = ("finetune", "--from", tmp_path / "deeper.pth", "--data", root, *SHORT)
    code, _, error = typed(*words)
    assert (code, "unexpected (blocks.2.0.weight" in error, "start.partial=true" in error) == (1, True, True), error
    code, _, error = typed(*words, "-o", "start.partial=true")
    assert code == 0, error
    code, _, error = typed("finetune", "--from", tmp_path / "absent.pth", "--data", root)
    assert (code, "absent.pth: no such file" in error) == (2, True)


def test_fine_tuning_on_a_few_slices_records_them(typed, tmp_path):
    root = decathlon(tmp_path / "blobs")
    code, out, error = typed("finetune", "--data", root, *SHORT, "-o", "data.labelled_slices=3")
    assert code == 0, error
    run = json.loads((tmp_path / "runs" / "stages" / stage_of(out) / "run.json").read_text())
    assert len(run["labelled_slices"]) == 3
    code, _, error = typed("finetune", "--data", root, *SHORT, "-o", "data.labelled_slices=999")
    assert (code, "data.labelled_slices=999: the labelled training patients have" in error) == (2, True)


def test_a_space_that_needs_weights_says_so_and_shows_its_four_arms_when_given_some(typed, tmp_path):
    root = decathlon(tmp_path / "blobs")
    words = ("sweep", "initialisation", "--data", root, "--dry-run", *SHORT)
    code, _, error = typed(*words)
    assert (code, "add -o start.weights=" in error) == (2, True), error
    (tmp_path / "some.pth").write_bytes(b"not looked into by a plan")
    code, out, error = typed(*words, "-o", f"start.weights={tmp_path / 'some.pth'}")
    assert code == 0, error
    assert "4 pretrainings and 16 fine-tunings" in out
    assert "initial encoder: given weights, hierarchical" in out


def test_budgets_beyond_the_data_and_arms_over_again_are_left_out_and_said(typed, tmp_path):
    root = decathlon(tmp_path / "blobs", patients=6)
    code, out, error = typed("sweep", "label-fraction", "--data", root, "--dry-run", *SHORT)
    assert code == 0, error
    assert 'arm "byol, 8" is left out: data.labelled=8: split seed-0 has 4' in error, error
    assert 'arm "simsiam, all" is left out: on these data it is the same as "simsiam, 4"' in error
    assert "4 pretrainings and 36 fine-tunings" in out
    code, _, error = typed("sweep", "label-fraction", "--data", root, "--dry-run", "-o", "data.labelled=2")
    assert (code, "that is what label-fraction varies" in error) == (2, True)
    code, _, error = typed("sweep", "pretraining", "--data", root, "--dry-run", "-o", "data.labelled=9")
    assert (code, "data.labelled=9" in error) == (2, True), "what was asked for by hand is refused, not left out"


HOOKED = [
    "--hook", "mean-teacher", "--hook", "consistency", "-o", "hooks.mean_teacher.weight=5", "-o", "unlabelled.batch=6",
    "-o", "data.labelled=1", "-o", "network.norm=batch",
]  # fmt: skip


class Killed(BaseException):
    """What nothing catches."""


@pytest.mark.slow
def test_two_hooks_fine_tune_on_few_labels_and_a_kill_in_between_changes_nothing(typed, tmp_path, monkeypatch):
    from medssl.platform import checkpoint

    root, runs = decathlon(tmp_path / "blobs", patients=6), (tmp_path / "runs", tmp_path / "other")
    words = ["finetune", "--data", root, *TINY, *HOOKED, "-o", "resources.checkpoint_seconds=0"]
    assert typed("data", "prepare", root)[0] == 0
    code, out, error = typed(*words)
    assert code == 0, error
    run = stage_of(out)

    save, saved = checkpoint.save, []

    def dying(file: Path, state: checkpoint.State) -> None:
        save(file, state)
        if file.name == "checkpoint.pt" and 0 < state["step"] < 200:
            saved.append(state["step"])
            raise Killed

    monkeypatch.setenv("MEDSSL_RUNS", str(runs[1]))
    monkeypatch.setattr(checkpoint, "save", dying)
    with pytest.raises(Killed):
        typed(*words)
    monkeypatch.setattr(checkpoint, "save", save)
    code, out, error = typed(*words)
    assert code == 0, error
    assert stage_of(out) == run
    assert saved

    kept = [checkpoint.load(folder / "stages" / run / "best.pt") for folder in runs]
    assert checkpoint.digest(kept[0]) == checkpoint.digest(kept[1])
    done = [json.loads((folder / "stages" / run / "done.json").read_text()) for folder in runs]
    assert done[0]["losses"].keys() == {"dice", "cross_entropy", "mean_teacher/mse", "consistency/mse"}
    assert (done[0]["validation"], done[0]["test"]) == (done[1]["validation"], done[1]["test"])
    assert done[0]["test"] > 0.8, "a bright blob is easily found"

    config = json.loads((runs[0] / "stages" / run / "run.json").read_text())["config"]
    assert config["hooks"]["mean_teacher"]["weight"] == 5
    assert config["unlabelled"]["batch"] == 6
    code, out, error = typed("evaluate", run, "--pictures", tmp_path)  # a teacher's weights are a network's
    assert code == 0, error


def test_a_cine_is_contrasted_by_its_named_phases_and_scored_where_it_is_labelled(typed, tmp_path):
    from medssl.platform import ledger
    from medssl.tests.layouts import acdc

    acdc.write(tmp_path / "acdc")
    assert typed("data", "prepare", tmp_path / "acdc", "--preset", "mr")[0] == 0
    parts = {"train": ["patient001", "patient021"], "val": ["patient002"], "test": ["patient101"]}
    (tmp_path / "split.json").write_text(json.dumps(parts))
    words = ["--data", "acdc", *SHORT, "-o", f"data.split={tmp_path / 'split.json'}", "-o", "unlabelled.batch=16"]
    asked = ["-o", "hook.self-paced.labels=[cycle,partition]", "-o", "finetune.side=8"]
    code, out, error = typed("finetune", *words, "--labelled", 1, "--hook", "self-paced", *asked)
    assert code == 0, error
    last = json.loads((tmp_path / "runs" / "stages" / stage_of(out) / "log.txt").read_text().splitlines()[-2])
    assert last["self_paced/cycle/known"] == 0.5, "of four frames of one patient two are named"
    assert last["loss/self_paced/cycle"] > 0
    scored = {(row.part, row.volume) for row in ledger.scores(tmp_path / "runs", stage_of(out))}
    assert scored == {("val", f"patient002_frame0{n}") for n in (1, 3)} | {("test", f"patient101_frame0{n}") for n in (1, 3)}

    root = decathlon(tmp_path / "blobs")
    assert typed("data", "prepare", root)[0] == 0
    code, _, error = typed(
        "finetune", "--data", root, *SHORT, "--labelled", 1, "--hook", "infonce", "-o", "hook.infonce.labels=[cycle]"
    )
    assert (code, '"cycle" needs volumes of two phases, and the training volumes of blobs name none' in error) == (2, True), (
        error
    )


def test_what_predicts_is_the_teacher(typed, tmp_path):
    """One that keeps half of each weight, beside a student that is trained as if it were not there."""
    import torch

    from medssl.platform import checkpoint

    root = decathlon(tmp_path / "blobs", patients=6)
    assert typed("data", "prepare", root)[0] == 0
    words = ["finetune", "--data", root, *SHORT, "--labelled", 1, "-o", "finetune.training.steps=1"]
    halved = ["--hook", "mean-teacher", "-o", "hook.mean-teacher.decay=0.5", "-o", "hook.mean-teacher.weight=0"]
    runs = []
    for hook in ([], halved):
        code, out, error = typed(*words, *hook)
        assert code == 0, error
        runs.append(tmp_path / "runs" / "stages" / stage_of(out))
    student, teacher = (checkpoint.load(run / "best.pt")["network"] for run in runs)
    assert student.keys() == teacher.keys()
    assert all(torch.equal(teacher[key], student[key] / 2) for key in student)

    code, _, error = typed("predict", runs[1].name, root / "imagesTr" / "case_0.nii.gz", "--out", tmp_path / "out")
    assert code == 0, error
    predicted = nibabel.load(tmp_path / "out" / "case_0.nii.gz").get_fdata()
    code, _, error = typed("predict", runs[0].name, root / "imagesTr" / "case_0.nii.gz", "--out", tmp_path / "other")
    assert code == 0, error
    assert (predicted != nibabel.load(tmp_path / "other" / "case_0.nii.gz").get_fdata()).any()


def test_a_recipe_pretrains_whatever_its_fine_tuning_needs(typed, tmp_path):
    """No phase is named here, and no patient is left for the hooks that follow later."""
    root = decathlon(tmp_path / "blobs")
    assert typed("data", "prepare", root)[0] == 0
    short = {"side": 16, "training.steps": 2, "training.batch": 6}
    small = [f"{part}.{key}={value}" for part in ("pretrain", "further") for key, value in short.items()]
    small += ["network.width=4", "network.levels=3", "further.grid=4", "pretrain.labels=[partition]", "pretrain.shares=[1]"]
    words = [word for setting in small for word in ("-o", setting)]
    code, out, error = typed("pretrain", "infonce", "-p", "self-paced-acdc", "--data", root, *words)
    assert code == 0, error
    assert "infonce:blobs@2 -> dense_infonce:blobs@2" in out
    code, _, error = typed(
        "pretrain", "infonce", "-p", "self-paced-acdc", "--data", root, *words, "-o", "hook.self-paced.wieght=1"
    )
    assert (code, "did you mean weight?" in error) == (2, True), "settings of hooks are checked all the same"


def test_a_hook_without_unlabelled_patients_is_refused(typed, tmp_path):
    root = decathlon(tmp_path / "blobs")
    code, _, error = typed("finetune", "--data", root, *SHORT, "--hook", "entropy-minimisation")
    assert code == 2
    assert "beyond data.labelled" in error
    code, _, error = typed("finetune", "--data", root, *SHORT, "--hook", "entropy-minimization")
    assert code == 2
    assert "did you mean entropy_minimisation?" in error


def test_a_hook_that_learns_from_labelled_slices_only_runs_without_others(typed, tmp_path):
    root, maps = decathlon(tmp_path / "blobs"), "['encoder.blocks.0', 'encoder.blocks.1']"
    small = {"encoder": maps, "encoder_samples": "[16, 8]", "decoder": "['decoder.blocks.0']", "decoder_samples": "[8]"}
    small |= {"cross": maps, "cross_samples": 8, "cross_stride": 4, "sampling": "random"}
    words = [word for key, value in small.items() for word in ("-o", f"hooks.pdcr.{key}={value}")]
    assert typed("data", "prepare", root)[0] == 0
    code, out, error = typed("finetune", "--data", root, *SHORT, "--hook", "pdcr", *words)
    assert code == 0, error
    folder = tmp_path / "runs" / "stages" / stage_of(out)
    losses = json.loads((folder / "done.json").read_text())["losses"]
    assert losses.keys() == {"dice", "cross_entropy", "pdcr/encoder", "pdcr/decoder", "pdcr/cross"}
    assert not json.loads((folder / "run.json").read_text())["config"]["unlabelled"]


def test_hooks_typed_as_the_manual_types_them_run_in_one_line(typed, tmp_path):
    root = decathlon(tmp_path / "blobs", patients=6)
    assert typed("data", "prepare", root)[0] == 0
    hooks = ["--hook", "mean-teacher", "--hook", "consistency", "--hook", "infonce"]
    chosen = ["-o", "hook.infonce.layer=decoder", "-o", "hook.mean-teacher.weight=5", "-o", "hooks.infonce.d=8"]
    code, out, error = typed("finetune", "--data", root, *SHORT, "--labelled", "1", *hooks, *chosen)
    assert code == 0, error
    folder = tmp_path / "runs" / "stages" / stage_of(out)
    config = json.loads((folder / "run.json").read_text())["config"]
    assert config["data"]["labelled"] == 1
    assert config["hooks"]["infonce"]["layer"] == "decoder"
    assert config["hooks"]["mean_teacher"]["weight"] == 5
    losses = json.loads((folder / "done.json").read_text())["losses"]
    assert losses.keys() == {"dice", "cross_entropy", "mean_teacher/mse", "consistency/mse", "infonce/partition"}
    assert f"{folder.name} begins: " in (folder / "messages.log").read_text()
    code, _, error = typed("finetune", "--data", root, *SHORT, "--labelled", "1", *hooks, "-o", "hook.infonce.layre=decoder")
    assert (code, "did you mean layer?" in error) == (2, True)
