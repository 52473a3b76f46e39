"""The sampler around real models: a diffusers UNet against its own pipeline loop, ONNX, torch.export, TorchScript."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pyguide
from pyguide import CFG, Sampler, schedules

STEPS, SCALE = 8, 4.0
PATH = schedules.scaled_linear().path(STEPS, offset=1)


class Small(torch.nn.Module):
    """A convolution, a timestep and labels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)
        self.label = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        shift = self.label(labels) + torch.cos(t.to(x.dtype) / 100)[:, None]
        return self.conv(x) + shift[:, :, None, None]


@pytest.fixture(scope="module")
def small() -> Small:
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture(scope="module")
def unet():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


SCHEDULERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "steps_offset": 1}),
    "euler": ("EulerDiscreteScheduler", {"steps_offset": 1, "timestep_spacing": "leading"}),
    "unipc": ("UniPCMultistepScheduler", {"steps_offset": 0}),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_unet_against_the_loop_of_a_stock_pipeline(unet, name):
    """The whole of what StableDiffusionPipeline does around its UNet, with the stock scheduler."""
    import diffusers

    kind, options = SCHEDULERS[name]
    scheduler = getattr(diffusers, kind)(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000, **options
    )
    scheduler.set_timesteps(STEPS)
    text, empty = torch.randn(2, 5, 8), torch.zeros(2, 5, 8)
    noise = pyguide.randn(3, (2, 4, 8, 8), like=torch.empty(0))
    latents = noise * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            doubled = scheduler.scale_model_input(torch.cat([latents] * 2), t)
            out = unet(doubled, t, encoder_hidden_states=torch.cat([empty, text]), return_dict=False)[0]
            u, c = out.chunk(2)
            latents = scheduler.step(u + SCALE * (c - u), t, latents, return_dict=False)[0]

    path = schedules.scaled_linear().path(timesteps=scheduler.timesteps.tolist())
    start = noise
    if name == "euler":  # its state is ours over alpha, and it starts at sqrt(sigma^2 + 1) or sigma of it
        start = noise * float(scheduler.init_noise_sigma) * float(path.alpha[0])
    sampler = Sampler(unet, pyguide.compile(name, path), CFG(SCALE))
    got = sampler(start, cond={"encoder_hidden_states": text}, uncond={"encoder_hidden_states": empty})
    torch.testing.assert_close(got, latents, rtol=1e-4, atol=1e-4 * float(latents.abs().max()))


def _sampled(model, noise, labels):
    sampler = Sampler(model, pyguide.compile("dpmpp_2m", PATH), CFG(SCALE))
    return sampler(noise, cond={"labels": labels}, uncond={"labels": labels * 0})


def test_numpy_noise_into_a_torch_module(small):
    noise, labels = pyguide.randn(0, (3, 3, 6, 6)), np.eye(4, dtype=np.float32)[:3]
    got = _sampled(small, noise, labels)
    want = _sampled(small, torch.from_numpy(noise), torch.from_numpy(labels))
    assert isinstance(got, np.ndarray)
    assert np.array_equal(got, want.numpy())


def test_exported_scripted_and_onnx_models_sample_alike(small, tmp_path):
    noise, labels = torch.randn(3, 3, 6, 6), torch.eye(4)[:3]
    want = _sampled(small, noise, labels)
    example = (torch.zeros(4, 3, 6, 6), torch.zeros(4, dtype=torch.int64), torch.zeros(4, 4))
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(small, example, dynamic_shapes=[{0: batch}] * 3)
    torch.export.save(program, tmp_path / "small.pt2")
    torch.jit.trace(small, example).save(str(tmp_path / "small.ts"))
    torch.onnx.export(small, example, tmp_path / "small.onnx", dynamo=True, opset_version=20,
                      input_names=["x", "t", "labels"], dynamic_shapes=[{0: batch}] * 3, verbose=False)  # fmt: skip
    for suffix, bound in (("pt2", 0.0), ("ts", 0.0), ("onnx", 1e-5)):
        got = _sampled(str(tmp_path / f"small.{suffix}"), noise, labels)
        torch.testing.assert_close(got, want, rtol=bound, atol=bound * float(want.abs().max()))
    numbers = _sampled(str(tmp_path / "small.onnx"), noise.numpy(), labels.numpy())
    assert isinstance(numbers, np.ndarray)
    np.testing.assert_allclose(numbers, want.numpy(), rtol=1e-5, atol=1e-5 * float(want.abs().max()))
