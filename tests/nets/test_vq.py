"""The VQ autoencoder and its quantizer, as recorded from the original."""

import pytest
import torch

from goldfile import load_golden
from ldm.nets.autoencoder import AutoencoderVQ
from ldm.nets.quantizer import VectorQuantizer


@pytest.mark.parametrize(("case", "legacy"), [("q_legacy", True), ("q_fixed_beta", False)])
def test_quantization_its_loss_and_gradients_equal_the_recorded_ones(case, legacy):
    golden = load_golden("ldm_vq")
    shared, recorded = golden.select("shared/"), golden.outputs(case)
    quantizer = VectorQuantizer(*shared["codebook"].shape, legacy=legacy)
    quantizer.load_state_dict({"embedding.weight": shared["codebook"]})
    z = shared["z"].requires_grad_()
    result = quantizer(z)
    assert torch.equal(result.indices.flatten(), recorded["indices"])
    (through,) = torch.autograd.grad(result.z, z, shared["upstream_grad"], retain_graph=True)
    of_z, of_codebook = torch.autograd.grad(result.loss, [z, quantizer.embedding.weight])
    golden.assert_close(
        case, zq=result.z, loss=result.loss, grad_z_through_zq=through, grad_z_of_loss=of_z,
        grad_codebook_of_loss=of_codebook,
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "decoded"),
    [("f4", "decoded"), ("f8attn", "decoded_from_prequant"), ("noattn", "decoded")],
)
def test_encoding_and_decoding_equal_the_recorded_ones(case, decoded):
    golden = load_golden("ldm_vq")
    params = golden.meta[f"config_{case}"]["params"]
    names = ("ddconfig", "embed_dim", "n_embed")
    autoencoder = AutoencoderVQ(**{name: params[name] for name in names}).eval()
    autoencoder.load_state_dict(golden.weights(autoencoder.state_dict()))
    z = autoencoder.encode(golden.inputs(case)["x"]).sample()
    recorded_z = golden.outputs(case)["prequant"]
    quantized = autoencoder.quantize(recorded_z)
    images = {decoded: autoencoder.decode(recorded_z)}
    golden.assert_close(case, prequant=z, emb_loss=quantized.loss, **images)
    assert torch.equal(quantized.indices.flatten(), golden.outputs(case)["indices"])


def test_blocks_of_positions_give_the_same_indices(monkeypatch):
    torch.manual_seed(0)
    quantizer, z = VectorQuantizer(32, 3), torch.randn(2, 3, 5, 7)
    expected = quantizer.find_nearest(z)
    monkeypatch.setattr("ldm.nets.quantizer.MAX_DISTANCES", 32 * 4)
    assert torch.equal(quantizer.find_nearest(z), expected)


def test_the_nearest_vectors_are_found_in_float32_in_mixed_precision_too():
    torch.manual_seed(0)
    quantizer, z = VectorQuantizer(512, 3), torch.randn(1, 3, 16, 16)
    torch.nn.init.normal_(quantizer.embedding.weight)
    expected = quantizer.find_nearest(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.find_nearest(z), expected)


def test_the_first_of_equally_near_vectors_is_taken_in_float16_too():
    quantizer = VectorQuantizer(3, 2).half()
    quantizer.embedding.weight.data = torch.tensor([[2.0, 0], [0, 2], [0, 2]]).half()
    z = torch.tensor([[0.0, 1], [1, 0]]).half().view(1, 2, 1, 2)
    result = quantizer(z)
    assert result.indices.tolist() == [[[1, 0]]]
    assert result.z.dtype == torch.float16
