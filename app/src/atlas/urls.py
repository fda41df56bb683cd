"""URLs of documents: which are accepted, and the one form that each is known by."""

from __future__ import annotations

import re
from urllib.parse import quote, urlsplit, urlunsplit

URL_LIMIT = 4096
HOST_LIMIT = 253  # of a name in the DNS; jobs and breakers are indexed by it


def normalise_url(url: str) -> str:
    """The one form of an http(s) URL: lower-case host, no default port, no fragment (RFC 3986, section 6.2).

    Raises ValueError for anything that could not be fetched.
    """
    if not url or len(url) > URL_LIMIT or re.search(r"[\x00-\x20\x7f\\]", url):
        raise ValueError(f"must be 1 to {URL_LIMIT} characters without spaces, backslashes or controls")
    try:
        parts = urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").encode("idna").decode().lower()
    except ValueError:
        raise ValueError("is not a URL") from None
    scheme = parts.scheme.lower()
    if scheme not in ("http", "https"):
        raise ValueError("must begin with http:// or https://")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must hold no user name or password; send them as credentials")
    if not 0 < len(host) <= HOST_LIMIT:
        raise ValueError(f"must have a host of at most {HOST_LIMIT} characters")
    netloc = f"[{host}]" if ":" in host else host
    if port is not None and port != {"http": 80, "https": 443}[scheme]:
        netloc += f":{port}"
    path, query = (quote(part, "/%:@!$&'()*+,;=-._~?", errors="surrogatepass") for part in (parts.path, parts.query))
    return urlunsplit((scheme, netloc, path or "/", query, ""))


def host_of(url: str | None) -> str | None:
    """The host[:port] of a normalised URL."""
    return None if url is None else urlsplit(url).netloc
