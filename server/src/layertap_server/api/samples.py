"""The metrics of the part of the server that clients talk to."""

from __future__ import annotations

from collections.abc import Iterator

from layertap_server.api.service import EncoderService
from layertap_server.metrics import LoopLag, Sample, counter, dropped, gauge


def service_samples(service: EncoderService, lag: LoopLag) -> Iterator[Sample]:
    """The samples of the part of the server that clients talk to."""
    yield gauge(
        "event_loop_lag_seconds", "Largest delay of the event loop in the last ten seconds", lag.largest_s
    )
    held = service.budget.reserved_bytes
    yield gauge("held_result_bytes", "Bytes of results that are reserved or computed, and not sent yet", held)
    for reason, number in service.refused.copy().items():
        text = "Requests answered with an error, by its reason"
        yield counter("refused", text, number, reason=reason)
    for output, num_bytes in service.reply_bytes.copy().items():
        text = "Tensor bytes in replies, by output"
        yield counter("reply_bytes", text, num_bytes, output=output.name.lower())
    for name, model in list(service.models.items()):
        yield dropped(name, "cancelled", "tokenizing", model.tokenization.num_cancelled)
