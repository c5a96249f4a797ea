"""Who may see the operator's page: a real server on loopback, asked by http.client and by real WebSockets."""

from __future__ import annotations

import base64
import contextlib
import html
import http.client
import os
import re
import shutil
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from passwords import PASSWORD, password_file
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from bridge.config import ConfigError
from fieldtune.page.access import Access, who
from fieldtune.page.config import PageConfig, check_page_config
from fieldtune.page.frame import name_of
from fieldtune.page.login import SESSION_S, WRONG_PER_MINUTE, _same_site
from fieldtune.page.password import PasswordFile

HTML = {"Accept": "text/html,*/*;q=0.8"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


class Clock:
    """Time that passes when told."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Reply:
    """One answer, read to its end."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.text = response.status, response.headers, response.read().decode()
        self.cookies: SimpleCookie = SimpleCookie()
        for line in response.headers.get_all("set-cookie", []):
            self.cookies.load(line)


class Page:
    """A page behind `Access`, served on a free port of loopback until `close`."""

    def __init__(self, config: PageConfig) -> None:
        self.clock, self.secure, self.began, self.acted = Clock(), config.certificate is not None, False, 0

        @contextlib.asynccontextmanager
        async def lifespan(_: Any) -> Any:
            self.began = True
            yield

        async def show(request: Request) -> PlainTextResponse:
            return PlainTextResponse(f"{request.url.path} for {who(request)!r}")

        async def act(request: Request) -> PlainTextResponse:
            self.acted += 1
            return PlainTextResponse((await request.body()).decode())

        async def echo(socket: WebSocket) -> None:
            await socket.accept()
            async for text in socket.iter_text():
                await socket.send_text(f"{text} from {who(socket)!r}")

        paths = ("/", "/episodes", "/healthz", "/metrics", "/metrics/x")
        routes = [Route(path, show) for path in paths]
        app = Starlette(
            routes=[*routes, Route("/act", act, methods=["POST"]), WebSocketRoute("/_nicegui_ws/", echo)],
            lifespan=lifespan,
        )
        tls: dict[str, Any] = {"ssl_certfile": config.certificate, "ssl_keyfile": config.key} if self.secure else {}
        settings = uvicorn.Config(
            Access(app, config, self.clock),
            host="127.0.0.1",
            port=0,
            log_config=None,
            timeout_graceful_shutdown=1,
            **tls,
        )
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        deadline_s = time.monotonic() + 60
        while not self._server.started:
            assert self._thread.is_alive() and time.monotonic() < deadline_s, "the server did not start"
            time.sleep(0.005)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.host = f"127.0.0.1:{self.port}"
        self.origin = f"{'https' if self.secure else 'http'}://{self.host}"
        self._tls = ssl._create_unverified_context() if self.secure else None

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    def ask(self, path: str, method: str = "GET", body: str | None = None, **headers: str) -> Reply:
        if self._tls is None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        else:
            connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=30, context=self._tls)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): text for name, text in headers.items()})
            return Reply(connection.getresponse())
        finally:
            connection.close()

    def socket(self, origin: str | None, **headers: str) -> Any:
        url = f"{'wss' if self.secure else 'ws'}://{self.host}/_nicegui_ws/"
        return connect(url, origin=origin, additional_headers=headers, ssl=self._tls, proxy=None)  # type: ignore[arg-type]

    def login(self, password: str = PASSWORD, target: str = "/", **change: str) -> Reply:
        """As a browser does it: read the form, fill it in, send it with the form's cookie."""
        form = self.ask(f"/login?next={quote(target, safe='')}")
        fields = {name: html.unescape(value) for name, value in re.findall(r'name="(\w+)" value="([^"]*)"', form.text)}
        fields.update({"name": "Ada", "password": password, **change})
        return self.ask("/login", "POST", urlencode(fields), **FORM, Origin=self.origin, Cookie=sent(form))

    def session(self) -> str:
        """The cookie of somebody who has logged in."""
        return sent(self.login())


def sent(reply: Reply) -> str:
    return "; ".join(f"{name}={cookie.value}" for name, cookie in reply.cookies.items())


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"prometheus:{password}".encode()).decode()


@pytest.fixture(scope="module")
def open_page() -> Iterator[Page]:
    page = Page(PageConfig())
    yield page
    page.close()


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    path = password_file(tmp_path_factory.mktemp("page") / "password")
    page = Page(PageConfig(password=path))
    yield page
    page.close()


@pytest.fixture
def page(locked: Page) -> Page:
    """The one with a password; what others guessed wrong is forgotten."""
    locked.clock.now_s += 61
    return locked


# --- names of this computer and other sites -----------------------------------------------------------------------


def test_an_account_without_a_name_is_known_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.setattr("getpass.getuser", nameless)
    assert name_of(Request({"type": "http"})) == f"uid {os.getuid()}"


def test_without_a_password_the_page_is_there_and_nobody_has_a_name(open_page: Page) -> None:
    assert open_page.began
    reply = open_page.ask("/", **HTML)
    assert (reply.status, reply.text) == (200, "/ for ''")
    assert open_page.ask("/login").status == 404
    with open_page.socket(open_page.origin) as socket:
        socket.send("hello")
        assert socket.recv() == "hello from ''"


@pytest.mark.parametrize("path", ["/", "/healthz", "/metrics", "/nowhere"])
def test_every_answer_has_the_headers(path: str, open_page: Page, page: Page) -> None:
    for each in (open_page, page):
        headers = each.ask(path).headers
        assert headers["X-Frame-Options"] == "DENY" and headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "same-origin"


@pytest.mark.parametrize("name", ["localhost", "LocalHost", "127.0.0.1", "[::1]", "127.0.0.2"])
def test_names_of_this_computer_are_answered_with_any_port(name: str, open_page: Page) -> None:
    for host in (name, f"{name}:9999"):
        assert open_page.ask("/", Host=host).status == 200
        assert open_page.ask("/act", "POST", "", Host=host, Origin=f"http://{host}").status == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8710", "localhost.evil.example", "192.168.1.7", "0.0.0.0", "", "[::]",
     "[fe80::1]:80", "localhost@evil", "127.0.0.1.nip.io", "localhost:80:evil"],
)  # fmt: skip
def test_a_name_that_was_rebound_is_refused(host: str, open_page: Page) -> None:
    reply = open_page.ask("/", Host=host)
    assert reply.status == 421 and "localhost" in reply.text
    assert open_page.ask("/healthz", Host=host).status == 421
    with pytest.raises(InvalidStatus, match="403"):
        websocket_to(open_page, host, f"http://{host}")


def websocket_to(page: Page, host: str, origin: str) -> None:
    """A handshake with a Host of its own; `websockets` writes the one it connects to."""
    key = base64.b64encode(os.urandom(16)).decode()
    headers = {"Host": host, "Origin": origin, "Connection": "Upgrade", "Upgrade": "websocket"}
    headers.update({"Sec-WebSocket-Key": key, "Sec-WebSocket-Version": "13"})
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=30)
    connection.request("GET", "/_nicegui_ws/", headers=headers)
    status = connection.getresponse().status
    connection.close()
    if status != 101:
        raise InvalidStatus(type("Response", (), {"status_code": status})())


def test_the_handshake_of_the_test_before_is_a_good_one(open_page: Page) -> None:
    websocket_to(open_page, "localhost:1", "http://localhost:1")


FOREIGN = [
    "http://evil.example",
    "null",
    "",
    "http://",
    "http://127.0.0.1",
    "http://127.0.0.1:{port}.evil.example",
    "http://127.0.0.1:{port}/",
    "http://evil@127.0.0.1:{port}",
    "ftp://127.0.0.1:{port}",
    "http://localhost:{port}",
    "127.0.0.1:{port}",
]


@pytest.mark.parametrize("origin", FOREIGN)
def test_other_sites_are_refused(origin: str, open_page: Page, page: Page) -> None:
    cookie = page.session()
    for each in (open_page, page):
        theirs, acted = origin.format(port=each.port), each.acted
        assert each.ask("/act", "POST", "x", Origin=theirs, Cookie=cookie).status == 403
        # What a script of theirs would read: NiceGUI's polling lets every origin read its answers.
        assert each.ask("/", Origin=theirs, Cookie=cookie).status == 403
        assert each.acted == acted
        with pytest.raises(InvalidStatus, match="403"):
            each.socket(theirs, Cookie=cookie)


def test_the_page_itself_and_programs_are_let_in(open_page: Page, page: Page) -> None:
    cookie = page.session()
    for each in (open_page, page):
        for origin in ({"Origin": each.origin}, {"Origin": each.origin.upper()}, {}):
            reply = each.ask("/act", "POST", "all of it", Cookie=cookie, **origin)
            assert (reply.status, reply.text) == (200, "all of it")
        for mine in (each.origin, None):
            with each.socket(mine, Cookie=cookie) as socket:
                socket.send("hello")
                assert socket.recv().startswith("hello from ")


def test_with_a_password_any_name_will_do(page: Page) -> None:
    assert page.ask("/healthz", Host="robot.lab").status == 200
    cookie = page.session().replace(f"-{page.port}=", "=")
    assert page.ask("/", Host="robot.lab", Cookie=cookie).status == 200
    assert page.ask("/act", "POST", Host="robot.lab", Origin="http://robot.lab", Cookie=cookie).status == 200
    assert page.ask("/act", "POST", Host="robot.lab", Origin=page.origin, Cookie=cookie).status == 403
    assert page.ask("/act", "POST", Host="", Origin="http://", Cookie=cookie).status == 403


# --- the login ----------------------------------------------------------------------------------------------------


def test_without_a_session_nothing_is_shown_but_healthz(page: Page) -> None:
    assert page.ask("/healthz").text == "/healthz for ''"
    for path in ("/", "/episodes", "/metrics", "/nowhere", "/healthz/", "//healthz", "/HEALTHZ", "/login/", "/act"):
        reply = page.ask(path)
        assert reply.status == 401 and "for" not in reply.text, path
    assert page.ask("/act", "POST", "", Origin=page.origin, **HTML).status == 401
    assert page.ask("/", Cookie=f"fieldtune-session-{page.port}=").status == 401
    assert page.ask("/", Cookie=f"fieldtune-session-{page.port}={'x' * 43}").status == 401
    with pytest.raises(InvalidStatus, match="403"):
        page.socket(page.origin)


@pytest.mark.parametrize("path", ["/", "/episodes?from=3&to=%C3%A9", "/episodes", "/a%20b%3Fc"])
def test_a_page_leads_to_the_login_and_back(path: str, page: Page) -> None:
    asked = page.ask(path, **HTML)
    assert asked.status == 303
    target = asked.headers["Location"]
    assert target == f"/login?next={quote(path, safe='')}"
    form = page.ask(target)
    assert form.status == 200 and form.headers["Cache-Control"] == "no-store"
    assert page.login(target=path).headers["Location"] == path


def test_after_the_login_the_page_knows_who_it_is(page: Page) -> None:
    reply = page.login(name="  Ada   Løvelace ")
    assert reply.status == 303 and reply.headers["Location"] == "/"
    (cookie,) = reply.cookies.values()
    assert cookie.key == f"fieldtune-session-{page.port}" and re.fullmatch(r"[\w-]{43}", cookie.value)
    assert cookie["httponly"] and cookie["samesite"].lower() == "strict" and cookie["path"] == "/"
    assert not cookie["secure"] and not cookie["domain"] and cookie["max-age"] == str(SESSION_S)
    assert page.ask("/episodes", Cookie=sent(reply)).text == "/episodes for 'Ada Løvelace'"
    with page.socket(page.origin, Cookie=sent(reply)) as socket:
        socket.send("hello")
        assert socket.recv() == "hello from 'Ada Løvelace'"
    assert sent(page.login()) != sent(reply)


@pytest.mark.parametrize("password", ["", "wrong", PASSWORD + " ", PASSWORD.upper(), "\0", "%ff"])
def test_a_wrong_password_opens_nothing(password: str, page: Page) -> None:
    reply = page.login(password)
    assert reply.status == 401 and "not the password" in reply.text and 'value="Ada"' in reply.text
    assert page.ask("/", Cookie=sent(reply)).status == 401


@pytest.mark.parametrize("name", ["", "   ", "a" * 65, "a\x00b", "\x1b[31m"])
def test_a_name_is_needed(name: str, page: Page) -> None:
    reply = page.login(name=name)
    assert reply.status == 400 and not any("session" in cookie for cookie in reply.cookies)


def test_wrong_passwords_are_slowed_for_all_and_only_for_a_minute(page: Page) -> None:
    cookie = page.session()
    for i in range(WRONG_PER_MINUTE):
        page.clock.now_s += 1
        guess = page.ask("/metrics", Authorization=basic(f"guess {i}")) if i % 2 else page.login(f"guess {i}")
        assert guess.status == 401
    assert page.login().status == 429  # the right one too: a guess must not learn that it is right
    assert page.ask("/metrics", Authorization=basic(PASSWORD)).status == 429
    assert page.ask("/", Cookie=cookie).status == 200  # whoever is in stays in
    page.clock.now_s += 52
    assert page.login("wrong").status == 401 and page.login("wrong").status == 401
    assert page.login().status == 429
    page.clock.now_s += 61
    for _ in range(3 * WRONG_PER_MINUTE):
        assert page.login().status == 303


@pytest.mark.parametrize("change", ["none", "another", "no cookie", "neither"])
def test_a_form_of_another_site_is_refused(change: str, page: Page) -> None:
    form = page.ask("/login")
    token = {"none": "", "another": "x" * 43}.get(change, sent(form).partition("=")[2])
    fields = {"name": "Ada", "password": PASSWORD, "token": "" if change == "neither" else token}
    cookie = {"Cookie": sent(form)} if change in ("none", "another") else {}
    reply = page.ask("/login", "POST", urlencode(fields), **FORM, **cookie)
    assert reply.status == 403 and "Try again" in reply.text
    assert not any("session" in name for name in reply.cookies)


@pytest.mark.parametrize(
    "target",
    ["//evil.example", "https://evil.example", "/\\evil.example", "\\\\evil.example", "/\t/evil.example", "evil", "",
     "/a\\b", "///evil.example", " //evil.example", "javascript:alert(1)", "/a\r\nSet-Cookie: x=y", '/"><script>'],
)  # fmt: skip
def test_the_login_leads_to_no_other_site(target: str, page: Page) -> None:
    assert "<script" not in page.ask(f"/login?next={quote(target, safe='')}").text
    reply = page.login(next=target)
    assert reply.status == 303 and "x" not in reply.cookies
    where = reply.headers["Location"]
    assert where == "/" or where == "/%22%3E%3Cscript%3E"


@given(st.text(st.sampled_from("/\\.:@evil\t\n \r?#%é") | st.characters(), max_size=12))
def test_a_target_is_never_read_as_an_address(target: str) -> None:
    # What the URL standard does before it reads: no tabs and newlines, no blanks around, \ is /.
    read = re.sub(r"[\t\r\n]", "", _same_site(target)).strip().replace("\\", "/")
    assert read.startswith("/") and not read.startswith("//")


def test_a_name_is_not_markup(page: Page) -> None:
    text = page.login("wrong", name='"><script>alert(1)</script>').text
    assert "<script" not in text and "&lt;script" in text


def test_a_login_that_is_too_long_is_not_read(page: Page) -> None:
    assert page.login("x" * 5000).status == 413
    assert page.ask("/login", "PUT", "no form", Origin=page.origin).status == 403


def test_a_session_ends_by_itself(page: Page) -> None:
    cookie = page.session()
    page.clock.now_s += SESSION_S - 1
    with page.socket(page.origin, Cookie=cookie) as socket:
        socket.send("hello")
        assert socket.recv() == "hello from 'Ada'"
        page.clock.now_s += 1
        assert page.ask("/", Cookie=cookie).status == 401
        socket.send("hello")
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=30)


def test_logout_ends_the_session_and_its_sockets(page: Page) -> None:
    cookie, other = page.session(), page.session()
    assert page.ask("/logout", Cookie=cookie).status == 404  # a link or a picture logs nobody out
    assert page.ask("/logout", "POST", Cookie=cookie, Origin="http://evil.example").status == 403
    with page.socket(page.origin, Cookie=cookie) as socket:
        reply = page.ask("/logout", "POST", Cookie=cookie, Origin=page.origin)
        assert reply.status == 303 and reply.headers["Location"] == "/login"
        socket.send("hello")
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=30)
    assert page.ask("/", Cookie=cookie).status == 401 and page.ask("/", Cookie=other).status == 200


def test_prometheus_gives_the_password_itself(page: Page) -> None:
    for _ in range(2):
        assert page.ask("/metrics", Authorization=basic(PASSWORD)).text == "/metrics for ''"
    wrong = page.ask("/metrics", Authorization=basic("wrong"))
    assert wrong.status == 401 and wrong.headers["WWW-Authenticate"].startswith("Basic ")
    assert page.ask("/metrics").headers["WWW-Authenticate"].startswith("Basic ")
    for header in ("Basic", "Basic !!!", "Basic YQ==", "Bearer " + basic(PASSWORD).split()[1], ""):
        assert page.ask("/metrics", Authorization=header).status == 401
    for path in ("/", "/episodes", "/metrics/x"):
        reply = page.ask(path, Authorization=basic(PASSWORD))
        assert reply.status == 401 and "WWW-Authenticate" not in reply.headers
    with pytest.raises(InvalidStatus, match="403"):
        page.socket(page.origin, Authorization=basic(PASSWORD))


def test_the_costly_hash_is_made_once_for_who_comes_every_few_seconds(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    matches = PasswordFile.matches
    monkeypatch.setattr(PasswordFile, "matches", lambda file, given: bool(made.append(given)) or matches(file, given))
    page.login()
    for _ in range(3):
        assert page.ask("/metrics", Authorization=basic(PASSWORD)).status == 200
    assert page.ask("/metrics", Authorization=basic("wrong")).status == 401
    assert made in (["wrong"], [PASSWORD, "wrong"])


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A certificate for loopback, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the program openssl, to make a certificate")
    home = tmp_path_factory.mktemp("tls")
    made = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=robot -keyout key.pem -out cert.pem"
    subprocess.run(["openssl", *made.split()], cwd=home, check=True, capture_output=True)
    return str(home / "cert.pem"), str(home / "key.pem")


def test_a_key_with_a_passphrase_is_refused_and_nobody_is_asked_for_it(
    certificate: tuple[str, str], tmp_path: Path
) -> None:
    locked = str(tmp_path / "locked.pem")
    made = f"pkey -in {certificate[1]} -aes256 -passout pass:secret -out {locked}"
    subprocess.run(["openssl", *made.split()], check=True, capture_output=True)
    code = (
        "from fieldtune.page.config import PageConfig, check_page_config;"
        f"check_page_config(PageConfig(certificate={certificate[0]!r}, key={locked!r}))"
    )
    # A session of its own has no terminal: OpenSSL asks on stdin then, as in a page that `fieldtune up` starts.
    done = subprocess.run(
        [sys.executable, "-c", code],
        input="\n",
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
        check=False,
    )
    assert "pass phrase" not in done.stdout + done.stderr
    assert "ConfigError: $.page.key: is locked with a passphrase" in done.stderr


def test_over_tls_the_cookies_stay_there(certificate: tuple[str, str], tmp_path: Path) -> None:
    config = PageConfig(password=password_file(tmp_path / "p"), certificate=certificate[0], key=certificate[1])
    check_page_config(config)
    page = Page(config)
    try:
        reply = page.login()
        assert reply.status == 303 and [cookie["secure"] for cookie in reply.cookies.values()] == [True]
        with page.socket(page.origin, Cookie=sent(reply)) as socket:
            socket.send("hello")
            assert socket.recv() == "hello from 'Ada'"
        # The same host without TLS is another site: anybody on the way can write its pages.
        assert page.ask("/", Cookie=sent(reply), Origin=f"http://{page.host}").status == 403
    finally:
        page.close()


# --- the settings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.1.2.3"])
def test_loopback_needs_no_password(host: str) -> None:
    check_page_config(PageConfig(host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "robot.lab", "", "2001:db8::1"])
def test_beyond_loopback_a_password_is_needed(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^\$\.page\.host: .*fieldtune page password FILE"):
        check_page_config(PageConfig(host=host))
    check_page_config(PageConfig(host=host, password=password_file(tmp_path / "password")))


def test_files_that_are_of_no_use_are_named(certificate: tuple[str, str], tmp_path: Path) -> None:
    chain, key = certificate
    nothing, other = str(tmp_path / "nothing"), tmp_path / "other"
    other.write_text("not PEM")
    for wrong, message in [
        ({"certificate": chain}, r"\$\.page\.key: .* key is missing"),
        ({"key": key}, r"\$\.page\.certificate: .* certificate is missing"),
        ({"certificate": nothing, "key": key}, r"\$\.page\.certificate: .*nothing is not there"),
        ({"certificate": chain, "key": nothing}, r"\$\.page\.key: .*nothing is not there"),
        ({"certificate": str(other), "key": key}, r"\$\.page\.certificate: cannot be used"),
        ({"certificate": chain, "key": chain}, r"\$\.page\.certificate: cannot be used"),
        ({"password": nothing}, r"\$\.page\.password: .*nothing is not there.*fieldtune page password"),
        ({"password": str(other)}, r"\$\.page\.password: .*other is not a password file"),
        ({"password": str(tmp_path)}, r"\$\.page\.password: .* cannot be read: Is a directory"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_page_config(PageConfig(**wrong))


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['starlette'] = None; from fieldtune import cli;"
        "cli.COMMANDS['keys'] = ('fieldtune.page.access:Access', ''); sys.exit(cli.run(['keys']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "pip install 'fieldtune[dashboard]'" in done.stderr
