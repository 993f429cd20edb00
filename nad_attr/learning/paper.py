"""The released NAD recipe, step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from nad_attr.gates.channels import n_gates, split_sites, to_channels
from nad_attr.gates.recipe import PaperRecipe
from nad_attr.gating.hooks import expand, installed
from nad_attr.learning.engine import Chunk, Learned
from nad_attr.learning.objective import gate_and_difference, paper_loss
from nad_attr.sites.site import GateSite
from nad_attr.system.rng import seed_of

__all__ = ["initial_logits", "learn_paper", "paper_steps"]


def initial_logits(chunk: Chunk) -> Tensor:
    """N(0, 1) for each gate, from one generator per task: (R, all gates)."""
    total = n_gates(chunk.network.sites)
    draws = []
    for seed, task in zip(chunk.seeds, chunk.tasks, strict=True):
        generator = torch.Generator().manual_seed(seed_of(seed, task, "logits"))
        draws.append(torch.randn(total, generator=generator, device="cpu"))
    return torch.stack(draws)


def paper_steps(n_own: int, recipe: PaperRecipe) -> int:
    """Steps that a task with ``n_own`` images takes."""
    return recipe.epochs * -(-n_own // recipe.images_per_step)


def learn_paper(chunk: Chunk, recipe: PaperRecipe, start: Tensor | None = None) -> Learned:
    """Learn the gates of a chunk of tasks with the released recipe.

    Each task sees only its own images and takes its own steps. Tasks may share a batch, because
    every image has the gates of its own task. ``start`` are logits (R, all gates) in place of
    N(0, 1). The curves are "loss" and "size".
    """
    network = chunk.network
    sites = network.sites
    widths = [site.n_gates for site in sites]
    logits = (initial_logits(chunk) if start is None else start).to(network.device, network.dtype)
    epochs = [
        [
            batch
            for _ in range(recipe.epochs)
            for batch in images.epoch("own", recipe.images_per_step)
        ]
        for images in chunk.images
    ]
    length = max(map(len, epochs))
    plan = [[steps[s] if s < len(steps) else [] for steps in epochs] for s in range(length)]
    curves: dict[str, list[Tensor]] = {"loss": [], "size": []}

    for step, batch in zip(plan, chunk.batches(plan), strict=True):
        clean_outputs, clean = network.clean_recorded(batch.inputs)
        right = clean_outputs.argmax(1) == batch.labels
        leaf = logits.detach().requires_grad_(True)
        gates = list(leaf.sigmoid().split(widths, dim=1))
        by_site = split_sites(to_channels(leaf.sigmoid(), sites), sites)
        differences: dict[str, Tensor] = {}
        # Freed after use, unless backward runs the block again.
        take = clean.get if network.recomputes else clean.pop

        def gate(site: GateSite, tensor: Tensor) -> Tensor:
            values = by_site[site.name][batch.rows]  # noqa: B023 (used within this step only)
            gated, difference = gate_and_difference(
                tensor,
                expand(values, site, tensor),
                take(site.name, tensor),  # noqa: B023
                rectified=site.name in recipe.rectified_sites,
            )
            differences.setdefault(site.name, difference)  # noqa: B023
            return gated

        with installed(network.model, sites, gate), network.lean():
            outputs = network(network.ready(batch.inputs))
            loss, active = paper_loss(
                outputs,
                batch.labels,
                torch.stack(list(differences.values())).sum(0),
                right,
                batch.rows,
                gates,
                recipe.beta,
            )
            gradient = network.gate_gradient(loss.sum(), leaf)
        pieces = gradient.split(widths, dim=1)
        direction = torch.cat(
            [piece / piece.norm(dim=1, keepdim=True).clamp(min=1e-12) for piece in pieces], dim=1
        )
        logits = torch.where(
            active[:, None], logits - recipe.learning_rate * direction, logits
        ).detach()
        curves["loss"].append(loss.detach().masked_fill(~active, torch.nan))
        curves["size"].append((logits > 0).float().mean(1).masked_fill(~active, torch.nan))
        chunk.advance(sum(bool(row) for row in step))
    return Learned(
        logits.sigmoid(), logits, {name: torch.stack(curve) for name, curve in curves.items()}
    )
