"""Randomness is a function, not a state.

Every draw comes from a seed computed from the run's seed, a purpose and what it is for: a sample and its visit, or an
optimizer step. How often a generator was called before never matters, so the draws are the same at any world size,
worker count, batch split or resume point.
"""

import hashlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def seed_for(*parts: int | str) -> int:
    """This maps any sequence of numbers and names to a 63-bit seed; different sequences give unrelated seeds."""
    encoded = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    # names of files that aren't valid UTF-8 arrive with surrogates
    digest = hashlib.blake2b(encoded.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def python_random(*parts: int | str) -> random.Random:
    """This makes a generator of the standard library, seeded from ``parts``."""
    return random.Random(seed_for(*parts))


def torch_generator(*parts: int | str) -> "torch.Generator":
    """This makes a CPU generator of torch, seeded from ``parts``."""
    import torch

    return torch.Generator().manual_seed(seed_for(*parts))


@dataclass(frozen=True)
class Draws:
    """The random draws of the rows of one micro-batch.

    Attributes:
        run_seed: The run's ``--seed``.
        keys: ``Sample.key`` per row.
        visits: How often each sample had been visited before.
    """

    run_seed: int
    keys: tuple[str, ...]
    visits: tuple[int, ...]

    def uniform(self, purpose: str) -> "Tensor":
        """One number per row from the open interval (0, 1): (B,), fp64, on the CPU."""
        import torch

        seeds = [seed_for(self.run_seed, purpose, key, visit) for key, visit in zip(self.keys, self.visits)]
        return torch.tensor([(seed + 0.5) / 2**63 for seed in seeds], dtype=torch.float64).clamp_(
            2.0**-53, 1 - 2.0**-53
        )

    def normal(self, purpose: str, shape: tuple[int, ...]) -> "Tensor":
        """Gaussian noise per row: (B, *shape), fp32, on the CPU."""
        import torch

        rows = [
            torch.randn(shape, generator=torch_generator(self.run_seed, purpose, key, visit))
            for key, visit in zip(self.keys, self.visits)
        ]
        return torch.stack(rows)
