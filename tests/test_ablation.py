"""Ablation values: what each puts in place of closed channels, and that batches play no part."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from nad_attr import RunOptions
from nad_attr.data.counters import hashed, mixed, standard_normal, unsigned, words
from nad_attr.evaluation.ablation import (
    ABLATIONS,
    Ablation,
    MeanAblation,
    NoiseAblation,
    OtherMeanAblation,
    ResampleAblation,
    ZeroAblation,
    as_ablation,
    fit_ablation,
)
from nad_attr.evaluation.evaluating import evaluate
from nad_attr.evaluation.responses import site_fidelity, sweep
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gating.hooks import gated, installed, recorded
from nad_attr.gating.means import channel_means
from nad_attr.sites.site import GateSite, SiteError
from tests import helpers

SITES = {
    "cnn": [GateSite("relu1", 6, 1), GateSite("relu2", 8, 1)],
    "resnet": [GateSite("relu", 4, 1), GateSite("layer1.0", 4, 1), GateSite("layer2.0", 6, 1)],
    "vit": [GateSite("blocks.0", 8, -1), GateSite("blocks.1", 8, -1)],
}
MAKE = {"cnn": helpers.TinyCNN, "resnet": helpers.TinyResNet, "vit": helpers.TinyViT}
TASKS = (2, (0, 1), 0)
INPUT = GateSite("0", 3, 1)  # of the network that gives its input back


@pytest.fixture
def training() -> tuple[Tensor, Tensor]:
    return helpers.labelled_images(14, seed=5)


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    return helpers.labelled_images(7, seed=9)


@pytest.fixture
def identity() -> nn.Module:
    return nn.Sequential(nn.Identity()).eval()


def architectures(sites: list[GateSite], seed: int = 1, means: bool = False):
    generator = torch.Generator().manual_seed(seed)
    values = {s.name: torch.full((s.n_channels,), 50.0) for s in sites} if means else None
    return [
        SubArchitecture(
            {s.name: torch.rand(s.n_channels, generator=generator) < 0.5 for s in sites},
            sites,
            task=task,
            means=values,
        )
        for task in TASKS
    ]


# ---------------------------------------------------------------------------------------------
# Numbers from counters
# ---------------------------------------------------------------------------------------------


def test_hash_is_that_of_whole_numbers() -> None:
    """The same in Python's unbounded integers: no sign and no overflow plays a part."""

    def reference(x: int) -> int:
        x = ((x ^ x >> 16) * 0x7FEB352D) % 2**32
        x = ((x ^ x >> 15) * 0x846CA68B) % 2**32
        return x ^ x >> 16

    values = [0, 1, 2, 12345, 2**31 - 1, 2**31, 2**32 - 1]
    assert unsigned(words(torch.tensor([*values, 2**32 + 5]))).tolist() == [*values, 5]
    x = words(torch.tensor(values))
    assert unsigned(mixed(x.clone())).tolist() == [reference(value) for value in values]
    a, b = 0xDEADBEEF, 0x92345678
    found = hashed(x, words(torch.tensor(a)), words(torch.tensor(b)))
    assert unsigned(found).tolist() == [reference((reference(v ^ a) + b) % 2**32) for v in values]
    assert unsigned(x).tolist() == values, "only a copy is overwritten"


def test_normal_numbers_are_normal_and_independent() -> None:
    keys = words(torch.arange(40)), words(torch.arange(40) * 7 + 3)
    values = standard_normal(keys, 2001)
    assert values.shape == (40, 2001)
    assert values.dtype == torch.float32
    assert stats.kstest(values.flatten().numpy(), "norm").pvalue > 0.01
    # Neither rows nor neighbours nor the two halves of one draw go together.
    for a, b in (
        (values[:-1], values[1:]),
        (values[:, :-1], values[:, 1:]),
        (values[:, :1000], values[:, 1001:]),
    ):
        r = np.corrcoef(a.flatten(), b.flatten())[0, 1]
        assert abs(r) < 4 / a.numel() ** 0.5
    # A row is a function of its key alone.
    some = standard_normal((keys[0][[7, 3]], keys[1][[7, 3]]), 2001)
    assert torch.equal(some, values[[7, 3]])


# ---------------------------------------------------------------------------------------------
# Fitting
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(MAKE))
def test_fitted_numbers(name: str, training: tuple[Tensor, Tensor]) -> None:
    """Against all activations at once."""
    model, sites = helpers.build(MAKE[name]), SITES[name]
    images, labels = training
    with torch.no_grad(), recorded(model, sites) as activations:
        model(images)
    flat = {
        s.name: activations[s.name].movedim(s.channel_dim, -1).reshape(14, -1, s.n_channels)
        for s in sites
    }
    mean = fit_ablation(model, sites, training, kind="mean", run=RunOptions(batch_size=4))
    noise = fit_ablation(model, sites, training, kind="noise", run=RunOptions(batch_size=5))
    other = fit_ablation(
        model, sites, training, kind="other_mean", tasks=TASKS, run=RunOptions(batch_size=3)
    )
    assert isinstance(mean, MeanAblation)
    assert isinstance(noise, NoiseAblation)
    assert isinstance(other, OtherMeanAblation)
    expected = channel_means(model, sites, [(images,)])
    for site_name, values in flat.items():
        torch.testing.assert_close(mean.means[site_name], expected[site_name].float())
        torch.testing.assert_close(noise.means[site_name], expected[site_name].float())
        deviation = values.flatten(0, 1).std(0, correction=0).float()
        torch.testing.assert_close(noise.deviations[site_name], deviation)
        for task in (0, 1, 2):
            others = values[labels != task].flatten(0, 1).mean(0).float()
            torch.testing.assert_close(other.means(task)[site_name], others)
        group = values[labels == 2].flatten(0, 1).mean(0).float()
        torch.testing.assert_close(other.means((0, 1))[site_name], group)


def test_donors_are_of_all_classes(identity: nn.Module) -> None:
    labels = torch.tensor([0] * 50 + [1] * 4 + [2] * 3)
    images = torch.arange(57.0)[:, None].expand(57, 3).contiguous()
    pool = fit_ablation(
        identity,
        [INPUT],
        (images, labels),
        kind="resample",
        n_donors=12,
        run=RunOptions(batch_size=5),
    )
    assert isinstance(pool, ResampleAblation)
    assert pool.labels.bincount().tolist() == [5, 4, 3]
    assert torch.equal(labels[pool.inputs[0][:, 0].long()], pool.labels)
    again = fit_ablation(identity, [INPUT], (images, labels), kind="resample", n_donors=12)
    assert torch.equal(again.inputs[0], pool.inputs[0])
    other = fit_ablation(identity, [INPUT], (images, labels), kind="resample", n_donors=12, seed=1)
    assert not torch.equal(other.inputs[0], pool.inputs[0])
    every = fit_ablation(identity, [INPUT], (images, labels), kind="resample")
    assert len(every.labels) == 57


# ---------------------------------------------------------------------------------------------
# What closed channels become
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(MAKE))
@pytest.mark.parametrize("kind", ["zero", "mean", "other_mean"])
def test_vectors(name: str, kind: str, training, data) -> None:
    """As sub-architectures that bring these means themselves; their own means are overruled."""
    model, sites = helpers.build(MAKE[name]), SITES[name]
    ablation = fit_ablation(model, sites, training, kind=kind)
    archs = architectures(sites, means=True)
    found = sweep(model, archs, data, ablation=ablation, run=RunOptions(batch_size=5))
    for row, arch in enumerate(archs):
        means = None
        if isinstance(ablation, MeanAblation):
            means = ablation.means
        elif isinstance(ablation, OtherMeanAblation):
            means = ablation.means(arch.task)
        expected = sweep(model, arch.with_means(means), data).gated_margin
        torch.testing.assert_close(found.gated_margin[row], expected[0])
    own = sweep(model, archs, data)
    assert not torch.allclose(found.gated, own.gated)


@pytest.mark.parametrize("name", list(MAKE))
def test_resample(name: str, training, data) -> None:
    """One image and one task at a time, with the donor run alone."""
    model, sites = helpers.build(MAKE[name]), SITES[name]
    pool = fit_ablation(model, sites, training, kind="resample", seed=4)
    archs = architectures(sites)
    found = sweep(model, archs, data, ablation=pool, run=RunOptions(batch_size=6))
    filler = pool.filler(sites, TASKS, torch.device("cpu"))
    seen = set()
    for row, arch in enumerate(archs):
        for i, image in enumerate(data[0]):
            (donor,), place = filler.donors(torch.tensor([row]), torch.tensor([i]))
            assert place.tolist() == [0]
            which = int((pool.inputs[0] == donor[0]).flatten(1).all(1).nonzero())
            own = arch.task if isinstance(arch.task, tuple) else (arch.task,)
            assert int(pool.labels[which]) not in own
            seen.add((row, which))
            with torch.no_grad(), recorded(model, sites) as given:
                model(donor)
            clean = {key: value.clone() for key, value in given.items()}

            def swap(site: GateSite, tensor: Tensor, arch=arch, clean=clean) -> Tensor:
                shape = [1] * tensor.ndim
                shape[site.channel_dim] = site.n_channels
                return torch.where(arch[site.name].reshape(shape), tensor, clean[site.name])

            with torch.no_grad(), installed(model, sites, swap):
                outputs = model(image[None])[0]
            for j, task in enumerate(TASKS):
                value = (
                    outputs[list(task)].logsumexp(0) if isinstance(task, tuple) else outputs[task]
                )
                assert found.gated[row, i, j] == pytest.approx(float(value), rel=1e-5, abs=1e-6)
    assert len(seen) > 10, "there are many donors"


def test_noise(identity: nn.Module) -> None:
    """Where the network gives its input back: kept channels as they are, closed ones normal."""
    n, means, deviations = 4000, {"0": torch.tensor([0.0, 5.0, -1.0])}, {"0": torch.ones(3) * 2}
    images = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
    noise = NoiseAblation([INPUT], means, deviations, seed=1)
    archs = [SubArchitecture.from_kept({"0": [0]}, [INPUT], task=k) for k in range(3)]
    found = sweep(
        identity,
        archs,
        (images, torch.arange(n) % 3),
        ablation=noise,
        run=RunOptions(batch_size=1000),
    )
    values = found.gated
    assert torch.equal(values[:, :, 0], images[:, 0].expand(3, -1))
    for channel, mean in ((1, 5.0), (2, -1.0)):
        normal = (values[:, :, channel].flatten() - mean) / 2
        assert stats.kstest(normal.numpy(), "norm").pvalue > 0.01
    # Tasks, channels and images have their own noise.
    for a, b in (
        (values[0, :, 1], values[1, :, 1]),
        (values[0, :, 1], values[0, :, 2]),
        (values[0, :-1, 1], values[0, 1:, 1]),
    ):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / n**0.5


def test_noise_of_each_position(training) -> None:
    model, sites = helpers.build(helpers.TinyCNN), SITES["cnn"]
    noise = fit_ablation(model, sites, training, kind="noise")
    arch = SubArchitecture.from_kept({"relu2": range(8)}, sites, task=0)
    seen = {}
    handle = model.conv2.register_forward_pre_hook(lambda m, args: seen.update(x=args[0].clone()))
    sweep(model, [arch], training, ablation=noise)
    handle.remove()
    x = seen["x"]  # (14, 6, 8, 8) of the gated pass
    assert len(x.unique()) > 0.999 * x.numel()
    z = (x.mean((0, 2, 3)) - noise.means["relu1"]) / noise.deviations["relu1"]
    assert z.abs().max() < 4 / (14 * 64) ** 0.5
    ratio = x.transpose(0, 1).flatten(1).std(1) / noise.deviations["relu1"]
    torch.testing.assert_close(ratio.float(), torch.ones(6), atol=0.1, rtol=0)


@pytest.mark.parametrize("kind", ABLATIONS)
def test_full_sub_architecture_is_the_whole_network(kind: str, training, data) -> None:
    model, sites = helpers.build(helpers.TinyResNet), SITES["resnet"]
    ablation = fit_ablation(model, sites, training, kind=kind)
    full = SubArchitecture(SubArchitecture.full(sites).masks, sites, task=1)
    found = sweep(model, full, data, ablation=ablation)
    torch.testing.assert_close(found.gated[0], found.whole)


# ---------------------------------------------------------------------------------------------
# Batches play no part
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ABLATIONS)
@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_batches_play_no_part(name: str, kind: str, training, data) -> None:
    model, sites = helpers.build(MAKE[name]), SITES[name]
    archs = architectures(sites)
    expected = None
    for fit_size, batch_size in ((64, 64), (1, 1), (3, 2), (5, 7)):
        ablation = fit_ablation(
            model, sites, training, kind=kind, seed=2, run=RunOptions(batch_size=fit_size)
        )
        assert ablation.kind == kind
        found = sweep(model, archs, data, ablation=ablation, run=RunOptions(batch_size=batch_size))
        expected = found if expected is None else expected
        torch.testing.assert_close(found.gated, expected.gated, rtol=1e-6, atol=1e-7)
        assert torch.equal(found.gated_class, expected.gated_class)
    # Nor do other sub-architectures, their order, or the images that come later.
    some = sweep(model, [archs[2], archs[1]], (data[0][:4], data[1][:4]), ablation=ablation)
    torch.testing.assert_close(some.gated[0, :, 0], expected.gated[2, :4, 2], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(some.gated[1, :, 1], expected.gated[1, :4, 1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["resample", "noise"])
def test_the_seed_counts(kind: str, training, data) -> None:
    model, sites = helpers.build(helpers.TinyCNN), SITES["cnn"]
    first, second = (
        sweep(
            model,
            architectures(sites),
            data,
            ablation=fit_ablation(model, sites, training, kind=kind, seed=seed),
        ).gated
        for seed in (0, 1)
    )
    assert not torch.allclose(first, second, rtol=1e-3)


@pytest.mark.parametrize("kind", ABLATIONS)
def test_model_untouched(kind: str, training, data) -> None:
    model, sites = helpers.build(helpers.TinyResNet), SITES["resnet"]
    with helpers.assert_model_untouched(model, *training, *data):
        ablation = fit_ablation(model, sites, training, kind=kind)
        found = evaluate(model, architectures(sites), data, ablation=ablation, n_random=1)
        site_fidelity(model, architectures(sites), data, ablation=ablation)
    assert np.isfinite(found.own_auc).all()


def test_batch_size_holds_donors_too(training, data) -> None:
    model, sites = helpers.build(helpers.TinyCNN), SITES["cnn"]
    pool = fit_ablation(model, sites, training, kind="resample")
    sizes = []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    for batch_size in (2, 5, 8):
        sizes.clear()
        sweep(
            model, architectures(sites), data, ablation=pool, run=RunOptions(batch_size=batch_size)
        )
        assert max(sizes) <= batch_size


def test_several_inputs(training, data) -> None:
    """A network of two inputs, one of them not an image: donors bring both."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cnn = helpers.build(helpers.TinyCNN)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.cnn(x * scale[:, None, None, None])

    sites = [GateSite(f"cnn.{s.name}", s.n_channels, 1) for s in SITES["cnn"]]
    model = Two().eval()
    images, labels = training
    half = torch.full((14,), 0.5, dtype=torch.float64)
    pool = fit_ablation(model, sites, ((images * 2, half), labels), kind="resample")
    found = sweep(
        model,
        architectures(sites),
        ((data[0] * 4, half[:7] / 2), data[1]),
        ablation=pool,
    )
    alone = fit_ablation(model.cnn, SITES["cnn"], training, kind="resample")
    expected = sweep(model.cnn, architectures(SITES["cnn"]), data, ablation=alone)
    torch.testing.assert_close(found.gated, expected.gated)


def test_zero_by_name(data) -> None:
    model, sites = helpers.build(helpers.TinyCNN), SITES["cnn"]
    archs = architectures(sites, means=True)
    assert isinstance(as_ablation("zero"), ZeroAblation)
    found = sweep(model, archs, data, ablation="zero")
    with torch.no_grad(), gated(model, archs[0].with_means(None)):
        assert found.gated[0, :, 0].tolist() == pytest.approx(model(data[0])[:, 2].tolist())


# ---------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------


def test_bad_kinds(training, data) -> None:
    model, sites = helpers.build(helpers.TinyCNN), SITES["cnn"]
    archs = architectures(sites)
    for run in (
        lambda value: sweep(model, archs, data, ablation=value),
        lambda value: evaluate(model, archs, data, ablation=value),
        lambda value: site_fidelity(model, archs, data, ablation=value),
    ):
        with pytest.raises(ValueError, match=r"fit_ablation\(model, sites, data, kind='mean'\)"):
            run("mean")
        with pytest.raises(ValueError, match="no ablation 'median'; there are zero, mean"):
            run("median")
        with pytest.raises(TypeError, match="as fit_ablation makes it"):
            run({})
    with pytest.raises(ValueError, match="no ablation 'median'"):
        fit_ablation(model, sites, training, kind="median")
    with pytest.raises(TypeError):
        Ablation()


@pytest.mark.parametrize("kind", ABLATIONS)
def test_bad_fits(kind: str, training) -> None:
    model, sites = helpers.build(helpers.TinyCNN), SITES["cnn"]
    with helpers.assert_model_untouched(model):
        with pytest.raises(SiteError, match="relu9"):
            fit_ablation(model, [GateSite("relu9", 6, 1)], training, kind=kind)
        with pytest.raises(ValueError, match="batch_size"):
            fit_ablation(model, sites, training, kind=kind, run=RunOptions(batch_size=0))
        for n_donors in (1, 2.5, True):
            with pytest.raises(ValueError, match="n_donors"):
                fit_ablation(model, sites, training, kind=kind, n_donors=n_donors)
        if kind != "zero":
            with pytest.raises(ValueError, match="NaN"):
                fit_ablation(model, sites, (training[0] * torch.nan, training[1]), kind=kind)
    model.train()
    with pytest.raises(ValueError, match="train mode"):
        fit_ablation(model, sites, training, kind=kind)


@pytest.mark.parametrize("kind", ["other_mean", "resample"])
def test_other_classes_are_needed(kind: str, training, data) -> None:
    model, sites = helpers.build(helpers.TinyCNN), SITES["cnn"]
    alone = training[1] == 0
    own = training[0][alone], training[1][alone]
    with pytest.raises(ValueError, match="no image of another class than those of task 0"):
        fit_ablation(model, sites, own, kind=kind, tasks=[1, 0])
    ablation = fit_ablation(model, sites, own, kind=kind, tasks=[1])
    with (
        helpers.assert_model_untouched(model),
        pytest.raises(ValueError, match="no image of another class than those of task 0"),
    ):
        sweep(model, architectures(sites)[2], data, ablation=ablation)


@pytest.mark.parametrize("kind", ["mean", "other_mean", "noise"])
def test_other_sites(kind: str, training, data) -> None:
    model, sites = helpers.build(helpers.TinyCNN), SITES["cnn"]
    ablation = fit_ablation(model, sites[:1], training, kind=kind)
    with pytest.raises(ValueError, match=f"the {kind} ablation was not fitted for .*relu2"):
        sweep(model, architectures(sites), data, ablation=ablation)
    # Some of the sites that it was fitted for are enough.
    both = fit_ablation(model, sites, training, kind=kind)
    sweep(model, architectures(sites[:1]), data, ablation=both)


def test_donors_of_another_shape(training, data) -> None:
    model, sites = helpers.build(helpers.TinyCNN), SITES["cnn"]
    pool = fit_ablation(model, sites, (training[0][:, :, :6], training[1]), kind="resample")
    with (
        helpers.assert_model_untouched(model),
        pytest.raises(ValueError, match=r"donor images have shape \(3, 6, 8\)"),
    ):
        sweep(model, architectures(sites), data, ablation=pool)


def test_bad_values() -> None:
    site, good = GateSite("a", 2, 1), {"a": torch.ones(2)}
    with pytest.raises(ValueError, match="negative"):
        NoiseAblation([site], good, {"a": torch.tensor([1.0, -1.0])})
    with pytest.raises(ValueError, match="means of 'a' must be 2 finite numbers"):
        MeanAblation([site], {"a": torch.ones(3)})
    with pytest.raises(ValueError, match="2 inputs came with 1"):
        ResampleAblation(torch.ones(2, 3), torch.tensor([0]))
