"""The contract of all scorers, learned gates included."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import torch
from torch import nn

from nad_attr import GateSite, Recipe, SiteError, TaskGates, learn_gates
from nad_attr.evaluation import (
    SCORERS,
    CDRPScorer,
    CentredEffectScorer,
    ChannelScorer,
    COARScorer,
    EAPIGScorer,
    GatesScorer,
    GivenScorer,
    HardConcreteScorer,
    InternalInfluenceScorer,
    IterativeScorer,
    LayerActivationScorer,
    LayerConductanceScorer,
    LayerDeepLiftScorer,
    LayerGradientXActivationScorer,
    LayerIntegratedGradientsScorer,
    LRPScorer,
    MagnitudeScorer,
    OtherTaskScorer,
    RelPScorer,
    TaylorOutputScorer,
    UGSScorer,
)
from tests import helpers
from tests.scorer_contract import ScorerContract


class TestTaylorOutput(ScorerContract):
    scorer = TaylorOutputScorer


class TestCentredEffect(ScorerContract):
    """With means that are given: without, they are those of all images, other ones included."""

    scorer = CentredEffectScorer

    def make(self, model: nn.Module, sites: list[GateSite]) -> ChannelScorer:
        means = {site.name: torch.linspace(-0.5, 0.5, site.n_channels) for site in sites}
        return CentredEffectScorer(model, sites, means=means)


class TestLayerActivation(ScorerContract):
    scorer = LayerActivationScorer
    needs_gradients = False


class TestLayerGradientXActivation(ScorerContract):
    scorer = LayerGradientXActivationScorer


class _Path(ScorerContract):
    networks = ("cnn, inputs", "resnet", "tokens")  # slow; the tests of one network take cnn

    def make(self, model: nn.Module, sites: list[GateSite]) -> ChannelScorer:
        return self.scorer(model, sites, n_steps=2)


class TestLayerIntegratedGradients(_Path):
    scorer = LayerIntegratedGradientsScorer


class TestLayerConductance(_Path):
    scorer = LayerConductanceScorer


class TestInternalInfluence(_Path):
    scorer = InternalInfluenceScorer


class TestLayerDeepLift(ScorerContract):
    scorer = LayerDeepLiftScorer


class TestLRP(ScorerContract):
    scorer = LRPScorer
    networks = ("cnn", "cnn, inputs", "resnet")  # no rules for attention


class TestCDRP(ScorerContract):
    scorer = CDRPScorer

    def make(self, model: nn.Module, sites: list[GateSite]) -> ChannelScorer:
        return CDRPScorer(model, sites, steps=5, penalty=0.5)


def means_of(sites: list[GateSite]) -> dict[str, torch.Tensor]:
    """Fixed means: means over all images would depend on the other images."""
    return {site.name: torch.full((site.n_channels,), 0.1) for site in sites}


class TestRelP(ScorerContract):
    scorer = RelPScorer
    networks = ("cnn", "cnn, inputs", "resnet")  # no rules for attention

    def make(self, model: nn.Module, sites: list[GateSite]) -> ChannelScorer:
        return RelPScorer(model, sites, means=means_of(sites))


class TestEAPIG(ScorerContract):
    scorer = EAPIGScorer

    def make(self, model: nn.Module, sites: list[GateSite]) -> ChannelScorer:
        return EAPIGScorer(model, sites, steps=2, means=means_of(sites))


class TestEAPIGOfGates(ScorerContract):
    scorer = EAPIGScorer

    def make(self, model: nn.Module, sites: list[GateSite]) -> ChannelScorer:
        return EAPIGScorer(model, sites, path="gates", steps=2, means=means_of(sites))


class _Search(ScorerContract):
    draws_images = True

    def make(self, model: nn.Module, sites: list[GateSite]) -> ChannelScorer:
        options = {"passes": 16, "images_per_step": 8, "means": means_of(sites)}
        return self.scorer(model, sites, **options)


class TestCOAR(_Search):
    scorer = COARScorer
    needs_gradients = False


class TestHardConcrete(_Search):
    scorer = HardConcreteScorer


class TestUGS(_Search):
    scorer = UGSScorer


class TestIterative(_Search):
    scorer = IterativeScorer


class TestMagnitude(ScorerContract):
    scorer = MagnitudeScorer
    sees_images = False
    runs_network = True


class _Given(ScorerContract):
    sees_images = False

    def test_bad_input_tasks(self, score, data) -> None:
        """Tasks that the images have and the scores have not."""
        with pytest.raises(ValueError, match=r"no scores for task \(1, 2\), only for 0, 1, 2"):
            score(*data, tasks=[(1, 2)])


TASKS = [0, 1, 2, (0, 2)]


class TestGiven(_Given):
    scorer = GivenScorer

    def make(self, model: nn.Module, sites: list[GateSite]) -> ChannelScorer:
        generator = torch.Generator().manual_seed(0)
        given = {s.name: torch.randn(4, s.n_channels, generator=generator) for s in sites}
        return GivenScorer(given, sites, TASKS, model=model)


class TestGates(_Given):
    """NAD with the interface of its rivals."""

    scorer = GatesScorer
    learned: ClassVar[dict[tuple[object, ...], TaskGates]] = {}

    def make(self, model: nn.Module, sites: list[GateSite]) -> ChannelScorer:
        # A network of each class is the same in all tests, so its gates are learned once.
        key = (type(model), *sites)
        if key not in self.learned:
            # Learned in float64, whatever the network that the scorer is given.
            exact = copy.deepcopy(model).double()
            data = helpers.labelled_images(6)
            self.learned[key] = learn_gates(exact, data, TASKS, Recipe(steps=2), sites)
        return GatesScorer(self.learned[key], model=model)

    def test_bad_sites(self) -> None:
        gates = TaskGates({"relu9": torch.rand(4, 6)}, [GateSite("relu9", 6, 1)], TASKS)
        with pytest.raises(SiteError, match="relu9"):
            GatesScorer(gates, model=helpers.build(helpers.TinyCNN))

    def test_wrong_number_of_channels(self) -> None:
        """No network is run, so there is nothing to check."""


class TestOtherTask(_Given):
    scorer = OtherTaskScorer

    def test_bad_sites(self) -> None:
        gates = TaskGates({"relu9": torch.rand(4, 6)}, [GateSite("relu9", 6, 1)], TASKS)
        with pytest.raises(SiteError, match="relu9"):
            OtherTaskScorer(gates, model=helpers.build(helpers.TinyCNN))

    def make(self, model: nn.Module, sites: list[GateSite]) -> ChannelScorer:
        generator = torch.Generator().manual_seed(0)
        gates = {s.name: torch.rand(4, s.n_channels, generator=generator) for s in sites}
        return OtherTaskScorer(TaskGates(gates, sites, TASKS), model=model)


def test_every_name_is_held_to_the_contract() -> None:
    from tests import test_baselines

    held = {
        cls.scorer
        for module in (globals(), vars(test_baselines))
        for cls in module.values()
        if isinstance(cls, type) and issubclass(cls, ScorerContract) and hasattr(cls, "scorer")
    }
    assert set(SCORERS.values()) <= held
