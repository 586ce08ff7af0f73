"""The sending half of a stub's call, and the way through the client stack; see `stream` for the whole."""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from typing import TYPE_CHECKING, Any, Final, NoReturn

import anyio
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError
from grpclib.metadata import Deadline
from multidict import MultiDict

from ...core.context import VAR
from ...core.deadlines import passed
from ...core.errors import DeadlineExceeded, InvalidArgument, MeshError
from ...core.supervisor import Job
from ..inbound import PREFIX, framed
from ..metadata import sent_metadata
from ..status import excess, raised
from .call import Method, Reply, Request
from .exchange import Exchange, cancelled, fresh

if TYPE_CHECKING:
    from .channel import Channel

__all__ = ["Outgoing"]

REPLAY: Final = 65536
"""Bytes of a client's stream that are kept until the server answers."""
REOPENED: Final = 3
"""How often a client's stream is opened again."""


class Outgoing:
    """What a call sends.

    Args:
        channel: Whose call it is.
        method: Of what.
        metadata: The user's; ``None`` for none.
        until: When the answer stops being wanted, on the channel's clock; ``None`` for never.
        timeout: The seconds that this was, for errors.
    """

    def __init__(
        self, channel: Channel, method: Method, metadata: Any, until: float | None, timeout: float | None
    ) -> None:
        self._channel, self._method = channel, method
        self._metadata, self._until, self._timeout = metadata, until, timeout
        self._streams_up: bool = method.cardinality.client_streaming
        self._sent_request = self._sent_message = self._ended = False
        self._got_initial = self._got_trailing = self._cancelled = False
        self._pairs: list[tuple[str, str]] | None = None
        self._message: Any = None
        self._data = b""
        self._reply: Reply | None = None
        self._read = False
        self._exchange: Exchange | None = None
        self._replay: list[bytes] | None = []
        self._replayed = 0
        self._ending = False
        self._reopened = 0
        self._task: asyncio.Task[Any] | None = None
        self._failure: Exception | None = None
        self._opening: Job | None = None
        self._opened: anyio.Event | None = None
        self._left = False
        self._sending = False
        self._turns: deque[asyncio.Future[None]] | None = None
        self.initial_metadata: Any = None
        self.trailing_metadata: Any = None
        self.peer: Any = None

    async def send_request(self, *, end: bool = False) -> None:
        """Begin. A client's stream is opened; for a single message there is nothing to send yet.

        Args:
            end: There will be no message.
        """
        if self._sent_request:
            raise ProtocolError("Request is already sent")
        if end and not self._streams_up:
            raise ProtocolError("Unary request requires a message to be sent before ending outgoing stream")
        if self._sending:
            await self._wait_turn()
        self._sending = True
        try:
            if self._sent_request:
                raise ProtocolError("Request is already sent")
            await self._announce()
            if self._streams_up:
                await self._start(b"", end)
            self._sent_request, self._ended = True, end
        finally:
            self._pass_turn()

    async def _announce(self) -> None:
        dispatch, metadata = self._channel.__dispatch__, self._metadata
        if self._channel.listened("send_request"):
            left = None if self._until is None else self._until - self._channel.clock.now()
            (metadata,) = await dispatch.send_request(
                MultiDict(metadata or ()),
                method_name=self._method.path,
                deadline=None if left is None else Deadline.from_timeout(left),
                content_type=self._method.content_type,
            )
        try:
            self._pairs = sent_metadata(metadata) if metadata else None
        except (TypeError, ValueError) as error:
            raise self._raised(InvalidArgument(f"{self._method.path}: {error}")) from error

    async def send_message(self, message: Any, *, end: bool = False) -> None:
        """Send one message; the request is sent with the first. Several tasks may: their messages go one after another.

        Args:
            message: Of the method's type.
            end: It is the last.

        Raises:
            GRPCError: The stream failed.
            StreamTerminatedError: The server has ended it.
        """
        if self._sending:
            await self._wait_turn()
        self._sending = True
        try:
            await self._send_message(message, end)
        finally:
            self._pass_turn()

    async def _send_message(self, message: Any, end: bool) -> None:
        if self._ended:
            raise ProtocolError("Stream is ended")
        if not self._streams_up and self._sent_message:
            raise ProtocolError("Message was already sent")
        if not self._sent_request:
            await self._announce()
        if self._channel.listened("send_message"):
            (message,) = await self._channel.__dispatch__.send_message(message)
        method = self._method
        data = framed(method.codec.encode(message, method.request_type), gzip=self._channel.compressed)
        self._channel.check_size(method.path, len(data) - PREFIX)
        if not self._streams_up:
            self._message, self._data = message, data
            if method.streams:
                self._begin(self._request(message, data, True))
        elif not self._sent_request:
            await self._start(data, end, message)
        else:
            await self._send(data, end)
        self._sent_request = self._sent_message = True
        if end:
            self._ended = True

    async def end(self) -> None:
        """Say that no message follows."""
        if self._sending:
            await self._wait_turn()
        self._sending = True
        try:
            if not self._sent_request:
                raise ProtocolError("Request was not sent")
            if self._ended:
                raise ProtocolError("Stream was already ended")
            if not self._streams_up and not self._sent_message:
                raise ProtocolError("Unary request requires a single message to be sent")
            if self._streams_up:
                await self._send(b"", True)
            self._ended = True
        finally:
            self._pass_turn()

    async def _wait_turn(self) -> None:
        """Wait until whoever sends now, and whoever waits already, is done. Nearly always there is nobody."""
        if self._turns is None:
            self._turns = deque()
        turn = asyncio.get_running_loop().create_future()
        self._turns.append(turn)
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled():  # it came in that very moment
                self._pass_turn()
            raise

    def _pass_turn(self) -> None:
        """The next one sends, if there is one; until it does, nobody else."""
        while self._turns:
            turn = self._turns.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._sending = False

    async def _send(self, data: bytes, end: bool) -> None:
        while True:
            exchange = await self._stream()
            most = exchange.request.max_request
            if most is not None and len(data) - PREFIX > most:
                size = len(data) - PREFIX
                text = f"a message of {size} bytes is larger than the {most} that the service config allows"
                raise self._raised(excess(text, sent=False))
            await exchange.session.send(exchange, data, end=end)
            if not exchange.over or (end and exchange.ended):
                self._keep(data, end)
                return
            error = exchange.failure()
            if error is None:
                break
            if exchange is self._exchange and not self._again(error):
                self._fail(error)
            # It is opened again with all that has been kept. This message has not been: it is sent anew.
        if self._method.cardinality.server_streaming:
            raise StreamTerminatedError("the server has ended the stream")
        await asyncio.sleep(0)  # it has answered already: what else there is to send is not needed

    def _keep(self, data: bytes, end: bool) -> None:
        """What has been sent is kept for another server, as long as this one has not begun to answer."""
        self._ending = self._ending or end
        replay, exchange = self._replay, self._exchange
        if replay is not None:
            replay.append(data)
            self._replayed += len(data)
            if (exchange is not None and exchange.headers is not None) or self._replayed > REPLAY:
                self._replay = None

    def _again(self, error: MeshError) -> bool:
        """Begin to open a client's stream once more that nobody has looked at, see `_stream`. Has that been done?

        Whoever finds out first does it, in a task of its own: another may be sending while one receives.
        """
        replay, exchange = self._replay, self._exchange
        if replay is None or not error.requeueable or self._reopened >= REOPENED or self._cancelled:
            return False
        if not self._streams_up or exchange is None or exchange.headers is not None or exchange.abandoned:
            return False
        self._reopened += 1
        self._exchange = None
        self._begin(self._request(None, b"".join(replay), self._ending))
        return True

    async def _stream(self) -> Exchange:
        """The client's stream, which may just be being opened again.

        Raises:
            GRPCError: It could not be.
        """
        await self._wait_opened()
        if self._exchange is None:
            assert self._failure is not None  # noqa: S101
            raise self._failure
        return self._exchange

    async def _wait_opened(self) -> None:
        while self._opened is not None and self._exchange is None and self._failure is None:
            await self._opened.wait()  # and whoever was quicker may have found that it is to be opened once more

    # --- through the stack --------------------------------------------------------------------------------------------

    async def _start(self, data: bytes, end: bool, message: Any = None) -> None:
        """Open the stream."""
        request = self._request(message, data, end)
        reply = await self._through(request)
        assert isinstance(reply, Exchange)  # noqa: S101
        if self._left or self._cancelled:  # by another task, or in that very moment
            self._give_up(reply)
            raise self._raised(cancelled())
        self._exchange = reply
        self._keep(data, end)
        self.peer = reply.session.peer

    def _request(self, message: Any, data: bytes, end: bool) -> Request:
        request = Request(self._method, message, data, end, self._pairs, self._channel.max_reply)
        request.until = self._until
        return request

    def _begin(self, request: Request) -> None:
        """Open a stream in a task of its own, so that whoever waits may stop waiting, and wait again."""
        client = self._channel.client
        self._opened = anyio.Event()
        try:
            self._opening = client.env.supervisor.start(
                self._open,
                request,
                name=f"open {self._method.path}",
                context=contextvars.copy_context(),
            )
        except MeshError as error:
            self._failure = self._raised(error)
            self._opened.set()
            raise self._failure from None

    async def _open(self, request: Request) -> None:
        assert self._opened is not None  # noqa: S101
        try:
            reply: Exchange = await self._through(request)
        except GRPCError as error:
            self._failure = error
        except BaseException as error:
            self._failure = error if isinstance(error, Exception) else self._raised(cancelled())
            if not isinstance(error, Exception):
                raise
        else:
            self._exchange = reply
            self.peer = reply.session.peer
            if self._left or self._cancelled:  # in that very moment
                self._give_up(reply)
        finally:
            self._opened.set()

    async def _through(self, request: Request) -> Any:
        """Make the call.

        Raises:
            GRPCError: It failed.
        """
        until, context, token = self._until, VAR.get(), None
        if until is not None and (context.deadline is None or until < context.deadline):
            token = VAR.set(context.evolve(deadline=until))
        chosen = None
        self._task = task = asyncio.current_task()
        before = 0 if task is None else task.cancelling()
        try:
            chosen = await self._channel.client(request)
            return chosen
        except MeshError as error:
            raise self._raised(error, own=token is not None) from error
        except asyncio.CancelledError:
            # Ours, if `cancel` has called for it; and if somebody else has as well, it is theirs.
            mine = self._cancelled and self._opening is None
            if mine and task is not None and task.uncancel() <= before:
                raise self._raised(cancelled()) from None
            raise
        finally:
            self._task = None
            if token is not None:
                VAR.reset(token)
            for exchange in request.opened:
                if exchange is not chosen:
                    exchange.session.give_up(exchange)

    def _raised(self, error: MeshError, *, own: bool = False) -> GRPCError:
        # A nearer deadline, of a layer or of the caller's, says itself what it was.
        ran_out = isinstance(error, DeadlineExceeded) and passed(self._until, self._channel.clock)
        if own and ran_out and isinstance(error, DeadlineExceeded) and self._timeout is not None:
            waiting = f": {error.kept_here}" if error.kept_here else ""
            error.args = (f"no reply within the timeout of {self._timeout:g} s{waiting}",)
        if not error.label:
            error.label, error.name = self._channel.label, self._channel.name
        return raised(error)

    def _fail(self, error: MeshError) -> NoReturn:
        """The stream failed after it was opened.

        Raises:
            GRPCError: Always.
        """
        both = self._raised(fresh(error), own=self._until is not None)
        raise both from error.__cause__

    async def cancel(self) -> None:
        """Give the call up; the server is told. Whoever waits for it gets a `GRPCError` of CANCELLED."""
        if not self._sent_request:
            raise ProtocolError("Request was not sent yet")
        if self._cancelled:
            raise ProtocolError("Stream was already cancelled")
        self._cancelled = True
        if self._exchange is not None:
            self._give_up(self._exchange)
        elif self._opening is not None:
            self._opening.cancel()
        elif self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()

    def _give_up(self, exchange: Exchange) -> None:
        if not exchange.over:
            exchange.error = cancelled()
            exchange.session.give_up(exchange)
