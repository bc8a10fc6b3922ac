"""The configuration of a served model, with the names of a `transformers` configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from layertap import _arguments
from layertap._results import Model


class RemoteConfig:
    """A served model's shape and the defaults of its calls, with the names of a `transformers` configuration.

    `output_hidden_states`, `output_attentions`, `output_logits` and `return_dict` may be set; the rest is
    read-only.
    `max_position_embeddings` is the largest number of tokens in an input that the server accepts, including
    special tokens. `pad_token_id` is requested from the server when it is first used. `id2label`, `label2id`
    and `num_labels` are those of the model's head; a model without labels does not have them. Other
    attributes of a `transformers` configuration are not available and raise AttributeError.
    """

    model_type: str
    name_or_path: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    pad_token_id: int
    id2label: dict[int, str]
    label2id: dict[str, int]
    num_labels: int
    output_hidden_states: bool
    output_attentions: bool
    output_logits: bool
    return_dict: bool

    def __init__(
        self, model: Model, defaults: Mapping[str, bool | None], find_pad_token: Callable[[], int | None]
    ) -> None:
        shape = {
            "model_type": model.architecture,
            "name_or_path": model.name,
            "hidden_size": model.hidden_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_attention_heads,
            "vocab_size": model.vocab_size,
            "max_position_embeddings": model.max_tokens,
        }
        vars(self).update(shape | dict(defaults))
        if self.output_logits is None:
            # A vocabulary of logits for each token is large, so it is sent only on request.
            vars(self)["output_logits"] = model.head in ("sequence_classification", "token_classification")
        if model.labels:
            vars(self).update(
                id2label=dict(enumerate(model.labels)),
                label2id={label: index for index, label in enumerate(model.labels)},
                num_labels=len(model.labels),
            )
        vars(self)["_find_pad_token"] = find_pad_token

    @property
    def use_return_dict(self) -> bool:
        """`return_dict`, under the name that older scripts use."""
        return self.return_dict

    def to_dict(self) -> dict[str, Any]:
        """All known attributes by name."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("output_hidden_states", "output_attentions", "output_logits", "return_dict"):
            raise AttributeError(f"config.{name} cannot be set: it is a property of the served model")
        vars(self)[name] = _arguments.flag(name, value)

    def __getattr__(self, name: str) -> Any:
        # Called only for attributes that are not set.
        if name == "pad_token_id" and "_find_pad_token" in vars(self):
            number = self._find_pad_token()
            if number is not None:
                vars(self)[name] = number
                return number
            raise AttributeError("the model's pad token is unknown; use the tokenizer's pad_token_id")
        raise AttributeError(f"config.{name}: the server does not report this")

    def __repr__(self) -> str:
        return f"RemoteConfig({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"
