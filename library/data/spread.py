"""Items dealt into batches at random, so that no item is twice in a batch where that can be avoided."""

import random
from collections.abc import Mapping

_TRIES = 30
"""How many other places are tried for an item that is twice in its batch. With some hundred items one or two do."""


def spread(repeats: Mapping[int, int], batch_size: int, rng: random.Random) -> list[list[int]]:
    """This deals items into batches at random, each item into as many different batches as it has repeats.

    An item is twice in a batch only where nothing else is possible.

    Args:
        repeats: Item -> how often it occurs.
        batch_size: Items per batch; one batch, the last, has what is left over.
        rng: Only its ``random()`` is used, which gives the same numbers in every version of Python.
    """
    items = list(repeats)
    once = max(repeats.values(), default=1) == 1
    if not once:
        items = [item for item, count in repeats.items() for _ in range(count)]
    items = shuffled(items, rng)
    batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    if once or _separate(batches, rng):
        return batches
    return _spread_evenly(repeats, [len(batch) for batch in batches], rng)


def shuffled(items: list[int], rng: random.Random) -> list[int]:
    """The items in a random order."""
    draw = rng.random
    return sorted(items, key=lambda _: draw())


def _separate(batches: list[list[int]], rng: random.Random) -> bool:
    """Exchanges items that are twice in their batch for others from anywhere; False: it didn't succeed."""
    crowded = [batch for batch in batches if len(set(batch)) < len(batch)]
    if len(crowded) * 2 > len(batches):
        return False  # few items, often: better dealt another way
    for batch in crowded:
        for place, item in enumerate(batch):
            if item in batch[:place] and not _exchange(batches, batch, place, rng):
                return False
    return True


def _exchange(batches: list[list[int]], batch: list[int], place: int, rng: random.Random) -> bool:
    for _ in range(_TRIES):
        other = batches[int(rng.random() * len(batches))]
        other_place = int(rng.random() * len(other))
        if batch[place] not in other and other[other_place] not in batch:
            batch[place], other[other_place] = other[other_place], batch[place]
            return True
    return False


def _spread_evenly(repeats: Mapping[int, int], sizes: list[int], rng: random.Random) -> list[list[int]]:
    """Deals items so that none is twice in a batch, if there is any way to.

    Each item goes into the batches with the most free places, which finds a way whenever there is one (Gale 1957 and
    Ryser 1957, on matrices of zeros and ones).
    """
    batches: list[list[int]] = [[] for _ in sizes]
    most = max(sizes)
    by_free_places: list[list[int]] = [[] for _ in range(most + 1)]  # each in random order
    for number, size in enumerate(sizes):
        _insert(by_free_places[size], number, rng)
    for item in shuffled(list(repeats), rng):
        left = repeats[item]
        while left:
            chosen: list[tuple[int, int]] = []
            for places in range(most, 0, -1):
                level = by_free_places[places]
                while level and len(chosen) < left:
                    chosen.append((level.pop(), places))
                if len(chosen) == left:
                    break
            for number, places in chosen:
                batches[number].append(item)
                _insert(by_free_places[places - 1], number, rng)
            left -= len(chosen)
            while most and not by_free_places[most]:
                most -= 1
    return batches


def _insert(numbers: list[int], number: int, rng: random.Random) -> None:
    """Puts the number at a random place; what was there goes to the end."""
    place = int(rng.random() * (len(numbers) + 1))
    numbers.append(number)
    numbers[place], numbers[-1] = numbers[-1], numbers[place]
