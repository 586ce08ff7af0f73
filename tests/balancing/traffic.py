"""Open-loop traffic over a picker, without a client: events in a heap, so that a minute takes half a second."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass

from meshlib.balancing.choose import picker_of
from meshlib.balancing.node import Node
from meshlib.core.env import Env
from meshlib.names.addr import Address


@dataclass(frozen=True)
class Sent:
    """One request: when, to which node (from 0), how long it took, and how it ended."""

    at: float
    node: int
    took: float
    outcome: str


def nodes_of(weights, metric=None):
    nodes = [Node(Address("h", port, weight=weight), None, Env()) for port, weight in enumerate(weights, 1)]
    for node in nodes:
        if metric is not None:
            node.meter = metric.meter()
    return nodes


def begin(node, now=0.0):
    node.meter.pending += 1
    node.meter.begun += now
    node.meter.used = now


def end(node, began=0.0):
    node.meter.pending -= 1
    node.meter.begun = node.meter.begun - began if node.meter.pending else 0.0


def production(rng):
    """About what Linkerd's experiment replays: 164 to 200 ms, median 167, deviation 5."""
    return min(0.2, max(0.164, rng.gauss(0.1695, 0.0054)))


def drive(chooser, serve, *, nodes=11, rate=1000.0, seconds=60.0, seed=1, timeout=None):
    """Send ``rate`` requests a second. ``serve(node, at, rng)`` says how long one takes and how it ends: ok, fail.

    With ``timeout``, what takes longer is cancelled by then, and has failed.
    """
    rng = random.Random(seed)
    picker = picker_of(chooser, Env(rng=random.Random(seed + 1000)))
    made = nodes_of([1] * nodes, chooser.metric)
    number = {node: i for i, node in enumerate(made)}
    picker.update(made, made)
    under_way, sent = [], []
    for n in range(int(seconds * rate)):
        now = n / rate
        while under_way and under_way[0][0] <= now:
            at, _, node, began, outcome = heapq.heappop(under_way)
            end(node, began)
            if outcome == "ok":
                node.meter.succeeded(at - began, at)
            elif outcome == "fail":
                node.meter.failed(at - began, at)
            else:
                node.meter.timed_out(at - began, at)
            if picker.watches_load:
                picker.changed(node, -1, at)
        node = picker.pick(now)
        begin(node, now)
        if picker.watches_load:
            picker.changed(node, 1, now)
        took, outcome = serve(number[node], now, rng)
        if timeout is not None and took > timeout:
            took, outcome = timeout, "timeout"
        sent.append(Sent(now, number[node], took, outcome))
        heapq.heappush(under_way, (now + took, n, node, now, outcome))
    return sent


def success(sent, within=1.0):
    """The share that succeeded in time."""
    return sum(one.outcome == "ok" and one.took <= within for one in sent) / len(sent)


def share(sent, node, since, until):
    """The share of one node, as a multiple of its fair share."""
    window = [one for one in sent if since <= one.at < until]
    return sum(one.node == node for one in window) / len(window) * (max(one.node for one in sent) + 1)
