"""Which requests the server answers: of its own origin, under a name of this machine, and with the API key if set."""

import hmac
import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")

SECURITY_HEADERS = {
    # Nothing from another origin and nothing inline, so that generated text cannot become part of the page
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
"""Sent with every response; frame-ancestors protects against clickjacking."""


@dataclass(frozen=True)
class AccessPolicy:
    """The rules for requests; `key` may be None only if the server listens on loopback."""

    host: str
    key: str | None

    def refusal(self, path: str, header: Callable[[str], str | None]) -> tuple[int, str, str] | None:
        """HTTP status, sentence and error code if the request is refused, else None."""
        host = (header("host") or "").lower()
        if not self._is_own_name(host):
            return 403, "this name is not the server's; ask it as 127.0.0.1 or localhost", "host_refused"
        origin = header("origin")
        if origin is not None and re.sub(r"^https?://", "", origin.lower()) != host:
            return 403, "pages of other origins are not answered", "origin_refused"
        if self.key is not None and path.startswith("/v1/") and not self._is_key(header("authorization") or ""):
            return 401, "the API key is missing or wrong; send it as Authorization: Bearer KEY", "invalid_api_key"
        return None

    def _is_own_name(self, host: str) -> bool:
        """True for a loopback name; this stops DNS rebinding, where a page's own host name resolves to this machine.

        Beyond loopback the machine's names are unknown, and the API key, which such a page lacks, protects instead.
        """
        return not is_loopback(self.host) or re.sub(r":\d{1,5}$", "", host) in (*LOOPBACK_NAMES, self.host)

    def _is_key(self, authorization: str) -> bool:
        key = authorization.removeprefix("Bearer ").encode("utf-8", "replace")
        return hmac.compare_digest(key, (self.key or "").encode())


def is_loopback(host: str) -> bool:
    """True if only this machine can reach a server on `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
