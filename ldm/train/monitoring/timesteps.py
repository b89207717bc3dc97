"""The mean loss by timestep, as a table and a plot.

timesteps.csv                  step, from, to, loss, samples
images/loss-per-timestep.png   curves of several steps, earlier ones paler
"""

import csv
import logging
from pathlib import Path

import torch
from torch import Tensor

from ldm.train.distributed.parallel import Ranks
from ldm.train.monitoring.logs import read_table

__all__ = ["TimestepLog"]

log = logging.getLogger(__name__)

COLUMNS = ("step", "from", "to", "loss", "samples")
MAX_CURVES = 8  # in the plot


class TimestepLog:
    """Running means of the loss in bins of timesteps; each `write` halves the weight of the past.

    Args:
        timesteps: Number of timesteps of the noise schedule.
        bins: Number of bins that they are divided into.
        start: Step that the run resumes from.
    """

    def __init__(
        self, folder: Path, ranks: Ranks, timesteps: int = 1000, *, bins: int = 50, start: int = 0
    ) -> None:
        self.path = folder / "timesteps.csv"
        self.ranks = ranks
        self.timesteps = timesteps
        self.bins = bins
        self.sums = torch.zeros(bins)
        self.counts = torch.zeros(bins)
        self.curves = self._read(start) if ranks.is_first else {}

    def add(self, t: Tensor, losses: Tensor) -> None:
        """Add losses (B,) of samples at timesteps t (B,); non-finite ones are skipped."""
        bins = (t.cpu() * self.bins // self.timesteps).clamp(0, self.bins - 1)
        values = losses.detach().float().cpu()
        finite = values.isfinite()
        self.sums.index_add_(0, bins[finite], values[finite])
        self.counts.index_add_(0, bins[finite], torch.ones(int(finite.sum())))

    def write(self, step: int) -> Path | None:
        """Write the means over all processes.

        Returns:
            The path of the plot; None on processes but the first, or without matplotlib.
        """
        sums, counts = self._sum_over_ranks(self.sums), self._sum_over_ranks(self.counts)
        self.sums /= 2
        self.counts /= 2
        if not self.ranks.is_first or not counts.any():
            return None
        self.curves[step] = torch.where(counts > 0, sums / counts.clamp(min=1e-9), torch.nan)
        is_new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(COLUMNS)
            for k, (loss, count) in enumerate(zip(self.curves[step], counts, strict=True)):
                if count > 0:
                    writer.writerow([step, *self._timestep_range(k), f"{loss:.6g}", f"{count:g}"])
        return self._plot(self.path.with_name("images") / "loss-per-timestep.png")

    def _timestep_range(self, k: int) -> tuple[int, int]:
        """Return the first and last timestep of a bin."""
        first, end = (-(-edge * self.timesteps // self.bins) for edge in (k, k + 1))
        return first, end - 1

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        named = {str(k): float(value) for k, value in enumerate(values)}
        return torch.tensor(list(self.ranks.mean(named).values())) * self.ranks.world_size

    def _read(self, start: int) -> dict[int, Tensor]:
        """Read the curves of earlier sessions."""
        curves: dict[int, Tensor] = {}
        for row in read_table(self.path, until=start)[1]:
            if not row["samples"]:  # cut off by a crash
                continue
            k = int(row["from"]) * self.bins // self.timesteps
            if k < self.bins:
                empty = torch.full((self.bins,), torch.nan)
                curves.setdefault(int(row["step"]), empty)[k] = float(row["loss"])
        return curves

    def _plot(self, path: Path) -> Path | None:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            log.info("no plot of the loss per timestep, matplotlib is not installed")
            return None
        figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
        axes = figure.add_subplot()
        steps = sorted(self.curves)[-MAX_CURVES:]
        middles = torch.tensor([sum(self._timestep_range(k)) / 2 for k in range(self.bins)])
        for index, step in enumerate(steps):
            recency = (index + 1) / len(steps)  # 1: the last step
            is_last = step == steps[-1]
            finite = self.curves[step].isfinite()
            axes.plot(
                middles[finite],
                self.curves[step][finite],
                marker=".",
                color=(0.1, 0.3, 0.7, 0.15 + 0.85 * recency**2),
                linewidth=2 if is_last else 1,
                label=f"step {step}" if is_last or index == 0 else None,
            )
        axes.set(xlabel="timestep (0: hardly any noise)", ylabel="loss", xlim=(0, self.timesteps))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        return path
