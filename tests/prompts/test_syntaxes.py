"""Syntaxes of A1111 and ComfyUI by examples, that of compel compared with its own parser."""

import pytest

from ldm.prompts import parse_prompt
from ldm.prompts.a1111 import expand_schedule, parse_emphasis, split_subprompts
from ldm.runtime.errors import ArgumentError
from prompts.oracle import import_compel_module


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (
            "one (((barn:1.3)) [by] one (pond:0.5), fog, (((moon))).",
            [
                ("one ", 1), ("barn", 1.573), (" ", 1.1), ("by", 1), (" one ", 1.1),
                ("pond", 0.55), (", fog, ", 1.1), ("moon", 1.4641), (".", 1.1),
            ],
        ),
        ("(no end", [("no end", 1.1)]),
        ("(a:-1)", [("a", -1)]),
        ("(:1.3)", [("", 1)]),
        ("", [("", 1)]),
        ("(a, (b:1.5):1.2)", [("a, ", 1.2), ("b", 1.8)]),
        ("(a:b:1.3)", [("a:b", 1.3)]),
        ("a:1.3", [("a:1.3", 1)]),
        ("[a:b]", [("a:b", 0.9091)]),
        (r"\(a\) \[b\] \\ c)] d", [(r"(a) [b] \ c)] d", 1)]),
        ("( a : +1.30 )b", [(" a ", 1.3), ("b", 1)]),
    ],
)  # fmt: skip
def test_emphasis_is_parsed_as_by_a1111(text, pieces):
    (section,) = parse_emphasis(text)
    assert [(piece.text, round(piece.weight, 4)) for piece in section] == pieces


@pytest.mark.parametrize(
    ("text", "sections"),
    [
        ("a BREAK b", ["a", "b"]),
        ("a BREAKS b", ["a BREAKS b"]),
        ("BREAK a BREAK", ["", "a", ""]),
        ("(a BREAK b:1.2)", ["a", "b"]),  # here A1111 encodes the word BREAK
    ],
)
def test_break_starts_a_new_section(text, sections):
    parsed = parse_emphasis(text)
    assert ["".join(piece.text for piece in section) for section in parsed] == sections
    weights = {piece.weight for section in parsed for piece in section}
    assert weights == ({1.2} if "1.2" in text else {1.0})


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("a [b:c:0.5] d", [(5, "a b d"), (10, "a c d")]),
        ("[b:3]", [(3, ""), (10, "b")]),
        ("[b::3]", [(3, "b"), (10, "")]),
        ("[a:b:1.0]", [(10, "a")]),
        ("[a:b:1]", [(1, "a"), (10, "b")]),
        ("[a:b:0]", [(10, "b")]),
        ("[a:b:-2]", [(10, "b")]),
        (f"[a:b:1{'0' * 400}]", [(10, "a")]),
        ("[[a:b:2]:c:4]", [(2, "a"), (4, "b"), (10, "c")]),
        ("[un|]tied", [(n, "untied" if n % 2 else "tied") for n in range(1, 11)]),
        ("[un|||]tied", [(n, "untied" if n % 4 == 1 else "tied") for n in range(1, 11)]),
        ("([a:b:2]:1.2) [c]", [(2, "(a:1.2) [c]"), (10, "(b:1.2) [c]")]),
        (r"\[a:b:2]", [(10, r"\[a:b:2]")]),
    ],
)
def test_schedules_are_expanded_as_by_a1111(text, entries):
    assert expand_schedule(text, 10)[0] == entries


@pytest.mark.parametrize("text", ["a [b:c:half]", "[b:c:0.5", "a | b [c:d:3]", "[a:b]"])
def test_text_that_is_not_a_schedule_is_kept_with_a_warning(text):
    entries, warnings = expand_schedule(text, 10)
    assert entries == [(10, text)]
    assert len(warnings) == 1
    assert "plain text" in warnings[0]


def test_an_entry_that_ends_at_step_5_is_used_for_6_steps():
    (steps,) = parse_prompt("[a:b:5]", "a1111", 10).subprompts
    assert "".join(steps.at(step).text for step in range(11)) == "aaaaaabbbbb"


def test_and_splits_a_prompt_into_subprompts():
    assert split_subprompts("a AND b :0.5 AND c:-1") == [("a ", 1), (" b", 0.5), (" c", -1)]
    assert split_subprompts("a BAND b, ratio 16:9") == [("a BAND b, ratio 16:9", 1)]
    assert len(parse_prompt("a AND b", "a1111", is_negative=True).subprompts) == 1


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a (b) ((c:1.2)) (d:0.5)[e]", [("a ", 1), ("b", 1.1), (" ", 1), ("c", 1.2), (" ", 1),
                                         ("d", 0.5), ("[e]", 1)]),
        ("(a (b))", [("a ", 1.1), ("b", 1.21)]),
        (r"\(a\) (b\)c:2)", [("(a) ", 1), ("b)c", 2)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("", [("", 1)]),
    ],
)  # fmt: skip
def test_weights_are_parsed_as_by_comfy(text, pieces):
    (part,) = parse_prompt(text, "comfy").subprompts[0].entries[0][1].parts
    (section,) = part.texts[0]
    assert [(piece.text, round(piece.weight, 4)) for piece in section] == pieces


COMPEL_PROMPTS = r"""
a cat
a red cat++ sitting
a (red cat)1.3, on a mat
a (red cat)++, on a mat.
(a (big dog)1.5 cat)0.8 x
"a big dog"1.2 and (cat)--
twenty-one cats- and dogs+, birds
a b, c,d (e,f)+ g
((a b)1.3 c)1.2
("a cat", "a dog").blend(0.7, 0.3)
("a cat++", "a dog, big (red)1.3").blend(1,1)
("a cat", "a dog").blend(0.7, 0.3, no_normalize)
("a cat", "a dog").and()
("a = cat - dog", b, (c d)).and(1,2,3)
a cat++.swap(dog) eating
a - b + c
(a - b)1.3 c
a \(b\) c++
word\+ x
cat.attend(1.4) (a b).attend(++) x
"unclosed quote cat++
5" tall (dog)+
size 1.3 (size 1.3 x)1.2
a+++b c a.b++ café++ naïve- ünder (日本 語)1.2
(a)(b)+ (c)"d"+
() x ""+ y
("", "a").blend(1,1)
x (a:1.3) y a,b++ c++
""".strip().split("\n")


@pytest.mark.parametrize("text", COMPEL_PROMPTS)
def test_compel_parses_the_same_pieces(text):
    parser = import_compel_module("prompt_parser")

    def list_pieces(prompt):
        return [(piece.text, round(piece.weight, 9)) for piece in prompt.children]

    theirs, conjunction = [], parser.PromptParser().parse_conjunction(text)
    for prompt, weight in zip(conjunction.prompts, conjunction.weights, strict=True):
        mix = [(1.0, list_pieces(prompt))] if not isinstance(prompt, parser.Blend) else [
            (weight / (sum(prompt.weights) if prompt.normalize_weights else 1), list_pieces(each))
            for weight, each in zip(prompt.weights, prompt.prompts, strict=True)
        ]  # fmt: skip
        theirs.append((weight, mix))
    ours = parse_prompt(text, "compel").subprompts[0].entries[0][1]
    assert [
        (part.weight, [(mix, [(piece.text, round(piece.weight, 9)) for piece in section])
                       for mix, (section,) in zip(part.mix, part.texts, strict=True)])
        for part in ours.parts
    ] == theirs  # fmt: skip


def test_swap_exchanges_texts_between_two_fractions_of_the_steps():
    (steps,) = parse_prompt("a (cat).swap(dog, t_end=0.8) x", "compel", 10).subprompts
    texts = [steps.at(step).text for step in range(10)]
    assert texts == ["a cat x"] * 2 + ["a dog x"] * 6 + ["a cat x"] * 2


@pytest.mark.parametrize(
    ("text", "syntax", "message"),
    [
        ("a (b", "comfy", "`(` is not closed in `a (b`"),
        ("a b)", "comfy", "`)` without `(` in `a b)`"),
        ("a (b", "compel", "`(` is not closed"),
        ("a) b(", "compel", "`)` without `(`"),
        ("(a, b).blend(1)", "compel", "takes no numbers or one for each of 2 texts"),
        ("(a, b).blend(x, y)", "compel", "takes numbers"),
        ("(a, b).blend(nan, 1)", "compel", "takes finite numbers, got [nan, 1.0]"),
        ("a.swap(b, t_start=0.9, t_end=0.1)", "compel", "0 <= t_start < t_end <= 1, got 0.9 and"),
        ("(a, b).and() c", "compel", "must end with its .and"),
        ("a.swap(b, s_start=1)", "compel", "not `s_start`"),
        ("withLora(x, 1) a", "compel", "withLora is not supported"),
        ("(" * 5000, "a1111", "brackets are nested too deeply"),
        ("a", "a111", "did you mean `a1111`"),
    ],
)
def test_invalid_syntax_is_refused(text, syntax, message):
    with pytest.raises(ArgumentError) as caught:
        parse_prompt(text, syntax)
    assert message in str(caught.value)
