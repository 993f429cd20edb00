"""The ViRelAy project: what is in its files, and that ViRelAy's own loader opens it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nad_attr import (
    GateSite,
    GateStore,
    GatingError,
    RunOptions,
    SubArchitecture,
    TaskGates,
    find_gate_sites,
    gated,
)
from nad_attr.bridges import _embeddings
from nad_attr.bridges._embeddings import clusters, embeddings, pca
from nad_attr.bridges.virelay import export_virelay
from tests import helpers

N = 21


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    """21 images, seven of each class."""
    return helpers.labelled_images(N)


@pytest.fixture
def sites(tiny_cnn: nn.Module) -> list[GateSite]:
    """relu1 (6 channels) and relu2 (8)."""
    return find_gate_sites(tiny_cnn, helpers.images(1))


@pytest.fixture
def gates(sites: list[GateSite]) -> TaskGates:
    """Gates of classes 0 and 2, not of 1; closed channels at a mean."""
    generator = torch.Generator().manual_seed(3)
    values = {s.name: torch.rand(2, s.n_channels, generator=generator) for s in sites}
    means = {s.name: torch.rand(s.n_channels, generator=generator) for s in sites}
    return TaskGates(values, sites, [0, 2], means=means, task_names=["red", 'b"lu:e'])


def reference(model: nn.Module, arch: SubArchitecture, x: Tensor, label: int) -> Tensor:
    """Gradient x input of one image through a sub-architecture, written plainly."""
    x = x[None].clone().requires_grad_(True)
    with gated(model, arch.gates(torch.float64), sites=arch.sites, means=arch.means):
        model(x)[0, label].backward()
    assert x.grad is not None
    for parameter in model.parameters():
        parameter.grad = None
    return (x * x.grad)[0].detach()


def test_files_hold_what_they_should(
    tmp_path: Path, tiny_cnn: nn.Module, data: tuple[Tensor, Tensor], gates: TaskGates
) -> None:
    images, labels = data
    with helpers.assert_model_untouched(tiny_cnn, images, labels):
        path = export_virelay(
            tiny_cnn,
            gates,
            data,
            tmp_path / "project",
            to_pixels=lambda x: (x + 4) / 8,
            run=RunOptions(batch_size=4),
            n_clusters=(2, 3),
        )
    assert path == tmp_path / "project" / "project.yaml"
    expected_index = [i for i in range(N) if int(labels[i]) != 1]
    with h5py.File(path.parent / "dataset.h5") as file:
        assert file["label"][:].tolist() == labels.tolist()
        pixels = (((images + 4) / 8).clamp(0, 1) * 255).round()
        assert np.abs(file["data"][:].astype(int) - pixels.numpy()).max() <= 1
    with h5py.File(path.parent / "attribution.h5") as file:
        assert file["index"][:].tolist() == expected_index
        assert file["label"][:].tolist() == labels[expected_index].tolist()
        with torch.no_grad():
            np.testing.assert_allclose(
                file["prediction"][:], tiny_cnn(images[expected_index]), rtol=1e-5
            )
        for row, number in enumerate(expected_index):
            label = int(labels[number])
            own = reference(tiny_cnn, gates.sub_architecture(label), images[number], label)
            other = reference(tiny_cnn, gates.sub_architecture(2 - label), images[number], label)
            np.testing.assert_allclose(file["attribution"][row], own, rtol=1e-4, atol=1e-6)
            assert not np.allclose(file["attribution"][row], other, rtol=1e-2)
    with h5py.File(path.parent / "analysis_gates.h5") as file:
        assert list(file) == ["all classes"]
        group = file["all classes"]
        assert group["index"][:].tolist() == expected_index
        points = group["embedding/pca"][:]
        own = np.array([labels[i] == 0 for i in expected_index])
        # All images of a class stand at one point, the two classes at different ones.
        assert np.ptp(points[own], axis=0).max() == np.ptp(points[~own], axis=0).max() == 0
        vectors = torch.cat([gates[s.name] for s in gates.sites], dim=1)
        distance = np.linalg.norm(points[own][0] - points[~own][0])
        assert distance == pytest.approx(float((vectors[0] - vectors[1]).norm()), rel=1e-5)
        assert group["embedding/pca"].attrs["eigenvalue"].shape == (2,)
        assert group["cluster/class"][:].tolist() == labels[expected_index].tolist()
    with h5py.File(path.parent / "analysis_activations.h5") as file:
        assert list(file) == ["all classes", "class_0000", "class_0002"]
        assert file["class_0002/index"][:].tolist() == [i for i in range(N) if labels[i] == 2]
        assert len(file["class_0000/embedding/pca"]) == 7
    table = json.loads((path.parent / "label_map.json").read_text())
    assert table == [
        {"index": 0, "word_net_id": "class_0000", "name": "red"},
        {"index": 1, "word_net_id": "class_0001", "name": "class 1"},
        {"index": 2, "word_net_id": "class_0002", "name": 'b"lu:e'},
    ]


def test_opened_by_virelay(
    tmp_path: Path, tiny_cnn: nn.Module, data: tuple[Tensor, Tensor], gates: TaskGates
) -> None:
    virelay = pytest.importorskip("virelay.model")
    images, labels = data
    path = export_virelay(
        tiny_cnn,
        gates,
        data,
        tmp_path,
        project_name='a: name # with \\ "signs"',
        to_pixels=lambda x: (x + 4) / 8,
    )
    workspace = virelay.Workspace()
    workspace.add_project(str(path))
    (project,) = workspace.projects
    try:
        assert project.name == 'a: name # with \\ "signs"'
        assert project.model == "TinyCNN"
        assert len(project.dataset) == N
        sample = project.get_sample(5)
        assert sample.data.shape == (8, 8, 3)
        assert sample.data.dtype == np.uint8
        assert [label.index for label in sample.labels] == [int(labels[5])]
        pixels = (((images[5] + 4) / 8).clamp(0, 1) * 255).round().permute(1, 2, 0)
        assert np.abs(sample.data.astype(int) - pixels.numpy()).max() <= 1
        attribution = project.get_attribution(5)
        own = reference(tiny_cnn, gates.sub_architecture(2), images[5], 2)
        np.testing.assert_allclose(attribution.data, own.permute(1, 2, 0), rtol=1e-4, atol=1e-6)
        assert attribution.labels[0].name == 'b"lu:e'
        assert attribution.prediction.shape == (3,)
        assert attribution.render_heatmap("blue-white-red").shape == (8, 8, 3)
        assert attribution.render_heatmap("black-fire-red", sample.data).shape == (8, 8, 3)
        with pytest.raises(LookupError):
            project.get_attribution(1)  # no gates of its class
        assert project.get_analysis_methods() == ["sub_architectures", "gated_activations"]
        for method in project.get_analysis_methods():
            categories = project.get_analysis_categories(method)
            for category in categories:
                for cluster in project.get_analysis_clustering_names(method):
                    for embedding in project.get_analysis_embedding_names(method):
                        found = project.get_analysis(method, category.name, cluster, embedding)
                        n = len(found.attribution_indices)
                        assert found.embedding.shape == (n, 2)
                        assert found.clustering.shape == (n,)
                        for index in found.attribution_indices:
                            project.get_attribution(index)
        names = {c.name: c.human_readable_name for c in categories}
        assert names == {"all classes": "", "class_0000": "red", "class_0002": 'b"lu:e'}
    finally:
        workspace.close()


def test_served_by_virelay(
    tmp_path: Path, tiny_cnn: nn.Module, data: tuple[Tensor, Tensor], gates: TaskGates
) -> None:
    """What the browser asks for, answered by ViRelAy's own server."""
    model = pytest.importorskip("virelay.model")
    server = pytest.importorskip("virelay.server")
    path = export_virelay(tiny_cnn, gates, data, tmp_path)
    workspace = model.Workspace()
    workspace.add_project(str(path))
    try:
        client = server.Server(workspace).app.test_client()
        wanted = [
            "/api/projects",
            "/api/projects/0",
            "/api/projects/0/dataset/2",
            "/api/projects/0/dataset/2/image",
            "/api/projects/0/attributions/2",
            "/api/projects/0/attributions/2/heatmap?imageMode=overlay&colorMap=blue-white-red",
        ]
        project = client.get("/api/projects/0").get_json()
        for analysis in project["analysisMethods"]:
            for category in analysis["categories"]:
                wanted.append(
                    f"/api/projects/0/analyses/{analysis['name']}?category={category['name']}"
                    f"&clustering={analysis['clusterings'][0]}"
                    f"&embedding={analysis['embeddings'][0]}"
                )
        assert len(wanted) == 6 + 1 + 3
        for url in wanted:
            answer = client.get(url)
            assert answer.status_code == 200, (url, answer.data[:200])
    finally:
        workspace.close()


def test_store_path_and_sub_architectures_give_the_same(
    tmp_path: Path, tiny_cnn: nn.Module, data: tuple[Tensor, Tensor], gates: TaskGates
) -> None:
    more = TaskGates(
        {s.name: torch.cat([gates[s.name], gates[s.name][:1]]) for s in gates.sites},
        gates.sites,
        [0, 2, 7],  # 7 is not a class of the network; no image has it, so it is never read
        means=gates.means,
    )
    more.save(tmp_path / "gates.h5")
    kinds: dict[str, Any] = {
        "path": tmp_path / "gates.h5",
        "gates": gates,
        "architectures": gates.sub_architectures(),
    }
    found = {}
    for name, kind in kinds.items():
        export_virelay(tiny_cnn, kind, data, tmp_path / name, embeddings=["pca"])
        with h5py.File(tmp_path / name / "attribution.h5") as file:
            found[name] = file["attribution"][:]
    with GateStore.open(tmp_path / "gates.h5") as store:
        export_virelay(tiny_cnn, store, data, tmp_path / "store", embeddings=["pca"])
    with h5py.File(tmp_path / "store" / "attribution.h5") as file:
        found["store"] = file["attribution"][:]
    for array in found.values():
        np.testing.assert_array_equal(array, found["gates"])


def test_batch_size_changes_nothing_that_counts(
    tmp_path: Path, tiny_cnn: nn.Module, data: tuple[Tensor, Tensor], gates: TaskGates
) -> None:
    contents = []
    for batch_size in (2, 32):
        folder = tmp_path / str(batch_size)
        export_virelay(tiny_cnn, gates, data, folder, run=RunOptions(batch_size=batch_size))
        found = {}
        for path in sorted(folder.glob("*.h5")):
            with h5py.File(path) as file:
                file.visititems(
                    lambda name, item, path=path, found=found: (
                        found.update({f"{path.name}/{name}": item[:]})
                        if isinstance(item, h5py.Dataset) and "tsne" not in name
                        else None
                    )
                )
        contents.append(found)
    assert contents[0].keys() == contents[1].keys()
    for name, array in contents[0].items():
        np.testing.assert_allclose(array, contents[1][name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_nothing_is_left_behind_by_a_method_that_fails(
    tmp_path: Path, tiny_cnn: nn.Module, data: tuple[Tensor, Tensor], gates: TaskGates
) -> None:
    calls = []

    def leaves_traces(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        model.register_forward_hook(lambda *args: None)
        model.get_submodule("relu1").trace = 1  # type: ignore[assignment]
        model.train()
        model.eval()
        model(x)
        calls.append(len(x))
        if len(calls) == 2:
            raise RuntimeError("stop")
        return x * 0 + 1

    before = sorted(tmp_path.iterdir())
    with (
        helpers.assert_model_untouched(tiny_cnn, *data),
        pytest.raises(RuntimeError, match="stop"),
    ):
        export_virelay(
            tiny_cnn,
            gates,
            data,
            tmp_path / "new",
            method=leaves_traces,
            run=RunOptions(batch_size=5),
        )
    assert len(calls) == 2
    assert sorted(tmp_path.iterdir()) == before


def test_other_heat_maps_and_many_channels(tmp_path: Path) -> None:
    """A method without colours, and images of five channels, which no picture has."""
    torch_rng = torch.Generator().manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(5, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    ).eval()
    archs = [
        SubArchitecture.from_kept({"1": [0, k + 1]}, [GateSite("1", 4, 1)], task=k)
        for k in range(2)
    ]
    images, labels = torch.randn(6, 5, 8, 8, generator=torch_rng), torch.arange(6) % 2
    with pytest.raises(ValueError, match="to_pixels"):
        export_virelay(net, archs, (images, labels), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    path = export_virelay(
        net, archs, (images, labels), tmp_path / "a", to_pixels=lambda x: x[:, :3]
    )
    with h5py.File(path.parent / "attribution.h5") as file:
        assert file["attribution"].shape == (6, 1, 8, 8)
    # Three images of each class: too few for a category of their own.
    with h5py.File(path.parent / "analysis_activations.h5") as file:
        assert list(file) == ["all classes"]
    with pytest.raises(FileExistsError, match="overwrite"):
        export_virelay(net, archs, (images, labels), tmp_path / "a", to_pixels=lambda x: x[:, :3])
    export_virelay(
        net,
        archs,
        (images[:2], labels[:2]),
        tmp_path / "a",
        method=lambda model, x, target: x.sum(1) + 0 * model(x).sum(),
        method_name="sum",
        to_pixels=lambda x: x[:, :1],
        overwrite=True,
    )
    # Two images are too few for any category: neither the file nor the project names one.
    assert not (tmp_path / "a" / "analysis_activations.h5").exists()
    text = path.read_text()
    assert "analysis_activations" not in text
    assert '"sum through' in text
    with h5py.File(path.parent / "attribution.h5") as file:
        np.testing.assert_allclose(file["attribution"][:, 0], images[:2].sum(1), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"class_names": ["one"]}, ValueError, "1 class_names"),
        ({"class_names": "abc"}, TypeError, "class_names"),
        ({"word_net_ids": ["a", "a", "b"]}, ValueError, "differ"),
        ({"word_net_ids": ["a/b", "c", "d"]}, ValueError, "without '/'"),
        ({"embeddings": ["isomap"]}, ValueError, "no embedding 'isomap'"),
        ({"n_clusters": [1]}, ValueError, "n_clusters"),
        ({"method": 3}, TypeError, "method"),
        ({"method": lambda model, x, target: model(x)}, ValueError, "returned shape"),
        ({"method": lambda m, x, target: x * m(x).sum() / 0}, ValueError, "NaN"),
        ({"method": lambda model, x, target: model(x).tolist()}, TypeError, "must return a tensor"),
        ({"method": lambda model, x, target: x}, GatingError, "did not fire"),
        ({"run": 4}, TypeError, "run"),
    ],
)
def test_bad_input_is_named_and_nothing_written(
    tmp_path: Path,
    tiny_cnn: nn.Module,
    data: tuple[Tensor, Tensor],
    gates: TaskGates,
    change: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        export_virelay(tiny_cnn, gates, data, tmp_path / "new", **change)
    assert list(tmp_path.iterdir()) == []


def test_images_without_gates_are_refused(
    tmp_path: Path, tiny_cnn: nn.Module, gates: TaskGates
) -> None:
    images, labels = helpers.labelled_images(6)
    with pytest.raises(ValueError, match="no image is of a class with gates"):
        export_virelay(tiny_cnn, gates, (images, labels * 0 + 1), tmp_path / "a")
    gates.save(tmp_path / "gates.h5")
    with pytest.raises(ValueError, match="no gates of any class"):
        export_virelay(tiny_cnn, tmp_path / "gates.h5", (images, labels * 0 + 1), tmp_path / "a")


def test_pca_against_the_covariance_matrix() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(30, 4)).astype(np.float32) * [3, 1, 0.5, 0.1]
    points, variances = pca(vectors.astype(np.float32))
    centred = vectors - vectors.mean(0)
    values, axes = np.linalg.eigh(centred.T @ centred / len(vectors))
    np.testing.assert_allclose(variances, values[::-1][:2], rtol=1e-5)
    for axis in range(2):
        along = centred @ axes[:, ::-1][:, axis]
        assert abs(np.corrcoef(points[:, axis], along)[0, 1]) == pytest.approx(1, abs=1e-5)


def test_kmeans_finds_groups_and_needs_no_more_clusters_than_points() -> None:
    pytest.importorskip("sklearn")
    vectors = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0)
    found = clusters(vectors, [3, 5], seed=0)
    for name in ("kmeans-3", "kmeans-5"):
        assert [len(set(found[name][i : i + 4].tolist())) for i in (0, 4, 8)] == [1, 1, 1]
        assert len(set(found[name].tolist())) == 3


def test_embeddings_are_a_function_of_the_seed_and_leave_random_numbers_alone() -> None:
    pytest.importorskip("sklearn")
    vectors = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = (embeddings(vectors, ["tsne"], seed=1)["tsne"][0] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert not np.allclose(first, embeddings(vectors, ["tsne"], seed=2)["tsne"][0])
    np.testing.assert_array_equal(state, np.random.get_state()[1])  # noqa: NPY002
    assert list(embeddings(vectors[:3], ["tsne"], seed=1)) == ["pca"]


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_embeddings, "_installed", lambda package: package == "numpy")
    assert _embeddings.check_embeddings(None) == ["pca"]
    assert _embeddings.check_n_clusters([3]) == []
    with pytest.raises(ImportError, match="pip install 'umap-learn'"):
        _embeddings.check_embeddings(["pca", "umap"])
    with pytest.raises(ImportError, match=r"pip install 'nad-attr\[virelay\]'"):
        _embeddings.check_embeddings(["tsne"])
