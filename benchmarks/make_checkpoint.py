"""Write a full-size checkpoint of random weights in the original's layout, in seconds.

    python benchmarks/make_checkpoint.py /tmp/sd2.ckpt                                # 5.2 GB
    python benchmarks/make_checkpoint.py /tmp/sd2-fp16.safetensors --dtype float16    # 2.6 GB
    python benchmarks/make_checkpoint.py /tmp/unclip-l.safetensors --karlo \\
        --config configs/stable-diffusion/v2-1-stable-unclip-l-inference.yaml

Names and shapes follow from the config. Weights are slices of one block of normal noise, which is
fast, scaled so that activations stay finite. The checkpoint has to fit into memory.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import harness
import torch
from harness import ROOT
from torch import Tensor

from ldm.loading.buffers import make_buffers
from ldm.loading.build import build_on_meta
from ldm.loading.config import read_yaml
from ldm.loading.files.checkpoint import write_checkpoint
from ldm.loading.legacy import translate_config
from ldm.loading.weight_names import restore_names
from ldm.model import LatentDiffusion
from ldm.nets.karlo import Prior

KARLO_PRIOR = "prior-ckpt-step=01000000-of-01000000.ckpt"
KARLO_STATISTICS = "ViT-L-14_stats.th"


def main() -> None:
    parser = harness.make_plain_parser(__doc__)
    add = parser.add_argument
    add("out", type=Path, help="name ending in .ckpt or .safetensors")
    add("--config", default=ROOT / "configs/stable-diffusion/v2-inference.yaml")
    add("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    add("--karlo", action="store_true", help="also the files of Karlo that unCLIP-L needs")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    model = build_on_meta(translate_config(read_yaml(args.config)), where=str(args.config))
    if not isinstance(model, LatentDiffusion):
        parser.error(f"`{args.config}` is not the config of a latent diffusion model")
    weights = draw_weights(restore_names(model.state_dict(), make_buffers(model)), dtype)
    if args.out.suffix == ".ckpt":
        torch.save({"epoch": 11, "global_step": 875000, "state_dict": weights}, args.out)
    else:
        write_checkpoint(args.out, weights)
    if args.karlo:
        with torch.device("meta"):
            prior = Prior().state_dict()
        torch.save({"state_dict": draw_weights(prior, dtype)}, args.out.parent / KARLO_PRIOR)
        mean, std = torch.zeros(1, 768), torch.ones(1, 768)
        torch.save((mean, std), args.out.parent / KARLO_STATISTICS)
    print(args.out)


def draw_weights(state_dict: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Replace tensors on the meta device by random weights of a dtype, and keep other tensors."""
    generator = torch.Generator().manual_seed(0)
    noise_block = torch.randn(1 << 22, generator=generator)

    def draw_weight(name: str, weight: Tensor) -> Tensor:
        start = int(torch.randint(len(noise_block) // 2, (), generator=generator))
        repeats = math.ceil(weight.numel() / (len(noise_block) - start))
        noise = noise_block[start:].repeat(repeats)[: weight.numel()].view(weight.shape)
        if weight.dim() > 1:
            return noise / math.sqrt(weight[0].numel())
        return 1 + 0.02 * noise if name.endswith("weight") else 0.02 * noise

    return {
        name: draw_weight(name, tensor).to(dtype) if tensor.is_meta else tensor
        for name, tensor in state_dict.items()
    }


if __name__ == "__main__":
    main()
