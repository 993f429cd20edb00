"""Learn gates in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from nad_attr.data.sources import Data
from nad_attr.gates.recipe import Recipe
from nad_attr.gates.task_gates import TaskGates
from nad_attr.learning.network_checks import Checks
from nad_attr.learning.session import Session, _start
from nad_attr.running.options import RunFields, RunOptions, as_options
from nad_attr.sites.site import GateSite

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["learn_gates", "learn_sizes"]


def learn_gates(
    model: nn.Module,
    data: Data,
    tasks: Sequence[object] | Mapping[str, object] | None = None,
    recipe: Recipe | None = None,
    sites: Sequence[GateSite | str | nn.Module] | None = None,
    *,
    seed: int = 0,
    run: RunOptions | None = None,
    augmented: bool | None = None,
    checks: Checks = "refuse",
    initial_logits: Mapping[str, Tensor] | None = None,
    **fields: Unpack[RunFields],
) -> TaskGates:
    """Learn which channels of a network each task needs.

    The network is not changed. The result is a function of network, data, recipe and seed: a task's
    gates do not depend on the other tasks, their order, or the batch size (beyond the rounding of
    the arithmetic).

    Args:
        model: A classifier in eval mode, on any device, also in a DataParallel or ``torch.compile``
            wrapper.
        data: Images with labels: ``(inputs, labels)`` tensors, a Dataset of (input, label), or a
            DataLoader of such (its dataset, workers and choice of images are used, not its order).
            ``inputs`` may be a tuple of tensors for networks that take several.
        tasks: Class indices; groups of class indices (a superclass is one task, its output the
            logsumexp over the group); or ``{name: class index or group}``. None: every class that
            the data holds.
        recipe: How to learn; None is ``Recipe()``. See :class:`nad_attr.Recipe`.
        sites: Gate sites, module names or modules; None: found by
            :func:`nad_attr.find_gate_sites`.
        seed: Any whole number; each task draws from a generator of (seed, task).
        run: How to run the network; see :class:`nad_attr.RunOptions`. With the paper's recipe, a
            task's images of one step always go together, whatever the batch size.
        augmented: Whether the same image may look different each time it is drawn. None: yes for
            datasets and loaders, no for tensors. With False the whole network's outputs are
            computed once per image and kept.
        checks: Before learning, two images show whether an image's outputs are its own and whether
            gradients predict what closing channels does (:mod:`nad_attr.learning.network_checks`):
            "refuse" a network that fails, "warn" and continue, or "off".
        initial_logits: ``{site name: (T, C)}``, the paper recipe's starting point in place of
            N(0, 1).
        **fields: Fields of ``run``, which replace those of ``run``: ``device``, ``amp``,
            ``batch_size``, ``memory_limit``, ``forward_func``, ``additional_forward_args``,
            ``show_progress``.

    Returns:
        The gates, with history and everything needed to repeat the run in ``info``.

    Raises:
        SiteError: If sites cannot be gated; says which and what to do.
        TypeError: If data, tasks or recipe are of another kind.
        ValueError: If data is empty or holds NaN, a class is unknown or without images, the
            network is in train mode, or an argument is invalid; NetworkCheckError, a ValueError, if
            ``checks`` find a fault.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
        >>> x = torch.randn(20, 4, generator=generator)
        >>> labels = (x[:, 0] > 0).long()
        >>> gates = learn_gates(net, (x, labels), tasks=[1], recipe=Recipe(size=0.5))
        >>> gates
        TaskGates(1 task, 1 site, 6 channels, 50.0 % kept, closed channels at their best constants)
        >>> gates["1"].shape
        torch.Size([1, 6])
    """
    run = as_options(run, **fields)
    session = Session(
        model, data, tasks, recipe, sites, seed=seed, run=run, augmented=augmented, checks=checks
    )
    start = _start(initial_logits, session.recipe, session.sites, session.tasks)
    total = sum(map(session.n_steps, session.tasks))
    with session.network.bar(total, "learning gates", "step") as bar:
        return session.learn(start=start, advance=bar.update)


def learn_sizes(
    model: nn.Module,
    sizes: Sequence[float],
    data: Data,
    tasks: Sequence[object] | Mapping[str, object] | None = None,
    recipe: Recipe | None = None,
    sites: Sequence[GateSite | str | nn.Module] | None = None,
    *,
    seed: int = 0,
    run: RunOptions | None = None,
    augmented: bool | None = None,
    checks: Checks = "refuse",
    **fields: Unpack[RunFields],
) -> dict[float, TaskGates]:
    """Learn which channels each task needs at several sizes, in one run of falling budget.

    The run passes through all sizes on its way down. Smaller sub-architectures need not be parts of
    larger ones. The recipe's steps are shared equally among the sizes, so many sizes need more
    steps: the default has 25 for each from four sizes on.

    Args:
        model: See :func:`learn_gates`.
        sizes: Shares of the channels to keep, each in (0, 1].
        data: See :func:`learn_gates`.
        tasks: See :func:`learn_gates`.
        recipe: The default recipe with other settings; its size is not used. None:
            ``Recipe(steps=max(100, 25 * len(sizes)))``.
        sites: See :func:`learn_gates`.
        seed: See there.
        run: See there.
        augmented: See there.
        checks: See there.
        **fields: See there.

    Returns:
        ``{size: task gates}`` in the order of ``sizes``.

    Raises:
        SiteError, TypeError, ValueError: See :func:`learn_gates`; a ValueError also if sizes mean
            the same number of channels, there are none, or more than steps, or the recipe is the
            paper's.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
        >>> x = torch.randn(20, 4, generator=generator)
        >>> found = learn_sizes(net, [0.5, 1 / 3], (x, (x[:, 0] > 0).long()), tasks=[1])
        >>> {round(size, 2): gates.sub_architecture(1).n_kept for size, gates in found.items()}
        {0.5: 3, 0.33: 2}
    """
    if recipe is None and isinstance(sizes, Sequence):
        recipe = Recipe(steps=max(Recipe().steps, 25 * len(sizes)))
    run = as_options(run, **fields)
    session = Session(
        model, data, tasks, recipe, sites, seed=seed, run=run, augmented=augmented, checks=checks
    )
    total = sum(map(session.n_steps, session.tasks))
    with session.network.bar(total, "learning gates", "step") as bar:
        return session.learn_sizes(sizes, advance=bar.update)
