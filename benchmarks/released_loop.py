"""The released recipe's way of learning gates, written plainly, as what ours is measured against.

Nothing of ``nad_attr`` runs here. As in the released code of Hu et al. (ICCV 2021, arXiv
2003.13268): one class at a time, two copies of the network, 16 images in a step; weights take part
in the backward pass, so that all their gradients are computed and thrown away; the whole network
is run again in every step; all its sites are kept until the loss is taken.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ReleasedLoop"]

#: Of the released code.
BATCH, EPOCHS, LEARNING_RATE = 16, 20, 0.1


class ReleasedLoop:
    """Gates of one class.

    Args:
        model: The network, in eval mode; copied twice.
        sites: For each site its module name, number of channels and channel axis.
        beta: Weight of the size term.
        seed: Of the first gate logits, N(0, 1).
        amp: Autocast dtype, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[tuple[str, int, int]],
        beta: float,
        *,
        seed: int = 0,
        amp: torch.dtype | None = None,
    ) -> None:
        self.whole, self.gated = copy.deepcopy(model), copy.deepcopy(model)
        for network in (self.whole, self.gated):
            network.requires_grad_(True)
        self.names, self.beta, self.amp = [name for name, _, _ in sites], beta, amp
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(seed)
        self.logits = [
            torch.randn(n, generator=generator).to(device).requires_grad_(True) for _, n, _ in sites
        ]
        self.gates: dict[str, Tensor] = {}
        self.clean: dict[str, Tensor] = {}
        self.found: dict[str, Tensor] = {}
        for name, _, dim in sites:
            self.whole.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: self._record(name, output)
            )
            self.gated.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name, dim=dim: self._gate(name, dim, output)
            )

    def _record(self, name: str, output: Tensor) -> None:
        self.clean[name] = output.clone()

    def _gate(self, name: str, dim: int, output: Tensor) -> Tensor:
        shape = [1] * output.ndim
        shape[dim] = -1
        self.found[name] = output * self.gates[name].view(shape).to(output.dtype)
        return self.found[name]

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One update of all gates.

        Args:
            images: (B, ...), of the class.
            labels: int64 (B,), the class.
        """
        gates = [logits.sigmoid() for logits in self.logits]
        self.gates = dict(zip(self.names, gates, strict=True))
        with torch.autocast(images.device.type, dtype=self.amp, enabled=self.amp is not None):
            with torch.no_grad():
                right = self.whole(images).argmax(1) == labels
            outputs = self.gated(images)
        if not bool(right.any()):
            return
        n = len(self.names)
        loss = F.cross_entropy(outputs[right].float(), labels[right]) / n
        for name in self.names:
            difference = self.found[name][right].float() - self.clean[name][right].float()
            loss = loss + difference.square().mean() / n
        loss = loss + self.beta / n * sum(gate.square().mean() for gate in gates)
        self.gated.zero_grad()
        loss.backward()
        with torch.no_grad():
            for logits in self.logits:
                assert logits.grad is not None
                logits -= LEARNING_RATE * logits.grad / logits.grad.norm().clamp(min=1e-12)
                logits.grad = None

    def scores(self) -> dict[str, Tensor]:
        """``{site name: (1, C)}``, the gates' logits."""
        return {
            name: logits.detach()[None].clone()
            for name, logits in zip(self.names, self.logits, strict=True)
        }
