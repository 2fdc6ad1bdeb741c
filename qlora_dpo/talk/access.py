"""Who may ask the server: pages of its own origin, under a name of this machine, with the key if there is one."""

import hmac
import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")

SECURITY_HEADERS = {
    # Nothing of another origin, nothing inline: text that a model wrote cannot become part of the page
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
"""On every answer. A page in a frame of another site could be clicked on by somebody who does not see it."""


@dataclass(frozen=True)
class AccessPolicy:
    """Whom the server answers; `key` is None where it listens to this machine alone and none was set."""

    host: str
    key: str | None

    def refusal(self, path: str, header: Callable[[str], str | None]) -> tuple[int, str, str] | None:
        """Status, sentence and code for a request that is not answered, else None."""
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
        """True for a name that only this machine has: a page whose own name was made to point here has another one.

        Beyond loopback the machine's names are not known, and the key, which such a page has not, is what protects.
        """
        return not is_loopback(self.host) or re.sub(r":\d{1,5}$", "", host) in (*LOOPBACK_NAMES, self.host)

    def _is_key(self, authorization: str) -> bool:
        given = authorization.removeprefix("Bearer ").encode("utf-8", "replace")
        return hmac.compare_digest(given, (self.key or "").encode())


def is_loopback(host: str) -> bool:
    """True if only this machine reaches what listens on `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
