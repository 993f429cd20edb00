"""Sub-architectures: arithmetic of sizes, sets of channels, overlaps and look-ups."""

from __future__ import annotations

import itertools
import pickle
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nad_attr.gates.channels import budget, jaccard, kappa, n_channels, split_sites, top_k_masks
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gating.hooks import gated
from nad_attr.sites.site import GateSite
from tests import helpers
from tests.helpers import assert_model_untouched

A, B = GateSite("a", 4), GateSite("b", 6, -1)
SITES = [A, B]


def arch_of(a: str, b: str, **options: object) -> SubArchitecture:
    masks = {
        "a": torch.tensor([bit == "1" for bit in a]),
        "b": torch.tensor([bit == "1" for bit in b]),
    }
    return SubArchitecture(masks, SITES, **options)


bits = st.tuples(
    st.lists(st.booleans(), min_size=4, max_size=4), st.lists(st.booleans(), min_size=6, max_size=6)
)
archs = st.builds(
    lambda ab: SubArchitecture({"a": torch.tensor(ab[0]), "b": torch.tensor(ab[1])}, SITES), bits
)

# ---------------------------------------------------------------------------------------------
# Sizes and look-ups
# ---------------------------------------------------------------------------------------------


def test_sizes_by_hand() -> None:
    arch = arch_of("1010", "000001", task=3)
    assert (arch.n_kept, arch.n_channels, arch.size) == (3, 10, 0.3)
    assert arch.sizes == {"a": 0.5, "b": 1 / 6}
    assert {name: kept.tolist() for name, kept in arch.kept.items()} == {"a": [0, 2], "b": [5]}
    assert arch.kept["a"].dtype == torch.int64
    assert arch["a"].tolist() == [True, False, True, False]
    assert (list(arch), len(arch), arch.task, arch.means) == (["a", "b"], 2, 3, None)
    assert n_channels(SITES) == 10


def test_sites_stay_in_forward_order_whatever_the_masks_order() -> None:
    masks = {"b": torch.ones(6, dtype=torch.bool), "a": torch.zeros(4, dtype=torch.bool)}
    arch = SubArchitecture(masks, SITES)
    assert list(arch) == list(arch.masks) == list(arch.kept) == list(arch.sizes) == ["a", "b"]


def test_display() -> None:
    assert repr(arch_of("1010", "000001")) == (
        "SubArchitecture(3 of 10 channels (30.0 %) at 2 sites, closed channels zero)"
    )
    means = {"a": torch.zeros(4), "b": torch.zeros(6)}
    assert repr(arch_of("0000", "000000", task=(1, 2), means=means)) == (
        "SubArchitecture(task (1, 2): 0 of 10 channels (0.0 %) at 2 sites, "
        "closed channels at their mean)"
    )
    wide = SubArchitecture.full([GateSite("a", 12345)])
    assert "12,345 of 12,345 channels (100.0 %) at 1 site," in repr(wide)


def test_what_it_gives_away_are_copies() -> None:
    mask, mean = torch.tensor([True, False]), torch.tensor([1.0, 2.0])
    arch = SubArchitecture({"a": mask}, [GateSite("a", 2)], means={"a": mean})
    before = hash(arch)
    mask[:] = False
    mean[:] = 7
    arch["a"][:] = False
    arch.masks["a"][:] = False
    arch.gates()["a"][:] = 0
    assert arch["a"].tolist() == [True, False]
    assert arch.means["a"].tolist() == [1.0, 2.0]
    assert hash(arch) == before


def test_gates_are_zeros_and_ones() -> None:
    gates = arch_of("1010", "000001").gates(torch.float64)
    assert gates["a"].dtype == torch.float64
    assert gates["a"].tolist() == [1, 0, 1, 0]
    assert arch_of("1010", "000001").gates()["b"].dtype == torch.float32


def test_from_kept() -> None:
    arch = SubArchitecture.from_kept({"b": torch.tensor([5, 0, 5])}, SITES, task=(1, 2))
    assert arch == arch_of("0000", "100001", task=(1, 2))
    assert SubArchitecture.from_kept({}, SITES).n_kept == 0
    assert SubArchitecture.from_kept({"a": [], "b": range(6)}, SITES) == arch_of("0000", "111111")


@pytest.mark.slow
@given(arch=archs)
def test_kept_channels_make_the_same_sub_architecture(arch: SubArchitecture) -> None:
    again = SubArchitecture.from_kept(arch.kept, SITES)
    assert again == arch
    assert hash(again) == hash(arch)
    assert len({arch, again}) == 1
    assert arch.n_kept == sum(map(len, arch.kept.values()))


def test_other_means_same_channels() -> None:
    arch = arch_of("1010", "000001", task=2)
    means = {"a": torch.arange(4.0), "b": torch.arange(6, dtype=torch.float64)}
    at_mean = arch.with_means(means)
    assert at_mean.with_means(None) == arch
    assert at_mean.task == 2
    assert at_mean.means["b"].dtype == torch.float32
    assert at_mean.with_means(None).means is None


def test_it_can_be_sent_to_another_process() -> None:
    arch = arch_of("1010", "000001", task=(0, 1), means={"a": torch.ones(4), "b": torch.ones(6)})
    again = pickle.loads(pickle.dumps(arch))
    assert again == arch
    assert (again.task, again.means["a"].tolist()) == ((0, 1), [1.0] * 4)


# ---------------------------------------------------------------------------------------------
# Equality
# ---------------------------------------------------------------------------------------------


def test_equal_means_same_sites_channels_task_and_means() -> None:
    arch = arch_of("1010", "000001")
    assert arch == arch_of("1010", "000001")
    assert arch != arch_of("1010", "000001", task=7)
    assert arch != arch_of("1010", "000011")
    assert arch != SubArchitecture(arch.masks, [A, GateSite("b", 6, 1)])
    assert arch != SubArchitecture(arch.masks, [B, A])
    assert arch != "a sub-architecture"
    assert hash(arch) == hash(arch_of("1010", "000001"))


def test_a_set_keeps_what_differs_in_task_or_means() -> None:
    def means(value: float) -> dict[str, Tensor]:
        return {"a": torch.full((4,), value), "b": torch.zeros(6)}

    different = [
        arch_of("1010", "000001", **options)
        for options in (
            {},
            {"task": 7},
            {"task": (7, 8)},
            {"means": means(0.0)},
            {"means": means(1.0)},
            {"means": means(1.0), "task": 7},
        )
    ]
    again = [SubArchitecture(a.masks, SITES, task=a.task, means=a.means) for a in different]
    again.append(arch_of("1010", "000001", means=means(-0.0)))  # -0 is 0
    assert len({*different, *again}) == len(different)
    assert len({hash(arch) for arch in different}) == len(different)


# ---------------------------------------------------------------------------------------------
# Set algebra
# ---------------------------------------------------------------------------------------------

FULL = SubArchitecture.full(SITES)
EMPTY = ~FULL


@pytest.mark.slow
@given(a=archs, b=archs, c=archs)
@settings(max_examples=60)
def test_laws_of_sets(a: SubArchitecture, b: SubArchitecture, c: SubArchitecture) -> None:
    assert a | b == b | a
    assert a & b == b & a
    assert (a | b) | c == a | (b | c)
    assert (a & b) & c == a & (b & c)
    assert a & (b | c) == (a & b) | (a & c)
    assert a | (b & c) == (a | b) & (a | c)
    assert ~(a | b) == ~a & ~b
    assert ~~a == a
    assert a - b == a & ~b
    assert (a - b) | (a & b) == a
    assert a | EMPTY == a & FULL == a | a == a & a == a
    assert a - a == a & ~a == EMPTY
    assert (a | b).n_kept == a.n_kept + b.n_kept - (a & b).n_kept


def test_algebra_keeps_task_and_means_where_they_are_common() -> None:
    means = {"a": torch.ones(4), "b": torch.ones(6)}
    a, b = arch_of("1100", "000000", task=1, means=means), arch_of("0110", "0" * 6, task=1)
    assert ((a | b).task, (~a).task) == (1, 1)
    assert (a & arch_of("0110", "0" * 6, task=2)).task is None
    assert (a | b).means["a"].tolist() == [1.0] * 4
    assert (b | a).means is None


# ---------------------------------------------------------------------------------------------
# Overlaps
# ---------------------------------------------------------------------------------------------


def mask(text: str) -> Tensor:
    return torch.tensor([bit == "1" for bit in text])


@pytest.mark.parametrize(
    ("a", "b", "overlap", "corrected"),
    [
        ("1100", "1100", 1.0, 1.0),
        ("1100", "0011", 0.0, -0.5),  # e = 1, E J = 1/3
        ("1100", "1010", 1 / 3, 0.0),
        ("1110", "0111", 0.5, -0.25),  # e = 9/4, E J = 3/5
        ("1000", "1111", 0.25, 0.0),  # full masks overlap by chance alone
        ("0000", "0000", 1.0, 1.0),
        ("1111", "1111", 1.0, 1.0),
        ("0000", "1111", 0.0, 0.0),
        ("0000", "1000", 0.0, 0.0),
    ],
)
def test_overlaps_by_hand(a: str, b: str, overlap: float, corrected: float) -> None:
    for first, second in ((a, b), (b, a)):
        assert jaccard(mask(first), mask(second)) == overlap
        assert kappa(mask(first), mask(second)) == pytest.approx(corrected, abs=1e-15)


@pytest.mark.slow
@given(st.integers(1, 12), st.data())
def test_overlaps_against_fractions(n: int, data: st.DataObject) -> None:
    masks = st.lists(st.booleans(), min_size=n, max_size=n)
    a, b = data.draw(masks), data.draw(masks)
    sets = [{i for i, bit in enumerate(m) if bit} for m in (a, b)]
    both, either = len(sets[0] & sets[1]), len(sets[0] | sets[1])
    measured = Fraction(both, either) if either else Fraction(1)
    assert jaccard(torch.tensor(a), torch.tensor(b)) == pytest.approx(float(measured))
    e = Fraction(len(sets[0]) * len(sets[1]), n)
    union = len(sets[0]) + len(sets[1]) - e
    expected = e / union if union else Fraction(1)
    exact = (measured - expected) / (1 - expected) if expected != 1 else Fraction(1)
    assert kappa(torch.tensor(a), torch.tensor(b)) == pytest.approx(float(exact), abs=1e-12)


@pytest.mark.parametrize(("n", "k_a", "k_b"), [(7, 3, 4), (7, 1, 6), (8, 4, 4)])
def test_random_masks_have_kappa_near_zero(n: int, k_a: int, k_b: int) -> None:
    """Over all pairs of masks of these sizes, |A and B| has the mean that kappa subtracts.

    J is not linear in |A and B|, so kappa of small masks is a little off zero on average; it is
    exactly zero where |A and B| is what chance expects.
    """
    first = torch.zeros(n, dtype=torch.bool)
    first[:k_a] = True
    values, intersections = [], []
    for chosen in itertools.combinations(range(n), k_b):
        second = torch.zeros(n, dtype=torch.bool)
        second[list(chosen)] = True
        values.append(kappa(first, second))
        intersections.append(int((first & second).sum()))
    assert sum(intersections) / len(intersections) == pytest.approx(k_a * k_b / n)
    assert abs(sum(values) / len(values)) < 0.05


@pytest.mark.parametrize("size", [0.1, 0.5, 0.8])
def test_large_random_masks_have_kappa_zero_on_average(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    n, k = 400, round(400 * size)
    values, overlaps = [], []
    for _ in range(100):
        pair = [torch.rand(n, generator=generator).argsort().lt(k) for _ in range(2)]
        values.append(kappa(*pair))
        overlaps.append(jaccard(*pair))
    assert abs(sum(values) / len(values)) < 0.01
    assert sum(overlaps) / len(overlaps) == pytest.approx(size / (2 - size), abs=0.01)


def test_overlap_is_the_mean_over_sites() -> None:
    a, b = arch_of("1100", "111000"), arch_of("1010", "111000")
    assert a.overlaps(b) == {"a": 1 / 3, "b": 1.0}
    assert a.overlap(b) == pytest.approx(2 / 3)
    assert a.overlap(b, chance_corrected=True) == pytest.approx(0.5)
    assert a.overlaps(b, chance_corrected=True)["a"] == pytest.approx(0, abs=1e-15)


@pytest.mark.slow
@given(a=archs, b=archs)
def test_overlap_is_symmetric_and_one_for_equal(a: SubArchitecture, b: SubArchitecture) -> None:
    for corrected in (False, True):
        assert a.overlap(a, chance_corrected=corrected) == 1
        assert a.overlap(b, chance_corrected=corrected) == b.overlap(a, chance_corrected=corrected)
        assert a.overlap(b, chance_corrected=corrected) <= 1
    assert (a.overlap(b) == 1) == (a == b)


# ---------------------------------------------------------------------------------------------
# Budgets and top-K
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "kept"),
    [
        (1, 10),
        (1.0, 10),
        (0.5, 5),
        (0.3, 3),
        (0.04, 1),
        (1e-9, 1),
        (0.25, 2),
        (0.35, 4),
        (0.999, 10),
    ],
)
def test_budget(size: float, kept: int) -> None:
    """Rounded as by Python: halves to the even number; at least one channel stays."""
    assert budget(size, SITES) == kept


def test_top_k_of_ties_keeps_the_first() -> None:
    scores = {"a": torch.tensor([1.0, 2.0, 1.0, 1.0]), "b": torch.tensor([1.0, 0, 2, 1, 1, 1])}
    masks = top_k_masks(scores, SITES, 4)
    assert masks["a"].tolist() == [True, True, True, False]
    assert masks["b"].tolist() == [False, False, True, False, False, False]


numbers = st.lists(st.integers(-3, 3) | st.floats(allow_nan=False), min_size=10, max_size=10)


@pytest.mark.slow
@given(rows=st.lists(numbers, min_size=1, max_size=3), k=st.integers(0, 10))
def test_top_k_is_exact_and_stable(rows: list[list[float]], k: int) -> None:
    flat = torch.tensor(rows, dtype=torch.float64)
    masks = top_k_masks(split_sites(flat, SITES), SITES, k)
    kept = torch.cat([masks["a"], masks["b"]], dim=1)
    for row, mask_of_row in zip(rows, kept.tolist(), strict=True):
        order = sorted(range(10), key=lambda i: (-row[i], i))
        assert {i for i, bit in enumerate(mask_of_row) if bit} == set(order[:k])
    if k < 10:
        more = top_k_masks(split_sites(flat, SITES), SITES, k + 1)
        assert all(bool((masks[name] <= more[name]).all()) for name in masks)


def test_top_k_without_leading_axes() -> None:
    masks = top_k_masks({"a": torch.arange(4.0), "b": torch.arange(6.0)}, SITES, 3)
    assert (masks["a"].shape, masks["b"].shape) == ((4,), (6,))
    assert masks["b"].nonzero().flatten().tolist() == [4, 5]
    assert masks["a"].nonzero().flatten().tolist() == [3]


def test_split_sites_cuts_in_order() -> None:
    parts = split_sites(torch.arange(20).reshape(2, 10), SITES)
    assert parts["a"].tolist() == [[0, 1, 2, 3], [10, 11, 12, 13]]
    assert parts["b"].shape == (2, 6)


# ---------------------------------------------------------------------------------------------
# On a network
# ---------------------------------------------------------------------------------------------

CNN_SITES = [GateSite("relu1", 6), GateSite("relu2", 8)]


@pytest.mark.parametrize("with_means", [False, True])
def test_applied_is_gating_by_hand(tiny_cnn: nn.Module, with_means: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = {s.name: torch.rand(s.n_channels, generator=generator) > 0.4 for s in CNN_SITES}
    means = {s.name: torch.rand(s.n_channels, generator=generator) for s in CNN_SITES}
    means = means if with_means else None
    arch = SubArchitecture(masks, CNN_SITES, means=means)
    x = helpers.images(3)
    with assert_model_untouched(tiny_cnn, x):
        with arch.applied(tiny_cnn):
            out = tiny_cnn(x)
        with gated(tiny_cnn, arch.gates(), sites=CNN_SITES, means=means):
            torch.testing.assert_close(tiny_cnn(x), out, rtol=0, atol=0)
    first = masks["relu1"][None, :, None, None]
    offset = 0 if means is None else means["relu1"].double()[None, :, None, None]
    hidden = torch.where(first, tiny_cnn.relu1(tiny_cnn.bn1(tiny_cnn.conv1(x))), offset)
    second = masks["relu2"][None, :, None, None]
    offset = 0 if means is None else means["relu2"].double()[None, :, None, None]
    hidden = torch.where(second, tiny_cnn.relu2(tiny_cnn.conv2(hidden)), offset)
    torch.testing.assert_close(tiny_cnn.linear(hidden.mean((2, 3))), out)


def test_the_full_one_is_the_network_and_the_empty_one_ignores_the_image(
    tiny_model: nn.Module,
) -> None:
    name, n, dim = {
        "TinyCNN": ("relu1", 6, 1),
        "TinyResNet": ("layer2.0", 6, 1),
        "TinyViT": ("norm", 8, -1),
    }[type(tiny_model).__name__]
    full = SubArchitecture.full([GateSite(name, n, dim)])
    x = helpers.images(3)
    with full.applied(tiny_model):
        assert torch.equal(tiny_model(x), tiny_model(x.clone()))
    plain = tiny_model(x)
    with full.applied(tiny_model):
        assert torch.equal(tiny_model(x), plain)
    for empty in (~full, (~full).with_means({name: torch.ones(n)})):
        with empty.applied(tiny_model):
            out = tiny_model(x)
        assert torch.equal(out, out[:1].expand(3, -1))
