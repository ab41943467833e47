"""Names of modules and parameters: layer numbers, kinds, blocks, and the names in a model's files.

Transformers is imported inside the functions that need it: `sgm scan` does without it, and a report without torch too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def block_of(name: str) -> str | None:
    """The numbered block that contains a module or parameter; None outside the blocks.

    >>> block_of("model.layers.3.mlp.up_proj"), block_of("lm_head")
    ('model.layers.3', None)
    """
    parts = name.split(".")
    number = next((at for at, part in enumerate(parts) if part.isdigit()), None)
    return None if number is None else ".".join(parts[: number + 1])


def weight_conversions(model: nn.Module) -> list[Any]:
    """Transformers' rules that turn the tensors of a model's files into its parameters; [] for other models."""
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model)) if isinstance(model, PreTrainedModel) else []


def stored_to_model_names(model: nn.Module) -> Callable[[str], str]:
    """A function from a parameter's name in the model's files to its name in `model`; it can be pickled.

    The names differ because the matrices of many experts become one stack, and because the files of an encoder lack
    the prefix of the task's model.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    conversions = weight_conversions(model)
    return partial(
        _model_name,
        renamings=[c for c in conversions if isinstance(c, WeightRenaming)],
        converters=[c for c in conversions if isinstance(c, WeightConverter)],
        prefix=getattr(model, "base_model_prefix", None) or None,
        known={name: True for name, _ in model.named_parameters(remove_duplicate=False)},
    )


def _model_name(stored: str, renamings: list, converters: list, prefix: str | None, known: dict[str, bool]) -> str:
    from transformers.core_model_loading import rename_source_key

    return rename_source_key(stored, renamings, converters, prefix, known)[0]


def module_of(name: str) -> str:
    """The name without its `[part]`.

    >>> module_of("h.0.attn.c_attn[q]")
    'h.0.attn.c_attn'
    """
    return name.split("[")[0]


def layer_of(name: str) -> int | None:
    """The first number among the dotted parts of a matrix's name; None without one.

    >>> layer_of("model.layers.3.self_attn.q_proj"), layer_of("lm_head"), layer_of("experts[7.up]")
    (3, None, None)
    """
    return next((int(part) for part in module_of(name).split(".") if part.isdecimal()), None)


def kind_of(name: str) -> str:
    """The name with `*` for every number among its parts.

    >>> kind_of("model.layers.3.mlp.experts.7.up_proj"), kind_of("layers.3.mlp.experts.gate_up_proj[7.up]")
    ('model.layers.*.mlp.experts.*.up_proj', 'layers.*.mlp.experts.gate_up_proj[*.up]')
    """
    return re.sub(r"(?<![^.\[])\d+(?![^.\]])", "*", name)
