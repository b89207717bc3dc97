"""The mean loss by timestep, as a table and a plot.

timesteps.csv                  step, from, to (inclusive), loss, samples (halved by each `write`)
images/loss-per-timestep.png   a curve for each of the last training steps, older ones paler
"""

import csv
import logging
from pathlib import Path

import torch
from torch import Tensor

from ldm.train.distributed.parallel import Ranks
from ldm.train.monitoring.logs import read_table

__all__ = ["TimestepLosses"]

log = logging.getLogger(__name__)

COLUMNS = ("step", "from", "to", "loss", "samples")
MAX_CURVES = 8  # in the plot


class TimestepLosses:
    """Running means of the loss in bins of timesteps; each `write` halves their weight.

    Args:
        folder: Folder of the run.
        ranks: Processes whose losses are added up.
        num_timesteps: Timesteps of the noise schedule.
        num_bins: Bins that they are divided into.
        start: Step that the run resumes from.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        num_timesteps: int = 1000,
        *,
        num_bins: int = 50,
        start: int = 0,
    ) -> None:
        self.csv_path = folder / "timesteps.csv"
        self.ranks = ranks
        self.num_timesteps = num_timesteps
        self.num_bins = num_bins
        self.sums = torch.zeros(num_bins)
        self.weights = torch.zeros(num_bins)  # numbers of samples, halved by each `write`
        self.curves = self._read(start) if ranks.is_first else {}

    def add(self, t: Tensor, losses: Tensor) -> None:
        """Add losses (B,) of samples at timesteps t (B,); non-finite ones are skipped."""
        bin_indices = (t.cpu() * self.num_bins // self.num_timesteps).clamp(0, self.num_bins - 1)
        values = losses.detach().float().cpu()
        finite = values.isfinite()
        self.sums.index_add_(0, bin_indices[finite], values[finite])
        self.weights.index_add_(0, bin_indices[finite], torch.ones(int(finite.sum())))

    def write(self, step: int) -> Path | None:
        """Write and plot the means over all processes, then halve the weight of the losses.

        Returns:
            The path of the plot; None on processes but the first, without matplotlib or without any
            losses.
        """
        sums, weights = self._sum_over_ranks(self.sums), self._sum_over_ranks(self.weights)
        self.sums /= 2
        self.weights /= 2
        if not self.ranks.is_first or not weights.any():
            return None
        self.curves[step] = torch.where(weights > 0, sums / weights.clamp(min=1e-9), torch.nan)
        is_new = not self.csv_path.exists()
        self.csv_path.parent.mkdir(parents=True, exist_ok=True)
        with self.csv_path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(COLUMNS)
            for index, (loss, weight) in enumerate(zip(self.curves[step], weights, strict=True)):
                if weight > 0:
                    timesteps = self._timestep_range(index)
                    writer.writerow([step, *timesteps, f"{loss:.6g}", f"{weight:g}"])
        return self._plot(self.csv_path.with_name("images") / "loss-per-timestep.png")

    def _timestep_range(self, bin_index: int) -> tuple[int, int]:
        """Return the first and last timestep of a bin."""
        first, end = (
            -(-edge * self.num_timesteps // self.num_bins) for edge in (bin_index, bin_index + 1)
        )
        return first, end - 1

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        by_bin = {str(index): float(value) for index, value in enumerate(values)}
        return torch.tensor(list(self.ranks.mean(by_bin).values())) * self.ranks.world_size

    def _read(self, start: int) -> dict[int, Tensor]:
        """Read the curves of earlier sessions of the run, up to the step `start`."""
        curves: dict[int, Tensor] = {}
        for row in read_table(self.csv_path, until=start)[1]:
            if not row["samples"]:  # cut off by a crash
                continue
            bin_index = int(row["from"]) * self.num_bins // self.num_timesteps
            if bin_index < self.num_bins:
                empty = torch.full((self.num_bins,), torch.nan)
                curves.setdefault(int(row["step"]), empty)[bin_index] = float(row["loss"])
        return curves

    def _plot(self, path: Path) -> Path | None:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            log.info("no plot of the loss by timestep, matplotlib is not installed")
            return None
        figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
        axes = figure.add_subplot()
        steps = sorted(self.curves)[-MAX_CURVES:]
        bin_centers = torch.tensor([sum(self._timestep_range(i)) / 2 for i in range(self.num_bins)])
        for index, step in enumerate(steps):
            recency = (index + 1) / len(steps)  # 1: the last step
            is_last = step == steps[-1]
            finite = self.curves[step].isfinite()
            axes.plot(
                bin_centers[finite],
                self.curves[step][finite],
                marker=".",
                color=(0.1, 0.3, 0.7, 0.15 + 0.85 * recency**2),
                linewidth=2 if is_last else 1,
                label=f"step {step}" if is_last or index == 0 else None,
            )
        axes.set(xlabel="timestep (0 = least noise)", ylabel="loss", xlim=(0, self.num_timesteps))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        return path
