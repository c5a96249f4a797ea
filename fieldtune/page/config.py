"""Settings of the operator's page: where it listens and who may see it."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from bridge.config import ConfigError
from bridge.endpoint import is_local
from fieldtune.page.password import PasswordFile


class PageConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The operator's page (docs/page.md)."""

    serve: bool = True
    """`fieldtune up` serves it, where the extra `dashboard` is installed."""
    host: str = "127.0.0.1"
    """Address that it listens on. Any that is not loopback needs `password`."""
    port: Annotated[int, Meta(ge=1, le=65535)] = 8710
    """On loopback the next free one of ten is taken."""
    password: str | None = None
    """File made by `fieldtune page password FILE`; whoever opens the page is asked for the password."""
    certificate: str | None = None
    """File of a TLS certificate chain, PEM; with `key`. Without them a password crosses the network readable."""
    key: str | None = None
    """File of the certificate's private key, PEM."""


def check_page_config(config: PageConfig) -> None:
    """Raise `ConfigError` for a page that others could see without a password, and for files that are of no use."""
    if config.password is not None:
        PasswordFile.read(Path(config.password))
    elif not is_local(f"tcp://{config.host}:{config.port}"):
        raise ConfigError(
            f"$.page.host: {config.host} can be reached from other computers, so the page needs a password; make one "
            "with `fieldtune page password FILE` and set page.password"
        )
    if (config.certificate is None) != (config.key is None):
        missing = "key" if config.key is None else "certificate"
        raise ConfigError(f"$.page.{missing}: certificate and key belong together; {missing} is missing")
    if config.certificate is not None and config.key is not None:
        for name, path in (("certificate", config.certificate), ("key", config.key)):
            if not Path(path).is_file():
                raise ConfigError(f"$.page.{name}: {path} is not there")
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.certificate, config.key, _no_passphrase)
        except OSError as error:
            raise ConfigError(f"$.page.certificate: cannot be used with the key ({error})") from error


def _no_passphrase() -> str:
    # OpenSSL would ask for it, of whoever has the terminal or not, now and again when the page is started.
    raise ConfigError(
        "$.page.key: is locked with a passphrase, and nobody is there to type it; expected a key without one "
        "(openssl pkey -in KEY -out NEW)"
    )
