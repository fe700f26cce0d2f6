"""Who may ask the server: clients with its token, by its own name, and pages that are allowed."""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from email.message import Message

from d2c_mlx.serve.requests import RequestError

__all__ = ["LOOPBACK", "Access"]

# Names by which this machine's own clients ask.
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Access:
    """Rules for the clients that may use a server.

    Attributes:
        token: that requests bring as `Authorization: Bearer`; None asks for none.
        origins: web pages that may ask, as browsers name them; "*" is all, others are refused.
        hosts: names by which clients may ask, without ports; "*" is any address in digits.
    """

    token: str | None = None
    origins: Sequence[str] = ()
    hosts: Sequence[str] = LOOPBACK

    def check(self, headers: Message, is_preflight: bool = False) -> None:
        """Check that a request with these headers may ask; browsers bring no token in a preflight.

        Raises:
            RequestError: (400, 401, 403 or 421) it may not.
        """
        self._check_host(headers)
        self._check_origin(headers)
        if not is_preflight:
            self._check_token(headers)

    def _check_host(self, headers: Message) -> None:
        """A page whose name was led here is no other origin to its browser: it could read all."""
        given = headers.get_all("Host", [])
        if len(given) > 1:
            raise RequestError(400, f"Host: found {len(given)}, expected one")
        if not given:
            return
        name = re.sub(r":[0-9]*$", "", given[0].strip().lower()).removesuffix(".").strip("[]")
        if name in self.hosts or ("*" in self.hosts and _is_address(name)):
            return
        raise RequestError(
            421,
            f"Host: found {given[0][:80]!r}, which is no name of this server; start it with"
            " --allowed-host to add one",
        )

    def _check_origin(self, headers: Message) -> None:
        """A page that the user happens to visit must not use the model."""
        origin = headers.get("Origin")
        if origin is not None and origin not in self.origins and "*" not in self.origins:
            raise RequestError(
                403, f"Origin {origin}: not allowed; start with --allow-origin {origin}"
            )

    def _check_token(self, headers: Message) -> None:
        # The bytes that were sent.
        given = headers.get("Authorization", "").encode("latin-1")
        # RFC 9110: the name of a scheme is case-insensitive.
        if given[:7].lower() == b"bearer ":
            given = given[7:]
        if self.token is not None and not hmac.compare_digest(given, self.token.encode()):
            raise RequestError(401, "Authorization: expected Bearer and this server's token")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
