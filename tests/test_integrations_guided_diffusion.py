"""The adapter for guided-diffusion: flags as plans, its loops with the caller's own functions, its evaluator's files.

What the loops return is compared with guided-diffusion's own results, see test_peers_guided_diffusion.py.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from peers.guided_diffusion_cases import SHAPE, Case, Model, classifier, distance, gradient_of, labels  # noqa: E402
from peers.guided_diffusion_stored import CASES, contents, place, recorded, result, told  # noqa: E402

import pyguide  # noqa: E402
from pyguide.integrations import guided_diffusion  # noqa: E402
from pyguide.integrations.guided_diffusion import Diffusion, save_npz  # noqa: E402
from pyguide.schedules.respacing import respace  # noqa: E402

F32, F64 = torch.float32, torch.float64


def loop(case: Case, dtype: Any = F64, **changes: Any) -> Any:
    """A case run as scripts run it: the flags to a diffusion, the rest to its loop."""
    diffusion = Diffusion(diffusion_steps=case.diffusion_steps, **case.flags())
    start, noises = recorded(dtype)
    arguments: dict[str, Any] = {
        "noise": start,
        "clip_denoised": case.clip_denoised,
        "cond_fn": gradient_of(case),
        "model_kwargs": {"y": labels()},
    }
    if case.use_ddim:
        arguments["eta"] = case.eta
    plan = diffusion.plan(use_ddim=case.use_ddim, clip_denoised=case.clip_denoised, eta=case.eta)
    if plan.stochastic_rows:
        arguments["noises"] = list(noises[: len(plan.stochastic_rows)])
    sample = diffusion.ddim_sample_loop if case.use_ddim else diffusion.p_sample_loop
    model = changes.pop("model", Model(case))
    return sample(model, SHAPE, **{**arguments, **changes})


# every flag with each of its values
FLAGS = [
    "p-small-linear",
    "p-large-cosine",
    "p-range-linear-unclipped",
    "p-range-cosine-all",
    "p-large-xstart",
    "p-range-rescaled-1000",
    "p-range-rescaled-4000",
    "p-range-rescaled-100",
    "p-two-steps",
    "p-large-linear-unguided",
    "ddim-0-cosine",
    "ddim-0.5-xstart-unclipped",
    "ddim-1-linear-unclipped",
    "ddim-0-rescaled-4000",
    "ddim-0-range",
]


@pytest.mark.parametrize("name", FLAGS)
def test_loops_return_what_those_of_guided_diffusion_return(name: str) -> None:
    assert distance(loop(CASES[name]), result(name, F64)) <= 1e-9


def test_every_flag_is_among_them() -> None:
    flags = ["diffusion_steps", "noise_schedule", "learn_sigma", "sigma_small", "predict_xstart", "rescale_timesteps"]
    for flag in [*flags, "use_ddim", "clip_denoised", "eta"]:
        assert {getattr(CASES[name], flag) for name in FLAGS} == {getattr(case, flag) for case in CASES.values()}, flag


@pytest.mark.parametrize("name", ["p-range-linear-unclipped", "p-range-rescaled-1000", "ddim-0-rescaled-4000"])
def test_the_callers_functions_see_what_its_own_see(name: str) -> None:
    """x, the timesteps of the respaced map (whole, or rescaled in float32) and the model_kwargs as they were given."""
    case, dtype = CASES[name], F32 if contents()["told_float"][place(name)] else torch.int64
    seen: dict[str, list[Any]] = {"model": [], "cond_fn": []}

    def listening(who: str, function: Any) -> Any:
        def called(x: Any, t: Any, y: Any) -> Any:
            assert x.dtype == F32
            assert x.shape == SHAPE
            assert t.dtype == dtype
            assert torch.equal(y, labels())
            assert not torch.is_grad_enabled()
            seen[who].append(t.clone())
            return function(x, t, y)

        return called

    model, cond_fn = listening("model", Model(case)), listening("cond_fn", gradient_of(case))
    loop(case, F32, model=model, cond_fn=cond_fn)
    times = torch.from_numpy(told(name)[:, None]).float().expand(-1, 2)
    for heard in seen.values():
        torch.testing.assert_close(torch.stack(heard).float(), times, rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("name", ["p-range-cosine", "ddim-0.5-cosine"])
def test_a_classifier_in_place_of_a_cond_fn(name: str) -> None:
    """Its gradient comes from the kernel; the labels are y, and classifier_scale is the scale."""
    case = CASES[name]
    ours = loop(case, cond_fn=None, classifier=classifier, classifier_scale=case.scale)
    assert distance(ours, result(name, F64)) <= 1e-9
    assert distance(loop(case, cond_fn=None, classifier=classifier), result(name, F64)) > 1e-3  # its scale is 1 then


def test_a_sampler_of_the_same_run() -> None:
    """What the loops are made of: for seeds, streams and graphs."""
    case = CASES["p-range-cosine"]
    diffusion = Diffusion(**case.flags())
    start, _ = recorded(F32)
    sampler = diffusion.sampler(Model(case), gradient_of(case), backend="reference", check="flag")
    assert isinstance(sampler, pyguide.Sampler)
    assert sampler.plan is diffusion.plan()
    x = sampler(start, cond={"y": labels()}, seeds=5)
    assert "reference" in repr(sampler)
    looped = diffusion.p_sample_loop(
        Model(case), SHAPE, start, cond_fn=gradient_of(case), model_kwargs={"y": labels()}, seeds=5, backend="reference"
    )
    assert torch.equal(x, looped)


def test_noise_is_drawn_where_none_is_given() -> None:
    """From torch's global generator, on the device of a module's parameters, without model_kwargs and cond_fn."""
    diffusion = Diffusion(timestep_respacing="10")
    module = torch.nn.Conv2d(3, 3, 1)
    module.forward = lambda x, t: x * module.bias[:, None, None] + t[:, None, None, None] / 1000
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(diffusion.p_sample_loop(module, (2, 3, 4, 4)))
    assert drawn[0].shape == (2, 3, 4, 4)
    assert drawn[0].dtype == F32
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert diffusion.ddim_sample_loop(lambda x, t: x, [2, 3, 4], device="cpu").shape == (2, 3, 4)


def test_a_loop_keeps_its_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts call a loop for every batch; for another model, or another flag, there is another sampler."""
    made: list[Any] = []
    own = guided_diffusion.Sampler
    monkeypatch.setattr(guided_diffusion, "Sampler", lambda *args, **kwargs: made.append(args) or own(*args, **kwargs))
    diffusion, case = Diffusion(timestep_respacing="3"), Case()
    model, cond_fn, kwargs = Model(case), gradient_of(case), {"y": labels()}
    for _ in range(3):
        diffusion.p_sample_loop(model, SHAPE, cond_fn=cond_fn, model_kwargs=kwargs)
    assert len(made) == 1
    diffusion.p_sample_loop(model, SHAPE, cond_fn=None, model_kwargs=kwargs)
    diffusion.p_sample_loop(model, SHAPE, clip_denoised=False, model_kwargs=kwargs)
    diffusion.ddim_sample_loop(model, SHAPE, model_kwargs=kwargs)
    diffusion.ddim_sample_loop(Model(case), SHAPE, model_kwargs=kwargs)
    assert [args[1].solver for args in made] == ["ddpm", "ddpm", "ddpm", "ddim", "ddim"]


@pytest.mark.parametrize("respacing", ["", "25", "ddim25", "10,10,5"])
@pytest.mark.parametrize("flags", [{}, {"sigma_small": True}, {"learn_sigma": True}, {"predict_xstart": True}])
def test_flags_are_arguments_of_compile(respacing: str, flags: dict[str, Any]) -> None:
    diffusion = Diffusion(diffusion_steps=100, noise_schedule="cosine", timestep_respacing=respacing, **flags)
    times = respace(respacing, 100) if respacing else range(100)[::-1]
    path = pyguide.schedules.cosine(100).path(timesteps=times)
    prediction = "sample" if flags.get("predict_xstart") else "epsilon"
    variance = {"learn_sigma": "learned_range", "sigma_small": "small"}.get(next(iter(flags), ""), "large")
    assert diffusion.plan() == pyguide.compile("ddpm", path, prediction=prediction, clip=1.0, variance=variance)
    options: dict[str, Any] = {"eta": 0.5, "use_clipped_model_output": True}
    ddim = pyguide.compile("ddim", path, prediction=prediction, **options)
    assert diffusion.plan(use_ddim=True, clip_denoised=False, eta=0.5) == ddim


def test_flags_of_training_have_no_effect() -> None:
    flags = {"timestep_respacing": "25", "learn_sigma": True}
    assert Diffusion(**flags, use_kl=True, rescale_learned_sigmas=True).plan() == Diffusion(**flags).plan()
    assert Diffusion(timestep_respacing="25").plan() != Diffusion(**flags).plan()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"noise_schedule": "sigmoid"}, 'noise_schedule: expected "linear" or "cosine"'),
        ({"diffusion_steps": 1000.0}, "diffusion_steps: expected an integer"),
        ({"diffusion_steps": 20}, "diffusion_steps: the linear schedule .* at least 21, got 20"),
        ({"diffusion_steps": 1, "noise_schedule": "cosine"}, "diffusion_steps: expected an integer >= 2"),
        ({"timestep_respacing": "ddim300"}, "timestep_respacing: no whole stride"),
        ({"timestep_respacing": "1001"}, "timestep_respacing: section 0"),
        ({"timestep_respacing": [10, 10]}, "timestep_respacing: expected a string"),
        ({"timestep_respacing": "fast27"}, "timestep_respacing: expected a respacing string"),
        ({"learn_sigma": "True"}, "learn_sigma: expected True or False"),
        ({"sigma_small": None}, "sigma_small: expected True or False"),
        ({"predict_xstart": 1}, "predict_xstart: expected True or False"),
        ({"rescale_timesteps": 1}, "rescale_timesteps: expected True or False"),
        ({"use_kl": "no"}, "use_kl: expected True or False"),
        ({"rescale_learned_sigmas": 0}, "rescale_learned_sigmas: expected True or False"),
    ],
)
def test_errors_name_the_flag(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Diffusion(**flags)


def test_unknown_flags_are_errors() -> None:
    with pytest.raises(TypeError, match="image_size"):
        Diffusion(image_size=64)
    for name in ("use_ddim", "num_samples"):  # the first is for the name of the loop to say
        with pytest.raises(TypeError, match=name):
            Diffusion(timestep_respacing="5").p_sample_loop(Model(Case()), SHAPE, **{name: True})
    assert Diffusion(diffusion_steps=21).plan().evaluations == 21  # the smallest that a linear schedule has


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"use_ddim": 1}, "use_ddim: expected True or False"),
        ({"clip_denoised": None}, "clip_denoised: expected True or False"),
        ({"eta": 0.5}, "eta: p_sample_loop has none"),
        ({"eta": 1.5, "use_ddim": True}, "eta: expected a number in"),
        ({"cond_fn": gradient_of(Case()), "classifier": classifier}, "classifier: expected a cond_fn or a classifier"),
        ({"cond_fn": gradient_of(Case()), "classifier_scale": 2.0}, "classifier_scale: .* cond_fn"),
        ({"classifier_scale": 2.0}, "classifier_scale: it belongs to a classifier"),
        ({"classifier": classifier, "classifier_scale": float("nan")}, "scale: expected a finite number"),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Diffusion(timestep_respacing="5").sampler(Model(Case()), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"denoised_fn": torch.tanh}, "denoised_fn: "),
        ({"noise": torch.zeros(2, 3, 5, 5)}, r"noise: expected the shape \(2, 3, 4, 4\), got \(2, 3, 5, 5\)"),
        ({"classifier": classifier, "model_kwargs": {}}, 'model_kwargs: a classifier needs its labels as "y"'),
    ],
)
def test_loops_refuse(arguments: dict[str, Any], message: str) -> None:
    called: list[Any] = []
    for sample in (Diffusion().p_sample_loop, Diffusion().ddim_sample_loop):
        with pytest.raises(ValueError, match=message):
            sample(lambda *given: called.append(given), SHAPE, **arguments)
    assert not called


def test_channels_that_do_not_fit_learn_sigma() -> None:
    """ddim leaves the variance channels out; a model that has none was not trained with learn_sigma."""
    diffusion = Diffusion(timestep_respacing="5", learn_sigma=True)
    with pytest.raises(ValueError, match=r"model: expected an output of shape \(2, 6, 4, 4\), got \(2, 3, 4, 4\)"):
        diffusion.ddim_sample_loop(lambda x, t: x, SHAPE)
    with pytest.raises(ValueError, match="model: "):
        diffusion.p_sample_loop(lambda x, t: x, SHAPE)


# ---- what its evaluator reads ---------------------------------------------------------------------------------
def test_images_are_what_the_evaluator_reads(tmp_path: Path) -> None:
    """Its own reader, run when the vectors were made, took these pixels from an npz of save_npz."""
    images, classes = torch.from_numpy(contents()["images"]), torch.from_numpy(contents()["labels"])
    save_npz(tmp_path / "samples.npz", images, classes)
    with np.load(tmp_path / "samples.npz") as file:
        assert sorted(file) == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(file["arr_0"], contents()["evaluated"])
        np.testing.assert_array_equal(file["arr_1"], contents()["labels"])
        assert file["arr_0"].dtype == np.uint8
        assert file["arr_1"].dtype == np.int64
    # of 0 .. 255 in steps of 1/127.5 what lies in between is cut off, as what is outside of [-1, 1]
    place = (contents()["images"].astype(np.float64).transpose(0, 2, 3, 1) + 1) * 127.5
    clear = np.abs(place - np.round(place)) > 1e-4
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(contents()["evaluated"][clear], np.floor(place.clip(0, 255))[clear])


def test_the_npz_can_be_streamed(tmp_path: Path) -> None:
    """As the evaluator does without loading all of it: a header of version 1, C order, bytes that follow it."""
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (7, 3, 5, 4)).astype(np.float32)
    save_npz(str(tmp_path / "samples"), images)  # numpy adds the suffix
    with zipfile.ZipFile(tmp_path / "samples.npz") as archive:
        assert archive.namelist() == ["arr_0.npy"]
        member = io.BytesIO(archive.read("arr_0.npy"))
    assert np.lib.format.read_magic(member) == (1, 0)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
    assert (shape, fortran, dtype) == ((7, 5, 4, 3), False, np.uint8)
    first = np.frombuffer(member.read(5 * 4 * 3), np.uint8).reshape(5, 4, 3)
    np.testing.assert_array_equal(first, ((images[0] + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_pixels_are_exact_in_every_precision(tmp_path: Path, dtype: Any) -> None:
    """Eighths are exact in all of them: 127.5 (x + 1) by hand."""
    eighths = torch.arange(-10, 11)
    save_npz(tmp_path / "a.npz", (eighths / 8).to(dtype).reshape(1, 1, 3, 7))
    wanted = [min(max((127.5 * (k + 8)) // 8, 0), 255) for k in eighths.tolist()]
    with np.load(tmp_path / "a.npz") as file:
        assert file["arr_0"].ravel().tolist() == wanted


IMAGES = np.zeros((2, 3, 4, 4), np.float32)


@pytest.mark.parametrize(
    ("images", "classes", "error", "message"),
    [
        (IMAGES[0], None, ValueError, r"images: expected \[N, C, H, W\]"),
        (IMAGES.astype(np.uint8), None, ValueError, r"images: expected \[N, C, H, W\] of floating point"),
        (np.where(np.arange(4) == 1, np.nan, IMAGES), None, ValueError, "images: 2 of 2 have NaN"),
        (IMAGES.tolist(), None, TypeError, "images: expected a numpy array or a torch tensor, got list"),
        (IMAGES, np.zeros(3, int), ValueError, "labels: expected one whole number for each of 2"),
        (IMAGES, np.zeros(2), ValueError, "labels: expected one whole number"),
        (IMAGES, [0, 1], TypeError, "labels: expected a numpy array"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(
    tmp_path: Path, images: Any, classes: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        save_npz(tmp_path / "samples.npz", images, classes)
    assert not list(tmp_path.iterdir())
