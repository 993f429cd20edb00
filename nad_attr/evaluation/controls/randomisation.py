"""Networks with random weights and data with wrong labels, for controls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset, TensorDataset

from nad_attr._checks import check_count
from nad_attr.data.labels import Labels
from nad_attr.data.sources import Data, DatasetSource, Source, TensorSource, as_source, loading
from nad_attr.gating.hooks import check_eval
from nad_attr.running.forward import Runner, chunks, network_errors
from nad_attr.running.options import RunOptions, as_options
from nad_attr.sites.site import unwrap
from nad_attr.system.rng import isolated_rng, permutation, seed_of

__all__ = ["cascading_randomisation", "random_weights", "shuffled_labels"]

#: Images that a random network's BatchNorms are estimated on, at most.
NORM_IMAGES = 512


def random_weights(
    model: nn.Module,
    seed: int = 0,
    *,
    data: Data | None = None,
    layers: Collection[str] | None = None,
    run: RunOptions | None = None,
) -> nn.Module:
    """A copy of the network with parameters drawn anew.

    Layers with ``reset_parameters`` draw as at the start of training; parameters that this leaves
    alone, and those of other layers, are normal with their former mean and standard deviation. A
    layer's draw depends on the seed and its name alone.

    Args:
        model: The network, in eval mode; unchanged afterwards.
        seed: Another draw for each seed.
        data: Images to estimate the statistics of the redrawn BatchNorms on. None: mean 0 and
            variance 1.
        layers: Names of the modules whose own parameters are drawn anew; None: all.
        run: How to run the network; see :class:`nad_attr.RunOptions`.

    Returns:
        The copy, in eval mode, on the network's device.

    Raises:
        ValueError: If the network is in train mode, or a layer is none of its modules.

    Example:
        >>> net = torch.nn.Linear(3, 2).eval()
        >>> other = random_weights(net, 1)
        >>> torch.equal(net.weight, other.weight)
        False
        >>> torch.equal(other.weight, random_weights(net, 1).weight)
        True
    """
    check_eval(model)
    for_copies(run)
    root = unwrap(model)
    modules = dict(root.named_modules())
    if isinstance(layers, str):
        layers = [layers]
    for name in layers or ():
        if name not in modules:
            raise ValueError(f"the network has no module {name!r} to draw parameters for.")
    drawn = copy.deepcopy(root)
    for parameter in drawn.parameters():
        parameter.grad = None
    # Draws on the CPU are the same for a network on any device.
    places = {name: tensor.device for name, tensor in _tensors(drawn)}
    drawn.cpu()
    chosen = [(n, m) for n, m in drawn.named_modules() if layers is None or n in layers]
    for name, module in chosen:
        with isolated_rng(seed_of("random weights", seed, name)), torch.no_grad():
            _draw(module)
    with torch.no_grad():
        for name, tensor in _tensors(drawn):
            tensor.data = tensor.data.to(places[name])
    if data is not None:
        source = as_source(data, any_labels=True)
        _estimate_norms(drawn, [name for name, _ in chosen], source, seed, run)
    return drawn.eval()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


def for_copies(run: RunOptions | None) -> RunOptions:
    """The options for copies of the network; a ValueError if ``forward_func`` is among them."""
    options = as_options(run)
    if options.forward_func is not None:
        raise ValueError(
            "forward_func runs the network that it was made for, not the random copies that this "
            "control is about: put both into a module whose forward returns the outputs."
        )
    return options


def _draw(module: nn.Module) -> None:
    """Draw a module's own parameters from the global random state."""
    own = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
    if not own and not isinstance(module, _BatchNorm):
        return
    before = [p.detach().clone() for p in own]
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
    for parameter, old in zip(own, before, strict=True):
        # Weight normalisation, for one, hides the true parameters from reset_parameters.
        if torch.equal(parameter, old):
            spread = old.double().std(correction=0)
            normal = torch.randn(old.shape, dtype=torch.float64, device="cpu")
            parameter.copy_(old.double().mean() + spread * normal)


def _estimate_norms(
    model: nn.Module, names: Sequence[str], source: Source, seed: int, run: RunOptions | None
) -> None:
    runner = Runner(model.eval(), run)  # where it runs may be a copy
    layers = [(runner.model.get_submodule(name), model.get_submodule(name)) for name in names]
    pairs = [(a, b) for a, b in layers if isinstance(a, _BatchNorm) and a.running_mean is not None]
    if not pairs:
        return
    norms = [norm for norm, _ in pairs]
    numbers = permutation(len(source.labels), "BatchNorm images", seed)[:NORM_IMAGES].tolist()
    cuts = chunks(len(numbers), runner.images_per_pass(source))
    batches = [[numbers[i] for i in cut] for cut in cuts]
    # One image has no variance.
    batches = [batch for batch in batches if len(batch) > 1] or [numbers]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
        norm.train()
    try:
        with torch.no_grad():
            for inputs in runner.draw(source, batches, "statistics of BatchNorm"):
                # A runner would put back what its passes change.
                with runner.precision(), network_errors(inputs):
                    runner.model(*inputs, *runner.options.arguments)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
    for norm, own in pairs:
        own.load_state_dict(norm.state_dict())


def cascading_randomisation(
    model: nn.Module,
    data: Data,
    *,
    seed: int = 0,
    stages: int | None = None,
    run: RunOptions | None = None,
) -> Iterator[tuple[str, nn.Module]]:
    """Copies of the network, random from the output down to one layer after the other.

    Args:
        model: The network, in eval mode; unchanged afterwards.
        data: Images, for the order in which layers run and for BatchNorms' statistics.
        seed: Of the draws; a layer is the same in all copies that have it redrawn, and in
            ``random_weights(model, seed, data=data)``, which the last copy equals.
        stages: Number of copies, evenly spaced over the layers with parameters; None: one for each.
        run: How to run the network; see :class:`nad_attr.RunOptions`.

    Yields:
        The name of a layer, and the copy with that layer and all later ones drawn anew.

    Raises:
        ValueError: If the network is in train mode or has no parameters, or ``stages`` is not a
            whole number from 1 on.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).eval()
        >>> data = torch.ones(4, 3), torch.tensor([0, 1, 0, 1])
        >>> [name for name, _ in cascading_randomisation(net, data)]
        ['1', '0']
    """
    if stages is not None:
        check_count(stages, "stages")
    check_eval(model)
    options, source = for_copies(run), as_source(data, any_labels=True)
    names = _output_first(unwrap(model), source, options)
    if not names:
        raise ValueError("the network has no parameters that could be drawn anew.")
    n_stages = len(names) if stages is None else min(stages, len(names))
    ends = [round((i + 1) * len(names) / n_stages) for i in range(n_stages)]

    def copies() -> Iterator[tuple[str, nn.Module]]:
        for end in ends:
            copy = random_weights(model, seed, data=data, layers=names[:end], run=options)
            yield names[end - 1], copy

    return copies()


def _output_first(model: nn.Module, source: Source, run: RunOptions) -> list[str]:
    """Names of the modules with parameters of their own, in the reverse order of their run."""
    probe = copy.deepcopy(model)
    run = replace(run, device=None)  # the hooks are on this copy
    finished: dict[str, int] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            finished.setdefault(name, len(finished))

        return hook

    for name, module in probe.named_modules():
        module.register_forward_hook(watch(name))
    runner = Runner(probe, run)
    with torch.no_grad():
        for inputs in runner.draw(source, [[0]]):
            runner(inputs)

    def when(name: str) -> int:
        # A module whose parameters are used without calling it runs with the one around it.
        while name and name not in finished:
            name = name.rpartition(".")[0]
        return finished.get(name, -1)

    named = [
        name
        for name, module in probe.named_modules()
        if any(True for _ in module.parameters(recurse=False)) or isinstance(module, _BatchNorm)
    ]
    return sorted(reversed(named), key=when, reverse=True)


class _Relabelled(Dataset[Any]):
    """Some of a dataset's images, with other labels."""

    def __init__(self, dataset: Dataset[Any], numbers: Sequence[int], labels: Tensor) -> None:
        self.dataset, self.numbers, self.targets = dataset, list(numbers), labels

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        label = self.targets[i]
        return self.dataset[self.numbers[i]][0], label if label.ndim else int(label)


def chosen(data: Data, source: Source, rows: Tensor, labels: Tensor) -> Data:
    """Some of the images with new labels, as the same kind of data."""
    # Rows of a single 1 each would be read as classes.
    given: Any = Labels(labels, kind="several") if labels.ndim == 2 else labels
    if isinstance(source, TensorSource):
        inputs = tuple(item[rows.to(item.device)] for item in source.inputs)
        return (inputs if len(inputs) > 1 else inputs[0]), given
    if not isinstance(source, DatasetSource):
        raise TypeError(f"images cannot be chosen from a {type(source).__name__}.")
    numbers = [source.numbers[i] for i in rows.tolist()]
    dataset: Dataset[Any] = _Relabelled(source.dataset, numbers, labels)
    if isinstance(source.dataset, TensorDataset):  # whose images never change
        dataset = TensorDataset(*(t[numbers] for t in source.dataset.tensors[:-1]), labels)
    result: Any = dataset
    if isinstance(data, DataLoader):
        result = DataLoader(dataset, batch_size=data.batch_size or 1, **loading(data))
    return (result, given) if labels.ndim == 2 else result


def shuffled_labels(data: Data, seed: int = 0) -> Data:
    """The same images with shuffled labels; each class keeps its number of images.

    Args:
        data: ``(inputs, labels)`` tensors, a Dataset of (input, label) or a DataLoader.
        seed: Another order for each seed.

    Returns:
        The same kind of data; a loader does not shuffle.

    Raises:
        TypeError: If data is something else.

    Example:
        >>> images, labels = torch.zeros(4, 2), torch.tensor([0, 0, 1, 1])
        >>> _, dealt = shuffled_labels((images, labels), seed=1)
        >>> dealt.sort().values.tolist()
        [0, 0, 1, 1]
    """
    source = as_source(data, any_labels=True)
    n = len(source.labels)
    dealt = source.labels[permutation(n, "shuffled labels", seed)]
    return chosen(data, source, torch.arange(n, device="cpu"), dealt)
