"""Sources of images: every kind of data, drawn by number and seed."""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from nad_attr.data.sources import DatasetSource, Source, TensorSource, as_source, check_finite
from nad_attr.system.rng import isolated_rng, seed_of
from tests.helpers import assert_model_untouched, labelled_images

X, LABELS = labelled_images(8)
NOTHING = torch.nn.Identity()


def drawn(source: Source, *draws: list[tuple[int, int]]) -> list[Tensor]:
    return [inputs[0] for inputs in source.batches(draws)]


def everything(source: Source, seed: int = 0) -> Tensor:
    return torch.cat(drawn(source, [(i, seed) for i in range(len(source.labels))]))


class Items(Dataset):
    """The images by number, as pairs."""

    def __init__(self, n: int = 8) -> None:
        self.n, self.fetched = n, []

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        self.fetched.append(number)
        return X[number], int(LABELS[number])


class Noisy(Items):
    """Adds a number of each of the three global generators."""

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        image, label = super().__getitem__(number)
        noise = torch.rand(()) + np.random.rand() + random.random()  # noqa: NPY002
        return image + noise, label


class Targets(Items):
    """Has ``targets``, as torchvision's datasets."""

    def __init__(self, n: int = 8) -> None:
        super().__init__(n)
        self.targets = LABELS[:n].tolist()


class Batches(Dataset):
    """Items that are batches already."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return X[2 * number : 2 * number + 2], LABELS[2 * number : 2 * number + 2]


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        yield from ((X[i], int(LABELS[i])) for i in range(8))


# ---------------------------------------------------------------------------------------------
# Kinds of data
# ---------------------------------------------------------------------------------------------

KINDS = {
    "tensors": lambda: (X, LABELS),
    "list of tensors": lambda: [X, LABELS],
    "labels as list": lambda: (X, LABELS.tolist()),
    "labels as array": lambda: (X, LABELS.numpy()),
    "labels of few bits": lambda: (X, LABELS.to(torch.uint8)),
    "tuple of inputs": lambda: ((X,), LABELS),
    "tensor dataset": lambda: TensorDataset(X, LABELS),
    "dataset": lambda: Items(),
    "dataset with targets": lambda: Targets(),
    "subset": lambda: Subset(Items(), range(8)),
    "concatenated": lambda: ConcatDataset([Subset(Items(), range(5)), Subset(Items(), [5, 6, 7])]),
    "loader": lambda: DataLoader(Items(), batch_size=3),
    "shuffling loader": lambda: DataLoader(Items(), batch_size=3, shuffle=True),
    "loader of tensors": lambda: DataLoader(TensorDataset(X, LABELS), batch_size=5),
    "loader of a dataset of batches": lambda: DataLoader(Batches(), batch_size=None),
    "iterable dataset in a loader": lambda: DataLoader(Stream(), batch_size=3),
    "generator of batches": lambda: ((X[i : i + 3], LABELS[i : i + 3]) for i in (0, 3, 6)),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_all_kinds_give_the_same_images(make: object) -> None:
    with assert_model_untouched(NOTHING, X, LABELS):
        source = as_source(make())
        assert source.labels.dtype == torch.int64
        assert torch.equal(source.labels, LABELS)
        assert torch.equal(everything(source), X)
        first, second = drawn(source, [(6, 1), (0, 2), (6, 3)], [(7, 4)])
        assert torch.equal(first, X[[6, 0, 6]])
        assert torch.equal(second, X[[7]])


def test_several_inputs() -> None:
    pair = (X, X[:, 0])
    for data in ((pair, LABELS), (list(pair), LABELS), TensorDataset(*pair, LABELS)):
        source = as_source(data)
        (inputs,) = source.batches([[(2, 0), (1, 0)]])
        assert torch.equal(inputs[0], X[[2, 1]])
        assert torch.equal(inputs[1], X[[2, 1], 0])


def test_a_dataset_of_several_inputs() -> None:
    class Pairs(Items):
        def __getitem__(self, number: int) -> tuple[tuple[Tensor, Tensor], int]:
            return (X[number], X[number, 0]), int(LABELS[number])

    (inputs,) = as_source(Pairs()).batches([[(2, 0), (1, 0)]])
    assert [tuple(item.shape) for item in inputs] == [(2, 3, 8, 8), (2, 8, 8)]


def test_whether_images_vary() -> None:
    assert not as_source((X, LABELS)).augmented
    assert not as_source(TensorDataset(X, LABELS)).augmented
    assert not as_source(DataLoader(TensorDataset(X, LABELS))).augmented
    assert not as_source(DataLoader(Stream())).augmented
    assert as_source(Items()).augmented
    assert as_source(DataLoader(Items())).augmented
    assert not as_source(Items(), augmented=False).augmented
    assert not as_source(DataLoader(Items()), augmented=False).augmented


def test_the_loaders_collate_function_is_used() -> None:
    def collate(items: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        images, labels = zip(*items, strict=True)
        return 2 * torch.stack(images), torch.tensor(labels)

    source = as_source(DataLoader(Items(), batch_size=2, collate_fn=collate))
    assert torch.equal(everything(source), 2 * X)


def test_inputs_of_inference_mode_are_copied() -> None:
    with torch.inference_mode():
        images = torch.ones(2, 3)
        source = TensorSource(images, [0, 1])
    (inputs,) = source.batches([[(0, 0)]])
    assert not inputs[0].is_inference()
    torch.ones(3, requires_grad=True).mul(inputs[0]).sum().backward()


def test_images_with_a_graph_are_cut_off_from_it() -> None:
    images = X.clone().requires_grad_()
    (batch,) = drawn(as_source((images, LABELS)), [(0, 0)])
    assert not batch.requires_grad


# ---------------------------------------------------------------------------------------------
# Which images
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler",
    [
        SubsetRandomSampler([5, 1, 4]),
        [1, 4, 5],
        WeightedRandomSampler([0, 1, 0, 0, 1, 1, 0, 0], 3, False),
    ],
    ids=["random subset", "list", "weights"],
)
def test_a_sampler_that_leaves_images_out_means_it(sampler: object) -> None:
    with assert_model_untouched(NOTHING):
        source = as_source(DataLoader(Items(), batch_size=2, sampler=sampler))
        assert torch.equal(source.labels, LABELS[[1, 4, 5]])
        assert torch.equal(everything(source), X[[1, 4, 5]])


def test_a_batch_sampler_that_leaves_images_out() -> None:
    source = as_source(DataLoader(Items(), batch_sampler=[[5, 1], [4]]))
    assert torch.equal(everything(source), X[[1, 4, 5]])


def test_dropping_the_last_batch_leaves_no_image_out() -> None:
    source = as_source(DataLoader(Items(), batch_size=3, drop_last=True, shuffle=True))
    assert torch.equal(everything(source), X)


def test_labels_are_read_without_images_where_the_dataset_tells_them() -> None:
    for dataset, numbers in ((Targets(), range(8)), (Subset(Targets(), [6, 2]), [6, 2])):
        source = as_source(dataset)
        assert torch.equal(source.labels, LABELS[list(numbers)])
        inner = dataset.dataset if isinstance(dataset, Subset) else dataset
        assert inner.fetched == []
        assert torch.equal(everything(source), X[list(numbers)])
    nested = Subset(Subset(Targets(), [7, 5, 3]), [2, 0])
    assert torch.equal(as_source(nested).labels, LABELS[[3, 7]])
    sampled = DataLoader(Targets(), sampler=SubsetRandomSampler([6, 2]))
    assert torch.equal(as_source(sampled).labels, LABELS[[2, 6]])


@pytest.mark.parametrize(
    "targets",
    ["text", None, [0.5] * 8, [0] * 7, np.zeros((8, 2), int), [[0], [1, 2]]],
    ids=["text", "None", "not whole", "too few", "table", "ragged"],
)
def test_targets_that_are_no_labels_are_not_believed(targets: object) -> None:
    dataset = Items()
    dataset.targets = targets
    assert torch.equal(as_source(dataset).labels, LABELS)


def test_a_target_transform_is_obeyed() -> None:
    class Shifted(Targets):
        target_transform = staticmethod(lambda label: label + 10)

        def __getitem__(self, number: int) -> tuple[Tensor, int]:
            image, label = super().__getitem__(number)
            return image, self.target_transform(label)

    assert torch.equal(as_source(Shifted()).labels, LABELS + 10)
    assert torch.equal(as_source(Subset(Shifted(), [3, 1])).labels, LABELS[[3, 1]] + 10)


# ---------------------------------------------------------------------------------------------
# Random transforms
# ---------------------------------------------------------------------------------------------


def test_a_draw_is_a_function_of_number_and_seed() -> None:
    with assert_model_untouched(NOTHING):
        source = as_source(Noisy())
        (together,) = drawn(source, [(0, 5), (1, 5), (0, 6), (0, 5)])
        apart = torch.cat(drawn(source, [(0, 6)], [(1, 5)], [(0, 5)]))
    assert torch.equal(together[0], together[3])
    assert torch.equal(together[:3], apart[[2, 1, 0]])
    assert not torch.equal(together[0], together[2])


def test_the_callers_generators_play_no_part() -> None:
    results = []
    for seed in (1, 2):
        with isolated_rng(seed):
            results.append(everything(as_source(DataLoader(Noisy(), shuffle=True)), seed=9))
    assert torch.equal(*results)


@pytest.mark.slow
def test_workers_change_nothing() -> None:
    draws = [[(0, 5), (1, 6)], [(7, 7)], [(3, 8), (0, 5)]]
    with assert_model_untouched(NOTHING):
        alone = drawn(as_source(DataLoader(Noisy())), *draws)
        helped = as_source(DataLoader(Targeted(), num_workers=2, multiprocessing_context="fork"))
        with_workers = drawn(helped, *draws)
    for one, other in zip(alone, with_workers, strict=True):
        assert torch.equal(one, other)


class Targeted(Noisy, Targets):
    """Random images whose labels are known without loading them."""


def test_isolated_rng_puts_everything_back() -> None:
    with assert_model_untouched(NOTHING):
        with isolated_rng(1):
            first = torch.rand(2), np.random.rand(), random.random()  # noqa: NPY002
            with isolated_rng(2):
                torch.rand(1)
            second = torch.rand(1)
        with pytest.raises(ZeroDivisionError), isolated_rng(3):
            random.random()
            raise ZeroDivisionError
        with isolated_rng(1):
            again = torch.rand(2), np.random.rand(), random.random()  # noqa: NPY002
            assert torch.equal(torch.rand(1), second)
    assert torch.equal(first[0], again[0])
    assert first[1:] == again[1:]


@pytest.mark.slow
@given(parts=st.lists(st.integers() | st.text() | st.tuples(st.integers()), max_size=4))
def test_seeds(parts: list[object]) -> None:
    seed = seed_of(*parts)
    assert 0 <= seed < 2**63
    assert seed == seed_of(*parts)
    assert seed != seed_of(*parts, 0)


def test_seeds_are_the_same_on_every_machine() -> None:
    assert seed_of(0, (1, 2), "own", 3) == 1758181155432104309


# ---------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_images_that_are_not_finite_are_named(bad: float) -> None:
    images = X.clone()
    images[3, 0, 0, 0] = images[5, 2, 1, 1] = bad
    with pytest.raises(ValueError, match=r"image\(s\) \[3, 5\] of a batch of 8 hold NaN or inf"):
        as_source((images, LABELS))
    with pytest.raises(ValueError, match=r"input 1: image\(s\) \[3, 5\]"):
        check_finite((X, images))
    check_finite((torch.arange(3),))

    class Bad(Targets):
        def __getitem__(self, number: int) -> tuple[Tensor, int]:
            return images[number], 0

    source = as_source(Bad())
    assert len(drawn(source, [(0, 0), (1, 0)])) == 1
    with pytest.raises(ValueError, match=r"image\(s\) \[1\] of a batch of 2"):
        drawn(source, [(0, 0), (3, 0)])


def test_a_source_of_a_dataset_can_be_made_by_hand() -> None:
    source = DatasetSource(Items(), numbers=[4, 2], augmented=False)
    assert torch.equal(everything(source), X[[4, 2]])


# ---------------------------------------------------------------------------------------------
# A loader's settings
# ---------------------------------------------------------------------------------------------


class Opened(Targets):
    """Must be opened in each worker, as a dataset of one large file."""

    file: Tensor | None = None

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        assert self.file is not None, "not opened"
        return self.file[number], int(LABELS[number])


def open_in_worker(number: int) -> None:
    info = get_worker_info()
    assert info is not None
    info.dataset.file = X


def test_worker_init_fn_is_called_and_finds_the_dataset() -> None:
    loader = DataLoader(
        Opened(), num_workers=1, multiprocessing_context="fork", worker_init_fn=open_in_worker
    )
    assert torch.equal(everything(as_source(loader)), X)


def test_all_settings_of_a_loader_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, object]] = []

    class Spied(DataLoader):
        def __init__(self, *args: object, **options: object) -> None:
            given.append(options)
            super().__init__(*args, **options)

    settings = {
        "num_workers": 2, "timeout": 30, "prefetch_factor": 3, "persistent_workers": True,
        "pin_memory": True, "multiprocessing_context": "fork",
    }  # fmt: skip
    loader = DataLoader(Targets(), **settings)
    monkeypatch.setattr("nad_attr.data.sources.DataLoader", Spied)
    source = DatasetSource(Targets(), loader=loader)
    assert torch.equal(everything(source), X)
    (options,) = given
    context = options.pop("multiprocessing_context")
    assert context is loader.multiprocessing_context
    assert settings.items() - {("multiprocessing_context", "fork")} <= options.items()


@pytest.mark.slow
def test_persistent_workers_stay() -> None:
    loader = DataLoader(
        Processes(), num_workers=1, persistent_workers=True, multiprocessing_context="fork"
    )
    source = as_source(loader)
    first, second = everything(source), everything(source)
    assert torch.equal(first, second)
    broken_off = iter(source.batches([[(i, 0)] for i in range(8)]))
    next(broken_off)
    assert not torch.equal(everything(source), first)  # others while one is under way
    broken_off.close()
    assert torch.equal(everything(source), first)
    assert len(everything(pickle.loads(pickle.dumps(source)))) == 8  # without its processes


class Processes(Targets):
    """Images that hold the number of the process that made them."""

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return torch.full_like(X[number], os.getpid()), int(LABELS[number])


def test_a_weighted_sampler_loses_no_image() -> None:
    weights = torch.ones(8)
    weights[3] = 0
    loader = DataLoader(Targets(), sampler=WeightedRandomSampler(weights, 8))
    with pytest.warns(UserWarning, match="WeightedRandomSampler is used only"):
        source = as_source(loader)
    assert torch.equal(source.labels, LABELS[[0, 1, 2, 4, 5, 6, 7]])


@pytest.mark.parametrize("kind", ["sampler", "batch_sampler"])
def test_a_sampler_that_draws_with_replacement_is_named(kind: str) -> None:
    draws: list[object] = [5, 2, 5] if kind == "sampler" else [[5, 2], [5]]

    class Twice(list):
        pass

    loader = DataLoader(Targets(), **{kind: Twice(draws)})
    with pytest.warns(UserWarning, match=r"Twice draws some .* 2 of the dataset's 8 images"):
        source = as_source(loader)
    assert torch.equal(source.labels, LABELS[[2, 5]])
