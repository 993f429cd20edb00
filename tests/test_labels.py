"""Labels and rows of every kind in learning, evaluation and scorers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from nad_attr import (
    Labels,
    NADAttribution,
    Recipe,
    SubArchitecture,
    find_gate_sites,
    learn_gates,
    learn_to_store,
)
from nad_attr.data.labels import other_images, own_images, read_labels
from nad_attr.data.sources import as_source
from nad_attr.evaluation import (
    Evaluation,
    NeuronMCTScorer,
    TaylorScorer,
    along_depth,
    auc,
    curves,
    evaluate,
    fit_ablation,
    shuffled_labels,
    site_fidelity,
    stability,
)
from nad_attr.evaluation.sweeps.grid import measure_grid
from nad_attr.pictures import top_images
from nad_attr.report import Report
from nad_attr.sites.site import GateSite, SiteError

QUICK = Recipe(size=0.5, steps=6, images_per_step=8)
N = 32


class Net(nn.Module):
    """Channels 2j and 2j + 1 determine output j: the channels that it needs are known."""

    def __init__(self, n_outputs: int, form: str = "logits") -> None:
        super().__init__()
        self.conv = nn.Conv2d(n_outputs, 2 * n_outputs, 1, bias=False)
        self.relu = nn.ReLU()
        self.head = nn.Linear(2 * n_outputs, n_outputs, bias=False)
        self.form = form
        with torch.no_grad():
            eye = torch.eye(n_outputs)
            pairs = torch.stack([eye, -eye], 1).flatten(0, 1)
            self.conv.weight.copy_(pairs[:, :, None, None])
            self.head.weight.copy_(torch.stack([eye, -eye], 2).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        out = self.head(self.relu(self.conv(x)).mean((2, 3)))
        if self.form == "flat":
            return out[:, 0]
        return out.sigmoid() if self.form == "sigmoid" else out


def made(n_outputs: int, form: str = "logits") -> tuple[nn.Module, Tensor, Tensor]:
    """A network, images, and its outputs' inputs (N, K): what each image is to each output."""
    values = torch.randn(N, n_outputs, generator=torch.Generator().manual_seed(0)).double()
    net = Net(n_outputs, form).double().eval()
    return net, values[:, :, None, None].expand(N, n_outputs, 2, 2).clone(), values


def kept(gates: Any, task: int) -> set[int]:
    return set(
        gates.sub_architecture(task, size=2 / gates.sites[0].n_channels)["relu"]
        .nonzero()[:, 0]
        .tolist()
    )


def opened(gates: Any, task: Any) -> SubArchitecture:
    """All channels."""
    return SubArchitecture(SubArchitecture.full(gates.sites).masks, gates.sites, task=task)


# ---------------------------------------------------------------------------------------------
# What labels are read as
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ([2, 0, 1], [2, 0, 1]),
        ([[2], [0], [1]], [2, 0, 1]),
        (np.eye(3)[[2, 0]], [2, 0]),
        (torch.eye(3)[[2, 0]].long(), [2, 0]),
        ([[1, 1], [0, -1]], [[1, 1], [0, -1]]),
        ([[1.0, math.nan], [0.0, 1.0]], [[1, -1], [0, 1]]),
        (torch.tensor([[True, True], [False, True]]), [[1, 1], [0, 1]]),
        ([[1], [0], [-1]], [[1], [0], [-1]]),
        ([1.0, 0.0, math.nan], [[1], [0], [-1]]),
        ([1.5, 2.5, 9.0, math.nan], [[0], [0], [1], [-1]]),
        ([[0.1, 3.0], [0.2, 3.0], [0.3, 2.0]], [[0, 1], [0, 1], [1, 0]]),
        (Labels([0.1, 0.2, 0.3], above=0.15), [[0], [1], [1]]),
        (Labels([1, 2, 3], kind="targets"), [[0], [0], [1]]),
        (Labels([[1, 0], [0, 1]], kind="several"), [[1, 0], [0, 1]]),
        (Labels(["b", "a"], classes=["a", "b"]), [1, 0]),
    ],
)  # fmt: skip
def test_labels_are_read_as_people_mean_them(given: Any, read: Any) -> None:
    assert read_labels(given).labels.tolist() == read


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a", "b"], r"names \('a', 'b'.*Labels\(names, classes"),
        (Labels(["c"], classes=["a"]), "'c' is not one of the 1 classes"),
        ([[1, -1], [1, 1]], "only 1 and -1"),
        ([[3, 1], [0, 2]], r"0, 1 or -1 .*labels\.float"),
        ([-100, 1], "from 0 on, got -100"),
        ([math.inf, 0.5], "finite"),
        (torch.zeros(2, 2, 2), "got torch.float32 of shape"),
        (Labels([0.5, 1.0], above=[1, 2]), "one for each of 1 outputs"),
    ],
)
def test_labels_that_mean_nothing_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_labels(given)


def test_unknown_is_neither_own_nor_other() -> None:
    labels = torch.tensor([[1, 0], [0, -1], [-1, 0]])
    assert own_images(labels, [0, 1, (0, 1)]).tolist() == [
        [True, False, False], [False, False, False], [True, False, False],
    ]  # fmt: skip
    assert other_images(labels, [0, 1, (0, 1)]).tolist() == [
        [False, True, False], [True, False, True], [False, False, False],
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Learned from and judged
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["logits", "flat", "sigmoid"])
def test_a_network_of_one_output(form: str) -> None:
    net, x, values = made(1, form)
    labels = (values[:, 0] > 0).long()
    gates = learn_gates(net, (x, labels), recipe=QUICK)
    assert gates.tasks == (0,)
    for other in (labels[:, None], labels.double(), labels[:, None].double()):
        assert learn_gates(net, (x, other), recipe=QUICK) == gates
    full = opened(gates, 0)
    result = evaluate(net, [full], (x, labels), n_random=0)
    assert result.own_auc == 1
    assert result.recall == 1
    assert result.fpr == 0
    assert result.fidelity == 1
    nad = NADAttribution(net, recipe=QUICK)
    (attribution,) = nad.attribute(x[:4])
    assert attribution.shape == (4, 2, 2, 2)
    with pytest.raises(ValueError, match="one output, whose task is 0"):
        learn_gates(net, (x, labels), [1], QUICK)
    with pytest.raises(ValueError, match=r"label 2.*one output"):
        learn_gates(net, (x, labels + 1), recipe=QUICK)


def test_several_labels_an_image() -> None:
    net, x, values = made(3)
    labels = (values > 0).long()
    unknown = labels.double()
    unknown[::5, 1] = math.nan
    gates = learn_gates(net, (x, unknown), recipe=QUICK)
    assert gates.tasks == (0, 1, 2)
    assert all(kept(gates, k) == {2 * k, 2 * k + 1} for k in gates.tasks)
    assert learn_gates(net, TensorDataset(x, labels), [0, 2], QUICK) == learn_gates(
        net, (x, labels), [0, 2], QUICK
    )
    result = evaluate(net, gates, (x, unknown), n_random=1, threshold_data=(x, labels))
    known = ~unknown[:, 1].isnan()
    assert result.n_own.tolist() == (labels * ~unknown.isnan()).sum(0).tolist()
    assert np.allclose(result.whole.own_auc, 1)
    assert np.allclose(result.whole.recall, 1)
    assert np.isnan(result.margin_auc).all()
    assert np.isnan(result.other_accuracy).all()
    # By hand: only the images whose label is known count.
    arch = SubArchitecture.from_kept({"relu": [2]}, gates.sites, task=1)
    found = evaluate(net, [arch], (x, unknown), n_random=0)
    positive = values[known, 1].clamp(min=0)
    own = labels[known, 1].bool()
    assert found.recall == (positive[own] > 0).double().mean()
    assert found.own_auc == 1
    assert found.n_images == N


def test_regression() -> None:
    net, x, values = made(2)
    targets = values + 0.1
    gates = learn_gates(net, (x, targets), recipe=QUICK)
    assert all(kept(gates, k) == {2 * k, 2 * k + 1} for k in gates.tasks)
    result = evaluate(net, gates, (x, targets), n_random=0)
    whole = 1 - 0.01 / values.var(0, unbiased=False)
    assert np.allclose(result.whole.target_r2, whole, atol=1e-5)
    assert np.isnan(result.own_auc).all()
    assert np.isnan(result.recall).all()
    assert "target R²" in result.summary()
    assert "AUC" not in result.summary()
    with pytest.raises(ValueError, match="no groups"):
        evaluate(net, [opened(gates, (0, 1))], (x, targets))
    with pytest.raises(ValueError, match="one label, but the network has 2 outputs"):
        learn_gates(net, (x, targets[:, 0]), recipe=QUICK)


def test_measures_of_targets_are_kept_in_files(tmp_path: Path) -> None:
    net, x, values = made(1)
    gates = learn_gates(net, (x, values), recipe=QUICK)
    result = evaluate(net, gates, (x, values), n_random=1)
    for name in ("a.json", "a.h5"):
        result.save(tmp_path / name)
        again = Evaluation.load(tmp_path / name)
        assert np.array_equal(again.target_r2, result.target_r2)


@pytest.mark.parametrize("kind", ["one", "several", "targets"])
def test_scorers_ablations_stores_and_reports_take_them(kind: str, tmp_path: Path) -> None:
    net, x, values = made(1 if kind == "one" else 2)
    labels = values if kind == "targets" else (values > 0).long()
    if kind == "one":
        labels = labels[:, 0]
    path = learn_to_store(net, (x, labels), tmp_path / "g.h5", recipe=QUICK)
    gates = learn_gates(net, (x, labels), recipe=QUICK)
    assert path.exists()
    for scorer in (NeuronMCTScorer, TaylorScorer):
        scores = scorer(net, gates.sites)(x, labels, include_others=True)
        assert scores["relu"].shape == (len(gates.tasks), gates.sites[0].n_channels)
        assert bool(torch.isfinite(scores["relu"]).all())
    for ablation in ("mean", "other_mean", "resample", "noise"):
        fitted = fit_ablation(net, gates.sites, (x, labels), kind=ablation, tasks=gates.tasks)
        result = evaluate(net, gates, (x, labels), ablation=fitted, n_random=0)
        assert not np.isnan(result.fidelity).any()
    report = Report(gates).measure(net, (x, labels), parts=["evaluation"], n_images=20, n_random=1)
    assert report.results.evaluation is not None
    assert report.results.evaluation.n_images == 20
    assert ("R² of targets" in report.html()) == (kind == "targets")


def test_mean_of_other_images_is_that_of_known_others() -> None:
    net, x, values = made(2)
    labels = (values > 0).long()
    labels[::3, 0] = -1
    fitted = fit_ablation(net, [GateSite("relu", 4)], (x, labels), kind="other_mean")
    with torch.no_grad():
        held = net.relu(net.conv(x)).mean((2, 3))  # type: ignore[operator]
    assert torch.allclose(fitted.means(0)["relu"].double(), held[labels[:, 0] == 0].mean(0))


LABELLED = {
    "one": lambda values: Labels((values[:, :1] > 0).long(), kind="several"),
    "several": lambda values: torch.where(values.abs() < 0.1, -1, (values > 0).long()),
    "targets": lambda values: values * 3.0,
}


@pytest.mark.parametrize("kind", LABELLED)
def test_curves_depth_stability_and_top_images_take_them(kind: str) -> None:
    net, x, values = made(1 if kind == "one" else 2)
    labels = LABELLED[kind](values)
    data, sites = (x, labels), [GateSite("relu", 2 if kind == "one" else 4)]
    gates = learn_gates(net, data, recipe=QUICK)
    read = read_labels(labels)
    own, other = own_images(read.labels, gates.tasks), other_images(read.labels, gates.tasks)

    # At half size the first output's channels determine that output.
    scores = torch.zeros(len(gates.tasks), sites[0].n_channels)
    scores[:, :2] = 1.0
    archs = [SubArchitecture.from_kept({"relu": [0, 1]}, sites, task=task) for task in gates.tasks]
    row = {name: values[0, 0] for name, values in measure_grid(net, [archs], data).values.items()}
    assert row["fidelity"] == pytest.approx(1)
    with torch.no_grad():
        outputs = net(x)[own[0] | other[0], 0]
    if kind == "targets":
        assert math.isnan(row["own_auc"])
        assert math.isnan(row["recall"])
    else:
        counted = own[0][own[0] | other[0]]
        assert row["own_auc"] == pytest.approx(float(auc(outputs, counted)))
        assert row["recall"] == pytest.approx(float((outputs[counted] > 0).double().mean()))
    drawn = curves(net, {"relu": scores}, data, sites=sites, tasks=gates.tasks)
    assert drawn.summary()

    best = top_images(net, opened(gates, 0), data, k=2)
    with torch.no_grad():
        held = net.relu(net.conv(x))[:, 0].flatten(1).amax(1)  # type: ignore[operator]
    assert best.images["relu"][0].tolist() == held.argsort(descending=True)[:2].tolist()
    both = torch.cat([held[own[0]], held[other[0]]])
    expected = (held[own[0]].mean() - held[other[0]].mean()) / both.std(correction=0)
    assert float(best.selectivity["relu"][0]) == pytest.approx(float(expected), rel=1e-4)

    def learn(model: nn.Module, given: Any, seed: int) -> Any:
        some = as_source(given, any_labels=True).labels
        assert some.shape[1:] == read.labels.shape[1:]
        return learn_gates(model, given, recipe=QUICK, seed=seed)

    result = stability(net, learn, data, seeds=(0, 1))
    assert result.halves.shape == (2, len(gates.tasks))
    if len(gates.tasks) > 1:
        assert along_depth(gates, fidelity=site_fidelity(net, gates, data)).summary()
    dealt = as_source(shuffled_labels(data), any_labels=True).labels
    assert dealt.shape == read.labels.shape
    assert (dealt == 1).sum() == (read.labels == 1).sum()


def test_numbers_of_images_of_a_class_are_for_classes() -> None:
    net, x, values = made(2)
    with pytest.raises(ValueError, match="images_per_class is for images of one class"):
        stability(net, learn_gates, (x, (values > 0).long()), images_per_class=(2,))


def test_what_asks_for_classes_says_so() -> None:
    net, x, values = made(2)
    with pytest.raises(ValueError, match="one class for each image"):
        as_source((x, values))
    with pytest.raises(ValueError, match="paper's recipe learns from the cross-entropy of classes"):
        learn_gates(net, (x, values), recipe=Recipe.paper(beta=1.0))


# ---------------------------------------------------------------------------------------------
# Rows of every kind, and forward_func
# ---------------------------------------------------------------------------------------------


class Rows(Dataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Any:
        return self.items[number]


class Stream(IterableDataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Any:
        return iter(self.items)


class Two(Net):
    """Takes two inputs by keyword only, as multi-modal networks do."""

    def forward(self, *, left: Tensor, right: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(left + right)


class Whole(Net):
    """Takes a dictionary and returns one."""

    def forward(self, batch: dict[str, Tensor]) -> Any:  # type: ignore[override]
        return {"logits": super().forward(batch["left"] + batch["right"])}


def test_rows_of_every_kind_learn_the_same_gates() -> None:
    net, x, values = made(3)
    y = values.argmax(1)
    two = Two(3).double().eval()
    two.load_state_dict(net.state_dict())
    whole = Whole(3).double().eval()
    whole.load_state_dict(net.state_dict())
    left, right = x / 2, x / 2
    expected = learn_gates(net, (x, y), recipe=QUICK)
    fields = {"left": left, "right": right}
    rows = [
        {"left": a, "right": b, "text": "t", "label": int(k)}
        for a, b, k in zip(left, right, y, strict=True)
    ]
    listed = [{**row, "left": row["left"].tolist(), "right": row["right"].tolist()} for row in rows]
    pairs = [({"left": a, "right": b}, int(k)) for a, b, k in zip(left, right, y, strict=True)]
    in_order = lambda a, b: two(left=a, right=b)  # noqa: E731

    def logits(batch: dict[str, Tensor]) -> Tensor:
        return whole(batch)["logits"]

    for data in ((fields, y), Rows(rows), rows, Rows(pairs), Stream(rows), DataLoader(Rows(pairs))):
        assert learn_gates(two, data, recipe=QUICK) == expected, data
        assert learn_gates(two, data, recipe=QUICK, forward_func=in_order) == expected
        assert learn_gates(whole, data, recipe=QUICK, forward_func=logits) == expected
    single = learn_gates(
        two, Rows(listed), recipe=QUICK, forward_func=lambda a, b: in_order(a.double(), b.double())
    )
    assert single.tasks == expected.tasks
    result = evaluate(two, expected, Rows(pairs), n_random=0)
    assert np.array_equal(result.table, evaluate(net, expected, (x, y), n_random=0).table)
    assert find_gate_sites(whole, fields)[0].name == "relu"


def test_streams_of_single_items_and_of_batches() -> None:
    net, x, values = made(3)
    y = values.argmax(1)
    expected = learn_gates(net, (x, y), recipe=QUICK)
    items = list(zip(x, y.tolist(), strict=True))
    batches = [(x[i : i + 5], y[i : i + 5]) for i in range(0, N, 5)]
    for data in (
        Stream(items),
        Stream(batches),
        items,
        iter(items),
        DataLoader(Stream(items), batch_size=7),
    ):
        assert learn_gates(net, data, recipe=QUICK) == expected
    several = (values > 0).long()
    streamed = Stream(list(zip(x, several, strict=True)))
    assert learn_gates(net, streamed, recipe=QUICK) == learn_gates(net, (x, several), recipe=QUICK)


def dropping(items: list[Any]) -> Any:
    return default_collate([item for item in items if item is not None])


def halving(items: list[Any]) -> Any:
    return default_collate(items[: (len(items) + 1) // 2])


def test_collates_that_drop_broken_items() -> None:
    net, x, values = made(3)
    y = values.argmax(1)
    items: list[Any] = list(zip(x, y.tolist(), strict=True))
    whole = [i for i in range(N) if i not in (0, 9)]
    broken = [None if i in (0, 9) else item for i, item in enumerate(items)]
    loader = DataLoader(Rows(broken), batch_size=8, collate_fn=dropping)
    assert learn_gates(net, loader, recipe=QUICK) == learn_gates(
        net, (x[whole], y[whole]), recipe=QUICK
    )
    with pytest.raises(ValueError, match=r"made .* images of .* items"):
        learn_gates(net, DataLoader(Rows(items), collate_fn=halving), recipe=QUICK)


def test_a_dataset_with_other_labels_than_its_own() -> None:
    net, x, values = made(3)
    y = values.argmax(1)
    names = Labels([f"c{int(k)}" for k in y], classes=["c0", "c1", "c2"])
    expected = learn_gates(net, (x, y), recipe=QUICK)
    images_alone = Rows(list(x))
    for data in ((x, names), (images_alone, names), (TensorDataset(x, 0 * y), names)):
        assert learn_gates(net, data, recipe=QUICK) == expected  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="32 inputs came with 31 labels"):
        learn_gates(net, (images_alone, Labels(y[1:])), recipe=QUICK)  # type: ignore[arg-type]


def test_a_forward_func_that_runs_the_network_twice_is_named() -> None:
    net, x, _ = made(2)
    with pytest.raises(SiteError, match="runs the model 2 times"):
        find_gate_sites(net, x[:1], forward_func=lambda v: net(v) + net(v))


# ---------------------------------------------------------------------------------------------
# Dissection asks for no outputs
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("returns", ["maps", "features", "dictionary", "list"])
def test_networks_that_are_no_classifiers_are_dissected(returns: str) -> None:
    from nad_attr.concepts import dissect

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Any:
            maps = self.head(self.body(x))
            kinds = {"maps": maps, "features": maps.flatten(1), "dictionary": {"out": maps}}
            return kinds.get(returns, [maps, maps.mean((2, 3))])

    torch.manual_seed(0)
    net = Other().eval()
    images = torch.rand(6, 3, 8, 8)
    masks = (images[:, 0] > 0.5).long()
    units = dissect(net, ["body"], (images, masks), concepts=["dark", "light"])
    plain = nn.Sequential(net.body, nn.Flatten(), nn.Linear(256, 2)).eval()
    same = dissect(plain, ["0"], (images, masks), concepts=["dark", "light"])
    assert np.array_equal(units.iou["body"], same.iou["0"])
