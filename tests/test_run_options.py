"""One way to run a network: every call takes every option, and no option is lost on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nad_attr import (
    GateSite,
    NADAttribution,
    Recipe,
    RunOptions,
    SubArchitecture,
    certainty,
    explain,
    fit_constants,
    information_flow,
    learn_gates,
    learn_sizes,
    learn_to_store,
    verdict,
)
from nad_attr.concepts import dissect, unit_masks
from nad_attr.evaluation import (
    CentredEffectScorer,
    EnergyScorer,
    TaylorScorer,
    best_variants,
    curves,
    errors,
    evaluate,
    explain_error,
    fit_ablation,
    mosaics,
    random_weights,
    sanity,
    site_costs,
    site_fidelity,
    size_sweep,
    sweep,
)
from nad_attr.evaluation.sweeps.grid import measure_grid
from nad_attr.flow import agreement, edge_drops, edge_fidelity
from nad_attr.pictures import class_mosaics, contrast_maps, heat_maps, top_images
from nad_attr.report import Report
from nad_attr.running import Runner, forward
from nad_attr.running.options import FROM_RUN, as_options
from tests.helpers import assert_model_untouched, fit_briefly

SITE = GateSite("2", 6, 1)
LABELS = torch.arange(16) % 4


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
        ).eval()  # fmt: skip


def images() -> Tensor:
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


ARCHS = [SubArchitecture.from_kept({"2": [k, k + 1]}, [SITE], task=k) for k in range(4)]
MASKS = torch.zeros(16, 8, 8, dtype=torch.long)
QUICK = Recipe(size=0.5, steps=2, images_per_step=4)


def _wrong(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """An image that the network calls another class than said."""
    with torch.no_grad():
        return {"image": x[0], "label": (int(model(x[:1]).argmax()) + 1) % 4}


def _units(m: nn.Module, x: Tensor) -> Any:
    return dissect(m, [SITE], (x, MASKS), quantile=0.1, concepts=["a"])


WHOLE = SubArchitecture.full([GateSite("0", 6, 1), SITE])


def _flow(m: nn.Module, x: Tensor) -> Any:
    return information_flow(m, WHOLE, x, tasks=1)


#: Everything that runs a network, as function of network, images and options.
CALLS: dict[str, Callable[[nn.Module, Tensor, RunOptions | None], Any]] = {
    "learn_gates": lambda m, x, r: learn_gates(m, (x, LABELS), None, QUICK, [SITE], run=r),
    "learn_sizes": lambda m, x, r: learn_sizes(
        m, [0.5, 0.2], (x, LABELS), None, QUICK, [SITE], run=r
    ),
    "fit_constants": lambda m, x, r: fit_constants(
        m, ARCHS, (x, LABELS), recipe=replace(QUICK, ablation="optimal"), run=r
    ),
    "certainty": lambda m, x, r: certainty(
        m, learn_gates(m, (x, LABELS), None, QUICK, [SITE]), (x, LABELS), (x, LABELS), pairs=1,
        run=r,
    ),
    "NADAttribution": lambda m, x, r: NADAttribution(m, recipe=QUICK, run=r).learn((x, LABELS)),
    "evaluate": lambda m, x, r: evaluate(m, ARCHS, (x, LABELS), n_random=1, run=r),
    "verdict": lambda m, x, r: verdict(
        m, ARCHS, (x, LABELS), (x, LABELS), n_images=8, n_random=1, level=0.5, run=r
    ),
    "explain": lambda m, x, r: explain(m, (x, LABELS), tasks=[1], recipe=QUICK, run=r),
    "sweep": lambda m, x, r: sweep(m, ARCHS, (x, LABELS), run=r),
    "sweep with donors": lambda m, x, r: sweep(
        m,
        ARCHS,
        (x, LABELS),
        ablation=fit_ablation(m, [SITE], (x, LABELS), kind="resample"),
        run=r,
    ),
    "site_fidelity": lambda m, x, r: site_fidelity(m, ARCHS, (x, LABELS), run=r),
    "fit_ablation": lambda m, x, r: fit_ablation(m, [SITE], (x, LABELS), kind="noise", run=r),
    "site_costs": lambda m, x, r: site_costs(m, [SITE], x[:1], run=r),
    "measure_grid": lambda m, x, r: measure_grid(m, [ARCHS], (x, LABELS), run=r),
    "curves": lambda m, x, r: curves(
        m, {"2": torch.arange(24.0).reshape(4, 6)}, (x, LABELS), sites=[SITE], tasks=range(4),
        sizes=[0.5], run=r,
    ),
    "size_sweep": lambda m, x, r: size_sweep(
        m,
        {"a": EnergyScorer(m, [SITE])},
        (x, LABELS),
        train_data=(x, LABELS),
        baselines={},
        sites=[SITE],
        tasks=range(4),
        sizes=[0.5],
        n_random=1,
        run=r,
    ),
    "scorer": lambda m, x, r: TaylorScorer(m, [SITE])(x, LABELS, run=r),
    "scorer of means": lambda m, x, r: CentredEffectScorer(m, [SITE])(x, LABELS, run=r),
    "best_variants": lambda m, x, r: best_variants(
        TaylorScorer(m, [SITE]), (x, LABELS), (x, LABELS), sizes=[0.5], run=r
    ),
    "mosaics": lambda m, x, r: mosaics(m, ARCHS, (x, LABELS), n=2, run=r),
    "errors": lambda m, x, r: errors(m, ARCHS, (x, LABELS), n_permutations=9, run=r),
    "explain_error": lambda m, x, r: explain_error(m, ARCHS, **_wrong(m, x), run=r),
    "random_weights": lambda m, x, r: random_weights(m, data=(x, LABELS), run=r),
    "sanity": lambda m, x, r: sanity(
        m, lambda *_: ARCHS, (x, LABELS), (x, LABELS), n_random=1, n_networks=1, stages=1, run=r
    ),
    "dissect": lambda m, x, r: dissect(
        m, [SITE], (x, MASKS), quantile=0.1, concepts=["a"], scratch_bytes=0, run=r
    ),
    "unit_masks": lambda m, x, r: unit_masks(m, _units(m, x), SITE, 0, (x, MASKS), run=r),
    "heat_maps": lambda m, x, r: heat_maps(m, ARCHS, x, LABELS, run=r),
    "contrast_maps": lambda m, x, r: contrast_maps(m, ARCHS[:2], x, run=r),
    "class_mosaics": lambda m, x, r: class_mosaics(m, ARCHS, (x, LABELS), run=r),
    "top_images": lambda m, x, r: top_images(m, ARCHS[0], (x, LABELS), k=2, run=r),
    "maps of top images": lambda m, x, r: top_images(m, ARCHS[0], (x, LABELS), k=2).maps(
        m, "2", 0, (x, LABELS), run=r
    ),
    "information_flow": lambda m, x, r: information_flow(
        m, WHOLE, (x, LABELS), tasks=1, run=r
    ),
    "edge_drops": lambda m, x, r: edge_drops(m, _flow(m, x), [("0", 1, "2", 1)], x, run=r),
    "agreement": lambda m, x, r: agreement(m, _flow(m, x), (x, LABELS), n_edges=3, run=r),
    "edge_fidelity": lambda m, x, r: edge_fidelity(
        m, _flow(m, x), (x, LABELS), sizes=[0.5], n_random=1, run=r
    ),
    "Report": lambda m, x, r: Report(
        learn_gates(m, (x, LABELS), None, QUICK, [SITE])
    ).measure(m, (x, LABELS), n_random=1, run=r),
}  # fmt: skip
#: They run one image, or one at a time.
ALONE = {"site_costs", "explain_error", "unit_masks", "maps of top images", "class_mosaics"}
#: Networks of their own: what runs the given one cannot run these.
COPIES = {"random_weights", "sanity"}
#: One has a function of its own as its first argument.
NO_FUNCTION = COPIES | {"NADAttribution"}


@pytest.mark.parametrize("name", CALLS)
def test_every_call_takes_every_option(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fit_briefly(monkeypatch)
    model, x = network(), images()
    found: list[int] = []
    dtypes: set[torch.dtype] = set()
    passed: set[float] = set()

    def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        dtypes.add(output.dtype)

    def run_it(inputs: Tensor, factor: float) -> Tensor:
        passed.add(factor)
        return model(inputs * factor)

    def three(*_: Any, **options: Any) -> int:
        found.append(options["limit"])
        return 3

    monkeypatch.setattr(forward, "largest_batch", three)
    monkeypatch.setattr("nad_attr.learning.session.largest_batch", three)
    own: dict[str, Any] = {"forward_func": run_it, "additional_forward_args": 1.0}
    if name in NO_FUNCTION:
        own = {}
    options = RunOptions(amp=True, batch_size="auto", memory_limit="1GB", show_progress=True, **own)
    model[0].register_forward_hook(watch)
    with assert_model_untouched(model):
        CALLS[name](model, x, None)
        assert dtypes == {torch.float32}
        assert capsys.readouterr().err == ""
        CALLS[name](model, x, options)
    assert torch.bfloat16 in dtypes
    assert passed == (set() if name in NO_FUNCTION else {1.0})
    if name not in ALONE:
        assert found  # asked what fits ...
        assert set(found) <= {10**9, 750_000_000}  # ... into the limit, less what answers take
        assert capsys.readouterr().err  # a bar


@pytest.mark.parametrize("name", CALLS)
def test_every_call_runs_on_the_device_asked_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copied(model: nn.Module, device: torch.device) -> nn.Module:
        raise LookupError(device.type)

    monkeypatch.setattr(forward, "copied_to", copied)
    with pytest.raises((LookupError, RuntimeError), match="meta"):
        CALLS[name](network(), images(), RunOptions(device="meta"))


@pytest.mark.parametrize("name", sorted(COPIES))
def test_controls_refuse_a_function_of_the_network_itself(name: str) -> None:
    model = network()
    with pytest.raises(ValueError, match="random copies"):
        CALLS[name](model, images(), RunOptions(forward_func=lambda x: model(x)))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be a whole number from 1 on or 'auto'"),
        ({"batch_size": 2.5}, ValueError, "got 2.5"),
        ({"batch_size": True}, ValueError, "got True"),
        ({"batch_size": "all"}, ValueError, "got 'all'"),
        ({"amp": "half"}, ValueError, "amp must be True, torch.bfloat16"),
        ({"amp": torch.int8}, ValueError, "amp"),
        ({"device": "cup"}, ValueError, "device must be .*'cup'"),
        ({"device": 1.5}, ValueError, "got 1.5"),
        ({"memory_limit": 0}, ValueError, "memory_limit must be a number of bytes"),
        ({"memory_limit": "much"}, ValueError, "got 'much'"),
        ({"forward_func": 3}, TypeError, "forward_func must be a function, got 3"),
        ({"show_progress": "yes"}, ValueError, "show_progress must be True or False"),
    ],
)
def test_fields_are_checked_where_they_are_given(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        RunOptions(**fields)


def test_a_keyword_goes_before_the_field(tmp_path: Path) -> None:
    model, data = network(), (images(), LABELS)
    run = RunOptions(batch_size=2, amp=True)
    widths: set[int] = set()
    model[0].register_forward_hook(lambda m, args, out: widths.add((len(out), out.dtype)))
    for call in (
        lambda **k: evaluate(model, ARCHS, data, n_random=0, **k),
        lambda **k: learn_gates(model, data, None, QUICK, [SITE], **k),
        lambda **k: learn_sizes(model, [0.5], data, None, QUICK, [SITE], **k),
        lambda **k: NADAttribution(model, recipe=QUICK, **k).learn(data),
        lambda **k: NADAttribution(model, recipe=QUICK, run=RunOptions(batch_size=1)).learn(
            data, **k
        ),
        lambda **k: learn_to_store(
            model, data, tmp_path / "a.h5", None, QUICK, [SITE], overwrite=True, **k
        ),
    ):
        widths.clear()
        call(run=run, batch_size=5, amp=None)
        widest = max(n for n, _ in widths)
        assert widest > 2, call
        assert {dtype for _, dtype in widths} == {torch.float32}
    assert as_options(run, amp=FROM_RUN).amp is True
    with pytest.raises(TypeError, match="run must be nad_attr"):
        evaluate(model, ARCHS, data, run={"amp": True})  # type: ignore[arg-type]
    for call in (evaluate, learn_gates):
        with pytest.raises(TypeError, match=r"no argument 'device_name'; .* device, amp"):
            call(
                model,
                ARCHS if call is evaluate else data,
                *[data][: call is evaluate],
                device_name=1,
            )


def test_an_automatic_batch_holds_what_fits() -> None:
    """The pass of one image is measured, with its ablation's donors and gradients."""
    model, data = network(), (images(), LABELS)
    widths: set[int] = set()
    model[0].register_forward_hook(lambda m, args, out: widths.add(len(out)))
    for limit, fits in ((40_000, False), (10**8, True)):
        widths.clear()
        sweep(model, ARCHS, data, run=RunOptions(batch_size="auto", memory_limit=limit))
        assert (max(widths) > 8) is fits
    with pytest.raises(ValueError, match="a batch of one image takes"):
        sweep(model, ARCHS, data, run=RunOptions(batch_size="auto", memory_limit=1000))
    expected = TaylorScorer(model, [SITE])(*data)
    widths.clear()
    found = TaylorScorer(model, [SITE])(
        *data, run=RunOptions(batch_size="auto", memory_limit=40_000)
    )
    assert max(widths) < 16
    torch.testing.assert_close(found["2"], expected["2"])


def test_autocast_around_a_call_is_of_no_account() -> None:
    runner, x = Runner(network()), images()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = runner((x,))
    with torch.no_grad():
        assert torch.equal(inside, runner((x,)))
