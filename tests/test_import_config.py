"""The published code's YAML, written from its documented keys, becomes settings that build what it asked for."""

import pytest
import yaml

from medssl import cli
from medssl.methods import uafs
from medssl.methods.hooks.pdcr import PDCR
from medssl.methods.networks.deeplab import Config, DeepLabV3Plus
from medssl.platform import config
from medssl.platform.errors import UsageError
from medssl.platform.import_config import imported

README = """
epochs: 300
batch_size: 4
num_workers: 4
syncbn: True
mc: True
seed: 666
save_checkpoint: 20
criterions: {ce: 1, encoder_patchseries: 0.1, decoder_patchseries: 0.01, multi_layer_patchseries: 0.01}
class_weight: [1, 1]
loss_temperature: 1
model:
  mode: DeepLab_bcl_att2
  backbone: xception_bcl_att2
  output_stride: 16
  num_classes: 2
  input_channel: 3
  freeze_bn: False
  layer_sample: [128, 64, 32, 8, 8, 8, 8]
  loss_layerchoice: [1, 1, 1, 1, 1, 1, 1]
  sample_strategy: stride
  distance_measure: cosine
  fea_weight_choice: receptive_field
  bcl_layer_choice: [2, 3]
  bcl_multi_layer_choice: [2, 3]
  layer_sample_multilayer: [32, 32, 32, 32, 32]
  instance_dis: False
  patchnumber: 3
  patchsize: [5, 7, 9]
  similarityfirst_encoder: True
  similarityfirst_decoder: True
  similarityfirst_multi: True
  patchforeground_weight: [1, 1, 1]
  uncertainty_att_layerchoice: [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1]
dataset:
  mode: ISIC2016
  root_path: ./data/
  input_size: [512, 512, 3]
  preload: False
  aug: True
  mean: [0.485, 0.456, 0.406]
  std: [0.229, 0.224, 0.225]
  modality: 2D
data_aug:
  affine: {scale: [0.8, 1.2], translate: [0.1, 0.1], rotate: [-90, 90], shear: [-20, 20]}
  flip: [0.5, 0.5]
optm:
  mode: adam
  use_larc: False
  sgd: {base_lr: 0.1, final_lr: 1e-5, momentum: 0.9, wd: 1e-5}
  adam: {base_lr: 1e-3, final_lr: 1e-5, wd: 1e-5}
  larc: {trust_coefficient: 0.001, clip: False}
schd:
  mode: cos
  step: {milestone: [30, 50, 80], decay_rate: 0.1}
  exp: {gamma: 0.97}
  cos: {start_warmup: 0, warmup_epochs: 2}
test:
  start_test_epoch: 130
  test_intertest: 1
  rank_metric: [mIoU]
  metric_used: [mDice, mIoU, Acc]
  resize_interpolation: bilinear
  resize_option: resize_first
"""


def changed(folder, old: str = "", new: str = ""):
    assert old in README
    file = folder / "theirs.yaml"
    file.write_text(README.replace(old, new, 1))
    return file


def test_the_published_readme_becomes_the_papers_network_uafs_and_pdcr(tmp_path):
    settings, lost = imported(changed(tmp_path))
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(settings))
    found = config.build(config.read(tmp_path / "ours.yaml"))
    assert (found.seed, found.network.name, found.network.settings.backbone) == (666, "deeplab", "xception")
    assert (found.finetune.settings.dice, found.finetune.settings.cross_entropy, found.finetune.settings.side) == (0, 1, 512)
    training = found.finetune.training
    assert (training.epochs, training.batch, training.optimizer) == (300, 4, "adam")
    assert (training.lr, training.end_lr, training.weight_decay, training.warmup) == (1e-3, 1e-5, 1e-5, 2 / 300)
    assert found.finetune.uafs.layers == uafs.PAPER
    network = uafs.insert(DeepLabV3Plus(3, 2, Config(width=4)), found.finetune.uafs)
    hook = found.hooks[0].settings
    usual = PDCR(network, type(hook)())
    for key in ("encoder", "decoder", "cross", "encoder_weight", "decoder_weight", "cross_weight", "temperature", "patches"):
        assert getattr(hook, key) == getattr(usual.config, key), key
    assert (hook.encoder_samples, hook.decoder_samples, hook.cross_samples) == ((64, 32), (32, 8), 32)
    said = "\n".join(lost)
    for key in ("num_workers", "dataset.mode", "data_aug.affine.shear", "test.rank_metric", "weigh means here and sums there"):
        assert key in said
    assert "data_aug.flip" not in said


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("[1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1]", "[0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0]", {"uafs": ["pyramid.join"]}),
        ("[1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1]", "[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]", {"uafs": None}),
        ("bcl_layer_choice: [2, 3]", "bcl_layer_choice: [4]", {"encoder": ["encoder.block2"], "encoder_samples": [8]}),
        ("similarityfirst_encoder: True", "similarityfirst_encoder: False", {"average": "ratios", "patch_weights": [1, 1, 1]}),
        ("{ce: 1, encoder_patchseries: 0.1, decoder_patchseries: 0.01,", "{ce: 1,", {"encoder": [], "decoder": []}),
        ("loss_temperature: 1", "loss_temperature: 0.5", {"temperature": 0.5}),
    ],
)
def test_what_is_changed_there_is_changed_here(tmp_path, old, new, expected):
    settings, _ = imported(changed(tmp_path, old, new))
    found = settings["hooks"]["pdcr"] | {"uafs": settings["finetune"].get("uafs", {}).get("layers")}
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("layer_sample:", "layer_samples:", 'unknown key "model.layer_samples"; did you mean model.layer_sample'),
        ("encoder_patchseries", "encoder_patchserie", "did you mean encoder_patchseries"),
        ("patchnumber: 3", "patchnumber: 4", "make them agree"),
        ("bcl_layer_choice: [2, 3]", "bcl_layer_choice: [0]", "numbers from 1 to 9"),
        ("epochs: 300", "epochs: many", "epochs: expected int"),
        ("backbone: xception_bcl_att2", "backbone: vgg", "model.backbone: vgg"),
        ("base_lr: 1e-3", "base_lr: fast", "expected a number"),
        ("loss_temperature: 1", "loss_temperature: 0", "temperature > 0"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(tmp_path, old, new, message):
    with pytest.raises(UsageError, match=message):
        imported(changed(tmp_path, old, new))


def test_the_command_prints_what_dash_p_reads_and_says_what_is_lost(tmp_path, capsys):
    file = changed(tmp_path)
    cli.import_config(file)
    out, err = capsys.readouterr()
    assert config.build(yaml.safe_load(out)).hooks[0].name == "pdcr"
    assert "not kept: class_weight" not in err
    assert "not kept: save_checkpoint is by time" in err
