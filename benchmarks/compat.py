"""Sampling by the original's classes, timed against diffusers.

    python benchmarks/compat.py                 # Stable Diffusion 1 at 256x256, 4 steps
    python benchmarks/compat.py --channels 64   # few channels: mostly Python's overhead
    python benchmarks/compat.py --device cuda --dtype float16 --side 64 --steps 20

`UNetModel` is sampled by `DDIMSampler`, and diffusers' `UNet2DConditionModel` with the same weights
by `DDIMScheduler`, both with guidance. Runs alternate; `ratio` is the time of diffusers divided by
that of the original's classes: the median over pairs of runs, and the range.
"""

import argparse
import statistics
from collections.abc import Callable
from types import SimpleNamespace

import diffusers
import harness
import torch
from torch import Tensor

from ldm.loading.diffusers.locations import convert_to_diffusers, locate_unet

SD1_UNET_CONFIG = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "num_res_blocks": 2, "num_heads": 8,
    "attention_resolutions": [4, 2, 1], "channel_mult": [1, 2, 4, 4], "context_dim": 768,
    "use_spatial_transformer": True, "legacy": False,
}  # fmt: skip
GUIDANCE_SCALE = 7.5


def main() -> None:
    parser = harness.make_plain_parser(__doc__)
    add = parser.add_argument
    add("--channels", type=int, default=320, help="channels of the first level")
    add("--side", type=int, default=32, help="height and width of the latent")
    add("--steps", type=int, default=4)
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--device", type=torch.device, default=torch.device("cpu"))
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sample_functions = build_samplers(args)
    x, y = (sample().float() for sample in sample_functions)  # the warm-up
    difference = ((x - y).norm() / y.norm()).item()
    times = harness.measure_alternating(sample_functions, args.rounds, args.device)
    ratios = [baseline / ours for ours, baseline in zip(*times, strict=True)]
    compat, baseline = map(statistics.median, times)
    print(f"original's classes {compat:.2f} s, diffusers {baseline:.2f} s, {args.steps} steps")
    print(
        f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} ... {max(ratios):.3f}), "
        f"relative difference {difference:.1e}"
    )


def build_samplers(args: argparse.Namespace) -> list[Callable[[], Tensor]]:
    """Return a function that samples by the original's classes, and one by diffusers."""
    from ldm.models.diffusion.ddim import DDIMSampler
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    unet = UNetModel(**SD1_UNET_CONFIG, model_channels=args.channels).to(args.device, dtype).eval()
    unet.dtype = dtype
    for parameter in unet.parameters():
        if parameter.count_nonzero() == 0:
            torch.nn.init.normal_(parameter, std=0.02)
    channels = [args.channels * mult for mult in SD1_UNET_CONFIG["channel_mult"]]
    context_dim = SD1_UNET_CONFIG["context_dim"]
    with torch.device("meta"):
        diffusers_unet = diffusers.UNet2DConditionModel(
            block_out_channels=channels, cross_attention_dim=context_dim
        )
    weights = unet.state_dict()
    diffusers_weights = convert_to_diffusers(locate_unet(weights), weights)
    diffusers_unet.load_state_dict(diffusers_weights, assign=True)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        clip_sample=False, set_alpha_to_one=False,
    )  # fmt: skip
    alphas = scheduler.alphas_cumprod.to(args.device)
    model = SimpleNamespace(
        apply_model=unet, parameterization="eps", device=args.device, num_timesteps=1000,
        betas=scheduler.betas.to(args.device), alphas_cumprod=alphas,
        alphas_cumprod_prev=torch.cat([alphas.new_ones(1), alphas[:-1]]),
    )  # fmt: skip
    shape = (4, args.side, args.side)
    noise = torch.randn(1, *shape, device=args.device, dtype=dtype)
    context = torch.randn(2, 77, context_dim, device=args.device, dtype=dtype)

    def sample_by_original_classes() -> Tensor:
        return DDIMSampler(model).sample(
            args.steps, 1, shape, context[1:], verbose=False, x_T=noise,
            unconditional_guidance_scale=GUIDANCE_SCALE, unconditional_conditioning=context[:1],
        )[0]  # fmt: skip

    @torch.no_grad()
    def sample_by_diffusers() -> Tensor:
        z = noise
        scheduler.set_timesteps(args.steps, device=args.device)
        for t in scheduler.timesteps:
            output = diffusers_unet(torch.cat([z, z]), t, context).sample
            uncond, cond = output.chunk(2)
            guided = uncond + GUIDANCE_SCALE * (cond - uncond)
            z = scheduler.step(guided, t, z).prev_sample
        return z

    return [sample_by_original_classes, sample_by_diffusers]


if __name__ == "__main__":
    main()
