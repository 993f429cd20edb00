"""Write a project for ViRelAy: heat-maps through sub-architectures, to browse with a mouse.

ViRelAy (Anders et al. 2021, arXiv 2106.13200) shows images, their heat-maps and a map with a point
for each image, in which the user picks neighbours and clusters. :func:`export_virelay` writes
heat-maps through the sub-architecture of each image's class, and two maps: of the classes' gate
vectors, and of the images' activations in the kept channels. Writing needs nothing but h5py; t-SNE
and k-means need scikit-learn, UMAP needs umap-learn.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nad_attr.bridges._embeddings import check_embeddings, check_n_clusters, clusters, embeddings
from nad_attr.data.sources import Data, Inputs, Source, as_source, only_images
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.gating.hooks import channel_shape, recorded
from nad_attr.pictures.heat_maps import (
    HeatMapMethod,
    class_architectures,
    gradient_times_input,
    run_method,
)
from nad_attr.pictures.pixels import ToPixels, as_pixels
from nad_attr.running.forward import Runner, check_classes, chunks
from nad_attr.running.options import RunOptions
from nad_attr.store import GateStore
from nad_attr.system.files import sync

__all__ = ["export_virelay"]

FloatArray: TypeAlias = NDArray[np.float32]
IntArray: TypeAlias = NDArray[np.int64]
#: Names, or WordNet numbers, of classes by index.
Names: TypeAlias = "Mapping[int, str] | Sequence[str] | None"

PROJECT = "project.yaml"
DATASET, ATTRIBUTION, LABEL_MAP = "dataset.h5", "attribution.h5", "label_map.json"
GATES, ACTIVATIONS = "analysis_gates.h5", "analysis_activations.h5"
#: Category of the points of all classes together.
ALL_CLASSES = "all classes"


@dataclass(frozen=True)
class _Job:
    runner: Runner
    source: Source
    of_class: dict[int, SubArchitecture]
    method: HeatMapMethod
    to_pixels: ToPixels | None
    batch_size: int

    @property
    def labels(self) -> IntArray:
        """int64 (N,)."""
        labels: IntArray = self.source.labels.numpy()
        return labels

    @property
    def index(self) -> IntArray:
        """Numbers of the images whose class has a sub-architecture: int64 (M,)."""
        found: IntArray = np.flatnonzero(np.isin(self.labels, list(self.of_class)))
        return found


def _gates_of(
    store: GateStore | TaskGates | Sequence[SubArchitecture] | str | PathLike[str],
    classes: Sequence[int],
) -> TaskGates | Sequence[SubArchitecture]:
    """The gates of those tasks that hold one of the classes."""
    if isinstance(store, (str, PathLike)):
        with GateStore.open(store) as opened:
            return _gates_of(opened, classes)
    if not isinstance(store, GateStore):
        return store
    members = [(task, task if isinstance(task, tuple) else (task,)) for task in store.tasks]
    wanted = [task for task, own in members if set(own) & set(classes)]
    if not wanted:
        raise ValueError(
            f"{store.path} has no gates of any class of the images ({list(classes)[:10]})."
        )
    return store.read(wanted)


def _gate_vectors(
    gates: TaskGates | Sequence[SubArchitecture],
    of_class: Mapping[int, SubArchitecture],
    size: float | None,
) -> dict[int, FloatArray]:
    """The gates of each class at all sites, one after the other: ``{class: float32 (C,)}``."""
    found = {}
    for label, arch in of_class.items():
        if isinstance(gates, TaskGates) and size is None:
            parts = gates.gates_of(arch.task)
        else:
            parts = arch.gates()
        found[label] = torch.cat([parts[site.name] for site in arch.sites]).numpy()
    return found


def _named(names: Names, n: int, what: str, default: Callable[[int], str]) -> list[str]:
    """One text for each of n classes."""
    names = {} if names is None else names
    if isinstance(names, str) or not isinstance(names, (Mapping, Sequence)):
        raise TypeError(f"{what} must be a list of texts or {{class: text}}, got {names!r:.60}.")
    if isinstance(names, Mapping):
        return [str(names.get(k, default(k))) for k in range(n)]
    if len(names) != n:
        raise ValueError(f"{len(names)} {what} were given for the network's {n} outputs.")
    return list(map(str, names))


def _text(value: str) -> str:
    """A YAML scalar, written as a JSON string."""
    return json.dumps(value)


def _project(
    name: str, model_name: str, dataset_name: str, method_name: str, analyses: Mapping[str, str]
) -> str:
    lines = [
        "project:",
        f"  name: {_text(name)}",
        f"  model: {_text(model_name)}",
        f"  label_map: {LABEL_MAP}",
        "  dataset:",
        f"    name: {_text(dataset_name)}",
        "    type: hdf5",
        f"    path: {DATASET}",
        "  attributions:",
        f"    attribution_method: {_text(method_name)}",
        "    attribution_strategy: true_label",
        "    sources:",
        f"      - {ATTRIBUTION}",
        "  analyses:",
    ]
    for analysis, path in analyses.items():
        lines += [
            f"    - analysis_method: {_text(analysis)}",
            "      sources:",
            f"        - {path}",
        ]
    return "\n".join(lines) + "\n"


@contextmanager
def _appearing(folder: Path, overwrite: bool, source: Path | None) -> Iterator[Path]:
    """A folder beside the wanted one; its files are moved there at the end, all or nothing.

    A new folder appears in one step. In an existing one, an earlier project's files are put aside
    first (its project file before all others), and put back if anything fails. ``source``, the
    file of the gates, is not replaced.

    Raises:
        FileExistsError: If there is a project already, and ``overwrite`` is false.
    """
    files = (DATASET, ATTRIBUTION, LABEL_MAP, GATES, ACTIVATIONS, PROJECT)
    there = [name for name in files if os.path.lexists(folder / name)]
    for name in there:
        if source is not None and (folder / name).exists() and source.samefile(folder / name):
            raise FileExistsError(
                f"{folder / name} is the file of the gates; choose another folder."
            )
    if there and not overwrite:
        raise FileExistsError(
            f"{folder / there[0]} is there already; choose another folder, or say overwrite=True."
        )
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, not a folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    made, before = beside / "new", beside / "before"
    made.mkdir()
    before.mkdir()
    kept = False
    try:
        yield made
        for path in made.iterdir():
            sync(path, os.O_RDWR)
        if not folder.exists():
            made.rename(folder)
            return
        kept = True
        _exchange(made, folder, before, files)
        kept = False
    finally:
        # Files that could not be put back stay.
        if not kept or not any(before.iterdir()):
            shutil.rmtree(beside, ignore_errors=True)


def _exchange(made: Path, folder: Path, before: Path, files: Sequence[str]) -> None:
    """Put a folder's files aside and others in their place, or leave everything as it is.

    The OSError of a failure says where the old files are if they could not be put back.
    """

    def move(source: Path, target: Path, names: Iterable[str]) -> None:
        for name in names:
            if os.path.lexists(source / name):
                os.replace(source / name, target / name)

    # The project file is removed first and written last: all files that it names are there.
    new = [name for name in files if (made / name).exists()]
    try:
        move(folder, before, reversed(files))
        move(made, folder, new)
    except BaseException as error:
        try:
            move(folder, made, [name for name in reversed(new) if not (made / name).exists()])
            move(before, folder, files)
        except OSError:
            raise OSError(
                f"the earlier project could not be put back into {folder}: its files are in "
                f"{before}."
            ) from error
        raise


@torch.no_grad()
def _n_outputs(job: _Job) -> int:
    """The number of the network's outputs, found with one image."""
    (inputs,) = job.runner.draw(job.source, [[int(job.index[0])]])
    only_images(inputs)
    n = job.runner(inputs).shape[1]
    check_classes(job.source.labels, list(job.of_class), n)
    return n


def _write_dataset(job: _Job, path: Path) -> FloatArray:
    """Write all images as pictures; returns the whole network's outputs, float32 (N, K)."""
    n = len(job.labels)
    outputs: list[FloatArray] = []
    parts = [list(part) for part in chunks(n, job.batch_size)]
    with h5py.File(path, "w") as file, torch.no_grad():
        file["label"] = job.labels
        data = None
        for part, inputs in zip(parts, job.runner.draw(job.source, parts, "images"), strict=True):
            pixels = as_pixels(only_images(inputs), job.to_pixels).numpy()
            if min(pixels.shape[2:]) < 3:
                raise ValueError(
                    f"pictures of {pixels.shape[2]} x {pixels.shape[3]} are too small: ViRelAy "
                    "takes the shortest axis for the colours."
                )
            if data is None:
                shape = (n, *pixels.shape[1:])
                data = file.create_dataset("data", shape, np.uint8, chunks=(1, *shape[1:]))
            data[part[0] : part[-1] + 1] = pixels
            outputs.append(job.runner(inputs).float().cpu().numpy())
    return np.concatenate(outputs)


def _write_attributions(job: _Job, path: Path, outputs: FloatArray) -> FloatArray:
    """Write the heat-maps; returns what the images do in the kept channels, float32 (M, C)."""
    index, labels = job.index, job.labels
    row_of = {int(number): row for row, number in enumerate(index)}
    activations: FloatArray | None = None
    bar = job.runner.bar(len(index), "heat-maps")
    with h5py.File(path, "w") as file, bar:
        file["index"] = index
        file["label"] = labels[index]
        file["prediction"] = outputs[index]
        maps = None
        for label in sorted({int(label) for label in labels[index]}):
            arch = job.of_class[label]
            numbers = [int(i) for i in index[labels[index] == label]]
            cuts = chunks(len(numbers), job.batch_size)
            parts = [numbers[part.start : part.stop] for part in cuts]
            for part, inputs in zip(parts, job.runner.draw(job.source, parts), strict=True):
                x = only_images(inputs)
                target = torch.full((len(part),), label, dtype=torch.int64, device="cpu")
                found = run_method(job.runner, arch, job.method, x, target)
                if found.shape[1] not in (1, 3):
                    found = found.sum(1, keepdim=True)
                if maps is None:
                    shape = (len(index), *found.shape[1:])
                    maps = file.create_dataset(
                        "attribution", shape, np.float32, chunks=(1, *shape[1:])
                    )
                vectors = _activation_vectors(job.runner, arch, x)
                if activations is None:
                    activations = np.zeros((len(index), vectors.shape[1]), np.float32)
                for number, one, vector in zip(part, found.numpy(), vectors, strict=True):
                    maps[row_of[number]] = one
                    activations[row_of[number]] = vector
                bar.update(len(part))
    assert activations is not None
    return activations


@torch.no_grad()
def _activation_vectors(runner: Runner, arch: SubArchitecture, x: Tensor) -> FloatArray:
    """Each channel's gated activation less its ablation value, mean over positions: (B, C)."""
    parts = []
    with arch.applied(runner.model), recorded(runner.model, arch.sites) as activations:
        runner((x,))
    for site in arch.sites:
        tensor = activations[site.name]
        dim, _ = channel_shape(site, tensor)
        values = tensor.movedim(dim, 1).flatten(2).float().mean(2).cpu()
        if arch.means is not None:
            values = values - arch.means[site.name]
        parts.append(values * arch[site.name])
    joined: FloatArray = torch.cat(parts, dim=1).numpy()
    return joined


def _site_scaled(vectors: FloatArray, arch: SubArchitecture) -> FloatArray:
    """Each site in units of its own root mean square, so that none counts by its scale alone."""
    scaled = vectors.copy()
    start = 0
    for site in arch.sites:
        part = scaled[:, start : start + site.n_channels]
        unit = float(np.sqrt(np.mean(np.square(part, dtype=np.float64))))
        if unit > 0:
            part /= unit
        start += site.n_channels
    return scaled


def _write_category(
    file: h5py.File,
    name: str,
    index: IntArray,
    maps: Mapping[str, tuple[FloatArray, NDArray[np.float64] | None]],
    groups: Mapping[str, IntArray],
) -> None:
    group = file.create_group(name)
    group["index"] = index
    for key, (points, eigenvalues) in maps.items():
        group[f"embedding/{key}"] = points
        if eigenvalues is not None:
            group[f"embedding/{key}"].attrs["eigenvalue"] = eigenvalues
    for key, numbers in groups.items():
        group[f"cluster/{key}"] = numbers.astype(np.int64)


def _write_gate_analysis(
    job: _Job,
    path: Path,
    vectors: Mapping[int, FloatArray],
    called: IntArray,
    wanted: Sequence[str],
    n_clusters: Sequence[int],
    seed: int,
) -> None:
    """One point for each class, for all its images."""
    index, labels = job.index, job.labels
    present = sorted({int(label) for label in labels[index]})
    table = np.stack([vectors[label] for label in present])
    at = np.searchsorted(present, labels[index])
    found = embeddings(table, wanted, seed)
    maps = {key: (points[at], values) for key, (points, values) in found.items()}
    groups = {"class": labels[index], "called": called}
    groups |= {key: numbers[at] for key, numbers in clusters(table, n_clusters, seed).items()}
    with h5py.File(path, "w") as file:
        _write_category(file, ALL_CLASSES, index, maps, groups)


def _write_activation_analysis(
    job: _Job,
    path: Path,
    vectors: FloatArray,
    called: IntArray,
    wanted: Sequence[str],
    n_clusters: Sequence[int],
    names: Sequence[str],
    seed: int,
) -> bool:
    """One point for each image; one category for each class, and one for all.

    ViRelAy reads the names of embeddings and clusters off the first category alone, so categories
    that are too small for all of them are left out; returns whether any is left.
    """
    index, labels = job.index, job.labels[job.index]
    least = max([4, *(k + 1 for k in n_clusters)])
    categories = {ALL_CLASSES: np.arange(len(index))}
    categories |= {names[k]: np.flatnonzero(labels == k) for k in sorted(set(labels.tolist()))}
    categories = {name: rows for name, rows in categories.items() if len(rows) >= least}
    with h5py.File(path, "w") as file:
        for name, rows in categories.items():
            arch = job.of_class[int(labels[rows[0]])]
            table = _site_scaled(vectors[rows], arch)
            groups = {"class": labels[rows], "called": called[rows]}
            groups |= clusters(table, n_clusters, seed)
            _write_category(file, name, index[rows], embeddings(table, wanted, seed), groups)
    if not categories:
        path.unlink()
    return bool(categories)


def export_virelay(
    model: nn.Module,
    store: GateStore | TaskGates | Sequence[SubArchitecture] | str | PathLike[str],
    data: Data,
    folder: str | PathLike[str],
    *,
    method: HeatMapMethod = gradient_times_input,
    method_name: str | None = None,
    size: float | None = None,
    class_names: Names = None,
    word_net_ids: Names = None,
    to_pixels: ToPixels | None = None,
    project_name: str = "sub-architectures",
    model_name: str | None = None,
    dataset_name: str = "images",
    embeddings: Sequence[str] | None = None,
    n_clusters: Sequence[int] = (2, 3, 5),
    seed: int = 0,
    overwrite: bool = False,
    run: RunOptions | None = None,
) -> Path:
    """Write a ViRelAy project of heat-maps through each class's own sub-architecture.

    The folder then holds ``project.yaml`` and its files: ``dataset.h5`` (all images),
    ``attribution.h5`` (heat-maps of the images whose class has gates, towards that class, and the
    whole network's outputs), ``label_map.json`` and two analyses. *sub_architectures*: a point for
    each class, with all its images, from its gate vector. *gated_activations*: a point for each
    image, from the means of its gated activations over positions; one category for each class with
    enough images, and one for all. Clusters are the image's class, the class that the network
    calls, and k-means. Open it with ``virelay project.yaml``.

    Args:
        model: The network, in eval mode; unchanged afterwards, whatever ``method`` does.
        store: A gate store or its path, task gates, or sub-architectures with tasks. Of a store,
            only the classes of the images are read.
        data: Images with labels: ``(inputs, labels)`` tensors, a Dataset or a DataLoader.
        folder: Where to write; made if it is not there. Files appear when all are complete; an
            earlier project stays if anything fails. If the process is killed while files are moved,
            there is no ``project.yaml``, and the earlier files are in the hidden folder beside.
        method: The heat-maps, called as ``method(network, inputs, target)`` in the gated network,
            see :func:`nad_attr.pictures.heat_maps`.
        method_name: What ViRelAy calls it. None: the function's name.
        size: Binarise task gates at this share of the channels; None: as they were learned.
        class_names: Names of all classes, or ``{class: name}``. None: the gates' task names.
        word_net_ids: Short names of the classes, unique, that categories go by, such as WordNet
            numbers. None: ``class_0003`` and so on.
        to_pixels: Undoes the network's preprocessing, see :func:`nad_attr.pictures.as_pixels`.
        project_name: What ViRelAy calls the project.
        model_name: What it calls the network. None: the name of its class.
        dataset_name: What it calls the data.
        embeddings: Some of "pca", "tsne" (scikit-learn) and "umap" (umap-learn). None: all that
            are installed; "pca" always is. Fewer than four classes have "pca" alone.
        n_clusters: Numbers of clusters of k-means (scikit-learn). Without scikit-learn, there are
            the classes' clusters only.
        seed: Of embeddings and clusters.
        overwrite: Replace a project that is there.
        run: How to run the network; see :class:`nad_attr.RunOptions`.

    Returns:
        The path of ``project.yaml``.

    Raises:
        FileExistsError: If there is a project already and ``overwrite`` is False, or one of its
            files is the store.
        GateStoreError: If a store cannot be read.
        GatingError: If a site does not fire, fires twice or has another shape.
        ImportError: If an embedding was asked for whose package is missing.
        TypeError: If an argument is of a wrong kind.
        ValueError: If no image is of a class with gates, inputs are not images, names do not fit,
            the network is in train mode, or values are not finite.

    Example:
        >>> from nad_attr.sites import GateSite
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(4, 2),
        ... ).eval()
        >>> site = GateSite("1", 4, 1)
        >>> archs = [SubArchitecture.from_kept({"1": [k, 2]}, [site], task=k) for k in range(2)]
        >>> data = (torch.rand(8, 3, 8, 8), torch.arange(8) % 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = export_virelay(
        ...         net, archs, data, folder, embeddings=["pca"], n_clusters=[]
        ...     )
        ...     sorted(file.name for file in path.parent.iterdir())
        ['analysis_activations.h5', 'analysis_gates.h5', 'attribution.h5', 'dataset.h5',
        'label_map.json', 'project.yaml']
    """
    if not callable(method):
        raise TypeError(f"method must be a function, got {method!r:.60}.")
    wanted = check_embeddings(embeddings)
    ks = check_n_clusters(n_clusters)
    source = as_source(data)
    gates = _gates_of(store, sorted(set(source.labels.tolist())))
    of_class = class_architectures(gates, size)
    runner = Runner(model, run, batch_size=32)
    label, arch = next(iter(of_class.items()))

    def probe(inputs: Inputs) -> None:
        target = torch.full((len(inputs[0]),), label, dtype=torch.int64, device="cpu")
        run_method(runner, arch, method, only_images(inputs), target)

    job = _Job(runner, source, of_class, method, to_pixels, runner.images_per_pass(source, probe))
    if len(job.index) == 0:
        raise ValueError(
            f"no image is of a class with gates: the images are of "
            f"{sorted(set(source.labels.tolist()))[:10]}, gates are of {list(job.of_class)[:10]}."
        )
    if class_names is None and isinstance(gates, TaskGates) and gates.task_names is not None:
        pairs = zip(gates.tasks, gates.task_names, strict=True)
        class_names = {task: name for task, name in pairs if isinstance(task, int)}
    n_classes = _n_outputs(job)
    names = _named(class_names, n_classes, "class_names", lambda k: f"class {k}")
    ids = _named(word_net_ids, n_classes, "word_net_ids", lambda k: f"class_{k:04d}")
    odd = any("/" in i or i in ("", ".", ALL_CLASSES) for i in ids)
    if len(set(ids)) < n_classes or odd:
        raise ValueError(
            f"word_net_ids must differ from each other and from {ALL_CLASSES!r}, without '/'."
        )
    target = Path(folder)
    named = store.path if isinstance(store, GateStore) else store
    gates_file = Path(named) if isinstance(named, (str, PathLike)) else None
    with _appearing(target, overwrite, gates_file) as made:
        outputs = _write_dataset(job, made / DATASET)
        table = [{"index": k, "word_net_id": ids[k], "name": names[k]} for k in range(n_classes)]
        (made / LABEL_MAP).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        vectors = _write_attributions(job, made / ATTRIBUTION, outputs)
        called = outputs[job.index].argmax(1)
        by_class = _gate_vectors(gates, job.of_class, size)
        _write_gate_analysis(job, made / GATES, by_class, called, wanted, ks, seed)
        # No hyphens: ViRelAy's server asks for "a-b" as "a_b".
        analyses = {"sub_architectures": GATES}
        place = made / ACTIVATIONS
        if _write_activation_analysis(job, place, vectors, called, wanted, ks, ids, seed):
            analyses["gated_activations"] = ACTIVATIONS
        model_name = model_name or type(job.runner.model).__name__
        method_name = method_name or str(getattr(method, "__name__", type(method).__name__))
        method_name = f"{method_name} through each class's sub-architecture"
        text = _project(project_name, model_name, dataset_name, method_name, analyses)
        (made / PROJECT).write_text(text, encoding="utf-8")
    return target / PROJECT
