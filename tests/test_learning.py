"""Learning: the paper's recipe against an independent one, the default recipe, side effects."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from nad_attr import GateSite, Recipe, RunOptions, TaskGates, find_gate_sites, learn_gates
from nad_attr.gates.channels import budget
from tests import helpers

QUICK = Recipe(size=0.5, steps=6, images_per_step=4)


def sites_of(model: nn.Module) -> list[GateSite]:
    return find_gate_sites(model, helpers.images(1))


# -- the paper's recipe ------------------------------------------------------------------------


def reference_paper(
    model: nn.Module,
    sites: list[GateSite],
    batches: list[tuple[Tensor, Tensor]],
    start: dict[str, Tensor],
    beta: float,
) -> dict[str, Tensor]:
    """One class by itself, as plainly as can be written: DESIGN 2.1, weights with gradients."""
    modules = dict(model.named_modules())
    m = {site.name: start[site.name].double().clone().requires_grad_(True) for site in sites}
    for x, y in batches:
        original: dict[str, Tensor] = {}
        gated: dict[str, Tensor] = {}

        def keep(name: str, store: dict[str, Tensor], gate: bool):
            def hook(module: nn.Module, args: object, out: Tensor) -> Tensor | None:
                if gate:
                    out = out * torch.sigmoid(m[name]).reshape(1, -1, *[1] * (out.ndim - 2))
                store[name] = out.clone()
                return out if gate else None

            return hook

        handles = [
            modules[s.name].register_forward_hook(keep(s.name, original, False)) for s in sites
        ]
        clean = model(x).detach()
        for handle in handles:
            handle.remove()
        right = clean.argmax(1) == y
        if not right.any():
            continue
        handles = [modules[s.name].register_forward_hook(keep(s.name, gated, True)) for s in sites]
        out = model(x)
        for handle in handles:
            handle.remove()
        n_sites = len(sites)
        loss = F.cross_entropy(out[right], y[right])
        for site in sites:
            loss = loss + (gated[site.name] - original[site.name].detach())[right].pow(2).mean()
        loss = loss / n_sites
        for site in sites:
            loss = loss + beta / n_sites * torch.sigmoid(m[site.name]).pow(2).mean()
        grads = torch.autograd.grad(loss, list(m.values()))
        with torch.no_grad():
            for value, grad in zip(m.values(), grads, strict=True):
                value -= 0.1 * grad / max(grad.norm().item(), 1e-12)
    return {name: value.detach() for name, value in m.items()}


class Logged(Dataset[tuple[Tensor, Tensor]]):
    """Remembers what was drawn."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.targets = x, y, y.tolist()
        self.drawn: list[int] = []

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        self.drawn.append(i)
        return self.x[i], self.y[i]


@pytest.mark.slow
@pytest.mark.parametrize("make", [helpers.TinyCNN, helpers.TinyResNet])
@pytest.mark.parametrize("together", [True, False])
def test_paper_recipe_equals_an_independent_one(make: type[nn.Module], together: bool) -> None:
    model = helpers.build(make)
    sites = sites_of(model)
    x, y = helpers.labelled_images(15)
    with torch.no_grad():
        right = model(x).argmax(1) == y
    assert right.any()
    assert not right.all()
    tasks = [0, 1, 2]
    generator = torch.Generator().manual_seed(1)
    start = {
        s.name: torch.randn(3, s.n_channels, generator=generator, dtype=torch.float64)
        for s in sites
    }
    # 5 own images, one batch per pass: 8 steps whose order does not matter.
    recipe = Recipe.paper(beta=0.7, epochs=8, images_per_step=5)
    groups = [tasks] if together else [[k] for k in tasks]
    for group in groups:
        gates = learn_gates(
            model,
            (x, y),
            group,
            recipe,
            sites,
            initial_logits={name: value[group] for name, value in start.items()},
        )
        for row, k in enumerate(group):
            own = y == k
            expected = reference_paper(
                model,
                sites,
                [(x[own], y[own])] * 8,
                {name: value[k] for name, value in start.items()},
                0.7,
            )
            for name, value in expected.items():
                assert gates.logits is not None
                torch.testing.assert_close(
                    gates.logits[name][row].double(), value, rtol=0, atol=1e-6
                )
                torch.testing.assert_close(
                    gates[name][row].double(), value.sigmoid(), rtol=0, atol=1e-6
                )


def test_paper_recipe_batches_its_own_images_and_keeps_the_last_partial_batch() -> None:
    model = helpers.build(helpers.TinyCNN)
    sites = sites_of(model)
    x, y = helpers.labelled_images(21)
    data = Logged(x, y)
    start = {s.name: torch.zeros(1, s.n_channels) for s in sites}
    recipe = Recipe.paper(beta=0.1, epochs=3, images_per_step=3)
    data_labels = data.targets
    gates = learn_gates(model, data, [1], recipe, sites, initial_logits=start)
    drawn = data.drawn[4:]  # the first are the checks before learning
    assert len(drawn) == 3 * 7
    assert all(data_labels[i] == 1 for i in drawn)
    for epoch in range(3):
        assert sorted(drawn[7 * epoch : 7 * epoch + 7]) == (y == 1).nonzero().flatten().tolist()
    assert drawn[:7] != drawn[7:14]  # another order
    cut = [drawn[7 * e + i : 7 * e + min(i + 3, 7)] for e in range(3) for i in (0, 3, 6)]
    expected = reference_paper(
        model, sites, [(x[c], y[c]) for c in cut], {n: v[0] for n, v in start.items()}, 0.1
    )
    assert gates.logits is not None
    for name, value in expected.items():
        torch.testing.assert_close(gates.logits[name][0].double(), value, rtol=0, atol=1e-6)


def test_paper_recipe_skips_tasks_without_a_right_image() -> None:
    model = helpers.build(helpers.TinyCNN)
    x, y = helpers.labelled_images(30)
    with torch.no_grad():
        wrong = model(x).argmax(1) != y
    x, y = x[wrong], y[wrong]
    k = int(y[0])
    start = {s.name: torch.randn(1, s.n_channels) for s in sites_of(model)}
    recipe = Recipe.paper(beta=0.1, epochs=2)
    gates = learn_gates(model, (x, y), [k], recipe, initial_logits=start)
    assert gates.logits is not None
    assert gates.history is not None
    for name, value in start.items():
        torch.testing.assert_close(gates.logits[name], value)
    assert np.isnan(gates.history["loss"]).all()


def test_paper_recipe_values() -> None:
    assert Recipe.paper("VGG16", "places365").beta == 5.0
    densenet = Recipe.paper("densenet121")
    assert densenet.rectified_sites == ("features",)
    assert densenet.ablation == "zero"
    assert (densenet.epochs, densenet.images_per_step, densenet.learning_rate) == (20, 16, 0.1)
    with pytest.raises(ValueError, match="beta"):
        Recipe.paper("resnet18")
    with pytest.raises(ValueError, match="beta"):
        Recipe.paper()
    with pytest.raises(ValueError, match="size"):
        Recipe.paper("vgg16", size=0.3)
    with pytest.raises(TypeError, match="steps"):  # an argument without effect is refused
        Recipe.paper("vgg16", steps=5)
    assert Recipe.from_json(densenet.to_json()) == densenet


def test_recipes_of_earlier_versions_are_read_as_what_they_were() -> None:
    fields = json.loads(Recipe(size=0.3).to_json())
    del fields["boundary"]
    assert Recipe.from_json(json.dumps(fields)) == Recipe(size=0.3, boundary=0.0)


# -- the default recipe ------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=8)
@given(size=st.floats(0.02, 1.0), seed=st.integers(0, 10))
def test_size_is_reached_exactly(size: float, seed: int) -> None:
    model = helpers.build(helpers.TinyCNN)
    sites = sites_of(model)
    recipe = Recipe(size=size, steps=6, images_per_step=4)
    gates = learn_gates(model, helpers.labelled_images(), None, recipe, sites, seed=seed)
    for arch in gates.sub_architectures():
        assert arch.n_kept == budget(size, sites)


@pytest.mark.slow
@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_gates_do_not_depend_on_company_order_or_batch_size(ablation: str) -> None:
    model = helpers.build(helpers.TinyResNet)
    data = helpers.labelled_images(30)
    recipe = Recipe(size=0.4, ablation=ablation, steps=5, images_per_step=6)
    together = learn_gates(model, data, [0, 1, 2], recipe, batch_size=18)
    assert learn_gates(model, data, [2, 0, 1], recipe, batch_size=12).select([0, 1, 2]) == together
    for task, size in ((0, 1), (1, 4), (2, 6)):
        alone = learn_gates(model, data, [task], recipe, batch_size=size)
        assert alone == together.select([task])
    assert learn_gates(model, data, [0, 1, 2], recipe) == together  # and it repeats
    assert learn_gates(model, data, [0, 1, 2], recipe, seed=1) != together


def planted() -> tuple[nn.Module, Tensor, Tensor]:
    """Two classes read channels 0, 1 and 2, 3 of eight; 4 and 5 are equal and cancel; 6, 7 idle.

    The cancelling pair carries large opposite contributions to output 0, so every gradient score
    ranks it first, and it is not needed.
    """
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).double().eval()
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.zero_()
        for channel, feature in enumerate([0, 1, 2, 3, 4, 4, 5, 5]):
            net[0].weight[channel, feature] = 1.0
        net[2].weight.copy_(
            torch.tensor([[1.0, 1.0, 0, 0, 5, -5, 0, 0], [0, 0, 1.0, 1.0, 0, 0, 0, 0]])
        )
        net[2].bias.zero_()
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(200, 6, generator=generator, dtype=torch.float64) + 0.1
    with torch.no_grad():
        labels = net(x).argmax(1)
    return net, x, labels


@pytest.mark.slow
@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_planted_circuits_are_found(ablation: str) -> None:
    net, x, labels = planted()
    recipe = Recipe(size=0.25, ablation=ablation, steps=40, images_per_step=8)
    gates = learn_gates(net, (x, labels), [0, 1], recipe)
    assert gates.sub_architecture(0).kept["1"].tolist() == [0, 1]
    assert gates.sub_architecture(1).kept["1"].tolist() == [2, 3]
    with torch.no_grad(), gates.sub_architecture(0).with_means(None).applied(net):
        torch.testing.assert_close(net(x)[:, 0], x[:, 0] + x[:, 1])


@pytest.mark.slow
def test_superclass_is_one_task_with_logsumexp_output() -> None:
    model = helpers.build(helpers.TinyCNN)
    data = helpers.labelled_images(24)
    gates = learn_gates(model, data, {"first": 0, "rest": [2, 1]}, QUICK)
    assert gates.tasks == (0, (1, 2))
    assert gates.task_names == ("first", "rest")
    assert gates.sub_architecture("rest") == gates.sub_architecture((1, 2))
    assert gates["relu1"].shape == (2, 6)
    # Other tasks change nothing here either, padded groups included.
    assert learn_gates(model, data, [(1, 2)], QUICK) == gates.select(["rest"])


@pytest.mark.slow
def test_own_images_alone_are_said_clearly() -> None:
    model = helpers.build(helpers.TinyCNN)
    x, _ = helpers.labelled_images()
    labels = torch.full((len(x),), 1)
    quick = dataclasses.replace(QUICK, ablation="mean")  # which looks at the boundary
    with pytest.warns(UserWarning, match="task 1 has own images only"):
        gates = learn_gates(model, (x, labels), [1], quick)
    assert gates.info["own_images_only"] == [1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = learn_gates(model, helpers.labelled_images(), [1], quick)
    assert both.info["own_images_only"] == []
    # There is no boundary among own images: all count the same.
    everywhere = dataclasses.replace(quick, boundary=0.0)
    with pytest.warns(UserWarning, match="own images only"):
        alike = learn_gates(model, (x, labels), [1], everywhere)
    assert all(torch.equal(alike.logits[site], gates.logits[site]) for site in gates)
    other = learn_gates(model, helpers.labelled_images(), [1], everywhere)
    assert not all(torch.equal(other.logits[site], both.logits[site]) for site in both)


@pytest.mark.slow
def test_all_kinds_of_data_give_the_same_gates() -> None:
    model = helpers.build(helpers.TinyCNN)
    x, y = helpers.labelled_images()
    expected = learn_gates(model, (x, y), [0, 2], QUICK)
    dataset = TensorDataset(x, y)
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    for data in (
        dataset,
        Logged(x, y),
        DataLoader(dataset, batch_size=4, shuffle=True),
        DataLoader(Logged(x, y), batch_size=5),
        DataLoader(batches, batch_size=None),
        (x, y.tolist()),
    ):
        if isinstance(data, DataLoader) and data.batch_size is None:
            data = iter(data)
        assert learn_gates(model, data, [0, 2], QUICK) == expected


@pytest.mark.slow
def test_works_without_grad_in_inference_mode_and_on_frozen_networks() -> None:
    model = helpers.build(helpers.TinyResNet)
    data = helpers.labelled_images()
    expected = learn_gates(model, data, [0], QUICK)
    with torch.no_grad():
        assert learn_gates(model, data, [0], QUICK) == expected
    with torch.inference_mode():
        x, y = helpers.labelled_images()  # inference tensors
        assert learn_gates(model, (x, y), [0], QUICK) == expected
    model.requires_grad_(False)
    assert learn_gates(model, data, [0], QUICK) == expected


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [QUICK, Recipe.paper(beta=0.1, epochs=2)])
def test_model_data_and_random_states_are_untouched(tiny_model: nn.Module, recipe: Recipe) -> None:
    x, y = helpers.labelled_images()
    for parameter in list(tiny_model.parameters())[::2]:
        parameter.requires_grad_(False)
    with helpers.assert_model_untouched(tiny_model, x, y):
        learn_gates(tiny_model, (x, y), [0, 1], recipe)
        learn_gates(tiny_model, Logged(x, y), [0, 1], recipe)


def test_model_is_untouched_when_the_data_fails_half_way() -> None:
    class Failing(Logged):
        def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
            if len(self.drawn) > 10:
                raise OSError("disk gone")
            return super().__getitem__(i)

    model = helpers.build(helpers.TinyCNN)
    with pytest.raises(OSError, match="disk gone"), helpers.assert_model_untouched(model):
        learn_gates(model, Failing(*helpers.labelled_images()), [0], QUICK)


@pytest.mark.slow
def test_one_clean_pass_per_image_and_no_weight_gradients() -> None:
    model = helpers.build(helpers.TinyCNN)
    x, y = helpers.labelled_images(12)
    sites = sites_of(model)
    seen = {"clean": 0, "gated": 0}
    weights_need_grad = []

    def count(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        seen["gated" if torch.is_grad_enabled() else "clean"] += len(out)
        if torch.is_grad_enabled():
            weights_need_grad.append(any(p.requires_grad for p in model.parameters()))

    handle = model.register_forward_hook(count)
    recipe = Recipe(size=0.5, ablation="zero", steps=10, images_per_step=4)
    try:
        learn_gates(model, (x, y), [0, 1, 2], recipe, sites, checks="off")
        # One to see how the network checkpoints.
        assert seen["gated"] == 3 * 10 * 4 + 1
        # 12 images at most once, 2 for the check before learning, 3 to ask for the batch size.
        assert seen["clean"] == 12 + 2 + 3
        seen.update(clean=0, gated=0)
        # A dataset may be augmented: then once for every image that is drawn, and not more.
        learn_gates(model, Logged(x, y), [0, 1, 2], recipe, sites, checks="off")
        assert seen["gated"] == 120 + 1
        assert seen["clean"] == 120 + 2
    finally:
        handle.remove()
    assert weights_need_grad
    assert not any(weights_need_grad)


@pytest.mark.slow
def test_an_image_drawn_twice_in_a_step_is_run_once() -> None:
    model = helpers.build(helpers.TinyCNN)
    sites = sites_of(model)
    x, y = helpers.labelled_images(6)  # two own, four other images
    recipe = Recipe(size=0.5, ablation="zero", steps=5, images_per_step=20)
    seen = []
    handle = model.register_forward_hook(lambda m, a, out: seen.append(len(out)))
    try:
        once = learn_gates(model, (x, y), [0, 1], recipe, sites, checks="off")
        # The checks, each image clean, then two tasks' images.
        assert seen == [3, 2, 1, 6] + [12] * 5
        seen.clear()
        # Told that images may change, every draw is run; they do not, so the gates are the same.
        assert learn_gates(model, Logged(x, y), [0, 1], recipe, sites, checks="off") == once
        assert seen == [2, 1] + [40] * 10
    finally:
        handle.remove()


@pytest.mark.slow
def test_mixed_precision_keeps_float32_gates() -> None:
    model = helpers.build(helpers.TinyCNN).float()
    x, y = helpers.labelled_images()
    gates = learn_gates(model, (x.float(), y), [0, 1], QUICK, amp=True)
    assert gates["relu1"].dtype == torch.float32
    assert gates.info["amp"] == "torch.bfloat16"
    assert gates.sub_architecture(0).n_kept == 7


@pytest.mark.slow
def test_history_has_a_curve_per_task_and_plots() -> None:
    pytest.importorskip("matplotlib")
    model = helpers.build(helpers.TinyCNN)
    x, y = helpers.labelled_images(13)  # 5, 4, 4 images
    gates = learn_gates(model, (x, y), None, QUICK)
    assert gates.history is not None
    assert gates.history["loss"].shape == (6, 3)
    assert gates.history["size"][-1].tolist() == [0.5] * 3
    assert len(gates.history.plot().axes) == 2
    paper = learn_gates(model, (x, y), None, Recipe.paper(beta=0.1, epochs=2, images_per_step=4))
    assert paper.history is not None
    assert paper.history["size"].shape == (4, 3)


class Two(nn.Module):
    """Takes two inputs and a scale, returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        self.head = nn.Linear(6, 3)

    def forward(self, a: Tensor, b: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return {"logits": self.head(self.body(torch.cat([a, b], 1) * scale))}


@pytest.mark.slow
def test_several_inputs_further_arguments_and_a_forward_function() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Two().double().eval()
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 12, 2, generator=generator, dtype=torch.float64)
    y = torch.arange(12) % 3
    with pytest.raises(TypeError, match="forward_func"):
        learn_gates(model, ((a, b), y), [0], QUICK)

    def forward(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        return model(a, b, scale)["logits"]

    gates = learn_gates(model, ((a, b), y), [0], QUICK, run=RunOptions(forward_func=forward))
    assert list(gates) == ["body.1"]
    scaled = learn_gates(
        model,
        ((a, b), y),
        [0],
        QUICK,
        run=RunOptions(forward_func=forward, additional_forward_args=2.0),
    )
    doubled = learn_gates(
        model, ((2 * a, 2 * b), y), [0], QUICK, run=RunOptions(forward_func=forward)
    )
    assert scaled == doubled


def test_device_is_an_argument() -> None:
    model = helpers.build(helpers.TinyCNN)
    gates = learn_gates(model, helpers.labelled_images(), [0], QUICK, device="cpu")
    assert isinstance(gates, TaskGates)
    assert gates.info["device"] == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA"):
            learn_gates(model, helpers.labelled_images(), [0], QUICK, device="cuda")


@pytest.mark.gpu
def test_gpu_copy_gives_cpu_results() -> None:
    model = helpers.build(helpers.TinyResNet)
    data = helpers.labelled_images(30)
    recipe = Recipe(size=0.4, steps=12, images_per_step=6)
    with helpers.assert_model_untouched(model):
        there = learn_gates(model, data, None, recipe, device="cuda")
    assert there == learn_gates(model, data, None, recipe)


def test_progress_bar_counts_task_steps(capfd: pytest.CaptureFixture[str]) -> None:
    model = helpers.build(helpers.TinyCNN)
    learn_gates(model, helpers.labelled_images(), None, QUICK, show_progress=True)
    assert f"{3 * QUICK.steps}/{3 * QUICK.steps}" in capfd.readouterr().err


@pytest.mark.slow
def test_channel_means_come_from_all_classes_whatever_the_tasks() -> None:
    model = helpers.build(helpers.TinyCNN)
    x, y = helpers.labelled_images()
    gates = learn_gates(model, (x, y), [0], QUICK)
    with torch.no_grad():
        expected = model.relu1(model.bn1(model.conv1(x))).mean((0, 2, 3))
    assert gates.means is not None
    torch.testing.assert_close(gates.means["relu1"].double(), expected, rtol=1e-6, atol=1e-6)
    zero = learn_gates(model, (x, y), [0], Recipe(size=0.5, ablation="zero", steps=6))
    assert zero.means is None


def test_gates_rank_inside_and_outside_evenly() -> None:
    model = helpers.build(helpers.TinyCNN)
    gates = learn_gates(model, helpers.labelled_images(), [0], QUICK)
    values = torch.cat([gates[name][0] for name in gates]).sort().values
    assert math.isclose(values[6], 0.5 * 7 / 8, abs_tol=1e-5)
    assert math.isclose(values[7], 0.5 + 0.5 / 8, abs_tol=1e-5)
    smaller = gates.sub_architecture(0, size=0.3)
    assert (smaller - gates.sub_architecture(0)).n_kept == 0  # nested
