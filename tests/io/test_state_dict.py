import pytest
import torch
from torch import nn

from library.config.errors import ConfigError
from library.io.state_dict import check_strict, difference, load_strict


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.inner = nn.Sequential(nn.Linear(2, 2, bias=False))
        self.register_buffer("table", torch.zeros(4))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("scratch", torch.zeros(5), persistent=False)


def on_meta(kind=Small):
    with torch.device("meta"):
        return kind()


def weights():
    generator = torch.Generator().manual_seed(0)
    return {
        "linear.weight": torch.randn(2, 3, generator=generator),
        "linear.bias": torch.randn(2, generator=generator),
        "inner.0.weight": torch.randn(2, 2, generator=generator),
        "table": torch.randn(4, generator=generator),
        "count": torch.tensor(5),
    }


def load(module, tensors, *, dtype=torch.float32, **options):
    load_strict(module, tensors.items(), device="cpu", dtype=dtype, source="x.safetensors", **options)


def test_values_take_the_places_of_meta_tensors():
    module = on_meta()
    load(module, weights())
    assert {name: value.tolist() for name, value in module.state_dict().items()} == {
        name: value.tolist() for name, value in weights().items()
    }
    assert all(isinstance(value, nn.Parameter) for value in module.parameters())
    assert module.linear(torch.ones(1, 3)).shape == (1, 2)
    assert module.scratch.is_meta


def test_a_tensor_of_the_right_type_is_not_copied():
    module, tensors = on_meta(), weights()
    load(module, tensors)
    assert module.linear.weight.data_ptr() == tensors["linear.weight"].data_ptr()


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float64])
def test_floating_point_values_are_converted_and_others_are_not(stored):
    tensors = {name: value.to(stored) if value.is_floating_point() else value for name, value in weights().items()}
    module = on_meta()
    load(module, tensors, dtype=torch.bfloat16)
    assert module.linear.weight.dtype == module.table.dtype == torch.bfloat16
    assert module.count.dtype == torch.int64
    assert torch.equal(module.linear.weight, tensors["linear.weight"].to(torch.bfloat16))


def test_types_can_be_kept():
    half = {name: value.half() if value.is_floating_point() else value for name, value in weights().items()}
    module = on_meta()
    load(module, half, keep_dtype=("table",))
    assert (module.table.dtype, module.linear.weight.dtype) == (torch.float16, torch.float32)
    module = on_meta()
    load(module, half, dtype=None)
    assert module.linear.weight.dtype == torch.float16
    module = on_meta()
    load(module, half | {"table": weights()["table"].to(torch.float8_e4m3fn)}, keep_dtype=("table",))
    assert module.table.dtype == torch.float32


def test_only_one_tensor_is_alive_at_a_time():
    import weakref

    alive = []

    def stream():
        for name, value in weights().items():
            assert sum(reference() is not None for reference in alive) <= 1
            half = value.half() if value.is_floating_point() else value
            alive.append(weakref.ref(half))
            yield name, half
            del half

    load_strict(on_meta(), stream(), device="cpu", dtype=torch.float32, source="x")


def test_all_differences_stand_in_one_line():
    tensors = weights() | {"linear.weight": torch.zeros(5, 3), "extra": torch.zeros(1)}
    del tensors["linear.bias"], tensors["count"]
    expected = (
        "x.safetensors does not fit Small: 2 of 5 tensors missing (count, linear.bias); 1 unexpected (extra); "
        "1 of another shape (linear.weight is 5x3, not 2x3)"
    )
    with pytest.raises(ConfigError) as error:
        load(on_meta(), tensors)
    assert str(error.value) == expected
    with pytest.raises(ConfigError) as error:
        check_strict(on_meta(), {name: tuple(value.shape) for name, value in tensors.items()}, source="x.safetensors")
    assert str(error.value) == expected


def test_long_differences_are_cut_short():
    text = difference({f"w{i}": (1,) for i in range(10)}, {"w0": (1,)})
    assert text == "9 of 10 tensors missing (w1, w2, w3, ...)"
    assert difference({"a": (1,)}, {"a": (1,)}) is None
    assert difference({"a": ()}, {"a": (2,)}) == "1 of another shape (a is 2, not a single number)"


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Embedding(4, 3)
        self.encoder = nn.Module()
        self.encoder.embed_tokens = self.shared


class TiedWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.shared.weight


@pytest.mark.parametrize(("kind", "other"), [(Tied, "encoder.embed_tokens.weight"), (TiedWeight, "head.weight")])
@pytest.mark.parametrize("given", ["first", "other", "both"])
def test_shared_weights_stay_shared_whichever_name_the_file_has(kind, other, given):
    names = {"first": ["shared.weight"], "other": [other], "both": ["shared.weight", other]}[given]
    value = torch.randn(4, 3)
    module = on_meta(kind)
    load(module, dict.fromkeys(names, value))
    check_strict(on_meta(kind), dict.fromkeys(names, (4, 3)), source="x")
    assert torch.equal(module.get_parameter(other), value)
    assert module.get_parameter(other) is module.shared.weight
    assert len(list(module.parameters())) == 1


@pytest.mark.parametrize("order", [((4, 3), (5, 3)), ((5, 3), (4, 3))])
def test_a_wrong_shape_under_one_of_two_names_is_an_error(order):
    tensors = {name: torch.zeros(shape) for name, shape in zip(("shared.weight", "head.weight"), order)}
    with pytest.raises(ConfigError, match=r"of another shape"):
        load(on_meta(TiedWeight), tensors)
    with pytest.raises(ConfigError, match=r"of another shape"):
        check_strict(on_meta(TiedWeight), {name: tuple(t.shape) for name, t in tensors.items()}, source="x")


def test_frozen_parameters_stay_frozen():
    module = on_meta().requires_grad_(False)
    load(module, weights())
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_weights_lie_where_torch_would_put_them():
    pages = torch.arange(40, dtype=torch.float32)
    odd = next(pages[start : start + 6] for start in range(1, 17) if pages[start:].data_ptr() % 64)
    layer = nn.Linear(3, 2, bias=False)
    load_strict(layer, [("weight", odd.view(2, 3))], device="cpu", dtype=None, source="a file")
    assert layer.weight.data_ptr() % 64 == 0
    assert torch.equal(layer.weight.flatten(), odd)
