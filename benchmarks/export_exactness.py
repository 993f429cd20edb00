"""Is a smaller network the gated one? On every torchvision classifier, and families of timm.

Each network (random weights, BatchNorm statistics that differ between channels) gets 40 % of its
channels at random, closed at zero, at their means and at arbitrary constants. The exported module
and the network with gates on hooks are run on the same images in float64 and float32; counted is
the largest difference over the largest output. Two numbers of the gated network alone say what
float32 can tell: how far its float32 is from its float64, and its noise gain (relative change of
the outputs in float64 over a relative change of the images by noise).

    python -m benchmarks.export_exactness              # all; goes on where it was stopped
    python -m benchmarks.export_exactness --only resnet18 swin_t
    python -m benchmarks.export_exactness --files      # .pt2, .onnx, .safetensors of one per family
"""

from __future__ import annotations

import argparse
import json
import runpy
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.torchvision_sites import build, seeded, small_size
from nad_attr import GateSite, find_gate_sites, gated, recorded
from nad_attr.export.costs import summary
from nad_attr.export.exporting import cut
from nad_attr.export.files import save
from nad_attr.export.tracing import Graph, traced
from nad_attr.gates.channels import top_k_masks
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gating.hooks import channel_shape

RESULTS = Path(__file__).parent / "results" / "export_exactness.json"
SIZE = 0.4
#: Pixels where the smallest image that a network takes is not a fair one: at 64 pixels three
#: quarters of Swin V2's windows are padding, and the gated network itself amplifies rounding
#: (noise gain 34 in place of .2). The row "swin_v2_s at 64" shows that.
SIDES = {"swin_v2_t": 128, "swin_v2_s": 128}
#: Networks of timm, one for each of the families in common use.
TIMM = (
    *("resnet18", "vit_tiny_patch16_224", "convnext_atto", "efficientnet_b0", "densenet121"),
    *("mobilenetv3_small_100", "swin_tiny_patch4_window7_224", "mixer_s16_224", "regnetx_002"),
    *(
        "poolformer_s12",
        "ghostnet_100",
        "resnest14d",
        "repvgg_a0",
        "dla34",
        "tf_efficientnet_lite0",
    ),
    *("deit_tiny_patch16_224", "convnextv2_atto", "levit_128s", "pvt_v2_b0", "mobilevit_xxs"),
)
#: Of each family of torchvision, one for which files are written and run as well.
FILES = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "mnasnet0_5"),
    *("mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "resnext50_32x4d"),
    *("shufflenet_v2_x0_5", "squeezenet1_0", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_32"),
    *("inception_v3", "maxvit_t", "efficientnet_v2_s"),
)


def network(name: str, seed: int, pixels: int | None = None) -> tuple[nn.Module, Tensor]:
    """A network in float64 whose channels differ, and two images."""
    name, _, at = name.partition(" at ")
    pixels = int(at) if at else pixels or SIDES.get(name)
    with seeded(seed):
        if name.startswith("timm."):
            import timm

            model = timm.create_model(name.removeprefix("timm."), pretrained=False).eval()
            shape = model.pretrained_cfg["input_size"]
        else:
            side = pixels or small_size(name)
            shape = (3, side, side)
            model = build(name, "cpu", side)
        return varied(model), torch.randn(2, *shape).double()


def varied(model: nn.Module) -> nn.Module:
    """A network in float64 whose normalised channels differ, and whose head is not zero."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0.0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)):
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.7, 1.3)
            if module.bias is not None:
                nn.init.normal_(module.bias, 0.1, 0.2)
    for parameter in model.parameters():
        # The heads of vision transformers start at zero, and all logits with them.
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model.double()


def constants_of(
    model: nn.Module, images: Tensor, sites: list[GateSite], seed: int
) -> dict[str, dict[str, Tensor] | None]:
    """What closed channels hold: zero, their means, and anything within their range."""
    with torch.no_grad(), recorded(model, sites) as held:
        model(images)
    means, others = {}, {}
    generator = torch.Generator().manual_seed(seed)
    for site in sites:
        dim, _ = channel_shape(site, held[site.name])
        values = held[site.name].movedim(dim, 0).flatten(1)
        means[site.name] = values.mean(1)
        noise = torch.randn(site.n_channels, generator=generator, dtype=torch.float64)
        others[site.name] = means[site.name] + noise * values.std()
    return {"zero": None, "mean": means, "arbitrary": others}


def in_float32(traced_network: Graph) -> Graph:
    """A graph of float64 as one of float32, as if it had been traced in it."""

    def single(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.float() if value.dtype == torch.float64 else value
        if isinstance(value, (tuple, list)):
            return type(value)(single(v) for v in value)
        return torch.float32 if value is torch.float64 else value

    tensors = traced_network.tensors
    traced_network.tensors = {name: single(tensor) for name, tensor in tensors.items()}
    for node in traced_network.graph.nodes:
        node.meta["val"] = single(node.meta.get("val"))
        node.kwargs = {key: single(value) for key, value in node.kwargs.items()}
        node.args = tuple(single(a) if isinstance(a, torch.dtype) else a for a in node.args)
    return traced_network


def chosen(sites: list[GateSite], seed: int) -> dict[str, Tensor]:
    """40 % of the channels, at random."""
    generator = torch.Generator().manual_seed(seed)
    scores = {s.name: torch.rand(s.n_channels, generator=generator) for s in sites}
    return top_k_masks(scores, sites, round(SIZE * sum(s.n_channels for s in sites)))


def far(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest output."""
    return float((found - expected).abs().max() / expected.abs().max())


def outputs(model: nn.Module, arch: SubArchitecture, images: Tensor) -> Tensor:
    """Of the gated network."""
    with torch.no_grad(), gated(model, arch):
        found: Tensor = model(images)
    return found


def measured(name: str, seed: int) -> dict[str, Any]:
    """All differences of one network, and what was cut."""
    start = time.perf_counter()
    model, images = network(name, seed)
    sites = find_gate_sites(model, images[:1])
    masks = chosen(sites, seed)
    constants = constants_of(model, images, sites, seed)
    archs = {c: SubArchitecture(masks, sites, means=values) for c, values in constants.items()}
    traced_network = traced(model, sites, (images[:1],))
    row: dict[str, Any] = {"pixels": images.shape[-1], "sites": len(sites)}
    exact = {closed: outputs(model, arch, images) for closed, arch in archs.items()}
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)).double()
    moved = images * (1 + 1e-9 * noise)
    row["noise_gain"] = {
        closed: far(outputs(model, arch, moved), exact[closed]) / 1e-9
        for closed, arch in archs.items()
    }
    for dtype, kind in ((torch.float64, "float64"), (torch.float32, "float32")):
        if dtype == torch.float32:
            model, images = model.float(), images.float()
            traced_network = in_float32(traced_network)
            row["gated_float32"] = {}
        row[kind] = {}
        for closed, arch in archs.items():
            expected = exact[closed]
            if dtype == torch.float32:
                expected = outputs(model, arch, images)
                row["gated_float32"][closed] = far(expected, exact[closed])
            small = cut(arch, model, (images[:1],), traced_network, None, check=False)
            with torch.no_grad():
                row[kind][closed] = far(small(images), expected)
            if kind == "float32" and closed != "arbitrary":
                made = summary(small)
                row[f"cut, {closed}"] = {
                    "parameters": made.smaller.parameters / made.whole.parameters,
                    "multiply_adds": made.smaller.multiply_adds / made.whole.multiply_adds,
                    "share_sliced": made.share_sliced,
                    "stays_whole": len(made.stays_whole),
                }
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def of_files(name: str, seed: int) -> dict[str, Any]:
    """Differences of what other programs run: files in float32, closed at the mean.

    Three images, while files are written with two: the number of images has to stay free.
    """
    import onnxruntime
    from safetensors.torch import load_file

    model, images = network(name, seed)
    model, images = model.float(), images.float()
    images = torch.cat([images, -images[:1]])
    sites = find_gate_sites(model, images[:1])
    means = constants_of(model, images, sites, seed)["mean"]
    arch = SubArchitecture(chosen(sites, seed), sites, means=means)
    expected = outputs(model, arch, images)
    small = arch.export(model, images[:1], check=False)
    found: dict[str, Any] = {}

    def program(path: Path) -> Tensor:
        return torch.export.load(path).module()(images)  # type: ignore[no-any-return]

    def onnx(path: Path) -> Tensor:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {"input": images.numpy()})[0])

    def weights(path: Path) -> Tensor:
        given = runpy.run_path(str(path.with_suffix(".py")))["Network"]()
        given.load_state_dict(load_file(path))
        return given(images)  # type: ignore[no-any-return]

    for ending, run in ((".pt2", program), (".onnx", onnx), (".safetensors", weights)):
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            path = Path(folder) / f"small{ending}"
            try:
                save(small, path, images)
                found[ending] = far(run(path), expected)
            except Exception as error:
                found[ending] = f"{type(error).__name__}: {error!s:.500}"
    return found


def n_parameters(name: str) -> int:
    """Of a model of torchvision."""
    weights = torchvision.models.get_model_weights(name)
    return int(next(iter(weights)).meta["num_params"])


def worst(rows: dict[str, Any], kind: str, closed: str) -> float:
    """The largest difference over the networks that were done."""
    return max(
        (row[kind][closed] for n, row in rows.items() if kind in row and " at " not in n),
        default=float("nan"),
    )


def main() -> int:
    """Writes the results; returns 1 if a network failed or differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="these models only, anew")
    parser.add_argument("--files", action="store_true", help="write and run files, no more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    names = torchvision.models.list_models(module=torchvision.models)
    names.sort(key=n_parameters)  # the large ones last
    names += [f"timm.{name}" for name in TIMM] + ["swin_v2_s at 64"]
    rows = json.loads(args.output.read_text())["networks"] if args.output.exists() else {}
    if args.files:
        left = [n for n in FILES if "files" not in rows.get(n, {})]
    else:
        left = [n for n in names if n not in rows or "error" in rows[n] or "float32" not in rows[n]]
    for name in args.only or left:
        before = rows.get(name, {})
        try:
            if args.files:
                rows[name] = before | {"files": of_files(name, args.seed)}
            else:
                rows[name] = measured(name, args.seed)
                rows[name] |= {k: v for k, v in before.items() if k == "files"}
        except Exception as error:
            rows[name] = {"error": f"{type(error).__name__}: {error!s:.300}"}
        print(name, json.dumps(rows[name]), flush=True)
        found = {
            "command": "python -m benchmarks.export_exactness",
            "torch": torch.__version__.split("+")[0],
            "torchvision": torchvision.__version__.split("+")[0],
            "size": SIZE,
            "worst": {
                kind: {c: worst(rows, kind, c) for c in ("zero", "mean", "arbitrary")}
                for kind in ("float64", "float32")
            },
            "networks": {n: rows[n] for n in names if n in rows},
        }
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    failed = [n for n, row in rows.items() if "error" in row]
    limits = {"float64": 1e-9, "float32": 1e-5}
    apart = {
        n: [k for k, limit in limits.items() if k in row and max(row[k].values()) > limit]
        + [k for k, v in row.get("files", {}).items() if isinstance(v, str) or v > 1e-5]
        for n, row in rows.items()
        if " at " not in n
    }
    apart = {n: k for n, k in apart.items() if k}
    print(f"{len(rows)} networks; failed: {failed}; far: {apart}")
    return 1 if failed or apart else 0


if __name__ == "__main__":
    raise SystemExit(main())
