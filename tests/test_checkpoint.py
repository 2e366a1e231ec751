"""A checkpoint is whole or refused, and what does not fit is named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from medssl.methods import optimizers
from medssl.methods.networks import unet
from medssl.methods.simsiam import Config, SimSiam, Training
from medssl.platform import checkpoint
from medssl.platform.errors import RunError


def state() -> checkpoint.State:
    tensors = {"weight": torch.randn(3, 4), "half": torch.randn(5).half(), "count": torch.tensor(7)}
    return {"step": 3, "method": tensors, "groups": [{"lr": 0.1, "betas": (0.9, 0.99), "name": None}]}


def encoder(width: int = 4) -> nn.Module:
    return unet.UNet(1, 3, unet.Config(width=width, levels=3)).encoder


def parts(width: int = 4, d: int = 8) -> tuple[Any, torch.optim.Optimizer, torch.amp.GradScaler]:
    method = SimSiam(encoder(width), Config(d=d, bottleneck=4))
    return method, optimizers.build(method, Training()), torch.amp.GradScaler("cpu", enabled=False)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    saved = state()
    checkpoint.save(tmp_path / "deep" / "c.pt", saved)
    loaded = checkpoint.load(tmp_path / "deep" / "c.pt")
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(value, loaded["method"][key]) for key, value in saved["method"].items())
    assert all(value.dtype == loaded["method"][key].dtype for key, value in saved["method"].items())
    assert (loaded["step"], loaded["groups"]) == (saved["step"], saved["groups"])
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["c.pt"]


def test_the_digest_sees_every_change() -> None:
    torch.manual_seed(0)
    one = state()
    seen = {checkpoint.digest(one)}
    for change in (
        {"step": 4},
        {"method": one["method"] | {"count": torch.tensor(8)}},
        {"method": one["method"] | {"count": torch.tensor(7, dtype=torch.int32)}},
        {"method": one["method"] | {"weight": one["method"]["weight"].reshape(4, 3)}},
        {"method": {"renamed" if key == "weight" else key: value for key, value in one["method"].items()}},
        {"groups": [{"lr": 0.1, "betas": (0.9,), "name": 0.99}]},
    ):
        seen.add(checkpoint.digest(one | change))
    assert len(seen) == 7
    assert checkpoint.digest(one | {"method": {k: v.clone() for k, v in one["method"].items()}}) in seen


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    saved = {"weight": torch.full((64, 64), 1.5)}
    checkpoint.save(path, saved)
    whole = path.read_bytes()
    place = whole.index(b"\x00\x00\xc0\x3f" * 8)  # 1.5 in float32: inside the weights

    for damaged, complaint in [
        (whole[: len(whole) // 2], "not a whole checkpoint"),
        (whole[:-10], "not a whole checkpoint"),
        (b"", "not a whole checkpoint"),
        (whole[:place] + b"\x01" + whole[place + 1 :], "has changed since it was written"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(RunError, match=complaint) as refused:
            checkpoint.load(path)
        assert str(path) in str(refused.value)
    with pytest.raises(RunError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "other.pt")


def test_a_checkpoint_of_other_software_or_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    with pytest.raises(RunError, match="not a whole checkpoint of medssl"):
        checkpoint.load(tmp_path / "foreign.pt")
    checkpoint.save(tmp_path / "c.pt", state())
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    with pytest.raises(RunError, match="checkpoint format 1, this version reads 2"):
        checkpoint.load(tmp_path / "c.pt")


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    """`weights_only`: a pickle that calls a function is refused."""

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "harm",))

    torch.save({"format": 1, "digest": "", "state": Evil()}, tmp_path / "c.pt")
    with pytest.raises(RunError, match="not a whole checkpoint"):
        checkpoint.load(tmp_path / "c.pt")
    assert not (tmp_path / "harm").exists()


def test_another_architecture_is_refused_with_the_first_keys_and_shapes() -> None:
    method, optimizer, scaler = parts(d=8)
    saved = checkpoint.capture(method, optimizer, scaler, 5)
    with pytest.raises(RunError, match=r"another architecture.*projector\.0\.weight \(8, 16\) → \(6, 16\)"):
        checkpoint.restore(saved, *parts(d=6))
    with pytest.raises(RunError, match="another optimizer"):
        checkpoint.restore(saved, method, torch.optim.SGD(method.encoder.parameters(), lr=1), scaler)
    assert checkpoint.restore(saved, *parts(d=8)) == 5


def test_transfer_gives_the_encoder_and_says_so() -> None:
    method, _, _ = parts()
    fresh = encoder()
    result = checkpoint.transfer(method.transferable_state(), fresh)
    assert result.exact
    assert set(result.matched) == set(fresh.state_dict())
    assert all(torch.equal(value, method.encoder.state_dict()[key]) for key, value in fresh.state_dict().items())


def test_a_partial_transfer_must_be_asked_for() -> None:
    given = {key: value + 1 for key, value in encoder().state_dict().items()}
    keys = list(given)
    dropped = given.pop(keys[0])
    given["extra"] = dropped
    given[keys[1]] = torch.zeros(2, 2)
    fresh = encoder()
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    with pytest.raises(RunError, match=r"only .* pretrained weights fit the network: 1 missing .*1 unexpected .extra"):
        checkpoint.transfer(given, fresh)
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())  # refused, not half done

    result = checkpoint.transfer(given, fresh, partial=True)
    assert (result.missing, result.unexpected) == ((keys[0],), ("extra",))
    assert result.reshaped == (f"{keys[1]} (2, 2) → {tuple(before[keys[1]].shape)}",)
    for key, value in fresh.state_dict().items():
        assert torch.equal(value, given[key] if key in result.matched else before[key])


def test_a_transfer_of_nothing_is_refused() -> None:
    with pytest.raises(RunError, match="none of the pretrained weights fits"):
        checkpoint.transfer({f"module.{k}": v for k, v in encoder().state_dict().items()}, encoder(), partial=True)
