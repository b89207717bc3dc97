"""The EMA of weights."""

import torch
from torch import nn

from goldfile import load_golden
from ldm.train.optim.ema import EMA


def test_three_updates_equal_the_originals() -> None:
    golden = load_golden("ema")
    inputs, expected = golden.inputs("default"), golden.outputs("default")
    module = nn.Module()
    initial = {k.removeprefix("w0/"): v for k, v in inputs.items() if k.startswith("w0/")}
    for name, value in initial.items():
        module.register_parameter(name.replace(".", "_"), nn.Parameter(value.clone()))
    module.get_parameter("frozen").requires_grad_(False)
    ema = EMA(module, 0.9999)
    assert "frozen" not in ema.shadow
    for step in (1, 2, 3):
        for name in initial:
            module.get_parameter(name.replace(".", "_")).data.copy_(inputs[f"w{step}/{name}"])
        ema.update(module)
        for name in initial.keys() - {"frozen"}:
            average = expected[f"after{step}/{name.replace('.', '')}"]
            shadow = ema.shadow[name.replace(".", "_")]
            torch.testing.assert_close(shadow, average, rtol=0, atol=1e-6)
    assert ema.num_updates == 3


def test_weights_are_restored_after_ema_was_applied() -> None:
    module = nn.Linear(2, 2)
    before = module.weight.detach().clone()
    ema = EMA(module)
    ema.shadow["weight"].zero_()
    with ema.apply_to(module):
        assert module.weight.abs().max() == 0
    assert torch.equal(module.weight, before)
