"""Class labels as conditions."""

import torch

from goldfile import load_golden
from ldm.conditioning import Conditioner
from ldm.encoders.labels import ClassEmbedder


def test_class_labels_are_one_token_as_recorded():
    golden = load_golden("ldm_cond")
    params = golden.meta["config_class"]["params"]
    encoder = ClassEmbedder(add_sequence_dim=True, **params)
    encoder.load_state_dict(golden.weights(encoder.state_dict()))
    golden.assert_close("class", c=encoder(golden.inputs("class")["class_label"]).detach())


def test_dropped_labels_become_the_unconditional_class():
    encoder = ClassEmbedder(embed_dim=4, n_classes=5, add_sequence_dim=True, null=4)
    conditioner = Conditioner(text=encoder)
    cond = conditioner({"cls": torch.tensor([1, 2])}, 1.0)
    assert torch.equal(cond.crossattn[:, 0], encoder.embedding.weight[[4, 4]])


def test_without_an_unconditional_class_no_label_is_dropped():
    encoder = ClassEmbedder(embed_dim=4, n_classes=5, add_sequence_dim=True)
    cond = Conditioner(text=encoder)({"cls": torch.tensor([1, 2])}, 1.0)
    assert torch.equal(cond.crossattn[:, 0], encoder.embedding.weight[[1, 2]])
