"""h2's connection, with the things that it lacks for long-lived servers.

* A graceful GOAWAY: h2 ends a connection with the first GOAWAY in either direction; RFC 9113 6.8
  lets the streams that are open finish.
* Lengths of bodies: a response without a body may announce one (a 304 above all), and a body of
  another length than announced is the stream's fault and not the connection's (RFC 9113 8.1.1).
* Headers without Huffman's code: hpack takes quadratic time to write it, seconds for a header of
  60 kB in which nothing else is served, to save a fifth of their size.
* Headers that h2 refuses to send leave no trace: neither in the compression's table, which all
  streams share, nor as a stream that counts as open.
* A budget for frames that cost us more than the sender (RFC 9113 10.5): pings and settings that
  want an answer, streams that are opened and reset at once, empty frames.

Pure: bytes and `now` in, events and bytes out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    PingReceived,
    PriorityUpdated,
    RemoteSettingsChanged,
    ResponseReceived,
    StreamReset,
)
from h2.exceptions import H2Error, InvalidBodyLengthError, ProtocolError
from h2.settings import SettingCodes, Settings
from hpack import Encoder
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, HeadersFrame

NUISANCES_PER_SECOND: Final = 100.0
NUISANCES_BURST: Final = 2000.0
"""A browser that leaves a page resets a few hundred streams at once; a rapid reset attack sends
tens of thousands a second."""
MIN_STREAMS_LOOK: Final = 100
MAX_HEADER_BYTES: Final = 64 << 10


class Http2Error(Exception):
    """The HTTP/2 connection failed or was closed; the text says why."""


@dataclass(frozen=True, slots=True)
class Http2Limits:
    """What we let the other side do.

    Attributes:
        streams: that it may open at one time.
        stream_window: bytes it may send on a stream ahead of the reader.
        connection_window: bytes it may send on all streams together before we take note.
        buffered_bytes: for all streams together. Beyond it the stream whose reader is furthest
            behind is reset, so that readers that stall never stall others. As many bytes may be in
            the headers of requests; beyond it new ones are refused.
        frame_bytes: largest frame, 16384 to 16777215.
        header_bytes: a header block, uncompressed.
    """

    streams: int = 250
    stream_window: int = 6 << 20
    connection_window: int = 16 << 20
    buffered_bytes: int = 64 << 20
    frame_bytes: int = 1 << 20
    header_bytes: int = MAX_HEADER_BYTES


class Http2Engine(H2Connection):
    """See the module's text. Feed with `receive`; send what `data_to_send` returns."""

    def __init__(self, limits: Http2Limits, *, client_side: bool, now: float) -> None:
        super().__init__(H2Configuration(client_side=client_side, header_encoding=None))
        self.encoder = _PlainEncoder()
        self.is_leaving = False
        """Whether the other side will serve no further streams of ours."""
        self._limits = limits
        self._budget = NUISANCES_BURST
        self._budget_at = now
        self._look_at = MIN_STREAMS_LOOK

    def start(self, *, connect_protocol: bool = False) -> None:
        """Queue the preface and our settings."""
        limits = self._limits
        values = {
            SettingCodes.MAX_CONCURRENT_STREAMS: limits.streams,
            SettingCodes.INITIAL_WINDOW_SIZE: limits.stream_window,
            SettingCodes.MAX_FRAME_SIZE: limits.frame_bytes,
            SettingCodes.MAX_HEADER_LIST_SIZE: limits.header_bytes,
        }
        if self.config.client_side:
            values[SettingCodes.ENABLE_PUSH] = 0
        elif connect_protocol:
            values[SettingCodes.ENABLE_CONNECT_PROTOCOL] = 1
        # As initial values these count at once. The other side uses them only when it has seen
        # them, and what it sends before is smaller: no need to wait for its acknowledgment.
        self.local_settings = Settings(client=bool(self.config.client_side), initial_values=values)
        self.max_inbound_frame_size = limits.frame_bytes
        self.decoder.max_header_list_size = limits.header_bytes
        self.initiate_connection()
        self.increment_flow_control_window(limits.connection_window - 65535)

    def send_headers(  # type: ignore[override]  # we set no priorities
        self, stream_id: int, headers: Iterable[tuple[bytes, bytes]], end_stream: bool = False
    ) -> None:
        """As h2's; raises ProtocolError for more than the other side takes (RFC 9113 6.5.2), which
        would end the connection there, for all streams."""
        headers = list(headers)
        limit = self.remote_settings.max_header_list_size
        if limit is not None and header_list_size(headers) > limit:
            raise ProtocolError(f"the headers are larger than the other side takes ({limit} bytes)")
        if not all(name for name, _ in headers):
            raise ProtocolError("a header has no name")  # h2 would raise IndexError
        is_new = stream_id not in self.streams
        try:
            super().send_headers(stream_id, headers, end_stream=end_stream)
        except H2Error:
            if is_new:
                # The other side never hears of it, so it would count as open for ever.
                self.streams.pop(stream_id, None)
            raise

    def receive(self, data: bytes, now: float) -> list[Event]:
        """Bytes from the network. Raises Http2Error; then `data_to_send` says so to the other
        side."""
        try:
            events = self.receive_data(data)
        except (H2Error, ValueError, KeyError, AssertionError) as error:
            raise Http2Error(f"HTTP/2: {str(error) or type(error).__name__}") from None
        nuisances = sum(map(_is_nuisance, events))
        if nuisances:
            elapsed = now - self._budget_at
            self._budget_at = now
            refilled = self._budget + elapsed * NUISANCES_PER_SECOND
            self._budget = min(NUISANCES_BURST, refilled) - nuisances
            if self._budget < 0:
                self.close_connection(ErrorCodes.ENHANCE_YOUR_CALM)
                raise Http2Error("HTTP/2: more pings, resets and empty frames than are useful")
        return events

    def announce_leaving(self) -> bytes:
        """A GOAWAY that lets open streams finish, to be sent after `data_to_send`."""
        frame = GoAwayFrame(0)
        frame.last_stream_id = self.highest_inbound_stream_id
        frame.error_code = ErrorCodes.NO_ERROR
        return frame.serialize()

    def _open_streams(self, remainder: int) -> int:
        # h2 looks at every stream, three times for each that is opened, and forgets those that are
        # over. Below the limit an estimate that is too high does as well, and it is enough to look
        # whenever the streams have doubled.
        is_ours = remainder == int(self.config.client_side or False)
        settings = self.remote_settings if is_ours else self.local_settings
        known = len(self.streams)
        if known < min(self._look_at, settings.max_concurrent_streams):
            return known
        count: int = super()._open_streams(remainder)
        self._look_at = 2 * len(self.streams) + MIN_STREAMS_LOOK
        return count

    def _receive_frame(self, frame: Frame) -> list[Event]:
        if not isinstance(frame, DataFrame):
            return super()._receive_frame(frame)
        # h2 would first write all of the frame in hexadecimal, for a log that is off: a third of
        # the time that a body takes. What else it does there does not concern DATA frames.
        try:
            frames, events = self._receive_data_frame(frame)
        except InvalidBodyLengthError:
            return self._refuse_body(frame)
        self._prepare_for_sending(frames)
        return events

    def _refuse_body(self, frame: DataFrame) -> list[Event]:
        self.reset_stream(frame.stream_id, ErrorCodes.PROTOCOL_ERROR)
        # Nobody reads these bytes; the connection's window must be opened for them all the same.
        number, length = frame.stream_id, frame.flow_controlled_length
        data = DataReceived(stream_id=number, data=b"", flow_controlled_length=length)
        code = ErrorCodes.PROTOCOL_ERROR
        return [data, StreamReset(stream_id=number, error_code=code, remote_reset=False)]

    def _receive_headers_frame(self, frame: HeadersFrame) -> tuple[list[Frame], list[Event]]:
        frames, events = super()._receive_headers_frame(frame)
        for event in events:
            if isinstance(event, ResponseReceived) and _has_no_body(event):
                self.streams[frame.stream_id]._expected_content_length = 0
        return frames, events

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Frame], list[Event]]:
        if frame.error_code != ErrorCodes.NO_ERROR:
            return super()._receive_goaway_frame(frame)
        self.is_leaving = True
        event = ConnectionTerminated()
        event.error_code = ErrorCodes.NO_ERROR
        event.last_stream_id = frame.last_stream_id
        return [], [event]


class _PlainEncoder(Encoder):
    def encode(self, headers: Iterable[tuple[bytes, bytes]], huffman: bool = False) -> bytes:  # type: ignore[override]  # what h2 calls it with
        # h2 checks the headers while they are read. All of them first: what is refused halfway must
        # not be in our table, which the other side would not have, and would read the headers of
        # all later streams wrong.
        return super().encode(list(headers), huffman=huffman)


def header_list_size(headers: Iterable[tuple[bytes, bytes]]) -> int:
    """In bytes, as MAX_HEADER_LIST_SIZE counts them (RFC 9113 6.5.2)."""
    return sum(len(name) + len(value) + 32 for name, value in headers)


def _has_no_body(event: ResponseReceived) -> bool:
    # A content-length then says what another request would have got (RFC 9110 8.6).
    return dict(event.headers or ()).get(b":status") in (b"204", b"304")


def _is_nuisance(event: Event) -> bool:
    if isinstance(event, DataReceived):
        return not event.data and event.stream_ended is None
    return isinstance(event, PingReceived | PriorityUpdated | RemoteSettingsChanged | StreamReset)
