"""Being signed in to the status page: a cookie that names a session, which is worth what its token is worth now.

The cookie is signed with keys derived from the keyring, so every process of every slot knows it, and it dies with the
key that signed it. It holds a random name; the store is asked for the session and its token at each request.
"""

from __future__ import annotations

import hashlib
import secrets

from flask import Response, request
from itsdangerous import BadData, Signer, URLSafeTimedSerializer
from sqlalchemy import Connection, delete, insert, select

from atlas.crypto import Keyring
from atlas.schema import sessions
from atlas.tokens import Token, Tokens

COOKIE = "atlas_session"
SESSION_SECONDS = 8 * 3600


class Sessions:
    """The sessions of all browsers, which the store keeps."""

    def __init__(self, keyring: Keyring, tokens: Tokens) -> None:
        # itsdangerous signs with the last key and accepts any.
        keys = keyring.derive("session")[::-1]
        self._cookies = URLSafeTimedSerializer(keys, salt="cookie", signer_kwargs={"digest_method": hashlib.sha256})
        self._forms = Signer(keys, salt="form", digest_method=hashlib.sha256)
        self._tokens = tokens

    def begin(self, connection: Connection, token: Token) -> str:
        """A new session of this token, in the caller's transaction: its name. Those that are over are forgotten."""
        now = self._tokens.database.now(connection)
        name = secrets.token_urlsafe(24)
        connection.execute(delete(sessions).where(sessions.c.until < now))
        connection.execute(insert(sessions).values(id=name, token=token.sha256, until=now + SESSION_SECONDS * 1000))
        return name

    def give(self, response: Response, name: str) -> None:
        """Give the browser this session."""
        response.set_cookie(
            COOKIE,
            self._cookies.dumps(name),
            max_age=SESSION_SECONDS,
            httponly=True,
            samesite="Strict",
            secure=request.headers.get("X-Forwarded-Proto", request.scheme) == "https",
        )

    def end(self, connection: Connection) -> None:
        """End the session of the request, in the caller's transaction: its cookie is worth nothing from then on."""
        connection.execute(delete(sessions).where(sessions.c.id == self._name()))

    def take(self, response: Response) -> None:
        """Take the cookie from the browser."""
        response.delete_cookie(COOKIE, httponly=True, samesite="Strict")

    def token(self) -> Token | None:
        """Whose session the request belongs to; None without one, or if its time or its token's is over."""
        name = self._name()
        if name is None:
            return None
        database = self._tokens.database
        with database.read() as connection:
            known = select(sessions.c.token).where(sessions.c.id == name, sessions.c.until > database.now(connection))
            digest = connection.scalar(known)
        return None if digest is None else self._tokens.find(digest)

    def _name(self) -> str | None:
        try:
            return str(self._cookies.loads(request.cookies.get(COOKIE, ""), max_age=SESSION_SECONDS))
        except BadData:
            return None

    def form_key(self) -> str:
        """What a form of this session must bring back."""
        return self._forms.get_signature(request.cookies.get(COOKIE, "")).decode()

    def is_own_form(self) -> bool:
        """Whether the request is a form of this session, and no other site's."""
        return self._forms.verify_signature(request.cookies.get(COOKIE, ""), request.form.get("key", ""))
