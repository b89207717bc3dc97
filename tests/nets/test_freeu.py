"""FreeU against the formulas of its two versions, with diffusers' Fourier filter in float64."""

import pytest
import torch

from ldm.nets.freeu import FreeU, scale_low_frequencies
from nets.nethelp import build_tiny_unet, make_noise, make_tiny_inputs


def scale_by_fft(x, s):
    """Multiply the center of the shifted Fourier transform by s, as published."""
    spectrum = torch.fft.fftshift(torch.fft.fftn(x.double(), dim=(-2, -1)), dim=(-2, -1))
    row, column = (side // 2 for side in x.shape[-2:])
    spectrum[..., max(row - 1, 0) : row + 1, max(column - 1, 0) : column + 1] *= s
    return torch.fft.ifftn(torch.fft.ifftshift(spectrum, dim=(-2, -1)), dim=(-2, -1)).real


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (2, 4), (3, 2), (1, 5), (1, 1)])
def test_low_frequencies_equal_those_of_the_fourier_transform(size):
    """Observed error: 2e-7."""
    x = make_noise(2, 6, *size)
    assert (scale_low_frequencies(x, 0.3) - scale_by_fft(x, 0.3)).abs().max() < 3e-6
    half = scale_low_frequencies(x.bfloat16(), 0.3)
    assert half.dtype == torch.bfloat16
    assert (half - scale_by_fft(x, 0.3)).abs().max() < 0.05


@pytest.mark.parametrize("is_version_2", [False, True])
def test_both_versions_equal_their_formulas_for_each_sample(is_version_2):
    x, t, context = make_tiny_inputs()
    unet = build_tiny_unet()
    inputs, outputs = [], []
    freeu = FreeU([(1.4, 0.3), None, (1.2, 0.6), None], is_version_2)

    def record(i, h, skip):
        inputs.append((h, skip))
        outputs.append(freeu(i, h, skip))
        return outputs[-1]

    with torch.no_grad():
        unet(x, t, context, freeu=record)
    assert [h.shape[1] for h, _ in inputs] == [channels for _, channels in unet.output_block_inputs]
    for factors, (h, skip), (h_out, skip_out) in zip(freeu.factors, inputs, outputs, strict=True):
        b, s = factors or (1, 1)
        mean = h.double().mean(1, keepdim=True)
        low, high = (f(mean, (2, 3), keepdim=True) for f in (torch.amin, torch.amax))
        factor = (b - 1) * (mean - low) / (high - low) + 1 if is_version_2 else b
        expected = h.double()
        expected[:, : h.shape[1] // 2] *= factor
        assert (h_out - expected).abs().max() < 1e-5
        assert (skip_out - scale_by_fft(skip, s)).abs().max() < 1e-5


def test_a_sample_without_contrast_stays_finite():
    h, _ = FreeU([(1.4, 1.0)], is_version_2=True)(0, torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 2))
    assert torch.equal(h, torch.ones(1, 4, 2, 2))
