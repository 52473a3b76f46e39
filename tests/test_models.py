"""models.wrap on modules and callables: each answers as the bare model does, at no operator more."""

import inspect
import os
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from nets import Net, as_numpy, aten_ops, nn, tensors, torch

from pyguide import models


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net()


def test_module(net):
    x, t, cond = tensors()
    model = models.wrap(net)
    want = net(x, t, **cond)
    assert want.requires_grad
    got = model(x, t, **cond)
    assert torch.equal(got, want)
    assert not got.requires_grad
    assert not got.is_inference()
    assert torch.is_grad_enabled()
    assert torch.equal(model(x, t), net(x, t))
    assert (model.time, model.channel_dim, model.dtype, model.array) == ("timestep", 1, "float32", "torch")
    assert (model.in_channels, model.out_channels, model.time_dtype) == (None, None, None)
    assert "Net" in repr(model)


def test_grad_mode_is_restored_and_training_mode_kept(net):
    x, t, _ = tensors()
    model = models.wrap(net)
    with pytest.raises(TypeError, match="nonsense"):
        model(x, t, nonsense=x)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        model(x, t)
        assert not torch.is_grad_enabled()
    assert net.training
    with torch.no_grad():
        got = model(x.requires_grad_(), t)
    assert not got.requires_grad


def test_dtype_is_read_when_asked():
    model = models.wrap(Net())
    model.obj.to(torch.bfloat16)
    assert model.dtype == "bfloat16"
    assert models.wrap(NoParameters()).dtype is None


class NoParameters(nn.Module):
    def forward(self, x, t):
        return x * 2


class TimeFirst(nn.Module):
    def forward(self, t, x, scale=1.0):
        return x * t[:, None, None, None] * scale


class TimeLast(nn.Module):
    def forward(self, x, context, timesteps):
        return (x - context) * timesteps[:, None, None, None], "second output"


class Renamed(nn.Module):
    def forward(self, noisy, labels, noise_level):
        return noisy * noise_level[:, None, None, None] + labels


class KeywordOnly(nn.Module):
    def forward(self, *, x, t, **cond):
        return x + t[:, None, None, None] + cond["c"]


@pytest.mark.parametrize(
    ("module", "inputs", "cond", "want"),
    [
        (TimeFirst(), None, {"scale": 3.0}, lambda x, t: x * t * 3.0),
        (TimeLast(), None, {"context": 0.5}, lambda x, t: (x - 0.5) * t),
        (Renamed(), {"x": "noisy", "t": "noise_level", "y": "labels"}, {"y": 2.0}, lambda x, t: x * t + 2.0),
        (Renamed(), {"t": "noise_level", "y": "labels"}, {"y": 2.0}, lambda x, t: x * t + 2.0),
        (Renamed(), {"x": "noisy", "y": "labels"}, {"y": 2.0}, lambda x, t: x * t + 2.0),
        (KeywordOnly(), None, {"c": 1.0}, lambda x, t: x + t + 1.0),
        (KeywordOnly(), {"d": "c"}, {"d": 1.0}, lambda x, t: x + t + 1.0),
    ],
)
def test_x_and_t_find_their_parameters(module, inputs, cond, want):
    x, t, _ = tensors()
    expected = want(x, t[:, None, None, None])
    assert torch.equal(models.wrap(module, inputs=inputs)(x, t, **cond), expected)
    # the same through a function with the same parameters
    assert torch.equal(models.wrap(module.forward, inputs=inputs)(x, t, **cond), expected)


def test_compiled_module_is_read_through(net):
    class Diffusers(nn.Module):
        def forward(self, sample, encoder, timestep, return_dict=True):
            assert not return_dict
            return (sample * timestep[:, None, None, None] + encoder,)

    x, t, _ = tensors()
    compiled = torch.compile(Diffusers(), backend="eager")
    assert torch.equal(models.wrap(compiled)(x, t, encoder=1.0), x * t[:, None, None, None] + 1.0)


def test_wrapped_model_compiles_without_a_break(net):
    x, t, cond = tensors()
    model = models.wrap(net)
    compiled = torch.compile(lambda x, t: model(x, t, **cond) * 2, fullgraph=True, backend="eager")
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert torch.equal(compiled(x, t), model(x, t, **cond) * 2)
            assert not compiled(x, t).requires_grad


@pytest.mark.parametrize("grad", [True, False])
def test_wrapper_adds_no_operator(net, grad):
    x, t, cond = tensors()
    model = models.wrap(net)
    with torch.no_grad():
        bare = aten_ops(lambda: net(x, t, **cond))
    assert bare
    with torch.set_grad_enabled(grad):
        assert aten_ops(lambda: model(x, t, **cond)) == bare
        # negative control: the count sees one operator more
        assert aten_ops(lambda: model(x, t.long().float(), **cond)) != bare


def test_no_signature_work_in_a_call(net, monkeypatch):
    x, t, cond = tensors()
    model = models.wrap(net)

    def refuse(*_, **__):
        raise AssertionError("inspect.signature during a call")

    monkeypatch.setattr(inspect, "signature", refuse)
    model(x, t, **cond)


def test_python_frames_of_a_call(net):
    """The overhead, counted: the wrapper's own frames and built-in calls with grad off."""
    x, t, cond = tensors()
    model = models.wrap(net)
    calls = []
    sep = os.sep

    def trace(frame, event, argument):
        here = f"{sep}pyguide{sep}models{sep}" in frame.f_code.co_filename
        if here and event in ("call", "c_call"):
            calls.append(argument.__name__ if event == "c_call" else frame.f_code.co_name)

    with torch.no_grad():
        sys.setprofile(trace)
        try:
            model(x, t, **cond)
        finally:
            sys.setprofile(None)
    assert [name for name in calls if name.startswith("_")] == ["__call__", "_no_grad", "_run"]
    assert len(calls) <= 8, calls


def test_numpy_through_a_torch_model(net):
    x, t, cond = tensors()
    want = net(x, t, **cond).detach().numpy()
    got = models.wrap(net)(x.numpy(), t.numpy(), **as_numpy(cond))
    assert isinstance(got, np.ndarray)
    assert np.array_equal(got, want)


def test_numpy_crosses_without_a_copy():
    class Same(nn.Module):
        def forward(self, x, t):
            return x

    model = models.wrap(Same())
    x, t = np.zeros((2, 4, 8, 8), np.float32), np.zeros(2, np.float32)
    assert np.shares_memory(model(x, t), x)
    frozen = np.broadcast_to(np.float32(3), (2, 4, 8, 8))
    for odd in (frozen, x[:, ::-1]):
        assert np.array_equal(model(odd, t), odd)
    assert not np.shares_memory(model(frozen, t), frozen)


def test_numpy_and_bfloat16():
    class Half(nn.Module):
        def forward(self, x, t):
            return x.bfloat16()

    x = np.zeros((2, 4, 8, 8), np.float32)
    with pytest.raises(TypeError, match="bfloat16, which numpy does not have"):
        models.wrap(Half())(x, x[:, 0, 0, 0])


# ---- callables, wrapped models, errors ------------------------------------------------------------------------------


def test_callable(net):
    x, t, cond = tensors()
    model = models.wrap(lambda x, t, **cond: net(x, t, **cond))
    got = model(x, t, **cond)
    assert torch.equal(got, net(x, t, **cond))
    assert not got.requires_grad
    assert (model.array, model.dtype, model.in_channels) == (None, None, None)

    def numpy_model(x, t, c):
        return x * t[:, None] + c

    a, b = np.ones((3, 2)), np.arange(3.0)
    model = models.wrap(numpy_model, inputs={"bias": "c"}, time="sigma", channel_dim=-1)
    assert np.array_equal(model(a, b, bias=1.0), numpy_model(a, b, 1.0))
    assert (model.time, model.channel_dim) == ("sigma", -1)
    assert models.wrap(np.hypot)(np.array([3.0]), np.array([4.0])) == 5  # no signature that Python can tell


def test_condition_may_have_any_name():
    model = models.wrap(lambda x, t, **cond: x + sum(cond.values()))
    with pytest.raises(TypeError, match="multiple values"):
        model(np.zeros(2), np.zeros(2), x=1.0)
    assert model(np.zeros(2), np.zeros(2), self=1.0, obj=2.0).tolist() == [3.0, 3.0]


def test_wrapped_again(net):
    model = models.wrap(net, time="unit", inputs={"label": "y"}, channel_dim=-1)
    assert models.wrap(model) is model
    assert models.wrap(model, time="unit", channel_dim=-1, inputs={"label": "y"}) is model
    again = models.wrap(model, time="timestep")
    assert again is not model
    assert (again.time, again.channel_dim, again.inputs, again.obj) == ("timestep", -1, {"label": "y"}, net)
    assert (model.time, models.wrap(model, channel_dim=1).channel_dim) == ("unit", 1)
    assert models.wrap(again) is again
    assert type(models.wrap(net).time) is str
    assert type(models.wrap(net).channel_dim) is int
    parameters = inspect.signature(models.wrap).parameters
    assert (parameters["time"].default, parameters["channel_dim"].default) == ("timestep", 1)


def test_wrapped_model_pickles(net):
    x, t, cond = tensors()
    model = models.wrap(net)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x, t, **cond), model(x, t, **cond))


@pytest.mark.parametrize("y", [None, 3, (), ("no array",), {"sample": 1}])
def test_output_that_is_no_array(y):
    with pytest.raises(TypeError, match="model output: expected an array"):
        models.wrap(lambda x, t: y)(np.zeros(2), np.zeros(2))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"time": "lambda"}, ValueError, "time: expected one of timestep, unit, sigma, c_noise; got 'lambda'"),
        ({"channel_dim": 0}, ValueError, "channel_dim: .*got 0"),
        ({"channel_dim": 1.0}, ValueError, "channel_dim: .*got 1.0"),
        ({"channel_dim": True}, ValueError, "channel_dim: .*got True"),
        ({"inputs": "x"}, TypeError, "inputs: expected a mapping .*got str"),
        ({"inputs": {"x": 1}}, TypeError, "inputs: expected names as strings, got 'x': 1"),
        (
            {"inputs": {"c": "z"}},
            ValueError,
            r"inputs: 'z' \(for 'c'\) is not an input of the model, which has x, t, y",
        ),
        ({"inputs": {"c": "y", "d": "y"}}, ValueError, "inputs: 'y' is given to more than one of c, d"),
        ({"inputs": {"added.gain": "y"}}, ValueError, "inputs: 'added.gain': a nested condition"),
    ],
)
def test_arguments_are_checked(net, options, error, match):
    with pytest.raises(error, match=match):
        models.wrap(net, **options)


@pytest.mark.parametrize("obj", [3, None, object(), np.zeros(3), {"model": 1}])
def test_unknown_object(obj):
    with pytest.raises(TypeError, match=rf"obj: got .*{type(obj).__name__}, expected an nn.Module"):
        models.wrap(obj)


def test_class_and_models_without_time():
    with pytest.raises(TypeError, match="obj: got the class Net, expected an instance"):
        models.wrap(Net)
    with pytest.raises(TypeError, match=r"called as model\(x, t, \*\*cond\), but this one takes \(x\)"):
        models.wrap(lambda x: x)
    with pytest.raises(TypeError, match=r"takes \(input\)"):
        models.wrap(nn.Linear(2, 2))

    def timeless(y, *, sample):
        return sample

    with pytest.raises(TypeError, match="cannot tell x and t among the model's inputs"):
        models.wrap(lambda *, sample: sample)
    assert models.wrap(timeless)(np.ones(1), np.zeros(1)) == 1  # y is the only place for t


@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated:DeprecationWarning")
def test_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"obj: no such file: .*net\.pt2"):
        models.wrap(tmp_path / "net.pt2")
    with pytest.raises(FileNotFoundError, match=r"net\.onnx"):
        models.wrap(str(tmp_path / "net.onnx"))
    with pytest.raises(
        ValueError, match=r"expected a path to a \.pt2, \.pt, \.ts or \.onnx file, got .*net\.safetensors"
    ):
        models.wrap(tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="from_pretrained"):
        models.wrap(tmp_path)
    for name in ("weights.pt", "broken.pt2"):
        torch.save({"a": torch.zeros(1)}, tmp_path / name)
        with pytest.raises(ValueError, match=r"is not a (TorchScript module|torch.export program)"):
            models.wrap(tmp_path / name)


def test_torch_is_not_imported_and_its_absence_has_a_name(tmp_path):
    """In a process without torch: numpy callables work, and a .pt file says what to install."""
    (tmp_path / "net.pt").write_bytes(b"")
    (tmp_path / "net.onnx").write_bytes(b"")
    script = """
        import sys, numpy as np
        from pyguide import models
        model = models.wrap(lambda x, t: x + t)
        assert model(np.ones(2), np.ones(2)).tolist() == [2, 2]
        assert not {"torch", "onnxruntime"} & set(sys.modules), "imported too early"
        sys.modules["torch"] = sys.modules["onnxruntime"] = None
        assert model(np.ones(2), np.ones(2)).tolist() == [2, 2]
        for name in ("net.pt", "net.onnx"):
            try:
                models.wrap(name)
            except ImportError as error:
                print(error)
    """
    run = [sys.executable, "-c", textwrap.dedent(script)]
    path = os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert "pip install pyguide[torch]" in done.stdout
    assert "pip install pyguide[onnx]" in done.stdout
