"""Time and memory of a training step, against diffusers' `train_text_to_image` or another revision.

    python benchmarks/train.py                                   # sizes tiny and demo: two minutes
    python benchmarks/train.py --size sd2 --dtype float32 bfloat16 --no-ema
    python benchmarks/train.py --device cuda --size sd2 --dtype bfloat16 --side 64
    python benchmarks/train.py --against /tmp/before             # another checkout

Both train the same UNet from the same weights on precomputed latents and text embeddings: noise,
forward, mean squared error, backward, gradient clipping, AdamW, EMA. The baseline is diffusers'
example with its defaults: UNet2DConditionModel, DDPMScheduler, EMAModel. In bfloat16 both use
autocast with float32 weights. Another checkout runs its own train.py.

The losses of one batch must agree, within 1e-4 in float32 and 2 % in bfloat16. After three warm-up
steps, measurements alternate: ours, the baseline, the baseline, ours …; run.py describes the
columns. On a CPU two models of size sd2 (865 million parameters each) do not fit into memory, so
that only one worker runs at a time.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import harness
import torch
import torch.nn.functional as F
from harness import ROOT, Implementation, WarmUpResult, Worker
from make_checkpoint import draw_weights
from torch import Tensor, nn

from ldm.conditioning import Cond, Conditioner, Encoder
from ldm.loading.config import instantiate, read_yaml
from ldm.loading.legacy import translate_config
from ldm.model import LatentDiffusion
from ldm.nets.autoencoder import PixelSpace
from ldm.train.build import set_gradient_checkpointing
from ldm.train.optim.ema import EMA
from ldm.train.optim.optimizers import make_optimizer
from ldm.train.tasks.diffusion import DiffusionTask

LOSS_TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}  # relative
NUM_WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Workload:
    """What to train: a config, the batch size, and height and width of the latents."""

    config: str
    batch_size: int
    side: int


WORKLOADS = {
    "tiny": Workload("configs/train/tiny.yaml", 8, 8),
    "demo": Workload("configs/demo/text2img.yaml", 8, 16),
    "sd2": Workload("configs/stable-diffusion/v2-inference.yaml", 1, 32),
}


@dataclass(frozen=True)
class Batch:
    """Latents (B, 4, h, w), contexts (B, 77, D), and noise and timesteps for `compute_loss`."""

    z: Tensor
    context: Tensor
    noise: Tensor
    t: Tensor


# compute_loss, with the noise and timesteps of a `Batch`, and train_step, with random ones
TrainingFunctions = tuple[Callable[[], Tensor], Callable[[], None]]


def main() -> None:
    parser = harness.make_parser(__doc__, dtypes=LOSS_TOLERANCES, threads=1)
    add = parser.add_argument
    add("--size", nargs="+", choices=WORKLOADS, default=["tiny", "demo"])
    add("--no-ema", action="store_true", help="train without EMA, which takes 3.5 GB at size sd2")
    add("--side", type=int, help="height and width of the latents (by size)")
    args = parser.parse_args()
    harness.configure_torch(args)
    if args.worker:
        return run_worker(args)
    print(harness.describe_machine(args), flush=True)
    rows = [compare(args, size, dtype) for size in args.size for dtype in args.dtype]
    harness.report(args, rows)


def compare(args: argparse.Namespace, size: str, dtype: str) -> dict[str, Any]:
    """Compare one size in one dtype; print and return its row."""

    def start_worker(implementation: Implementation) -> Worker:
        flags = ["--size", size, "--dtype", dtype, *(["--no-ema"] if args.no_ema else [])]
        flags += ["--side", args.side] if args.side else []
        return Worker(implementation, implementation.root / "benchmarks/train.py", args, *flags)

    def compare_results(ours: WarmUpResult, baseline: WarmUpResult) -> dict[str, float]:
        loss, baseline_loss = ours["loss"], baseline["loss"]
        if not abs(loss - baseline_loss) <= LOSS_TOLERANCES[dtype] * baseline_loss:
            raise SystemExit(f"{size}: loss {loss:.6f}, the baseline's is {baseline_loss:.6f}")
        return {"loss": loss, "baseline_loss": baseline_loss}

    row: dict[str, Any] = {"stage": f"train {size}", "dtype": dtype, "ema": not args.no_ema}
    row |= harness.compare(
        start_worker,
        harness.get_implementations(args),
        compare_results,
        rounds=args.rounds,
        both_fit=size != "sd2" or args.device.type == "cuda",
    )
    row["batch"] = WORKLOADS[size].batch_size
    ema = "without EMA" if args.no_ema else "with EMA"
    print(f"{size:5} {dtype:8} batch {row['batch']}  {harness.format_row(row)}  {ema}", flush=True)
    return row


def run_worker(args: argparse.Namespace) -> None:
    """In the worker process: compute the loss of a batch, warm up, serve timed steps."""
    workload, device, dtype = WORKLOADS[args.size[0]], args.device, getattr(torch, args.dtype[0])
    torch.manual_seed(0)
    model = build_model(workload.config).to(device)
    side = args.side or workload.side
    z, noise = torch.randn(2, workload.batch_size, 4, side, side)
    t = torch.linspace(50, 950, workload.batch_size).long()
    context = torch.randn(workload.batch_size, 77, model.unet.context_dim)
    batch = Batch(z.to(device), context.to(device), noise.to(device), t.to(device))
    build = {"ours": build_ours, "diffusers": build_diffusers}[args.worker]
    compute_loss, train_step = build(model, batch, not args.no_ema)
    del model
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        # Not under no_grad, which would pack the weights for inference
        loss = float(compute_loss().detach())
        for _ in range(NUM_WARM_UP_STEPS):
            train_step()
        harness.serve({"loss": loss}, train_step, device)


class PrecomputedContext(Encoder):
    """Replaces the text encoder: returns the contexts of the batch."""

    slot, key = "crossattn", "txt"

    def forward(self, context: Tensor) -> Tensor:
        return context


def build_model(config: str) -> Any:
    """Build a model with the UNet and the noise schedule of a config, and random weights."""
    params = translate_config(read_yaml(ROOT / config))["params"]
    with torch.device("meta"):
        unet: Any = instantiate(params["unet"], where="unet")
    unet.load_state_dict(draw_weights(unet.state_dict(), torch.float32), assign=True)
    # Disabled as in the baseline; the config of SD 2 enables it.
    set_gradient_checkpointing(unet, enabled=False)
    schedule = instantiate(params["schedule"], where="schedule")
    model = LatentDiffusion(
        unet=unet,
        conditioner=Conditioner(text=PrecomputedContext()),
        autoencoder=PixelSpace(),
        schedule=schedule,
        parameterization=params["parameterization"],
    )
    return model.train()


def build_ours(model: Any, batch: Batch, use_ema: bool) -> TrainingFunctions:
    """Return the functions of our training loop."""
    task = DiffusionTask(model, conditioning_dropout_prob=0.0)
    generator = torch.Generator().manual_seed(0)
    optimizer = make_optimizer(task.trainable, 1e-5)
    ema = EMA(task.trainable) if use_ema else None
    cond = Cond(crossattn=batch.context)

    def compute_loss() -> Tensor:
        error = model.denoiser.compute_error(batch.z, cond, batch.t, batch.noise)
        return task.criterion(error, batch.t.cpu())["loss"]

    def train_step() -> None:
        optimizer.zero_grad(set_to_none=True)
        task.loss({"z": batch.z, "txt": batch.context}, generator)["loss"].backward()
        gradients = [p.grad for p in task.trainable.parameters() if p.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients))
        if norm > 1.0:
            torch._foreach_mul_(gradients, 1.0 / (norm + 1e-6))
        optimizer.step()
        if ema is not None:
            ema.update(task.trainable)

    return compute_loss, train_step


def build_diffusers(model: Any, batch: Batch, use_ema: bool) -> TrainingFunctions:
    """Return the functions of diffusers' examples/text_to_image, without accelerate."""
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from diffusers.training_utils import EMAModel

    from ldm.loading.diffusers.locations import convert_to_diffusers, locate_unet
    from ldm.loading.diffusers.networks import make_unet_config

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(make_unet_config(model.unet, 64))
    weights = {name: value.detach() for name, value in model.unet.state_dict().items()}
    unet.load_state_dict(convert_to_diffusers(locate_unet(weights), weights), assign=True)
    unet.requires_grad_(True).train()
    prediction_type = {"eps": "epsilon", "v": "v_prediction"}[model.parameterization]
    scheduler: Any = DDPMScheduler(
        trained_betas=model.schedule.betas.cpu().numpy(), prediction_type=prediction_type
    )
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, weight_decay=1e-2)
    ema = EMAModel(unet.parameters(), decay=0.9999) if use_ema else None

    def compute_loss(noise: Tensor, t: Tensor) -> Tensor:
        noisy = scheduler.add_noise(batch.z, noise, t)
        target = noise
        if prediction_type == "v_prediction":
            target = scheduler.get_velocity(batch.z, noise, t)
        prediction = unet(noisy, t, batch.context, return_dict=False)[0]
        return F.mse_loss(prediction.float(), target.float(), reduction="mean")

    def train_step() -> None:
        noise = torch.randn_like(batch.z)
        compute_loss(noise, torch.randint_like(batch.t, 0, 1000)).backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.step(unet.parameters())

    return lambda: compute_loss(batch.noise, batch.t), train_step


if __name__ == "__main__":
    main()
