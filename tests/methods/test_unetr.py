"""Facts of UNETR and its Vision Transformer: against torch's attention, the published sizes, and MONAI's blocks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medssl.methods.networks.unetr import UNETR, Attention, Block, Config, Decoder, Encoder

SMALL = {"patch": 8, "d": 16, "depth": 4, "heads": 2, "width": 4, "grid": 3}


class Unequal(tuple):
    """A grid that no other equals, so that positions are interpolated even to itself."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = tuple.__hash__


def encoder(**settings) -> Encoder:
    torch.manual_seed(0)
    return Encoder(1, Config(**(SMALL | settings)))


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_attention_is_torchs_with_the_same_weights():
    torch.manual_seed(0)
    ours, theirs, x = Attention(24, 3), nn.MultiheadAttention(24, 3, batch_first=True), torch.randn(2, 7, 24)
    nn.init.normal_(ours.qkv.bias)
    names = {"qkv.weight": "in_proj_weight", "qkv.bias": "in_proj_bias", "proj.weight": "out_proj.weight"}
    names["proj.bias"] = "out_proj.bias"
    theirs.load_state_dict({names[key]: value for key, value in ours.state_dict().items()})
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])


def test_a_block_is_torchs_transformer_layer_with_norms_first():
    torch.manual_seed(0)
    ours, x = Block(24, 3), torch.randn(2, 7, 24)
    theirs = nn.TransformerEncoderLayer(24, 3, 96, 0.0, F.gelu, 1e-6, batch_first=True, norm_first=True)
    names = {
        "attn.qkv.": "self_attn.in_proj_",
        "attn.proj.": "self_attn.out_proj.",
        "mlp.fc1.": "linear1.",
        "mlp.fc2.": "linear2.",
    }
    state = ours.state_dict()
    for own, other in names.items():
        state = {key.replace(own, other): value for key, value in state.items()}
    theirs.load_state_dict(state)
    torch.testing.assert_close(ours(x), theirs(x))


def test_vit_b_16_has_the_published_86_million_weights():
    """Per block 12 d² + 13 d; patches, positions of 14 x 14, the class token; 86.6 million with 1000 classes."""
    d = 768
    closed = 12 * (12 * d**2 + 13 * d) + (3 * 16**2 * d + d) + 197 * d + d + 2 * d
    with torch.device("meta"):
        assert size(Encoder(3, Config(grid=14))) == closed == 85_798_656
    assert closed + 1000 * d + 1000 == 86_567_656


def test_parameters_in_2d_have_the_names_and_shapes_of_timm():
    block = {
        "norm1": (16,),
        "attn.qkv": (48, 16),
        "attn.proj": (16, 16),
        "norm2": (16,),
        "mlp.fc1": (64, 16),
        "mlp.fc2": (16, 64),
    }
    layers = {f"blocks.{i}.{name}": shape for i in range(4) for name, shape in block.items()}
    layers |= {"patch_embed.proj": (16, 1, 8, 8), "norm": (16,)}
    expected = {f"{name}.weight": shape for name, shape in layers.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    expected |= {"cls_token": (1, 1, 16), "pos_embed": (1, 10, 16)}
    assert {key: tuple(value.shape) for key, value in encoder().state_dict().items()} == expected


@pytest.mark.parametrize("sides", [(32, 32), (32, 16, 32)])
def test_the_decoder_is_that_of_monai(sides):
    """Its blocks joined as in MONAI's UNETR, which itself needs einops, with our weights in order of depth."""
    blocks = pytest.importorskip("monai.networks.blocks.unetr_block")
    torch.manual_seed(0)
    dims, d, w = len(sides), 8, 2
    ours = Decoder(3, Config(d=d, heads=2, width=w, spatial_dims=dims))
    common = {"norm_name": "instance", "kernel_size": 3}
    image = blocks.UnetrBasicBlock(dims, 3, w, stride=1, res_block=True, **common)
    rising = {"stride": 1, "upsample_kernel_size": 2, "conv_block": True, "res_block": True} | common
    lifts = [blocks.UnetrPrUpBlock(dims, d, w * 2**k, num_layer=3 - k, **rising) for k in (1, 2, 3)]
    levels = [(d, 8 * w), (8 * w, 4 * w), (4 * w, 2 * w), (2 * w, w)]
    ups = [blocks.UnetrUpBlock(dims, *level, upsample_kernel_size=2, res_block=True, **common) for level in levels]

    theirs = nn.ModuleList([image, *lifts, *ups])
    parts = [ours.image, ours.lifts, *(part for pair in zip(ours.ups, ours.blocks, strict=True) for part in pair)]
    own = [p for part in parts for p in part.parameters() if p.dim() > 1]
    other = list(theirs.parameters())
    for target, source in zip(other, own, strict=True):
        target.data.copy_(source.data)
    assert sum(p.numel() for p in own) == size(theirs)

    x, maps = torch.randn(2, 3, *sides), [torch.randn(2, d, *(side // 16 for side in sides)) for _ in range(4)]
    skips = [image(x), *(block(z) for block, z in zip(lifts, maps, strict=False))]
    expected = maps[-1]
    for up, skip in zip(ups, reversed(skips), strict=True):
        expected = up(expected, skip)
    torch.testing.assert_close(ours(x, maps), expected, rtol=1e-4, atol=1e-4)


def test_running_the_blocks_on_a_permuted_subset_gives_the_permuted_tokens_of_that_subset():
    vit, x = encoder(), torch.rand(2, 1, 24, 24)
    embedded = vit.embed(x)
    subset = torch.tensor([1, 4, 5, 7])
    order = torch.tensor([2, 0, 3, 1])
    first, tokens = vit.encode(embedded[:, subset])
    again, permuted = vit.encode(embedded[:, subset[order]])
    torch.testing.assert_close(permuted, tokens[:, order])
    torch.testing.assert_close(again, first)
    with torch.no_grad():
        x[:, :, :8, :8] = 0  # patch 0, which is not in the subset
    torch.testing.assert_close(vit.encode(vit.embed(x)[:, subset])[1], tokens)


def test_the_coarsest_map_is_the_patch_tokens_in_row_major_order():
    vit, x = encoder(), torch.rand(2, 1, 24, 16)
    _, tokens = vit.tokens(x)
    torch.testing.assert_close(vit(x)[-1].flatten(2).transpose(1, 2), tokens)
    row, column = 1, 1
    patch = x[:, 0, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].flatten(1)
    expected = patch @ vit.patch_embed.proj.weight.flatten(1).T + vit.patch_embed.proj.bias
    torch.testing.assert_close((vit.embed(x) - vit.positions((3, 2)))[:, 2 * row + column], expected)


def test_a_masked_patch_is_the_mask_token_at_its_position_and_others_are_as_without_a_mask():
    vit, x, token = encoder(), torch.rand(2, 1, 24, 24), torch.randn(16)
    mask = torch.rand(2, 9, generator=torch.Generator().manual_seed(1)) < 0.5
    masked = vit.embed(x, mask, token)
    torch.testing.assert_close(masked[mask], (token + vit.positions((3, 3)).expand(2, -1, -1))[mask])
    torch.testing.assert_close(masked[~mask], vit.embed(x)[~mask])
    assert not torch.allclose(vit.tokens(x, mask, token)[1], vit.tokens(x)[1])


@pytest.mark.parametrize("dims", [2, 3])
def test_positions_of_the_stored_grid_are_those_stored_and_interpolating_to_it_changes_nothing(dims):
    vit = encoder(spatial_dims=dims)
    assert torch.equal(vit.positions(vit.stored), vit.pos_embed[:, 1:])
    stored, vit.stored = list(vit.stored), Unequal(vit.stored)
    torch.testing.assert_close(vit.positions(stored), vit.pos_embed[:, 1:])


def cubic(x: float, a: float = -0.75) -> float:
    """Keys' kernel, https://doi.org/10.1109/TASSP.1981.1163711, with the parameter of torch."""
    x = abs(x)
    return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0


@pytest.mark.parametrize(("dims", "kernel"), [(2, cubic), (3, lambda x: max(0, 1 - abs(x)))])
def test_positions_on_a_finer_grid_are_interpolated_at_the_centres_of_its_patches(dims, kernel):
    vit = encoder(spatial_dims=dims, grid=6)
    inner = range(3, 6)  # of 9 patches, where no kernel reaches the border of the 6
    weights = torch.tensor([[kernel((fine + 0.5) * 6 / 9 - 0.5 - stored) for stored in range(6)] for fine in inner])
    expected = vit.pos_embed[0, 1:].unflatten(0, (6,) * dims)
    for axis in range(dims):
        expected = torch.tensordot(weights, expected, ([1], [axis])).movedim(0, axis)
    fine = vit.positions((9,) * dims).unflatten(1, (9,) * dims)[0]
    torch.testing.assert_close(fine[(slice(3, 6),) * dims], expected)


@pytest.mark.parametrize("sides", [(5, 4), (2, 3, 4)])
def test_positions_that_are_one_constant_stay_so_on_another_grid(sides):
    vit = encoder(spatial_dims=len(sides))
    vit.pos_embed.data[:] = torch.randn(16)
    torch.testing.assert_close(vit.positions(sides), vit.pos_embed[:, :1].expand(1, torch.Size(sides).numel(), 16))


def test_padding_to_whole_patches_is_that_with_zeros():
    vit, x = encoder(), torch.rand(2, 1, 19, 13)
    for own, padded in zip(vit(x), vit(F.pad(x, (0, 3, 0, 5))), strict=True):
        torch.testing.assert_close(own, padded)


@pytest.mark.parametrize("patch", [8, 16, 32])
@pytest.mark.parametrize("sides", [(40, 37), (16, 33, 20)])
def test_logits_have_the_sides_of_the_input_for_every_patch(sides, patch):
    net = UNETR(2, 3, Config(**(SMALL | {"spatial_dims": len(sides), "patch": patch})))
    logits = net(torch.rand(1, 2, *sides))
    assert logits.shape == (1, 3, *sides)


def test_gradient_reaches_every_parameter_in_3d():
    torch.manual_seed(0)
    net = UNETR(1, 3, Config(**(SMALL | {"spatial_dims": 3})))
    net(torch.rand(1, 1, 16, 24, 16)).square().mean().backward()
    assert not [key for key, p in net.named_parameters() if p.grad is None or not p.grad.any()]


def test_drop_path_leaves_the_expectation_and_evaluation_alone():
    torch.manual_seed(0)
    block, x = Block(16, 2, drop_path=0.5), torch.randn(1, 3, 16)
    block.mlp = nn.Identity()
    nn.init.normal_(block.attn.proj.bias)
    branch = block.attn(block.norm1(x))
    x = x.expand(4000, -1, -1)
    block.norm2 = nn.Module()
    block.norm2.forward = torch.zeros_like  # the second branch adds nothing
    added = (block(x) - x)[:, 0]
    kept = added.abs().sum(1) > 1e-6
    torch.testing.assert_close(added[kept], 2 * branch[:, 0].expand(int(kept.sum()), -1), rtol=1e-4, atol=1e-5)
    assert 0.46 < float(kept.float().mean()) < 0.54
    torch.testing.assert_close(block.eval()(x), x + branch)


def test_drop_path_rises_linearly_from_0():
    assert [block.drop_path for block in encoder(drop_path=0.3).blocks] == pytest.approx([0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    "wrong", [{"patch": 12}, {"depth": 6}, {"heads": 5}, {"drop_path": 1.0}, {"width": 0}, {"mlp_ratio": 0}]
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}( is)? {next(iter(wrong.values()))}"):
        Config(**wrong)
