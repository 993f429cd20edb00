"""The quadratic model of the default recipe, against H = S^T W S written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nad_attr.learning import selection
from nad_attr.learning.selection import QuadraticModel

ROWS, N, IMAGES, TRUST = 3, 12, 40, 0.3


class Dense:
    """One row's quadratic function of the gates, everything recomputed from the start."""

    def __init__(self, gradients: Tensor, residuals: Tensor, weights: Tensor, gates: Tensor):
        share = weights / weights.sum()
        self.hessian = gradients.T @ torch.diag(share) @ gradients
        self.slope = gradients.T @ (share * residuals)
        self.origin = gates.clone()
        self.gates = gates.clone()

    def predicted(self, gates: Tensor) -> float:
        """Change of the loss from the origin to these gates, without distrust."""
        moved = gates - self.origin
        return float(2 * self.slope @ moved + moved @ self.hessian @ moved)

    def cost(self, channel: int) -> float:
        """Change of the loss when one gate more flips, distrust charged."""
        new = self.gates.clone()
        new[channel] = 1 - new[channel]
        back = bool(self.gates[channel] != self.origin[channel])
        charge = TRUST * float(self.hessian[channel, channel]) * (-1 if back else 1)
        return self.predicted(new) - self.predicted(self.gates) + charge

    def costs(self, opening: bool) -> list[float]:
        """Cost of flipping each gate alone; inf if it is there already."""
        there = 1.0 if opening else 0.0
        return [math.inf if self.gates[c] == there else self.cost(c) for c in range(N)]

    def close(self, n: int, groups: int, least: int = 1) -> None:
        """Close the cheapest, by groups."""
        while n > 0:
            size = max(min(least, n), n // groups)
            costs = self.costs(opening=False)
            if size > 1:  # within a group, gains do not count
                for c, cost in enumerate(costs):
                    moved = self.gates[c] != self.origin[c]
                    own = float(self.hessian[c, c]) * (1 + TRUST * (-1 if moved else 1))
                    costs[c] = max(cost, own)
            for c in sorted(range(N), key=costs.__getitem__)[:size]:
                self.gates[c] = 0
            n -= size

    def swap(self, least_gain: float) -> bool:
        """Open one and close one, if that is worth it."""
        before = self.gates.clone()
        total = 0.0
        for opening in (True, False):
            costs = self.costs(opening)
            c = min(range(N), key=costs.__getitem__)
            total += costs[c]
            self.gates[c] = 1 - self.gates[c]
        if total < -least_gain:
            return True
        self.gates = before
        return False

    def loss(self) -> float:
        """Change of the loss from the origin to the present gates, each flip charged."""
        moved = self.gates != self.origin
        return self.predicted(self.gates) + TRUST * float(self.hessian.diagonal()[moved].sum())

    def exchange(self, n: int, groups: int, least_gain: float) -> None:
        """Open n by groups, close n by groups; back again unless it is worth it."""
        before, loss = self.gates.clone(), self.loss()
        left, least = n, max(1, n // (2 * groups))
        while left > 0:
            size = max(min(least, left), left // groups)
            costs = self.costs(opening=True)
            for c in sorted(range(N), key=costs.__getitem__)[:size]:
                self.gates[c] = 1
            left -= size
        self.close(n, groups, least)
        if self.loss() >= loss - least_gain:
            self.gates = before

    def swap_pair(self, least_gain: float) -> bool:
        """Open two, one after the other, and close the two that cost least together."""
        before = self.gates.clone()
        total = 0.0
        for _ in range(2):
            costs = self.costs(opening=True)
            c = min(range(N), key=costs.__getitem__)
            total += costs[c]
            self.gates[c] = 1
        alone = self.costs(opening=False)
        joint = {
            (i, j): alone[i] + alone[j] + 2 * (1 + TRUST) * float(self.hessian[i, j])
            for i in range(N)
            for j in range(i + 1, N)
        }
        best = min(joint, key=joint.__getitem__)
        if total + joint[best] < -least_gain:
            self.gates[list(best)] = 0
            return True
        self.gates = before
        return False


@pytest.fixture
def filled() -> tuple[QuadraticModel, list[Dense]]:
    """A model whose memory has been overwritten in part, and the references of its rows."""
    generator = torch.Generator().manual_seed(0)
    return fill((torch.rand(ROWS, N, generator=generator) > 0.3).double(), generator)


def fill(gates: Tensor, generator: torch.Generator) -> tuple[QuadraticModel, list[Dense]]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    model = QuadraticModel(gates, IMAGES, TRUST)
    residuals, gradients = randn(ROWS, 0), randn(ROWS, 0, N)
    weights: list[float] = []
    for _ in range(7):  # 56 images into 40 places
        new = randn(ROWS, 8), randn(ROWS, 8, N)
        model.age(0.8)
        model.add(torch.zeros_like(new[0]), *new)
        residuals = torch.cat([residuals, new[0]], 1)[:, -IMAGES:]
        gradients = torch.cat([gradients, new[1]], 1)[:, -IMAGES:]
        weights = [w * 0.8 for w in weights] + [1.0] * 8
    model.begin()
    kept = torch.tensor(weights[-IMAGES:], dtype=torch.float64)
    return model, [Dense(gradients[r], residuals[r], kept, gates[r]) for r in range(ROWS)]


def assert_same(model: QuadraticModel, dense: list[Dense]) -> None:
    assert model.gates.tolist() == [row.gates.tolist() for row in dense]
    for opening in (True, False):
        expected = torch.tensor([row.costs(opening) for row in dense], dtype=torch.float64)
        torch.testing.assert_close(model.cost(opening), expected, rtol=1e-9, atol=1e-9)


def test_costs_are_those_of_the_hessian(filled: tuple[QuadraticModel, list[Dense]]) -> None:
    assert_same(*filled)


def test_flips_there_and_back(filled: tuple[QuadraticModel, list[Dense]]) -> None:
    model, dense = filled
    channels = torch.tensor([[0, 5, 7], [1, 2, 3], [11, 0, 4]])
    for chosen in (channels, channels[:, :1], channels[:, 1:], channels):
        model.flip(chosen)
        for row, flipped in zip(dense, chosen, strict=True):
            row.gates[flipped] = 1 - row.gates[flipped]
        assert_same(model, dense)


def test_residuals_move_with_the_gates(filled: tuple[QuadraticModel, list[Dense]]) -> None:
    model, _ = filled
    before, gates = model.residuals.clone(), model.gates.clone()
    model.close(3)
    moved = torch.einsum("rmn,rn->rm", model.gradients, model.gates - gates)
    torch.testing.assert_close(model.residuals, before + moved)


@pytest.mark.parametrize("n", [1, 4])
def test_close(filled: tuple[QuadraticModel, list[Dense]], n: int) -> None:
    model, dense = filled
    model.close(n)
    for row in dense:
        row.close(n, groups=8)
    assert_same(model, dense)


def test_close_in_groups(
    filled: tuple[QuadraticModel, list[Dense]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, dense = filled
    monkeypatch.setattr("nad_attr.learning.selection.N_GROUPS", 2)
    model.close(6)  # 3, 1, 1, 1
    for row in dense:
        row.close(6, groups=2)
    assert_same(model, dense)


@pytest.mark.parametrize("least_gain", [1e-12, 0.5, 1e9])  # opening and closing one cancel
def test_swap(filled: tuple[QuadraticModel, list[Dense]], least_gain: float) -> None:
    model, dense = filled
    for _ in range(4):
        swapped = model.swap(torch.full((ROWS,), least_gain, dtype=torch.float64))
        assert swapped == any([row.swap(least_gain) for row in dense])
        assert_same(model, dense)


def test_swap_that_gains_nothing_leaves_all_as_it_was(
    filled: tuple[QuadraticModel, list[Dense]],
) -> None:
    model, _ = filled
    names = ("gates", "residuals", "_slope", "_curvature")
    before = {name: getattr(model, name).clone() for name in names}
    assert not model.swap(torch.full((ROWS,), 1e9, dtype=torch.float64))
    for name in names:
        assert torch.equal(getattr(model, name), before[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("n", "groups"), [(1, 8), (3, 8), (4, 2), (5, 1)])
@pytest.mark.parametrize("least_gain", [0.0, 0.5])
def test_exchange(
    seed: int, n: int, groups: int, least_gain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nad_attr.learning.selection.N_GROUPS", groups)
    generator = torch.Generator().manual_seed(seed)
    gates = (torch.rand(ROWS, N, generator=generator).argsort(1) < 7).double()
    model, dense = fill(gates, generator)
    for _ in range(2):
        model.exchange(n, torch.full((ROWS,), least_gain, dtype=torch.float64))
        for row in dense:
            row.exchange(n, groups, least_gain)
        assert_same(model, dense)
        assert model.gates.sum(1).tolist() == [7] * ROWS


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_scale_and_offset_are_forgiven(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    whole, noise = torch.randn(2, 3, 40, generator=generator, dtype=torch.float64)
    noisy = [0.7 * whole[1] - 0.2 + 0.2 * noise[1], whole[2] + noise[2]]
    gated = torch.stack([0.5 * whole[0] + 3, *noisy])
    model = QuadraticModel(torch.ones(3, N, dtype=torch.float64), 40, TRUST)
    for part in range(2):  # the older half counts less
        images = slice(20 * part, 20 * part + 20)
        model.age(0.5)
        model.add(
            whole[:, images], (gated - whole)[:, images], torch.zeros(3, 20, N, dtype=torch.float64)
        )
    left = model.residuals - model.forgiven(share)
    weights = torch.tensor([0.5] * 20 + [1.0] * 20, dtype=torch.float64).sqrt()
    for row in range(3):
        line = torch.stack([gated[row], torch.ones_like(gated[row])], dim=1)
        slope, offset = torch.linalg.lstsq(line * weights[:, None], whole[row] * weights).solution
        aim = (whole[row] - offset) / slope
        square = weights.square()
        centred = whole[row] - (whole[row] * square).sum() / square.sum()
        left_over = whole[row] - (slope * gated[row] + offset)
        unmended = float((left_over.square() * square).sum() / (centred.square() * square).sum())
        assert [unmended < 1e-9, 0.02 < unmended < 0.12, unmended > 0.15][row]
        power = 1 - 0.9 * min(unmended / 0.15, 1.0)
        expected = gated[row] - whole[row] - share**power * (aim - whole[row])
        torch.testing.assert_close(left[row], expected)
    if share == 1:  # the first row is the whole network's output, shrunk and moved
        assert left[0].abs().max() < 1e-12
        assert left[1].abs().max() > 0.1


def test_images_next_to_the_boundary_count_most() -> None:
    boundary = torch.tensor([0.0, 0.95, 0.95, 1.0], dtype=torch.float64)
    whole = torch.tensor([[3.0, -5.0, 0.1, 40.0, -1.0]], dtype=torch.float64).repeat(4, 1)
    residuals = torch.zeros_like(whole)
    residuals[2] = 100.0  # more than all of the output's variance is lost
    model = QuadraticModel(torch.ones(4, N, dtype=torch.float64), 6, TRUST, boundary)
    model.add(whole, residuals, torch.zeros(4, 5, N, dtype=torch.float64))
    ranks = [0.7, 0.1, 0.5, 0.9, 0.3]  # (number from below - 1/2) / 5, however far apart
    near = [1 / math.cosh(9 * (rank - 0.5)) ** 2 for rank in ranks]
    for row, far in enumerate([0.0, 0.95, 0.0, 1.0]):
        counted = [1 - far * (1 - x) for x in near] + [0.0]  # the sixth was not seen yet
        expected = torch.tensor(counted, dtype=torch.float64) / sum(counted)
        torch.testing.assert_close(model.shares()[row], expected)


def test_older_images_shift_the_ranks_less() -> None:
    model = QuadraticModel(
        torch.ones(1, N, dtype=torch.float64), 3, TRUST, torch.ones(1, dtype=torch.float64)
    )
    for value in (0.0, 1.0, 2.0):
        model.age(0.5)
        model.add(
            torch.full((1, 1), value, dtype=torch.float64),
            torch.zeros(1, 1, dtype=torch.float64),
            torch.zeros(1, 1, N, dtype=torch.float64),
        )
    weights, ranks = [1 / 7, 2 / 7, 4 / 7], [0.5 / 7, 2 / 7, 5 / 7]
    counted = [w / math.cosh(9 * (r - 0.5)) ** 2 for w, r in zip(weights, ranks, strict=True)]
    expected = torch.tensor([counted], dtype=torch.float64) / sum(counted)
    torch.testing.assert_close(model.shares(), expected)


@pytest.mark.parametrize("factor", [0.0, -1.0, 100.0])
def test_lines_that_are_no_fit_are_not_trusted(factor: float) -> None:
    whole = torch.linspace(-1, 1, 8, dtype=torch.float64)[None]
    model = QuadraticModel(torch.ones(1, N, dtype=torch.float64), 8, TRUST)
    model.add(whole, factor * whole - whole, torch.zeros(1, 8, N, dtype=torch.float64))
    aim = factor * whole - (model.residuals - model.forgiven(1.0))
    slope = 0.3  # that of a line would be 0 / 0, -1 and 0.01
    torch.testing.assert_close(aim, whole / slope)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("least_gain", [0.0, 0.3])
def test_swap_pair(seed: int, least_gain: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    gates = (torch.rand(ROWS, N, generator=generator).argsort(1) < 7).double()
    model, dense = fill(gates, generator)
    for _ in range(3):
        swapped = model.swap_pair(torch.full((ROWS,), least_gain, dtype=torch.float64))
        assert swapped == any([row.swap_pair(least_gain) for row in dense])
        assert_same(model, dense)
        assert model.gates.sum(1).tolist() == [7] * ROWS


def test_swap_pair_parts_with_channels_that_cancel_each_other() -> None:
    # Channels 0 and 1 cancel, 2 was closed in their place: no single swap gains anything.
    gradients = torch.zeros(1, 8, 4, dtype=torch.float64)
    gradients[0, :, 0], gradients[0, :, 1] = 5.0, -5.0
    gradients[0, :, 2] = torch.tensor([1.0, -1.0] * 4)
    gradients[0, :, 3] = torch.tensor([1.0, 1.0, -1.0, -1.0] * 2)
    gates = torch.tensor([[1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    model = QuadraticModel(gates, 8, TRUST)
    residuals = -gradients[:, :, 2] - gradients[:, :, 3]
    model.add(torch.zeros_like(residuals), residuals, gradients)
    model.begin()
    nothing = torch.zeros(1, dtype=torch.float64)
    assert not model.swap(nothing)
    assert model.swap_pair(nothing)
    assert model.gates.tolist() == [[0.0, 0.0, 1.0, 1.0]]


def test_swap_pair_needs_two_of_each() -> None:
    generator = torch.Generator().manual_seed(0)
    for n_open in (0, 1, N - 1, N):
        gates = (torch.arange(N) < n_open).double().expand(ROWS, -1)
        model, _ = fill(gates, generator)
        assert not model.swap_pair(torch.zeros(ROWS, dtype=torch.float64))


def test_groups_do_not_overshoot_with_few_images_and_many_channels() -> None:
    """With 8 images, hundreds of channels seem to make good whatever the first ones broke."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-3, 0, 600)
    gradients = torch.randn(1, 8, 600, generator=generator) * scale
    model = QuadraticModel(torch.ones(1, 600), 8, TRUST)
    model.add(torch.zeros(1, 8), torch.zeros(1, 8), gradients)
    model.begin()
    model.close(200)
    squares = gradients.square().mean(1)[0]
    closed = squares[model.gates[0] == 0]
    # Nearly the 200 smallest, although larger ones fit together better on these images.
    assert closed.max() < 4 * squares.sort().values[200]


# -- A few channels of many ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_narrowed_is_the_model_of_its_channels_alone(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gates = (torch.rand(ROWS, N, generator=generator).argsort(1) < 8).double()
    whole, _ = fill(gates, generator)
    channels = torch.rand(ROWS, N, generator=generator).argsort(1)[:, :9].sort(1).values
    by_hand = QuadraticModel(gates.gather(1, channels), IMAGES, TRUST)
    by_hand.weights, by_hand.residuals = whole.weights.clone(), whole.residuals.clone()
    by_hand.gradients = torch.stack(
        [rows[:, chosen] for rows, chosen in zip(whole.gradients, channels, strict=True)]
    )
    by_hand.begin()
    part = whole.narrowed(channels)
    least = torch.zeros(ROWS, dtype=torch.float64)
    before = whole.gates.clone(), whole.residuals.clone()
    for model in (part, by_hand):
        model.close(2)
        model.exchange(2, least)
        model.swap_pair(least, 6) if (model.gates.sum(1) > 1).all() else None
        model.swap(least)
    assert torch.equal(part.gates, by_hand.gates)
    torch.testing.assert_close(part.residuals, by_hand.residuals)
    # So far nothing has happened to the whole.
    assert torch.equal(whole.gates, before[0])
    assert torch.equal(whole.residuals, before[1])
    whole.widened(part, channels)
    assert whole.gates.sum(1).tolist() == [6] * ROWS

    # The same flips in the whole model leave the same state.
    again, _ = fill(gates, torch.Generator().manual_seed(seed))
    again.weights, again.gradients = whole.weights, whole.gradients
    again.residuals = before[1].clone()
    again.begin()
    for row in range(ROWS):
        for c in (whole.gates[row] != gates[row]).nonzero()[:, 0]:
            others = again.gates.clone()
            state = again._copy()
            again.flip(c.expand(ROWS, 1))
            rows = torch.arange(ROWS) != row
            again._restore(state, rows)
            assert torch.equal(again.gates[rows], others[rows])
    for name in ("gates", "residuals", "_slope", "_curvature"):
        torch.testing.assert_close(getattr(again, name), getattr(whole, name))


def test_candidates_are_the_cheapest_and_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    n, n_open = 400, 300
    generator = torch.Generator().manual_seed(0)
    gates = (torch.rand(ROWS, n, generator=generator).argsort(1) < n_open).double()
    model = QuadraticModel(gates, 16, TRUST)
    model.add(
        torch.zeros(ROWS, 16, dtype=torch.float64),
        torch.randn(ROWS, 16, generator=generator, dtype=torch.float64),
        torch.randn(ROWS, 16, n, generator=generator, dtype=torch.float64),
    )
    model.begin()
    assert model.candidates(n_open, 10, 5) is None  # a narrow network
    for name, value in {
        "MIN_CHANNELS_TO_NARROW": 400,
        "MAX_PAIR_CANDIDATES": 12,
        "SPARE_CANDIDATES": 8,
    }.items():
        monkeypatch.setattr(selection, name, value)
    found = model.candidates(n_open, 10, 5)
    assert found is not None
    channels, n_open_there = found
    n_cheap, n_closed = 2 * 15 + 8, 2 * 5 + 8
    assert channels.shape == (ROWS, 12 + n_cheap + n_closed)
    assert n_open_there == 12 + n_cheap
    closing, opening = model.cost(opening=False), model.cost(opening=True)
    for row in range(ROWS):
        chosen = channels[row].tolist()
        assert chosen == sorted(set(chosen))
        is_open = [c for c in chosen if gates[row, c]]
        assert len(is_open) == n_open_there
        largest = sorted(gates[row].nonzero()[:, 0].tolist(), key=lambda c: -model._square[row, c])
        assert set(largest[:12]) <= set(chosen)
        cheap = sorted(set(range(n)) - set(largest[:12]), key=lambda c: closing[row, c])
        assert set(is_open) == set(largest[:12]) | set(cheap[:n_cheap])
        first = sorted(range(n), key=lambda c: opening[row, c])[:n_closed]
        assert set(chosen) - set(is_open) == set(first)
    assert model.candidates(n_open, 60, 5) is None  # a third of the channels and more


def test_gates_are_evenly_spaced_by_their_score() -> None:
    score = torch.tensor([[0.1, 0.9, 0.5, 0.6], [0.4, 0.3, 0.2, 0.1]])
    expected = [[1 / 6, 5 / 6, 1 / 3, 2 / 3], [5 / 6, 2 / 3, 1 / 3, 1 / 6]]
    kept = torch.tensor([[False, True, False, True], [True, True, False, False]])
    torch.testing.assert_close(selection.in_order(score, kept), torch.tensor(expected))
