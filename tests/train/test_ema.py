"""The running average of the weights."""

import torch
from torch import nn

from goldfile import gold
from ldm.train.optim.ema import EMA


def test_three_updates_equal_the_originals() -> None:
    golden = gold("ema")
    values = golden.inputs("default")
    names = [key.removeprefix("w0/") for key in values if key.startswith("w0/")]
    holder = nn.Module()
    for name in names:
        holder.register_parameter(
            name.replace(".", "_"), nn.Parameter(values[f"w0/{name}"].clone())
        )
    holder.get_parameter("frozen").requires_grad_(False)
    ema = EMA(holder, 0.9999)
    for step in (1, 2, 3):
        for name in names:
            holder.get_parameter(name.replace(".", "_")).data.copy_(values[f"w{step}/{name}"])
        ema.update(holder)
        for name in set(names) - {"frozen"}:
            wanted = golden.outputs("default")[f"after{step}/{name.replace('.', '')}"]
            torch.testing.assert_close(
                ema.shadow[name.replace(".", "_")], wanted, rtol=0, atol=1e-6
            )
    assert ema.updates == 3
    assert "frozen" not in ema.shadow


def test_applied_weights_are_taken_back() -> None:
    module = nn.Linear(2, 2)
    before = module.weight.detach().clone()
    ema = EMA(module)
    ema.shadow["weight"].zero_()
    with ema.apply_to(module):
        assert module.weight.abs().max() == 0
    assert torch.equal(module.weight, before)
