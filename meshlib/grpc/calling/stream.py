"""What a stub gets for one call: grpclib's ``Stream``, in everything that may be done with it, over the client stack.

A unary call goes through the stack when its answer is first asked for: until then the message is held here, so that it
can be sent again, elsewhere; whoever stops waiting has given the call up. A stream of answers is opened with its
request, in a task of its own, and may be opened elsewhere until its first headers have come. A client's stream is
picked and opened with the first message. What it has sent is kept until the server begins to answer, at most 64 KiB, so
that a stream which was provably never looked at, since the server was about to go, is opened elsewhere without a word.

Errors are `GRPCError` and the library's own at once. Nobody's task is cancelled to tell it something, but for `cancel`
of a unary call from another task, which takes back its own cancellation.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from grpclib.const import Status
from grpclib.exceptions import GRPCError, ProtocolError
from grpclib.stream import StreamIterator
from multidict import MultiDict

from ...core.errors import DeadlineExceeded, MeshError
from ..metadata import decode_metadata
from ..status import status_of
from .exchange import Exchange, cancelled
from .outgoing import Outgoing

__all__ = ["Stream"]


class Stream(Outgoing, StreamIterator[Any]):
    """One call. See `grpclib.client.Stream`, whose interface this is.

    Attributes:
        initial_metadata: Once it has been received.
        trailing_metadata: Likewise.
        peer: grpclib's; known once the call has been answered, or a client's stream opened.
    """

    # --- receiving ----------------------------------------------------------------------------------------------------

    async def recv_initial_metadata(self) -> None:
        """Wait for the first headers.

        Raises:
            GRPCError: The call failed before there were any.
        """
        if not self._sent_request:
            raise ProtocolError("Request was not sent yet")
        if self._got_initial and self._failure is None:
            raise ProtocolError("Initial metadata was already received")
        await self._initial()

    async def _initial(self) -> None:
        if self._exchange is None:
            await self._answer()
        if self._reply is not None:
            self._got_initial = True
            await self._set_initial(decode_metadata(self._reply.initial))
            return
        exchange = await self._until_headers()
        self._got_initial = True
        if exchange.headers is None:
            await self._end_badly(exchange)
            return
        problem = exchange.head_problem()
        if problem is not None:
            exchange.session.give_up(exchange, problem)
            self._fail(problem)
        if exchange.trailers_only:
            await self._set_initial(MultiDict())
            while not exchange.over:
                await exchange.progress()
            await self._finish(exchange)
        else:
            await self._set_initial(decode_metadata(exchange.headers))

    async def _answer(self) -> None:
        """See that the call of a single message has been made."""
        if self._reply is not None or self._exchange is not None:
            return
        if not self._sent_message and self._opened is None:
            raise ProtocolError("Request was not sent yet")
        await self._wait_opened()
        if self._exchange is not None:
            return
        if self._failure is None and self._cancelled:
            self._failure = self._raised(cancelled())
        if self._failure is None:
            try:
                self._reply = await self._through(self._request(self._message, self._data, True))
            except Exception as error:
                self._failure = error
            except BaseException:
                # It is over: to wait again must not be to send again.
                self._failure = self._raised(cancelled())
                raise
        if self._failure is not None:
            self._got_initial = True
            if isinstance(self._failure, GRPCError):
                await self._tell_failure(self._failure)
            raise self._failure
        assert self._reply is not None  # noqa: S101
        self.peer = self._reply.peer

    async def _tell_failure(self, error: GRPCError) -> None:
        """What the server said with a failure is there to be read, and those who listen hear of it."""
        trailing = getattr(error, "trailing_metadata", None)
        if trailing is None or self._got_trailing:
            return
        if self.initial_metadata is None:
            await self._set_initial(getattr(error, "initial_metadata", None) or MultiDict())
        self._got_trailing = True
        self.trailing_metadata = await self._told(trailing, error.status, error.message, error.details)

    async def _told(self, metadata: Any, status: Status, message: str | None, details: Any) -> Any:
        if self._channel.listened("recv_trailing_metadata"):
            (metadata,) = await self._channel.__dispatch__.recv_trailing_metadata(
                metadata, status=status, status_message=message, status_details=details
            )
        return metadata

    async def _until_headers(self) -> Exchange:
        while True:
            if self._exchange is None:
                await self._answer()  # it is being opened again
            exchange = self._exchange
            assert exchange is not None  # noqa: S101
            if exchange.headers is not None:
                return exchange
            if exchange.over:
                error = exchange.failure()
                if error is None or not self._again(error):
                    return exchange
            else:
                await exchange.progress()

    async def _set_initial(self, metadata: Any) -> None:
        if self._channel.listened("recv_initial_metadata"):
            (metadata,) = await self._channel.__dispatch__.recv_initial_metadata(metadata)
        self.initial_metadata = metadata

    async def _end_badly(self, exchange: Exchange) -> None:
        error = exchange.failure()
        if error is not None:
            self._fail(error)

    async def recv_message(self) -> Any:
        """The next message; ``None`` when the server has ended the stream. See `recv_trailing_metadata` for how.

        Raises:
            GRPCError: The call failed.
        """
        if not self._got_initial or (self._reply is None and self._exchange is None):
            if not self._sent_request:
                raise ProtocolError("Request was not sent yet")
            await self._initial()
        if self._reply is not None:
            if self._read:
                return None
            self._read = True
            message = self._reply.message
        else:
            exchange = self._exchange
            assert exchange is not None  # noqa: S101
            data = await self._next(exchange)
            if data is None:
                return None
            try:
                message = exchange.decode(data)
            except MeshError as error:
                exchange.session.give_up(exchange, error)
                self._fail(error)
        if self._channel.listened("recv_message"):
            (message,) = await self._channel.__dispatch__.recv_message(message)
        return message

    async def _next(self, exchange: Exchange) -> bytes | None:
        while True:
            try:
                data = exchange.take()
            except MeshError as error:
                exchange.session.give_up(exchange, error)
                self._fail(error)
                raise
            if data is not None or not exchange.over:
                exchange.session.consumed(exchange)
            if data is not None:
                return data
            if exchange.over:
                if exchange.trailers is None and not exchange.trailers_only:
                    await self._end_badly(exchange)  # it broke off
                elif (cut := exchange.incomplete()) is not None:
                    self._fail(cut)
                return None
            await exchange.progress()

    async def recv_trailing_metadata(self) -> None:
        """Wait for the end, and for what the server says of it.

        Raises:
            GRPCError: It says that the call failed.
        """
        self._check_ended()
        if not self._got_initial:
            raise ProtocolError("Initial metadata was not received before waiting for trailing metadata")
        if self._got_trailing:
            if self._exchange is not None and self._exchange.trailers_only:
                return
            raise ProtocolError("Trailing metadata was already received")
        await self._trailing()

    def _check_ended(self) -> None:
        if not self._ended and (self._streams_up or not self._sent_message):
            raise ProtocolError("Outgoing stream was not ended")

    async def _trailing(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._reply is not None:
            self._got_trailing = True
            self.trailing_metadata = await self._told(decode_metadata(self._reply.trailers), Status.OK, None, None)
            return
        exchange = self._exchange
        assert exchange is not None  # noqa: S101
        while not exchange.over:
            if exchange.take() is None:
                exchange.session.consumed(exchange)
                await exchange.progress()
        await self._finish(exchange)

    async def _finish(self, exchange: Exchange) -> None:
        """It is over: tell of the trailing metadata, and fail if it failed."""
        if self._got_trailing:
            return
        self._got_trailing = True
        error = exchange.failure()
        said = exchange.trailers if exchange.trailers is not None else exchange.headers
        if said is not None and (exchange.trailers is not None or exchange.trailers_only):
            facts = {} if error is None else vars(error)
            status = status_of(error)
            metadata = await self._told(decode_metadata(said), status, facts.get("said"), facts.get("details"))
            self.trailing_metadata = metadata
        if error is not None:
            self._fail(error)

    # --- ending -------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._until is not None and self._until <= self._channel.clock.now():
            error = DeadlineExceeded("the deadline had passed before the call was made", processed=False)
            raise self._raised(error)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None and self._sent_request and not self._cancelled:
                if not self._got_initial:
                    self._check_left(self._exchange is not None and self._exchange.over)
                    await self._initial()
                if not self._got_trailing:
                    self._check_left(self._exchange is not None and self._exchange.failed)
                    await self._trailing()
        finally:
            self._left = True
            if self._exchange is None and self._opening is not None:
                self._opening.cancel()
            if self._exchange is not None:
                self._give_up(self._exchange)
                self._exchange.settle()

    def _check_left(self, over: bool) -> None:
        """A stream that is left and has not been ended would never end: its server waits for more, and this side too.

        But what a server says that has ended it counts more.
        """
        if not over and self._failure is None:
            self._check_ended()

    def __repr__(self) -> str:
        return f"<Stream of {self._method.path}>"
