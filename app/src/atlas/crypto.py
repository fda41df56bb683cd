"""The keyring that encrypts sensitive fields (MultiFernet; the newest key comes first)."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import SecretStr


class KeyringError(Exception):
    """The keyring cannot be used, or a value cannot be read with it."""


class Keyring:
    """Encrypts with the first key and decrypts with any.

    `keys` are Fernet keys (32 random bytes in URL-safe base64), newest first. KeyringError is raised if there are
    none or if one is malformed; the message gives its position, never its value.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        listed = [key.strip() for key in keys if key.strip()]
        if not listed:
            raise KeyringError("fernet_keys: there is no key; the credential atlas_fernet_keys is missing or empty")
        fernets = []
        for position, key in enumerate(listed, start=1):
            try:
                fernets.append(Fernet(key))
            except ValueError:
                raise KeyringError(
                    f"fernet_keys: key {position} is not a Fernet key (32 bytes in URL-safe base64)"
                ) from None
        self._keys = [base64.urlsafe_b64decode(key) for key in listed]
        self._all = MultiFernet(fernets)
        # A truncated hash of 256 random bits names a key and says nothing about it.
        self.fingerprints = [hashlib.sha256(b"atlas-key:" + key.encode()).hexdigest()[:12] for key in listed]

    @classmethod
    def from_secret(cls, secret: SecretStr) -> Keyring:
        """The keyring in the credential `fernet_keys`: one key per line."""
        return cls(secret.get_secret_value().splitlines())

    def derive(self, purpose: str) -> list[bytes]:
        """A key of 32 bytes for another purpose from each key (HKDF, RFC 5869), newest first."""
        return [HKDF(SHA256(), 32, None, f"atlas {purpose}".encode()).derive(key) for key in self._keys]

    def encrypt(self, text: str) -> str:
        return self._all.encrypt(text.encode()).decode()

    def decrypt(self, ciphertext: str) -> str:
        """The plaintext. Raises KeyringError if no key fits or the value was altered."""
        try:
            return self._all.decrypt(ciphertext.encode()).decode()
        except InvalidToken:
            raise KeyringError("a sensitive field was encrypted with a key that is not in the keyring") from None
