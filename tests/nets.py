"""What the tests of models share: a small net with every kind of condition, its inputs, and the operator count."""

import pytest

torch = pytest.importorskip("torch")
nn = torch.nn


class Net(nn.Module):
    """A convolution with a time, a label and nested conditions; each of them changes the output."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.embed = nn.Embedding(10, 4)

    def forward(self, x, t, y=None, added=None):
        h = self.conv(x) + torch.sin(t)[:, None, None, None]
        if y is not None:
            h = h + self.embed(y)[:, :, None, None]
        if added is not None:
            h = h * added["gain"][:, :, None, None] + added["pair"]["bias"][:, :, None, None]
        return h


def tensors(n=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, 8, 8, generator=g)
    t = torch.rand(n, generator=g) * 999
    y = torch.randint(0, 10, (n,), generator=g)
    added = {"gain": torch.randn(n, 4, generator=g), "pair": {"bias": torch.randn(n, 4, generator=g)}}
    return x, t, {"y": y, "added": added}


def as_numpy(value):
    return {k: as_numpy(v) for k, v in value.items()} if isinstance(value, dict) else value.numpy()


def aten_ops(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return sorted((event.key, event.count) for event in profile.key_averages() if event.key.startswith("aten::"))
