"""Are images mistaken for classes whose sub-architecture is similar to the right one's?

For every misclassified image, of class y and called y', this finds the rank of y' among all wrong
classes, ordered by how similar their sub-architectures are to that of y; beside it, the rank that
chance gives, and four controls without sub-architectures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nad_attr._checks import GatingError, check_count
from nad_attr.data.sources import ChosenSource, Data, Inputs, Source, as_source
from nad_attr.evaluation.evaluating import random_architectures
from nad_attr.evaluation.questions.error_ranks import (
    checked_similarity,
    error_ranks,
    partial_rank_correlation,
)
from nad_attr.evaluation.questions.error_study import ErrorStudy, Voting
from nad_attr.evaluation.responses import answers
from nad_attr.evaluation.rows import NamedArchitectures, named_architectures
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.gating.hooks import recorded
from nad_attr.running.forward import Runner, check_classes, chunks
from nad_attr.running.options import RunOptions
from nad_attr.sites.site import GateSite, unwrap
from nad_attr.stats.pairs import chance_overlaps, cosines, overlap_matrix
from nad_attr.stats.tables import FloatArray

__all__ = ["SIMILARITIES", "errors"]

Architectures: TypeAlias = "TaskGates | SubArchitecture | Sequence[SubArchitecture]"

#: Similarities of two sub-architectures: overlaps of masks, or the cosine of soft gates.
SIMILARITIES = ("kappa", "jaccard", "gates")

#: The controls, by their names in :attr:`ErrorStudy.controls`.
CLASSIFIER, FEATURES, SIZE = "classifier rows", "class-mean features", "mask size"


def similarity_of(
    architectures: Architectures, given: NamedArchitectures, similarity: Any
) -> tuple[str, FloatArray]:
    """Name and (K, K) matrix of a similarity that is named or given."""
    if not isinstance(similarity, str):
        try:
            matrix = np.asarray(similarity, dtype=np.float64)
        except (TypeError, ValueError):
            raise TypeError(
                f"similarity must be one of {', '.join(SIMILARITIES)} or a matrix, got "
                f"{similarity!r:.60}."
            ) from None
        return "given", checked_similarity(matrix, len(given.tasks))
    if similarity not in SIMILARITIES:
        raise ValueError(
            f"there is no similarity {similarity!r}; there are {', '.join(SIMILARITIES)}."
        )
    if similarity == "gates":
        if not isinstance(architectures, TaskGates):
            raise ValueError('similarity="gates" compares soft gates, and needs TaskGates.')
        parts = [cosines(architectures[name].double().numpy()) for name in architectures]
        return similarity, np.asarray(sum(parts) / len(parts))
    corrected = similarity == "kappa"
    return similarity, np.asarray(overlap_matrix(given.masks, chance_corrected=corrected).numpy())


def single_classes(given: NamedArchitectures) -> tuple[int, ...]:
    """The tasks, each of which has to be one class."""
    for task in given.tasks:
        if not isinstance(task, int):
            raise ValueError(
                f"task {task} is a group of classes; an error is of one class for another, so "
                "leave groups out."
            )
    return tuple(task for task in given.tasks if isinstance(task, int))


def _classifier_of(
    runner: Runner, image: Inputs, n_classes: int, name: str | None
) -> tuple[str, nn.Linear] | str:
    """The Linear layer whose rows are the classes, or the reason why there is none."""
    known = dict(unwrap(runner.model).named_modules())
    if name is not None:
        layer = known.get(name)
        if not isinstance(layer, nn.Linear):
            found = "no module" if layer is None else f"a {type(layer).__name__}"
            raise ValueError(f"classifier {name!r} is {found} of the network, not a Linear layer.")
        if layer.out_features != n_classes:
            raise ValueError(
                f"classifier {name!r} has {layer.out_features} outputs, the network {n_classes}."
            )
        candidates = [(name, layer)]
    else:
        candidates = [
            (key, module)
            for key, module in known.items()
            if key and isinstance(module, nn.Linear) and module.out_features == n_classes
        ]
    if not candidates:
        return f"no Linear layer inside the network has {n_classes} outputs; name it: classifier="
    key, layer = candidates[-1]
    try:
        with recorded(runner.model, [_input_of(key, layer)]) as seen:
            runner(image)
    except GatingError as error:
        if name is not None:
            raise
        return f"the input of layer {key!r} cannot be read: {error}"
    if seen[key].ndim != 2:
        return f"the input of layer {key!r} has {seen[key].ndim} axes, not (images, features)"
    return key, layer


def _input_of(name: str, layer: nn.Linear) -> GateSite:
    return GateSite(name, layer.in_features, -1, at_input=True)


class _ClassMeans:
    """Means of features over each class's images that the network gets right.

    Its errors are left out because they are to be explained; a class without any right image has
    the mean over all of its images.
    """

    def __init__(self, n_classes: int, n_features: int) -> None:
        self.total = torch.zeros(2, n_classes, n_features, dtype=torch.float64, device="cpu")
        self.count = torch.zeros(2, n_classes, dtype=torch.float64, device="cpu")

    def add(self, features: Tensor, y: Tensor, right: Tensor) -> None:
        """Features (B, F) of images of classes y (B,), with whether the network is right."""
        values = features.detach().cpu().double()
        for part, some in enumerate((right, torch.ones_like(right))):
            self.total[part].index_add_(0, y[some], values[some])
            self.count[part] += y[some].bincount(minlength=self.count.shape[1])

    def means(self) -> FloatArray | None:
        """(K, F), or None if a class has no images."""
        if bool((self.count[1] == 0).any()):
            return None
        part = (self.count[0] == 0).long()
        row = torch.arange(len(part), device="cpu")
        return np.asarray((self.total[part, row] / self.count[part, row, None]).numpy())


def _clean_pass(
    runner: Runner, source: Source, tasks: Sequence[int], classifier: str | None
) -> tuple[NDArray[np.int64], dict[str, FloatArray], dict[str, str]]:
    """The whole network's class of each image, int64 (N,), and what the controls need.

    That is ``{control: (K, ...)}``, one row per task to take the cosine of, and ``{control: the
    reason why it is not there}``.
    """
    (one,) = runner.draw(source, [[0]])
    n_classes = runner(one).shape[1]
    check_classes(source.labels, tasks, n_classes)
    found = _classifier_of(runner, one, n_classes, classifier)
    sites = [] if isinstance(found, str) else [_input_of(*found)]
    numbers = list(chunks(len(source.labels), runner.images_per_pass(source)))
    y, called = rows_of(source.labels, tasks), []
    features = None if isinstance(found, str) else _ClassMeans(len(tasks), found[1].in_features)
    with recorded(runner.model, sites) as seen:
        for some, inputs in zip(numbers, runner.draw(source, numbers), strict=True):
            outputs = runner(inputs)
            if bool(outputs.isnan().any()):
                raise ValueError("the network gives NaN for an image.")
            called.append(outputs.argmax(1).cpu())
            if features is not None:
                here = slice(some[0], some[-1] + 1)
                right = called[-1] == source.labels[here]
                features.add(seen[sites[0].name], y[here], right)
    calls = torch.cat(called).numpy()
    if isinstance(found, str) or features is None:
        return calls, {}, dict.fromkeys((CLASSIFIER, FEATURES), str(found))
    rows = {CLASSIFIER: found[1].weight.detach().cpu().double().numpy()[list(tasks)]}
    means = features.means()
    if means is None:
        return calls, rows, {FEATURES: "a class has no image to take the mean over"}
    return calls, {**rows, FEATURES: means}, {}


def rows_of(labels: Tensor, tasks: Sequence[int]) -> Tensor:
    """The row of each label among the tasks: int64 (N,)."""
    row_of = {task: row for row, task in enumerate(tasks)}
    return torch.tensor(
        [row_of[label] for label in labels.tolist()], dtype=torch.int64, device="cpu"
    )


def _share_right(logits: Tensor, y: Tensor) -> float:
    """Share of images (N, K) whose class has the highest logit; ties count in equal parts."""
    highest = logits == logits.amax(1, keepdim=True)
    right = highest.gather(1, y[:, None])[:, 0].double()
    return float((right / highest.sum(1)).mean())


def _vote(
    runner: Runner, given: NamedArchitectures, source: Source, *, n_random: int, seed: int
) -> Voting:
    archs = list(given.architectures)
    for draw in range(n_random):
        archs += random_architectures(given.architectures, draw=draw, seed=seed)
    with runner.bar(len(source.labels), "voting") as bar:
        said = answers(
            runner, archs, source, ablation=None, bar=bar, columns=given.tasks, own_only=True
        )
    n = len(given.tasks)
    y = rows_of(source.labels, single_classes(given))
    votes = said.gated[:, :, 0].unflatten(0, (-1, n)).transpose(1, 2)  # (1 + draws, N, K)
    agree = votes[0].argmax(1) == said.whole.argmax(1)
    return Voting(
        accuracy=_share_right(votes[0], y),
        whole=_share_right(said.whole, y),
        random=tuple(_share_right(vote, y) for vote in votes[1:]),
        agreement=float(agree.double().mean()),
        n_images=len(y),
    )


def errors(
    model: nn.Module,
    architectures: Architectures,
    data: Data,
    *,
    similarity: str | Any = "kappa",
    size: float | None = None,
    hits: Sequence[int] = (1, 3, 5),
    n_permutations: int = 1000,
    voting: bool = True,
    n_random: int = 3,
    classifier: str | None = None,
    seed: int = 0,
    run: RunOptions | None = None,
) -> ErrorStudy:
    """Ask whether errors go to classes whose sub-architecture is similar to the right one's.

    A classifier with similar output weights for two classes mistakes them for each other anyway,
    and their sub-architectures may be similar for the same reason. So controls get the same
    statistics, and :attr:`ErrorStudy.partial` says what the sub-architectures add to each.

    Args:
        model: The network, in eval mode; unchanged afterwards.
        architectures: Task gates, or sub-architectures of the same sites, each of another class;
            at least three. Errors that involve other classes are left out.
        data: Images that the gates were not learned on: ``(inputs, labels)`` tensors, a Dataset
            of (input, label) or a DataLoader.
        similarity: ``"kappa"`` (overlap of masks beyond chance) or ``"jaccard"`` (the paper's),
            mean over sites; ``"gates"``: cosine of the soft gates, mean over sites; or a matrix
            (K, K), the row's class ranks the columns'.
        size: Binarise task gates at this share of the channels; None: as they were learned.
        hits: The n of hit@n; those that are always 1 are left out.
        n_permutations: Of the classes, for p-values.
        voting: Run all images through all sub-architectures as well, and let them vote.
        n_random: Draws of random channels that vote beside them.
        classifier: Name of the Linear layer whose rows are the classes, for the controls. None:
            the last one with as many outputs as the network.
        seed: Of permutations, random channels and bootstrap.
        run: How to run the network; see :class:`nad_attr.RunOptions`.

    Returns:
        The statistics, controls and the vote.

    Raises:
        GatingError: If a site does not fire, fires twice or has another shape.
        SiteError: If the network has no such site.
        TypeError: If an argument is of a wrong kind.
        ValueError: If the network is in train mode, tasks are groups or fewer than three, there is
            no error to study, labels or tasks are not a class of the network, or values are NaN.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(3, 3, bias=False)).eval()
        >>> _ = net[1].weight.data.copy_(torch.eye(3))
        >>> site, kept = GateSite("0", 3, 1), [[0, 1], [0, 1], [2]]  # classes 0 and 1 share all
        >>> archs = [SubArchitecture.from_kept({"0": kept[k]}, [site], task=k) for k in range(3)]
        >>> images, labels = torch.eye(3), torch.tensor([0, 0, 2])  # the second is called 1
        >>> study = errors(net, archs, (images, labels), hits=[1])
        >>> study.ranks.hits, study.ranks.hit_null
        ({1: 1.0}, {1: 0.5})
    """
    given = named_architectures(architectures, size, least=3)
    tasks = single_classes(given)
    what, similarities = similarity_of(architectures, given, similarity)
    check_count(n_permutations, "n_permutations")
    check_count(n_random, "n_random", least=0)
    for k in hits:
        check_count(k, "hits")
    runner = Runner(model, run)
    source = as_source(data)
    of_tasks = torch.isin(source.labels, torch.tensor(tasks, device="cpu")).nonzero()[:, 0]
    if len(of_tasks) == 0:
        raise ValueError(f"data holds no image of any of the tasks {list(tasks[:10])}.")
    chosen: Source = source
    if len(of_tasks) < len(source.labels):
        chosen = ChosenSource(source, of_tasks)

    with torch.no_grad():
        calls, rows, left_out = _clean_pass(runner, chosen, tasks, classifier)
    confusion, n_outside = _confusion(chosen.labels.numpy(), calls, tasks)
    if not (confusion - np.diag(confusion.diagonal())).any():
        raise ValueError(
            f"the network mistakes none of the {len(calls)} images for another of the "
            f"{len(tasks)} classes; there is no error to study."
        )
    matrices = {name: cosines(values) for name, values in rows.items()}
    matrices[SIZE] = chance_overlaps(given.masks)
    common: dict[str, Any] = {"n_permutations": n_permutations, "seed": seed}
    vote = None
    if voting:
        vote = _vote(runner, given, chosen, n_random=n_random, seed=seed)
    return ErrorStudy(
        tasks=tasks,
        task_names=given.task_names,
        n_images=len(calls),
        n_outside=n_outside,
        confusion=confusion,
        similarity=what,
        similarities=similarities,
        ranks=error_ranks(similarities, confusion, hits=hits, **common),
        controls={
            name: error_ranks(matrix, confusion, hits=hits, **common)
            for name, matrix in matrices.items()
        },
        control_similarities=matrices,
        partial={
            name: partial_rank_correlation(confusion, similarities, matrix, **common)
            for name, matrix in matrices.items()
        },
        left_out=left_out,
        voting=vote,
    )


def _confusion(
    labels: NDArray[np.int64], calls: NDArray[np.int64], tasks: Sequence[int]
) -> tuple[NDArray[np.int64], int]:
    """Images of each task called each task, and the number of those called another class."""
    row_of = {task: row for row, task in enumerate(tasks)}
    confusion = np.zeros((len(tasks), len(tasks)), dtype=np.int64)
    n_outside = 0
    for label, call in zip(labels.tolist(), calls.tolist(), strict=True):
        if call in row_of:
            confusion[row_of[label], row_of[call]] += 1
        else:
            n_outside += 1
    return confusion, n_outside
