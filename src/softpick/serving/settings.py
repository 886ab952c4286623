"""Settings of ``softpick serve``."""

from __future__ import annotations

from dataclasses import dataclass

from softpick.experiment.failures import ModelError
from softpick.experiment.settings import ATTENTION, DEVICES, DTYPE, TRUST, Range, check_settings, documented, setting

__all__ = ["ServeSettings"]


@documented
@dataclass(frozen=True)
class ServeSettings:
    """What is served, and where."""

    model: str = setting(help="Hub name, directory or GGUF file.", positional=True)
    host: str = setting("127.0.0.1", "Address to listen on; 0.0.0.0 is every network of this machine.")
    port: int = setting(8000, "Port to listen on; 0 takes a free one.")
    attn_implementation: str | None = setting(None, ATTENTION, metavar="NAME", shown="the model's own")
    device: str = setting("auto", DEVICES)
    dtype: str = setting("auto", DTYPE)
    continuous_batching: bool = setting(
        True,
        "Requests share batches and a paged cache. Without it they wait for one another, and each may have its own "
        "temperature, top_p, stop, seed and penalties.",
    )
    batch_tokens: int | None = setting(
        None, "Tokens of a batch, of all its requests; longer prompts are computed in pieces.", shown="2048"
    )
    cache_tokens: int | None = setting(
        None,
        "Tokens whose keys and values are kept, of all requests.",
        shown="what fits on a GPU; on the CPU 16384, or the model's positions where these are more",
    )
    trust_remote_code: bool = setting(False, TRUST)

    def __post_init__(self) -> None:
        """Refuse numbers out of range.

        Raises:
            ModelError: naming the setting.
        """
        ranges = {"port": Range(0, 65535), "batch_tokens": Range(1), "cache_tokens": Range(1)}
        check_settings(self, ModelError, ranges)
