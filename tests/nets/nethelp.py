"""Tiny networks, networks of golden files, and names and shapes of the original's parameters."""

import gzip
from pathlib import Path

import torch

from ldm.nets.autoencoder import AutoencoderKL
from ldm.nets.unet import UNet

KEYS = Path(__file__).parents[1] / "data" / "keys"
TINY_UNET = {
    "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 1,
    "channel_mult": [1, 2], "attention_resolutions": [1, 2], "num_head_channels": 16,
    "use_spatial_transformer": True, "use_linear_in_transformer": True, "context_dim": 24,
    "legacy": False,
}  # fmt: skip


def build_network(network_class, config):
    params = {k: v for k, v in config["params"].items() if k not in network_class.IGNORED_PARAMS}
    return network_class(**params).eval()


def build_golden_network(golden, network_class, config=None, prefix=""):
    """Build the network of a golden file, with its weights."""
    net = build_network(network_class, config or golden.meta["config"])
    net.load_state_dict(golden.weights(net.state_dict(), prefix))
    return net


def build_tiny_unet(**changes):
    """Build a small UNet; layers that start at zero get random weights."""
    torch.manual_seed(0)
    unet = UNet(**{**TINY_UNET, **changes})
    for parameter in unet.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    return unet.eval()


def build_tiny_autoencoder(**changes):
    torch.manual_seed(0)
    ddconfig = {"ch": 32, "ch_mult": [1, 2, 2], "num_res_blocks": 1, "z_channels": 4, **changes}
    return AutoencoderKL(ddconfig=ddconfig, embed_dim=4).eval()


def make_noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_tiny_inputs():
    """Make latents, timesteps and a context for `build_tiny_unet`."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    return x, torch.tensor([0, 400]), torch.randn(2, 5, 24, generator=generator)


def assert_close(ours, theirs, *, tolerance=1e-4):
    """Compare relative to the largest value."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert (ours - theirs).abs().max().item() <= tolerance * max(1.0, theirs.abs().max().item())


def read_original_tensors(name):
    """Read {name: [shape, dtype]} of the original's full-size model; some files have no dtypes."""
    (path,) = KEYS.glob(f"{name}.txt*")
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        fields = [line.split() for line in file]
    return {
        name: [[int(n) for n in shape.split("x") if n != "-"], *dtype]
        for name, shape, *dtype in fields
    }


def read_original_shapes(name):
    return {key: shape for key, (shape, *_) in read_original_tensors(name).items()}


def describe_tensors(state):
    """Describe tensors as `read_original_tensors` does."""
    return {
        name: [list(value.shape), str(value.dtype).removeprefix("torch.")]
        for name, value in state.items()
    }


def get_shapes(network):
    return {key: list(value.shape) for key, value in network.state_dict().items()}
