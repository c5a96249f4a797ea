"""Who may see the operator's page: everything that reaches it comes through `Access`.

In this order: without a password only names of this computer are answered (DNS rebinding); what another site's page
asks for is refused (cross-site request forgery, WebSocket hijacking); with a password a session is needed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bridge.endpoint import is_local
from fieldtune.page.config import PageConfig
from fieldtune.page.login import Login
from fieldtune.page.password import PasswordFile

HEADERS = {"X-Frame-Options": "DENY", "Referrer-Policy": "same-origin", "X-Content-Type-Options": "nosniff"}
WHO = "fieldtune.who"  # key of an ASGI scope
CLOSED: Message = {"type": "websocket.close", "code": 1008}
LEFT: Message = {"type": "websocket.disconnect", "code": 1008}


def who(connection: Mapping[str, Any]) -> str:
    """The name given at the login, of a request, a WebSocket or its scope; "" where the page has no password."""
    return str(connection.get(WHO, ""))


class Access:
    """ASGI middleware around the whole page; `clock` (s) must never go back.

    Raises `ConfigError` for a password file that cannot be used.
    """

    def __init__(self, app: ASGIApp, config: PageConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._secure = config.certificate is not None
        self._login = None
        if config.password is not None:
            self._login = Login(PasswordFile.read(Path(config.password)), self._secure, clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, refuse, or hand on to the page."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(HTTPConnection(scope), receive, send)
        else:
            await self._http(Request(scope, receive), receive, send)

    async def _http(self, request: Request, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        answer: ASGIApp | None = self._foreign(request)
        if answer is None and self._login is not None:
            answer = await self._login.answer(request)
        await (answer or self._app)(self._named(request), receive, send_with_headers)

    async def _websocket(self, connection: HTTPConnection, receive: Receive, send: Send) -> None:
        if self._foreign(connection) is not None or not self._inside(connection):
            await send(CLOSED)
            return

        async def receive_while_inside() -> Message:
            message = await receive()
            return message if self._inside(connection) else LEFT

        await self._app(self._named(connection), receive_while_inside, send)

    def _foreign(self, connection: HTTPConnection) -> Response | None:
        """The refusal of what asks for another host, or comes from another site's page."""
        host = connection.headers.get("host", "").lower()
        if self._login is None and not is_local(f"tcp://{host}" if re.search(r":\d+$", host) else f"tcp://{host}:0"):
            text = "This page answers only to localhost, 127.0.0.1 and [::1]; set page.password to use other names."
            return PlainTextResponse(text, HTTPStatus.MISDIRECTED_REQUEST)
        # A browser says where each WebSocket, each POST and each cross-site read by a script comes from. Other programs
        # say nothing, and nobody can make them ask in somebody else's name.
        origin = connection.headers.get("origin")
        own = {f"https://{host}"} if self._secure else {f"http://{host}", f"https://{host}"}
        if origin is not None and not (host and origin.lower() in own):
            return PlainTextResponse("This page does not answer to other sites.", HTTPStatus.FORBIDDEN)
        return None

    def _inside(self, connection: HTTPConnection) -> bool:
        return self._login is None or self._login.session(connection) is not None

    def _named(self, connection: HTTPConnection) -> Scope:
        session = self._login and self._login.session(connection)
        return {**connection.scope, WHO: session.who} if session else connection.scope
