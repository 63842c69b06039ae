"""What goes to a GPU goes in one copy, and arrives as it was."""

import torch
from runs import Copies

from dbcore.utils.devices import pack, to_device, unpack

TENSORS = {"mask": torch.tensor([True, False, True]), "noise": torch.randn(2, 3, 5),
           "t": torch.tensor([7, 2**40]), "half": torch.randn(3).to(torch.bfloat16)}


def test_packed_is_unpacked():
    found = unpack(*pack(TENSORS))
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_however_many_tensors_go_in_one_copy():
    with Copies() as copies:
        found = to_device(TENSORS, "meta")
    assert copies.count == 1
    assert {name: (tensor.shape, tensor.dtype, tensor.device.type)
            for name, tensor in found.items()} == {
        name: (tensor.shape, tensor.dtype, "meta") for name, tensor in TENSORS.items()}


def test_on_a_cpu_nothing_is_copied():
    assert to_device(TENSORS, "cpu") is TENSORS
