"""The login of the operator's page: the form, the sessions, and the bound on wrong passwords."""

from __future__ import annotations

import asyncio
import base64
import hmac
import html
import re
import secrets
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from urllib.parse import parse_qs, quote

from msgspec import Struct
from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

from fieldtune.page.password import PasswordFile

SESSION_S = 12 * 3600
WRONG_PER_MINUTE = 10  # over all clients: whoever guesses can have many addresses
RULE = "rule"  # stands in the registry for decisions that nobody made
MAX_NAME = 64
MAX_FORM_BYTES = 4096
MESSAGES = {
    HTTPStatus.OK: "",
    HTTPStatus.BAD_REQUEST: "Give a name of yours.",
    HTTPStatus.FORBIDDEN: "This form was too old. Try again.",
    HTTPStatus.UNAUTHORIZED: "That is not the password.",
    HTTPStatus.TOO_MANY_REQUESTS: "Too many wrong passwords, from here or elsewhere. Wait a minute.",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "That is too long.",
}
FORM = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>fieldtune</title>
<style>
body {{{{ font: 1.1rem system-ui, sans-serif; max-width: 20rem; margin: 15vh auto; padding: 0 1rem }}}}
input, button {{{{ font: inherit; width: 100%; box-sizing: border-box; padding: .6rem; margin: .2rem 0 1rem }}}}
</style>
<h1>fieldtune</h1>
<p role="alert">{{message}}</p>
<form method="post" action="/login">
<input type="hidden" name="token" value="{{token}}"><input type="hidden" name="next" value="{{target}}">
<label>Your name, for the log
<input name="name" value="{{name}}" autocomplete="name" maxlength="{MAX_NAME}" required></label>
<label>Password <input name="password" type="password" autocomplete="current-password" required></label>
<button>Enter</button>
</form></html>
"""


class Session(Struct, frozen=True):
    """One browser that has given the password."""

    who: str
    until_s: float


class Login:
    """Lets in who has the password. Sessions are in memory: a restart ends them all.

    `clock` gives seconds that only grow. Cookies are `Secure` with `secure`.
    """

    def __init__(self, password: PasswordFile, secure: bool, clock: Callable[[], float]) -> None:
        self._password, self._secure, self._clock = password, secure, clock
        self._sessions: dict[str, Session] = {}
        self._wrong_s: deque[float] = deque()
        self._checking = asyncio.Lock()
        self._key, self._proven = secrets.token_bytes(), b""

    def session(self, connection: HTTPConnection) -> Session | None:
        """The session whose cookie came with it, unless it is over."""
        session = self._sessions.get(connection.cookies.get(_cookie(connection, "session"), ""))
        return session if session is not None and self._clock() < session.until_s else None

    async def answer(self, request: Request) -> Response | None:
        """What is answered in place of the page; None lets the request through."""
        path, reads = request.scope["path"], request.method in ("GET", "HEAD")
        if path == "/login":
            return self._form(request, request.query_params.get("next", "/")) if reads else await self._login(request)
        if path == "/logout" and not reads:
            self._sessions.pop(request.cookies.get(_cookie(request, "session"), ""), None)
            return RedirectResponse("/login", HTTPStatus.SEE_OTHER)
        if path == "/healthz" or self.session(request) is not None:
            return None
        if path == "/metrics" and "authorization" in request.headers:
            status = await self._check(_basic_password(request.headers["authorization"]))
            if status == HTTPStatus.OK:
                return None
        elif reads and "text/html" in request.headers.get("accept", ""):
            target = f"{quote(path)}?{request.scope['query_string'].decode('latin-1')}".rstrip("?")
            return RedirectResponse(f"/login?next={quote(target, safe='')}", HTTPStatus.SEE_OTHER)
        else:
            status = HTTPStatus.UNAUTHORIZED
        ask = {"WWW-Authenticate": 'Basic realm="fieldtune"'} if path == "/metrics" else None
        return PlainTextResponse("The page's password is needed.", status, ask)

    async def _login(self, request: Request) -> Response:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_FORM_BYTES:
                return self._form(request, "/", status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        fields = {name: values[0] for name, values in parse_qs(body.decode(errors="replace")).items()}
        name, target = " ".join(fields.get("name", "").split()), _same_site(fields.get("next", "/"))
        token = request.cookies.get(_cookie(request, "login"), "")
        if not token or not hmac.compare_digest(token.encode(), fields.get("token", "").encode()):
            status = HTTPStatus.FORBIDDEN
        elif not name or len(name) > MAX_NAME or not name.isprintable() or name == RULE:
            status = HTTPStatus.BAD_REQUEST
        else:
            status = await self._check(fields.get("password", ""))
        if status != HTTPStatus.OK:
            return self._form(request, target, name, status)
        now_s = self._clock()
        self._sessions = {key: session for key, session in self._sessions.items() if now_s < session.until_s}
        key = secrets.token_urlsafe(32)
        self._sessions[key] = Session(name, now_s + SESSION_S)
        response = RedirectResponse(target, HTTPStatus.SEE_OTHER)
        self._set_cookie(request, response, "session", key, SESSION_S)
        return response

    async def _check(self, password: str) -> HTTPStatus:
        """OK, UNAUTHORIZED, or TOO_MANY_REQUESTS without a look at the password."""
        async with self._checking:
            now_s = self._clock()
            while self._wrong_s and self._wrong_s[0] <= now_s - 60:
                self._wrong_s.popleft()
            if len(self._wrong_s) >= WRONG_PER_MINUTE:
                return HTTPStatus.TOO_MANY_REQUESTS
            # scrypt takes as long as it should for a guess. Prometheus comes every few seconds with the right password,
            # on a robot's cores: that is known again by a hash that never leaves this process.
            digest = hmac.digest(self._key, password.encode(), "sha256")
            known = hmac.compare_digest(digest, self._proven)
            if not known and not await asyncio.to_thread(self._password.matches, password):
                self._wrong_s.append(now_s)
                return HTTPStatus.UNAUTHORIZED
            self._proven = digest
            return HTTPStatus.OK

    def _form(self, request: Request, target: str, name: str = "", status: HTTPStatus = HTTPStatus.OK) -> Response:
        # Double submit: another site can neither read nor set the cookie that the form's token must equal.
        token = secrets.token_urlsafe(32)
        target, name = html.escape(_same_site(target)), html.escape(name)
        text = FORM.format(message=MESSAGES[status], token=token, target=target, name=name)
        response = HTMLResponse(text, status, {"Cache-Control": "no-store"})
        self._set_cookie(request, response, "login", token, None)
        return response

    def _set_cookie(self, request: Request, response: Response, name: str, value: str, max_age_s: int | None) -> None:
        response.set_cookie(
            _cookie(request, name), value, max_age_s, path="/", secure=self._secure, httponly=True, samesite="strict"
        )


def _cookie(connection: HTTPConnection, name: str) -> str:
    """Cookies do not know ports; several pages on one computer, or at the ends of several tunnels, must."""
    port = re.search(r":(\d{1,5})$", connection.headers.get("host", ""))
    return f"fieldtune-{name}" + (f"-{port[1]}" if port else "")


def _same_site(target: str) -> str:
    """`target` if it is a path on this page, else `/`. Browsers take `//host`, `/\\host` for other sites."""
    return target if re.fullmatch(r"/(?!/)[!-\[\]-~]*", target) else "/"


def _basic_password(header: str) -> str:
    """The password of HTTP Basic authentication (RFC 7617), whoever the user; "" where there is none."""
    scheme, _, value = header.partition(" ")
    try:
        text = base64.b64decode(value, validate=True).decode(errors="replace") if scheme.lower() == "basic" else ""
    except ValueError:  # binascii.Error is one, and what is not ASCII another
        return ""
    return text.partition(":")[2]
