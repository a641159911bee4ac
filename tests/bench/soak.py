"""`python -m tests.bench.soak`: clients come and go for minutes; does the relay leak?

Starts `underpass-relay serve --dev` as its own process. A few pairs talk all the time; beside them
clients connect, send, and leave in every way there is: in good order, by vanishing, by never
reading, by sending nonsense. Memory and descriptors of the relay are looked at every few seconds;
in the end everybody leaves, and what is left is compared with what was there after the first
minute. Exit status 1 if it grew.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
import trio

from traversal.io.dial import DialError, Target, dial
from traversal.io.stream import StreamEndedError
from traversal.keys import NodePrivate
from traversal.relay_map import RelayMap
from traversal.wire.derp import FrameType, encode_send_packet

SAMPLE_SECONDS = 5.0
PAIRS = 10
CHURN_TASKS = 12
WARM_UP_SECONDS = 60.0
MAX_GROWTH = 0.10
"""Of resident memory after the warm-up; the allocator's own drift is a few percent."""


@dataclass(frozen=True)
class Sample:
    """The relay process at one moment."""

    seconds: float
    memory_mib: float
    descriptors: int
    threads: int


@dataclass
class Counts:
    """What the clients did."""

    packets: int = 0
    connections: int = 0
    refused: int = 0
    lost_order: int = 0
    ways: dict[str, int] = field(default_factory=dict)


def look_at(pid: int, seconds: float) -> Sample:
    """The figures of a process now."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    return Sample(
        seconds=round(seconds, 1),
        memory_mib=int(fields["VmRSS"].split()[0]) / 1024,
        descriptors=len(os.listdir(f"/proc/{pid}/fd")),
        threads=int(fields["Threads"]),
    )


async def talk(target: Target, counts: Counts) -> None:
    """A pair that sends numbered packets one way, a window at a time, for ever."""
    keys = [NodePrivate.generate(os.urandom) for _ in range(2)]
    sender, receiver = [await dial(target, key) for key in keys]
    number = 0
    while True:
        batch = [(number + k).to_bytes(4, "big") + bytes(900) for k in range(16)]
        frames = [encode_send_packet(keys[1].public(), payload) for payload in batch]
        await sender.stream.send_all(b"".join(frames))
        expected = number
        number += len(batch)
        while expected < number:
            for kind, body in await receiver.receive_frames():
                if kind == FrameType.RECV_PACKET:
                    if int.from_bytes(body[32:36], "big") != expected:
                        counts.lost_order += 1
                    expected += 1
                    counts.packets += 1
        await trio.sleep(0.02)


async def come_and_go(target: Target, counts: Counts, randomness: random.Random) -> None:
    """One client after another, each leaving in another way."""
    ways = ("orderly", "vanish", "deaf", "nonsense", "half a handshake")
    while True:
        way = randomness.choice(ways)
        counts.ways[way] = counts.ways.get(way, 0) + 1
        try:
            if way == "half a handshake":
                with trio.socket.socket() as sock:
                    await sock.connect((target.host, target.port))
                    await sock.send(randomness.randbytes(randomness.randrange(1, 200)))
                continue
            key = NodePrivate.generate(os.urandom)
            client = await dial(target, key)
        except (DialError, OSError):
            counts.refused += 1
            continue
        counts.connections += 1
        try:
            packet = encode_send_packet(key.public(), randomness.randbytes(1200))
            if way == "nonsense":
                await client.stream.send_all(randomness.randbytes(500))
            elif way == "deaf":
                with trio.move_on_after(3):
                    while True:
                        await client.stream.send_all(packet * 50)
            else:
                for _ in range(20):
                    await client.stream.send_all(packet)
                    await client.receive_frames()
        except StreamEndedError:
            pass
        if way == "vanish":
            sock, _ = client.stream.detach()
            sock.close()
        else:
            client.close()
        await trio.sleep(randomness.random() * 0.1)


async def soak(minutes: float, options: tuple[str, ...]) -> tuple[list[Sample], Counts]:
    """Run the load; samples over time, the last one after everybody has left."""
    counts = Counts()
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory() as directory:
        map_path = Path(directory) / "map.json"
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "relay.cli", "serve", "--dev", "--dev-map", str(map_path),
             "--log-level", "error", *options],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            while not (map_path.exists() and map_path.read_text().endswith("}\n")):
                await trio.sleep(0.05)
                if process.poll() is not None:
                    raise click.ClickException("the relay did not start")
            target = Target.of_node(next(RelayMap.parse(map_path.read_text()).nodes()))
            began = trio.current_time()
            with trio.move_on_after(60 * minutes):
                async with trio.open_nursery() as nursery:
                    for _ in range(PAIRS):
                        nursery.start_soon(talk, target, counts)
                    for seed in range(CHURN_TASKS):
                        nursery.start_soon(come_and_go, target, counts, random.Random(seed))
                    while True:
                        await trio.sleep(SAMPLE_SECONDS)
                        samples.append(look_at(process.pid, trio.current_time() - began))
                        click.echo(
                            f"\r{samples[-1].seconds:6.0f} s  {samples[-1].memory_mib:7.1f} MiB  "
                            f"{samples[-1].descriptors:5d} descriptors  "
                            f"{counts.connections:7d} connections  {counts.packets:9d} packets",
                            nl=False,
                            err=True,
                        )
            await trio.sleep(4)  # longer than the write timeout of those who never read
            samples.append(look_at(process.pid, trio.current_time() - began))
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
    click.echo(err=True)
    return samples, counts


def verdict(samples: list[Sample]) -> list[str]:
    """What grew, in words; nothing is well."""
    early = [s for s in samples[:-1] if s.seconds <= WARM_UP_SECONDS + 30][-6:]
    late = samples[:-1][-6:]
    problems = []
    before = statistics.median(s.memory_mib for s in early)
    after = statistics.median(s.memory_mib for s in late)
    if after > before * (1 + MAX_GROWTH):
        problems.append(f"memory grew from {before:.1f} to {after:.1f} MiB")
    # The process itself needs a few descriptors; each leaked connection would add one.
    if samples[-1].descriptors > 24:
        problems.append(f"{samples[-1].descriptors} descriptors are open with nobody connected")
    return problems


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--minutes", type=click.FloatRange(0.5, 600), default=10, show_default=True)
@click.option("--json", "as_json", is_flag=True)
@click.argument("relay_options", nargs=-1, type=click.UNPROCESSED)
def main(minutes: float, as_json: bool, relay_options: tuple[str, ...]) -> None:
    """Load the relay for some minutes; RELAY_OPTIONS go to `underpass-relay serve`."""
    samples, counts = trio.run(soak, minutes, relay_options)
    problems = verdict(samples)
    if counts.lost_order:
        problems.append(f"{counts.lost_order} packets of steady pairs were lost or out of order")
    if as_json:
        shown = {"samples": [asdict(s) for s in samples], "counts": asdict(counts)}
        click.echo(json.dumps({**shown, "problems": problems}, indent=2))
    else:
        first, last = samples[min(len(samples) - 1, 11)], samples[-2]
        click.echo(
            f"{counts.connections} connections came and went ({counts.ways}), {counts.packets} "
            f"packets of steady pairs arrived in order. Memory {first.memory_mib:.1f} MiB after "
            f"{first.seconds:.0f} s, {last.memory_mib:.1f} MiB at the end; "
            f"{samples[-1].descriptors} descriptors with nobody connected."
        )
        click.echo("\n".join(problems) or "Nothing grew.")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
