"""A repository at the Hugging Face Hub: which commit, what its shards hold, and downloads that continue after a break.

huggingface_hub does the talking and lays out the cache; it restarts an interrupted file from zero in a new process, so the
large files are fetched here, into `<blob>.part`, from where the last attempt stopped.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from petals_agent.errors import CheckpointError
from petals_agent.models import disk
from petals_agent.models.shard import TensorInfo, from_json, header_length, parse_header, to_json
from petals_agent.redact import keep_secret

if TYPE_CHECKING:
    from huggingface_hub.file_download import HfFileMetadata

Report = Callable[[int], None]  # bytes that arrived just now; negative when a file starts over
_HEADER_GUESS = 100_000  # bytes of a shard asked for at once; most headers fit
_LOCK_STALL = 120.0  # seconds that another process's download of the same file may stand still
_SHA256 = 64  # length of the etag of a large file, which is its hash


@dataclass(frozen=True)
class RemoteFile:
    """One large file of the repository and where its bytes go."""

    name: str
    size: int
    blob: Path
    link: Path

    @property
    def partial(self) -> Path:
        return self.blob.with_name(self.blob.name + disk.PARTIAL)

    @property
    def missing(self) -> int:
        """Bytes still to come."""
        if self.blob.exists():
            return 0
        return self.size - (self.partial.stat().st_size if self.partial.exists() else 0)


class HubRepo:
    """One commit of a repository; blocking calls, to be made from a thread."""

    def __init__(self, repo: str, commit: str, cache: Path, token: str | None) -> None:
        self.repo, self.commit, self.cache, self.token = repo, commit, cache, token
        if token is not None:
            keep_secret(token)
        self.folder = cache / f"models--{repo.replace('/', '--')}"

    @classmethod
    def open(cls, repo: str, revision: str | None, cache: Path, token: str | None) -> HubRepo:
        """Resolve `revision` (None: main) to a commit; offline, to the commit that was last seen."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        with _explained(repo, "config.json"):
            offline = _silence(repo, revision, token)  # hf_hub_download would try for half a minute
            try:
                path = hf_hub_download(
                    repo,
                    "config.json",
                    revision=revision,
                    cache_dir=cache,
                    token=token,
                    local_files_only=offline is not None,
                )
            except LocalEntryNotFoundError as error:
                raise offline or error from None
        return cls(repo, Path(path).parent.name, cache, token)

    def file(self, name: str) -> Path | None:
        """A small file, downloaded if need be; None if the repository has none of that name."""
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        known = try_to_load_from_cache(self.repo, name, cache_dir=self.cache, revision=self.commit)
        if known is not None:
            return Path(known) if isinstance(known, str) else None
        try:
            with _explained(self.repo, name):
                path = hf_hub_download(
                    self.repo, name, revision=self.commit, cache_dir=self.cache, token=self.token
                )
            return Path(path)
        except CheckpointError as error:
            if is_absent(error):
                return None
            raise

    def headers(self, shards: Sequence[str]) -> dict[str, dict[str, TensorInfo]]:
        """The header of each shard; those not on disk are read with range requests and kept for the next start."""
        kept = self.folder / f"headers-{self.commit}.json"
        known = _kept_headers(kept)
        missing = [shard for shard in shards if shard not in known]
        if missing:
            with ThreadPoolExecutor(min(8, len(missing)), "hub-header") as pool:
                known |= dict(zip(missing, map(to_json, pool.map(self._header, missing)), strict=True))
            _write_whole(kept, json.dumps(known).encode())
        return {shard: from_json(known[shard]) for shard in shards}

    def _header(self, shard: str) -> dict[str, TensorInfo]:
        name = f"{self.repo}: {shard}"
        with _explained(self.repo, shard):
            first = self._range(shard, 0, _HEADER_GUESS)
            length = header_length(first[:8], name)
            if len(first) < 8 + length:
                first += self._range(shard, len(first), 8 + length)
        return parse_header(first[8 : 8 + length], name, None)

    def _range(self, name: str, start: int, end: int) -> bytes:
        from huggingface_hub import get_session

        span = {"range": f"bytes={start}-{end - 1}", "accept-encoding": "identity"}
        headers = self._headers() | span
        with get_session().stream("GET", self._url(name), headers=headers, timeout=30) as response:
            _raise_for_status(response)
            data = bytearray()
            for chunk in response.iter_bytes(1 << 16):  # not .read(): a server may ignore the range
                data += chunk
                if len(data) >= (end if response.status_code == 200 else end - start):
                    break
        return bytes(data[start:end] if response.status_code == 200 else data)

    def _headers(self) -> dict[str, str]:
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        return build_hf_headers(token=self.token)

    def _url(self, name: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo, name, revision=self.commit)

    def stored(self, name: str) -> Path | None:
        """A large file if it is complete on disk, to be used now."""
        link = self.path_of(name)
        if link is not None:
            disk.mark_used(link)
        return link

    def path_of(self, name: str) -> Path | None:
        """A large file if it is complete on disk."""
        link = self.folder / "snapshots" / self.commit / name
        return link if link.exists() else None

    def has(self, name: str) -> bool:
        """Whether the repository has a file of that name; downloads nothing."""
        try:
            return self.describe(name).size >= 0
        except CheckpointError as error:
            if is_absent(error):
                return False
            raise

    def describe(self, name: str) -> RemoteFile:
        """Size and place of a large file; asks the Hub."""
        from huggingface_hub import get_hf_file_metadata

        with _explained(self.repo, name):
            found: HfFileMetadata = get_hf_file_metadata(
                self._url(name), token=self.token, retry_on_errors=True
            )
        if found.etag is None or found.size is None:
            raise CheckpointError(
                f"{self.repo}: the Hub does not say how large {name} is; is HF_ENDPOINT a Hub?"
            )
        if "/" in found.etag or found.etag.startswith("."):
            raise CheckpointError(
                f"{self.repo}: the Hub sent the etag {found.etag!r} for {name}; is HF_ENDPOINT a Hub?"
            )
        link = self.folder / "snapshots" / self.commit / name
        return RemoteFile(name, found.size, self.folder / "blobs" / found.etag, link)

    def download(self, file: RemoteFile, report: Report) -> Path:
        """Fetch what is missing of a file, continuing an earlier attempt; returns its path in the snapshot."""
        file.partial.parent.mkdir(parents=True, exist_ok=True)
        file.link.parent.mkdir(parents=True, exist_ok=True)
        missing = file.missing
        with _claimed(file, report) as out:
            if out is not None:
                self._transfer(file, out, report)
                _verify(file, self.repo)
                file.partial.replace(file.blob)
            else:  # another process fetched it meanwhile
                report(missing)
        if not file.link.exists():
            file.link.unlink(missing_ok=True)
            with suppress(FileExistsError):  # another process was faster
                file.link.symlink_to(os.path.relpath(file.blob, file.link.parent))
        disk.mark_used(file.blob)
        return file.link

    def _transfer(self, file: RemoteFile, out: IO[bytes], report: Report) -> None:
        """Append to `out` until it is whole; a break is retried for as long as bytes keep arriving."""
        from huggingface_hub.file_download import http_get

        def meter(**_: Any) -> _Meter:
            return _Meter(report)

        while True:
            before = out.seek(0, os.SEEK_END)
            if before > file.size:
                report(-before)
                before = out.truncate(0)
            try:
                with _explained(self.repo, file.name, file.partial):
                    http_get(
                        self._url(file.name),
                        out,  # type: ignore[arg-type]
                        resume_size=before,
                        headers=self._headers(),
                        expected_size=file.size,
                        tqdm_class=meter,  # type: ignore[arg-type]
                    )
                    out.flush()
                return
            except CheckpointError as error:
                if _is_full(error.__cause__) or out.seek(0, os.SEEK_END) <= before:
                    raise


class _Meter:
    """Stands where huggingface_hub expects a progress bar."""

    def __init__(self, report: Report) -> None:
        self.update = report

    def __enter__(self) -> _Meter:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@contextmanager
def _claimed(file: RemoteFile, report: Report) -> Iterator[IO[bytes] | None]:
    """The partial file, for us alone to write; None if the whole file is there, perhaps by another process."""
    left, since = -1, time.monotonic()
    while not file.blob.exists():
        with file.partial.open("ab") as out:
            if _locked(out, file.partial):
                yield None if file.blob.exists() else out
                return
        report(0)  # we live, and may be told to stop
        now, missing = time.monotonic(), file.missing
        if missing != left:
            left, since = missing, now
        elif now - since > _LOCK_STALL:
            raise CheckpointError(
                f"another process holds {file.partial} and wrote nothing for {_LOCK_STALL:.0f} s; end it"
            )
        time.sleep(0.2)
    yield None


def _locked(out: IO[bytes], path: Path) -> bool:
    """Take the lock on an open file, unless another process has it or has put a new file in its place."""
    try:
        fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(out.fileno()).st_ino == path.stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        return False


def _verify(file: RemoteFile, repo: str) -> None:
    """A large file's name in the cache is its hash."""
    if len(file.blob.name) != _SHA256:
        return
    digest = hashlib.sha256()
    with file.partial.open("rb") as data:
        while chunk := data.read(4 << 20):
            digest.update(chunk)
    if digest.hexdigest() != file.blob.name:
        file.partial.unlink()
        raise CheckpointError(
            f"{repo}: {file.name} arrived damaged (its SHA-256 is wrong) and was deleted; try again"
        )


def _kept_headers(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):  # none yet, or torn: they are read again
        return {}
    return content if isinstance(content, dict) else {}


def _write_whole(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_bytes(data)
    new.replace(path)


def hub_answers(repo: str, revision: str | None, token: str | None) -> bool:
    """Whether the Hub can be asked for the repository now. Raises CheckpointError when it says no."""
    with _explained(repo, "config.json"):
        return _silence(repo, revision, token) is None


def _silence(repo: str, revision: str | None, token: str | None) -> Exception | None:
    """Why the Hub cannot be reached; None if it can and has the repository, raises if it says no."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(repo, "config.json", revision=revision), token=token)
    except _unreachable() as error:
        if _refused(error):
            raise
        return error
    return None


def is_absent(error: CheckpointError) -> bool:
    """Whether the Hub answered that the repository has no such file."""
    from huggingface_hub.errors import RemoteEntryNotFoundError

    return isinstance(error.__cause__, RemoteEntryNotFoundError)


def _unreachable() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises when it cannot reach the Hub, among others."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    return (OfflineModeIsEnabled, HTTPError)


def _refused(error: Exception) -> bool:
    """Whether the Hub itself said no."""
    response = getattr(error, "response", None)
    return response is not None and response.status_code < 500


def _raise_for_status(response: Any) -> None:
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

    if response.is_error:
        response.read()
    hf_raise_for_status(response)


def _is_full(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def _explained(repo: str, name: str, written: Path | None = None) -> Iterator[None]:
    """Turn what huggingface_hub raises into CheckpointError with advice; the original stays as its cause."""
    from huggingface_hub import errors

    try:
        yield
    except CheckpointError:
        raise
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repo}: access is restricted; accept its terms on its page at the Hub and set model.token_file"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repo}: the Hub has no such repository, or it is private; check model.path, or set model.token_file"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repo}: the Hub has no such revision; check model.revision") from error
    except errors.RemoteEntryNotFoundError as error:
        raise CheckpointError(f"{repo}: there is no {name} at this revision") from error
    except errors.HFValidationError as error:
        raise CheckpointError(
            f"{repo!r} is neither a folder nor a repository name ({error}); check model.path"
        ) from error
    except (OSError, ValueError, errors.HTTPError) as error:  # type: ignore[attr-defined]
        if _is_full(error):
            raise disk.disk_full(written or Path(name)) from error
        raise CheckpointError(
            f"{repo}: {name} is not in the cache and cannot be fetched ({type(error).__name__}: {error!s:.200}); "
            "check the network, or HF_ENDPOINT, and try again"
        ) from error
