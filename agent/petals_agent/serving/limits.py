"""What a peer may ask for; every refusal names the limit it hit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Counts in tokens and bytes, times in seconds; defaults are those of Petals (protocol.md §4.7, §9.7)."""

    inference_max_length: int = 8192
    max_batch_tokens: int = 8192  # batch × tokens of one request
    max_rows: int = 256  # batch of one session
    max_sessions: int = 1024
    max_waiting_requests: int = 256  # forward and backward calls at once
    max_metadata_bytes: int = 65536
    max_next_servers: int = 128
    max_push_tasks: int = 256
    prompt_tokens: int = 1024  # longest deep prompt
    request_timeout: float = 180.0
    session_timeout: float = 1800.0
    step_timeout: float = 300.0
    max_alloc_timeout: float = 600.0

    def message_bytes(self, hidden_size: int, blocks: int) -> int:
        """Largest single message on a stream: hidden states and prompts as float32, and room for the rest."""
        return 4 * hidden_size * (2 * self.max_batch_tokens + blocks * self.prompt_tokens) + 2**20

    def waiting_bytes(self, hidden_size: int, blocks: int) -> int:
        """Requests of all peers that are not answered yet; one message fits into a peer's half of it."""
        return max(2**28, 4 * self.message_bytes(hidden_size, blocks))
