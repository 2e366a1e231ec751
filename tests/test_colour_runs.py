"""The paper's system from end to end on colour images: DeepLabV3+ with UAFS, trained with PDCR, predicts and travels."""

import json
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from medssl.platform import catalogue, config, export, plan, single, stages
from medssl.platform.errors import UsageError
from medssl.platform.store import Store

pytestmark = pytest.mark.slow  # the fixture trains a DeepLab
TINY = ["network.name=deeplab", "network.width=4", "finetune.side=32", "finetune.crops=2", "finetune.training.batch=2"]
TINY += ["finetune.training.steps=2", "finetune.training.evaluations=1", "finetune.dice=0", "resources.gpus=0"]
BOTH = ["hooks.pdcr={}", "finetune.uafs={}"]


def lesion(generator: np.random.Generator, sides: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A brown spot on skin, (*sides, 3) of 0 to 255, and its mask: what a dermoscopic image is to a network."""
    y, x = np.mgrid[: sides[0], : sides[1]] / max(sides)
    centre, axes = generator.uniform(0.3, 0.6, 2) * np.divide(sides, max(sides)), generator.uniform(0.1, 0.25, 2)
    mask = ((y - centre[0]) / axes[0]) ** 2 + ((x - centre[1]) / axes[1]) ** 2 < 1
    colour = np.where(mask[..., None], (110, 70, 60), (220, 180, 160)) + generator.normal(0, 12, (*sides, 3))
    return colour.clip(0, 255).astype(np.float32), mask.astype(np.uint8)


def scans(root: Path, patients: int, sides: tuple[int, int]) -> Path:
    """Images of two slices in the form of the Decathlon, three channels last."""
    generator = np.random.default_rng(0)
    for part in ("imagesTr", "labelsTr"):
        (root / part).mkdir(parents=True)
    for patient in range(patients):
        drawn = [lesion(generator, sides) for _ in range(2)]
        for part, which in (("imagesTr", 0), ("labelsTr", 1)):
            volume = np.stack([each[which] for each in drawn], 2)
            nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), root / part / f"skin_{patient}.nii.gz")
    said = {"name": "skin", "labels": {"0": "background", "1": "lesion"}, "modality": {"0": "red", "1": "green", "2": "blue"}}
    (root / "dataset.json").write_text(json.dumps(said))
    return root


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder of skin, and one run with PDCR and UAFS on it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MEDSSL_DATA", "MEDSSL_RUNS"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        source = scans(tmp_path_factory.mktemp("scans") / "skin", 5, (40, 48))
        catalogue.prepare(str(source), workers=1, say=lambda text: None)
        told = single.finetune(None, str(source), 0, [], [*TINY, *BOTH], say=lambda text: None)
        yield source, told.partition(":")[0]


def test_a_run_says_where_uafs_stands_and_is_rebuilt_to_predict_and_score(site, tmp_path):
    source, run = site
    folder, experiment, store = single._finetuned(run)
    assert store.channels == 3
    assert json.loads((folder / "run.json").read_text())["config"]["finetune"]["uafs"]["outcomes"] == 2
    assert any(".gate." in key for key in single._trained(folder, experiment, store).state_dict())
    assert set(single.evaluate_run(run)["test"]["by_class"]["dice"]) == {"lesion"}
    (answer,) = single.predict(run, [source / "imagesTr" / "skin_0.nii.gz"], tmp_path, say=lambda text: None)
    assert nibabel.load(answer).shape == (40, 48, 2)


def test_a_run_with_uafs_leaves_as_safetensors_and_in_no_other_form(site, tmp_path):
    pytest.importorskip("safetensors")
    _, run = site
    for target in ("monai", "timm", "nnunet"):
        with pytest.raises(UsageError, match="no library has UAFS; --to safetensors"):
            export.export(run, target, tmp_path / "x")
    _, *lines = export.export(run, "safetensors", tmp_path / "net.safetensors").splitlines()
    scope: dict = {}
    exec("\n".join(lines), scope)
    folder, experiment, store = single._finetuned(run)
    ours, x = single._trained(folder, experiment, store).eval(), torch.rand(1, 3, 40, 48)
    with torch.no_grad():
        assert torch.equal(scope["network"].eval()(x), ours(x))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("finetune.uafs.layers=[encoder.stemm1]", r'uafs: .* no module "encoder\.stemm1"; did you mean encoder\.stem1\?'),
        ("finetune.uafs.layer=[encoder.stem1]", r'unknown key "finetune\.uafs\.layer"; did you mean layers\?'),
        ("hooks.pdcr.encoder=[encoder.blok1]", r'pdcr: .* no module "encoder\.blok1"; did you mean encoder\.block1\?; usable'),
        ("finetune.uafs.layers=[]", r"finetune\.uafs: layers is \(\): expected names"),
    ],
)
def test_a_place_that_is_not_there_is_refused_before_anything_is_trained(site, given, message):
    with pytest.raises(UsageError, match=message):
        single.finetune(None, str(site[0]), 0, [], [*TINY, given], say=lambda text: None)


def test_uafs_decides_a_fine_tuning_and_without_it_nothing_is_said_of_it(site):
    _, experiment, store = single._finetuned(site[1])
    split = catalogue.split(store, experiment.data.split)

    def identity(uafs) -> str:
        tree = experiment.tree()
        tree["finetune"]["uafs"] = uafs
        return plan.chain("", 0, 1, config.build(tree), store, split).finetunings[0].id

    assert len({identity(None), identity({}), identity({"layers": ["decoder.low"]}), identity({"outcomes": 5})}) == 4
    assert "uafs" not in config.build({"finetune": {"name": "segment", "uafs": None}}).tree()["finetune"]


def test_uafs_is_inserted_after_given_weights_which_then_are_those_of_the_wrapped_modules(site):
    folder, experiment, _ = single._finetuned(site[1])
    store = Store.open(Path(json.loads((folder / "run.json").read_text())["store"]))
    split = catalogue.split(store, experiment.data.split)
    chain = plan.chain("", 0, 1, experiment, store, split)
    job = stages.Job(chain, chain.finetunings[0], stages.Work(None, store.root, split))
    plain, _ = stages._start(job, store)
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    after = stages.selective(plain, experiment).state_dict()
    theirs = {re.sub(r"\.module(?=\.)", "", key): value for key, value in after.items() if ".gate." not in key}
    assert theirs.keys() == before.keys()
    assert all(torch.equal(before[key], value) for key, value in theirs.items())
