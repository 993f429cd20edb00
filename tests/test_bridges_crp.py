"""CRP conditions: their form, and how their heat-maps differ from the gated network's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from nad_attr import GateSite, GatingError, SubArchitecture
from tests import helpers
from tests.folded import SITES, plain, random_gates, random_means

pytest.importorskip("zennit", reason="the extra zennit is not installed")

from zennit.attribution import Gradient
from zennit.composites import COMPOSITES, LayerMapComposite, layer_map_base
from zennit.rules import Epsilon
from zennit.types import Linear

from nad_attr.bridges.crp import CRPComparison, compare_with_condition, relevance_masked


def arch(task: int | None = 1) -> SubArchitecture:
    return SubArchitecture({n: g > 0 for n, g in random_gates(False).items()}, SITES, task=task)


def epsilon() -> LayerMapComposite:
    layers = [*layer_map_base(1e-12), (Linear, Epsilon(epsilon=1e-12))]
    return LayerMapComposite(layers)


def test_the_form_of_a_condition() -> None:
    condition = arch().to_crp_condition()
    assert list(condition) == ["y", "relu2", "relu1"]
    assert condition["y"] == [1]
    assert condition["relu2"] == arch().kept["relu2"].tolist()
    assert all(type(c) is int for channels in condition.values() for c in channels)
    assert arch().to_crp_condition(2)["y"] == [2]
    assert arch().to_crp_condition((2, 0))["y"] == [0, 2]
    # A site that masks nothing is left out; one that keeps nothing masks everything.
    part = SubArchitecture.from_kept({"relu1": range(6)}, SITES)
    assert part.to_crp_condition(0) == {"y": [0], "relu2": []}
    with pytest.raises(ValueError, match="no target"):
        arch(None).to_crp_condition()
    for site in (GateSite("norm", 8, -1), GateSite("conv", 8, 1, at_input=True)):
        tokens = SubArchitecture.from_kept({site.name: [0]}, [site])
        with pytest.raises(ValueError, match="axis 1 of a module's output"):
            tokens.to_crp_condition(0)
        assert SubArchitecture.full([site]).to_crp_condition(0) == {"y": [0]}


def crp_by_hand(model: torch.nn.Module, x: Tensor, composite: object, condition: dict) -> Tensor:
    """What zennit-crp does: tensor hooks that zero the gradient of channels, beside the rules."""
    model = copy.deepcopy(model)

    def masking(channels: list[int]) -> object:
        def hook(module: torch.nn.Module, args: object, output: Tensor) -> None:
            def mask(grad: Tensor) -> Tensor:
                kept = torch.zeros_like(grad)
                kept[:, channels] = grad[:, channels]
                return kept

            output.register_hook(mask)

        return hook

    start = lambda output: output.detach() * torch.eye(3, dtype=x.dtype)[condition["y"]]  # noqa: E731
    with Gradient(model, composite) as attributor:
        # Behind the rules: Zennit 1.0 hands another tensor on than the module's own.
        for name, channels in condition.items():
            if name != "y":
                model.get_submodule(name).register_forward_hook(masking(channels))
        return attributor(x, start)[1]


@pytest.mark.parametrize("name", ["epsilon_plus", "epsilon_alpha2_beta1", "guided_backprop"])
def test_the_mask_is_that_of_a_condition(name: str) -> None:
    model, x = plain(), helpers.images(3)
    expected = crp_by_hand(model, x, COMPOSITES[name](), arch().to_crp_condition())
    with relevance_masked(model, arch()), Gradient(model, COMPOSITES[name]()) as attributor:
        output, found = attributor(x, lambda o: o.detach() * torch.eye(3, dtype=x.dtype)[[1]])
    assert torch.equal(output, model(x))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    if name != "guided_backprop":
        pair = compare_with_condition(model, arch(), x, composite=COMPOSITES[name]())
        torch.testing.assert_close(pair.condition, expected, rtol=1e-10, atol=1e-14)


def test_what_each_heat_map_sums_to() -> None:
    model, x = plain(bias=False), helpers.images(4)
    with helpers.assert_model_untouched(model, x):
        found = compare_with_condition(model, arch(), x, composite=epsilon())
    with torch.no_grad():
        outputs = model(x)[:, 1]
        with arch().applied(model):
            gated_outputs = model(x)[:, 1]
    torch.testing.assert_close(found.output, outputs)
    torch.testing.assert_close(found.gated_output, gated_outputs)
    total = lambda maps: maps.sum((1, 2, 3))  # noqa: E731
    torch.testing.assert_close(total(found.whole), outputs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(total(found.gated), gated_outputs, rtol=1e-9, atol=1e-9)
    # The condition drops what would have gone through the closed channels, here most of it.
    assert (total(found.condition) - outputs).abs().min() > 1e-3
    assert (total(found.condition) - gated_outputs).abs().max() > 1e-6
    assert found.similarity().shape == (4,)
    assert found.similarity().max() < 1 - 1e-6


def test_all_channels_kept_make_no_difference() -> None:
    model, x = plain(), helpers.images(2)
    found = compare_with_condition(model, SubArchitecture.full(SITES), x, [0, 2])
    torch.testing.assert_close(found.condition, found.whole)
    torch.testing.assert_close(found.gated, found.whole)
    torch.testing.assert_close(found.similarity(), torch.ones(2, dtype=torch.float64))


def test_the_ablation_value_is_no_part_of_a_condition() -> None:
    model, x = plain(), helpers.images(2)
    means = {name: mean.float() for name, mean in random_means().items()}
    zero = compare_with_condition(model, arch(), x)
    mean = compare_with_condition(model, arch().with_means(means), x)
    torch.testing.assert_close(zero.condition, mean.condition)
    assert not torch.allclose(zero.gated, mean.gated)


def test_nothing_is_left() -> None:
    model, x = plain(), helpers.images(2)
    with helpers.assert_model_untouched(model, x):
        with relevance_masked(model, arch()):
            model(x)
        with pytest.raises(ArithmeticError), relevance_masked(model, arch()):
            raise ArithmeticError
        with pytest.raises(GatingError), relevance_masked(model, arch()):
            pass  # not run
        with pytest.raises(ValueError, match="not a class"):
            compare_with_condition(model, arch(), x, 3)
        with pytest.raises(ValueError, match="no target"):
            compare_with_condition(model, arch(None), x)


@pytest.mark.slow
def test_the_figure_has_a_row_for_each() -> None:
    pytest.importorskip("matplotlib")
    maps = torch.randn(2, 3, 4, 4)
    comparison = CRPComparison(maps, maps, maps, torch.ones(2), torch.ones(2))
    figure = comparison.figure(torch.rand(2, 3, 4, 4))
    assert [axis.get_ylabel() for axis in figure.axes[::2]] == [
        "whole network",
        "CRP condition",
        "sub-architecture",
    ]
