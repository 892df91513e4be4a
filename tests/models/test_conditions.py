"""Conditions: slicing, joining and moving."""

import pytest
import torch

from megatron_pdmd.models import Conditions


def test_slices_join_to_the_whole():
    whole = Conditions(torch.randn(5, 3, 2), torch.randn(5, 1, 1, 2, 2))
    joined = Conditions.cat([whole[:2], whole[2:]])
    assert len(whole[:2]) == 2
    assert torch.equal(joined.text, whole.text) and torch.equal(joined.image_latents, whole.image_latents)
    assert joined.mask is None
    assert torch.equal(whole[torch.tensor([4, 0])].text, whole.text[[4, 0]])


def test_dtype_and_device_change_for_every_field():
    moved = Conditions(torch.randn(1, 3, 2), torch.randn(1, 1, 1, 2, 2)).to("meta", torch.bfloat16)
    for tensor in (moved.text, moved.image_latents):
        assert tensor.is_meta and tensor.dtype == torch.bfloat16


def test_text_alone_is_accepted_in_place_of_conditions():
    text = torch.randn(1, 3, 2)
    assert Conditions.of(text).text is text
    conditions = Conditions(text)
    assert Conditions.of(conditions) is conditions


def test_a_field_that_only_some_have_is_refused():
    text = torch.zeros(1, 3, 2)
    with pytest.raises(ValueError, match="mask is given for some samples only"):
        Conditions.cat([Conditions(text), Conditions(text, mask=torch.zeros(1, 1, 1, 2, 2))])
