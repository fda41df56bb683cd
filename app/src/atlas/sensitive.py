"""Sensitive fields of documents and feeds: what is shown to their source alone, and private notes.

They are stored encrypted (`crypto`), never shown, and sent to no host but the one they were given for (`fetch`).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

# RFC 9110, 5.6.2 and 5.5 without obs-text; RFC 6265, 4.1.1.
Name = Annotated[str, StringConstraints(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}$")]
HeaderValue = Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]([\x20-\x7e\t]*[\x21-\x7e])?$", max_length=8192)]
CookieValue = Annotated[str, StringConstraints(pattern=r"^[\x21\x23-\x2b\x2d-\x3a\x3c-\x5b\x5d-\x7e]{0,4096}$")]
Words = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=1000)]
# These frame a message or are ours to say.
_RESERVED = re.compile(
    "accept-encoding|connection|content-.*|cookie|expect|host|keep-alive|proxy-.*|te|trailer|transfer-encoding|upgrade"
    "|user-agent"
)


class Sensitive(BaseModel):
    """As a client sends it. `username` and `password` become HTTP Basic authentication."""

    model_config = ConfigDict(extra="forbid", strict=True)

    headers: Annotated[dict[Name, HeaderValue], Field(max_length=50)] = {}
    cookies: Annotated[dict[Name, CookieValue], Field(max_length=50)] = {}
    username: Words | None = None
    password: Words | None = None
    notes: Annotated[str, Field(max_length=10_000)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [name.lower() for name in self.headers]
        reserved = sorted(filter(_RESERVED.fullmatch, names))
        if reserved:
            raise ValueError(f"headers: {', '.join(reserved)} cannot be set; for cookies there is the field cookies")
        if len(set(names)) < len(names):
            raise ValueError("headers: a name is given twice")
        if self.username is not None and (":" in self.username or "authorization" in names):
            raise ValueError("username: holds a colon, or stands beside a header Authorization")
        if self.password is not None and self.username is None:
            raise ValueError("password: needs a username")
        return self

    def given(self) -> dict[str, Any]:
        """What was given, as it is stored."""
        return self.model_dump(exclude_defaults=True)


def request_headers(sensitive: Mapping[str, Any]) -> dict[str, str]:
    """The request headers that stored sensitive fields ask for."""
    headers = dict(sensitive.get("headers", {}))
    if cookies := sensitive.get("cookies"):
        headers["Cookie"] = "; ".join(f"{name}={value}" for name, value in cookies.items())
    if sensitive.get("username") is not None:
        pair = f"{sensitive['username']}:{sensitive.get('password') or ''}"
        headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
    return headers
