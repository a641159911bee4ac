"""How fast is the simulated internet? Run as a script; prints one JSON object.

Hosts in pairs, each behind a NAT of its own, learn their mappings from one server and punch each
other for a minute of virtual time. The numbers count only after all pairs have been seen to
connect.

    python tests/bench/simulated.py --hosts 2000
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time

import trio
from trio.testing import MockClock

from netlab.model import Host, Link, Nat, NatBehavior, Server, Topology, Uplink
from netlab.nat import Protocol, Translated, Translator
from netlab.presets import class_behavior
from netlab.probe import ProbeServers, serve_probe
from netlab.punch import punch
from netlab.simulated import SimulatedInternet


def build(pairs: int) -> Topology:
    behaviors = {"a": class_behavior("EIM+APDF"), "b": class_behavior("EIM+ADF")}
    names = [(side, n) for n in range(pairs) for side in "ab"]
    link = Link(delay_seconds=0.02, jitter_seconds=0.002, loss=0.001)
    return Topology(
        nats=tuple(Nat(name=f"nat-{s}{n}", behavior=behaviors[s]) for s, n in names),
        hosts=tuple(
            Host(name=f"{s}{n}", uplinks=(Uplink(network=f"nat-{s}{n}", link=link),))
            for s, n in names
        ),
        servers=(Server(name="stun", addresses=3),),
        seed=1,
    )


async def punch_for_a_minute(topology: Topology, record: bool) -> dict[str, float]:
    # Processor time: a shared machine's other work is not this program's cost.
    began = time.process_time()
    pairs = len(topology.hosts) // 2
    connected = 0
    async with SimulatedInternet(topology, record_packets=record, tick_seconds=0.001) as internet:
        one, two, three = map(str, internet.plan.servers["stun"].ipv4)
        built = time.process_time()

        async def one_pair(n: int) -> None:
            nonlocal connected
            generator = random.Random(f"pair {n}")
            await trio.sleep(generator.uniform(0, 59))
            a, b = internet.host(f"a{n}"), internet.host(f"b{n}")
            result = await punch(a, b, (one, 3478), generator=generator)
            connected += result

        async with trio.open_nursery() as nursery:
            async with internet.host("stun"):
                await nursery.start(serve_probe, ProbeServers(addresses=(one, two, three)))
            async with trio.open_nursery() as punching:
                for n in range(pairs):
                    punching.start_soon(one_pair, n)
            nursery.cancel_scope.cancel()
        seconds = time.process_time() - built
        world = internet.world
    if connected != pairs:
        sys.exit(f"only {connected} of {pairs} pairs connected; the rates mean nothing")
    return {
        "hosts": 2 * pairs,
        "build_cpu_seconds": round(built - began, 2),
        "run_cpu_seconds": round(seconds, 2),
        "virtual_seconds": round(trio.current_time(), 1),
        "packets": world.packet_count,
        "packets_per_cpu_second": round(world.packet_count / seconds),
        "events_per_cpu_second": round(world.events_run / seconds),
    }


def nat_cost(packets: int = 200_000) -> dict[str, float]:
    """Time the NAT alone: one mapping, packets both ways."""
    inside, outside, remote = b"\xc0\xa8\x01\x02", b"\x02\x01\x00\x01", b"\x02\x00\x00\x05"
    nat = Translator(NatBehavior(), [outside], generator=random.Random(1))
    began = time.process_time()
    for n in range(packets):
        nat.outbound(Protocol.UDP, inside, 4000, remote, 3478, n * 1e-4)
        verdict = nat.inbound(Protocol.UDP, remote, 3478, outside, 4000, n * 1e-4)
    seconds = time.process_time() - began
    if not isinstance(verdict, Translated):
        sys.exit(f"the NAT dropped a packet: {verdict.text}")
    return {"nat_microseconds_per_packet": round(seconds / packets / 2 * 1e6, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, default=2000, help="an even number")
    parser.add_argument("--record", action="store_true", help="record every packet's fate")
    options = parser.parse_args()
    topology = build(options.hosts // 2)
    clock = MockClock(autojump_threshold=0)
    result = trio.run(punch_for_a_minute, topology, options.record, clock=clock)
    print(json.dumps(result | nat_cost()))


if __name__ == "__main__":
    main()
