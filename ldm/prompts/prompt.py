"""The parsed prompt that all syntaxes produce."""

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = [
    "ParsedPrompt", "Part", "Piece", "Prompt", "PromptSteps", "PromptWarning", "Section", "Text",
    "join_pieces", "quote",
]  # fmt: skip

MAX_QUOTED_CHARS = 40  # of a prompt, in messages


class PromptWarning(UserWarning):
    """Text of a prompt has no effect, or looks like syntax but is read literally."""


@dataclass(frozen=True)
class Piece:
    """A piece of text and the weight of its tokens."""

    text: str
    weight: float = 1.0


Section = tuple[Piece, ...]
Text = tuple[Section, ...]  # each section starts a new chunk of tokens


@dataclass(frozen=True)
class Part:
    """A weighted sum (blend) of the contexts of texts, usually of one.

    Args:
        mix: Factor of the context of each text.
        weight: Factor of the sum's difference from the context of the empty prompt.
    """

    texts: tuple[Text, ...]
    mix: tuple[float, ...] = (1.0,)
    weight: float = 1.0


@dataclass(frozen=True)
class Prompt:
    """A prompt that a text encoder encodes as one context.

    Args:
        syntax: Name of the syntax, which determines how to split into chunks and apply weights.
        parts: Parts whose contexts are concatenated, usually one.
    """

    syntax: str
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The texts of all pieces, without weights."""
        texts = (text for part in self.parts for text in part.texts)
        return " ".join(piece.text for text in texts for section in text for piece in section)


@dataclass(frozen=True)
class PromptSteps:
    """A subprompt, which may change from step to step.

    Args:
        entries: (last step of the prompt, prompt), in order; steps are counted from 0.
        weight: Factor of its difference from the negative prompt.
    """

    entries: tuple[tuple[int, Prompt], ...]
    weight: float = 1.0

    def at(self, step: int) -> Prompt:
        """Return the prompt of a step, counted from 0."""
        later = (prompt for last, prompt in self.entries if last >= step)
        return next(later, self.entries[-1][1])


@dataclass(frozen=True)
class ParsedPrompt:
    """A parsed text.

    Args:
        subprompts: Prompts joined by AND, whose guidance is summed; usually one.
        warnings: About text that looks like syntax but was read literally.
    """

    subprompts: tuple[PromptSteps, ...]
    warnings: tuple[str, ...] = ()

    @property
    def switch_steps(self) -> frozenset[int]:
        """Steps after which a subprompt may change."""
        return frozenset(last for steps in self.subprompts for last, _ in steps.entries[:-1])


def join_pieces(pieces: Iterable[Piece], separator: str = "") -> Section:
    """Join neighboring pieces of equal weight; return one empty piece if there are none."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and joined[-1].weight == piece.weight:
            joined[-1] = Piece(joined[-1].text + separator + piece.text, piece.weight)
        else:
            joined.append(piece)
    return tuple(joined) or (Piece(""),)


def quote(text: str) -> str:
    """Return a text in backticks for a message, shortened to MAX_QUOTED_CHARS."""
    return f"`{text}`" if len(text) <= MAX_QUOTED_CHARS else f"`{text[:MAX_QUOTED_CHARS]} …`"
