"""The training loop.

    batches -> losses -> gradients -> clip -> optimizer -> EMA
    at intervals: save, draw samples, validate, export, evaluate

An optimizer step has `batches_per_step` (micro-)batches: number of processes x gradient
accumulation. They are numbered through the whole run, and all random numbers of a batch depend on
its index only, so that an interrupted run resumes exactly, on any number of processes. Dropout
draws from torch's global generator, which is seeded for each batch.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ldm.data.source import Batch
from ldm.data.unreadable import UnreadableFiles
from ldm.model import LatentDiffusion
from ldm.runtime.errors import NonFinite, describe_error
from ldm.runtime.files import disk_errors_about
from ldm.train.distributed import parallel
from ldm.train.distributed.signals import SignalHandler
from ldm.train.monitoring.evaluation import Evaluator
from ldm.train.monitoring.initial_loss import NUM_SAMPLES, check_initial_loss
from ldm.train.monitoring.logs import LoggerCollection, ProgressBar
from ldm.train.monitoring.samples import draw_samples
from ldm.train.monitoring.timers import StepTimer, Trigger
from ldm.train.monitoring.timestep_losses import TimestepLosses
from ldm.train.monitoring.validation import validate
from ldm.train.run import Run, seed_batch
from ldm.train.runs.exports import export, export_best, export_step, resolve_monitor
from ldm.train.state import TrainedNetwork
from ldm.train.tasks.task import Losses

__all__ = ["save_state", "train", "train_step"]

log = logging.getLogger(__name__)

IndexedBatches = Sequence[tuple[int, Batch]]  # (index in the run, batch)
Actions = dict[str, tuple[Trigger, Callable[[], object]]]  # name -> (trigger, action)


def train(run: Run, on_start: Callable[[], object] = lambda: None) -> None:
    """Train until the end of the run or a signal (see `signals`), then save and export.

    Args:
        on_start: Called by the main process before the first step.
    Raises:
        FloatingPointError: Too many steps in a row had non-finite gradients.
    """
    state, ranks = run.state, run.ranks
    ranks.run_on_main_process(lambda: run.folder.mkdir(parents=True, exist_ok=True))

    # Convert epochs to steps, and build the learning rate schedule.
    batches_per_epoch = run.source.get_batches_per_epoch(run.batch_size)
    # A resumed run keeps its batches per step, on any number of processes.
    accumulation = state.batches_per_step // ranks.world_size
    settings = run.settings.replace(trainer={"accumulate_grad_batches": accumulation})
    settings = settings.convert_epochs_to_steps(
        batches_per_epoch and batches_per_epoch / state.batches_per_step
    )
    run = replace(run, settings=settings)
    lr_schedule, explanation = settings.build_lr_schedule(ranks.world_size)
    for line in (*settings.messages, explanation):
        log.info("%s", line)

    if run.is_fine_tune and not state.step and settings.trainer.check_initial_loss:
        with run.autocast():
            check_initial_loss(
                run.model,
                run.source.load_fixed_samples(NUM_SAMPLES),
                batch_size=run.batch_size,
                seed=run.seed,
                timestep_range=run.timestep_range,
            )

    # Validate one batch: wrong data or a wrong `monitor` would end the run only later.
    callbacks = settings.callbacks
    if callbacks.validate_steps and run.validation_source is not None:
        validation_losses = validate(run, num_batches=1)
        if callbacks.save_top_k:
            resolve_monitor(callbacks.monitor, validation_losses)

    # Open the logs.
    loggers = LoggerCollection(
        run.folder,
        callbacks.loggers if ranks.is_main_process else (),
        start_step=state.step,
        wandb=callbacks.wandb,
        config=settings.config,
    )
    # An autoencoder has no timesteps: no losses are added, so that no file is written.
    num_timesteps = len(run.model.schedule) if isinstance(run.model, LatentDiffusion) else 1
    timestep_losses = TimestepLosses(run.folder, ranks, num_timesteps, start_step=state.step)

    # Open the sequence of batches after those that the state has consumed.
    ranks.run_on_main_process(on_start)
    batches = run.source.iter_batches(
        run.batch_size,
        start=state.batches_consumed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        workers=settings.loader.num_workers,
    )
    unreadable = UnreadableFiles(
        run.folder / "broken.txt", settings.trainer.max_unreadable_fraction, run.source
    )

    # Train.
    actions = _build_actions(run, loggers, timestep_losses)
    run.task.trainable.train()
    timer = StepTimer()
    progress = ProgressBar(
        loggers,
        ranks,
        run.device,
        start_step=state.step,
        max_steps=settings.trainer.max_steps,
        log_steps=callbacks.log_steps,
    )
    with (
        SignalHandler() as signals,
        _save_on_error(run),
        contextlib.closing(loggers),
        contextlib.closing(progress),
    ):
        should_stop = False
        while run.get_progress() < 1 and not should_stop:
            step_batches = _read_step_batches(run, batches, unreadable)
            lr = lr_schedule(state.step, run.get_progress())
            losses = train_step(run, step_batches, lr)
            should_stop, due_actions = _agree_on_actions(
                run, timer.stop(), signals.take_actions(), actions
            )
            if "t" in losses:
                timestep_losses.add(losses["t"], losses["loss_per_sample"])
            with _suppress_and_log(run, "log"):
                progress.update(state.step, losses, lr, run.batch_size * state.batches_per_step)
            for name in due_actions:
                _, action = actions[name]
                with _suppress_and_log(run, name):
                    action()
            timer.start()
        save_state(run)
        export(run)
        _sample_and_log(run, loggers, timestep_losses)


def train_step(run: Run, batches: IndexedBatches, lr: float) -> Losses:
    """Update all trained networks and the EMA once, and return the losses of this process."""
    state, task = run.state, run.task
    task.step = state.step
    losses: Losses = {}
    is_finite = True
    # The discriminator comes last: it is trained on reconstructions by the updated model.
    for network in state.networks.values():
        if network is state.discriminator and not task.trains_discriminator:
            continue
        losses = {**_compute_gradients(run, network, batches), **losses}  # "loss" is the model's
        max_norm = run.settings.trainer.gradient_clip_val
        norm = _clip_gradients(network, state.loss_scale.value, max_norm)
        is_finite &= math.isfinite(norm)
        if math.isfinite(norm):
            # Until all networks are updated, an exception must not save the state.
            state.is_consistent = False
            state.is_saved = False
            for group in network.optimizer.param_groups:
                group["lr"] = lr
            network.optimizer.step()
    if is_finite:
        state.ema.update(task.trainable)
        state.consecutive_skips = 0
    state.step += 1
    state.batches_consumed += state.batches_per_step
    state.loss_scale.update(is_finite)
    state.is_consistent = True
    if not is_finite and not state.loss_scale.is_adapting:
        _handle_skipped_step(run, batches, losses)
    return losses


def save_state(run: Run) -> None:
    """Save a resume state, if anything has changed since the last one."""
    if not run.state.is_saved and run.has_finite_weights("state"):
        run.states.save(run.state)


def _sample_and_log(run: Run, loggers: LoggerCollection, timestep_losses: TimestepLosses) -> None:
    """Draw and log sample grids, and log the plot of the loss by timestep."""
    # Not around `timestep_losses.write`, which is collective.
    with _suppress_and_log(run, "draw samples"):
        for path in draw_samples(run):
            loggers.log_image(run.state.step, f"{path.parent.name}/samples", path)
    plot = timestep_losses.write(run.state.step)
    if plot is not None:
        loggers.log_image(run.state.step, "loss per timestep", plot)


def _validate(run: Run, loggers: LoggerCollection) -> None:
    losses = validate(run)
    _log_metrics(run, loggers, losses)
    export_best(run, losses)


def _log_metrics(run: Run, loggers: LoggerCollection, metrics: Mapping[str, float]) -> None:
    """Log validation losses or metrics of samples, also to the console."""
    if metrics and run.ranks.is_main_process:
        text = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        log.info("step %d: %s", run.state.step, text)
    loggers.log_scalars(run.state.step, metrics)


def _build_actions(run: Run, loggers: LoggerCollection, timestep_losses: TimestepLosses) -> Actions:
    """Return all actions by name, in the order in which due ones are run."""
    options = run.settings.callbacks
    draw_trigger = Trigger(
        minutes=options.image_minutes, steps=options.image_steps, early=options.image_early
    )
    save_trigger = Trigger(minutes=options.save_minutes, steps=options.save_steps)
    actions: Actions = {
        "save": (save_trigger, lambda: save_state(run)),
        "draw samples": (draw_trigger, lambda: _sample_and_log(run, loggers, timestep_losses)),
        "validate": (Trigger(steps=options.validate_steps), lambda: _validate(run, loggers)),
        "export step": (Trigger(steps=options.export_steps), lambda: export_step(run)),
    }
    if options.evaluation is not None:
        evaluator = Evaluator(run, options.evaluation)
        actions["evaluate"] = (
            Trigger(steps=options.evaluation.every_n_steps),
            lambda: _log_metrics(run, loggers, evaluator()),
        )
    return actions


def _read_step_batches(
    run: Run, batches: Iterator[Batch], unreadable: UnreadableFiles
) -> IndexedBatches:
    """Read this process's batches of the step."""
    state, ranks = run.state, run.ranks
    end = state.batches_consumed + state.batches_per_step
    indices = range(state.batches_consumed + ranks.rank, end, ranks.world_size)
    indexed_batches = [(index, next(batches)) for index in indices]
    for _, batch in indexed_batches:
        unreadable.add(batch.pop("unreadable", []), run.batch_size)
    return indexed_batches


def _compute_gradients(run: Run, network: TrainedNetwork, batches: IndexedBatches) -> Losses:
    """Compute the mean gradients over the step's batches, times the loss scale."""
    network.optimizer.zero_grad(set_to_none=True)
    scale = run.state.loss_scale.value / len(batches)
    outputs: list[Losses] = []
    for k, (index, batch) in enumerate(batches):
        with _sync_gradients(network, enabled=k == len(batches) - 1):
            with run.autocast():
                losses = network.loss(batch, seed_batch(run.seed, index))
            (losses["loss"] * scale).backward()
        outputs.append({name: value.detach() for name, value in losses.items()})
    return {name: _merge_losses([losses[name] for losses in outputs]) for name in outputs[0]}


def _merge_losses(values: Sequence[Tensor]) -> Tensor:
    """Average scalars; concatenate losses per sample (B,)."""
    return torch.cat(list(values)) if values[0].ndim else torch.stack(list(values)).mean()


def _sync_gradients(network: TrainedNetwork, *, enabled: bool) -> AbstractContextManager[None]:
    """Return a context in which backward passes exchange gradients between processes, if enabled.

    Only the last of the accumulated batches needs it.
    """
    if isinstance(network.loss, DistributedDataParallel):
        return nullcontext() if enabled else network.loss.no_sync()
    parallel.set_gradient_sync(network.module, enabled)
    return nullcontext()


def _clip_gradients(network: TrainedNetwork, scale: float, max_norm: float | None) -> float:
    """Divide gradients by the loss scale and clip their norm; return the norm before clipping."""
    gradients = [p.grad for p in network.module.parameters() if p.grad is not None]
    # All processes must do this: the norm of sharded gradients is reduced over them.
    scaled_norm = parallel.gather_shards({"norm": nn.utils.get_total_norm(gradients)})["norm"]
    norm = float(scaled_norm) / scale
    factor = min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0  # as clip_grad_norm_
    if math.isfinite(norm) and factor / scale != 1:
        torch._foreach_mul_(gradients, factor / scale)  # no public torch function takes a list
    return norm


def _agree_on_actions(
    run: Run, seconds: float, requested_actions: set[str], actions: Actions
) -> tuple[bool, list[str]]:
    """Agree with all processes on training time; return whether to stop, and the due actions."""
    is_main_process = run.ranks.is_main_process
    due = [
        (trigger.is_due(run.state.step) and is_main_process) or name in requested_actions
        for name, (trigger, _) in actions.items()
    ]
    # All take the time of the main process: the others contribute 0 to the maximum.
    total = run.state.seconds + seconds if is_main_process else 0.0
    values = [total, "stop" in requested_actions, *due]
    run.state.seconds, should_stop, *flags = run.ranks.all_reduce_max(values)
    return bool(should_stop), [name for name, flag in zip(actions, flags, strict=True) if flag]


def _handle_skipped_step(run: Run, batches: IndexedBatches, losses: Mapping[str, Tensor]) -> None:
    """Count a step with non-finite gradients; if too many in a row, save its batches and raise."""
    state = run.state
    state.skipped_steps += 1
    state.consecutive_skips += 1
    loss = float(losses["loss"].detach())
    log.warning("step %d is skipped: NaN or inf gradients, loss %g", state.step, loss)
    is_limit_reached = state.consecutive_skips >= run.settings.trainer.nan_limit
    if is_limit_reached or not run.has_finite_weights("state"):
        path = run.folder / f"not-finite-rank{run.ranks.rank}.pt"
        with path.open("wb") as file:
            torch.save([batch for _, batch in batches], file)
        raise FloatingPointError(
            f"{state.consecutive_skips} steps in a row had NaN or inf gradients, the last loss is "
            f"{loss:g}; its batches are in `{path}`; `{run.checkpoints}` has earlier states"
        )


@contextmanager
def _save_on_error(run: Run) -> Iterator[None]:
    """Within the context, save a consistent state on an error, if the run has one process."""
    try:
        yield
    except Exception:
        state = run.state
        # Saving is collective, and other processes may not have failed.
        if run.ranks.world_size == 1 and state.is_consistent and state.step:
            with contextlib.suppress(OSError):
                save_state(run)
        raise


@contextmanager
def _suppress_and_log(run: Run, action: str) -> Iterator[None]:
    """Log a full disk, too little GPU memory or NaN samples within the context, and continue."""
    try:
        with disk_errors_about(run.folder):
            yield
    except (OSError, torch.OutOfMemoryError, NonFinite) as error:
        log.error("could not %s: %s; training continues", action, describe_error(error))
