"""Information flow: by hand, its conservation, its shortcuts, and edges really cut."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nad_attr import (
    GateSite,
    InformationFlow,
    Labels,
    RunOptions,
    SiteError,
    SubArchitecture,
    TaskGates,
    find_gate_sites,
    information_flow,
    recorded,
)
from nad_attr.flow.edge_sets import agreement, edge_drops, edge_fidelity
from nad_attr.flow.links import kept_edges
from nad_attr.flow.picture import flow_picture
from nad_attr.flow.shape import flow_shape, flow_sharing, parting_depth
from nad_attr.system.memory import peak_memory
from tests.helpers import TinyCNN, TinyResNet, assert_model_untouched

pytest.importorskip("pandas")


class ReLUNet(nn.Module):
    """No biases: all that arrives at a channel is its effect."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(5, 6, 3, bias=False), nn.ReLU(inplace=True)
        self.conv3, self.relu3 = nn.Conv2d(6, 4, 3, bias=False), nn.ReLU()
        self.linear = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        return self.linear(self.relu3(self.conv3(x)).mean((2, 3)))


class Residual(nn.Module):
    """Channels of the shortcut moved by one place: straight flow leads from i to i + 1."""

    def __init__(self, shift: int = 0) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
        self.conv, self.join = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
        self.linear, self.shift = nn.Linear(4, 3), shift

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = self.join(self.conv(x) + x.roll(self.shift, 1))
        return self.linear(x.mean((2, 3)))


class Cells(nn.Module):
    """Each cell reads the two before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.cells = nn.ModuleList(_Cell() for _ in range(3))
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        before = last = self.stem(x)
        for cell in self.cells:
            before, last = last, cell(before, last)
        return self.linear(last.mean((2, 3)))


class _Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 2, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, s0: Tensor, s1: Tensor) -> Tensor:
        return F.relu(torch.cat([self.a(s0), self.b(s1)], 1))


def made(kind: type[nn.Module], *args: object) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = kind(*args).double().eval()
    return net, torch.rand(5, 3, 8, 8, dtype=torch.float64)


def whole(net: nn.Module, x: Tensor) -> SubArchitecture:
    return SubArchitecture.full(find_gate_sites(net, x))


def half(net: nn.Module, x: Tensor) -> SubArchitecture:
    """About two thirds of the channels, the others at some constants."""
    sites = find_gate_sites(net, x)
    generator = torch.Generator().manual_seed(1)
    masks = {s.name: torch.rand(s.n_channels, generator=generator) < 0.7 for s in sites}
    for mask in masks.values():
        mask[0] = True
    means = {s.name: torch.rand(s.n_channels, generator=generator) for s in sites}
    return SubArchitecture(masks, sites, task=1, means=means)


class Counting(ReLUNet):
    """Notes the number of its images at the start, as EfficientNet-Lite does."""

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        x = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        return self.linear(self.relu3(self.conv3(x)).reshape(n, 4, -1).mean(2))


NETS = [(Counting,), (ReLUNet,), (TinyCNN,), (TinyResNet,), (Residual, 1), (Cells,)]


@pytest.mark.parametrize("net", NETS, ids=lambda n: n[0].__name__)
@pytest.mark.parametrize("receivers", [None, 2])
def test_what_flows_out_is_the_effect(net: tuple[type[nn.Module]], receivers: int | None) -> None:
    model, x = made(*net)
    for arch in (whole(model, x), half(model, x)):
        with assert_model_untouched(model):
            found = information_flow(
                model, arch, x, tasks=1, receivers=receivers, run=RunOptions(batch_size=2)
            )
        assert max(found.conservation.values()) < 1e-12
        nodes = found.nodes.query("channel >= 0")
        assert (nodes.effect - nodes.outflow).abs().max() < 1e-12
        whole_again = found.nodes.dropna()
        assert (whole_again.inflow + whole_again.source - whole_again.effect).abs().max() < 1e-12


def test_effects_are_gradient_times_what_is_above_the_constants() -> None:
    model, x = made(TinyCNN)
    arch = half(model, x)
    found = information_flow(model, arch, x)
    mean = arch.means["relu1"].double()[None, :, None, None]  # type: ignore[index]
    keep = arch["relu1"].double()[None, :, None, None]
    h = model.relu1(model.bn1(model.conv1(x))) * keep + mean * (1 - keep)
    h = h.detach().requires_grad_()
    # Downstream of relu1, closed channels of relu2 are constants.
    keep2 = arch["relu2"].double()[None, :, None, None]
    mean2 = arch.means["relu2"].double()[None, :, None, None]  # type: ignore[index]
    z = model.relu2(model.conv2(h)) * keep2 + mean2 * (1 - keep2)
    y = model.linear(model.pool(z).flatten(1))[:, 1].sum()
    (g,) = torch.autograd.grad(y, h)
    effect = (g * (h - mean)).sum((2, 3)).sum(0).detach() / len(x)
    torch.testing.assert_close(found.flows[0].effects["relu1"], effect)
    assert bool((effect[~arch["relu1"]] == 0).all())


def test_flow_is_the_jacobian_by_hand() -> None:
    model, x = made(ReLUNet)
    found = information_flow(model, whole(model, x), x, tasks=2)
    link = next(k for k in found.flows[0].links if k.target_site == "relu2")
    expected = torch.zeros(5, 6, dtype=torch.float64)
    for image in x:
        h = model.relu1(model.conv1(image[None])).detach()
        block = lambda t: F.relu(model.conv2(t))  # noqa: E731
        after = block(h).detach().requires_grad_()
        y = model.linear(model.relu3(model.conv3(after.clone())).mean((2, 3)))[0, 2]
        (g,) = torch.autograd.grad(y, after)
        jacobian = torch.autograd.functional.jacobian(block, h)  # (1, 6, 6, 6, 1, 5, 8, 8)
        weighted = torch.einsum("ajpqbihw,ajpq,bihw->ij", jacobian, g, h)
        expected += weighted / len(x)
    torch.testing.assert_close(link.flow[:, :-1], expected)
    assert float(link.flow[:, -1].abs().max()) == 0


def test_inflow_is_the_effect_where_there_are_no_biases() -> None:
    model, x = made(ReLUNet)
    nodes = information_flow(model, whole(model, x), x, tasks=0).nodes
    later = nodes[nodes.site != "relu1"]
    assert (later.inflow - later.effect).abs().max() < 1e-12
    assert later.source.abs().max() < 1e-12
    assert (nodes[nodes.site == "relu1"].inflow == 0).all()


def test_the_rest_is_the_sum_of_those_that_are_not_told_apart() -> None:
    model, x = made(TinyResNet)
    arch = half(model, x)
    every = information_flow(model, arch, x, receivers=None)
    some = information_flow(model, arch, x, receivers=2)
    for one, two in zip(every.flows[0].links, some.flows[0].links, strict=True):
        told = torch.isin(one.targets, two.targets)
        torch.testing.assert_close(one.flow[:, :-1][:, told], two.flow[:, :-1])
        torch.testing.assert_close(one.flow[:, :-1][:, ~told].sum(1), two.flow[:, -1])
        if two.target_site != "output":
            effect = every.flows[0].effects[two.target_site].abs()
            others = one.targets[~told]
            assert not len(others) or effect[two.targets].min() >= effect[others].max()
    assert (some.edges.target == -1).any()


@pytest.mark.parametrize("shift", [0, 1])
def test_straight_flow_takes_the_shortcut(shift: int) -> None:
    model, x = made(Residual, shift)
    found = information_flow(model, whole(model, x), x, tasks=1)
    (link,) = (k for k in found.flows[0].links if k.target_site == "join")
    h = model.act(model.stem(x)).detach()
    after = F.relu(model.conv(h) + h.roll(shift, 1))
    open_at = (after > 0).double()
    g = open_at * model.linear.weight[1][None, :, None, None] / 64
    expected = (h * g.roll(-shift, 1)).sum((2, 3)).mean(0).detach()
    straight = link.straight[:, :-1]
    rows = torch.arange(4)
    torch.testing.assert_close(straight[rows, (rows + shift) % 4], expected)
    assert int((straight != 0).sum()) <= 4
    # Without the branch nothing else is left.
    with torch.no_grad():
        model.conv.weight.zero_()
        model.conv.bias.zero_()
    alone = information_flow(model, whole(model, x), x, tasks=1)
    (link,) = (k for k in alone.flows[0].links if k.target_site == "join")
    torch.testing.assert_close(link.flow, link.straight)


def test_half_of_the_channels_take_the_shortcut_and_are_shuffled() -> None:
    class Shuffled(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.stem(x))
            x = torch.cat([x[:, :2], self.conv(x)[:, 2:]], 1)
            return self.linear(self.join(x[:, [0, 2, 1, 3]]).mean((2, 3)))

    model, x = made(Shuffled)
    found = information_flow(model, whole(model, x), x, tasks=1, run=RunOptions(batch_size=2))
    (link,) = (k for k in found.flows[0].links if k.target_site == "join")
    assert (link.straight != 0).nonzero().tolist() == [[0, 0], [1, 2]]


def test_a_shortcut_with_a_convolution_is_not_straight() -> None:
    model, x = made(TinyResNet)
    found = information_flow(model, whole(model, x), x, tasks=1)
    shares = {k.target_site: float(k.straight.abs().sum()) for k in found.flows[0].links}
    assert shares["layer1.0"] > 0
    assert shares["layer1.1"] > 0
    assert shares["layer2.0"] == 0


def test_a_shortcut_over_a_normalisation_of_channels_is_unknown() -> None:
    class Normed(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.stem(x))
            x = self.conv(x) + F.group_norm(x, 1)
            return self.linear(self.join(x).mean((2, 3)))

    model, x = made(Normed)
    found = information_flow(model, whole(model, x), x, tasks=1)
    (link,) = (k for k in found.flows[0].links if k.target_site == "join")
    assert bool(link.straight.isnan().all())
    assert max(found.conservation.values()) < 1e-12


def test_cells_give_to_the_two_after_them() -> None:
    model, x = made(Cells)
    found = information_flow(model, whole(model, x), x, tasks=0)
    assert found.links["cells.2"] == ("cells.0", "cells.1")


def test_a_branch_is_refused_with_the_module_around_it() -> None:
    model, x = made(TinyResNet)
    sites = find_gate_sites(model, x, layers=["relu", "layer1.0.conv1", "layer2.0"])
    with pytest.raises(SiteError, match=r"'layer1.0.conv1'.*around it, 'layer1.0'"):
        information_flow(model, SubArchitecture.full(sites), x, tasks=0)


def test_own_images_of_two_tasks() -> None:
    model, x = made(TinyCNN)
    labels = torch.tensor([0, 1, 1, 2, 0])
    arch = half(model, x)
    both = information_flow(model, [arch, arch], (x, labels), tasks=[1, 2])
    assert list(both.edges.columns[:2]) == ["task", "source_site"]
    assert [flow.n_images for flow in both.flows] == [2, 1]
    one = information_flow(model, arch, x[3:4], tasks=2)
    for a, b in zip(both[2].links, one.flows[0].links, strict=True):
        torch.testing.assert_close(a.flow, b.flow)
    gates = TaskGates(
        {s.name: torch.rand(3, s.n_channels) for s in arch.sites}, arch.sites, [0, 1, 2],
        task_names=["cat", "dog", "cow"],
    )  # fmt: skip
    named = information_flow(model, gates, (x, labels), tasks=["dog", "cow"])
    assert [flow.name for flow in named.flows] == ["dog", "cow"]
    with pytest.raises(ValueError, match="not of 3"):
        information_flow(model, gates, x)
    with pytest.raises(ValueError, match="has no task"):
        information_flow(model, whole(model, x), x)
    with pytest.raises(ValueError, match="no image of task 4"):
        information_flow(model, arch, (x, labels), tasks=4)
    with pytest.raises(ValueError, match="receivers must be"):
        information_flow(model, arch, x, receivers=0)


def test_batches_and_low_precision_change_little() -> None:
    model, x = made(TinyResNet)
    arch = half(model, x)
    one, five = (information_flow(model, arch, x, run=RunOptions(batch_size=n)) for n in (1, 5))
    for a, b in zip(one.flows[0].links, five.flows[0].links, strict=True):
        torch.testing.assert_close(a.flow, b.flow)
    low = information_flow(model.float(), arch, x.float(), run=RunOptions(amp=True))
    a, b = one.flows[0].links[0].flow, low.flows[0].links[0].flow
    assert float((a - b).abs().max()) < 0.1 * float(a.abs().max())


def test_many_images_take_no_more_memory_than_few() -> None:
    model, x = made(TinyCNN)
    arch, run = whole(model, x), RunOptions(batch_size=5)

    class Photos(torch.utils.data.Dataset[tuple[Tensor, int]]):
        def __init__(self, n: int) -> None:
            self.n, self.targets = n, [1] * n

        def __len__(self) -> int:
            return self.n

        def __getitem__(self, number: int) -> tuple[Tensor, int]:
            return x[number % 5] + number / self.n, 1

    def peak(n: int) -> int:
        flow = partial(information_flow, model, arch, Photos(n), tasks=1, run=run)
        return peak_memory(torch.device("cpu"), flow)

    assert peak(200) < 1.1 * peak(20)


def test_progress_counts_the_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    model, x = made(TinyCNN)
    run = RunOptions(batch_size=2, show_progress=True)
    information_flow(model, whole(model, x), x, tasks=1, run=run)
    n = 3 * (len(find_gate_sites(model, x)) + 1)  # 3 batches of 5 images
    said = capsys.readouterr().err
    assert "information flow" in said
    assert f"{n}/{n}" in said


def test_a_network_that_answers_otherwise_each_time_is_named() -> None:
    calls = itertools.count()

    class Moody(TinyCNN):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * (1 + next(calls) % 2))

    model, x = made(Moody)
    with pytest.warns(RuntimeWarning, match=r"flows out of .* misses their effect by"):
        found = information_flow(model, whole(model, x), x, tasks=1)
    assert max(found.conservation.values()) > 1e-3


def test_a_site_that_keeps_nothing_lets_nothing_through() -> None:
    model, x = made(TinyResNet)
    arch = whole(model, x)
    masks = arch.masks
    masks["layer1.1"][:] = False
    found = information_flow(model, SubArchitecture(masks, arch.sites), x, tasks=0)
    assert float(found.flows[0].effects["layer1.0"].abs().max()) == 0
    assert "layer1.1" not in set(found.edges.source_site) | set(found.edges.target_site)
    assert found.plot() is not None


def test_bad_images_and_networks_are_refused() -> None:
    model, x = made(TinyCNN)
    arch = whole(model, x)
    with pytest.raises(SiteError, match="cannot be run on example_inputs"):
        information_flow(model, arch, x[:, :2], tasks=0)
    with pytest.raises(ValueError, match="not a single image"):
        information_flow(model, arch, x[:0], tasks=0)
    with pytest.raises(ValueError, match="train mode"):
        information_flow(model.train(), arch, x, tasks=0)


def test_labels_of_every_kind_and_networks_that_are_called_otherwise() -> None:
    model, x = made(TinyCNN)
    arch = half(model, x)
    rows = torch.tensor([[0, 0, 1], [1, 1, 0], [-1, -1, 0], [0, 1, 1], [0, 0, 0]])
    several = information_flow(model, arch, (x, Labels(rows)), tasks=1)
    alone = information_flow(model, arch, x[[1, 3]], tasks=1)
    torch.testing.assert_close(several.flows[0].links[0].flow, alone.flows[0].links[0].flow)
    table = edge_fidelity(model, several, (x, Labels(rows)), sizes=(0.999,), by=["strength"])
    assert table.fidelity.item() > 0.9

    def doubled(factor: float, image: Tensor) -> Tensor:
        return model(image * factor)

    named = [({"image": image}, 1) for image in x[[1, 3]]]
    run = RunOptions(forward_func=doubled, additional_forward_args=2.0)
    one = information_flow(model, arch, named, tasks=1, run=run)
    two = information_flow(model, arch, 2 * x[[1, 3]], tasks=1)
    torch.testing.assert_close(one.flows[0].links[0].flow, two.flows[0].links[0].flow)
    edge = ("relu1", int(arch.kept["relu1"][0]), "relu2", int(arch.kept["relu2"][0]))
    torch.testing.assert_close(
        edge_drops(model, one, [edge], named, run=run),
        edge_drops(model, two, [edge], 2 * x[[1, 3]], run=RunOptions(batch_size=1)),
    )
    with pytest.raises(ValueError, match="there is a task 7, but the network has 3 outputs"):
        information_flow(model, arch, x, tasks=7)


def test_shortcuts_are_followed_in_full_precision() -> None:
    """A channel's number above 256 is none of bfloat16."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.act = nn.Conv2d(3, 300, 1), nn.ReLU()
            self.conv, self.join = nn.Conv2d(300, 300, 1), nn.ReLU()
            self.linear = nn.Linear(300, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.stem(x))
            return self.linear(self.join(self.conv(x) + x).mean((2, 3)))

    model, x = made(Wide)
    model, x = model.float(), x[:1, :, :2, :2].float()
    for amp in (False, True):
        run = RunOptions(amp=amp)
        found = information_flow(model, whole(model, x), x, tasks=0, receivers=None, run=run)
        (link,) = (k for k in found.flows[0].links if k.target_site == "join")
        where = link.straight[:, :-1].nonzero()
        assert len(where) > 100
        assert bool((where[:, 0] == where[:, 1]).all())


def test_cost_in_passes() -> None:
    model, x = made(TinyResNet)
    found = information_flow(model, whole(model, x), x, tasks=0, receivers=3)
    assert found.cost == {"forward": 3, "backward": 6, "straight": 3}


# -- Edges, cut ------------------------------------------------------------------------------------


def really_cut(
    model: nn.Module, x: Tensor, arch: SubArchitecture, edge: tuple[str, int, str, int]
) -> Tensor:
    """By hand for TinyCNN: channel j of relu2 from relu1 with channel i closed."""
    mean1, mean2 = (arch.means[n].double()[None, :, None, None] for n in ("relu1", "relu2"))  # type: ignore[index]
    keep1, keep2 = (arch[n].double()[None, :, None, None] for n in ("relu1", "relu2"))
    h = model.relu1(model.bn1(model.conv1(x))) * keep1 + mean1 * (1 - keep1)
    without = h.clone()
    without[:, edge[1]] = mean1[0, edge[1]]
    z, z_without = (model.relu2(model.conv2(t)) for t in (h, without))
    z[:, edge[3]] = z_without[:, edge[3]]
    return model.linear(model.pool(z * keep2 + mean2 * (1 - keep2)).flatten(1))


def test_a_cut_edge_by_hand() -> None:
    model, x = made(TinyCNN)
    arch = half(model, x)
    found = information_flow(model, arch, x)
    edge = ("relu1", int(arch.kept["relu1"][1]), "relu2", int(arch.kept["relu2"][2]))
    with torch.no_grad():
        with assert_model_untouched(model), found.cut(model, edge):
            cut = model(x)
        torch.testing.assert_close(cut, really_cut(model, x, arch, edge))
        with arch.applied(model):
            assert float((model(x) - cut).abs().max()) > 0
        rows = found.edges.query("source_site == 'relu1'").iloc[:1]
        with found.cut(model, rows):
            assert model(x).shape == cut.shape


@pytest.mark.parametrize("net", NETS, ids=lambda n: n[0].__name__)
def test_cutting_all_edges_of_a_channel_closes_it(net: tuple[type[nn.Module]]) -> None:
    model, x = made(*net)
    arch = half(model, x)
    found = information_flow(model, arch, x)
    with torch.no_grad():
        for site in arch.sites:
            channel = int(arch.kept[site.name][0])
            edges = found.edges.query(f"source_site == '{site.name}' and source == {channel}")
            with found.cut(model, edges):
                cut = model(x)
            masks = arch.masks
            masks[site.name][channel] = False
            closed = SubArchitecture(masks, arch.sites, means=arch.means)
            with closed.applied(model):
                torch.testing.assert_close(cut, model(x))


@pytest.mark.parametrize("net", NETS, ids=lambda n: n[0].__name__)
def test_single_edges_cut_side_by_side_are_those_cut_alone(net: tuple[type[nn.Module]]) -> None:
    model, x = made(*net)
    found = information_flow(model, half(model, x), x)
    rows = found.edges.sample(frac=0.6, random_state=0)
    edges = list(rows.iloc[:, :4].itertuples(index=False, name=None))
    with assert_model_untouched(model):
        drops = edge_drops(model, found, edges, x, run=RunOptions(batch_size=3))
    with torch.no_grad():
        with found.flows[0].architecture.applied(model):
            base = model(x)[:, 1].mean()
        for edge, drop in zip(edges, drops, strict=True):
            with found.cut(model, edge):
                assert float(base - model(x)[:, 1].mean()) == pytest.approx(float(drop), abs=1e-10)


@pytest.mark.parametrize("net", NETS, ids=lambda n: n[0].__name__)
def test_a_small_share_of_an_edge_cut_does_what_its_flow_says(net: tuple[type[nn.Module]]) -> None:
    model, x = made(*net)
    found = information_flow(model, half(model, x), x, receivers=None)
    edges = list(found.edges.iloc[:, :4].itertuples(index=False, name=None))
    drops = edge_drops(model, found, edges, x, share=(1e-4, 1e-4))
    torch.testing.assert_close(drops, torch.tensor(found.edges.flow), rtol=5e-3, atol=1e-6)
    cut = edge_drops(model, found, edges, x)
    half_way = edge_drops(model, found, edges, x, share=(1.0, 1e-6))
    if any(isinstance(m, nn.ReLU) for m in model.modules()):
        assert not torch.allclose(cut, drops)
        assert not torch.allclose(half_way, drops)
    with pytest.raises(ValueError, match=r"share must be a number in \(0, 1\]"):
        edge_drops(model, found, edges, x, share=0)


def test_flow_is_what_cutting_does_where_all_is_linear() -> None:
    class Linear(ReLUNet):
        def __init__(self) -> None:
            super().__init__()
            self.relu1, self.relu2, self.relu3 = nn.Identity(), nn.Identity(), nn.Identity()

    model, x = made(Linear)
    sites = find_gate_sites(model, x, layers=["relu1", "relu2", "relu3"])
    found = information_flow(model, SubArchitecture.full(sites), x, tasks=1)
    table = agreement(model, found, x)
    assert len(table) == 3
    assert table.pearson.min() > 1 - 1e-9
    assert (table.slope - 1).abs().max() < 1e-9


def test_edges_kept_alone() -> None:
    model, x = made(TinyCNN)
    arch = whole(model, x).with_means(half(model, x).means)
    found = information_flow(model, arch, x, tasks=1)
    n = 6 * 8
    with torch.no_grad():
        with found.keep_edges(model, n):
            torch.testing.assert_close(model(x), model(x))
            whole_output = model(x)
        torch.testing.assert_close(whole_output, model(x))
        # Channel by channel: each sees its own sources, the others are at their constants.
        kept = kept_edges(found.flows[0], 10)
        assert len(kept.kept) == 10
        assert len(kept.cut) == n - 10
        h = model.relu1(model.bn1(model.conv1(x)))
        mean = arch.means["relu1"].double()[None, :, None, None].expand_as(h)  # type: ignore[index]
        z = []
        for j in range(8):
            seen = [i for _, i, _, target in kept.kept if target == j]
            mixed = mean.clone()
            mixed[:, seen] = h[:, seen]
            z.append(model.relu2(model.conv2(mixed))[:, j])
        expected = model.linear(model.pool(torch.stack(z, 1)).flatten(1))
        with found.keep_edges(model, 10):
            torch.testing.assert_close(model(x), expected)
    strength = torch.stack([found.flows[0].links[0].strength[e[1], e[3]] for e in kept.kept])
    assert float(strength.min()) >= float(
        found.flows[0].links[0].strength.flatten().sort().values[-11]
    )


def test_receivers_keep_their_means_where_images_are_given() -> None:
    model, x = made(TinyCNN)
    arch = half(model, x)
    found = information_flow(model, arch, x, receivers=None)
    with torch.no_grad(), arch.applied(model), recorded(model, arch.sites) as whole:
        model(x)

    def moved(images: Tensor | None) -> float:
        cut = found.keep_edges(model, 0.3, images=images)
        with torch.no_grad(), cut, recorded(model, arch.sites) as held:
            model(x)
        return max(
            float(
                (held[s.name] - whole[s.name]).mean([0, *range(2, held[s.name].ndim)]).abs().max()
            )
            for s in arch.sites
        )

    assert moved(None) > 1e-3
    assert moved(x) < 1e-9
    longer, y = made(ReLUNet)  # behind the only cut is a site to which all edges stay
    long = information_flow(longer, half(longer, y), y, receivers=None)
    first, second, _ = (site.name for site in long.sites)
    edge = long.edges.query(f"source_site == '{first}' and target_site == '{second}'").iloc[0]
    with torch.no_grad(), long.cut(longer, edge, images=y):
        assert longer(y).isfinite().all()
    judged = x, torch.arange(len(x)) % 2
    plain, fitted = (
        edge_fidelity(model, found, judged, sizes=(0.3,), n_random=1, fit_images=images)
        for images in (None, x)
    )
    assert not plain.fidelity.equals(fitted.fidelity)


def test_fidelity_of_edges_grows_to_one() -> None:
    model, x = made(TinyResNet)
    labels = torch.tensor([1, 0, 1, 2, 0])
    found = information_flow(model, half(model, x), (x, labels), tasks=1)
    table = edge_fidelity(model, found, (x, labels), sizes=(0.2, 0.999), n_random=2)
    assert set(table.by) == {"strength", "flow", "gradient", "random"}
    assert table[table["size"] == 0.999].fidelity.min() > 0.9
    assert len(table) == 2 * (3 + 2)
    few = information_flow(model, half(model, x), x, receivers=1)
    with pytest.raises(ValueError, match="receivers=None"):
        few.keep_edges(model, 3)


def test_what_is_no_edge_is_refused() -> None:
    model, x = made(TinyCNN)
    found = information_flow(model, half(model, x), x)
    for edge, message in (
        (("relu2", 0, "relu1", 0), "no link leads"),
        (("relu1", 6, "relu2", 0), "no such channel"),
    ):
        with pytest.raises(ValueError, match=message):
            found.cut(model, edge)
    with pytest.raises(TypeError, match="an edge is"):
        found.cut(model, [("relu1", 0)])
    few = information_flow(model, half(model, x), x, receivers=1)
    with pytest.raises(ValueError, match="is not one edge"):
        edge_drops(model, few, [("relu1", 0, "relu2", -1)], x)


def test_sites_need_not_be_in_order() -> None:
    model, x = made(TinyCNN)
    sites = [GateSite("relu2", 8), GateSite("relu1", 6)]
    found = information_flow(model, SubArchitecture.full(sites), x, tasks=0)
    assert [site.name for site in found.sites] == ["relu1", "relu2"]
    assert isinstance(found, InformationFlow)


# -- Its shape, and pictures of it -----------------------------------------------------------------


def test_shape_of_a_flow() -> None:
    model, x = made(Residual)
    found = information_flow(model, whole(model, x), x, tasks=1)
    (row,) = flow_shape(found.flows[0], n_null=10).to_dict("records")
    link = found.flows[0].links[0]
    assert row["straight"] == pytest.approx(
        float(link.straight.abs().sum() / link.flow.abs().sum())
    )
    share = link.flow[:, :-1].abs()
    share = share / share.sum(1, keepdim=True)
    entropy = -(share * share.clamp_min(1e-300).log()).sum(1) / torch.tensor(4.0).log()
    weight = link.flow[:, :-1].abs().sum(1)
    assert row["spread"] == pytest.approx(float((entropy * weight).sum() / weight.sum()))
    assert 0 < row["spread_p"] <= 1
    some = information_flow(model, whole(model, x), x, tasks=1, receivers=2)
    with pytest.raises(ValueError, match="receivers=None"):
        flow_shape(some.flows[0])


def test_what_classes_share() -> None:
    model, x = made(TinyResNet)
    arch = whole(model, x)
    same = information_flow(model, [arch, arch], x, tasks=[1, 1], receivers=None)
    table = flow_sharing([same], top=0.25)
    assert (table.similarity == 1).all()
    assert (table.reuse == 1).all()
    assert (table.similarity_null < 1).all()
    assert math.isnan(parting_depth(table))
    others = [information_flow(model, arch, x, tasks=k, receivers=None) for k in range(3)]
    apart = flow_sharing(others, top=0.25)
    assert (apart.similarity < 1).all()
    assert list(apart.target_site) == ["layer1.0", "layer1.1", "layer2.0"]
    with pytest.raises(ValueError, match="two classes"):
        flow_sharing(others[:1])


def test_parting_depth_is_where_half_is_lost() -> None:
    pd = pytest.importorskip("pandas")
    table = pd.DataFrame(
        {
            "depth": [0.0, 0.5, 1.0],
            "similarity": [0.9, 0.7, 0.3],
            "similarity_null": [0.1, 0.1, 0.1],
        }
    )
    assert parting_depth(table) == pytest.approx(0.75)


@pytest.mark.parametrize("receivers", [None, 3])
def test_a_picture_leaves_nothing_out(receivers: int | None) -> None:
    model, x = made(TinyResNet)
    arch = half(model, x)
    found = information_flow(model, [arch, arch], x, tasks=[0, 1], receivers=receivers)
    drawn = flow_picture(found.flows, channels=2, links=1000)
    assert drawn["drawn"] == [pytest.approx(1.0)] * 2
    for number, node in enumerate(drawn["nodes"]):
        for task in range(2):
            out = [k["flow"] for k in drawn["links"] if (k["task"], k["from"]) == (task, number)]
            if node["site"] < len(drawn["sites"]) - 1:
                assert sum(out) == pytest.approx(node["effect"][task], abs=1e-9)
    assert sum(node["n"] for node in drawn["nodes"]) == arch.n_kept + 1
    few = flow_picture(found.flows, channels=2, links=2)
    assert len([k for k in few["links"] if k["task"] == 0]) <= 2 * len(found.flows[0].links)
    assert 0 < min(few["drawn"]) < 1
    with pytest.raises(ValueError, match="links must be"):
        flow_picture(found.flows, links=0)


def test_plot_draws_links_and_channels() -> None:
    pytest.importorskip("matplotlib")
    model, x = made(TinyResNet)
    arch = half(model, x)
    found = information_flow(model, [arch, arch], x, tasks=[0, 1])
    (axis,) = found.plot(links=3).axes
    assert [tick.get_text() for tick in axis.get_xticklabels()][-1] == "output"
    drawn = flow_picture(found.flows, links=3)
    assert len(axis.patches) == len(drawn["links"])
    assert len(axis.collections) == len(drawn["nodes"])
    dashed = [patch for patch in axis.patches if patch.get_linestyle() != "-"]
    assert len(dashed) == sum(link["flow"] < 0 for link in drawn["links"])
    assert {text.get_text() for text in axis.get_legend().get_texts()} >= {"0", "1", "against it"}
