"""What a server is told: one frozen dataclass, checked before anything starts."""

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trainkit.serving.engine._models import ModelSource
from trainkit.serving.scheduler import Profile
from trainkit.serving.scheduler._rules import DropRule


class ServeError(RuntimeError):
    """A server that cannot start or go on."""


@dataclass(frozen=True)
class Objective:
    """What a language model keeps.

    Attributes:
        ttft_ms: from a request's arrival to its first token; one that cannot be met is answered 503.
        tpot_ms: between tokens; while steps take longer, nobody new is admitted.
    """

    ttft_ms: float
    tpot_ms: float | None = None


@dataclass(frozen=True)
class Language:
    """A language model that is served.

    Attributes:
        source: where it comes from.
        objective: what it keeps.
    """

    source: ModelSource
    objective: Objective


@dataclass(frozen=True)
class ServeOptions:
    """A server of some models on some GPUs of one machine.

    Raises:
        ServeError: an option is out of its range, or an address is open to others without a token.
    """

    models: Mapping[str, ModelSource] = field(default_factory=dict)
    """what answers an input with an output, by name"""
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    """each model's latency by batch size, from `trainkit serve profile`"""
    slo_ms: Mapping[str, float] = field(default_factory=dict)
    """from a request's arrival to its answer, milliseconds, by model"""
    languages: Mapping[str, Language] = field(default_factory=dict)
    """what continues a text, by name"""
    devices: tuple[str, ...] = ("cpu",)
    """one GPU process each: "cuda:0", ..., or "cpu" """
    host: str = "127.0.0.1"
    """address to listen on"""
    port: int = 8000
    """port to listen on"""
    token_file: Path | None = None
    """file with the bearer token that requests must carry"""
    insecure: bool = False
    """serve without a token on an address that others reach"""
    margin_ms: float = 5.0
    """batches aim this much before the deadline: half is for timers that fire late, half for the answer's way back"""
    drop: DropRule = "window"
    """the scheduler's drop rule"""
    max_body_bytes: int = 8 << 20
    """larger request bodies are refused"""
    max_waiting: int = 10_000
    """more open requests than this are refused"""
    startup_timeout_s: float = 600.0
    """time to load and warm the models"""
    json: bool = False
    """log JSON, a line an event"""
    token: str | None = field(default=None, init=False, repr=False)
    """what `token_file` holds"""

    def __post_init__(self) -> None:
        if not self.models and not self.languages:
            raise ServeError("a server serves at least one model")
        if both := set(self.models) & set(self.languages):
            raise ServeError(f"a model's name is used once, got {min(both)!r} twice")
        if set(self.models) != set(self.profiles) or set(self.models) != set(self.slo_ms):
            raise ServeError(
                f"every model needs a profile and an objective: models {sorted(self.models)}, "
                f"profiles {sorted(self.profiles)}, objectives {sorted(self.slo_ms)}"
            )
        for name, slo in self.slo_ms.items():
            least = self.profiles[name].latency_ns[0] / 1e6 + self.margin_ms
            if not least <= slo <= 3_600_000:
                raise ServeError(
                    f"an objective is at least one request's latency and the margin, {least:.3g} ms for {name!r}, "
                    f"got {slo:.3g} ms"
                )
        for name, language in self.languages.items():
            if not 0 < language.objective.ttft_ms <= 3_600_000 or not 0 < (language.objective.tpot_ms or 1) <= 60_000:
                raise ServeError(
                    f"a TTFT is above 0 and at most 1 h, a TPOT at most 60 s, got {language.objective} for {name!r}"
                )
        if not self.devices:
            raise ServeError("devices names at least one GPU process, got none")
        if not 0 <= self.margin_ms < 60_000:
            raise ServeError(f"margin_ms is from 0 to 60000, got {self.margin_ms}")
        if not 1024 <= self.port < 65536:
            raise ServeError(f"port is from 1024 to 65535, got {self.port}")
        if self.host not in ("127.0.0.1", "0.0.0.0", "::"):
            raise ServeError(f"LitServe listens on 127.0.0.1, 0.0.0.0 or ::, got {self.host!r}")
        if self.max_body_bytes < 1 or self.max_waiting < 1:
            raise ServeError("max_body_bytes and max_waiting are at least 1")
        if self.token_file is not None:
            token = self.token_file.read_text().strip()
            if len(token) < 16 or not token.isascii() or any(c.isspace() for c in token):
                raise ServeError(f"{self.token_file} must hold one token of at least 16 ASCII characters")
            object.__setattr__(self, "token", token)
        elif not self.insecure and self.host != "127.0.0.1":
            raise ServeError(
                f"{self.host} is reached by others: give --token-file, or --insecure to serve them without a token"
            )

    def refuse_taken_port(self) -> None:
        """Bind the address once, so that a port in use is one line before the models load.

        Raises:
            ServeError: it cannot be bound.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.host, self.port))
            except OSError as error:
                raise ServeError(f"{self.host}:{self.port} cannot be served: {error.strerror}; choose --port") from None
