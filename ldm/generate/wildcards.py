"""Dynamic prompts: random choices in prompts, by the seed of an image.

    {a|b}             a or b                       {2::a|b}        a twice as often
    {2$$, $$a|b|c}    two of them, joined by ", "  __color__       a line of color.txt

The grammar is that of the package dynamicprompts.
"""

import logging
import warnings
from pathlib import Path

from dynamicprompts.generators import RandomPromptGenerator
from dynamicprompts.wildcards import WildcardManager
from dynamicprompts.wildcards.values import WildcardValues
from pyparsing import ParseException

from ldm.runtime.errors import ArgumentError, MissingFile, make_unknown_name_error

__all__ = ["DynamicPrompts"]

SYNTAX_MARKERS = ("{", "__")
# Other special characters of the package, and their placeholders while it expands a prompt.
PLACEHOLDERS = {"#": "\ue000", "%": "\ue001"}

logging.getLogger("dynamicprompts").setLevel(logging.ERROR)  # its warnings repeat our errors


class DynamicPrompts:
    """Expands dynamic prompts.

    Args:
        folder: Folder of wildcard files, also in subfolders; None = no wildcards.
    Raises:
        MissingFile: There is no such folder.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        path = None if folder is None else Path(folder)
        if path is not None and not path.is_dir():
            raise MissingFile(f"no folder `{path}`", "wildcards")
        self._generator = RandomPromptGenerator(_Wildcards(path))

    def expand(self, prompt: str, seed: int) -> str:
        """Expand a prompt, with random choices determined by a seed.

        Raises:
            ArgumentError: The prompt does not parse, or names an unknown wildcard.
        """
        if not any(marker in prompt for marker in SYNTAX_MARKERS):
            return prompt
        template = prompt
        for character, placeholder in PLACEHOLDERS.items():
            if f"{character}{{" not in template:
                template = template.replace(character, placeholder)
        try:
            with warnings.catch_warnings():
                # The package uses deprecated names of pyparsing.
                warnings.simplefilter("ignore", DeprecationWarning)
                text: str = self._generator.generate(template, 1, seeds=[seed])[0]
        except RecursionError as error:
            message = f"`{prompt}` expands without end: wildcards contain each other"
            raise ArgumentError(message, "dynamic_prompts") from error
        except (ParseException, StopIteration) as error:
            message = f"`{prompt}` is not a dynamic prompt: brackets or `__` are not closed"
            raise ArgumentError(message, "dynamic_prompts") from error
        for character, placeholder in PLACEHOLDERS.items():
            text = text.replace(placeholder, character)
        return text


class _Wildcards(WildcardManager):
    """The wildcards of a folder; `get_values` raises ArgumentError for a missing one."""

    def get_values(self, wildcard: str) -> WildcardValues:
        values = super().get_values(wildcard)
        if not len(values):
            if self.path is None:
                raise ArgumentError(f"`__{wildcard}__` needs a folder of wildcards", "wildcards")
            names = sorted(self.get_collection_names())
            raise make_unknown_name_error("wildcard", wildcard, names, argument="wildcards")
        return values
