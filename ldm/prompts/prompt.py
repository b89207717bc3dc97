"""What all syntaxes parse a text to."""

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = [
    "ParsedPrompt", "Part", "Piece", "Prompt", "PromptSteps", "PromptWarning", "join_pieces",
]  # fmt: skip


class PromptWarning(UserWarning):
    """A part of a prompt has no effect, or is not read as it looks."""


@dataclass(frozen=True)
class Piece:
    """A piece of text and the weight of its tokens."""

    text: str
    weight: float = 1.0


Section = tuple[Piece, ...]
Text = tuple[Section, ...]  # a section begins a chunk of tokens


@dataclass(frozen=True)
class Part:
    """A mixture of texts; mostly of one.

    Args:
        texts: What is mixed.
        mix: Factor of the context of each text.
        weight: Of the mixture, away from the context of the empty prompt.
    """

    texts: tuple[Text, ...]
    mix: tuple[float, ...] = (1.0,)
    weight: float = 1.0


@dataclass(frozen=True)
class Prompt:
    """What an encoder makes one context of.

    Args:
        syntax: Whose rules of chunks and weights hold.
        parts: Their contexts follow each other; mostly one.
    """

    syntax: str
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """All pieces, without weights."""
        texts = (text for part in self.parts for text in part.texts)
        return " ".join(piece.text for text in texts for section in text for piece in section)


@dataclass(frozen=True)
class PromptSteps:
    """One prompt of a composition, which may change from step to step.

    Args:
        entries: (last step, prompt), in order.
        weight: Of its difference to the negative prompt.
    """

    entries: tuple[tuple[int, Prompt], ...]
    weight: float = 1.0

    def at(self, step: int) -> Prompt:
        """Return the prompt of a step, from 0: the first whose last step is not below it."""
        later = (prompt for last, prompt in self.entries if last >= step)
        return next(later, self.entries[-1][1])


@dataclass(frozen=True)
class ParsedPrompt:
    """A text as its syntax reads it.

    Args:
        compositions: Prompts whose guidance is summed; mostly one.
        notes: What was read literally, though it looks like syntax; a line each.
    """

    compositions: tuple[PromptSteps, ...]
    notes: tuple[str, ...] = ()

    @property
    def last_steps(self) -> frozenset[int]:
        """Steps after which a prompt may change."""
        return frozenset(last for one in self.compositions for last, _ in one.entries[:-1])


def constant(prompt: Prompt, notes: Iterable[str] = ()) -> ParsedPrompt:
    """Return a prompt that is the same in all steps."""
    return ParsedPrompt((PromptSteps(((0, prompt),)),), tuple(notes))


def join_pieces(pieces: Iterable[Piece]) -> Section:
    """Join neighbours of equal weight; nothing is one empty piece."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and joined[-1].weight == piece.weight:
            joined[-1] = Piece(joined[-1].text + piece.text, piece.weight)
        else:
            joined.append(piece)
    return tuple(joined) or (Piece(""),)


def quote(text: str, limit: int = 40) -> str:
    """Return a text for a message, shortened."""
    return f"`{text}`" if len(text) <= limit else f"`{text[:limit]} …`"
