"""What every channel scorer has to do, whatever it measures."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from nad_attr import RunOptions
from nad_attr._checks import GatingError
from nad_attr.scoring.scorer import ChannelScorer
from nad_attr.sites.site import GateSite, SiteError
from tests import helpers

NETWORKS = {
    "cnn": (helpers.TinyCNN, [GateSite("relu1", 6, 1), GateSite("relu2", 8, 1)]),
    "cnn, inputs": (
        helpers.TinyCNN,
        [GateSite("conv2", 6, 1, at_input=True), GateSite("linear", 8, 1, at_input=True)],
    ),
    # Sites before and after in-place ReLUs.
    "resnet": (
        helpers.TinyResNet,
        [GateSite("bn1", 4, 1), GateSite("layer1.0", 4, 1), GateSite("layer2.0", 6, 1)],
    ),
    "tokens": (helpers.TinyViT, [GateSite("blocks.0", 8, -1), GateSite("blocks.1", 8, -1)]),
}


def assert_same(
    first: dict[str, Tensor], second: dict[str, Tensor], *, tolerance: float = 1e-10
) -> None:
    assert list(first) == list(second)
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=tolerance, atol=tolerance)


class ScorerContract:
    """Subclass, name the scorer, and every test here holds it to the contract."""

    scorer: ClassVar[type[ChannelScorer]]
    #: The networks that it is for.
    networks: ClassVar[tuple[str, ...]] = tuple(NETWORKS)
    #: Whether the scores depend on the images at all.
    sees_images: ClassVar[bool] = True
    #: Whether the scores depend on gradients.
    needs_gradients: ClassVar[bool] = True
    #: Whether the network is run although no image counts.
    runs_network: ClassVar[bool] = False
    #: Whether images are drawn at random: their order and copies of them then change what is drawn.
    draws_images: ClassVar[bool] = False
    #: Largest relative difference between float32 and float64.
    float32_tolerance: ClassVar[float] = 1e-3

    def make(self, model: nn.Module, sites: list[GateSite]) -> ChannelScorer:
        return self.scorer(model, sites)

    # The smallest network in daily work, the others in `make test`.
    @pytest.fixture(
        params=["cnn", *(pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS if n != "cnn")]
    )
    def network(self, request: pytest.FixtureRequest) -> tuple[nn.Module, list[GateSite]]:
        if request.param not in self.networks:
            pytest.skip("no network for this scorer")
        make, sites = NETWORKS[request.param]
        return helpers.build(make), sites

    @pytest.fixture
    def data(self) -> tuple[Tensor, Tensor]:
        return helpers.labelled_images(10)

    @pytest.fixture
    def score(self) -> ChannelScorer:
        make, sites = NETWORKS["cnn"]
        return self.make(helpers.build(make), sites)

    def test_shape_type_and_order(self, network, data) -> None:
        model, sites = network
        scores = self.make(model, sites)(*data)
        assert list(scores) == [site.name for site in sites]
        for site in sites:
            assert scores[site.name].shape == (3, site.n_channels)
            assert scores[site.name].dtype == torch.float32
            assert scores[site.name].device.type == "cpu"
            assert not scores[site.name].requires_grad
            assert scores[site.name].std() > 0

    def test_rows_follow_the_tasks(self, score, data) -> None:
        every = score(*data, dtype=torch.float64)
        some = score(*data, tasks=[2, 0], dtype=torch.float64)
        assert_same(some, {name: value[[2, 0]] for name, value in every.items()})

    def test_groups_of_classes(self, score, data) -> None:
        scores = score(*data, tasks=[(0, 2), 1])
        assert scores["relu1"].shape == (2, 6)

    def test_group_of_one_is_the_class(self, score, data) -> None:
        if self.sees_images:
            one = score(*data, tasks=[(1,)], dtype=torch.float64)
            assert_same(one, score(*data, tasks=[1], dtype=torch.float64))

    def test_model_untouched(self, network, data) -> None:
        model, sites = network
        scorer = self.make(model, sites)
        next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
        list(model.parameters())[-1].requires_grad_(False)
        images, labels = data[0][:4], data[1][:4]  # the last batch is one image
        with helpers.assert_model_untouched(model, images, labels):
            scorer(images, labels, include_others=True, run=RunOptions(batch_size=3))

    def test_model_untouched_after_an_error(self, score, data) -> None:
        images, labels = data
        bad = images.clone()
        bad[-1, 0, 0, 0] = torch.nan
        with helpers.assert_model_untouched(score.model), pytest.raises(ValueError, match="NaN"):
            score(bad, labels, run=RunOptions(batch_size=3))

        def breaks(x: Tensor) -> Tensor:
            outputs: Tensor = score.model(x)
            if isinstance(x, FakeTensor):  # or 20 other batch sizes would be tried
                return outputs
            raise ZeroDivisionError

        if self.sees_images:
            with helpers.assert_model_untouched(score.model), pytest.raises(ZeroDivisionError):
                score(images, labels, run=RunOptions(forward_func=breaks))

    @pytest.mark.slow
    def test_batches_and_order_do_not_matter(self, network, data) -> None:
        model, sites = network
        images, labels = data[0][:4], data[1][:4]
        scorer = self.make(model, sites)
        options = {"include_others": True, "dtype": torch.float64}
        whole = scorer(images, labels, **options)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
        if self.draws_images:  # by their places
            order = torch.arange(len(labels))
        assert_same(  # the last batch is one image
            whole, scorer(images[order], labels[order], run=RunOptions(batch_size=3), **options)
        )

    @pytest.mark.slow
    def test_batches_of_own_images_do_not_matter(self, score, data) -> None:
        images, labels = data[0][:6], data[1][:6]
        whole = score(images, labels, dtype=torch.float64)
        some = score(images, labels, dtype=torch.float64, run=RunOptions(batch_size=4))
        assert_same(whole, some)

    def test_same_again(self, score, data) -> None:
        first, again = score(*data), score(*data)
        assert all(torch.equal(first[name], again[name]) for name in first)

    def test_other_images_count_only_if_asked(self, score, data) -> None:
        images, labels = data
        other = images.clone()
        other[labels != 1] += 1
        before = score(images, labels, tasks=[1], dtype=torch.float64)
        assert_same(before, score(other, labels, tasks=[1], dtype=torch.float64))
        if self.sees_images:
            before = score(images, labels, tasks=[1], include_others=True)
            after = score(other, labels, tasks=[1], include_others=True)
            assert not torch.allclose(before["relu1"], after["relu1"])

    def test_own_and_others_weigh_the_same(self, score, data) -> None:
        """Twice as many other images, each twice: nothing changes."""
        if self.draws_images:
            return
        images, labels = data
        others = labels != 1
        more = torch.cat([images, images[others]]), torch.cat([labels, labels[others]])
        options = {"tasks": [1], "include_others": True, "dtype": torch.float64}
        assert_same(score(images, labels, **options), score(*more, **options))

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_inside_no_grad(self, score, data, mode) -> None:
        expected = score(*data, dtype=torch.float64)
        with mode():
            images, labels = data[0] * 1.0, data[1] + 0
            found = score(images, labels, dtype=torch.float64)
        assert_same(expected, {name: value.clone() for name, value in found.items()})

    def test_images_that_require_gradients(self, score, data) -> None:
        images = data[0].clone().requires_grad_()
        assert_same(score(images, data[1]), score(*data), tolerance=1e-6)
        assert images.grad is None

    def test_several_inputs_and_arguments(self, score, data) -> None:
        images, labels = data
        seen = []

        def forward(a: Tensor, b: Tensor, factor: float) -> Tensor:
            seen.append(factor)
            return score.model(a + factor * b)

        found = score(
            (images / 2, images / 4),
            labels,
            run=RunOptions(forward_func=forward, additional_forward_args=2.0),
            dtype=torch.float64,
        )
        assert_same(found, score(images, labels, dtype=torch.float64))
        assert set(seen) == ({2.0} if self.sees_images or self.runs_network else set())

    def test_float32(self, data) -> None:
        make, sites = NETWORKS["resnet"]
        exact = self.make(helpers.build(make), sites)(*data)
        found = self.make(helpers.build(make).float(), sites)(data[0].float(), data[1])
        assert_same(exact, found, tolerance=self.float32_tolerance)

    def test_variants_are_the_scores_one_by_one(self, score, data) -> None:
        """All ways to average from one pass are what the scorer gives when set to each of them."""
        found = score.variants(*data, run=RunOptions(batch_size=4), dtype=torch.float64)
        signs = (False, True) if score.has_sign else (False,)
        others = (False, True) if self.sees_images else (False,)
        assert list(found) == [(both, sign) for both in others for sign in signs]
        for (include_others, signed), scores in found.items():
            score.signed = signed
            alone = score(*data, include_others=include_others, dtype=torch.float64)
            assert_same(scores, alone)
        some = score.variants(*data, include_others=[True], tasks=[1], dtype=torch.float64)
        if self.sees_images:
            assert list(some) == [(True, sign) for sign in signs]
            last = found[True, signs[-1]]
            assert_same(some[True, signs[-1]], {n: value[[1]] for n, value in last.items()})

    def test_absolute_scores_are_no_smaller(self, score, data) -> None:
        if score.has_sign:
            found = score.variants(*data, dtype=torch.float64)
            for include_others in (False, True):
                signed, absolute = found[include_others, True], found[include_others, False]
                for name, value in signed.items():
                    assert (absolute[name] >= value.abs() - 1e-12).all()

    def test_bad_variants(self, score, data) -> None:
        if not score.has_sign:
            with pytest.raises(ValueError, match="no sign"):
                score.variants(*data, signed=[True])
        with pytest.raises(ValueError, match="include_others must list"):
            score.variants(*data, include_others=True)
        with pytest.raises(ValueError, match="signed must list"):
            score.variants(*data, signed=[])

    # -- bad input -----------------------------------------------------------------------------

    def test_bad_sites(self) -> None:
        model = helpers.build(helpers.TinyCNN)
        with pytest.raises(SiteError, match="relu9"):
            self.make(model, [GateSite("relu9", 6, 1)])
        with pytest.raises(ValueError, match="no gate site"):
            self.make(model, [])

    def test_wrong_number_of_channels(self, data) -> None:
        scorer = self.make(helpers.build(helpers.TinyCNN), [GateSite("relu1", 5, 1)])
        if self.sees_images or self.runs_network:
            with pytest.raises(GatingError, match="5 channels"):
                scorer(*data)

    def test_train_mode(self, score, data) -> None:
        score.model.train()
        with helpers.assert_model_untouched(score.model), pytest.raises(ValueError, match=r"eval"):
            score(*data)

    @pytest.mark.parametrize(
        ("change", "options", "error", "message"),
        [
            (lambda x, y: (x, y[:-1]), {}, ValueError, "10 inputs came with 9 labels"),
            (lambda x, y: (x, y * 1j), {}, ValueError, "class indices"),
            (lambda x, y: (x, y - 1), {}, ValueError, "from 0 on"),
            (lambda x, y: (x[:0], y[:0]), {}, ValueError, "empty"),
            (lambda x, y: (x / 0, y), {}, ValueError, "infinity"),
            (lambda x, y: ("images", y), {}, TypeError, "data must be|tensor"),
            (lambda x, y: (x, y), {"tasks": [7]}, ValueError, "no own image for task 7"),
            (lambda x, y: (x, y), {"tasks": []}, ValueError, "no task"),
            (lambda x, y: (x, y), {"tasks": [1, 1]}, ValueError, "twice"),
            (lambda x, y: (x, y), {"tasks": ["cat"]}, TypeError, "task"),
            (
                lambda x, y: (x, y),
                {"tasks": [(0, 1, 2)], "include_others": True},
                ValueError,
                "no other image",
            ),
        ],
    )
    def test_bad_input(self, score, data, change, options, error, message: str) -> None:
        with helpers.assert_model_untouched(score.model), pytest.raises(error, match=message):
            score(*change(*data), **options)

    def test_class_without_an_output(self, score, data) -> None:
        images, labels = data
        if self.sees_images and self.needs_gradients:
            labels = torch.where(labels == 2, 5, labels)
            with pytest.raises(ValueError, match="label 5, but the network has 3 outputs"):
                score(images, labels)

    def test_other_outputs(self, score, data) -> None:
        if not self.sees_images and not self.runs_network:
            return
        with pytest.raises(ValueError, match="one output"):
            score(*data, run=RunOptions(forward_func=lambda x: score.model(x)[:, 0]))
        with pytest.raises(TypeError, match="tuple"):
            score(*data, run=RunOptions(forward_func=lambda x: (score.model(x),)))

    def test_outputs_without_gradients(self, score, data) -> None:
        if self.sees_images and self.needs_gradients:
            with pytest.raises(GatingError, match="no gradient"):
                score(*data, run=RunOptions(forward_func=lambda x: score.model(x).detach()))

    def test_repr(self, score) -> None:
        assert repr(score) == f"{type(score).__name__}(2 sites, 14 channels)"
