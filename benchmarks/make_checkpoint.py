r"""Writes a full-size checkpoint of random weights in the original's layout, in seconds.

python benchmarks/make_checkpoint.py /tmp/sd2.ckpt                                    # 5.2 GB
python benchmarks/make_checkpoint.py /tmp/sd2-fp16.safetensors --dtype float16        # 2.6 GB
python benchmarks/make_checkpoint.py /tmp/sd1.ckpt --ema --config \
    configs/stable-diffusion/v1-inference.yaml
python benchmarks/make_checkpoint.py /tmp/unclip-l.safetensors --karlo --dtype float16 --config \
    configs/stable-diffusion/v2-1-stable-unclip-l-inference.yaml    # and KARLO's files beside it

A `.ckpt` is a Lightning dictionary as the published ones are: callbacks keyed by a class, numpy
scalars, an optimizer state. Names and shapes come from the config, values from one block of normal
numbers, scaled so that activations stay finite. Needs as much memory as the file is large.
"""

import argparse
import math
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.loading.build import build_on_meta
from ldm.loading.config import read_yaml
from ldm.loading.files.checkpoint import write_checkpoint
from ldm.loading.legacy import restore_names, translate_config
from ldm.model import LatentDiffusion
from ldm.nets.karlo import Prior

KARLO = ("prior-ckpt-step=01000000-of-01000000.ckpt", "ViT-L-14_stats.th")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="name ending in .ckpt or .safetensors")
    parser.add_argument("--config", default="configs/stable-diffusion/v2-inference.yaml")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--ema", action="store_true", help="averaged weights of the UNet as well")
    parser.add_argument("--karlo", action="store_true", help="Karlo's files, in the same folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)

    model = build_on_meta(translate_config(read_yaml(args.config)), where=args.config)
    if not isinstance(model, LatentDiffusion):
        parser.error(f"`{args.config}` is not the config of a latent diffusion model")
    state = original_layout(model, dtype=dtype, seed=args.seed)
    if args.ema:
        state |= averages(state)
    if args.out.suffix == ".ckpt":
        torch.save(lightning(state), args.out)
    else:
        write_checkpoint(args.out, state)
    if args.karlo:
        karlo(args.out.parent, dtype=dtype, seed=args.seed)
    print(args.out)


def original_layout(
    model: LatentDiffusion, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """Random weights of a model on the meta device, schedule tables included, by original names."""
    names = restore_names(model.state_dict(), model.schedule.buffers())
    return filled(names, dtype=dtype, seed=seed)


def karlo(folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
    """Writes the files that unCLIP-L borrows from Karlo, in the layout and under the names of it.

    Random weights of the prior; statistics that say mean 0, deviation 1.
    """
    with torch.device("meta"):
        names = Prior().state_dict()
    torch.save({"state_dict": filled(names, dtype=dtype, seed=seed)}, folder / KARLO[0])
    torch.save((torch.zeros(1, 768), torch.ones(1, 768)), folder / KARLO[1])


def filled(
    names: dict[str, Tensor], *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """Random weights in place of the tensors that are on the meta device."""
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(1 << 22, generator=generator)
    return {
        name: value if not value.is_meta else _random(name, value, block, generator).to(dtype)
        for name, value in names.items()
    }


def averages(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The `model_ema.` tensors that go with the UNet's: its weights, a little larger."""
    named = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): value * 1.01
        for name, value in state.items()
        if name.startswith("model.")
    }
    return named | {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(1000, dtype=torch.int32),
    }


def lightning(state: dict[str, Tensor]) -> dict[object, object]:
    """The dictionary that a trainer of 2022 would have saved."""
    module = "pytorch_lightning.callbacks.model_checkpoint"
    callback = type("ModelCheckpoint", (), {"__module__": module})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules[module].ModelCheckpoint = callback  # type: ignore[attr-defined]
    score = np.float64(0.14)
    moments = {"step": 875000, "exp_avg": torch.zeros(8), "exp_avg_sq": torch.zeros(8)}
    return {
        "epoch": 11,
        "global_step": 875000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": state,
        "callbacks": {callback: {"monitor": "val/loss", "best_model_score": score}},
        "optimizer_states": [{"state": {0: moments}, "param_groups": [{"lr": 1e-4}]}],
        "lr_schedulers": [{"base_lrs": [1e-4], "last_epoch": 1, "_last_lr": [np.float64(1e-4)]}],
    }


def _random(name: str, like: Tensor, block: Tensor, generator: torch.Generator) -> Tensor:
    start = int(torch.randint(len(block) // 2, (), generator=generator))
    count = like.numel()
    values = block[start:].repeat(-(-count // (len(block) - start)))[:count].view(like.shape)
    if like.dim() > 1:
        return values / math.sqrt(like[0].numel())
    return 1 + 0.02 * values if name.endswith("weight") else 0.02 * values


if __name__ == "__main__":
    main()
