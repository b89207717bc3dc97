"""Comparison of restored images with their originals."""

import pytest
import torch

from evaluate_tasks import compare_upscaling, format_table


def test_a_perfect_upscaler_beats_bicubic(monkeypatch):
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sample = {"jpg": image, "lr": image[:, ::4, ::4], "txt": "noise"}
    monkeypatch.setattr("evaluate_tasks.upscale", lambda *_, **__: image[None] + 0.02)
    qualities, images = compare_upscaling(None, [sample, sample])
    assert list(images[0]) == ["input", "bicubic", "upscaler", "original"]
    upscaler = qualities["upscaler"]
    assert upscaler.psnr == pytest.approx(40, abs=1e-3)  # 20 log10(2 / 0.02)
    assert upscaler.edge_error < 1e-5
    assert upscaler.contrast == pytest.approx(1, abs=1e-5)
    assert qualities["bicubic"].edge_error > 0.5
    assert "| upscaler | 2 | 40.0 dB | 0.00 | 1.00 |" in format_table(qualities)
