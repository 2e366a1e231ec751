"""What is exported loads strictly by the lines that are printed, and computes what our network computes.

The other side is the library itself, where it is installed. timm needs torchvision, which has no build here: its networks
are checked by the names and shapes of their published definitions, and by their outputs where timm can be imported.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medssl import cli
from medssl.platform import atomic, catalogue, checkpoint, config, export, find, single, stages
from medssl.platform.datasets import phantom
from medssl.platform.errors import UsageError
from medssl.platform.site import Site
from medssl.platform.store import Store

NETWORKS = find.names("network")
VIT = {"patch": 8, "d": 24, "depth": 4, "heads": 3, "width": 4, "grid": 4}
SWIN = {"width": 12, "depths": (2, 2, 2, 2), "heads": 3}
CHAIN = "simsiam:phantom@3 -> segment:phantom"
CLOSE = {"rtol": 1e-7, "atol": 1e-7}  # in float64, where the order of a sum does not matter


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Store:
    """Four small phantoms."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSSL_DATA", str(tmp_path_factory.mktemp("data")))
        source = tmp_path_factory.mktemp("scans") / "tiny"
        phantom.generate(source, patients=4)
        coarse = {"spacing_mm": (12.0, 12.0, 24.0), "pad": 32}
        return catalogue.prepare(str(source), changes=coarse, workers=1, say=lambda text: None)


class Runs:
    """A folder of runs, into which a test puts finished ones."""

    def __init__(self, store: Store):
        self.store = store

    def finished(self, network: str, kind: str = "finetune", **settings: Any) -> tuple[str, Any]:
        """The id of a run with weights of chance, and its network."""
        tree = config.stack([config.BASE, {"network": {"name": network, **settings}}])
        experiment = config.build(tree)
        torch.manual_seed(0)
        net = stages.network(experiment, self.store.channels, len(self.store.classes)).eval()
        shake(net)
        folder = Site.here().stage(f"{kind}-{network}")
        card = {"chain": "simsiam:phantom@3", "steps": 3}
        folder.mkdir(parents=True)
        if kind == "pretrain":
            checkpoint.save(folder / "encoder.pt", {"encoder": net.encoder.state_dict(), "card": card})
        else:
            checkpoint.save(folder / "best.pt", {"network": net.state_dict(), "validation": 0.5, "step": 4, "chain": CHAIN})
        run = {"kind": kind, "seed": 1, "encoder_seed": 7, "config": experiment.tree()}
        atomic.write_json(folder / "run.json", run | {"store": str(self.store.root)})
        atomic.write_json(folder / "done.json", {"status": "finished"})
        return folder.name, net.double()


def shake(network: nn.Module) -> None:
    """Every weight and statistic of its own: at their first values norms would hide an exchange."""
    rng = torch.Generator().manual_seed(1)
    for value in [*network.parameters(), *network.buffers()]:
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=rng)
            value.data.copy_(0.2 * noise if value.dim() > 1 else 0.6 + 0.3 * noise.clamp(-1, 1))


@pytest.fixture
def runs(prepared, tmp_path, monkeypatch) -> Runs:
    monkeypatch.setenv("MEDSSL_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    return Runs(prepared)


def exported(run: str, target: str) -> tuple[Path, list[str]]:
    path, *lines = export.export(run, target, None).splitlines()
    return Path(path), lines


def loaded(run: str, target: str) -> Any:
    """The network that the printed lines make, word for word."""
    found: dict[str, Any] = {}
    exec("\n".join(exported(run, target)[1]), found)
    network = found["network"]
    assert isinstance(network, nn.Module)
    return network.double().eval()


def images(side: int = 32, dims: int = 2) -> Tensor:
    return torch.rand(2, 1, *[side] * dims, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


UNETS = [
    {"width": 4, "levels": 5},
    {"width": 8, "levels": 5, "norm": "group"},
    {"width": 4, "levels": 5, "norm": "batch"},
    {"width": 4, "levels": 5, "spatial_dims": 3},
    {"width": 4, "levels": 3, "down": "stride"},
    {"width": 8, "levels": 4, "down": "stride", "norm": "group"},
    {"width": 4, "levels": 5, "down": "stride", "norm": "batch"},
    {"width": 4, "levels": 3, "down": "stride", "spatial_dims": 3},
]


@pytest.mark.parametrize("settings", UNETS, ids=str)
def test_monai_computes_what_our_u_net_computes(runs, settings):
    run, ours = runs.finished("unet", **settings)
    x = images(dims=settings.get("spatial_dims", 2))
    with torch.inference_mode():
        torch.testing.assert_close(loaded(run, "monai")(x), ours(x), **CLOSE)


@pytest.mark.parametrize("settings", [s for s in UNETS if "down" in s and s.get("norm") != "group"], ids=str)
def test_nnunet_computes_what_our_u_net_computes(runs, settings):
    pytest.importorskip("dynamic_network_architectures", reason="nnU-Net's networks are not installed")
    run, ours = runs.finished("unet", **settings)
    x = images(dims=settings.get("spatial_dims", 2))
    with torch.inference_mode():
        torch.testing.assert_close(loaded(run, "nnunet")(x), ours(x), **CLOSE)


def test_nnunet_finds_every_weight_that_its_plain_u_net_has(runs):
    """Names and shapes as dynamic_network_architectures 0.4 defines PlainConvUNet, written out for two levels."""
    run, _ = runs.finished("unet", width=4, levels=2, down="stride")
    held = torch.load(exported(run, "nnunet")[0], weights_only=True)
    expected: dict[str, tuple[int, ...]] = {}

    def block(name: str, inputs: int, outputs: int) -> None:
        for number, channels in enumerate((inputs, outputs)):
            for conv, norm in (("conv", "norm"), ("all_modules.0", "all_modules.1")):
                here = f"{name}.convs.{number}"
                expected.update({f"{here}.{conv}.weight": (outputs, channels, 3, 3), f"{here}.{conv}.bias": (outputs,)})
                expected.update({f"{here}.{norm}.weight": (outputs,), f"{here}.{norm}.bias": (outputs,)})

    for encoder in ("encoder", "decoder.encoder"):
        block(f"{encoder}.stages.0.0", 1, 4)
        block(f"{encoder}.stages.1.0", 4, 8)
    block("decoder.stages.0", 8, 4)
    expected |= {"decoder.transpconvs.0.weight": (8, 4, 2, 2), "decoder.transpconvs.0.bias": (4,)}
    k = len(runs.store.classes)
    expected |= {"decoder.seg_layers.0.weight": (k, 4, 1, 1), "decoder.seg_layers.0.bias": (k,)}
    assert {key: tuple(value.shape) for key, value in held["network_weights"].items()} == expected
    assert held["architecture"]["arch_kwargs"]["features_per_stage"] == [4, 8]


def test_a_decoder_widened_for_monai_learns_nothing_but_what_ours_learns(runs):
    """The half that is 0 gets no gradient: training goes on as in our network."""
    run, ours = runs.finished("unet", width=4, levels=5)
    theirs, x = loaded(run, "monai"), images()
    theirs(x).square().mean().backward()
    ours(x).square().mean().backward()
    up = theirs.get_submodule("upcat_1.upsample.deconv").weight.grad
    torch.testing.assert_close(up[:, :4], ours.decoder.ups[3].weight.grad, **CLOSE)
    assert not up[:, 4:].any()


def test_monai_computes_what_our_swin_unetr_computes(runs):
    pytest.importorskip("einops", reason="MONAI's Swin UNETR runs on einops, which is not installed")
    run, ours = runs.finished("swin_unetr", **SWIN)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(run, "monai")(images(64)), ours(images(64)), **CLOSE)


@pytest.mark.parametrize("dims", [2, 3])
def test_monai_loads_our_swin_unetr_strictly(runs, dims):
    from monai.networks.nets import SwinUNETR

    run, _ = runs.finished("swin_unetr", **SWIN, spatial_dims=dims)
    state = torch.load(exported(run, "monai")[0], weights_only=True)["state_dict"]
    theirs = SwinUNETR(1, len(runs.store.classes), feature_size=12, spatial_dims=dims)
    theirs.load_state_dict(state, strict=True)


def timm_vit() -> dict[str, tuple[int, ...]]:
    """Names and shapes of timm's VisionTransformer (timm 1.0) of VIT's size, 4 x 4 patches, num_classes=0."""
    d, hidden = 24, 96
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, d), "pos_embed": (1, 17, d)}
    shapes |= {"patch_embed.proj.weight": (d, 1, 8, 8), "patch_embed.proj.bias": (d,)}
    linear = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (hidden, d), "mlp.fc2": (d, hidden)}
    for block in range(4):
        for name, shape in linear.items():
            shapes |= {f"blocks.{block}.{name}.weight": shape, f"blocks.{block}.{name}.bias": shape[:1]}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{block}.{name}.weight": (d,), f"blocks.{block}.{name}.bias": (d,)}
    return shapes | {"norm.weight": (d,), "norm.bias": (d,)}


def resnet(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of torchvision's and timm's resnet18 and resnet50 without classifier (He et al. 2016, table 1)."""
    blocks, expansion = {18: ((2, 2, 2, 2), 1), 50: ((3, 4, 6, 3), 4)}[layers]
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, channels: int) -> None:
        for key in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{key}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()

    def convolution(conv: str, bn: str, inputs: int, outputs: int, kernel: int) -> None:
        shapes[f"{conv}.weight"] = (outputs, inputs, kernel, kernel)
        norm(bn, outputs)

    convolution("conv1", "bn1", 1, 64, 7)
    inputs = 64
    for stage, count in enumerate(blocks):
        inner, outputs = 64 * 2**stage, 64 * 2**stage * expansion
        for block in range(count):
            here = f"layer{stage + 1}.{block}"
            sizes = [(inputs, inner, 1), (inner, inner, 3), (inner, outputs, 1)] if expansion == 4 else [
                (inputs, inner, 3), (inner, outputs, 3)]  # fmt: skip
            for number, size in enumerate(sizes, start=1):
                convolution(f"{here}.conv{number}", f"{here}.bn{number}", *size)
            if block == 0 and inputs != outputs:
                convolution(f"{here}.downsample.0", f"{here}.downsample.1", inputs, outputs, 1)
            inputs = outputs
    return shapes


def test_the_vit_of_unetr_has_the_names_and_shapes_of_timm(runs):
    run, _ = runs.finished("unetr", "pretrain", **VIT)
    state = torch.load(exported(run, "timm")[0], weights_only=True)["state_dict"]
    assert {key: tuple(value.shape) for key, value in state.items()} == timm_vit()


@pytest.mark.parametrize("layers", [18, 50])
def test_the_encoder_of_resnet_unet_has_the_names_and_shapes_of_timm_and_torchvision(runs, layers):
    run, _ = runs.finished("resnet_unet", layers=layers)
    state = torch.load(exported(run, "timm")[0], weights_only=True)["state_dict"]
    assert {key: tuple(value.shape) for key, value in state.items()} == resnet(layers)


@pytest.mark.parametrize(("network", "settings"), [("unetr", VIT), ("resnet_unet", {"layers": 18}), ("resnet_unet", {})])
def test_timm_computes_what_our_encoder_computes(runs, network, settings):
    pytest.importorskip("timm", reason="timm needs torchvision, which is not installed")
    run, ours = runs.finished(network, **settings)
    with torch.inference_mode():
        x = images(32 if network == "unetr" else 64)
        theirs, maps = loaded(run, "timm").forward_features(x), ours.encoder(x)
        theirs = theirs if theirs.dim() == 4 else theirs[:, 1:].transpose(1, 2).unflatten(2, maps[-1].shape[2:])
        torch.testing.assert_close(theirs, maps[-1], **CLOSE)


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
@pytest.mark.parametrize("network", NETWORKS)
def test_safetensors_hold_what_was_trained_and_its_card(runs, network, kind):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    from safetensors import safe_open

    small = {"unet": {"width": 4, "levels": 3}, "unetr": VIT, "swin_unetr": SWIN, "resnet_unet": {"layers": 18}}
    run, ours = runs.finished(network, kind, **small.get(network, {"width": 8}))
    path, lines = exported(run, "safetensors")
    found: dict[str, Any] = {}
    exec("\n".join(lines), found)
    part = (lambda net: net) if kind == "finetune" else (lambda net: net.encoder)
    state = part(found["network"]).state_dict()
    assert all(torch.equal(value, state[key]) for key, value in part(ours).state_dict().items())
    with safe_open(path, "pt") as file:
        card = file.metadata()
    assert card["chain"] == ("simsiam:phantom@3" if kind == "pretrain" else CHAIN)
    assert json.loads(card["classes"]) == list(runs.store.classes)
    assert json.loads(card["network"])["name"] == network
    assert json.loads(card["preprocessing"])["spacing_mm"] == [12.0, 12.0, 24.0]
    assert card["licence"] == runs.store.licence


def test_a_pretraining_goes_out_with_a_fresh_decoder_and_says_so(runs):
    run, ours = runs.finished("unet", "pretrain", width=4, levels=5)
    vit, _ = runs.finished("unetr", "pretrain", **VIT)
    assert any("decoder and head are fresh" in line for line in exported(run, "monai")[1])
    assert not any("fresh" in line for line in exported(vit, "timm")[1])
    Path(f"{run}.monai.pt").unlink()
    theirs = loaded(run, "monai")
    torch.testing.assert_close(theirs.get_submodule("conv_0")(images()), ours.encoder(images())[0], **CLOSE)


REFUSED = {
    "a pooled U-Net to nnU-Net": ("unet", {"levels": 5, "width": 4}, "nnunet", "max-pooling.*--to monai or safetensors"),
    "a U-Net of 4 levels to MONAI": ("unet", {"levels": 4, "width": 4}, "monai", "5 levels, this U-Net 4"),
    "odd groups to MONAI": ("unet", {"levels": 5, "width": 4, "norm": "group"}, "monai", "equally many groups"),
    "a U-Net to timm": ("unet", {"levels": 5, "width": 4}, "timm", "timm has no encoder"),
    "UNETR to MONAI": ("unetr", VIT, "monai", "class token.*--to timm or safetensors"),
    "UNETR in 3D to timm": ("unetr", VIT | {"spatial_dims": 3}, "timm", "volumes.*--to safetensors can be had"),
    "UNETR to nnU-Net": ("unetr", VIT, "nnunet", "no network like unetr"),
    "an unknown target": ("unet", {"levels": 3, "width": 4}, "mona", "did you mean monai"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_equal_is_refused_with_what_can_be_had(runs, what):
    network, settings, target, message = REFUSED[what]
    run, _ = runs.finished(network, **settings)
    with pytest.raises(UsageError, match=message):
        export.export(run, target, None)
    assert not list(Path().glob("*.p*"))


def test_a_file_is_never_overwritten(runs):
    run, _ = runs.finished("unet", width=4, levels=5)
    exported(run, "monai")
    with pytest.raises(UsageError, match="exists; choose another file"):
        export.export(run, "monai", None)


def test_a_run_that_is_not_finished_is_refused(runs):
    run, _ = runs.finished("unet", width=4, levels=5)
    (Site.here().stage(run) / "done.json").unlink()
    with pytest.raises(UsageError, match="not finished"):
        export.export(run, "monai", None)


TINY = [
    "network.width=4",
    "pretrain.side=8",
    "pretrain.d=8",
    "pretrain.bottleneck=4",
    "network.down=stride",
    "network.levels=3",
]
TINY += ["pretrain.training.steps=2", "pretrain.training.batch=4", "finetune.side=16", "finetune.training.steps=2"]
TINY += ["finetune.training.batch=4", "finetune.training.evaluations=1", "evaluate.inference=whole"]


def test_runs_are_exported_as_training_leaves_them(runs, prepared, monkeypatch, capsys):
    monkeypatch.setenv("MEDSSL_DATA", str(prepared.root.parent))
    pretrained = single.pretrain("simsiam", None, prepared.root.name, 0, [], TINY, say=print).partition(":")[0]
    tuned = single.finetune(pretrained, prepared.root.name, 0, [], TINY, say=print).partition(":")[0]
    capsys.readouterr()
    for run, target in ((pretrained, "monai"), (tuned, "monai"), (tuned, "nnunet")):
        monkeypatch.setattr(sys, "argv", ["medssl", "export", run, "--to", target, "--out", f"{run}-{target}.pt"])
        with contextlib.suppress(SystemExit):
            cli.main()
        assert capsys.readouterr().out.splitlines()[0] == f"{run}-{target}.pt"
    card = torch.load(f"{tuned}-monai.pt", weights_only=True)["card"]
    assert card["chain"] == "simsiam:phantom@2 -> segment:phantom"
    assert (card["method"], card["run"]) == ("segment", tuned)
