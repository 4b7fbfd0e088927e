"""What the output takes from its inputs besides tensors: small files, a tokenizer, a chat template."""

from __future__ import annotations

import filecmp
from pathlib import Path

from ...errors import MergeError, cut
from .chat import NAMED, chat_template, commonest
from .inputs import Inputs
from .load import Recipe
from .slices import Slice
from .values import Reference, nearest

__all__ = ["Copied"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")


class Copied:
    """The choice of one recipe; problems and warnings are added to the lists given."""

    def __init__(self, recipe: Recipe, inputs: Inputs, problems: list[MergeError], warnings: list[str]) -> None:
        self._recipe = recipe
        self._schema = recipe.schema
        self._document = recipe.document
        self._inputs = inputs
        self._problems = problems
        self._warnings = warnings

    def tokenizer(self) -> int | None:
        """The input whose tokenizer is copied, None where the recipe does not say."""
        source: Reference | None = self._schema.tokenizer_source
        if source is None:
            return None
        loc = ("tokenizer_source",)
        if not source.exact and source.path == "union":
            message = "'tokenizer_source: union' is not supported: building a vocabulary is planned"
            self._problems.append(
                self._document.error(loc, message, code="recipe.planned", expected="base, or a model of the recipe")
            )
            return None
        if not source.exact and source.path == "base":
            if self._schema.base_model is None:
                if "base_model" not in self._recipe.data:
                    self._problems.append(self._document.error(loc, "'tokenizer_source: base' without a base_model"))
                return None
            source = self._schema.base_model
        if str(source) in self._inputs.failed:
            return None
        count = len(self._inputs.checkpoints)
        position = self._inputs.add(source, loc)
        if position is None or position >= count:
            labels = ", ".join(c.label for c in self._inputs.checkpoints[:count])
            message = "tokenizer_source is not a model of the recipe"
            got = repr(cut(str(source)))
            self._problems.append(self._document.error(loc, message, expected=f"base, or one of {labels}", got=got))
            return None
        self._compare_tokenizers(position)
        return position

    def _compare_tokenizers(self, position: int) -> None:
        """A warning where another input has other tokenizer files: rows of embeddings are never permuted."""
        chosen = self._inputs.checkpoints[position]
        for checkpoint in self._inputs.checkpoints:
            for name in _TOKENIZER_FILES:
                one, two = chosen.path / name, checkpoint.path / name
                if checkpoint is not chosen and one.is_file() and two.is_file() and not _equal(one, two):
                    self._warnings.append(
                        f"'{checkpoint.label}' has another {name} than '{chosen.label}', which is copied; "
                        "rows of embeddings are merged by position"
                    )

    def chat_template(self) -> str | None:
        """The template's text: as given, from a file, by name, or the inputs' commonest."""
        text = self._schema.chat_template
        if text is None:
            return None
        if text == "auto":
            found = commonest(self._inputs.checkpoints)
            if found is None:
                self._warnings.append("'chat_template: auto': no input has a chat template")
            return found
        loc = ("chat_template",)
        try:
            found = chat_template(text, (Path(), self._document.folder))
        except (OSError, UnicodeDecodeError) as error:
            self._problems.append(
                self._document.error(
                    loc, f"cannot read the chat template '{cut(text)}': {getattr(error, 'strerror', error)}"
                )
            )
            return None
        if found is None:
            expected = "auto, a file, Jinja text, or one of " + ", ".join(NAMED)
            hint = nearest(text, NAMED)
            self._problems.append(
                self._document.error(loc, "not a chat template", expected=expected, got=repr(text[:60]), hint=hint)
            )
        return found

    def donor(self, slices: list[Slice]) -> int:
        """The input whose small files are copied: the base model, else the first model."""
        if self._schema.base_model is not None:
            position = self._inputs.add(self._schema.base_model, ("base_model",))
            assert position is not None
            return position
        return slices[0].sources[0].input


def _equal(one: Path, two: Path) -> bool:
    try:
        return filecmp.cmp(one, two, shallow=False)
    except OSError:
        return False
