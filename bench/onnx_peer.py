"""ONNX Runtime, one text at a time: the fastest CPU engine of comparable servers. Used only by benchmarks."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Ids = npt.NDArray[np.int64]
NAMES = ("input_ids", "attention_mask", "token_type_ids")


class LastHiddenState(torch.nn.Module):  # type: ignore[misc]  # torch is not followed by the type checker
    """A model with positional arguments and one output, as the exporter needs it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state


class OnnxRuntime:
    """A BERT exported from its eager float32 model, with its graph fused by ONNX Runtime's optimizer."""

    def __init__(self, model: Any, num_threads: int) -> None:
        import onnxruntime
        from onnxruntime.transformers.optimizer import optimize_model

        with tempfile.TemporaryDirectory() as folder:
            exported, optimized = Path(folder, "model.onnx"), Path(folder, "optimized.onnx")
            export(model, exported)
            config = model.config
            optimize_model(
                str(exported),
                model_type="bert",
                num_heads=config.num_attention_heads,
                hidden_size=config.hidden_size,
            ).save_model_to_file(str(optimized))
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = num_threads
            # By default its threads spin after a call, which would slow down what runs next in this process.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            self._session = onnxruntime.InferenceSession(
                str(optimized), options, providers=["CPUExecutionProvider"]
            )

    def __call__(self, input_ids: Ids) -> npt.NDArray[np.float32]:
        """(n, T) ids to the (n, T, H) last hidden state."""
        feed = dict(zip(NAMES, (input_ids, np.ones_like(input_ids), np.zeros_like(input_ids)), strict=True))
        output: npt.NDArray[np.float32] = self._session.run(None, feed)[0]
        return output


def export(model: Any, path: Path) -> None:
    from torch.export import Dim

    axes = {0: Dim("batch", min=1, max=64), 1: Dim("tokens", min=2, max=512)}
    ids = torch.ones(2, 8, dtype=torch.long)
    torch.onnx.export(
        LastHiddenState(model),
        (ids, ids.clone(), torch.zeros_like(ids)),
        str(path),
        dynamo=True,
        dynamic_shapes=(axes,) * len(NAMES),
        input_names=list(NAMES),
        output_names=["last_hidden_state"],
        verbose=False,
    )
