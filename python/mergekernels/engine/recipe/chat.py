"""The key `chat_template`: Jinja text, a file, a well-known name, or `auto`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ...formats.checkpoint import Checkpoint

__all__ = ["NAMED", "chat_template", "commonest"]

_MAX_BYTES = 64 << 20

NAMED = {
    "alpaca": (
        "{% for m in messages %}"
        "{% if m['role'] == 'system' %}{{ m['content'] + '\\n\\n' }}"
        "{% elif m['role'] == 'user' %}{{ '### Instruction:\\n' + m['content'] + '\\n\\n' }}"
        "{% else %}{{ '### Response:\\n' + m['content'] + eos_token + '\\n\\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "exaone": (
        "{% for m in messages %}{{ '[|' + m['role'] + '|]' + m['content'] }}"
        "{{ '\\n' if m['role'] == 'user' else '[|endofturn|]\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{% set ns.system = m['content'] + '\\n\\n' %}"
        "{% elif m['role'] == 'user' %}{{ '[INST] ' + ns.system + m['content'] + ' [/INST]' }}{% set ns.system = '' %}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
}
"""Templates that a recipe may name, written from the published prompt formats."""


def chat_template(text: str, folders: Sequence[Path]) -> str | None:
    """The template that `text` stands for: itself, a file in one of `folders`, or a known name; None if neither.

    Raises
    ------
    OSError, UnicodeDecodeError : the file cannot be read.
    """
    if "\n" in text or "{" in text:
        return text
    for folder in folders:
        if (folder / text).is_file():
            return (folder / text).read_text("utf-8")
    return NAMED.get(text)


def commonest(inputs: Sequence[Checkpoint]) -> str | None:
    """The template that most inputs have, the first in recipe order among equals; None if none has one."""
    counts: dict[str, int] = {}
    for checkpoint in inputs:
        text = _template_of(checkpoint.path)
        if text:
            counts[text] = counts.get(text, 0) + 1
    return max(counts, key=lambda t: counts[t]) if counts else None


def _template_of(folder: Path) -> str | None:
    """The template in a checkpoint's folder, with outer white space removed."""
    try:
        for name in ("chat_template.jinja", "tokenizer_config.json"):
            path = folder / name
            if path.is_file() and path.stat().st_size <= _MAX_BYTES:
                text = path.read_text("utf-8")
                found = text if name.endswith(".jinja") else _of_config(json.loads(text))
                if found:
                    return found.strip()
    except (OSError, ValueError, RecursionError):
        # The engine copies these files and reports what is wrong with them.
        return None
    return None


def _of_config(config: object) -> str | None:
    """The chat template of a tokenizer_config.json, the one called "default" where there are several."""
    template = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(template, list):
        template = next(
            (t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None
        )
    return template if isinstance(template, str) else None
