"""Entries of known content, for tests of stores."""

import torch


def entry(number, size=100):
    """The tensors that belong under ``key(number)``, of several types, different for every number."""
    generator = torch.Generator().manual_seed(number)
    return {
        "context": torch.randn(size, 2, generator=generator).bfloat16(),
        "ids": torch.randint(0, 1000, (7,), generator=generator),
        "mask": torch.rand(3, generator=generator) > 0.5,
    }


def key(number):
    return f"{number:040x}"


def put(target, numbers, size=100):
    for number in numbers:
        target.write({key(number): entry(number, size)})


def same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert left[name].shape == right[name].shape
        assert left[name].flatten().view(torch.uint8).tolist() == right[name].flatten().view(torch.uint8).tolist()


def present(target, numbers):
    """Which numbers are there; each is checked to hold the right tensors."""
    keys = [key(number) for number in numbers]
    missing = set(target.missing(keys))
    found = [number for number in numbers if key(number) not in missing]
    for number in found:
        same(target.read(key(number)), entry(number))
    return found


def shards(directory):
    return sorted(directory.glob("*.safetensors"))
