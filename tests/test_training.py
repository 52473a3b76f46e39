"""Conditioning dropout (rates, joint distribution, structure) and the two training losses."""

import math

import pytest

torch = pytest.importorskip("torch")

from pyguide.training import (  # noqa: E402 (after the check for torch)
    conditional_flow_matching,
    denoising_score_matching,
    drop_condition,
    drop_two_conditions,
)

SAMPLES = 100_000


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def bernstein(trials, probability, failure=1e-9):
    """Deviation of a binomial count that is exceeded with at most `failure`: 2 exp(-(d^2 / 2) / (n p q + d / 3))."""
    level = math.log(2 / failure)
    variance = trials * probability * (1 - probability)
    return level / 3 + math.sqrt((level / 3) ** 2 + 2 * level * variance)


def assert_binomial(events, probability):
    count, trials = int(events.sum()), len(events)
    assert abs(count - trials * probability) <= bernstein(trials, probability), (count / trials, probability)


def dropped(p, samples=SAMPLES, seed=0):
    return drop_condition(torch.ones(samples, dtype=torch.int64), 0, p, generator=generator(seed)) == 0


def two_dropped(p, seed=0):
    ones = torch.ones(SAMPLES, 1)
    text, image = drop_two_conditions(ones, ones, 0, 0, p, generator=generator(seed))
    return (text == 0)[:, 0], (image == 0)[:, 0]


# ---- rates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_dropout_rate(p):
    assert_binomial(dropped(p), p)


def test_the_bound_can_fail():
    """The negative control: a rate that is off by a tenth is outside the bound."""
    with pytest.raises(AssertionError):
        assert_binomial(dropped(0.11), 0.1)


def test_dropout_at_zero_and_one():
    assert not dropped(0).any()
    assert dropped(1).all()


def test_samples_and_batches_are_independent():
    p = 0.3
    first, second = dropped(p, seed=1), dropped(p, seed=2)
    assert_binomial(first[0::2] & first[1::2], p * p)  # neighbours in a batch; disjoint pairs are independent trials
    assert_binomial(first & second, p * p)


def test_successive_batches_differ():
    stream, ones = generator(), torch.ones(1000)
    batches = [drop_condition(ones, 0.0, 0.5, generator=stream) for _ in range(2)]
    assert not torch.equal(*batches)


def test_global_generator_is_the_default():
    masks = []
    for _ in range(2):
        torch.manual_seed(5)
        masks.append(drop_condition(torch.ones(1000), 0.0, 0.5))
    assert torch.equal(*masks)
    assert 0 < masks[0].sum() < 1000


@pytest.mark.parametrize("p", [0.05, 0.2, 1 / 3])
def test_two_conditions_joint_distribution(p):
    text, image = two_dropped(p)
    assert_binomial(text & ~image, p)
    assert_binomial(~text & image, p)
    assert_binomial(text & image, p)
    assert_binomial(~text & ~image, 1 - 3 * p)
    assert_binomial(text, 2 * p)
    assert_binomial(image, 2 * p)


def test_two_conditions_at_zero():
    text, image = two_dropped(0)
    assert not text.any()
    assert not image.any()


# ---- structure ------------------------------------------------------------------------------------------------------


def nested(batch):
    return {
        "labels": torch.arange(batch) + 1,
        "text": {"tokens": torch.rand(batch, 5, 3) + 1, "pooled": torch.rand(batch, 3, dtype=torch.float64) + 1},
    }


def test_nested_mapping_is_dropped_as_a_whole():
    cond = nested(64)
    learned = torch.zeros(5, 3)  # [*], [1, *] and a number: the three ways to write a null leaf
    null = {"labels": 0, "text": {"tokens": learned, "pooled": torch.zeros(1, 3)}}
    out = drop_condition(cond, null, 0.5, generator=generator())
    drop = out["labels"] == 0
    assert 0 < drop.sum() < 64
    for got, given in [
        (out["labels"], cond["labels"]),
        (out["text"]["tokens"], cond["text"]["tokens"]),
        (out["text"]["pooled"], cond["text"]["pooled"]),
    ]:
        assert got.dtype == given.dtype
        assert torch.equal(got[~drop], given[~drop])
        assert not got[drop].any()


def test_null_of_the_whole_batch():
    cond, null = torch.arange(64), -torch.arange(64)
    out = drop_condition(cond, null, 0.5, generator=generator())
    assert torch.equal(out.abs(), cond)
    assert (out[1:] < 0).any()


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_the_batch_is_not_modified(p):
    cond = nested(64)
    before = {"labels": cond["labels"].clone(), "tokens": cond["text"]["tokens"].clone()}
    out = drop_condition(cond, {"labels": 0, "text": {"tokens": 0, "pooled": 0}}, p, generator=generator())
    out["labels"].fill_(-1)  # the result shares no memory with the batch
    out["text"]["tokens"].fill_(-1)
    assert torch.equal(cond["labels"], before["labels"])
    assert torch.equal(cond["text"]["tokens"], before["tokens"])


def test_structure_does_not_change_who_is_dropped():
    alone = drop_condition(torch.ones(64), 0, 0.5, generator=generator())
    cond = {"a": torch.rand(64, 2, 2), "b": torch.ones(64)}
    assert torch.equal(drop_condition(cond, {"a": 0, "b": 0}, 0.5, generator=generator())["b"], alone)


def test_learned_null_gets_its_gradient():
    null = torch.zeros(3, requires_grad=True)
    out = drop_condition(torch.ones(64, 3), null, 0.5, generator=generator())
    out.sum().backward()
    assert torch.equal(null.grad, torch.full((3,), float((out == 0)[:, 0].sum())))


def test_nan_in_a_dropped_condition_does_not_leak():
    assert not drop_condition(torch.full((8,), math.nan), 0.0, 1.0).any()


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan, math.inf])
def test_bad_probability(p):
    with pytest.raises(ValueError, match=r"^p must"):
        drop_condition(torch.ones(2), 0, p)


@pytest.mark.parametrize("p", ["0.1", None, True])
def test_probability_of_the_wrong_type(p):
    with pytest.raises(TypeError, match=r"^p must"):
        drop_condition(torch.ones(2), 0, p)


def test_two_conditions_need_three_cases():
    with pytest.raises(ValueError, match=r"^p must"):
        drop_two_conditions(torch.ones(2), torch.ones(2), 0, 0, 0.34)


@pytest.mark.parametrize(
    ("cond", "null", "error", "names"),
    [
        ({"a": torch.ones(2), "b": torch.ones(3)}, {"a": 0, "b": 0}, ValueError, "cond.b"),
        ({"a": torch.ones(2)}, {"b": 0}, ValueError, "null"),
        ({"a": torch.ones(2)}, 0, ValueError, "null"),
        ({}, {}, ValueError, "cond"),
        ({"a": "cat"}, {"a": ""}, TypeError, "cond.a"),
        (torch.ones(()), 0, TypeError, "cond"),
        (torch.ones(2, 4), torch.zeros(3), ValueError, "null"),
        (torch.ones(2, 4), torch.zeros(1), ValueError, "null"),  # a broadcast that nobody meant
        (torch.ones(2, dtype=torch.int64), 0.5, TypeError, "null"),
    ],
)
def test_bad_structures(cond, null, error, names):
    with pytest.raises(error, match=names):
        drop_condition(cond, null, 0.5)


# ---- losses ---------------------------------------------------------------------------------------------------------


def batch(samples=6):
    x0 = torch.randn(samples, 2, 3, 3, dtype=torch.float64, generator=generator(1))
    noise = torch.randn(x0.shape, dtype=torch.float64, generator=generator(2))
    return x0, noise, torch.linspace(0.1, 0.9, samples, dtype=torch.float64)


def test_score_matching_of_the_exact_model_is_zero():
    x0, noise, t = batch()
    alpha, sigma = torch.cos(t), torch.sin(t)

    def model(x, timestep, labels):
        assert torch.equal(timestep, 1000 * t)
        assert torch.equal(labels, torch.arange(6))
        a, s = (torch.cos(t).view(-1, 1, 1, 1), torch.sin(t).view(-1, 1, 1, 1))
        return (x - a * x0) / s

    cond = {"labels": torch.arange(6)}
    loss = denoising_score_matching(model, x0, alpha, sigma, 1000 * t, cond, noise=noise)
    assert loss.shape == (6,)
    assert loss.max() < 1e-25


def test_flow_matching_of_the_exact_model_is_zero():
    x0, noise, t = batch()

    def model(x, timestep):
        torch.testing.assert_close(timestep, 1000 * t)
        return (x - x0) / t.view(-1, 1, 1, 1)  # x - x0 = t (noise - x0)

    loss = conditional_flow_matching(model, x0, t, noise=noise)
    assert loss.shape == (6,)
    assert loss.max() < 1e-25


def test_losses_are_mean_squares_per_sample():
    x0, noise, t = batch()
    zero = lambda x, timestep: torch.zeros_like(x)  # noqa: E731
    score = denoising_score_matching(zero, x0, t, t, t, noise=noise)
    flow = conditional_flow_matching(zero, x0, t, noise=noise)
    torch.testing.assert_close(score, noise.square().mean((1, 2, 3)))
    torch.testing.assert_close(flow, (noise - x0).square().mean((1, 2, 3)))


def test_noise_comes_from_the_generator():
    x0, _, t = batch()
    losses = [conditional_flow_matching(lambda x, s: x, x0, t, generator=generator(seed)) for seed in (3, 3, 4)]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"alpha": torch.ones(1)}, "alpha"),
        ({"sigma": torch.ones(6, 1)}, "sigma"),
        ({"noise": torch.ones(1, 2, 3, 3)}, "noise"),
        ({"model": lambda x, t: x[:1]}, "model"),  # would broadcast silently
    ],
)
def test_losses_refuse_other_shapes(arguments, names):
    x0, noise, t = batch()
    good = {"model": lambda x, t: x, "x0": x0, "alpha": t, "sigma": t, "timestep": t, "noise": noise}
    with pytest.raises(ValueError, match=names):
        denoising_score_matching(**(good | arguments))
    if "alpha" not in arguments and "sigma" not in arguments:
        good = {"model": lambda x, t: x, "x0": x0, "t": t, "noise": noise}
        with pytest.raises(ValueError, match=names):
            conditional_flow_matching(**(good | arguments))


def test_flow_matching_refuses_a_scalar_time():
    x0, noise, _ = batch()
    with pytest.raises(ValueError, match=r"^t must"):
        conditional_flow_matching(lambda x, t: x, x0, torch.tensor(0.5), noise=noise)
