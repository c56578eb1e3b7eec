"""The model card of a training stage."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from pharmacist.core.console import markdown
from pharmacist.core.env import versions


_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ what }}

| | |
|---|---|
{% for name, value in facts.items() -%}
| {{ name }} | {{ value }} |
{% endfor %}
## Loading

In this folder:

```python
{{ loading }}
```

Prompts are rendered by {{ template }}.

## Settings

```yaml
{{ settings }}
```

## Intended use

{{ intended_use }}

Made with {{ versions }}.
"""


def model_card(
    *,
    title: str,
    what: str,
    base_model: str,
    tags: list[str],
    facts: Mapping[str, Any],
    settings: Mapping[str, Any],
    intended_use: str,
    adapter: bool,
    template: str,
) -> str:
    """Text of a README.md with the hub's metadata.

    Args:
        title: Headline.
        what: One paragraph.
        base_model: Hub id or folder.
        tags: Besides ``pharmacist``.
        facts: Rows of the table.
        settings: Shown as YAML.
        intended_use: One paragraph.
        adapter: Whether the weights are a PEFT adapter.
        template: Kind of the prompt template, ``chat`` or ``alpaca``.
    """
    # The hub's metadata takes hub ids only.
    is_id = not Path(base_model).exists() and base_model.count("/") <= 1
    data = ModelCardData(
        base_model=base_model if is_id else None,
        library_name="peft" if adapter else "transformers",
        tags=["pharmacist", *tags],
        pipeline_tag="text-generation",
    )
    used = ", ".join(f"{name} {found}" for name, found in versions().items() if name in _NAMED)
    escaped = {name: markdown(value) for name, value in facts.items()}
    card = ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        title=title,
        what=what,
        facts=escaped,
        intended_use=intended_use,
        versions=used,
        loading=_LOADING[adapter],
        template=_RENDERED[template],
        settings=yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True).rstrip(),
    )
    return str(card) + "\n"


_NAMED = ("pharmacist", "torch", "transformers", "peft")
_LOADING = {
    True: 'from peft import AutoPeftModelForCausalLM\nmodel = AutoPeftModelForCausalLM.from_pretrained(".")',
    False: 'from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained(".")',
}
_RENDERED = {
    "chat": "the tokenizer's chat template",
    "alpaca": "the Stanford Alpaca template, not by the tokenizer's chat template",
}
