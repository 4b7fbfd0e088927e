"""The small files beside the tensors: config, tokenizer, recipe, model card. All known before a merge begins."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import InputError
from ..formats.checkpoint import Checkpoint
from .fileops import read_small
from .io import Io
from .recipe.names import find_head_and_embedding
from .resolved import ResolvedMerge

__all__ = ["RECIPE_NAME", "SmallFile", "folder_of", "small_files"]

RECIPE_NAME = "merge_recipe.yaml"

_FROM_DONOR = ("generation_config.json", "preprocessor_config.json", "processor_config.json")
_TOKENIZER = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


@dataclass(frozen=True)
class SmallFile:
    """A file that is copied or written whole. data : its bytes; None for a copy of `source`."""

    name: str
    size: int
    sha256: str
    data: bytes | None = None
    source: Path | None = None

    @staticmethod
    def of(name: str, data: bytes) -> SmallFile:
        """A file with these bytes."""
        return SmallFile(name, len(data), hashlib.sha256(data).hexdigest(), data)

    def read(self, io: Io) -> bytes:
        """The bytes to publish.

        Raises
        ------
        InputError : the source is gone or has changed since the plan.
        """
        if self.data is not None:
            return self.data
        assert self.source is not None
        data = _read(io, self.source)
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise InputError(
                "the input was changed after the merge was planned", code="input.changed", file=str(self.source)
            )
        return data


def folder_of(checkpoint: Checkpoint) -> Path:
    """The folder in which a checkpoint's small files lie: its own, or that of the single file that was named."""
    return checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent


def small_files(io: Io, merge: ResolvedMerge) -> tuple[tuple[SmallFile, ...], list[str]]:
    """The small files of a merge, in order of name, without index and manifest; and warnings about them.

    Raises
    ------
    InputError : one that is there cannot be read, or is not JSON where it must be changed.
    """
    files: dict[str, SmallFile] = {}
    warnings: list[str] = []

    def put(name: str, data: bytes, source: Path | None = None) -> None:
        digest = hashlib.sha256(data).hexdigest()
        files[name] = SmallFile(name, len(data), digest, None if source else data, source)

    donor, tokenizer = merge.inputs[merge.donor], merge.inputs[merge.tokenizer]
    for checkpoint, names in ((donor, _FROM_DONOR), (tokenizer, _TOKENIZER)):
        for name in names:
            path = folder_of(checkpoint) / name
            if path.is_file():
                put(name, _read(io, path), path)
    if donor.config:
        config = {**donor.config, **merge.config}
        put("config.json", _json(config))
        warnings += _check_vocabulary(merge, config)
    else:
        warnings.append(f"'{_label(donor)}' has no config.json, so the output has none")
    kinds = ("config.json", "tokenizer_config.json", *_FROM_DONOR)
    for name in dict.fromkeys(n for kind in kinds if kind in files for n in _code(files[kind].read(io))):
        places = [folder_of(c) / f"{name}.py" for c in (donor, tokenizer)]
        found = [p for p in places if name.isidentifier() and p.is_file()]
        if found:
            put(found[0].name, _read(io, found[0]), found[0])
        else:
            warnings.append(f"auto_map names {name}.py, which is not in '{_label(donor)}' and is not copied")
    if (folder_of(tokenizer) / "chat_templates").is_dir():
        warnings.append(f"the folder chat_templates of '{_label(tokenizer)}' is not copied")
    if merge.chat_template is not None:
        _set_chat_template(io, merge.chat_template, files, put)
    put(RECIPE_NAME, _yaml(merge.recipe).encode())
    put("README.md", _model_card(merge).encode())
    return tuple(files[name] for name in sorted(files)), warnings


def _code(text: bytes) -> Iterator[str]:
    """Modules beside a JSON file that its `auto_map` names."""
    try:
        data = json.loads(text)
    except ValueError:
        return
    entries = data.get("auto_map") if isinstance(data, Mapping) else None
    for entry in entries.values() if isinstance(entries, Mapping) else ():
        for name in entry if isinstance(entry, list) else [entry]:
            # "owner/name--module.Class" is loaded from that repository, wherever the model lies.
            if isinstance(name, str) and "--" not in name:
                yield name.rpartition(".")[0]


def _check_vocabulary(merge: ResolvedMerge, config: Mapping[str, Any]) -> list[str]:
    """A warning where config.json gives another vocabulary size than the embedding has rows."""
    text = config.get("text_config")
    size = config.get("vocab_size", text.get("vocab_size") if isinstance(text, Mapping) else None)
    shapes = {t.name: t.shape for t in merge.tensors if len(t.shape) == 2}
    _, name = find_head_and_embedding(shapes)
    if not isinstance(size, int) or name is None or shapes[name][0] == size:
        return []
    return [f"vocab_size in config.json is {size}, but '{name}' has {shapes[name][0]} rows"]


def _read(io: Io, path: Path) -> bytes:
    try:
        return read_small(io, path)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", code="input.open", file=str(path)) from error


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def _yaml(data: Any) -> str:
    import yaml

    return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120))


def _set_chat_template(io: Io, text: str, files: dict[str, SmallFile], put: Callable[[str, bytes], None]) -> None:
    """The template as a file of its own, which current readers prefer, and no second one in the tokenizer's config."""
    files.pop("chat_template.json", None)
    put("chat_template.jinja", text.encode())
    config = files.get("tokenizer_config.json")
    if config is None:
        return
    try:
        data = json.loads(config.read(io))
    except ValueError as error:
        raise InputError(
            "not valid JSON", code="input.json", file=str(config.source), hint="The chat template is set in this file."
        ) from error
    if isinstance(data, dict) and "chat_template" in data:
        del data["chat_template"]
        put("tokenizer_config.json", _json(data))


def _label(checkpoint: Checkpoint) -> str:
    return checkpoint.label or checkpoint.path.name


def _model_card(merge: ResolvedMerge) -> str:
    labels = list(dict.fromkeys(_label(c) for c in merge.inputs))
    front = "".join(f"- {json.dumps(label, ensure_ascii=False)}\n" for label in labels)
    rows = "".join(f"- `{label}`\n" for label in labels)
    recipe = _yaml(merge.recipe)
    return (
        f"---\nbase_model:\n{front}tags:\n- merge\n- mergekernels\n---\n\n# Merged model\n\n"
        f"Made by mergekernels {__version__} with the method `{merge.method}`"
        + (f" (dialect `{merge.dialect}`)" if merge.dialect != "default" else "")
        + f", seed {merge.seed}.\n\n## Inputs\n\n{rows}\n## Recipe\n\n```yaml\n{recipe}```\n\n"
        "`merge_manifest.json` holds the identities of the inputs and the SHA-256 of every tensor and file; "
        "`mergekernels verify` recomputes them.\n"
    )
