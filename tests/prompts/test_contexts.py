"""Contexts of parsed prompts, compared with A1111's formula in float64 and with compel."""

from pathlib import Path

import pytest
import torch

from ldm.conditioning import Cond
from ldm.encoders.chunks import COMMA_ID, Unit, split_at_commas
from ldm.encoders.text import TextEncoder
from ldm.prompts import parse_prompt
from ldm.prompts.a1111 import parse_emphasis
from loading.lorahelp import (
    FAMILIES,
    build_tiny_model,
    build_transformers_tokenizer,
    build_transformers_tower,
)
from prompts.oracle import import_compel_module

SLOW = pytest.mark.slow
WORDS = "red (apple:1.3) on a wooden table, [photograph], sharp focus, (light:0.6), "
LONG_PROMPT = WORDS * 9 + "the (end)"  # 150 tokens


def build_encoders(family: str) -> list[TextEncoder]:
    encoders = build_tiny_model(family).conditioner.find_all(TextEncoder)
    for encoder in encoders:
        for name, bias in encoder.named_parameters():
            if name.endswith(("ln_final.bias", "final_layer_norm.bias")):
                torch.nn.init.constant_(bias, -0.2)  # the mean of outputs, which A1111 divides by
    return encoders


def make_sections(description: str) -> list[list[Unit]]:
    """Make units from `5w` (5 words), `,`, `B` (BREAK), `5t` (textual inversion of 5 vectors)."""
    sections: list[list[Unit]] = [[]]
    for word in description.split():
        if word == "B":
            sections.append([])
        elif word == ",":
            sections[-1].append(Unit((COMMA_ID,)))
        elif word.endswith("t"):
            sections[-1].append(Unit(tuple(range(-int(word[:-1]), 0))))
        else:
            sections[-1] += [Unit((320,))] * int(word[:-1])
    return sections


def count_tokens(chunks) -> list[int]:
    return [sum(len(unit.ids) for unit in chunk) for chunk in chunks]


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        ("75w", [75]), ("76w", [75, 1]), ("60w , 20w", [61, 20]), ("54w , 30w", [75, 10]),
        ("55w , 30w", [56, 30]), ("74w , 3w", [75, 3]), ("75w , 3w", [75, 4]),
        ("10w B 5w", [10, 5]), ("B 5w", [0, 5]), ("5w B", [5]), ("", [0]), ("5w B B", [5, 0]),
        ("70w 4t 3w", [75, 2]), ("70w 8t 3w", [70, 11]), ("60w , 10w 8t", [71, 8]),
    ],
)  # fmt: skip
def test_chunks_are_split_as_by_a1111(description, expected):
    assert count_tokens(split_at_commas(make_sections(description))) == expected


def compute_a1111_context(encoder: TextEncoder, text: str, syntax: str = "a1111") -> torch.Tensor:
    """Compute A1111's context, (77 k, D) float64: one run of the tower for each chunk."""
    tower = build_transformers_tower(encoder).double()
    is_penultimate = encoder.always_return_pooled or getattr(encoder, "layer", "") == "hidden"
    chunks = []
    sections = [make_units(encoder, section) for section in parse_emphasis(text)]
    for units in split_at_commas(sections):
        ids = [49406, *(i for unit in units for i in unit.ids), 49407]
        weights = [1, *(unit.weight for unit in units for _ in unit.ids)]
        pad = encoder.tokenizer_variant.pad_id
        output = tower(torch.tensor([ids + [pad] * (77 - len(ids))]), output_hidden_states=True)
        z = output.hidden_states[-2] if is_penultimate else output.last_hidden_state
        w = torch.tensor(weights + [1] * (77 - len(weights)), dtype=torch.float64)[:, None]
        w = torch.ones_like(w) if syntax == "a1111_ignore" else w
        keeps_mean = syntax == "a1111"
        chunks.append(z[0] * w * (z[0].mean() / (z[0] * w).mean() if keeps_mean else 1))
    return torch.cat(chunks)


def make_units(encoder, section):
    for piece in section:
        ids = encoder.tokenize([piece.text])[0].tolist()[1:]
        yield from (Unit((i,), piece.weight) for i in ids[: encoder.count_tokens(piece.text)])


@torch.no_grad()
@pytest.mark.parametrize(
    ("syntax", "family"),
    [
        pytest.param(syntax, family, marks=[SLOW] if family == "sdxl" and syntax != "a1111" else [])
        for syntax in ("a1111", "a1111_no_norm", "a1111_ignore")
        for family in FAMILIES
    ],
)
def test_contexts_equal_those_of_a1111(family, syntax):
    for encoder in build_encoders(family):
        for text in ("a (red:1.4) [apple]", LONG_PROMPT, f"short (one:1.2) BREAK {WORDS}"):
            prompt = parse_prompt(text, syntax).subprompts[0].entries[0][1]
            output = encoder([prompt])
            context = output if isinstance(output, torch.Tensor) else output.crossattn
            expected = compute_a1111_context(encoder, text, syntax)
            assert context[0].shape == expected.shape
            error = (context[0] - expected).abs().max() / expected.abs().max()
            assert error < 1e-4  # observed: 1.3e-5 where the mean is about 0, else 5e-7


@torch.no_grad()
def test_brackets_are_text_if_emphasis_is_off():
    (encoder,) = build_encoders("sd1")
    text = "a (red:1.4) [apple] BREAK b"
    literal = encoder([parse_prompt(text, "a1111_none").subprompts[0].at(0)])
    assert torch.equal(literal, encoder([text]))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_text_without_weights_has_the_same_context_in_every_syntax(family):
    text = "a red apple, on a table"
    for encoder in build_encoders(family):
        plain = encoder([text])
        for syntax in ("a1111", "comfy", "compel"):
            parsed = encoder([parse_prompt(text, syntax).subprompts[0].entries[0][1]])
            for ours, theirs in zip(list_tensors(parsed), list_tensors(plain), strict=True):
                assert torch.equal(ours, theirs)


def list_tensors(output: torch.Tensor | Cond) -> list[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else list(output.tensors().values())


@torch.no_grad()
def test_weights_of_comfy_scale_the_distance_from_the_empty_prompt():
    (encoder,) = build_encoders("sd1")
    empty, plain = encoder(["", "a red apple"])
    weighted = encoder([parse_prompt("a (red:1.5) apple", "comfy").subprompts[0].at(0)])[0]
    expected = plain.clone()
    expected[2] = empty[2] + 1.5 * (plain[2] - empty[2])
    assert torch.allclose(weighted, expected, atol=1e-6)


def test_comfy_does_not_split_words():
    (encoder,) = build_encoders("sd1")
    word = "supercalifragilistic"
    count = encoder.count_tokens(word)
    prompt = parse_prompt("a " * 73 + word, "comfy").subprompts[0].at(0)
    assert 1 < count < 8
    assert [count_tokens(text) for text in encoder.split_into_chunks(prompt)] == [[73, count]]


@torch.no_grad()
def test_a_shorter_context_is_repeated_to_the_length_of_the_longest():
    (encoder,) = build_encoders("sd1")
    prompts = [parse_prompt(text, "a1111").subprompts[0].at(0) for text in ("a", LONG_PROMPT)]
    batch, single = encoder(prompts), encoder(prompts[:1])
    assert batch.shape[1] == 77 * 2
    assert torch.allclose(batch[0], single[0].repeat(2, 1), atol=1e-6)


@torch.no_grad()
def test_the_pooled_output_is_that_of_the_first_chunk():
    encoder = build_encoders("sdxl")[1]
    prompt = parse_prompt(LONG_PROMPT, "a1111").subprompts[0].at(0)
    first = encoder.split_into_chunks(prompt)[0][0]
    ids = torch.tensor([[49406, *(i for unit in first for i in unit.ids), 49407]])
    ids = torch.nn.functional.pad(ids, (0, 77 - ids.shape[1]))
    assert torch.allclose(encoder([prompt]).vector, encoder(ids).vector, atol=1e-6)


@torch.no_grad()
def test_the_vectors_of_a_textual_inversion_stay_in_one_chunk():
    (encoder,) = build_encoders("sd1")
    encoder.added_embeddings = {"<thing>": torch.randn(8, encoder.width)}
    for syntax in ("a1111", "comfy", "compel"):
        prompt = parse_prompt("a " * 70 + "<thing> b", syntax).subprompts[0].at(0)
        assert [count_tokens(text) for text in encoder.split_into_chunks(prompt)] == [[70, 9]]
        assert encoder([prompt]).shape[1] == 154


def test_textual_inversions_in_the_syntax_of_comfy_are_read():
    (encoder,) = build_encoders("sd1")
    encoder.added_embeddings = {"thing": torch.randn(2, encoder.width)}
    chunks = [
        encoder.split_into_chunks(parse_prompt(text, "comfy").subprompts[0].at(0))
        for text in ("a (embedding:thing:1.2), b", "a (thing:1.2), b")
    ]
    assert chunks[0] == chunks[1]
    assert count_tokens(chunks[0][0]) == [5]


def build_compel(family: str, encoder: TextEncoder, folder: Path):
    """Build compel's encoder with the weights of ours."""
    embeddings_type = import_compel_module("embeddings_provider").ReturnedEmbeddingsType
    layer = embeddings_type.LAST_HIDDEN_STATES_NORMALIZED
    if family == "sdxl":
        layer = embeddings_type.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
    return import_compel_module("compel").Compel(
        build_transformers_tokenizer(encoder, folder),
        build_transformers_tower(encoder),
        truncate_long_prompts=False,
        returned_embeddings_type=layer,
    )


LONG_COMPEL_PROMPT = (
    "a red apple++ on a (wooden table)1.3, photograph. (sharp focus)0.6 and (soft light)- of "
    "the evening sun; an old window behind it, dust in the air. "
) * 6
COMPEL_PROMPTS = [
    "a red apple++ on a (wooden table)0.7",
    "(a red (apple)1.5 on)0.8 a table--",
    '("a red apple", "a (green)1.4 pear").blend(0.7, 0.3)',
    f'("a red apple", "{LONG_COMPEL_PROMPT}").blend(1, 2)',
    '("a red apple", "a green pear+").blend(0.7, 0.7, no_normalize)',
    '("a red apple", "a green pear").and(1, 0.6)',
    LONG_COMPEL_PROMPT,
    "(gone)0 here, (against)-1",
    "",
]


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "index"),
    [("sd1", 0), *(pytest.param(*n, marks=SLOW) for n in (("sd2", 0), ("sdxl", 0), ("sdxl", 1)))],
)
def test_contexts_equal_those_of_compel(tmp_path, family, index):
    encoder = build_encoders(family)[index]
    compel = build_compel(family, encoder, tmp_path)
    error = 0.0
    for text in COMPEL_PROMPTS:
        prompt = parse_prompt(text, "compel").subprompts[0].at(0)
        output, expected = encoder([prompt]), compel(text)
        context = output if isinstance(output, torch.Tensor) else output.crossattn
        assert context.shape == expected.shape
        error = max(error, float((context - expected).abs().max() / expected.abs().max()))
    assert error < 1e-5  # observed: 3e-7
