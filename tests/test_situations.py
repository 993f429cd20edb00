"""Networks, data and code of kinds that users have: supported, or refused for the true reason."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from nad_attr import (
    GatingError,
    NADAttribution,
    Recipe,
    RunOptions,
    SiteError,
    SubArchitecture,
    find_gate_sites,
    gated,
    learn_gates,
)
from nad_attr.specs.models import load_model, load_weights
from nad_attr.specs.names import SpecError
from tests import helpers

QUICK = Recipe(size=0.5, steps=3, images_per_step=4)


@pytest.fixture
def net() -> nn.Module:
    return helpers.build(helpers.TinyCNN).float()


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    x, y = helpers.labelled_images(12)
    return x.float(), y


# ---------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------


def test_every_row_of_the_page_names_a_test_that_is_there() -> None:
    tests = Path(__file__).parent
    page = (tests.parent / "docs" / "situations.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("|")]
    rows = [row for row in rows if not row.startswith(("| situation", "|---"))]
    assert len(rows) > 20
    for row in rows:
        named = re.fullmatch(r"\|.+\| `(test_\w+\.py)::(test_\w+)` \|", row)
        assert named, row
        assert f"\ndef {named[2]}(" in (tests / named[1]).read_text(), row


# ---------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def _fsdp1(net: nn.Module, orig: bool) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=orig)


def _fsdp2(net: nn.Module) -> nn.Module:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("this torch has no FSDP2")
    from torch.distributed.device_mesh import init_device_mesh

    fsdp.fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
    return net


def _dtensor(net: nn.Module) -> nn.Module:
    tensor = pytest.importorskip("torch.distributed.tensor")
    from torch.distributed.device_mesh import init_device_mesh

    tensor.distribute_module(net, init_device_mesh("cpu", (1,)))
    return net


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "shard",
    [lambda n: _fsdp1(n, False), lambda n: _fsdp1(n, True), _fsdp2, _dtensor],
    ids=["FSDP1", "FSDP1-orig", "FSDP2", "DTensor"],
)
def test_sharded_networks_are_refused_before_anything_is_run_and_the_remedy_works(
    shard: Callable[[nn.Module], nn.Module],
    net: nn.Module,
    data: tuple[Tensor, Tensor],
    process_group: None,
) -> None:
    expected = learn_gates(net, data, recipe=QUICK)
    sharded = shard(copy.deepcopy(net)).eval()
    arch = expected.sub_architecture(0)
    for attempt in (
        lambda: find_gate_sites(sharded, data[0][:1]),
        lambda: learn_gates(sharded, data, recipe=QUICK),
        lambda: learn_gates(sharded, data, recipe=QUICK, sites=expected.sites),
        lambda: NADAttribution(sharded, gates=expected).attribute(data[0], target=0),
        lambda: arch.applied(sharded).__enter__(),
    ):
        with pytest.raises(SiteError, match=r"gather a plain copy: state = torch\.distributed"):
            attempt()
    if "DTensor" not in str(type(next(sharded.parameters()))) or shard is _fsdp2:
        assert torch.allclose(sharded(data[0]).detach(), net(data[0]), atol=1e-5)
        sharded(data[0]).sum().backward()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    plain = helpers.build(helpers.TinyCNN).float()
    plain.load_state_dict(state)
    assert learn_gates(plain.eval(), data, recipe=QUICK) == expected


def test_exported_programs_are_refused_for_what_they_are(
    net: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    program = torch.export.export(net, (data[0][:2],)).module()
    for attempt in (
        lambda: find_gate_sites(program, data[0][:2]),
        lambda: learn_gates(program, data, recipe=QUICK),
    ):
        with pytest.raises(SiteError, match=r"made by torch\.export.*that it was exported from"):
            attempt()


def test_networks_without_values_are_refused_and_their_sites_found(
    net: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    with torch.device("meta"):
        empty = helpers.TinyCNN().eval()
    assert find_gate_sites(empty, data[0][:1].to("meta")) == find_gate_sites(net, data[0][:1])
    with pytest.raises(ValueError, match="meta device, where weights have shapes and no values"):
        learn_gates(empty, data, recipe=QUICK)


def test_networks_built_in_inference_mode_learn_the_same_gates(
    net: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    with torch.inference_mode():
        built = helpers.TinyCNN().float()
        built.load_state_dict(net.state_dict())
        built.eval()
    assert learn_gates(built, data, recipe=QUICK) == learn_gates(net, data, recipe=QUICK)
    assert all(parameter.is_inference() for parameter in built.parameters())
    with pytest.raises(ValueError, match=r"run copy\.deepcopy\(model\), made outside of it"):
        learn_gates(built, data, recipe=QUICK, run=RunOptions(forward_func=lambda x: built(x)))


def _in_place(net: nn.Module) -> nn.Module:
    net.compile(backend="eager")
    return net


def _forward(net: nn.Module) -> nn.Module:
    net.forward = torch.compile(net.forward, backend="eager")  # type: ignore[method-assign]
    return net


def _part(net: nn.Module) -> nn.Module:
    name = next(name for name, m in net.named_children() if isinstance(m, nn.Conv2d))
    setattr(net, name, torch.compile(getattr(net, name), backend="eager"))
    return net


@pytest.mark.parametrize("change", [_in_place, _forward, _part])
def test_compiled_networks_learn_the_gates_of_the_plain_one(
    change: Callable[[nn.Module], nn.Module], net: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    expected = learn_gates(net, data, recipe=QUICK)
    compiled = change(copy.deepcopy(net))
    compiled(data[0])
    assert find_gate_sites(compiled, data[0][:1]) == list(expected.sites)
    found = learn_gates(compiled, data, recipe=QUICK)
    for site in expected.sites:
        assert torch.equal(found[site.name], expected[site.name])
        # No BatchNorm of a compiled network is folded: the means are rounded otherwise.
        torch.testing.assert_close(found.means[site.name], expected.means[site.name])
    with expected.sub_architecture(0).applied(compiled):
        part = compiled(data[0])
    with expected.sub_architecture(0).applied(net):
        assert torch.allclose(part, net(data[0]), atol=1e-6)


def test_learning_never_meets_the_compilers_limit_of_recompiling(
    net: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    run = torch.compile(lambda x: net(x), backend="eager", fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        found = learn_gates(net, data, recipe=QUICK, run=RunOptions(forward_func=run))
    assert found == learn_gates(
        net, data, recipe=QUICK, run=RunOptions(forward_func=lambda x: net(x))
    )


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
        self.spectrum = nn.Module()
        self.spectrum.forward = torch.fft.fft2  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.spectrum(self.a(x)).abs().mean((2, 3)))


def test_a_site_of_complex_numbers_is_refused_as_such() -> None:
    x = torch.rand(2, 3, 8, 8)
    with pytest.raises(SiteError, match=r"layer 'spectrum' returns complex numbers"):
        find_gate_sites(Complex().eval(), x, layers=["spectrum"])
    assert [site.name for site in find_gate_sites(Complex().eval(), x)] == ["a"]


# ---------------------------------------------------------------------------------------------
# Outputs and data
# ---------------------------------------------------------------------------------------------


class Detects(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return [{"boxes": out, "scores": out} for out in self.net(x)]


def test_outputs_that_are_no_scores_are_named_for_what_they_are(
    net: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    for forward, message in (
        (lambda x: net(x).argmax(1), r"torch.int64 numbers of shape \(2,\), such as class indices"),
        (lambda x: net(x).to(torch.complex64), "complex numbers"),
        (Detects(net), r"a list of dictionaries \(boxes, scores\), as detection models do"),
    ):
        with pytest.raises(TypeError, match=message):
            learn_gates(net, data, recipe=QUICK, run=RunOptions(forward_func=forward))


class Single(IterableDataset[Any]):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.pairs = list(zip(x, y.tolist(), strict=True))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.pairs)


def test_data_of_other_kinds_learn_the_same_gates(
    net: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    x, y = data
    expected = learn_gates(net, data, recipe=QUICK)
    pairs = [*zip(x, y, strict=True)]
    rows = [{"image": image, "label": int(label)} for image, label in pairs]
    for given in (
        (x.numpy(), y.numpy()),
        ([*x], [*y]),
        pairs,
        rows,
        Single(x, y),
        (pair for pair in pairs),
    ):
        assert learn_gates(net, given, recipe=QUICK) == expected  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a tuple of 3"):
        learn_gates(net, (x, y, y), recipe=QUICK)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------
# The user's own code, and files
# ---------------------------------------------------------------------------------------------


class Spawned(torch.utils.data.Dataset[Any]):
    def __init__(self, n_parts: int) -> None:
        self.transform = lambda x: x  # cannot be sent to another process
        self.n_parts = n_parts

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Any:
        return (torch.rand(3, 8, 8), i % 3, f"{i}.png")[: self.n_parts]


def test_rows_of_three_and_workers_that_cannot_be_started_are_told_what_to_do(
    net: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    with pytest.raises(TypeError, match=r"list of 3.*row\[0\], row\[1\]"):
        learn_gates(net, Spawned(3), recipe=QUICK)
    loader = DataLoader(Spawned(2), 2, num_workers=1, multiprocessing_context="spawn")
    with pytest.raises(ValueError, match=r"Spawned.*lambda.*num_workers=0"):
        learn_gates(net, loader, recipe=QUICK)
    x, y = data
    three = [(x[i], int(y[i]), f"{i}.png") for i in range(len(x))]
    pairs = learn_gates(net, [(row[0], row[1]) for row in three], recipe=QUICK)
    assert pairs == learn_gates(net, data, recipe=QUICK)


def test_errors_in_the_users_code_come_with_file_line_and_whole_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_factory.py").write_text(
        "def make():\n    raise RuntimeError('no weights\\nlook into the folder')\n"
    )
    (tmp_path / "broken_import.py").write_text("\nvalue = 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SpecError) as error:
        load_model("broken_factory:make")
    assert "RuntimeError: no weights\nlook into the folder" in str(error.value)
    assert f"{tmp_path / 'broken_factory.py'}, line 2" in str(error.value)
    with pytest.raises(SpecError, match=r"broken_import\.py, line 2"):
        load_model("broken_import:value")


def test_the_command_line_says_where_in_the_users_code_an_error_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typer = pytest.importorskip("typer")
    from nad_attr.cli.messages import guarded

    (tmp_path / "own_dataset.py").write_text(
        "def item(i):\n    raise ValueError(f'no image {i}')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import own_dataset

    with pytest.raises(typer.Exit), guarded():
        own_dataset.item(3)
    place = f"({tmp_path / 'own_dataset.py'}, line 2)"
    assert capsys.readouterr().err == f"Error: ValueError: no image 3 {place}\n"


def test_a_lightning_checkpoint_is_offered_as_what_it_is(net: nn.Module, tmp_path: Path) -> None:
    state = {f"net.{key}": value + 1 for key, value in net.state_dict().items()}
    state["criterion.weight"] = torch.ones(3)
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.0", "epoch": 3}, path)
    notes = load_weights(net, path)
    assert torch.equal(next(net.parameters()), next(iter(state.values())))
    assert any("without their prefix 'net.'" in note for note in notes)
    assert any("criterion.weight" in note and "left out" in note for note in notes)
    twice = state | {f"ema.{key}": value for key, value in state.items() if key[:4] == "net."}
    torch.save({"state_dict": twice}, path)
    with pytest.raises(SpecError, match=r"2 such networks, under 'net\.', 'ema\.net\.'"):
        load_weights(net, path)


# ---------------------------------------------------------------------------------------------
# Zennit
# ---------------------------------------------------------------------------------------------


def test_zennit_on_densenet_is_refused_with_a_remedy_that_works() -> None:
    pytest.importorskip("zennit")
    models = pytest.importorskip("torchvision").models
    from nad_attr.bridges.zennit import SubArchitectureAttributor

    options = {"growth_rate": 8, "block_config": (2, 2), "num_init_features": 16}
    net = models.DenseNet(**options, num_classes=3).eval()
    x = torch.rand(2, 3, 32, 32)
    arch = SubArchitecture.full(find_gate_sites(net, x))
    with pytest.raises(GatingError, match=r"DenseNet.*canonizers=\[\] for none"):
        SubArchitectureAttributor(net, arch, "epsilon_plus")(x, 1)
    found = SubArchitectureAttributor(net, arch, "epsilon_plus", canonizers=[])(x, 1)
    assert found[1].shape == x.shape


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    ("wrap", "fold"),
    [
        (
            nn.utils.parametrizations.weight_norm,
            lambda m: nn.utils.parametrize.remove_parametrizations(m, "weight"),
        ),
        (
            nn.utils.parametrizations.spectral_norm,
            lambda m: nn.utils.parametrize.remove_parametrizations(m, "weight"),
        ),
        (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    ],
)
def test_zennit_on_normalised_weights_is_refused_with_a_remedy_that_works(
    wrap: Callable[[nn.Module], Any], fold: Callable[[nn.Module], Any]
) -> None:
    pytest.importorskip("zennit")
    from nad_attr.bridges.zennit import SubArchitectureAttributor, named_composite, whole_network

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    wrap(net[0])
    net.eval()
    x = torch.rand(3, 4)
    arch = SubArchitecture.from_kept({"1": [0, 1, 2]}, find_gate_sites(net, x), task=1)
    for attempt in (
        lambda: SubArchitectureAttributor(net, arch, "epsilon_plus")(x),
        lambda: whole_network(net, named_composite("epsilon_plus"), x, 1),
    ):
        with pytest.raises(GatingError, match=r"layer '0' computes its weights anew.*remove_"):
            attempt()
    outputs = SubArchitectureAttributor(net, arch)(x)[0]  # plain gradients are right
    fold(net[0])
    folded, relevance = SubArchitectureAttributor(net, arch, "epsilon_plus")(x)
    assert torch.allclose(folded, outputs, atol=1e-6)
    plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    plain.load_state_dict(net.state_dict())
    assert torch.equal(SubArchitectureAttributor(plain, arch, "epsilon_plus")(x)[1], relevance)


def test_gates_stay_possible_where_only_rules_are_refused(net: nn.Module) -> None:
    x, _ = helpers.labelled_images(2)
    nn.utils.parametrizations.weight_norm(
        next(m for m in net.modules() if isinstance(m, nn.Conv2d))
    )
    sites = find_gate_sites(net.eval(), x.float())
    with gated(net, {s.name: torch.zeros(s.n_channels) for s in sites}, sites=sites):
        assert torch.equal(*net(x.float()))
