"""Why this path: facts for programs and a chain of sentences for people.

A verdict joins what both net checks found with what the peer's machine tried and saw. Each finding
has a code that does not change between releases, and a sentence; each remedy says what would help
and on which side.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from traversal.paths.effects import PathState
from traversal.paths.peer_relay import RelayAttempt, RelayStep
from traversal.paths.punch_facts import PunchFacts, Strategy
from traversal.paths.report import NatFacts, PortAllocation, PortPattern
from traversal.paths.statistics import CandidateStatistics, PeerStatistics
from traversal.wire.introduction import FilteringClass, MappingClass

PATIENCE_SECONDS: Final = 1.0
"""A Ping that is out for longer counts as unanswered so far, though its Pong may still come."""
EDGE_SILENCE_SECONDS: Final = 10.0
"""While it is looked for, the edge is tried every 5 s."""


class Finding(Enum):
    """What was found; the value is the code."""

    NO_REGION = "no-relay-known"
    RELAY_DOWN = "relay-unreachable-here"
    NOT_AT_RELAY = "peer-not-at-relay"
    NO_INTRODUCTION = "no-introduction"
    DIRECT = "direct"
    PEER_RELAY = "peer-relay"
    EDGE = "edge"
    DOUBT = "path-in-doubt"
    IDLE = "idle"
    SEARCHING = "searching"
    LOSSY = "path-lossy"
    PATH_LOST = "path-lost"
    UDP_BLOCKED_HERE = "udp-blocked-here"
    UDP_BLOCKED_THERE = "udp-blocked-there"
    OFFLINE_HERE = "no-relay-answers-here"
    CAPTIVE_PORTAL_HERE = "captive-portal-here"
    NO_CANDIDATES = "no-candidates"
    NO_CALL = "peer-never-called"
    BOTH_HARD = "both-nats-hard"
    HARD_HERE = "hard-nat-here"
    HARD_THERE = "hard-nat-there"
    UNANSWERED = "pings-unanswered"
    PORTS_FOUND = "port-search-found"
    PORTS_SEARCHED = "port-search-running"
    PORTS_NOT_FOUND = "port-search-failed"
    NO_PORT_SEARCH = "no-port-search"
    PEER_RELAYS_FAILED = "peer-relays-failed"
    EDGE_UNANSWERED = "edge-unanswered"


class Remedy(Enum):
    """What would help; the value is the code."""

    OPEN_UDP_HERE = "open-udp-here"
    OPEN_UDP_THERE = "open-udp-there"
    SIGN_IN_HERE = "sign-in-here"
    CHECK_NETWORK = "check-network-here"
    MAP_PORT_HERE = "map-port-here"
    MAP_PORT_THERE = "map-port-there"
    PORT_SEARCH = "enable-port-search"
    PEER_RELAY = "add-peer-relay"
    CHECK_PEER = "check-peer"
    CHECK_REGION = "check-region"
    CHECK_RELAY = "check-relay"
    CHECK_KEYS = "check-keys"
    SEND_TRAFFIC = "send-traffic"


_REMEDY_TEXT: Final = {
    Remedy.OPEN_UDP_HERE: "Allow outgoing UDP in the firewall in front of this node.",
    Remedy.OPEN_UDP_THERE: "Allow outgoing UDP in the firewall in front of the peer.",
    Remedy.SIGN_IN_HERE: "Open any web page in a browser on this node and sign in to the network.",
    Remedy.CHECK_NETWORK: "See whether this node has a network.",
    Remedy.MAP_PORT_HERE: "Enable NAT-PMP, PCP or UPnP on this node's router, or forward a UDP "
    "port to this node.",
    Remedy.MAP_PORT_THERE: "Enable NAT-PMP, PCP or UPnP on the peer's router, or forward a UDP "
    "port to the peer.",
    Remedy.PORT_SEARCH: "Allow the port search for this peer: it finds the ports that a hard NAT "
    "picks.",
    Remedy.PEER_RELAY: "Let a node that both reach by UDP be their peer relay (peer_relay_port in "
    "its file, peer_relay in theirs).",
    Remedy.CHECK_PEER: "See whether the peer runs and is connected to its relay.",
    Remedy.CHECK_REGION: "See whether that is the peer's home region: the peer tells it when it "
    "starts.",
    Remedy.CHECK_RELAY: "See whether the relay runs, and whether the relay map has its present "
    "address and certificate.",
    Remedy.CHECK_KEYS: "See whether the peer has this node's key in its list of peers, and we its.",
    Remedy.SEND_TRAFFIC: "Send something: paths are only looked for while there is traffic.",
}

_MAPPING_TEXT: Final = {
    MappingClass.UNKNOWN: "an unknown kind of NAT",
    MappingClass.NONE: "no NAT",
    MappingClass.ENDPOINT_INDEPENDENT: "an easy NAT (one public port for all destinations)",
    MappingClass.ADDRESS_DEPENDENT: "a hard NAT (another public port for each destination host)",
    MappingClass.ADDRESS_AND_PORT_DEPENDENT: "a hard NAT (another public port for each "
    "destination)",
}

_FILTERING_TEXT: Final = {
    FilteringClass.UNKNOWN: "",
    FilteringClass.OPEN: ", open to everybody",
    FilteringClass.ENDPOINT_INDEPENDENT: ", open to everybody once a port is in use",
    FilteringClass.ADDRESS_DEPENDENT: ", open to hosts that were written to",
    FilteringClass.ADDRESS_AND_PORT_DEPENDENT: ", open only to ports that were written to",
}


class Contact(Enum):
    """How far the way by the relay is known to lead."""

    OPEN = "open"
    """Nothing speaks against it."""
    NO_REGION = "no region"
    """Nobody said by which relay the peer is reached."""
    RELAY_DOWN = "relay down"
    """The last attempt to connect to that relay failed."""
    NOT_THERE = "not there"
    """The relay says that the peer is not connected to it."""
    NOT_INTRODUCED = "not introduced"
    """The peer has not answered our introduction."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """What was tried at one address, by one peer relay or by the edge; ages in seconds before the
    verdict, None is never. `outcome` says in words what came of it."""

    address: str
    source: str
    outcome: str
    pinged_ago_seconds: float | None
    answered_ago_seconds: float | None
    latency_seconds: float | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The whole answer. `sentences` and `fixes` are the same as the codes, in words."""

    state: PathState
    path: str | None
    findings: tuple[Finding, ...]
    remedies: tuple[Remedy, ...]
    sentences: tuple[str, ...]
    fixes: tuple[str, ...]
    attempts: tuple[Attempt, ...]
    own: NatFacts
    peer: NatFacts
    punch: PunchFacts | None = None

    def text(self) -> str:
        """One paragraph for a person."""
        return " ".join((*self.sentences, *self.fixes))

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "state": self.state.value,
            "path": self.path,
            "findings": [finding.value for finding in self.findings],
            "remedies": [remedy.value for remedy in self.remedies],
            "sentences": list(self.sentences),
            "fixes": list(self.fixes),
            "attempts": [
                {
                    "address": attempt.address,
                    "source": attempt.source,
                    "outcome": attempt.outcome,
                    "pinged_ago_seconds": attempt.pinged_ago_seconds,
                    "answered_ago_seconds": attempt.answered_ago_seconds,
                    "latency_seconds": attempt.latency_seconds,
                }
                for attempt in self.attempts
            ],
            "own_nat": _facts_dict(self.own),
            "peer_nat": _facts_dict(self.peer),
            "port_search": None if self.punch is None else self.punch.to_dict(),
        }


def can_punch(own: NatFacts, peer: NatFacts) -> bool | None:
    """Whether Pings from both sides lead to a direct path, without guessing ports.

    None when too little is known. Netcheck specification 10.5, path selection specification 17.
    """
    if own.is_udp_blocked or peer.is_udp_blocked:
        return False
    open_classes = (FilteringClass.OPEN, FilteringClass.ENDPOINT_INDEPENDENT)
    for side in (own, peer):
        if side.has_port_mapping or (side.filtering in open_classes and not side.is_hard):
            return True
    if MappingClass.UNKNOWN in (own.mapping, peer.mapping):
        return None
    if own.is_hard and peer.is_hard:
        return False
    if not own.is_hard and not peer.is_hard:
        return True
    easy = peer if own.is_hard else own
    if easy.filtering is FilteringClass.UNKNOWN:
        return None
    return easy.filtering is FilteringClass.ADDRESS_DEPENDENT


def describe_nat(facts: NatFacts) -> str:
    """A noun phrase: "an easy NAT (...), open only to ports that were written to"."""
    if facts.has_captive_portal:
        return "a captive portal"
    if facts.is_udp_blocked:
        return "a firewall that blocks UDP"
    if facts.is_offline:
        return "an unknown kind of NAT, since no relay answers"
    text = _MAPPING_TEXT[facts.mapping] + _FILTERING_TEXT[facts.filtering]
    if facts.mapping is not MappingClass.NONE:
        text += _describe_ports(facts.ports)
    return f"{text}, with a mapped port" if facts.has_port_mapping else text


def _describe_ports(ports: PortAllocation) -> str:
    match ports.pattern:
        case PortPattern.PRESERVING:
            return ", keeping port numbers"
        case PortPattern.SEQUENTIAL:
            return f", counting ports in steps of {ports.step}"
        case PortPattern.RANDOM:
            return ", with random ports"
        case PortPattern.UNKNOWN:
            return ""


def judge(
    name: str,
    statistics: PeerStatistics,
    own: NatFacts,
    peer: NatFacts,
    relay: str,
    now: float,
    punch: PunchFacts | None = None,
    contact: Contact = Contact.OPEN,
    problem: str = "",
    peer_relays: tuple[RelayAttempt, ...] = (),
) -> Verdict:
    """The verdict on the path to the peer called `name`; `relay` names the relay in use, `punch`
    says what the port search did, if the node has one, `contact` how far the way by the relay
    leads, `problem` why that relay can't be connected to, `peer_relays` what was tried with
    these."""
    builder = _Builder(name, statistics, own, peer, relay, now, punch, peer_relays)
    if statistics.state in (PathState.IDLE, PathState.RELAY):
        builder.judge_contact(contact, problem)
    if not builder.findings:
        builder.judge()
    if statistics.state is PathState.RELAY:
        builder.tell_detours()
    return Verdict(
        state=statistics.state,
        path=str(statistics.route.path) if statistics.route.path is not None else None,
        findings=tuple(builder.findings),
        remedies=tuple(builder.remedies),
        sentences=tuple(builder.sentences),
        fixes=tuple(_REMEDY_TEXT[remedy] for remedy in builder.remedies),
        attempts=(
            *(_attempt(candidate, now) for candidate in statistics.candidates),
            *(_relay_attempt(attempt, now) for attempt in peer_relays),
            *([_attempt(statistics.edge, now)] if statistics.edge is not None else ()),
        ),
        own=own,
        peer=peer,
        punch=punch,
    )


class _Builder:
    """Collects findings, sentences and remedies in the order in which a person would tell them."""

    def __init__(
        self,
        name: str,
        statistics: PeerStatistics,
        own: NatFacts,
        peer: NatFacts,
        relay: str,
        now: float,
        punch: PunchFacts | None,
        peer_relays: tuple[RelayAttempt, ...],
    ) -> None:
        self._punch = punch
        self._peer_relays = peer_relays
        self._name, self._relay, self._now = name, relay, now
        self._statistics, self._own, self._peer = statistics, own, peer
        self.findings: list[Finding] = []
        self.sentences: list[str] = []
        self.remedies: list[Remedy] = []

    def _say(self, finding: Finding, sentence: str, *remedies: Remedy) -> None:
        self.findings.append(finding)
        self.sentences.append(sentence)
        self.remedies += [remedy for remedy in remedies if remedy not in self.remedies]

    def judge_contact(self, contact: Contact, problem: str) -> None:
        """What keeps even the relay from reaching the peer, if anything does."""
        match contact:
            case Contact.OPEN:
                pass
            case Contact.NO_REGION:
                self._say(
                    Finding.NO_REGION,
                    f"No relay is known by which {self._name} is reached.",
                    Remedy.CHECK_REGION,
                )
            case Contact.RELAY_DOWN:
                self._say(
                    Finding.RELAY_DOWN,
                    f"{self._name} is reached by the relay {self._relay}, and that can't be "
                    f"reached from this node: {problem}.",
                    Remedy.CHECK_RELAY,
                )
                self._blame_own_network()
            case Contact.NOT_THERE:
                self._say(
                    Finding.NOT_AT_RELAY,
                    f"The relay {self._relay} says that {self._name} is not connected to it.",
                    Remedy.CHECK_PEER,
                    Remedy.CHECK_REGION,
                )
            case Contact.NOT_INTRODUCED:
                self._say(
                    Finding.NO_INTRODUCTION,
                    f"{self._name} has not answered our introduction by the relay {self._relay}.",
                    Remedy.CHECK_PEER,
                    Remedy.CHECK_REGION,
                    Remedy.CHECK_KEYS,
                )

    def judge(self) -> None:
        statistics = self._statistics
        best = statistics.best
        latency = f"{best.latency_seconds * 1000:.1f} ms" if best is not None else "no latency yet"
        loss = best.loss_ratio if best is not None else 0.0
        match statistics.state:
            case PathState.DIRECT:
                self._say(
                    Finding.DIRECT,
                    f"Traffic to {self._name} goes directly to {statistics.route.path} "
                    f"({latency}, {loss:.0%} of heartbeats lost).",
                )
                if self._punch is not None and self._punch.has_succeeded:
                    self._tell_punch(self._punch)
                return
            case PathState.PEER_RELAY:
                self._say(
                    Finding.PEER_RELAY,
                    f"Traffic to {self._name} goes by the peer relay {statistics.route.path} "
                    f"({latency}).",
                )
            case PathState.EDGE:
                self._say(
                    Finding.EDGE,
                    f"Traffic to {self._name} goes by the edge tunnel ({latency}), because neither "
                    "UDP nor the relay works, or because policy prefers it.",
                )
            case PathState.DOUBT:
                self._say(
                    Finding.DOUBT,
                    f"{statistics.route.path} stopped answering, so traffic to {self._name} goes "
                    f"there and by the relay {self._relay} as well.",
                )
                return
            case PathState.IDLE:
                self._say(
                    Finding.IDLE,
                    f"Nothing was sent to {self._name} lately, so no path is kept; the next "
                    f"datagram goes by the relay {self._relay} too.",
                    Remedy.SEND_TRAFFIC,
                )
                return
            case PathState.RELAY:
                self.sentences.append(f"Traffic to {self._name} goes by the relay {self._relay}.")
        self._why_not_direct()

    def _why_not_direct(self) -> None:
        statistics, own, peer = self._statistics, self._own, self._peer
        shelved = [c for c in statistics.candidates if c.is_shelved]
        if shelved:
            self._say(
                Finding.LOSSY,
                f"The direct path {shelved[0].path} works but lost "
                f"{shelved[0].loss_ratio:.0%} of its heartbeats, so the relay is better until "
                "it has healed.",
            )
            return
        self._blame_own_network()
        if peer.is_udp_blocked:
            self._say(
                Finding.UDP_BLOCKED_THERE,
                f"{self._name} says that its firewall blocks UDP.",
                Remedy.OPEN_UDP_THERE,
            )
        if own.is_udp_blocked or peer.is_udp_blocked:
            return
        answered = [c for c in statistics.candidates if c.answered_at is not None]
        pinged = [c for c in statistics.candidates if c.pinged_at is not None]
        if answered:
            last = max(answered, key=lambda c: c.answered_at or 0.0)
            ago = self._now - (last.answered_at or 0.0)
            self._say(
                Finding.PATH_LOST,
                f"{last.path} worked until {ago:.0f} s ago and does not answer any more.",
            )
        elif not statistics.candidates:
            self._say(
                Finding.NO_CANDIDATES,
                f"No address of {self._name} is known"
                + ("." if statistics.calls_received else ", and it never called by the relay."),
                Remedy.CHECK_PEER,
            )
        elif pinged:
            self._say(
                Finding.UNANSWERED,
                f"None of its {len(pinged)} addresses that were pinged answered.",
            )
        self._blame_nats()
        if self._punch is not None and not self._punch.has_succeeded:
            self._tell_punch(self._punch)
        # A peer that has nothing to send pings us when we call, but need not call itself.
        is_silent = not statistics.calls_received and not statistics.relay_pongs
        if statistics.candidates and is_silent and not answered:
            self._say(
                Finding.NO_CALL,
                f"{self._name} has sent no CallMeMaybe: it may be off line, or not see our own.",
                Remedy.CHECK_PEER,
            )

    def tell_detours(self) -> None:
        """What was tried beside a direct path, and why it does not carry the traffic."""
        failed = [a for a in self._peer_relays if a.step not in _HOPEFUL_STEPS]
        if failed:
            tried = ", ".join(f"{attempt.relay} {attempt.step.value}" for attempt in failed)
            self._say(Finding.PEER_RELAYS_FAILED, f"Peer relays do not help: {tried}.")
        edge = self._statistics.edge
        if edge is not None and (
            edge.answered_at is None or self._now - edge.answered_at >= EDGE_SILENCE_SECONDS
        ):
            self._say(
                Finding.EDGE_UNANSWERED,
                f"The edge tunnel was tried as well, and {self._name} did not answer by it.",
            )

    def _blame_own_network(self) -> None:
        if self._own.has_captive_portal:
            self._say(
                Finding.CAPTIVE_PORTAL_HERE,
                "A captive portal answers in place of the relays, so this network lets nothing "
                "through before somebody signs in.",
                Remedy.SIGN_IN_HERE,
            )
        elif self._own.is_offline:
            self._say(
                Finding.OFFLINE_HERE,
                "No relay answers this node, neither by UDP nor by HTTPS.",
                Remedy.CHECK_NETWORK,
                Remedy.CHECK_RELAY,
            )
        elif self._own.is_udp_blocked:
            self._say(
                Finding.UDP_BLOCKED_HERE,
                "Relays answer this node by HTTPS only: its firewall blocks UDP.",
                Remedy.OPEN_UDP_HERE,
            )

    def _tell_punch(self, punch: PunchFacts) -> None:
        """What the port search did about it."""
        way = punch.strategy.value
        if punch.is_running:
            self._say(
                Finding.PORTS_SEARCHED,
                f"The port search ({way}) is running since {punch.seconds:.0f} s: {punch.reason}.",
            )
        elif punch.has_succeeded:
            self._say(Finding.PORTS_FOUND, f"The port search ({way}) found it: {punch.cost()}.")
        elif punch.failure is not None:
            again = ""
            if punch.next_attempt_at is not None and punch.next_attempt_at > self._now:
                again = f" It may try again in {punch.next_attempt_at - self._now:.0f} s."
            self._say(
                Finding.PORTS_NOT_FOUND,
                f"The port search ({way}: {punch.cost()}) failed: {punch.failure}.{again}",
            )
        elif punch.strategy is Strategy.RELAY:
            self._say(Finding.NO_PORT_SEARCH, f"No ports are searched: {punch.reason}.")

    def _blame_nats(self) -> None:
        own, peer = self._own, self._peer
        if can_punch(own, peer) is not False:
            last_sent = self._statistics.last_sent_at
            if last_sent is not None and Finding.PATH_LOST not in self.findings:
                self._say(
                    Finding.SEARCHING,
                    f"This node is behind {describe_nat(own)}, {self._name} behind "
                    f"{describe_nat(peer)}: nothing known speaks against a direct path, "
                    "the search goes on.",
                )
            return
        search: tuple[Remedy, ...] = (Remedy.PORT_SEARCH,)
        if self._punch is not None and not self._punch.is_forbidden:
            search = ()
        both = f"This node is behind {describe_nat(own)}, {self._name} behind {describe_nat(peer)}"
        ports = (Remedy.MAP_PORT_HERE, Remedy.MAP_PORT_THERE)
        if own.is_hard and peer.is_hard:
            relay = () if self._statistics.state is PathState.PEER_RELAY else (Remedy.PEER_RELAY,)
            sentence = f"{both}: neither can learn the other's port."
            self._say(Finding.BOTH_HARD, sentence, *ports, *relay)
        elif own.is_hard:
            self._say(
                Finding.HARD_HERE,
                f"{both}: it cannot know the port that it would have to let in.",
                *ports,
                *search,
            )
        else:
            self._say(
                Finding.HARD_THERE,
                f"{both}: we cannot know the port that we would have to let in.",
                *ports,
                *search,
            )


class _Outcome(Enum):
    NOT_TRIED = "not tried"
    WAITING = "no answer yet"
    UNANSWERED = "no answer"
    LOSSY = "answers, but loses too much"
    ANSWERED = "answers"


_HOPEFUL_STEPS: Final = (RelayStep.ASKED, RelayStep.BINDING, RelayStep.READY)


def _outcome(candidate: CandidateStatistics, now: float) -> _Outcome:
    pinged_at, answered_at = candidate.pinged_at, candidate.answered_at
    if candidate.is_shelved:
        return _Outcome.LOSSY
    if pinged_at is None:
        return _Outcome.NOT_TRIED
    if answered_at is not None and answered_at >= pinged_at:
        return _Outcome.ANSWERED
    return _Outcome.UNANSWERED if now - pinged_at >= PATIENCE_SECONDS else _Outcome.WAITING


def _relay_attempt(attempt: RelayAttempt, now: float) -> Attempt:
    answered_at = attempt.answered_at
    return Attempt(
        address=f"peer relay {attempt.relay}",
        source="peer-relay",
        outcome=attempt.step.value,
        pinged_ago_seconds=now - attempt.began_at,
        answered_ago_seconds=None if answered_at is None else now - answered_at,
        latency_seconds=attempt.latency_seconds,
    )


def _attempt(candidate: CandidateStatistics, now: float) -> Attempt:
    sources = (
        ("configured", candidate.is_configured),
        ("called", candidate.is_called),
        ("seen", candidate.is_seen),
        ("edge", candidate.path.is_edge),
    )
    return Attempt(
        address=str(candidate.path),
        source=" ".join(name for name, applies in sources if applies),
        outcome=_outcome(candidate, now).value,
        pinged_ago_seconds=None if candidate.pinged_at is None else now - candidate.pinged_at,
        answered_ago_seconds=None if candidate.answered_at is None else now - candidate.answered_at,
        latency_seconds=candidate.latency_seconds or None,
    )


def _facts_dict(facts: NatFacts) -> dict[str, object]:
    return {
        "text": describe_nat(facts),
        "mapping": facts.mapping.name.lower(),
        "filtering": facts.filtering.name.lower(),
        "port_pattern": facts.ports.pattern.value,
        "port_step": facts.ports.step,
        "hairpins": facts.hairpins,
        "udp_blocked": facts.is_udp_blocked,
        "offline": facts.is_offline,
        "port_mapping": facts.has_port_mapping,
        "captive_portal": facts.has_captive_portal,
    }
