"""models.wrap on graphs: torch.export programs, TorchScript modules, ONNX sessions; in memory and on disk."""

import numpy as np
import pytest
from nets import Net, as_numpy, tensors, torch

from pyguide import models


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def program(net):
    x, t, cond = tensors(4)
    batch = torch.export.Dim("batch", min=2, max=64)
    axes = {"x": {0: batch}, "t": {0: batch}, "y": {0: batch}}
    axes["added"] = {"gain": {0: batch}, "pair": {"bias": {0: batch}}}
    return torch.export.export(net, (x, t, cond["y"]), {"added": cond["added"]}, dynamic_shapes=axes)


@pytest.fixture(scope="module")
def onnx_file(program, tmp_path_factory):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    torch.onnx.export(program, dynamo=True, opset_version=20, verbose=False).save(str(path))
    return path


def make_onnx(path, inputs, nodes, output):
    """A small graph by hand: inputs {name: (onnx type, shape)}, nodes [(op, in, out, attributes)]."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op, i, o, **attributes) for op, i, o, attributes in nodes],
        "g",
        [value(name, getattr(onnx.TensorProto, kind), shape) for name, (kind, shape) in inputs.items()],
        [value("out", getattr(onnx.TensorProto, output[0]), output[1])],
    )
    opset = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), str(path))
    return str(path)


def time_onnx(path, kind="INT64", shape=("n",)):
    """out = x + t: shows exactly what arrived as t."""
    axes = [-1, 1, 1, 1] if list(shape) == ["n"] else [1, 1, 1, 1]
    onnx = pytest.importorskip("onnx")
    constant = onnx.helper.make_tensor("s", onnx.TensorProto.INT64, [4], axes)
    nodes = [
        ("Cast", ["t"], ["tf"], {"to": onnx.TensorProto.FLOAT}),
        ("Constant", [], ["s"], {"value": constant}),
        ("Reshape", ["tf", "s"], ["tr"], {}),
        ("Add", ["x", "tr"], ["out"], {}),
    ]
    dims = ["n", 4, "h", "w"]
    return make_onnx(path, {"x": ("FLOAT", dims), "t": (kind, list(shape))}, nodes, ("FLOAT", dims))


# ---- graphs on disk -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["program", "file"])
def test_exported_program(net, program, tmp_path, source):
    if source == "file":
        torch.export.save(program, tmp_path / "net.pt2")
    model = models.wrap(program if source == "program" else tmp_path / "net.pt2")
    for n in (2, 5):
        x, t, cond = tensors(n, seed=n)
        got = model(x, t, **cond)
        assert torch.equal(got, net(x, t, **cond))
        assert not got.requires_grad
    assert np.array_equal(model(x.numpy(), t.numpy(), **as_numpy(cond)), got.numpy())
    # t of another dtype is brought to the one that the graph was made for
    assert torch.equal(model(x, t.double(), **cond), got)
    facts = (model.dtype, model.time_dtype, model.in_channels, model.out_channels, model.array)
    assert facts == ("float32", "float32", 4, 4, "torch")
    with pytest.raises(TypeError, match="takes x, t, y, added; got x, t, y"):
        model(x, t, y=cond["y"])
    with pytest.raises(TypeError, match="takes x, t, y, added; got x, t, y, added, more"):
        model(x, t, **cond, more=x)
    renamed = models.wrap(program, inputs={"label": "y"})
    assert torch.equal(renamed(x, t, label=cond["y"], added=cond["added"]), got)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("suffix", [".ts", ".pt", None])
def test_torchscript(net, tmp_path, suffix):
    x, t, cond = tensors()
    script = torch.jit.trace(net, (x, t, cond["y"]))
    if suffix:
        script.save(str(tmp_path / f"net{suffix}"))
    model = models.wrap(tmp_path / f"net{suffix}" if suffix else script, inputs={"label": "y"})
    want = net(x, t, cond["y"])
    got = model(x, t, label=cond["y"])
    assert torch.equal(got, want)
    assert not got.requires_grad
    assert (model.dtype, model.array) == ("float32", "torch")
    assert np.array_equal(model(x.numpy(), t.numpy(), label=cond["y"].numpy()), want.detach().numpy())
    with pytest.raises(ValueError, match=r"'z' .*not an input of the model, which has x, t, y"):
        models.wrap(model.obj, inputs={"label": "z"})


# ---- ONNX -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["path", "session"])
def test_onnx(net, onnx_file, source):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    model = models.wrap(onnx_file if source == "path" else session)
    for n in (2, 5):
        x, t, cond = tensors(n, seed=n)
        want = net(x, t, **cond).detach()
        got = model(x, t, **cond)
        assert isinstance(got, torch.Tensor)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        arrays = model(x.numpy(), t.numpy(), **as_numpy(cond))
        assert isinstance(arrays, np.ndarray)
        assert np.array_equal(arrays, got.numpy())
        assert torch.equal(model(x, t.double(), **cond), got)
    facts = (model.dtype, model.time_dtype, model.in_channels, model.out_channels, model.array)
    assert facts == ("float32", "float32", 4, 4, "numpy")


def test_onnx_names(net, onnx_file):
    x, t, cond = tensors()
    want = models.wrap(onnx_file)(x, t, **cond)
    flat = {"y": cond["y"], "added_gain": cond["added"]["gain"], "added_pair_bias": cond["added"]["pair"]["bias"]}
    assert torch.equal(models.wrap(onnx_file)(x, t, **flat), want)
    model = models.wrap(
        onnx_file, inputs={"x": "x", "label": "y", "extra.g": "added_gain", "extra.b": "added_pair_bias"}
    )
    extra = {"g": flat["added_gain"], "b": flat["added_pair_bias"]}
    assert torch.equal(model(x, t, label=cond["y"], extra=extra, absent=None), want)
    with pytest.raises(TypeError, match=r"'nonsense' is not an input of the session, which has x, t, y, added_gain"):
        model(x, t, nonsense=x)
    with pytest.raises(TypeError, match="also takes y, added_gain, added_pair_bias; got x, t"):
        model(x, t)
    with pytest.raises(TypeError, match="'added_gain' is the session's 'added_gain', which is given already"):
        models.wrap(onnx_file)(x, t, **cond, added_gain=x)
    with pytest.raises(TypeError, match="cond 'y': the session's 'y' takes int64, got float32"):
        models.wrap(onnx_file)(x, t, **{**cond, "y": t})
    with pytest.raises(TypeError, match="x: the session's 'x' takes float32, got float64"):
        models.wrap(onnx_file)(x.double(), t, **cond)
    with pytest.raises(TypeError, match=r"x: expected a numpy array or a torch tensor, got list"):
        models.wrap(onnx_file)([x], t, **cond)
    with pytest.raises(ValueError, match=r"'z' .*not an input of the model, which has x, t, y, added_gain"):
        models.wrap(onnx_file, inputs={"y": "z"})


def test_onnx_integer_time_is_rounded(tmp_path):
    model = models.wrap(time_onnx(tmp_path / "a.onnx"))
    x, t = np.zeros((3, 4, 2, 2), np.float32), np.array([998.7, 0.4, 12.0], np.float32)
    assert model(x, t)[:, 0, 0, 0].tolist() == [999, 0, 12]
    assert model(torch.from_numpy(x), torch.from_numpy(t))[:, 0, 0, 0].tolist() == [999, 0, 12]
    assert model.time_dtype == "int64"
    with pytest.raises(ValueError, match="time: 'sigma' is a fraction, but the model's input 't' is int64"):
        models.wrap(model.obj, time="sigma")


@pytest.mark.parametrize("shape", [(), (1,)])
def test_onnx_time_without_a_batch(tmp_path, shape):
    model = models.wrap(time_onnx(tmp_path / "a.onnx", kind="FLOAT", shape=shape))
    x = torch.zeros(3, 4, 2, 2)
    for kind in (lambda a: a, lambda a: a.numpy()):
        assert (model(kind(x), kind(torch.full((3,), 7.5))) == 7.5).all()
        with pytest.raises(ValueError, match=r"t: .*one time for the whole batch"):
            model(kind(x), kind(torch.tensor([7.5, 7.5, 8.0])))


def test_onnx_non_contiguous(tmp_path):
    model = models.wrap(time_onnx(tmp_path / "a.onnx"))
    x = torch.randn(3, 2, 2, 4).permute(0, 3, 1, 2)
    assert torch.equal(model(x, torch.zeros(3)), x)
    assert np.array_equal(model(x.numpy(), np.zeros(3)), x.numpy())


def test_onnx_bfloat16_through_dlpack(tmp_path):
    onnx = pytest.importorskip("onnx")
    dims = ["n", 4]
    nodes = [
        ("Cast", ["sample"], ["f"], {"to": onnx.TensorProto.FLOAT}),
        ("Mul", ["f", "gain"], ["g"], {}),
        ("Cast", ["timestep"], ["tf"], {"to": onnx.TensorProto.FLOAT}),
        ("Add", ["g", "tf"], ["h"], {}),
        ("Cast", ["h"], ["out"], {"to": onnx.TensorProto.BFLOAT16}),
    ]
    inputs = {"sample": ("BFLOAT16", dims), "timestep": ("INT64", []), "gain": ("FLOAT", dims)}
    model = models.wrap(make_onnx(tmp_path / "a.onnx", inputs, nodes, ("BFLOAT16", dims)))
    import onnxruntime

    x, t, gain = torch.randn(3, 4).bfloat16(), torch.full((3,), 2.6), torch.randn(3, 4)
    if not hasattr(onnxruntime.OrtValue, "from_dlpack"):
        with pytest.raises(RuntimeError, match="too old"):
            model(x, t, gain=gain)
        return
    assert model.dtype == "bfloat16"
    want = (x.float() * gain + 3).bfloat16()
    got = model(x, t, gain=gain)
    assert torch.equal(got, want)
    assert torch.equal(model(x, t, gain=gain.numpy()), want)
    other = model(-x, t, gain=gain)  # the answer is not a buffer that the next call overwrites
    assert torch.equal(got, want)
    assert not torch.equal(other, want)
    with pytest.raises(TypeError, match="x: the session's 'sample' takes bfloat16, got float32"):
        model(x.float(), t, gain=gain)


def test_onnx_needs_names_for_x_and_t(tmp_path):
    dims = ["n", 4]
    path = make_onnx(
        tmp_path / "a.onnx",
        {"a": ("FLOAT", dims), "b": ("FLOAT", ["n"])},
        [("Relu", ["a"], ["out"], {})],
        ("FLOAT", dims),
    )
    with pytest.raises(ValueError, match="cannot tell which input is x: the model has a, b"):
        models.wrap(path)
    model = models.wrap(path, inputs={"x": "a", "t": "b"})
    x = torch.randn(3, 4)
    assert torch.equal(model(x, torch.zeros(3)), x.relu())


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_onnx_fallback_to_the_cpu_is_an_error(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = time_onnx(tmp_path / "a.onnx")
    available = onnxruntime.get_available_providers()
    absent = next(name for name in onnxruntime.get_all_providers() if name not in available)
    for provider in (absent, (absent, {"device_id": 0})):
        with pytest.raises(RuntimeError, match=f"asked for {absent}, but the session fell back to CPU"):
            models.open_session(path, [provider, "CPUExecutionProvider"])
    assert models.open_session(path).get_providers() == ["CPUExecutionProvider"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(net, tmp_path):
    x, t, cond = tensors()
    model = models.wrap(Net().cuda())
    got = model(x.numpy(), t.numpy(), **as_numpy(cond))
    want = model(x.cuda(), t.cuda(), y=cond["y"].cuda(), added=_cuda(cond["added"]))
    assert np.array_equal(got, want.cpu().numpy())
    cpu_session = models.open_session(time_onnx(tmp_path / "a.onnx"), ["CPUExecutionProvider"])
    with pytest.raises(RuntimeError, match="the session runs on CPUExecutionProvider"):
        models.wrap(cpu_session)(x.cuda(), t.cuda())


def _cuda(value):
    return {k: _cuda(v) for k, v in value.items()} if isinstance(value, dict) else value.cuda()
