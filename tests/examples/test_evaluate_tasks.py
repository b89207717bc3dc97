"""Comparison of upscaled images with their originals."""

import pytest
import torch

from evaluate_tasks import compare_upscaling, format_table, main


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


def test_a_guidance_scale_of_0_is_not_the_default(monkeypatch, tmp_path, capsys):
    scales = []

    def compare(model, samples, *, scale, **_):
        scales.append(scale)
        return {}, [{"original": torch.zeros(1, 3, 8, 8)}]

    monkeypatch.setattr("evaluate_tasks.ImageFolder", lambda **_: [])
    monkeypatch.setattr("evaluate_tasks.load", lambda **_: None)
    monkeypatch.setattr("evaluate_tasks.compare_upscaling", compare)
    for flags in (["--scale", "0"], []):
        main(["upscale", "--out", str(tmp_path), *flags])
    assert scales == [0, 1]
    with pytest.raises(SystemExit):
        main(["upscale", "--count", "0"])
    assert "--count must be 1 or more, got 0" in capsys.readouterr().err
