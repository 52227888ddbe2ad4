"""The published servers' rules for choosing and leaving blocks, written anew from the protocol's description (§9.4, 9.5)."""

from __future__ import annotations

import random

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from petals_agent.balance.snapshot import Floats, Server

EPS = 1e-3


def throughput(servers: list[Server], blocks: int) -> Floats:
    """(blocks,): the summed rates, in the order of peer ids."""
    sums = np.zeros(blocks)
    for server in sorted(servers, key=lambda s: s.peer):
        sums[server.start : server.end] += server.rate
    return sums


def best_start(sums: Floats, length: int) -> int:
    """The start whose span, sorted by throughput, is the smallest; ties go to the first."""
    windows = np.sort(sliding_window_view(sums, length), axis=1)
    left = np.arange(len(windows))
    for column in range(length):
        values = windows[left, column]
        left = left[values == values.min()]
        if len(left) == 1:
            break
    return int(left[0])


def should_move(peer: str, servers: list[Server], blocks: int, quality: float, rng: random.Random) -> bool:
    """Whether the server `peer` would leave its blocks to choose others."""
    if quality > 1:
        return True
    sums = throughput(servers, blocks)
    before = sums.min()
    own = next(server for server in servers if server.peer == peer)
    starts = {server.peer: server.start for server in servers}
    sizes = {server.peer: (server.length, server.rate) for server in servers}
    sums[own.start : own.end] -= own.rate * (1 + EPS)
    if before > EPS and sums.min() <= 0:
        return False  # it would leave a gap
    start = best_start(sums, own.length)
    if start == own.start:
        return False
    sums[own.start : own.end] += own.rate * EPS
    starts[peer] = start
    sums[start : start + own.length] += own.rate
    moved = True
    while moved:
        moved = False
        order = list(starts)
        rng.shuffle(order)
        for other in order:
            length, rate = sizes[other]
            at = starts[other]
            sums[at : at + length] -= rate * (1 + EPS)
            start = best_start(sums, length)
            sums[at : at + length] += rate * EPS
            if start != at:
                starts[other] = start
                moved = True
            sums[start : start + length] += rate
    after = sums.min()
    if after < before or after < EPS:
        return False
    return bool(before / after < quality - EPS)


def move(peer: str, servers: list[Server], blocks: int) -> int:
    """Where a server that has left its blocks starts again."""
    others = [server for server in servers if server.peer != peer]
    length = next(server.length for server in servers if server.peer == peer)
    return best_start(throughput(others, blocks), length)
