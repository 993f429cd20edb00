"""Every result has the same interface: table, text, figure, dictionary, files, notebook."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import pkgutil
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import nn

import nad_attr
from nad_attr import (
    ChannelCertainty,
    Explanation,
    GateSite,
    InformationFlow,
    Recipe,
    SubArchitecture,
    TaskGates,
    Verdict,
    find_gate_sites,
    information_flow,
)
from nad_attr.bridges.crp import CRPComparison
from nad_attr.certainty.result import Alternatives
from nad_attr.concepts import Comparison, Concept, UnitConcepts, association
from nad_attr.concepts.comparing.depth import DepthSemantics
from nad_attr.evaluation import (
    Curves,
    DepthProfile,
    Evaluation,
    MosaicResult,
    PartialCorrelation,
    RankStatistics,
    Responses,
    SiteCosts,
    SizeSweep,
    Variant,
)
from nad_attr.evaluation.controls.planted import PlantedScore
from nad_attr.evaluation.controls.sanity import Control, SanityReport
from nad_attr.evaluation.controls.stability import Stability
from nad_attr.evaluation.questions.depth import NetworkProfile
from nad_attr.evaluation.questions.error_ranks import error_ranks, partial_rank_correlation
from nad_attr.evaluation.questions.error_study import ErrorStudy, Voting
from nad_attr.evaluation.questions.explanation import ErrorExplanation, SharedSite
from nad_attr.evaluation.sweeps.grid import GRID_MEASURES
from nad_attr.examples.demo import DemoResult
from nad_attr.export import Block, Cost, Forgotten, Summary
from nad_attr.gates.history import History
from nad_attr.pictures import ClassMosaics, ContrastMaps, TopImages
from nad_attr.stats.results import Result
from nad_attr.stats.tests import Statistic
from nad_attr.store import GateStoreError, StoreDiff

sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "_ext"))
from public_names import public_names

NAN, INF = float("nan"), float("inf")
TASKS, NAMES = (0, (1, 2)), ("cat", "dog/wolf")


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    """Numbers in [0, 1], the first one unknown."""
    values = np.random.default_rng(seed).random(shape)
    values[(0,) * len(shape)] = NAN
    return values


def evaluation() -> Evaluation:
    def part(seed: int, **more: Any) -> Evaluation:
        each = ("size", "fidelity", "rank_fidelity", "margin_auc", "recall", "fpr")
        values = {name: numbers(2, seed=seed + i) for i, name in enumerate(each)}
        return Evaluation(
            TASKS, NAMES, 9, np.array([4, 5]), sizes={"a/b": numbers(2), "c": numbers(2)},
            table=numbers(2, 2), other_accuracy=numbers(2), **values, **more,
        )  # fmt: skip

    whole = part(1)
    others = {"random": tuple(part(i, _whole=whole) for i in (2, 3))}
    learned = part(5, _whole=part(6))
    return part(0, _whole=whole, rivals={"b.c": part(4, _whole=whole)}, learned=learned, **others)


def flow() -> InformationFlow:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    images = torch.rand(6, 4)
    sites = find_gate_sites(net.eval(), images)
    means = {site.name: torch.rand(site.n_channels) for site in sites}
    kept = {sites[0].name: [0, 2, 4], sites[1].name: [1, 2, 3, 5]}
    archs = [SubArchitecture.from_kept(kept, sites, task=t, means=means) for t in (0, (1, 2))]
    return information_flow(net, archs, images, tasks=[0, (1, 2)], receivers=2)


def curves() -> Curves:
    measured = {name: numbers(2, 3) for name in ("own_auc", "fidelity")}
    ends = {name: numbers(2) for name in measured}
    sizes = np.array([0.2, 0.5, 0.9])
    return Curves(
        TASKS, NAMES, 9, "fidelity", sizes, (0.2, 0.5, 0.9), True, "zero", measured,
        {name: 1 - values for name, values in measured.items()}, ends, ends,
    )  # fmt: skip


def size_sweep() -> SizeSweep:
    return SizeSweep(
        TASKS, NAMES, 9, np.array([0.2, 0.5]), (0.2, 0.5), False, "mean", ("nad", "b.c"), ("b.c",),
        {name: {m: numbers(2, 2) for m in GRID_MEASURES} for name in ("nad", "b.c")},
        {m: numbers(3, 2, 2) for m in GRID_MEASURES}, {m: numbers(2) for m in GRID_MEASURES},
    )  # fmt: skip


def mosaics() -> MosaicResult:
    chosen = np.arange(12).reshape(3, 4) % 2
    shares = np.random.default_rng(0).dirichlet(np.ones(4), (3, 1, 4))
    return MosaicResult(
        ("conv",), np.zeros(1), {"conv": (4, 4)}, {"fc": "no map"}, TASKS, NAMES, chosen, chosen,
        shares, shares.mean(2), 0.1, 7,
    )  # fmt: skip


def depth_profile() -> DepthProfile:
    sites, ones = ("a", "b", "c"), np.tile(np.eye(2), (3, 1, 1))
    profile = NetworkProfile(
        sites, np.array([4, 8, 16]), np.linspace(0, 1, 3), TASKS, NAMES, numbers(3, 2), ones, ones
    )
    return DepthProfile(
        {"one": profile, "two": dataclasses.replace(profile, fidelities=numbers(3, 2))}
    )


CONFUSION = np.array([[5, 3, 0], [1, 6, 1], [0, 2, 7]])


def error_study() -> ErrorStudy:
    similarity = np.array([[1, 0.9, 0.1], [0.9, 1, 0.2], [0.1, 0.2, 1]])
    ranks = error_ranks(similarity, CONFUSION, hits=[1], n_permutations=9)
    partial = partial_rank_correlation(CONFUSION, similarity, np.ones((3, 3)), n_permutations=9)
    return ErrorStudy(
        (0, 1, 2), ("a", "b", "c"), 25, 2, CONFUSION, "kappa", similarity, ranks, {"head": ranks},
        {"head": similarity}, {"head": partial}, {"input": "no layer"},
        Voting(0.5, 0.75, (0.25, 0.5), 0.5, 25),
    )  # fmt: skip


def sanity_report() -> SanityReport:
    control = Control("trained network", *(numbers(1, 2, seed=i) for i in range(5)))
    return SanityReport(TASKS, (control,), stability())


def stability() -> Stability:
    return Stability(TASKS, np.array([[0.5, 1.0]]), np.empty((0, 2)), {5: np.array([0.2, 0.4])})


def certainty() -> ChannelCertainty:
    label = np.array([[1, 0, 2, 3], [0, 4, 4, 1]])
    each = (numbers(2, 4, seed=i) for i in range(4))
    gate, effect, p, q = (
        np.where(label == 0, NAN, v) if i else np.ones((2, 4)) / 3 for i, v in enumerate(each)
    )
    return ChannelCertainty(
        TASKS, NAMES, (GateSite("a", 3), GateSite("b/c", 1, -1)), gate,
        np.array([[4, 0, 2, 3], [1, 4, 0, 2]]), 2, np.array([2.0, 1.5]), effect, p, q, label,
        np.array([1, 0]), (((0, 2), (1, 3)), ()), numbers(2), np.ones((2, 3, 4), bool),
        numbers(2, 3), np.array([[True, False, True], [False] * 3]), None, np.ones((2, 4)), 0.05,
        0.02, {"learning": 10, "testing": 20}, 0,
    )  # fmt: skip


def planted() -> PlantedScore:
    half, whole = np.array([0.5, 1.0]), np.array([True, False])
    return PlantedScore(TASKS, half, half, half, whole, np.array([0, 1]), half)


def depth_semantics() -> DepthSemantics:
    each = {"high": numbers(2, 3), "iou": numbers(2, 3)}
    one = {name: values.mean(0) for name, values in each.items()}
    random = {name: np.random.default_rng(0).random((5, 3)) for name in each}
    return DepthSemantics(
        ("a", "b", "c"), np.linspace(0, 1, 3), np.array([4, 8, 16]), NAMES, each, one, random,
        {"object": numbers(2, 3)}, {"object": numbers(3)}, ("object",), ("a note",), 3,
    )  # fmt: skip


def verdict() -> Verdict:
    answers = (("holds", "does not", "holds", "not asked", "not asked"), ("not asked",) * 5)
    each = [numbers(2, 5, seed=i) for i in range(5)]
    names = ("own_auc", "whole_auc", "learned_own_auc", "learned_fidelity", "learned_whole_auc")
    gaps = ("own_auc_gap_low", "own_auc_gap_high", "fidelity_gap_low", "fidelity_gap_high")
    measures = {name: np.array([0.5, 0.25]) for name in (*names, *gaps, "learned_n_own")}
    return Verdict(
        TASKS, NAMES, np.array([3, 4]), 20, np.array([8, 9]), 0.05, 19, answers, *each, measures,
        {"dog/wolf": ("a note",)},
    )  # fmt: skip


def explanation() -> Explanation:
    seconds = {"learning": 2.5, "page": NAN}
    return Explanation(
        TASKS, NAMES, 3, 20, 9, evaluation(), verdict(), seconds, seconds, "gates.h5", "page.html"
    )


def statistic() -> Statistic:
    return Statistic("mantel", 45, 0.4, (0.2, INF), 0.01, 0.0, names={"other": "wordnet"})


def units() -> UnitConcepts:
    return UnitConcepts(
        {"a": [[0.5, 0.01], [NAN, 0.1]], "b/c": [[0.0, 0.25]]},
        [Concept("sky", "scene"), Concept("red", "color")], source="by hand", quantile=0.005,
        top_images={"a": [[3], [-1]], "b/c": [[7]]}, info={"note": [1, "two"]},
    )  # fmt: skip


def gates() -> TaskGates:
    sites = (GateSite("a", 3), GateSite("b/c", 2, -1))
    values = {s.name: torch.linspace(0, 1, 2 * s.n_channels).reshape(2, -1) for s in sites}
    means = {s.name: torch.arange(float(s.n_channels)) for s in sites}
    history = History({"loss": numbers(4, 2)})
    return TaskGates(
        values, sites, TASKS, logits=values, means=means, constants=values, recipe=Recipe(),
        history=history, task_names=NAMES, info={"note": [1, "two"]},
    )  # fmt: skip


ARCH = gates().sub_architecture((1, 2))


def mosaics_of_classes() -> ClassMosaics:
    maps = {"a": torch.rand(2, 4, 2, 2)}
    chosen = torch.tensor([[0, 1, 0, 1]] * 2)
    return ClassMosaics(
        torch.rand(2, 3, 4, 4), maps, chosen, chosen, TASKS, NAMES, {"c": "no map"}, "evidence"
    )


def found_images() -> TopImages:
    return TopImages(
        ARCH, {"a": torch.tensor([2])}, {"a": torch.tensor([[1, -1]])},
        {"a": torch.tensor([[0.5, NAN]])}, {"a": torch.zeros(1, 2, 2, dtype=torch.long)},
        {"a": (2, 2)}, {"a": torch.tensor([NAN])}, "max", False,
    )  # fmt: skip


def smaller() -> Summary:
    cost = Cost(9, 81), Cost(3, 9)
    block = Block("a", *cost, ("fc",))
    tensors = {"fc.weight": {"of": "fc.weight", "rows": [0], "columns": None}}
    return Summary(
        (1, 2), (0, (1, 2)), *cost, 0.5, (block,), {"a": [0, 2]}, tensors, ((3, 4),), False, None
    )


def responses() -> Responses:
    each = torch.rand(3, 2)
    called = torch.arange(3, dtype=torch.int32)
    return Responses(
        torch.tensor([0, 1, 2]), TASKS, TASKS, each, torch.rand(2, 3, 2), called,
        torch.stack([called, called]), each, torch.rand(2, 3),
    )  # fmt: skip


MADE: dict[type[Result], Callable[[], Any]] = {
    Evaluation: evaluation,
    ChannelCertainty: certainty,
    Curves: curves,
    SizeSweep: size_sweep,
    MosaicResult: mosaics,
    DepthProfile: depth_profile,
    ErrorStudy: error_study,
    ErrorExplanation: lambda: ErrorExplanation(
        3, 5, "cat", "dog", (SharedSite("conv", 8, (1, 4), (0,), (), 0.5, 0.25),), "kappa", 0.5,
        1.5, 9, 0.5, 0.25, {"whole network": (1.0, 2.0)},
    ),
    SanityReport: sanity_report,
    Stability: stability,
    PlantedScore: planted,
    DepthSemantics: depth_semantics,
    Statistic: statistic,
    Comparison: lambda: Comparison.of(
        [statistic(), association([True, False] * 4, [True, True] * 4)], notes=["a note"]
    ),
    UnitConcepts: units,
    InformationFlow: flow,
    Verdict: verdict,
    Explanation: explanation,
    TaskGates: gates,
    SubArchitecture: lambda: ARCH,
    ClassMosaics: mosaics_of_classes,
    TopImages: found_images,
    Summary: smaller,
    Responses: responses,
    ContrastMaps: lambda: ContrastMaps(
        TASKS, NAMES, {"a": torch.rand(2, 3, 3)}, {"a": torch.rand(2, 3, 3)}, {"a": (1, 2)},
        {"b": "no map"}, (6, 6), "presence",
    ),
    CRPComparison: lambda: CRPComparison(
        *(torch.rand(2, 3, 4, 4) for _ in range(3)), torch.rand(2), torch.rand(2).double()
    ),
    SiteCosts: lambda: SiteCosts({"a": 6, "b/c": 2}, {"a": 9, "b/c": 3}),
    RankStatistics: lambda: error_study().ranks,
    PartialCorrelation: lambda: PartialCorrelation(0.5, 0.04, 0.75),
    StoreDiff: lambda: StoreDiff(
        (Path("a.h5"), Path("b.h5")), ("recipe",), (3,), ((4, 5),),
        {0: (2, 0.5), (1, 2): (1, 0.25)}, 7, ("only a.h5 holds the result 'x'",),
    ),
    Forgotten: lambda: Forgotten((1, 2), ARCH, 3, {0: 0.5, 1: 1.0}, {0: 0.5, 1: 0.0}, {0: 4, 1: 8}),
    Alternatives: lambda: Alternatives((ARCH, ARCH), (0.5, 0.75), (0.0, -0.01), ARCH, 9),
    Variant: lambda: Variant(
        True, False, True, 0.4, 0.9, {"a": torch.rand(2, 3)}, (GateSite("a", 3),), TASKS,
        {(True, False, True): 0.9, (False, True, False): NAN},
    ),
    DemoResult: lambda: DemoResult(
        gates(), evaluation(), Path("out"), {"gates": Path("out/gates.h5")}, 2.5
    ),
    History: lambda: History({"loss": numbers(4, 2), "size": numbers(4, 2, seed=1)}),
}  # fmt: skip


def same(a: Any, b: Any) -> bool:
    """Whether two results, or parts of them, are equal; NaN equals NaN."""
    if type(a) is not type(b) and not (isinstance(a, Mapping) and isinstance(b, Mapping)):
        return False
    if isinstance(a, Result):
        return same(a._fields(), b._fields())
    if dataclasses.is_dataclass(a):
        return same(vars(a), vars(b))
    if isinstance(a, torch.Tensor):
        return (
            a.dtype == b.dtype
            and torch.equal(a.isnan(), b.isnan())
            and bool(torch.equal(a.nan_to_num(), b.nan_to_num()))
        )
    if isinstance(a, np.ndarray):
        equal = np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
        return a.shape == b.shape and a.dtype == b.dtype and equal
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) or (a != a and b != b)


@pytest.fixture(params=MADE, ids=lambda cls: cls.__name__)
def result(request: pytest.FixtureRequest) -> Any:
    return MADE[request.param]()


def test_all_results_are_here() -> None:
    for module in pkgutil.walk_packages(nad_attr.__path__, "nad_attr."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert set(MADE) == set(Result.__subclasses__())


#: Public calls return these too; they hold no findings: values to hand on, settings, open files.
NO_RESULTS = {
    "Ablation", "ClassMapping", "GateSite", "GateStore", "LoadedData",
    "LoadedModel", "NADAttribution", "PaperRecipe", "Photo", "PlantedCircuit", "Recipe", "Report",
    "Source", "StrongChannel", "Transform",
}  # fmt: skip


def returned() -> set[str]:
    """Names of the public classes that public functions and methods are declared to return."""
    names = [n for n in public_names() if n.module.count(".") <= 1]
    classes = {n.name for n in names if inspect.isclass(n.value)}
    calls = [n.value for n in names if inspect.isfunction(n.value)]
    for cls in (n.value for n in names if inspect.isclass(n.value)):
        calls += [getattr(cls, key) for key in vars(cls) if not key.startswith("_")]
    told = " ".join(str(getattr(call, "__annotations__", {}).get("return")) for call in calls)
    return {name for name in re.findall(r"\w+", told) if name in classes}


def test_what_public_calls_return_is_a_result() -> None:
    results = {cls.__name__ for cls in MADE}
    assert {"Verdict", "TaskGates", "StoreDiff"} <= returned() & results
    assert returned() - results == NO_RESULTS
    for cls in MADE:
        assert all(callable(getattr(cls, name)) for name in FACE)


FACE = ("frame", "summary", "to_dict", "save", "load", "plot", "_repr_html_")


def test_table_text_and_notebook(result: Any) -> None:
    frame = pytest.importorskip("pandas").DataFrame(result.frame())
    assert len(frame)
    assert isinstance(result.summary(), str)
    assert result.summary().strip()
    assert "nad-attr" in result._repr_html_()


def test_figure(result: Any) -> None:
    pytest.importorskip("matplotlib")
    needed: dict[type[Result], tuple[Any, ...]] = {ContrastMaps: (torch.rand(2, 3, 6, 6),)}
    if isinstance(result, TopImages):
        network = nn.Sequential(OrderedDict(a=nn.Identity())).eval()
        needed[TopImages] = network, (torch.rand(2, 3, 2, 2), torch.tensor([0, 1]))
        arch = SubArchitecture.full([GateSite("a", 3, 1)])
        result = dataclasses.replace(result, architecture=arch)
    figure = result.plot(*needed.get(type(result), ()))
    assert figure.axes
    figure.canvas.draw()


@pytest.mark.parametrize("name", ["result.json", "RESULT.JSON", "result.h5"])
def test_files_give_back_the_same(result: Any, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    result.save(path)
    assert same(type(result).load(path), result)
    assert h5py.is_hdf5(path) == name.endswith(".h5")
    if name == "result.json":
        assert json.loads(path.read_text()) == result.to_dict()


def test_several_in_one_file_of_gates(result: Any, tmp_path: Path) -> None:
    path = tmp_path / "results.h5"
    if isinstance(result, (TaskGates, SubArchitecture)):
        with pytest.raises(ValueError, match="leave out group='one'"):
            result.save(path, "one")
        return
    result.save(path, "one")
    result.save(path, "two")
    assert same(type(result).load(path, "one"), type(result).load(path, "two"))


def test_another_kind_of_file_is_refused(result: Any, tmp_path: Path) -> None:
    other = MADE[History if not isinstance(result, History) else Curves]()
    for name, error in (("other.json", ValueError), ("other.h5", GateStoreError)):
        other.save(tmp_path / name, "x")
        with pytest.raises(error, match=name):
            alone = isinstance(result, (TaskGates, SubArchitecture))
            type(result).load(tmp_path / name, None if alone else "x")
    with pytest.raises(OSError, match=r"none\.json"):
        type(result).load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("cls", "change", "match"),
    [
        (Curves, {"sizes": [0.1, 0.2]}, r"shape"),
        (Curves, {"keep": {"own_auc": [[0.5]]}}, r"keep has shape"),
        (Curves, {"n_images": "9"}, r"'9' in place of int"),
        (Curves, {"per_site": 1}, r"1 in place of bool"),
        (Curves, {"tasks": [0, -2]}, r"class index"),
        (Curves, {"task_names": "ab"}, r"'ab' in place of a list"),
        (MosaicResult, {"chosen": [[0.5, 1, 0, 1]] * 3}, r"float64 in place of int64"),
        (PlantedScore, {"whole": [0, 1]}, r"in place of bool"),
        (History, {"curves": {"loss": [[1, 2]], "size": [[1]]}}, r"shape"),
        (UnitConcepts, {"concepts": [{"name": ""}]}, r"needs a name"),
        (ChannelCertainty, {"label": [[1, 0, 2, 5]] * 2}, r"no such label"),
        (ChannelCertainty, {"gate": [[0.5] * 3] * 2}, r"gate has shape"),
        (ChannelCertainty, {"n_pairs": 1}, r"chosen so many times"),
        (ChannelCertainty, {"sites": [{"name": "a", "n_channels": -4}]}, r"at least one"),
        (SanityReport, {"controls": [{"name": "x"}]}, r"whole_auc"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    cls: type[Any], change: dict[str, Any], match: str, tmp_path: Path
) -> None:
    path = tmp_path / "spoilt.json"
    path.write_text(json.dumps({**MADE[cls]().to_dict(), **change}))
    with pytest.raises(ValueError, match=match):
        cls.load(path)


@pytest.mark.parametrize("damage", ["sources", "flow", "effects", "links", "flows"])
def test_a_flow_whose_parts_do_not_fit_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "flow.json"
    flow().save(path)
    content = json.loads(path.read_text())
    first = content["flows"][0]
    if damage == "links":
        content["links"]["3"] = ["no such site"]
    elif damage == "flows":
        content["flows"] = []
    elif damage == "effects":
        first["effects"]["1"].append(0.5)
    else:
        first["links"][0][damage] = [99, 0, 1]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"was not written by InformationFlow\.save"):
        InformationFlow.load(path)
