"""torch's private members are as `torch_internals` expects them."""

import functools
import inspect

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.nn import functional

from musicgen_eval.models.packed_matrix import can_pack
from musicgen_eval.models.torch_internals import (
    ConvertedModule,
    compiled_for_sizes,
    convert_tensors,
    has_packed_products,
    packed_product,
    packed_product_plus,
    packed_weight,
)

SCHEMAS = {
    "_reorder_linear_weight": "(Tensor self, int? batch_size=None) -> Tensor Y",
    "_linear_pointwise": "(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y",
    "_linear_pointwise.binary": "(Tensor X, Tensor other, Tensor W, Tensor? B, str attr) -> Tensor Y",
}
needs_packing = pytest.mark.skipif(not can_pack(torch.float32), reason="the processor does not support packed products")


@pytest.fixture
def operands():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, add = (torch.randn(size, generator=generator) for size in [(5, 48), (32, 48), (32,), (5, 32)])
    return x, weight, bias, add


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_products_have_the_schemas_that_are_called(name: str):
    operator, _, overload = name.partition(".")
    assert has_packed_products(torch.float32), f"torch {torch.__version__} has no torch.ops.mkldnn.{operator}"
    schema = str(getattr(getattr(torch.ops.mkldnn, operator), overload or "default")._schema)
    assert schema == f"mkldnn::{name}{SCHEMAS[name]}", f"torch {torch.__version__} changed torch.ops.mkldnn.{name}"


def test_bfloat16_support_is_a_bool():
    assert isinstance(torch.ops.mkldnn._is_mkldnn_bf16_supported(), bool)


@needs_packing
@pytest.mark.parametrize("is_packed", [True, False])
def test_products_with_packed_and_plain_weights_equal_torchs(operands, is_packed: bool):
    x, weight, bias, add = operands
    ours = packed_weight(weight.clone(), 5) if is_packed else weight
    expected = functional.linear(x, weight, bias)
    torch.testing.assert_close(packed_product(x, ours), x @ weight.t())
    torch.testing.assert_close(packed_product(x, ours, bias), expected)
    torch.testing.assert_close(packed_product(x, ours, bias, "gelu"), functional.gelu(expected))
    before = add.clone()
    torch.testing.assert_close(packed_product_plus(x, add, ours, bias), expected + add)
    assert torch.equal(add, before)


@needs_packing
def test_a_packed_weight_is_a_tensor_that_has_no_plain_values(operands):
    assert packed_weight(operands[1].clone(), 5).is_mkldnn


def test_a_function_is_compiled_for_more_sizes_than_torchs_limit(monkeypatch):
    """The limit applies to the graphs that torch captures, so the test needs no compiler for C++."""

    def double(x):
        return x * 2

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    try:
        with torch._dynamo.config.patch(recompile_limit=2, accumulated_recompile_limit=2):
            compiled = compiled_for_sizes(double, max_compiled=64)
            for size in range(2, 6):
                assert compiled(torch.ones(size)).tolist() == [2.0] * size
    finally:
        torch._dynamo.reset()


def test_apply_has_the_signature_that_is_overridden():
    parameters = inspect.signature(nn.Module._apply).parameters
    assert list(parameters) == ["self", "fn", "recurse"], "nn.Module._apply has other parameters"


def test_convert_tensors_converts_parameters_and_buffers_of_all_parts():
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    convert_tensors(module, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.float64, torch.int64}


@pytest.mark.parametrize("call", [nn.Module.half, nn.Module.double, lambda module: module.to("meta")])
def test_conversions_of_a_module_and_of_its_parent_call_convert(call):
    class Recorder(ConvertedModule):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def convert(self, fn):
            self.calls += 1
            assert fn(torch.ones(2)).shape == (2,)

    recorder = Recorder()
    assert call(recorder) is recorder
    call(nn.Sequential(recorder))
    assert recorder.calls == 2
