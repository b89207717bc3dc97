"""Time of guidance methods and stochastic samplers, against diffusers or another revision.

    python benchmarks/guidance.py                        # against diffusers
    git worktree add /tmp/before main && python benchmarks/guidance.py --against /tmp/before

A stage samples a latent with a UNet of Stable Diffusion 1 with random weights: `plain` by DDIM with
guidance, `pag` and `freeu` by the same with PAG or FreeU, the others by samplers that add noise.
Both implementations evaluate the UNet the same number of times; text encoder and decoder are not
timed. Where both draw the same noise, their latents must agree. `ratio` is the baseline's time
divided by ours, as in `run.py`. DPM++ SDE is compared with diffusers' single-step solver, as its
multistep solver needs torchsde.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from harness import ROOT, Implementation, WarmUpResult, Worker
from torch import Tensor

NUM_STEPS = 4
GUIDANCE_SCALE = 7.5
PAG_SCALE = 3.0
FREEU_FACTORS = (1.2, 1.4, 0.9, 0.2)  # b1, b2, s1, s2
DETERMINISTIC_STAGES = ("plain", "pag", "freeu")  # both implementations start from the same noise
NEW_STAGES = ("pag", "freeu")  # missing in older revisions
# Our sampler -> scheduler of diffusers, its order, and its number of steps
SDE_SCHEDULERS = {
    "dpmpp_sde": ("DPMSolverSinglestepScheduler", 2, 2 * NUM_STEPS - 1),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", 2, NUM_STEPS),
    "dpmpp_3m_sde": ("DPMSolverMultistepScheduler", 3, NUM_STEPS),
}
STAGES = (*DETERMINISTIC_STAGES, *SDE_SCHEDULERS)
MAX_ERROR = 1e-3  # largest difference of latents, relative to their largest value
SampleFunction = Callable[[], Tensor]


def main() -> None:
    parser = harness.make_parser(__doc__, dtypes=["float32"], threads=1)
    add = parser.add_argument
    add("--stage", nargs="+", choices=STAGES, help="all; without pag and freeu if --against")
    add("--side", type=int, default=32, help="height and width of the latent (%(default)s)")
    add("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    harness.configure_torch(args)
    if args.worker:
        return run_worker(args)
    print(harness.describe_machine(args), flush=True)
    excluded = () if args.against == "diffusers" else NEW_STAGES
    stages = args.stage or [stage for stage in STAGES if stage not in excluded]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        write_model(args.folder)
        for stage in stages:
            rows.append(compare(args, stage))
    harness.report(args, rows)


def write_model(folder: Path) -> None:
    """Write config, checkpoint and diffusers folder of a model; all but its UNet is small."""
    from ldm.loading.config import format_yaml, read_yaml

    config = read_yaml(ROOT / "configs/stable-diffusion/v1-inference.yaml")
    params = config["model"]["params"]
    params["unet_config"]["params"] |= {"context_dim": 64}
    params["first_stage_config"]["params"]["ddconfig"] |= {"ch": 32, "num_res_blocks": 1}
    arch = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
            "num_attention_heads": 2}  # fmt: skip
    params["cond_stage_config"].setdefault("params", {})["arch"] = arch
    config_path, ckpt_path = folder / "model.yaml", folder / "model.safetensors"
    config_path.write_text(format_yaml(config), encoding="utf-8")
    flags = ["--config", config_path]
    harness.run_python(ROOT, "benchmarks/make_checkpoint.py", ckpt_path, *flags)
    harness.run_python(ROOT, "scripts/convert.py", ckpt_path, folder / "model", *flags)


def compare(args: argparse.Namespace, stage: str) -> dict[str, Any]:
    """Compare one stage; print and return its row."""

    def start_worker(implementation: Implementation) -> Worker:
        flags = ("--stage", stage, "--folder", args.folder, "--side", args.side)
        return Worker(implementation, Path(__file__), args, *flags)

    def compare_results(ours: WarmUpResult, baseline: WarmUpResult) -> dict[str, float]:
        if stage not in DETERMINISTIC_STAGES:
            return {}
        x, y = (torch.load(result["output"], weights_only=True) for result in (ours, baseline))
        error = float((x - y).abs().max() / y.abs().max())
        if not error < MAX_ERROR:
            raise SystemExit(f"{stage}: the latents differ by {error:.1e}")
        return {"error": error}

    row: dict[str, Any] = {"stage": stage, "dtype": "float32"}
    implementations = harness.get_implementations(args)
    row |= harness.compare(start_worker, implementations, compare_results, rounds=args.rounds)
    error = f"  error {row['error']:.1e}" if "error" in row else ""
    print(f"{stage:13} {harness.format_row(row)}{error}", flush=True)
    return row


@torch.no_grad()
def run_worker(args: argparse.Namespace) -> None:
    """In the worker process: sample once as a warm-up, write the latent, serve timed calls."""
    load = {"ours": load_ours, "diffusers": load_diffusers}[args.worker]
    sample = load(args.stage[0], args)
    latent = sample()
    with tempfile.NamedTemporaryFile(dir=args.folder, delete=False) as file:
        torch.save(latent.float().cpu(), file)
    harness.serve({"output": file.name}, sample, args.device)


def load_ours(stage: str, args: argparse.Namespace) -> SampleFunction:
    """Load our model; return a function that samples a latent."""
    import ldm

    paths = (args.folder / f"model.{suffix}" for suffix in ("yaml", "safetensors"))
    model = ldm.load(*paths, device=args.device)
    noise = draw_noise(args.side)
    options: dict[str, Any] = {"steps": NUM_STEPS, "scale": GUIDANCE_SCALE, "x_T": noise}
    cond, uncond = (model.condition({"txt": [prompt]}) for prompt in ("a cat", ""))
    if stage == "pag":
        from ldm.diffusion.guidance import Guidance, PerturbedAttention

        options["guidance"] = PerturbedAttention(PAG_SCALE, Guidance())
    if stage == "freeu":
        options |= {"freeu": FREEU_FACTORS, "freeu_version": "diffusers"}
    if stage in SDE_SCHEDULERS:
        options |= {"sampler": stage, "scheduler": "karras"}
    return lambda: ldm.sample(model, cond, uncond, seeds=0, **options)


def load_diffusers(stage: str, args: argparse.Namespace) -> SampleFunction:
    """Load the pipeline of diffusers; return a function that samples a latent."""
    import diffusers

    name = "StableDiffusionPAGPipeline" if stage == "pag" else "StableDiffusionPipeline"
    pipe = getattr(diffusers, name).from_pretrained(args.folder / "model", local_files_only=True)
    pipe = pipe.to(args.device)
    pipe.set_progress_bar_config(disable=True)
    steps, options = NUM_STEPS, {"pag_scale": PAG_SCALE} if stage == "pag" else {}
    if stage == "freeu":
        b1, b2, s1, s2 = FREEU_FACTORS
        pipe.enable_freeu(s1=s1, s2=s2, b1=b1, b2=b2)
    if stage in SDE_SCHEDULERS:
        scheduler_class, order, steps = SDE_SCHEDULERS[stage]
        settings = {"algorithm_type": "sde-dpmsolver++", "solver_order": order}
        config = {**pipe.scheduler.config, **settings, "use_karras_sigmas": True}
        pipe.scheduler = getattr(diffusers, scheduler_class).from_config(config)
    cond, uncond = pipe.encode_prompt("a cat", args.device, 1, True, "")
    return lambda: pipe(
        prompt_embeds=cond, negative_prompt_embeds=uncond, latents=draw_noise(args.side),
        num_inference_steps=steps, guidance_scale=GUIDANCE_SCALE, height=8 * args.side,
        width=8 * args.side, generator=torch.Generator().manual_seed(0), output_type="latent",
        return_dict=False, **options,
    )[0]  # fmt: skip


def draw_noise(side: int) -> Tensor:
    """Return the initial noise of a latent, (1, 4, side, side)."""
    return torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    main()
