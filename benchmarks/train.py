"""One step of training beside diffusers' `train_text_to_image`: images per second and memory.

python benchmarks/train.py                                   # tiny and demo size: two minutes
python benchmarks/train.py --size sd2 --dtype float32 bfloat16 --no-ema
python benchmarks/train.py --device cuda --size sd2 --dtype bfloat16 --side 64

Both sides train the same UNet from the same weights, on latents and text embeddings that are at
hand: noise, forward, mean squared error, backward, clipping, AdamW, running average (EMA). Theirs
is the logic of diffusers' example, with its defaults, on its UNet2DConditionModel, DDPMScheduler
and EMAModel; bfloat16 is autocast over float32 weights, on both sides.

Each side has a process of its own. First the loss of one batch must agree, within 1e-4 in float32
and 2 % in bfloat16. After three steps, in which memory is taken from the system, come steps of
ours, theirs, theirs, ours …; a ratio is their time by ours of neighbours, the median of all with
its range. Models of 865 million weights are not held side by side: there, one process does three
steps, then another. Time is the CPU's, with one thread; peak is the largest resident size. Both
run with the allocator set as our scripts set it. On a GPU time is the wall's and memory is torch's.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from run import clock, peak, processor  # noqa: E402

from ldm.conditioning import Cond, Conditioner, Encoder  # noqa: E402
from ldm.loading.config import instantiate, read_yaml  # noqa: E402
from ldm.loading.legacy import translate_config  # noqa: E402
from ldm.model import LatentDiffusion  # noqa: E402
from ldm.nets import cpu  # noqa: E402
from ldm.nets.autoencoder import PixelSpace  # noqa: E402
from ldm.train import memory  # noqa: E402
from ldm.train.optim import optimizers  # noqa: E402
from ldm.train.optim.ema import EMA  # noqa: E402
from ldm.train.tasks.diffusion import Diffusion  # noqa: E402

SIDES = ("ours", "theirs")
GATE = {"float32": 1e-4, "bfloat16": 2e-2}
FIRST = 3  # steps that are not counted


@dataclass(frozen=True)
class Size:
    """A UNet as in a config, and the batch that it is trained on."""

    config: str
    batch: int
    side: int
    is_large: bool = False


SIZES = {
    "tiny": Size("configs/train/tiny.yaml", 8, 8),
    "demo": Size("configs/demo/text2img.yaml", 8, 16),
    "sd2": Size("configs/stable-diffusion/v2-inference.yaml", 1, 32, is_large=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--size", nargs="+", choices=SIZES, default=["tiny", "demo"])
    add("--dtype", nargs="+", choices=GATE, default=["float32"])
    add("--device", type=torch.device, default=torch.device("cpu"), help="cpu, cuda, cuda:1 …")
    add("--rounds", type=int, default=5)
    add("--no-ema", action="store_true", help="without averages, which take 3.5 GB at size sd2")
    add("--side", type=int, help="of the latent (the size's own)")
    add("--threads", type=int, default=1)
    add("--json", type=Path, metavar="FILE", help="write all samples there")
    add("--worker", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    name = processor(args.device)
    print(f"{name}, {args.threads} threads, torch {torch.__version__}", flush=True)
    rows = [compare(args, size, dtype) for size in args.size for dtype in args.dtype]
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


def compare(args: argparse.Namespace, size: str, dtype: str) -> dict[str, Any]:
    """One row, printed as soon as it is known."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    peaks: dict[str, float] = {}
    losses: dict[str, float] = {}
    held: dict[str, Worker] = {}
    for number in range(args.rounds):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            worker = held.get(side) or Worker(args, side, size, dtype)
            losses[side] = worker.loss
            if not SIZES[size].is_large:
                held[side] = worker
            if len(losses) == 2:
                check(losses, dtype)
            steps = 3 if SIZES[size].is_large else 1
            seconds[side] += [worker.step() for _ in range(steps)]
            peaks[side] = max(peaks.get(side, 0.0), worker.peak)
            if side not in held:
                worker.close()
    for worker in held.values():
        worker.close()
    ratios = [theirs / ours for ours, theirs in zip(*seconds.values(), strict=True)]
    row = {"size": size, "dtype": dtype, "ema": not args.no_ema, "batch": SIZES[size].batch}
    row |= {"seconds": seconds, "ratios": ratios, "peak_gib": peaks, "losses": losses}
    print(line(row), flush=True)
    return row


def check(losses: dict[str, float], dtype: str) -> None:
    ours, theirs = losses["ours"], losses["theirs"]
    if not abs(ours - theirs) <= GATE[dtype] * theirs:
        raise SystemExit(f"the loss of one batch is {ours:.6f}, theirs {theirs:.6f}")


def line(row: dict[str, Any]) -> str:
    rates = {side: row["batch"] / statistics.median(row["seconds"][side]) for side in SIDES}
    ratios, peaks = row["ratios"], row["peak_gib"]
    return (
        f"{row['size']:5} {row['dtype']:9} images/s: diffusers {rates['theirs']:8.3f}  ours "
        f"{rates['ours']:8.3f}  ratio {statistics.median(ratios):.2f} "
        f"[{min(ratios):.2f}-{max(ratios):.2f}]  peak GiB: {peaks['theirs']:.2f} and "
        f"{peaks['ours']:.2f}  {'with' if row['ema'] else 'without'} EMA"
    )


class Worker:
    """One side in a process of its own, after its first steps; `loss` of the agreed batch."""

    def __init__(self, args: argparse.Namespace, side: str, size: str, dtype: str) -> None:
        words = ["--worker", side, "--size", size, "--dtype", dtype]
        words += ["--threads", str(args.threads), "--device", str(args.device)]
        words += ["--no-ema"] * args.no_ema
        words += ["--side", str(args.side)] if args.side else []
        self.process = subprocess.Popen(
            [sys.executable, __file__, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.peak = 0.0
        self.loss = self._told()["loss"]

    def step(self) -> float:
        """Seconds of a step."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        told = self._told()
        self.peak = told["peak"]
        return told["seconds"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _told(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a process ended with status {self.process.wait()}")
        return json.loads(line)


def work(args: argparse.Namespace) -> None:
    """A worker: the agreed loss, first steps, then a step for every line that comes in."""
    torch.set_num_threads(args.threads)
    cpu.keep_memory()
    torch.backends.cudnn.allow_tf32 = False
    size, device, now = SIZES[args.size[0]], args.device, clock(args.device)
    torch.manual_seed(0)
    model = model_of(size).to(device)
    side = args.side or size.side
    z, noise = torch.randn(2, size.batch, 4, side, side)
    t = torch.linspace(50, 950, size.batch).long()
    context = torch.randn(size.batch, 77, model.unet.context_dim)
    dtype = getattr(torch, args.dtype[0])
    make = {"ours": ours, "theirs": theirs}[args.worker]
    batch = Batch(z.to(device), context.to(device), noise.to(device), t.to(device))
    loss, step = make(model, batch, not args.no_ema)
    del model
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        agreed = float(loss().detach())  # not without gradients: weights would be packed for that
        for _ in range(FIRST):
            step()
        print(json.dumps({"loss": agreed}), flush=True)
        for _ in sys.stdin:
            begin = now()
            step()
            seconds = now() - begin
            print(json.dumps({"seconds": seconds, "peak": peak(device)}), flush=True)


@dataclass(frozen=True)
class Batch:
    """Latents (B, 4, h, w), text embeddings (B, 77, D); noise and timesteps of the agreed loss."""

    z: Tensor
    context: Tensor
    noise: Tensor
    t: Tensor


class Given(Encoder):
    """In place of a text encoder: embeddings that are at hand."""

    slot, key = "crossattn", "txt"

    def forward(self, context: Tensor) -> Tensor:
        return context


def model_of(size: Size) -> Any:
    spec = translate_config(read_yaml(size.config))["params"]
    with torch.device("meta"):
        unet: Any = instantiate(spec["unet"], where="unet")
    filled(unet.to_empty(device="cpu"))
    memory.checkpoint_gradients(unet, on=False)  # as theirs; SD 2's config asks for it
    schedule = instantiate(spec["schedule"], where="schedule")
    predicts, conditioner = spec["parameterization"], Conditioner(text=Given())
    parts = {"unet": unet, "conditioner": conditioner, "autoencoder": PixelSpace()}
    return LatentDiffusion(**parts, schedule=schedule, parameterization=predicts).train()


def filled(unet: nn.Module) -> None:
    """Weights of about the size that training starts with, none of them zero, in little time."""
    block = torch.randn(1 << 20)
    for p in unet.parameters():
        numbers = block.repeat(-(-p.numel() // len(block)))[: p.numel()].view(p.shape)
        p.data = numbers / p[0].numel() ** 0.5 if p.dim() > 1 else 1 + 0.1 * numbers


def ours(model: Any, batch: Batch, ema: bool) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    """As `ldm.train.loop` does it."""
    task, generator = Diffusion(model, drop=0.0), torch.Generator().manual_seed(0)
    optimizer = optimizers.make(task.trained, 1e-5)
    average = EMA(task.trained) if ema else None
    cond = Cond(crossattn=batch.context)

    def loss() -> Tensor:
        error = model.denoiser.error(batch.z, cond, batch.t, batch.noise)
        return task.criterion(error, batch.t.cpu())["loss"]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        task.loss({"z": batch.z, "txt": batch.context}, generator)["loss"].backward()
        gradients = [p.grad for p in task.trained.parameters() if p.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients))
        if norm > 1.0:
            torch._foreach_mul_(gradients, 1.0 / (norm + 1e-6))
        optimizer.step()
        if average is not None:
            average.update(task.trained)

    return loss, step


def theirs(model: Any, batch: Batch, ema: bool) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    """As diffusers' examples/text_to_image does it, without accelerate's wrapping."""
    import opponents
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    predicts = {"eps": "epsilon", "v": "v_prediction"}[model.parameterization]
    scheduler: Any = DDPMScheduler(
        trained_betas=model.schedule.betas.cpu().numpy(), prediction_type=predicts
    )
    unet: Any = opponents.unet_like(model.unet).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, weight_decay=1e-2)
    average = EMAModel(unet.parameters(), decay=0.9999) if ema else None

    def loss_of(noise: Tensor, t: Tensor) -> Tensor:
        noisy = scheduler.add_noise(batch.z, noise, t)
        wanted = noise
        if predicts == "v_prediction":
            wanted = scheduler.get_velocity(batch.z, noise, t)
        prediction = unet(noisy, t, batch.context, return_dict=False)[0]
        return F.mse_loss(prediction.float(), wanted.float(), reduction="mean")

    def step() -> None:
        noise = torch.randn_like(batch.z)
        loss_of(noise, torch.randint_like(batch.t, 0, 1000)).backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if average is not None:
            average.step(unet.parameters())

    return lambda: loss_of(batch.noise, batch.t), step


if __name__ == "__main__":
    main()
