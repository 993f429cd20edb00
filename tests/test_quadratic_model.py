"""The quadratic model of the default recipe, against H = S^T W S written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nad_attr.selection import BLOCK, QuadraticModel, project

ROWS, N, IMAGES, TRUST = 3, 12, BLOCK + 8, 0.3


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
        """Of flipping each gate alone; inf where it stands there already."""
        there = 1.0 if opening else 0.0
        return [math.inf if self.gates[c] == there else self.cost(c) for c in range(N)]

    def close(self, n: int, groups: int) -> None:
        """Close the cheapest, by groups."""
        while n > 0:
            size = max(1, n // groups)
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


@pytest.fixture
def filled() -> tuple[QuadraticModel, list[Dense]]:
    """A model whose memory has been overwritten in part, and the references of its rows."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    gates = (torch.rand(ROWS, N, generator=generator) > 0.3).double()
    model = QuadraticModel(gates, IMAGES, TRUST)
    residuals, gradients = randn(ROWS, 0), randn(ROWS, 0, N)
    weights: list[float] = []
    for _ in range(7):  # 56 images into 40 places
        new = randn(ROWS, 8), randn(ROWS, 8, N)
        model.age(0.8)
        model.add(*new)
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
    monkeypatch.setattr("nad_attr.selection.GROUPS", 2)
    model.close(6)  # 3, 1, 1, 1
    for row in dense:
        row.close(6, groups=2)
    assert_same(model, dense)


@pytest.mark.parametrize("least_gain", [0.0, 0.5, 1e9])
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


@pytest.mark.parametrize("n_open", [4, 9])
def test_relaxed_is_the_best_there_is(
    filled: tuple[QuadraticModel, list[Dense]], n_open: int
) -> None:
    model, dense = filled
    relaxed = model.relaxed(n_open, model._share)
    torch.testing.assert_close(relaxed.sum(1), torch.full((ROWS,), float(n_open)).double())
    for gates, row in zip(relaxed, dense, strict=True):
        # No gate may want to grow at the cost of another: their slopes differ by their bounds.
        slope = row.slope + row.hessian @ (gates - row.origin)
        can_grow, can_shrink = gates < 1 - 1e-3, gates > 1e-3
        assert slope[can_shrink].max() < slope[can_grow].min() + 0.05 * slope.abs().max()


@pytest.mark.parametrize("k", [0, 1, 3, 7, 8])
def test_projection_against_a_search(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    values = 2 * torch.randn(40, 8, generator=generator, dtype=torch.float64)
    values[:10] = values[:10].round()  # ties, and distances of exactly 1
    low, high = values.min(1, True).values - 1, values.max(1, True).values
    for _ in range(60):
        middle = (low + high) / 2
        above = (values - middle).clamp(0, 1).sum(1, True) > k
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    torch.testing.assert_close(project(values, k), (values - low).clamp(0, 1), rtol=0, atol=1e-9)


def test_jump_leaves_a_consistent_model(filled: tuple[QuadraticModel, list[Dense]]) -> None:
    model, dense = filled
    n_open = int(model.gates[0].sum())
    gates, residuals = model.gates.clone(), model.residuals.clone()
    model.jump(n_open, torch.zeros(ROWS, dtype=torch.float64))
    moved = torch.einsum("rmn,rn->rm", model.gradients, model.gates - gates)
    torch.testing.assert_close(model.residuals, residuals + moved)
    for row, now in zip(dense, model.gates, strict=True):
        row.gates = now.clone()
    assert_same(model, dense)


def test_groups_do_not_overshoot_with_few_images_and_many_channels() -> None:
    """With 8 images, hundreds of channels seem to make good whatever the first ones broke."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-3, 0, 600)
    gradients = torch.randn(1, 8, 600, generator=generator) * scale
    model = QuadraticModel(torch.ones(1, 600), 8, TRUST)
    model.add(torch.zeros(1, 8), gradients)
    model.begin()
    model.close(200)
    squares = gradients.square().mean(1)[0]
    closed = squares[model.gates[0] == 0]
    # Nearly the 200 smallest, although larger ones fit together better on these images.
    assert closed.max() < 4 * squares.sort().values[200]
