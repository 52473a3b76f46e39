"""models.wrap on diffusers' models with random weights: bit for bit what a call of the model itself gives."""

import functools

import numpy as np
import pytest
from nets import as_numpy, aten_ops, torch

from pyguide import models


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


BLOCKS = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 8}
CROSS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}


def unet_condition(diffusers):
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(in_channels=9, out_channels=4, **BLOCKS, **CROSS)
    return unet, torch.randn(3, 9, 8, 8), {"encoder_hidden_states": torch.randn(3, 5, 12)}


def unet_added(diffusers):
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        **BLOCKS,
        **CROSS,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 10,
    )
    added = {"text_embeds": torch.randn(3, 10), "time_ids": torch.rand(3, 6) * 100}
    return unet, torch.randn(3, 4, 8, 8), {"encoder_hidden_states": torch.randn(3, 5, 12), "added_cond_kwargs": added}


def unet_plain(diffusers):
    torch.manual_seed(0)
    types = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = diffusers.UNet2DModel(
        in_channels=2, out_channels=4, num_class_embeds=10, attention_head_dim=4, **BLOCKS, **types
    )
    return unet, torch.randn(3, 2, 8, 8), {"class_labels": torch.tensor([1, 2, 9])}


def sd3(diffusers):
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        out_channels=4,
        pos_embed_max_size=8,
    )
    cond = {"encoder_hidden_states": torch.randn(3, 5, 12), "pooled_projections": torch.randn(3, 10)}
    return transformer, torch.randn(3, 4, 8, 8), cond


def flux(diffusers):
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    cond = {
        "encoder_hidden_states": torch.randn(3, 5, 12),
        "pooled_projections": torch.randn(3, 10),
        "guidance": torch.full((3,), 3.5),
        "img_ids": torch.rand(6, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    return transformer, torch.randn(3, 6, 16), cond


@pytest.mark.parametrize(
    ("make", "x_name", "channel_dim", "channels"),
    [
        (unet_condition, "sample", 1, (9, 4)),
        (unet_added, "sample", 1, (4, 4)),
        (unet_plain, "sample", 1, (2, 4)),
        (sd3, "hidden_states", 1, (4, 4)),
        (flux, "hidden_states", -1, (16, 16)),
    ],
)
def test_diffusers_models(diffusers, make, x_name, channel_dim, channels):
    net, x, cond = make(diffusers)
    t = torch.tensor([999.0, 500.0, 1.0]) / (1000 if make is flux else 1)
    model = models.wrap(net, channel_dim=channel_dim, time="unit" if make is flux else "timestep")
    want = net(**{x_name: x}, timestep=t, **cond).sample
    got = model(x, t, **cond)
    assert torch.equal(got, want)
    assert not got.requires_grad
    assert (model.in_channels, model.out_channels, model.dtype) == (*channels, "float32")
    # conditions are seen at all
    name = next(iter(cond))
    assert not torch.equal(model(x, t, **{**cond, name: cond[name].flip(0)}), want)
    as_arrays = model(x.numpy(), t.numpy(), **as_numpy(cond))
    assert np.array_equal(as_arrays, want.detach().numpy())
    with torch.no_grad():
        bare = aten_ops(lambda: net(**{x_name: x}, timestep=t, **cond, return_dict=False))
    assert aten_ops(lambda: model(x, t, **cond)) == bare


def test_diffusers_output_of_a_callable(diffusers):
    unet, x, cond = unet_condition(diffusers)
    t = torch.full((3,), 7.0)
    want = unet(x, t, **cond).sample
    assert torch.equal(models.wrap(functools.partial(unet, **cond))(x, t), want)
    assert torch.equal(models.wrap(lambda x, t, **cond: unet(x, t, **cond))(x, t, **cond), want)


def test_diffusers_renamed_condition(diffusers):
    unet, x, cond = unet_condition(diffusers)
    t = torch.full((3,), 7.0)
    model = models.wrap(unet, inputs={"text": "encoder_hidden_states"})
    assert torch.equal(model(x, t, text=cond["encoder_hidden_states"]), unet(x, t, **cond).sample)


def test_pipeline_is_refused(diffusers):
    unet, *_ = unet_plain(diffusers)
    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    with pytest.raises(TypeError, match=r"pipeline DDPMPipeline.*\.unet"):
        models.wrap(pipe)


def test_exported_program_of_diffusers(diffusers):
    unet, x, cond = unet_plain(diffusers)
    batch = torch.export.Dim("batch", min=2, max=16)
    program = torch.export.export(
        unet,
        (x, torch.tensor([1, 2, 3])),
        {**cond, "return_dict": False},
        dynamic_shapes={"sample": {0: batch}, "timestep": {0: batch}, "class_labels": {0: batch}, "return_dict": None},
    )
    model = models.wrap(program)
    assert (model.time_dtype, model.in_channels, model.out_channels) == ("int64", 2, 4)
    # rounded to the nearest, never truncated
    got = model(x[:2], torch.tensor([998.7, 0.4]), class_labels=cond["class_labels"][:2])
    want = unet(x[:2], torch.tensor([999, 0]), class_labels=cond["class_labels"][:2]).sample
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="time: 'unit' is a fraction"):
        models.wrap(program, time="unit")
