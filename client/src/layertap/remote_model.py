"""A served model with the interface of a `transformers` model."""

from __future__ import annotations

import sys
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from layertap import _arguments, _requests
from layertap._arguments import CLIENT_TIMEOUT, Timeout
from layertap._client import DEFAULT_ADDRESS, Client
from layertap._model_inputs import as_inputs, check_positions, is_torch
from layertap._padding import ModelOutput, as_torch, padded
from layertap._remote_config import RemoteConfig
from layertap._results import Model
from layertap._types import DtypeName
from layertap.errors import InvalidArgument

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ModelOutput", "RemoteConfig", "RemoteModel"]

# The pad tokens of most vocabularies.
_PAD_TOKENS = ("[PAD]", "<pad>")
# Arguments of `transformers` encoders that a served model does not support.
_NOT_SERVED = (
    "inputs_embeds",
    "head_mask",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "past_key_values",
    "use_cache",
    "cache_position",
    "labels",
)


class RemoteModel:
    """A served model that is called like a `transformers` encoder.

    `address` is the address of a server, or an open `Client`, which `close` leaves open.
    `output_hidden_states`, `output_attentions`, `output_logits` and `return_dict` are the defaults of calls;
    `config` can change them later. `dtype` is the element type of float tensors in the reply. `return_tensors` is "np" or
    "pt" (None: torch tensors if the inputs are torch tensors, otherwise numpy arrays). `timeout` is as in
    `Client.encode`.

    With `output_logits`, the outputs are those of the class with the model's head, such as
    `AutoModelForSequenceClassification`: `logits` in place of `last_hidden_state` and `pooler_output`. Without
    it, they are those of `AutoModel`. None: logits for a head that classifies texts or tokens, but not for a
    masked-language head.

    Outputs have the keys, order and padded shapes of `transformers`. Padded positions are zeros;
    `transformers` returns meaningless values computed from pad tokens there. Rows are computed without
    padding, so a text has the same values alone, padded on the right and padded on the left.

    Example:
        >>> model = RemoteModel("127.0.0.1:50051", output_hidden_states=True, output_attentions=True)
        >>> outputs = model(torch.tensor([tokenizer.encode("a text")]))
        >>> hidden_states, attentions = outputs[-2:]

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """

    training = False

    def __init__(
        self,
        address: str | Client = DEFAULT_ADDRESS,
        model: str = "",
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_logits: bool | None = None,
        return_dict: bool = True,
        dtype: DtypeName = "float32",
        return_tensors: Literal["np", "pt"] | None = None,
        timeout: Timeout = CLIENT_TIMEOUT,
    ) -> None:
        self.model = _arguments.optional_text("model", model)
        self._defaults: dict[str, bool | None] = {
            "output_hidden_states": _arguments.flag("output_hidden_states", output_hidden_states),
            "output_attentions": _arguments.flag("output_attentions", output_attentions),
            "output_logits": (
                None if output_logits is None else _arguments.flag("output_logits", output_logits)
            ),
            "return_dict": _arguments.flag("return_dict", return_dict),
        }
        _requests.encode_request(dtype=dtype)
        self._dtype: DtypeName = dtype
        self._return_tensors = _tensor_type(return_tensors)
        if not isinstance(timeout, _arguments.ClientDefault):
            timeout = _arguments.seconds("timeout", timeout)
        self._timeout: Timeout = timeout
        self._device: Any = "cpu"
        self._owns_client = not isinstance(address, Client)
        self.client = address if isinstance(address, Client) else Client(address)

    @classmethod
    def from_pretrained(
        cls,
        name: str = "",
        *,
        address: str | Client = DEFAULT_ADDRESS,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_logits: bool | None = None,
        return_dict: bool = True,
        dtype: DtypeName = "float32",
        return_tensors: Literal["np", "pt"] | None = None,
        timeout: Timeout = CLIENT_TIMEOUT,
    ) -> Self:
        """The served model of this name. Asks the server for it at once.

        Example:
            >>> model = RemoteModel.from_pretrained("bert-base-chinese", address="127.0.0.1:50051")

        Raises:
            NotFound: the server has no such model; the message lists its models.
        """
        model = cls(
            address,
            name,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_logits=output_logits,
            return_dict=return_dict,
            dtype=dtype,
            return_tensors=return_tensors,
            timeout=timeout,
        )
        try:
            _ = model.config
        except BaseException:
            model.close()
            raise
        return model

    @cached_property
    def config(self) -> RemoteConfig:
        """The model's shape, which is requested from the server once, and the defaults of calls."""
        return RemoteConfig(self._facts, self._defaults, self._find_pad_token)

    @cached_property
    def _facts(self) -> Model:
        return self.client.model(self.model, timeout=self._timeout)

    def _find_pad_token(self) -> int | None:
        for text in _PAD_TOKENS:
            try:
                tokens = self.client.tokenize(text, model=self.model, timeout=self._timeout)
            except InvalidArgument:  # the tokenizer makes no token of this text
                continue
            (own,) = np.nonzero(~tokens.special)
            # The text is one token of the vocabulary, so it is the pad token.
            if len(own) == 1 and tokens.tokens[own[0]] == text:
                return int(tokens.ids[own[0]])
            (named,) = np.nonzero([token == text for token in tokens.tokens])
            if len(named) == 1 and len(own) == 0:
                return int(tokens.ids[named[0]])
        return None

    @property
    def name_or_path(self) -> str:
        """The name under which the model is served."""
        return self.config.name_or_path

    # ------------------------------------------------- the interface of a torch module

    @property
    def device(self) -> Any:
        """The device of the outputs for texts, "cpu" unless changed by `to`; a `torch.device` if torch is
        imported. Outputs for tensors are on the device of the tensors."""
        torch = sys.modules.get("torch")
        return self._device if torch is None else torch.device(self._device)

    @property
    def dtype(self) -> Any:
        """The element type of the outputs: a torch dtype if torch is imported, otherwise a numpy dtype."""
        name = "float16" if self._dtype == "float16" else "float32"
        torch = sys.modules.get("torch")
        return np.dtype(name) if torch is None else getattr(torch, name)

    def eval(self) -> Self:
        """Returns the model, which is always in evaluation mode."""
        return self

    def train(self, mode: bool = True) -> Self:
        """Returns the model for `train(False)`.

        Raises:
            NotImplementedError: `mode` is True; a served model cannot be trained.
        """
        if mode:
            raise NotImplementedError("train(True): a served model has no dropout and no gradients")
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Returns the model for `requires_grad_(False)`.

        Raises:
            NotImplementedError: `requires_grad` is True; the weights are on the server.
        """
        if requires_grad:
            raise NotImplementedError("requires_grad_(True): a served model gives no gradients")
        return self

    def to(self, device: Any = None, dtype: Any = None, non_blocking: bool = False) -> Self:
        """Sets the device of the outputs for texts, and returns the model, which stays on its server. Outputs
        for tensors are on the device of the tensors.

        Raises:
            TypeError: the dtype is not that of the outputs, which is chosen with `RemoteModel(dtype=…)`.
        """
        if type(device).__name__ == "dtype" or isinstance(device, np.dtype):
            device, dtype = None, device
        if is_torch(device):
            device, dtype = device.device, device.dtype
        if dtype is not None and dtype != self.dtype:
            raise TypeError(
                f"to({dtype!r}): a served model can only be asked for another dtype, with RemoteModel(dtype=…)"
            )
        if isinstance(device, str) or type(device).__name__ == "device":
            torch = sys.modules.get("torch")  # it rejects wrong names
            self._device = device if torch is None else torch.device(device)
        elif isinstance(device, int) and not isinstance(device, bool):
            self._device = f"cuda:{device}"
        elif device is not None:
            raise TypeError(f"to({device!r}): give a device, such as 'cpu' or 'cuda'")
        return self

    def cuda(self, device: int | str | None = None) -> Self:
        """As `to("cuda")`."""
        return self.to("cuda" if device is None else device)

    def cpu(self) -> Self:
        """As `to("cpu")`."""
        return self.to("cpu")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{type(self).__name__} has no {name!r}: the weights and layers of a served model stay on its server; "
            "it gives outputs, `config`, `device` and `dtype`"
        )

    def close(self) -> None:
        """Closes the connection, unless the model was created with an open `Client`."""
        if self._owns_client:
            self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --------------------------------------------------------------------------- calls

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_logits: bool | None = None,
        return_dict: bool | None = None,
        return_tensors: Literal["np", "pt"] | None = None,
        **not_served: Any,
    ) -> Any:
        """Returns the outputs for `input_ids` of shape (B, T), or for a text or a list of B texts.

        `attention_mask` (B, T) is 1 for tokens and 0 for padding, on the left or on the right. Texts are
        tokenized by the server, with special tokens; their outputs are padded on the right.
        `output_hidden_states`, `output_attentions`, `output_logits` and `return_dict` default to the values in
        `config`.
        `position_ids` may only be the positions that the model counts itself. Other arguments of a
        `transformers` encoder are accepted only if they are None.

        Returns a `ModelOutput`, or its tuple if `return_dict` is False: `last_hidden_state` (B, T, H),
        `pooler_output` (B, H) if the model has a pooler, `hidden_states` L+1 times (B, T, H), `attentions`
        L times (B, A, T, T). With `output_logits`, `logits` takes the place of the first two: (B, labels), or
        (B, T, labels) if the head scores tokens.

        Raises:
            ValueError: shapes differ, an id is negative, or a row of the mask is empty or has a hole.
            TypeError: an argument is not supported by a served model; the message names it.
            LayertapError: the call to the server failed.
        """
        for name, value in not_served.items():
            if name not in _NOT_SERVED:
                raise TypeError(f"{name}: a served model has no such argument")
            if value is not None and not (name == "use_cache" and value is False):
                raise TypeError(f"{name}: not supported by a served model; leave it out")
        defaults = self.config
        wants = {
            name: getattr(defaults, name) if value is None else _arguments.flag(name, value)
            for name, value in (
                ("output_hidden_states", output_hidden_states),
                ("output_attentions", output_attentions),
                ("output_logits", output_logits),
                ("return_dict", return_dict),
            )
        }
        tensor_type = (
            _tensor_type(return_tensors) or self._return_tensors or ("pt" if is_torch(input_ids) else "np")
        )
        inputs, mask = as_inputs(input_ids, attention_mask, token_type_ids)
        if position_ids is not None:
            check_positions(position_ids, mask, defaults.model_type)
        results = self.client.encode(
            inputs,
            model=self.model,
            logits=wants["output_logits"],
            last_hidden_state=not wants["output_logits"],
            pooler_output=self._facts.has_pooler and not wants["output_logits"],
            hidden_states=wants["output_hidden_states"],
            attentions=wants["output_attentions"],
            dtype=self._dtype,
            timeout=self._timeout,
        )
        output = padded(results, mask)
        if tensor_type == "pt":
            output = as_torch(output, input_ids.device if is_torch(input_ids) else self._device)
        return output if wants["return_dict"] else output.to_tuple()

    __call__ = forward


def _tensor_type(value: Any) -> Literal["np", "pt"] | None:
    if value is None or value in ("np", "pt"):
        return value  # type: ignore[no-any-return]
    raise _arguments.wrong_value("return_tensors", value, "give 'np', 'pt' or None")
