"""Settings of the operator's page: where it listens and who may see it."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct


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
