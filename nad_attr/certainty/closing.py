"""Close channels of a sub-architecture, and measure image by image what its output loses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from nad_attr.data.labels import Task, other_images, own_images
from nad_attr.data.sources import Source, check_finite
from nad_attr.gates.channels import gate_of_channel, split_sites, to_gates
from nad_attr.gating.prefix import Prefix
from nad_attr.learning.engine import Network
from nad_attr.running.outputs import own_task_output
from nad_attr.system.rng import seed_of

__all__ = ["Comparison", "State", "TaskTrial", "compared"]

FloatArray: TypeAlias = NDArray[np.float64]

#: Task outputs that differ by less than this, in deviations of the whole network's, are equal.
ROUNDING = 1e-5
#: Images that are drawn at a time.
DRAWN = 64
#: Sub-architectures that differ from one site on, from which on what is before it is kept.
WORTH_KEEPING = 4


class State(NamedTuple):
    """The open channels, and the constants of the closed ones: each (all channels,)."""

    gates: Tensor
    constants: Tensor


class Comparison(NamedTuple):
    """Mean of differences over own and other images in equal parts, its error, and a p-value."""

    mean: FloatArray
    #: Upper end of the one-sided confidence interval.
    high: FloatArray
    #: One-sided, for a mean above zero.
    p: FloatArray


def compared(differences: FloatArray, own: NDArray[np.bool_], level: float = 0.95) -> Comparison:
    """Test paired differences of two strata, own and other images, against zero.

    Student's t with Welch's degrees of freedom; the strata count equally, however many images
    each has. Squared errors that grow are skewed to the right, for which the test is conservative.

    Args:
        differences: (..., images).
        own: (images,).
        level: Of the one-sided upper end.

    Example:
        >>> own = np.array([True, True, False, False])
        >>> found = compared(np.array([[1.0, 2.0, 3.0, 2.0], [0.0] * 4]), own)
        >>> found.mean.tolist(), found.p.round(3).tolist()
        ([2.0, 0.0], [0.015, 1.0])
    """
    strata = [part for part in (own, ~own) if part.any()]
    mean = np.mean([differences[..., part].mean(-1) for part in strata], axis=0)
    parts, freedom = [], []
    for part in strata:
        n = int(part.sum())
        spread = differences[..., part].var(-1, ddof=1) if n > 1 else np.full(mean.shape, np.inf)
        parts.append(spread / n / len(strata) ** 2)
        freedom.append(max(n - 1, 1))
    variance = np.sum(parts, axis=0)
    error = np.sqrt(variance)
    with np.errstate(divide="ignore", invalid="ignore"):
        df = variance**2 / np.sum([v**2 / f for v, f in zip(parts, freedom, strict=True)], axis=0)
        df = np.where(np.isfinite(df), df, min(freedom))
        p = stats.t.sf(mean / error, df)
        high = mean + stats.t.ppf(level, df) * error
    exact = error == 0
    p = np.where(exact, np.where(mean > 0, 0.0, 1.0), p)
    # One image of a kind says nothing of how it varies.
    p = np.where(np.isinf(error), 1.0, p)
    return Comparison(mean, np.where(exact, mean, high), p)


class TaskTrial:
    """Images of a task, and how far sub-architectures are from the whole network's output there.

    Args:
        network: The network.
        source: The images.
        task: The task.
        most: Own images, and other ones, at most.
        key: Draws them, with the task.

    Attributes:
        own: bool (n,), which are own images.
        whole: float64 (n,), the whole network's task output.
        variance: Of it, own and other images in equal parts.
        passes: Images that were passed through the network.

    Raises:
        ValueError: If there is no own image.
    """

    def __init__(
        self, network: Network, source: Source, task: Task, most: int, key: tuple[object, ...]
    ) -> None:
        self.network, self.task, self.passes = network, task, 0
        #: Gate sites but the first, in forward order; those at which a pass was begun, and those
        #: at which none can begin.
        self._later: list[str] | None = None
        self._tried: set[str] = set()
        self._whole: set[str] = set()
        members = [task] if isinstance(task, int) else list(task)
        self._classes = torch.tensor([members], device=network.device)
        chosen: list[int] = []
        (own,), (other,) = own_images(source.labels, [task]), other_images(source.labels, [task])
        counts = []
        for kind, mask in (("own", own), ("other", other)):
            pool = mask.nonzero().flatten()
            generator = torch.Generator().manual_seed(seed_of(*key, task, kind))
            order = torch.randperm(len(pool), generator=generator, device="cpu")[:most]
            chosen += pool[order].sort().values.tolist()
            counts.append(len(order))
        if not counts[0]:
            raise ValueError(f"there is no image of task {task} to test on.")
        self.own = np.arange(sum(counts)) < counts[0]
        numbers = [chosen[a : a + DRAWN] for a in range(0, len(chosen), DRAWN)]
        draws = [[(i, seed_of("evaluation", i)) for i in part] for part in numbers]
        batches = [check_finite(inputs) for inputs in source.batches(draws)]
        self.inputs = tuple(torch.cat(items) for items in zip(*batches, strict=True))
        weights = np.where(self.own, 1 / counts[0], 1 / max(counts[1], 1))
        self.weights = weights / weights.sum()
        with torch.no_grad():
            found = [self._output(self._images(part)) for part in self._parts(len(self.own))]
        self.passes += len(self.own)
        self.whole = torch.cat(found).double().cpu().numpy()
        centred = self.whole - self.weights @ self.whole
        self.variance = float(max(self.weights @ centred**2, 1e-12))

    def _parts(self, n: int) -> list[Tensor]:
        return list(torch.arange(n, device="cpu").split(max(1, self.network.batch_size or 64)))

    def _images(self, numbers: Tensor) -> tuple[Tensor, ...]:
        return self.network.to_device(tuple(item[numbers] for item in self.inputs))

    def _output(self, inputs: tuple[Tensor, ...]) -> Tensor:
        return self._own(self.network(inputs))

    def _own(self, outputs: Tensor) -> Tensor:
        classes = self._classes.expand(len(outputs), -1)
        return own_task_output(outputs, classes, torch.ones_like(classes).bool())

    def outputs(
        self, states: Sequence[State], images: int | None = None, near: State | None = None
    ) -> FloatArray:
        """Task outputs of sub-architectures, side by side in shared passes.

        Args:
            states: S sub-architectures.
            images: Of the first own and other images, about so many in all; None: of all.
            near: A sub-architecture that most of them differ from in few channels: passes begin
                at the first site where they do; None: with the images.

        Returns:
            (S, images).
        """
        numbers = torch.arange(len(self.own), device="cpu")
        if images is not None and images < len(numbers):
            numbers = numbers[self.some(images)]
        gates, constants = (torch.stack(list(v)) for v in zip(*states, strict=True))
        n, found = len(numbers), np.empty((len(states), len(numbers)))
        done: list[int] = []
        with torch.no_grad():
            if near is not None:
                done = self._beside(near, State(gates, constants), numbers, found)
            rest = torch.tensor(sorted({*range(len(states))} - {*done}), device="cpu").long()
            for part in self._parts(n * len(rest)):
                each, image = rest[part // n], part % n
                at = State(gates[each], constants[each])
                found[each.numpy(), image.numpy()] = self._gated(numbers[image], at)
        return found

    def _gated(self, numbers: Tensor, states: State, prefix: Prefix | None = None) -> FloatArray:
        """Task outputs of images, each with a sub-architecture of its own."""
        network = self.network
        gates, constants = (values.to(network.device, network.dtype) for values in states)
        gates = to_gates(gates, network.sites, mean=True)  # the network wants one for a group
        outputs = network.gated(self._images(numbers), gates, constants, prefix=prefix)
        self.passes += len(numbers)
        result: FloatArray = self._own(outputs).double().cpu().numpy()
        return result

    def _beside(self, near: State, states: State, numbers: Tensor, found: FloatArray) -> list[int]:
        """Begin passes where sub-architectures differ from another, and fill in their outputs.

        Returns:
            Those that this was possible and worth it for.
        """
        groups = self._differing(near, states)
        for part in self._parts(len(numbers)):
            side = max(1, min(WORTH_KEEPING, (self.network.batch_size or 64) // len(part)))
            images = numbers[part].repeat(side)
            prefix: Prefix | None = None
            for site in list(groups):
                base = State(*(values.expand(len(images), -1) for values in near))
                kept = self._kept(Prefix(self.network.model, site, prefix), site, images, base)
                if kept is None:
                    del groups[site]
                    continue
                prefix, rows = kept, groups[site]
                for chosen in (rows[i : i + side] for i in range(0, len(rows), side)):
                    filled = [*chosen, *chosen[-1:] * (side - len(chosen))]
                    each = torch.tensor(filled, device="cpu").repeat_interleave(len(part))
                    at = State(states.gates[each], states.constants[each])
                    output = self._gated(images, at, prefix).reshape(side, -1)
                    found[np.array(chosen)[:, None], part.numpy()] = output[: len(chosen)]
        return [row for rows in groups.values() for row in rows]

    def _differing(self, near: State, states: State) -> dict[str, list[int]]:
        """The sub-architectures that first differ from another at each site, in forward order."""
        network = self.network
        if self._later is None:
            run = network._run if isinstance(network._run, nn.Module) else network.model
            possible = Prefix.possible(network.model) and Prefix.possible(run)
            image = self._images(torch.zeros(1, dtype=torch.long, device="cpu"))
            self._later = list(network.clean_recorded(image)[1]) if possible else []
            self.passes += int(possible)
        closed = (states.gates == 0) & (states.constants != near.constants)
        differs = split_sites((states.gates != near.gates) | closed, network.sites)
        left = torch.ones(len(states.gates), dtype=torch.bool, device="cpu")
        for site, values in differs.items():
            if site not in self._later:
                left &= ~values.any(1)
        groups = {}
        for site in self._later:
            rows = (left & differs[site].any(1)).nonzero().flatten().tolist()
            left[rows] = False
            if len(rows) >= WORTH_KEEPING and site not in self._whole:
                groups[site] = rows
        return groups

    def _kept(self, prefix: Prefix, site: str, images: Tensor, near: State) -> Prefix | None:
        """What a pass computes up to a site; None if passes that begin there would differ."""
        try:
            output = self._gated(images, near, prefix)
            same = prefix.complete
            if same and site not in self._tried:
                self._tried.add(site)
                again = self._gated(images, near, prefix)
                same = bool((np.abs(again - output) <= ROUNDING * self.variance**0.5).all())
        except Exception:  # whatever it is: whole passes need no prefix, or say what is wrong
            same = False
        if not same:
            self._whole.add(site)
        return prefix if same else None

    def some(self, images: int) -> NDArray[np.int64]:
        """Numbers of about so many images, evenly among own and other ones."""
        step = max(1, len(self.own) // images)
        return np.arange(0, len(self.own), step)

    def added(self, outputs: FloatArray, before: FloatArray) -> FloatArray:
        """By how much the squared error grows from one output to another: (..., images).

        In units of the whole network's variance; what is rounding is zero.
        """
        equal = np.abs(outputs - before) <= ROUNDING * self.variance**0.5
        grown = (outputs - self.whole) ** 2 - (before - self.whole) ** 2
        return np.where(equal, 0.0, grown / self.variance)

    def gradients(self, state: State) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Task outputs (n,), and to first order what opening each channel, and adding to it, does.

        Returns:
            (n,), (n, all channels) with respect to the gates, and (n, all channels) with respect to
            something added to the channel.
        """
        network = self.network
        gates, constants = (values.to(network.device, network.dtype) for values in state)
        gates = to_gates(gates, network.sites, mean=True)
        found = []
        with torch.enable_grad():
            for part in self._parts(len(self.own)):
                n = len(part)
                classes = self._classes.expand(n, -1)
                found.append(
                    network.output_and_gradients(
                        self._images(part),
                        gates.expand(n, -1),
                        constants.expand(n, -1),
                        classes,
                        torch.ones_like(classes).bool(),
                    )
                )
        self.passes += 2 * len(self.own)
        output, effects, slopes = (
            torch.cat(parts).double().cpu().numpy() for parts in zip(*found, strict=True)
        )
        of = gate_of_channel(network.sites)
        if of is not None:  # each channel has its part of what its group does
            effects = effects[:, of.numpy()] / np.bincount(of.numpy())[of.numpy()]
        return output, effects, slopes
