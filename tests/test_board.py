"""What a stage leaves to be looked at: its log, its pictures, the realised IoU of its pairs."""

import itertools
import json

import numpy as np
import torch

from medssl.methods.networks.unet import Config as UNetConfig
from medssl.methods.networks.unet import UNet
from medssl.methods.protocol import UNLABELLED, Views
from medssl.methods.simsiam import Config, SimSiam
from medssl.platform.board import BINS, ROWS, WATCHED, Board, side_by_side


def batch(n=8):
    rng = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (n, 1, 48, 40), dtype=torch.uint8, generator=rng)
    label = torch.full((n, 48, 40), UNLABELLED, dtype=torch.uint8)
    return {"image": image, "label": label, "size": torch.tensor([[48, 40]]).expand(n, 2)}


def test_the_realised_iou_of_the_first_batches_is_counted_and_lies_in_the_interval(tmp_path):
    method = SimSiam(UNet(1, 2, UNetConfig(width=4, levels=2)).encoder, Config(side=16, d=8, bottleneck=4, iou=(0.3, 0.6)))
    with Board(tmp_path) as board:
        seen = list(itertools.islice(board.watching(lambda start: itertools.repeat(batch()), method)(0), WATCHED + 2))
    assert len(seen) == WATCHED + 2, "the batches themselves pass through"
    counted = json.loads((tmp_path / "iou.json").read_text())
    assert sum(counted["counts"]) == WATCHED * 8
    filled = [number / BINS for number, count in enumerate(counted["counts"]) if count]
    assert 0.3 - 1 / BINS < min(filled) <= max(filled) <= 0.6
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_continued_stage_draws_no_second_histogram(tmp_path):
    method = SimSiam(UNet(1, 2, UNetConfig(width=4, levels=2)).encoder, Config(side=16, d=8, bottleneck=4))
    with Board(tmp_path) as board:
        list(itertools.islice(board.watching(lambda start: itertools.repeat(batch()), method)(5), WATCHED))
    assert not (tmp_path / "iou.json").exists()


def test_scalars_are_in_the_log_one_line_each(tmp_path):
    with Board(tmp_path) as board:
        board.scalars(3, {"loss/dice": 0.25})
    (line,) = (tmp_path / "log.txt").read_text().splitlines()
    assert json.loads(line)["loss/dice"] == 0.25
    assert json.loads(line)["step"] == 3


def test_a_worker_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Board(None) as board:
        board.scalars(1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_a_picture_has_a_row_per_slice_and_a_panel_per_view_and_label():
    images = [torch.rand(12, 1, 32, 32) for _ in range(2)]
    labels = torch.zeros(12, 32, 32, dtype=torch.int64)
    labels[:, 8:16, 8:16] = 1
    picture = side_by_side(Views(images, labels=labels))
    assert picture.shape == (ROWS * 128, 3 * 128, 3), "small views are enlarged to be seen"
    grey, painted = picture[:128, :128], picture[:128, 256:]
    changed = (grey != painted).any(-1)
    assert changed[32:64, 32:64].all()
    assert not changed[:32].any()


def test_a_smaller_view_stands_at_the_top_of_its_row():
    large, small = torch.rand(2, 1, 130, 130), torch.rand(2, 1, 40, 40)
    picture = side_by_side(Views([large, small]))
    assert picture.shape == (260, 170, 3)
    assert np.array_equal(picture[130:170, 130:], side_by_side(Views([small]))[120:240:3, ::3])
    assert not picture[40:130, 130:].any()
