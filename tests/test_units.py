"""Attention heads, hidden neurons and groups of channels as gates, for each network family."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nad_attr import (
    GateSite,
    NADAttribution,
    Recipe,
    SiteError,
    SubArchitecture,
    TaskGates,
    find_gate_sites,
    gated,
    information_flow,
    learn_gates,
    recorded,
)
from nad_attr.gates.channels import to_channels, to_gates, top_k_masks
from nad_attr.store import GateStoreError


class Logits(nn.Module):
    """A network of Hugging Face as a function of one tensor."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        return self.net(x).logits


def torchvision_vit() -> tuple[nn.Module, Tensor]:
    models = pytest.importorskip("torchvision.models")
    net = models.VisionTransformer(16, 8, 2, 3, 12, 20, num_classes=4)
    return net, torch.rand(3, 3, 16, 16)


def torchvision_swin(block: str = "SwinTransformerBlock") -> tuple[nn.Module, Tensor]:
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    merging = swin.PatchMergingV2 if block.endswith("V2") else swin.PatchMerging
    net = swin.SwinTransformer(
        [2, 2], 8, [2, 2], [2, 4], [2, 2], num_classes=4, block=getattr(swin, block),
        downsample_layer=merging,
    )  # fmt: skip
    return net, torch.rand(3, 3, 16, 16)


def torchvision_swin_v2() -> tuple[nn.Module, Tensor]:
    return torchvision_swin("SwinTransformerBlockV2")


def timm_vit() -> tuple[nn.Module, Tensor]:
    timm = pytest.importorskip("timm")
    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=3,
        num_classes=4,
    )  # fmt: skip
    return net, torch.rand(3, 3, 16, 16)


def timm_swin() -> tuple[nn.Module, Tensor]:
    timm = pytest.importorskip("timm")
    net = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=16, patch_size=2, window_size=2, embed_dim=8,
        depths=(2, 2), num_heads=(2, 4), num_classes=4,
    )  # fmt: skip
    return net, torch.rand(3, 3, 16, 16)


def hugging_face_vit(attention: str = "eager") -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20,
        image_size=16, patch_size=8, num_labels=4, attn_implementation=attention,
    )  # fmt: skip
    return Logits(transformers.ViTForImageClassification(config)), torch.rand(3, 3, 16, 16)


def hugging_face_bert(attention: str = "eager") -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=20, max_position_embeddings=9, num_labels=4,
        attn_implementation=attention,
    )  # fmt: skip
    ids = torch.randint(0, 11, (3, 5))
    return Logits(transformers.BertForSequenceClassification(config)), ids


def flash_layout() -> str:
    """Attention of a kernel that takes and returns (batch, tokens, heads, width), as flash does."""
    utils = pytest.importorskip("transformers.modeling_utils")

    def attend(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        out = nn.functional.scaled_dot_product_attention(q, k, v, scale=options.get("scaling"))
        return out.transpose(1, 2).contiguous(), None

    utils.ALL_ATTENTION_FUNCTIONS.register("kernel_layout", attend)
    return "kernel_layout"


def encoder_batch_second() -> tuple[nn.Module, Tensor]:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(12, 3, 20)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(x.transpose(0, 1)).mean(0))

    return Net(), torch.rand(3, 5, 12)


FAMILIES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "torchvision ViT": torchvision_vit,
    "torchvision Swin": torchvision_swin,
    "torchvision Swin V2": torchvision_swin_v2,
    "timm ViT": timm_vit,
    "timm Swin": timm_swin,
    "HF ViT eager": hugging_face_vit,
    "HF ViT SDPA": lambda: hugging_face_vit("sdpa"),
    "HF ViT flash-like": lambda: hugging_face_vit(flash_layout()),
    "HF BERT eager": hugging_face_bert,
    "HF BERT SDPA": lambda: hugging_face_bert("sdpa"),
    "nn.TransformerEncoder, batch second": encoder_batch_second,
}
#: The others take seconds to import.
QUICK = ("torchvision ViT", "torchvision Swin", "nn.TransformerEncoder, batch second")
HEADS = {name: [3, 3] for name in FAMILIES}
HEADS |= {name: [2, 2, 4, 4] for name in FAMILIES if "Swin" in name}


def built(family: str) -> tuple[nn.Module, Tensor]:
    """A network with random weights in float64, none of them zero, and its input."""
    torch.manual_seed(0)
    net, x = FAMILIES[family]()
    for parameter in net.parameters():
        nn.init.normal_(parameter.data, std=0.3)
    return net.double().eval(), x.double() if x.is_floating_point() else x


def edited(
    net: nn.Module, site: GateSite, closed: Tensor, constants: Tensor | None = None
) -> nn.Module:
    """The network with the columns of closed channels zeroed by hand, constants in the bias."""
    net = copy.deepcopy(net)
    layer = net.get_submodule(site.name)
    assert isinstance(layer, nn.Linear)
    if constants is not None:
        shift = layer.weight.data[:, closed] @ constants[closed].double()
        layer.bias = nn.Parameter(layer.bias + shift)
    layer.weight.data[:, closed] = 0
    return net


@pytest.mark.parametrize(
    "family",
    [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES],
)
def test_closed_heads_and_neurons_are_columns_zeroed_by_hand(family: str) -> None:
    net, x = built(family)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    classes = [type(module) for module in net.modules()]
    with torch.no_grad():
        whole = net(x)
    batch_second = family == "nn.TransformerEncoder, batch second"
    if batch_second:
        with pytest.raises(SiteError, match="with batch_first=True"):
            find_gate_sites(net, x, units="neurons")
    sites = find_gate_sites(net, x, units=["heads"] if batch_second else ["heads", "neurons"])
    heads = [site for site in sites if site.units == "heads"]
    assert [site.n_gates for site in heads] == HEADS[family]
    assert batch_second or len(sites) >= 2 * len(heads)
    for site in sites:
        mask = to_channels(torch.arange(site.n_gates) % 2 == 0, [site])
        constants = torch.randn(site.n_channels)
        for means in (None, constants):
            arch = SubArchitecture(
                {site.name: mask}, [site], means=None if means is None else {site.name: means}
            )
            with torch.no_grad(), arch.applied(net):
                gated_output = net(x)
            with torch.no_grad():
                expected = edited(net, site, ~mask, means)(x)
            assert (gated_output - expected).abs().max() < 1e-10
            assert (gated_output - whole).abs().max() > 1e-6
    # Each image has its own gates, which do not affect other images.
    gates = {s.name: torch.ones(len(x), s.n_channels, dtype=torch.float64) for s in sites}
    for site in sites:
        gates[site.name][0] = to_channels((torch.arange(site.n_gates) > 0).double(), [site])
    with torch.no_grad(), gated(net, gates, sites=sites):
        output = net(x)
    assert torch.allclose(output[1:], whole[1:], atol=1e-10)
    by_hand = net
    for site in sites:
        by_hand = edited(by_hand, site, gates[site.name][0] == 0)
    with torch.no_grad():
        assert torch.allclose(output[0], by_hand(x)[0], atol=1e-10)
        assert torch.equal(net(x), whole)
    assert [type(module) for module in net.modules()] == classes
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    found = information_flow(net, SubArchitecture.full(sites), x, tasks=0, receivers=2)
    assert max(found.conservation.values()) < 1e-9
    site = heads[-1]
    edges = found.edges.query(f"source_site == '{site.name}' and source == 0")
    closed = to_channels(torch.arange(site.n_gates) == 0, [site])
    with torch.no_grad(), found.cut(net, edges):
        assert torch.allclose(net(x), edited(net, site, closed)(x), atol=1e-10)


def test_units_beside_channels_are_in_forward_order() -> None:
    net, x = built("torchvision ViT")
    alone = find_gate_sites(net, x)
    both = find_gate_sites(net, x, units=["channels", "heads"])
    assert [site for site in both if site.units == "channels"] == alone
    names = [site.name for site in both]
    first, second = (f"encoder.layers.encoder_layer_{i}" for i in (0, 1))
    assert names.index(f"{first}.self_attention.out_proj") < names.index(first)
    assert names.index(first) < names.index(f"{second}.self_attention.out_proj")
    named = find_gate_sites(net, x, layers=both)
    assert named == both


def test_units_that_are_not_there_are_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(SiteError, match="no attention heads found"):
        find_gate_sites(net, x, units="heads")
    with pytest.raises(SiteError, match="no hidden neurons found"):
        find_gate_sites(net, x, units="neurons")
    with pytest.raises(SiteError, match=r"units must be one or several of .* got 'head'"):
        find_gate_sites(net, x, units="head")
    with pytest.raises(SiteError, match="units= finds sites, and layers= names them"):
        find_gate_sites(net, x, units="heads", layers="0")
    with pytest.raises(SiteError, match="groups name '9'"):
        find_gate_sites(net, x, groups={"9": 2})
    with pytest.raises(SiteError, match="divisor of its 4 channels, got 3"):
        find_gate_sites(net, x, groups={"1": 3})


@pytest.mark.slow
def test_windows_need_real_images() -> None:
    net, x = built("timm Swin")
    with pytest.raises(SiteError, match="give a float tensor with values"):
        find_gate_sites(net, x.to("meta"), units="heads")


def test_windows_in_another_order_are_refused() -> None:
    class Windows(nn.Module):
        """Attention within halves of the tokens, the halves before the images."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(4, 12), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            rows = torch.cat(x.chunk(2, dim=1))
            q, k, v = self.qkv(rows).reshape(len(rows), -1, 3, 2, 2).permute(2, 0, 3, 1, 4)
            heads = nn.functional.scaled_dot_product_attention(q, k, v)
            rows = self.proj(heads.transpose(1, 2).reshape(len(rows), -1, 4))
            return torch.cat(rows.chunk(2), dim=1).mean(1)

    with pytest.raises(SiteError, match="do not lie side by side"):
        find_gate_sites(Windows().eval(), torch.rand(2, 6, 4), units="heads")


def test_another_thread_sees_the_whole_network() -> None:
    net, x = built("torchvision ViT")
    sites = find_gate_sites(net, x, units="heads")
    closed = {site.name: torch.zeros(site.n_channels) for site in sites}
    with torch.no_grad():
        whole = net(x)
    seen: list[Tensor] = []

    def predict() -> None:
        with torch.no_grad():
            seen.append(net(x))

    with torch.no_grad(), gated(net, closed, sites=sites):
        thread = threading.Thread(target=predict)
        thread.start()
        thread.join()
        assert not torch.allclose(net(x), whole)
        with recorded(net, sites[:1]) as held:  # a context in a context
            net(x)
        assert held[sites[0].name].abs().max() == 0
        assert not torch.allclose(net(x), whole)
    assert torch.equal(seen[0], whole)


def test_a_failing_forward_pass_leaves_the_attention_as_it_was() -> None:
    net, x = built("torchvision ViT")
    sites = find_gate_sites(net, x, units="heads")
    with pytest.raises(AssertionError), gated(net, {}.fromkeys([]) or {
        site.name: torch.ones(site.n_channels) for site in sites
    }, sites=sites):  # fmt: skip
        net(x[:, :, :8])
    assert all(type(m) is nn.MultiheadAttention for m in net.modules() if hasattr(m, "out_proj"))


def test_groups_are_chosen_counted_and_kept_as_one() -> None:
    site = GateSite("a", 6, groups=[0, 1, 0, 2, 2, 2])
    scores = {"a": torch.tensor([3.0, 0.0, 1.0, 1.0, 1.0, 4.0])}
    assert to_gates(scores["a"], [site], mean=True).tolist() == [2, 0, 2]
    assert top_k_masks(scores, [site], 1)["a"].tolist() == [True, False, True] + [False] * 3
    arch = SubArchitecture({"a": torch.tensor([True, False, True, False, False, False])}, [site])
    assert (arch.n_kept, arch.size) == (1, 1 / 3)
    with pytest.raises(ValueError, match="keeps part of a group"):
        SubArchitecture({"a": torch.tensor([True] + [False] * 5)}, [site])
    for wrong in ([0, 1], [0, 2, 0, 2, 2, 2], [0.0] * 6, "abcdef", 4, 0, True):
        with pytest.raises(SiteError, match="groups"):
            GateSite("a", 6, groups=wrong)  # type: ignore[arg-type]
    with pytest.raises(SiteError, match="units must be one of"):
        GateSite("a", 6, units="head")


@pytest.mark.parametrize(
    "ablation", ["optimal", *(pytest.param(a, marks=pytest.mark.slow) for a in ("mean", "zero"))]
)
def test_learning_opens_and_closes_heads_as_one(ablation: str, tmp_path: Path) -> None:
    net, x = built("torchvision ViT")
    x = torch.rand(12, *x.shape[1:], dtype=torch.float64)
    sites = find_gate_sites(net, x[:1], units=["heads", "neurons"])
    labels = torch.arange(12) % 3
    recipe = Recipe(size=0.5, steps=6, images_per_step=4, ablation=ablation)
    gates = learn_gates(net, (x, labels), sites=sites, recipe=recipe, seed=0)
    n = sum(site.n_gates for site in sites)
    for arch in gates.sub_architectures():
        assert arch.n_kept == round(0.5 * n)
        assert arch.size == arch.n_kept / n
    assert all(arch.n_kept == 5 for arch in gates.sub_architectures(5 / n))
    gates.save(tmp_path / "gates.h5")
    again = TaskGates.load(tmp_path / "gates.h5")
    assert again == gates
    assert again.sites == tuple(sites)
    arch = gates.sub_architecture(0)
    arch.save(tmp_path / "arch.h5")
    assert SubArchitecture.load(tmp_path / "arch.h5") == arch


def test_the_gradient_of_a_group_is_what_closing_it_does() -> None:
    """A linear network: the first-order effect of a head is exact and ranks the heads."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.inner(x))

    net = Net().double().eval()
    net.inner.weight.data = torch.eye(4).double()
    # Channels 0 and 1 cancel each other for both classes; 2 and 3 add up.
    net.out.weight.data = torch.tensor([[9.0, -9.0, 1.0, 1.0], [-9.0, 9.0, -1.0, -1.0]]).double()
    base = torch.randn(40, 1, generator=torch.Generator().manual_seed(0)).double()
    x = base.expand(-1, 4).contiguous()
    labels = (base[:, 0] < 0).long()
    site = GateSite("inner", 4, groups=2)
    recipe = Recipe(size=0.5, steps=4, images_per_step=8, ablation="mean")
    gates = learn_gates(net, (x, labels), sites=[site], recipe=recipe, seed=0)
    assert gates.sub_architecture(0)["inner"].tolist() == [False, False, True, True]
    alone = dataclasses.replace(site, groups=None)
    gates = learn_gates(net, (x, labels), sites=[alone], recipe=recipe, seed=0)
    assert gates.sub_architecture(0).n_kept == 2


def test_files_with_wrong_groups_are_refused(tmp_path: Path) -> None:
    import h5py

    site = GateSite("a", 4, groups=2, units="heads")
    path = tmp_path / "gates.h5"
    TaskGates({"a": torch.tensor([[1.0, 1.0, 0.0, 0.0]])}, [site], [0]).save(path)
    for wrong in ('[["a", 4, 1, 0, "heads", [0, 0, 1]]]', '[["a", 4, 1, 0, "x", null]]',
                  '[["a", 4, 1, 0, "heads", 7]]', '[["a", 4, 1, 0, "heads"]]', "[7]"):  # fmt: skip
        with h5py.File(path, "r+") as file:
            file["site"].attrs["index"] = wrong
        with pytest.raises(GateStoreError):
            TaskGates.load(path)


def test_attribution_and_flow_on_heads() -> None:
    net, x = built("torchvision ViT")
    sites = find_gate_sites(net, x, units=["channels", "heads"])
    gates = TaskGates(
        {s.name: to_channels(torch.arange(s.n_gates) % 2.0, [s])[None] for s in sites}, sites, [1]
    )
    only = NADAttribution(net, gates=gates)
    # Heads are at an input, channels at an output.
    shapes = [tuple(found.shape) for found in only.attribute(x, target=1)]
    assert shapes[[s.units for s in sites].index("heads")] == (3, 5, 12)
    found = information_flow(net, gates.sub_architecture(1), x, tasks=1)
    assert max(found.conservation.values()) < 1e-9
    # A block's stream reads the one before it, and the heads of its own.
    head = "encoder.layers.encoder_layer_0.self_attention.out_proj"
    assert found.links["encoder.layers.encoder_layer_0"] == ("conv_proj", head)
    with pytest.raises(ValueError, match="a CRP condition masks axis 1"):
        gates.sub_architecture(1).to_crp_condition()
    assert "gates" in repr(gates.sub_architecture(1))
