"""Pictures of units: the images in which a unit is most active, dark where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nad_attr.concepts.dissection.dissecting import site_maps
from nad_attr.concepts.dissection.labelled_images import LabelledImages
from nad_attr.concepts.dissection.overlap import active_pixels
from nad_attr.concepts.unit_concepts import UnitConcepts
from nad_attr.gating.hooks import recorded
from nad_attr.running.forward import Runner
from nad_attr.running.options import RunOptions
from nad_attr.sites.finding import find_gate_sites
from nad_attr.sites.site import GateSite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_unit", "unit_masks"]

#: Brightness where the unit is not active.
_DARK = 0.25


def unit_masks(
    model: nn.Module,
    units: UnitConcepts,
    site: GateSite | str,
    unit: int,
    data: Any,
    *,
    n: int | None = None,
    seed: int = 0,
    run: RunOptions | None = None,
) -> list[tuple[int, Tensor, Tensor]]:
    """A unit's top images, and where it is active in them.

    Args:
        model: The network, in eval mode.
        units: What :func:`nad_attr.concepts.dissect` gave, with thresholds and top images.
        site: The site, or its name where the axis of its channels can be found.
        unit: Number of the unit.
        data: The images that it was dissected with.
        n: How many images; None: all that are known.
        seed: As in the dissection.
        run: How to run the network; see :class:`nad_attr.RunOptions`.

    Returns:
        (number in the dataset, image as the network took it, bool (H, W)) for each, in order.

    Raises:
        KeyError: If there is no such site.
        ValueError: If thresholds or top images are not known, or there is no such unit.

    Example:
        >>> from nad_attr.concepts import dissect
        >>> net = nn.Sequential(nn.ReLU(), nn.Flatten()).eval()
        >>> images = torch.tensor([[[[0.0, 1.0]]], [[[3.0, 2.0]]]])
        >>> data = images, torch.tensor([[[0, 1]], [[1, 0]]])
        >>> site = GateSite("0", 1)
        >>> units = dissect(
        ...     net, [site], data, quantile=0.25, concepts=["a", "b"], exact=True
        ... )
        >>> [(i, mask.tolist()) for i, _, mask in unit_masks(net, units, site, 0, data, n=1)]
        [(1, [[True, False]])]
    """
    name = site if isinstance(site, str) else site.name
    if units.thresholds is None or units.top_images is None:
        raise ValueError(
            "these units come without thresholds or top images, which dissect() finds; other "
            "programs' files do not hold them."
        )
    if not 0 <= unit < units.n_units(name):
        raise ValueError(f"{name!r} has units 0 to {units.n_units(name) - 1}, not {unit}.")
    if isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[0], Tensor):
        data = torch.utils.data.TensorDataset(*data)
    images = LabelledImages(data, seed=seed)
    runner = Runner(model, run)
    numbers = [i for i in units.top_images[name][unit].tolist()[:n] if i >= 0]
    threshold = float(units.thresholds[name][unit])
    found: list[tuple[int, Tensor, Tensor]] = []
    where = site if isinstance(site, GateSite) else None
    places = {number: place for place, number in enumerate(images.numbers)}
    for batch in images.batches([[places[number]] for number in numbers]):
        inputs = runner.to_device(batch.inputs)
        if where is None:
            where = find_gate_sites(
                runner.model,
                inputs,
                layers=name,
                additional_forward_args=runner.options.additional_forward_args,
                forward_func=None if runner.is_plain else runner.call,
            )[0]
        with recorded(runner.model, [where]) as activations, torch.no_grad():
            runner.run(inputs)
        activation = site_maps(where, activations[name])[0, :, :, unit].cpu()
        mask = active_pixels(activation, threshold, batch.size)
        found.append((batch.numbers[0], batch.inputs[0][0], mask))
    return found


def draw_unit(
    model: nn.Module,
    units: UnitConcepts,
    site: GateSite | str,
    unit: int,
    data: Any,
    *,
    n: int = 5,
    to_rgb: Callable[[Tensor], Tensor] | None = None,
    **running: Any,
) -> Figure:
    """Draw a unit's top images, dark where it is not active.

    Args:
        model: The network, in eval mode.
        units: What :func:`nad_attr.concepts.dissect` gave.
        site: The site, or its name where the axis of its channels can be found.
        unit: Number of the unit.
        data: The images that it was dissected with.
        n: Images at most.
        to_rgb: Makes (3, H, W) in [0, 1] of what the network takes. None: values are stretched to
            that.
        **running: Further arguments of :func:`unit_masks`.

    Returns:
        A matplotlib figure, one image beside the other under the unit's label and IoU.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: As :func:`unit_masks`.

    Example:
        >>> from nad_attr.concepts import dissect
        >>> net = nn.Sequential(nn.ReLU(), nn.Flatten()).eval()
        >>> data = (torch.rand(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long))
        >>> site = GateSite("0", 3)
        >>> units = dissect(net, [site], data, quantile=0.1, concepts=["wall"])
        >>> len(draw_unit(net, units, site, 1, data).axes)
        2
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "pictures of units need matplotlib: pip install 'nad-attr[plot]'; unit_masks() gives "
            "the masks without."
        ) from None
    found = unit_masks(model, units, site, unit, data, n=n, **running)
    name = site if isinstance(site, str) else site.name
    figure = Figure(figsize=(1.6 * max(1, len(found)), 2.0), layout="constrained")
    index, iou = (values[unit] for values in units.best(name))
    label = "no concept" if index < 0 else f"{units.concepts[index].name}, IoU {iou:.3f}"
    figure.suptitle(f"{name}, unit {unit}: {label}", fontsize=9)
    for place, (number, image, mask) in enumerate(found):
        rgb = _stretched(image) if to_rgb is None else to_rgb(image)
        shown = rgb.float().clamp(0, 1) * (mask.float() * (1 - _DARK) + _DARK)
        axes = figure.add_subplot(1, len(found), place + 1)
        axes.imshow(shown.expand(3, -1, -1).permute(1, 2, 0).numpy())
        axes.set_title(str(number), fontsize=7)
        axes.axis("off")
    return figure


def _stretched(image: Tensor) -> Tensor:
    low, high = image.min(), image.max()
    return (image.float() - low) / (high - low).clamp(min=1e-12)
