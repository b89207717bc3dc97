import pytest
import torch

from ldm.runtime.device import pick_device
from ldm.runtime.errors import ArgumentError


@pytest.mark.parametrize("name", ["toaster", "meta", "cuda:2"])
def test_a_missing_device_is_refused(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ArgumentError, match=f"`{name}` is not available here, choose one of cuda"):
        pick_device(name)
