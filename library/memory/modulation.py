"""Modulation of all blocks at the start of a pass, from weights that stream by.

Modulation layers see one vector per sample, so a third of an MMDiT's weights do hardly any work. Where nothing in them
and before them is trained, what they answer is a constant of the pass: it is computed for all blocks when the first
asks, and the weights are read once, never kept on the device, and never read again by a recomputation or the backward
pass.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from library.memory.packed_weights import PackedWeights
from library.memory.transfers import Transfers

_SLOTS = 3


class StreamedModulation:
    """Answers for modulation layers whose weights are on the host.

    It wraps the layers' ``forward``. All must be asked about the same vector in a pass.

    Args:
        layers: Frozen; each maps the conditioning (B, D) to vectors (B, n).
        transfers: Moves their weights.
    """

    def __init__(self, layers: Sequence[nn.Module], transfers: Transfers):
        self._transfers = transfers
        self._forwards: list[Callable[[Tensor], Tensor]] = [layer.forward for layer in layers]
        self._weights = [PackedWeights(layer.parameters(), transfers) for layer in layers]
        size = max(weights.size for weights in self._weights)
        self._slots = [transfers.device_buffer(size) for _ in range(min(_SLOTS, len(layers)))]
        self._asked: tuple[Tensor, int] | None = None
        self._answers: list[Tensor] = []
        for number, layer in enumerate(layers):
            layer.forward = _Layer(self, number)  # type: ignore[method-assign, assignment]

    @property
    def host_bytes(self) -> int:
        """Memory of the weights on the host."""
        return sum(weights.size for weights in self._weights)

    @property
    def device_bytes(self) -> int:
        """Memory of the slots through which they stream."""
        return sum(slot.numel() for slot in self._slots)

    def answer(self, number: int, conditioning: Tensor) -> Tensor:
        """What a layer answers."""
        if conditioning.requires_grad:
            raise ValueError("the conditioning is trained, so modulation isn't a constant of the pass")
        asked = (conditioning, conditioning._version)
        if self._asked is None or self._asked[0] is not asked[0] or self._asked[1] != asked[1]:
            self._answers = self._all_answers(conditioning)
            self._asked = asked
        return self._answers[number]

    @torch.no_grad()
    def _all_answers(self, conditioning: Tensor) -> list[Tensor]:
        self._answers, answers = [], []
        for number in range(min(len(self._slots), len(self._weights))):
            self._fetch(number)
        for number, (forward, weights) in enumerate(zip(self._forwards, self._weights)):
            slot = number % len(self._slots)
            self._transfers.wait(slot)
            weights.lie_in(self._slots[slot])
            answers.append(forward(conditioning))
            weights.go_home()
            if number + len(self._slots) < len(self._weights):
                self._fetch(number + len(self._slots))
        return answers

    def _fetch(self, number: int) -> None:
        slot, weights = number % len(self._slots), self._weights[number]
        self._transfers.fetch(weights.master, self._slots[slot][: weights.size], slot)


class _Layer:
    """A layer's ``forward``. No closure: torch.compile would look into it, and compile for each number anew."""

    def __init__(self, modulation: StreamedModulation, number: int):
        self._modulation, self._number = modulation, number

    @torch.compiler.disable
    def __call__(self, conditioning: Tensor) -> Tensor:
        return self._modulation.answer(self._number, conditioning)
