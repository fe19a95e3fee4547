"""transformers' private members are as `transformers_internals` expects them."""

import inspect

import pytest
import torch
from transformers import EncodecModel, PreTrainedConfig, PreTrainedModel
from transformers.models.encodec.modeling_encodec import EncodecConv1d

from musicgen_eval.models.transformers_internals import commit_of, has_adapters, pad_rows


def test_pad1d_is_static_and_has_the_parameters_that_are_passed():
    assert isinstance(inspect.getattr_static(EncodecConv1d, "_pad1d"), staticmethod), "EncodecConv1d._pad1d has changed"
    assert list(inspect.signature(EncodecConv1d._pad1d).parameters)[:3] == ["hidden_states", "paddings", "mode"]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("reflect", [3, 2, 1, 2, 3, 4, 3]),
        ("replicate", [1, 1, 1, 2, 3, 4, 4]),
        ("constant", [0, 0, 1, 2, 3, 4, 0]),
    ],
)
def test_rows_are_padded_at_both_ends(mode: str, expected: list[int]):
    assert pad_rows(torch.tensor([[1.0, 2, 3, 4]]), 2, 1, mode).tolist() == [expected]


def test_short_rows_are_extended_with_zeros_before_they_are_mirrored():
    assert pad_rows(torch.tensor([[1.0, 2]]), 3, 1, "reflect").tolist() == [[0, 0, 2, 1, 2, 0]]


def test_adapters_are_marked_by_the_mixin_of_all_models():
    assert PreTrainedModel._hf_peft_config_loaded is False, "transformers marks loaded adapters in another way"
    assert "self._hf_peft_config_loaded = True" in inspect.getsource(PreTrainedModel.add_adapter)
    model = EncodecModel.__new__(EncodecModel)
    assert not has_adapters(model)
    model.__dict__["_hf_peft_config_loaded"] = True
    assert has_adapters(model)


def test_a_configuration_knows_the_commit_that_it_was_loaded_from():
    assert commit_of(PreTrainedConfig()) is None
    loaded = PreTrainedConfig.from_dict({}, _commit_hash="abc")
    assert commit_of(loaded) == "abc", "PreTrainedConfig keeps the commit in another attribute"
