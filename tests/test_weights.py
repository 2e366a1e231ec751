"""Checkpoints of every layout, made here from known weights by renaming them the other way, give these weights back."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medssl.methods.networks import unet
from medssl.platform import checkpoint, find, weights
from medssl.platform.errors import RunError

State = dict[str, Tensor]


class Block(nn.Module):
    """A basic block in torchvision's names."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, bias=False), nn.BatchNorm2d(outputs)
        if inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """The children of torchvision's ResNet, in its order, small."""

    def __init__(self, channels: int = 1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 4, 7, bias=False), nn.BatchNorm2d(4)
        self.relu, self.maxpool = nn.ReLU(), nn.MaxPool2d(3)
        self.layer1, self.layer2 = nn.Sequential(Block(4, 4)), nn.Sequential(Block(4, 6))
        self.layer3, self.layer4 = nn.Sequential(Block(6, 8)), nn.Sequential(Block(8, 10))


class ViT(nn.Module):
    """A Vision Transformer in timm's names, of one block."""

    def __init__(self, channels: int = 1, grid: int = 3, token: bool = True):
        super().__init__()
        if token:
            self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.randn(1, token + grid**2, 8))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(channels, 8, 4, 4)})
        attention = nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)})
        mlp = nn.ModuleDict({"fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8)})
        parts = {"norm1": nn.LayerNorm(8), "attn": attention, "norm2": nn.LayerNorm(8), "mlp": mlp}
        self.blocks = nn.ModuleList([nn.ModuleDict(parts)])
        self.norm = nn.LayerNorm(8)


def swin(channels: int = 1) -> nn.Module:
    from monai.networks.nets.swin_unetr import SwinTransformer

    return SwinTransformer(channels, 6, (4, 4), (2, 2), (2, 2, 2, 2), (1, 2, 3, 6), spatial_dims=2)


def u_net(channels: int = 1) -> nn.Module:
    return unet.UNet(channels, 3, unet.Config(width=4, levels=3)).encoder


def filled(module: nn.Module, seed: int = 1) -> nn.Module:
    """Other weights than any module begins with, statistics of normalisations included."""
    generator = torch.Generator().manual_seed(seed)
    for key, value in module.state_dict().items():
        if value.is_floating_point() and "relative_position_index" not in key:
            value.copy_(torch.rand(value.shape, generator=generator) + 0.1)
    return module


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def renamed(state: State, *rules: tuple[str, str]) -> State:
    named = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        named[key] = value
    return named


def numbered(state: State) -> State:
    """As `nn.Sequential(*list(resnet.children())[:-1])` names them."""
    order = [name for name, _ in ResNet().named_children()]
    return {f"{order.index(key.partition('.')[0])}.{key.partition('.')[2]}": value for key, value in state.items()}


def head(size: int = 10) -> State:
    return {"weight": torch.zeros(5, size), "bias": torch.zeros(5)}


def other(state: State) -> State:
    """A momentum copy, or another network, of the same names."""
    return {key: torch.zeros_like(value) for key, value in state.items()}


TO_TORCHVISION_VIT = (
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "encoder.pos_embedding"),
    (r"^patch_embed\.proj\.", "conv_proj."),
    (r"^blocks\.(\d+)\.", r"encoder.layers.encoder_layer_\1."),
    (r"^norm\.", "encoder.ln."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
    (r"\.attn\.proj\.", ".self_attention.out_proj."),
)
NNSSL_PLAN = {"key_to_encoder": "encoder.blocks", "key_to_stem": "encoder.stem", "key_to_lpe": None}
# name: encoder, its state to what lies in the file, the layout that is told
LAYOUTS: dict[str, tuple[Callable[[], nn.Module], Callable[[State], Any], str]] = {
    "an encoder": (u_net, lambda s: s, "encoder"),
    "a whole network": (u_net, lambda s: {"state_dict": under("encoder.", s) | under("decoder.", other(s))}, "whole network"),
    "compiled, in DDP": (u_net, lambda s: {"model": under("module._orig_mod.encoder.", s)}, "whole network"),
    "torchvision ResNet": (ResNet, lambda s: s | under("fc.", head()), "ResNet"),
    "timm ResNet of old": (
        ResNet,
        lambda s: {k: v for k, v in s.items() if "num_batches" not in k} | under("fc.", head()),
        "ResNet",
    ),
    "solo-learn": (
        ResNet,
        lambda s: {
            "epoch": 3,
            "state_dict": under("backbone.", s)
            | under("momentum_backbone.", other(s))
            | under("projector.0.", head())
            | under("classifier.", head()),
        },
        "solo-learn",
    ),
    "solo-learn, the momentum half alone": (
        ResNet,
        lambda s: under("momentum_backbone.", s) | under("momentum_projector.0.", head()),
        "solo-learn (momentum)",
    ),
    "lightly": (
        ResNet,
        lambda s: {
            "state_dict": under("backbone.", numbered(s))
            | under("backbone_momentum.", other(numbered(s)))
            | under("projection_head.layers.0.", head()),
        },
        "lightly",
    ),
    "BYOL-PyTorch while training": (
        ResNet,
        lambda s: {
            "epoch": 300,
            "model": under("module.online_network.encoder.", numbered(s))
            | under("module.online_network.projetion.net.0.", head())
            | under("module.target_network.encoder.", other(numbered(s)))
            | under("module.predictor.net.0.", head()),
            "optimizer": {"state": {}, "param_groups": []},
        },
        "BYOL-PyTorch",
    ),
    "BYOL-PyTorch as published": (
        ResNet,
        lambda s: {"online_backbone": under("module.", s), "target_backbone": under("module.", other(s))},
        "BYOL-PyTorch",
    ),
    "timm ViT": (ViT, lambda s: s | under("head.", head(8)), "ViT"),
    "torchvision ViT": (
        ViT,
        lambda s: renamed(s, *TO_TORCHVISION_VIT, (r"\.mlp\.fc([12])", r".mlp.linear_\1")) | under("heads.head.", head(8)),
        "torchvision ViT",
    ),
    "torchvision ViT of old": (
        ViT,
        lambda s: renamed(s, *TO_TORCHVISION_VIT, (r"\.mlp\.fc1", ".mlp.0"), (r"\.mlp\.fc2", ".mlp.3")),
        "torchvision ViT",
    ),
    "MONAI Swin UNETR": (swin, lambda s: under("swinViT.", s) | under("encoder1.layer.", head()), "MONAI Swin"),
    "MONAI Swin, self-supervised": (
        swin,
        lambda s: {
            "state_dict": under("module.", renamed(s, (r"mlp\.linear([12])", r"mlp.fc\1")) | under("norm.", head())),
        },
        "MONAI Swin",
    ),
    "MONAI Swin, disruptive autoencoders": (
        swin,
        lambda s: {
            "model": under("encoder.", renamed(s, (r"^(layers\d\.0)\.", r"\1.0.")))
            | {"encoder.mask_token": torch.zeros(1)}
            | under("encoder.norm.", head())
            | under("out.conv.conv.", head()),
        },
        "MONAI Swin",
    ),
    "nnssl": (
        u_net,
        lambda s: {
            "network_weights": under("encoder.", s)
            | {"encoder.blocks.0.all_modules.0.weight": torch.zeros(1)}
            | under("decoder.encoder.", other(s)),
            "nnssl_adaptation_plan": NNSSL_PLAN,
        },
        "nnssl",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_weights_that_were_put_in(name: str, tmp_path: Path) -> None:
    build, written, layout = LAYOUTS[name]
    source, fresh = filled(build()).state_dict(), filled(build(), seed=2)
    torch.save(written(source), tmp_path / "given.pth")
    found, report = weights.begin(fresh, tmp_path / "given.pth")
    assert found.layout == layout
    assert found.chain == f"given ({layout})"
    assert report.exact
    for key, value in fresh.state_dict().items():
        if "num_batches_tracked" not in key:
            assert torch.equal(value, source[key]), key


@pytest.mark.parametrize("name", ["ResNet", "timm ViT", "whole network"])
def test_a_file_in_the_safetensors_format_is_the_state_dict_that_it_holds(name: str, tmp_path: Path) -> None:
    """As timm's weights come from the Hugging Face hub; ours say in their metadata how they came to be."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    build = {"ResNet": ResNet, "timm ViT": ViT, "whole network": u_net}[name]
    source = filled(build()).state_dict()
    written = under("encoder.", source) | under("decoder.", other(source)) if name == "whole network" else source
    save_file(written, tmp_path / "given.safetensors", metadata={"format": "pt", "chain": "not ours"})
    found, report = weights.begin(fresh := filled(build(), seed=2), tmp_path / "given.safetensors")
    assert report.exact
    assert checkpoint.digest(fresh.state_dict()) == checkpoint.digest(source)
    assert found.chain.startswith("given (")
    save_file(written, tmp_path / "ours.safetensors", metadata={"medssl": "0.1.0", "chain": "byol:acdc@25"})
    assert weights.read(tmp_path / "ours.safetensors").chain == "byol:acdc@25"

    (tmp_path / "broken.safetensors").write_bytes(b"hello")
    for file, message in (("broken", "not a file that safetensors can read"), ("absent", "no such file of weights")):
        with pytest.raises(RunError, match=message):
            weights.read(tmp_path / f"{file}.safetensors")


@pytest.mark.parametrize("kind", ["pretraining", "fine-tuning"])
def test_files_of_medssl_itself_carry_their_chain(kind: str, tmp_path: Path) -> None:
    source = filled(u_net()).state_dict()
    if kind == "pretraining":
        checkpoint.save(tmp_path / "w.pt", {"encoder": source, "card": {"chain": "imagenet (ResNet) -> byol:acdc@25"}})
    else:
        whole = under("encoder.", source) | under("decoder.", other(source))
        checkpoint.save(tmp_path / "w.pt", {"network": whole, "chain": "imagenet (ResNet) -> byol:acdc@25", "step": 3})
    found, _ = weights.begin(fresh := u_net(), tmp_path / "w.pt")
    assert (found.layout, found.chain) == (f"medssl {kind}", "imagenet (ResNet) -> byol:acdc@25")
    assert checkpoint.digest(fresh.state_dict()) == checkpoint.digest(source)


def test_a_file_of_medssl_that_was_changed_is_refused(tmp_path: Path) -> None:
    torch.save({"format": 1, "digest": "0", "state": {"encoder": u_net().state_dict()}}, tmp_path / "w.pt")
    with pytest.raises(RunError, match="has changed since it was written"):
        weights.read(tmp_path / "w.pt")


SMALL = {"width": 8, "heads": 1, "layers": 18, "d": 24, "depth": 4}  # where a Config has such a field; heads divide d


@pytest.mark.parametrize("name", find.names("network"))
def test_every_network_of_ours_begins_from_its_own_names_in_three_channels(name: str, tmp_path: Path) -> None:
    module = find.load("network", name)
    config = module.Config(
        **{field.name: SMALL[field.name] for field in dataclasses.fields(module.Config) if field.name in SMALL}
    )
    source, fresh = (filled(module.NETWORK(c, 2, config).encoder, seed) for seed, c in enumerate((3, 1)))
    torch.save({"state_dict": under("backbone.", source.state_dict())}, tmp_path / "w.pt")
    _, report = weights.begin(fresh, tmp_path / "w.pt")
    assert report.exact
    differing = [k for k, v in fresh.state_dict().items() if not torch.equal(v, source.state_dict()[k])]
    assert len(differing) == 1, "the first layer, of which the channels were summed"
    assert torch.equal(fresh.state_dict()[differing[0]], source.state_dict()[differing[0]].sum(1, keepdim=True))


@pytest.mark.parametrize(("build", "key"), [(ResNet, "conv1.weight"), (ViT, "patch_embed.proj.weight"), (swin, None)])
@pytest.mark.parametrize(("given", "wanted"), [(3, 1), (1, 3), (3, 4), (3, 3), (4, 1)])
def test_the_first_layer_gives_for_equal_channels_what_it_gave_before(
    build: Any, key: str | None, given: int, wanted: int, tmp_path: Path
) -> None:
    key = key or "patch_embed.proj.weight"
    source, fresh = filled(build(given)), build(wanted)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    weights.begin(fresh, tmp_path / "w.pt")
    before, after = source.state_dict()[key], fresh.state_dict()[key]
    assert after.shape[1] == wanted
    image = torch.rand(2, 1, 16, 16)
    expected = nn.functional.conv2d(image.expand(-1, given, -1, -1), before)
    if (given, wanted) == (3, 4):  # channels 0 1 2 0 times 3/4: the same only for kernels alike
        assert torch.equal(after, before[:, [0, 1, 2, 0]] * 0.75)
    elif wanted == 1:
        torch.testing.assert_close(nn.functional.conv2d(image, after), expected)
    else:
        torch.testing.assert_close(nn.functional.conv2d(image.expand(-1, wanted, -1, -1), after), expected)


def test_positions_of_another_grid_are_interpolated_and_the_token_is_kept(tmp_path: Path) -> None:
    source = filled(ViT(grid=4))
    ramp = torch.arange(4.0).repeat_interleave(4)[None, :, None].expand(1, 16, 8)  # row numbers
    source.pos_embed.data[:, 1:] = ramp
    torch.save(source.state_dict(), tmp_path / "w.pt")
    weights.begin(fresh := ViT(grid=8), tmp_path / "w.pt")
    assert torch.equal(fresh.pos_embed[:, 0], source.pos_embed[:, 0])
    rows = fresh.pos_embed[0, 1:, 0].reshape(8, 8)
    assert torch.allclose(rows, rows[:, :1].expand(8, 8), atol=1e-5), "columns stay alike"
    expected = (torch.arange(8) + 0.5) / 2 - 0.5  # where the centres of the new rows lie among the old ones
    assert torch.allclose(rows[3:5, 0], expected[3:5], atol=0.06), "bicubic nearly keeps a ramp, away from the edge"
    assert torch.allclose(rows + rows.flip(0), torch.full_like(rows, 3.0), atol=1e-5), "and its symmetry"
    weights.begin(bare := ViT(grid=4, token=False), tmp_path / "w.pt")
    assert torch.equal(bare.pos_embed, source.pos_embed[:, 1:]), "without a class token its embedding goes too"


def test_what_fits_only_in_part_is_refused_with_its_keys_and_accepted_when_asked_for(tmp_path: Path) -> None:
    state = filled(ResNet()).state_dict()
    dropped = {key: value for key, value in state.items() if not key.startswith("layer4")}
    torch.save(dropped | {"layer5.0.conv1.weight": torch.zeros(1)}, tmp_path / "w.pt")
    fresh = filled(ResNet(), seed=2)
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    with pytest.raises(
        RunError, match=r"w\.pt \(layout: ResNet; 0 keys .*only .* fit .*missing \(layer4\..*unexpected \(layer5"
    ):
        weights.begin(fresh, tmp_path / "w.pt")
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items()), "refused, not half done"
    _, report = weights.begin(fresh, tmp_path / "w.pt", partial=True)
    assert all(key.startswith("layer4.") for key in report.missing)
    assert all(torch.equal(v, (before if k in report.missing else state)[k]) for k, v in fresh.state_dict().items())


@pytest.mark.parametrize("partial", [False, True])
def test_weights_of_another_architecture_are_refused_even_in_part(partial: bool, tmp_path: Path) -> None:
    torch.save(filled(ResNet()).state_dict(), tmp_path / "w.pt")
    with pytest.raises(RunError, match=r"layout: ResNet.*none of the pretrained weights fits"):
        weights.begin(u_net(), tmp_path / "w.pt", partial=partial)


def test_another_width_is_refused_with_both_shapes(tmp_path: Path) -> None:
    torch.save(unet.UNet(1, 3, unet.Config(width=8, levels=3)).encoder.state_dict(), tmp_path / "w.pt")
    with pytest.raises(RunError, match=r"of another shape \(blocks\.0\.0\.weight \(8, 1, 3, 3\) → \(4, 1, 3, 3\)|none of the"):
        weights.begin(u_net(), tmp_path / "w.pt")


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("harm",))


def test_a_file_that_needs_code_is_refused_with_the_way_to_convert_it(tmp_path: Path, capsys: Any) -> None:
    torch.save({"state_dict": u_net().state_dict(), "args": Evil()}, tmp_path / "w.pt")
    with pytest.raises(RunError, match=r"pickled code.*weights_only=False.*NEW"):
        weights.read(tmp_path / "w.pt")
    assert "harm" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", "not a checkpoint that torch"),
        (b"", "not a checkpoint that torch"),
        ({"epoch": 3, "loss": 0.1}, "no weights found in it.*found: epoch, loss"),
    ],
)
def test_a_file_without_weights_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    if isinstance(content, bytes):
        (tmp_path / "w.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "w.pt")
    with pytest.raises(RunError, match=message):
        weights.read(tmp_path / "w.pt")
