"""Durations, sizes, spans and addresses: read as a person means them, written so that they read back the same."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from petals_agent.config.values import (
    MAX_BYTES,
    YEAR_S,
    format_duration,
    format_size,
    parse_duration,
    parse_host_port,
    parse_size,
    parse_span,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30),
        ("2m", 120),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        ("500ms", 0.5),
        ("1.5h", 5400),
        ("30d", 2592000),
    ],
)
def test_duration(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "30", "m", "-2m", "2 weeks", "30m1h", "1m1m", "1e3s", "2m x", "½h", "٣s", "2m\n"]
)
def test_no_duration(text: str) -> None:
    with pytest.raises(ValueError):
        parse_duration(text)


@settings(deadline=None)
@given(
    st.floats(0, YEAR_S)
    | st.integers(0, int(YEAR_S)).map(float)
    | st.integers(0, 10**6).map(lambda ms: ms / 1000)
)
@example(0.1)
@example(5e-324)
def test_a_duration_reads_back_as_written(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == seconds


@pytest.mark.parametrize(("seconds", "text"), [(120.0, "2m"), (5400.0, "1h30m"), (0.5, "500ms"), (0.0, "0s")])
def test_durations_are_written_short(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("10GB", 10**10),
        ("512MiB", 2**29),
        ("1.5 GB", 1_500_000_000),
        ("7B", 7),
        ("2kB", 2000),
        ("1tib", 2**40),
    ],
)
def test_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "10", "GB", "-1GB", "10PB", "1,5GB", "10 G B", "٣GB", "1GB\n"])
def test_no_size(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


@settings(deadline=None)
@given(
    st.integers(0, MAX_BYTES)
    | st.builds(int.__mul__, st.integers(0, 999), st.sampled_from([10**9, 2**30, 1000]))
)
def test_a_size_reads_back_as_written(size: int) -> None:
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize(
    ("size", "text"), [(50 * 10**9, "50GB"), (2**29, "512MiB"), (2000, "2kB"), (1023, 1023)]
)
def test_sizes_are_written_short(size: int, text: str | int) -> None:
    assert format_size(size) == text


@settings(deadline=None)
@given(st.integers(0, 999_998), st.integers(1, 999_999))
def test_spans_are_half_open_and_not_empty(start: int, end: int) -> None:
    if start < end:
        assert parse_span(f"{start}:{end}") == (start, end)
    else:
        with pytest.raises(ValueError, match="larger"):
            parse_span(f"{start}:{end}")


@pytest.mark.parametrize("text", ["", ":", "4", "4:", ":4", "a:b", "-1:4", "0:4:8", "0 : 4", "0-4"])
def test_no_span(text: str) -> None:
    with pytest.raises(ValueError):
        parse_span(text)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:9464", "127.0.0.1", 9464),
        ("[::1]:0", "::1", 0),
        ("host.example:65535", "host.example", 65535),
    ],
)
def test_host_port(text: str, host: str, port: int) -> None:
    assert parse_host_port(text) == (host, port)


@pytest.mark.parametrize(
    "text", ["", ":1", "host", "host:", "::1:80", "1.2.3:80", "1.2.3.4:65536", "a b:1", "[x]:1"]
)
def test_no_host_port(text: str) -> None:
    with pytest.raises(ValueError):
        parse_host_port(text)


@settings(deadline=None)
@given(st.text(max_size=40) | st.text("0123456789.dhms :[]GiBk", max_size=20))
def test_any_text_is_read_or_refused(text: str) -> None:
    for parse in (parse_duration, parse_size, parse_span, parse_host_port):
        try:
            parse(text)
        except ValueError as error:
            assert str(error)
