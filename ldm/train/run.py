"""A training run, built from its settings."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch

from ldm.data.source import BatchSource
from ldm.loading.config import instantiate
from ldm.model import LatentDiffusion
from ldm.nets import attention
from ldm.nets.autoencoder import Autoencoder
from ldm.runtime.device import pick_device
from ldm.train.batches.sources import check_data, open_batches
from ldm.train.build import build_state, build_task, configure_model
from ldm.train.config.settings import Settings
from ldm.train.distributed import parallel
from ldm.train.distributed.parallel import Ranks
from ldm.train.runs.initial_weights import load_initial_weights, set_scale_by_std
from ldm.train.runs.states import StateFolder
from ldm.train.state import State
from ldm.train.tasks.task import Task

__all__ = ["Run", "build_run"]

log = logging.getLogger(__name__)

AUTOCAST_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Run:
    """A training run, of which only `state` changes.

    Args:
        source: Training data.
        validation_source: Validation data; None = no validation.
        is_fine_tune: Whether the initial weights of the model were loaded from a file.
    """

    settings: Settings
    folder: Path
    device: torch.device
    ranks: Ranks
    task: Task
    state: State
    source: BatchSource
    validation_source: BatchSource | None
    is_fine_tune: bool

    @property
    def model(self) -> LatentDiffusion | Autoencoder:
        return self.task.model

    @property
    def seed(self) -> int:
        return self.settings.trainer.seed

    @property
    def batch_size(self) -> int:
        """Samples per batch; a step has `accumulate_grad_batches` batches of each process."""
        return self.settings.loader.batch_size

    @property
    def epoch(self) -> int:
        """Number of complete passes over the data; 0 if its length is unknown."""
        batches = self.source.get_batches_per_epoch(self.batch_size)
        return int(self.state.batches_consumed // batches) if batches else 0

    @property
    def timestep_range(self) -> Sequence[int] | None:
        """Range [first, end) of timesteps to train on; None = all."""
        return self.settings.objective.get("timestep_range")

    @property
    def checkpoints(self) -> Path:
        """The folder of exports and resume states."""
        return self.folder / "checkpoints"

    @property
    def states(self) -> StateFolder:
        """The resume states on disk."""
        return StateFolder(self.checkpoints, self.ranks, self.settings.trainer.keep_states)

    def get_progress(self) -> float:
        """Return the completed fraction of the run, by steps or by time, whichever is larger."""
        trainer, state = self.settings.trainer, self.state
        by_steps = state.step / trainer.max_steps if trainer.max_steps else 0.0
        by_time = state.seconds / trainer.max_time if trainer.max_time else 0.0
        return max(by_steps, by_time)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the autocast context of mixed precision, for losses."""
        dtype = AUTOCAST_DTYPES.get(self.settings.trainer.precision)
        return torch.autocast(self.device.type, dtype) if dtype else nullcontext()

    def has_finite_weights(self, output: str) -> bool:
        """Return whether all ranks' weights are finite, else log that `output` is not written."""
        (any_non_finite,) = self.ranks.all_reduce_max([not self.state.has_finite_tensors()])
        if any_non_finite:
            step = self.state.step
            log.error("step %d: weights are NaN or inf, no %s is written", step, output)
        return not any_non_finite

    def resume(self, path: Path) -> None:
        """Load the state in a folder; the run continues with the batches per step that it had.

        Raises:
            ValueError: The state is of another model, or its batches per step are not a multiple of
                the number of processes.
        """
        self.states.load(self.state, path)
        if isinstance(self.model, LatentDiffusion) and self.state.scale_factor is not None:
            self.model.scale_factor = self.state.scale_factor
        batches_per_step, world_size = self.state.batches_per_step, self.ranks.world_size
        if batches_per_step % world_size:
            raise ValueError(
                f"`{path}` has {batches_per_step} batches per step, which {world_size} processes "
                "cannot share equally"
            )
        accumulation = batches_per_step // world_size
        if accumulation != self.settings.trainer.accumulate_grad_batches:
            message = "%d batches per step, as before: %d accumulated x %d ranks"
            log.info(message, batches_per_step, accumulation, world_size)
        self._convert_batches_consumed()

    def _convert_batches_consumed(self) -> None:
        """Keep the position in the data if the batch size has changed since the state was saved.

        Up to a batch of samples is repeated where batches of both sizes do not end together.
        """
        old, new = self.state.batch_size, self.batch_size
        if old == new:
            return
        old_epoch, new_epoch = map(self.source.get_batches_per_epoch, (old, new))
        factor = new_epoch / old_epoch if old_epoch and new_epoch else Fraction(old, new)
        self.state.batches_consumed = int(self.state.batches_consumed * factor)
        self.state.batch_size = new
        message = "batch size %d, before %d: the data continue after %d batches of the new size"
        log.info(message, new, old, self.state.batches_consumed)


def build_run(
    settings: Settings,
    folder: Path,
    *,
    device: torch.device | None = None,
    allow_commands: bool = False,
) -> Run:
    """Build a run from its settings; the only files written are caches and class images.

    Args:
        device: None = a GPU if available and not disabled by the config (`gpus: 0`), else the CPU.
        allow_commands: Whether to run `pipe:COMMAND` URLs of shards.
    """
    trainer, params = settings.trainer, settings.model.params
    data = settings.data
    check_data(data, allow_commands=allow_commands)

    # Connect the processes.
    device = device or pick_device("cpu" if settings.devices.gpus in (0, []) else None)
    ranks = parallel.connect(device, timeout=trainer.timeout)
    settings.check_strategy(ranks.world_size)

    # Set up torch. Initial weights are drawn from its global generator.
    torch.manual_seed(trainer.seed)
    torch.backends.cudnn.benchmark = trainer.benchmark
    attention.set_backend(trainer.attention)

    log.info("Building the model")
    model = instantiate(settings.config["model"], where="model").to(device)
    is_fine_tune = load_initial_weights(model, params)
    configure_model(model, trainer)

    log.info("Opening the data")
    with ranks.main_process_first():
        source, validation_source = open_batches(
            model, data, seed=trainer.seed, allow_commands=allow_commands
        )
    if params.get("scale_by_std") and not is_fine_tune:
        if data.latents:
            raise ValueError("`scale_by_std` cannot be combined with `data.params.latents`")
        images = torch.stack(
            [sample["jpg"] for sample in source.load_fixed_samples(settings.loader.batch_size)]
        )
        set_scale_by_std(model, images, seed_batch(trainer.seed, 0))

    log.info("Setting up the training state")
    task = build_task(model, settings)
    state = build_state(task, settings, ranks, device)
    if params.get("scale_by_std"):
        state.scale_factor = model.scale_factor
    return Run(
        settings=settings,
        folder=folder,
        device=device,
        ranks=ranks,
        task=task,
        state=state,
        source=source,
        validation_source=validation_source,
        is_fine_tune=is_fine_tune,
    )


def seed_batch(seed: int, index: int) -> torch.Generator:
    """Return the random generator of a batch, and seed torch's global one for dropout."""
    # The factor, 2^32 / golden ratio, keeps the batch seeds of different runs far apart.
    batch_seed = (seed * 0x9E3779B1 + index) % 2**32
    torch.manual_seed(batch_seed)
    return torch.Generator().manual_seed(batch_seed)
