"""Being signed in to the status page: a cookie that names a token, and is worth what that token is worth now.

The cookie is signed with keys derived from the keyring, so every process of every slot knows it, and it dies with the
key that signed it. It holds the token's hash, never the token, and the store is asked for the token at each request.
"""

from __future__ import annotations

import hashlib

from flask import Response, request
from itsdangerous import BadData, Signer, URLSafeTimedSerializer

from atlas.crypto import Keyring
from atlas.tokens import Token, Tokens

COOKIE = "atlas_session"
SESSION_SECONDS = 8 * 3600


class Sessions:
    """The sessions of all browsers. Nothing of them is kept here."""

    def __init__(self, keyring: Keyring, tokens: Tokens) -> None:
        # itsdangerous signs with the last key and accepts any.
        keys = keyring.derive("session")[::-1]
        self._cookies = URLSafeTimedSerializer(keys, salt="cookie", signer_kwargs={"digest_method": hashlib.sha256})
        self._forms = Signer(keys, salt="form", digest_method=hashlib.sha256)
        self._tokens = tokens

    def begin(self, response: Response, token: Token) -> None:
        """Give the browser a session of this token."""
        response.set_cookie(
            COOKIE,
            self._cookies.dumps(token.sha256),
            max_age=SESSION_SECONDS,
            httponly=True,
            samesite="Strict",
            secure=request.headers.get("X-Forwarded-Proto", request.scheme) == "https",
        )

    def end(self, response: Response) -> None:
        response.delete_cookie(COOKIE, httponly=True, samesite="Strict")

    def token(self) -> Token | None:
        """Whose session the request belongs to; None without one, or if its time or its token's is over."""
        try:
            digest = self._cookies.loads(request.cookies.get(COOKIE, ""), max_age=SESSION_SECONDS)
        except BadData:
            return None
        return self._tokens.find(str(digest))

    def form_key(self) -> str:
        """What a form of this session must bring back."""
        return self._forms.get_signature(request.cookies.get(COOKIE, "")).decode()

    def is_own_form(self) -> bool:
        """Whether the request is a form of this session, and no other site's."""
        return self._forms.verify_signature(request.cookies.get(COOKIE, ""), request.form.get("key", ""))
