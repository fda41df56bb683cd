"""What a deployment is told: settings from YAML, secrets from systemd credentials, and its identity.

A value comes from the first of: arguments, the file named by ATLAS_SETTINGS, the credentials directory. Credentials
are files `atlas_NAME` in ATLAS_CREDENTIALS_DIRECTORY (tests, development) or CREDENTIALS_DIRECTORY (systemd).
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    IPvAnyNetwork,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

CREDENTIALS = ("fernet_keys", "database_login", "database_password", "tokens")


class SettingsError(Exception):
    """The settings cannot be used. `findings` holds one `key: message` for each thing that is wrong."""

    def __init__(self, findings: list[str], source: str = "settings.yaml") -> None:
        super().__init__("\n".join(f"{source}: {finding}" for finding in findings))
        self.findings = findings
        self.source = source


class TokenLimits(BaseModel):
    """Requests that one token may make."""

    model_config = ConfigDict(extra="forbid")
    per_minute: int = Field(default=60, ge=1)
    per_hour: int = Field(default=1000, ge=1)


class TokenSpec(BaseModel):
    """One entry of the credential `tokens`: the hash of a token and what it may do."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(min_length=1, max_length=100)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    scopes: list[Literal["ingest", "read", "operate"]]
    limits: TokenLimits | None = Field(
        default_factory=TokenLimits, description="null: none; what is left out is the setting token_requests_per_..."
    )
    expires_at: int | None = Field(
        default=None, description="Unix time in milliseconds after which the token is refused"
    )


class Retry(BaseModel):
    """How often a class of error is attempted in all, and the base of its back-off; null is the general setting."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    attempts: int | None = Field(default=None, ge=1)
    base_seconds: float | None = Field(default=None, gt=0)


# Every class of error that a job can fail with.
RETRIES: Mapping[str, Retry] = {
    "timeout": Retry(attempts=3, base_seconds=60),
    "rate_limited": Retry(attempts=5, base_seconds=300),
    "server_error": Retry(attempts=2, base_seconds=120),
    **dict.fromkeys(("dns", "network", "internal"), Retry()),
    **dict.fromkeys(
        ("not_found", "client_error", "parse_error", "too_large", "unsupported", "refused"), Retry(attempts=1)
    ),
}


class Settings(BaseSettings):
    """All settings, with their units in their names."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    environment: Literal["development", "staging", "production"]
    host: str = Field(default_factory=socket.gethostname, min_length=1)
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    database_url: str
    database_role: str | None = Field(default=None, pattern="^[a-z_][a-z0-9_]*$")

    api_bind_address: str = "127.0.0.1"
    api_workers: int = Field(default=1, ge=1, le=64)
    api_threads: int = Field(default=8, ge=1, le=256)
    content_limit_bytes: int = Field(default=1_000_000, ge=1)
    batch_limit: int = Field(default=1000, ge=1, le=10_000)
    queue_limit: int = Field(default=10_000, ge=1)
    token_requests_per_minute: int = Field(default=60, ge=1)
    token_requests_per_hour: int = Field(default=1000, ge=1)

    core_concurrency: int = Field(default=4, ge=1, le=256)
    core_batch: int = Field(default=8, ge=1, le=1000)
    lease_seconds: float = Field(default=60, gt=0)
    heartbeat_seconds: float = Field(default=20, gt=0)
    reaper_seconds: float = Field(default=10, gt=0)
    job_timeout_seconds: float = Field(default=300, gt=0)
    job_attempts: int = Field(default=5, ge=1)
    retry_base_seconds: float = Field(default=1, gt=0)
    retry_cap_seconds: float = Field(default=300, gt=0)
    retries: dict[str, Retry] = dict(RETRIES)
    host_concurrency: int = Field(default=4, ge=1)
    host_interval_seconds: float = Field(default=0, ge=0)
    breaker_failures: int = Field(default=10, ge=1)
    breaker_open_seconds: float = Field(default=300, gt=0)
    breaker_successes: int = Field(default=5, ge=1)

    fetch_timeout_seconds: float = Field(default=60, gt=0)
    fetch_limit_bytes: int = Field(default=10_000_000, ge=1)
    fetch_redirect_limit: int = Field(default=5, ge=0, le=20)
    fetch_allow_networks: list[IPvAnyNetwork] = []
    user_agent: str = Field(default="Atlas/0.1 (content ingestion)", min_length=1)
    extract_timeout_seconds: float = Field(default=30, gt=0)
    extract_memory_bytes: int = Field(default=512 * 1024 * 1024, ge=64 * 1024 * 1024)

    feed_interval_seconds: int = Field(default=3600, ge=1)
    feed_interval_min_seconds: int = Field(default=300, ge=1)

    job_retention_days: float = Field(default=30, gt=0)
    dead_letter_retention_hours: float = Field(default=168, gt=0)
    idempotency_retention_hours: float = Field(default=24, gt=0)
    audit_retention_days: int = Field(default=365, ge=1)
    queue_sample_retention_days: float = Field(default=7, gt=0)

    # The file in which the backup host reports; null where nobody makes backups.
    backup_status_path: str | None = None

    fernet_keys: SecretStr = SecretStr("")
    # Whose the password is, where it is not that of the user in database_url: the two are rotated together.
    database_login: str | None = Field(default=None, pattern="^[a-z_][a-z0-9_]*$")
    database_password: SecretStr | None = None
    tokens: list[TokenSpec] = []

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (
            init_settings,
            InitSettingsSource(settings_cls, _read_file()),
            InitSettingsSource(settings_cls, _read_credentials()),
        )

    @field_validator("database_url")
    @classmethod
    def _check_url(cls, value: str) -> str:
        try:
            url = make_url(value)
        except ArgumentError:
            raise ValueError("is not a database URL") from None
        if url.drivername == "sqlite":
            if not (url.database or "").startswith("/"):
                raise ValueError("needs an absolute path: sqlite:////var/lib/atlas/atlas.db")
        elif url.drivername != "postgresql+psycopg":
            raise ValueError("must begin with sqlite:/// or postgresql+psycopg://")
        if url.password is not None:
            raise ValueError("holds a password; move it to the credential database_password")
        return value

    @field_validator("retries")
    @classmethod
    def _complete(cls, value: dict[str, Retry]) -> dict[str, Retry]:
        if unknown := sorted(set(value) - set(RETRIES)):
            raise ValueError(f"{', '.join(unknown)}: no such class of error; there are {', '.join(RETRIES)}")
        return {**RETRIES, **value}

    @model_validator(mode="after")
    def _limit_tokens(self) -> Self:
        usual = {"per_minute": self.token_requests_per_minute, "per_hour": self.token_requests_per_hour}
        for token in self.tokens:
            if token.limits is not None:
                token.limits = TokenLimits(**usual | token.limits.model_dump(exclude_unset=True))
        return self

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        problems = []
        if self.database_url.startswith("sqlite"):
            if self.api_workers != 1:
                problems.append("api_workers: must be 1 on SQLite, where two API processes starve each other")
            if self.database_role is not None:
                problems.append("database_role: must be null on SQLite, which has no roles")
        if self.heartbeat_seconds * 2 > self.lease_seconds:
            problems.append("heartbeat_seconds: must be at most half of lease_seconds, or one missed beat loses a job")
        if self.feed_interval_seconds < self.feed_interval_min_seconds:
            problems.append("feed_interval_seconds: must be at least feed_interval_min_seconds")
        if problems:
            raise ValueError("\n".join(problems))
        return self


def load_settings(**overrides: Any) -> Settings:
    """The settings of this deployment. Raises SettingsError with every finding."""
    source = os.path.basename(os.environ.get("ATLAS_SETTINGS", "settings.yaml"))
    if "ATLAS_SETTINGS" not in os.environ and not overrides:
        raise SettingsError(["ATLAS_SETTINGS: is not set; it names the settings file of the deployment"], "environment")
    try:
        return Settings(**overrides)
    except ValidationError as error:
        findings = []
        for item in error.errors(include_url=False, include_input=False):
            key = ".".join(map(str, item["loc"]))
            message = {"extra_forbidden": "is not a setting", "missing": "is missing"}.get(item["type"], item["msg"])
            message = message.removeprefix("Value error, ")
            findings += [f"{key}: {message}"] if key else message.splitlines()
        raise SettingsError(findings, source) from None


def _read_file() -> dict[str, Any]:
    path = os.environ.get("ATLAS_SETTINGS")
    if path is None:
        return {}
    source = os.path.basename(path)
    try:
        content = yaml.safe_load(Path(path).read_text("utf-8"))
    except OSError as error:
        raise SettingsError([f"{path}: cannot be read: {error.strerror}"], source) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark else path
        raise SettingsError([f"{where}: is not valid YAML"], source) from None
    if not isinstance(content, dict):
        raise SettingsError([f"{path}: must hold settings as `key: value`"], source)
    secrets = sorted(set(content) & set(CREDENTIALS))
    if secrets:
        raise SettingsError([f"{key}: is a secret and belongs in the credentials, not in this file" for key in secrets])
    return {str(key): value for key, value in content.items()}


def credentials_directory() -> Path | None:
    """Where this process finds its credentials, or None if it was given none."""
    path = os.environ.get("ATLAS_CREDENTIALS_DIRECTORY") or os.environ.get("CREDENTIALS_DIRECTORY")
    return Path(path) if path else None


def _read_credentials() -> dict[str, Any]:
    directory = credentials_directory()
    found: dict[str, Any] = {}
    for name in CREDENTIALS if directory else ():
        path = Path(directory or "", f"atlas_{name}")
        try:
            value = path.read_text("utf-8").strip()
            found[name] = json.loads(value) if name == "tokens" else value
        except FileNotFoundError:
            continue
        except OSError as error:
            raise SettingsError([f"{name}: cannot be read: {error.strerror}"], "credentials") from None
        except ValueError:
            raise SettingsError(
                [f"{name}: is not valid {'JSON' if name == 'tokens' else 'text'}"], "credentials"
            ) from None
    return found


@dataclass(frozen=True)
class Identity:
    """Which deployment this process belongs to. 0 and "dev" mean: started by hand, not deployed."""

    deployment: int
    release: str
    slot: str
    host: str


def load_identity(settings: Settings) -> Identity:
    """The identity in the file that ATLAS_DEPLOYMENT names. Raises SettingsError if it cannot be read."""
    slot = os.environ.get("ATLAS_SLOT", "blue")
    if not re.fullmatch("[a-z]+", slot):
        raise SettingsError([f"ATLAS_SLOT: {slot!r} is not the name of a slot"], "environment")
    path = os.environ.get("ATLAS_DEPLOYMENT")
    if path is None:
        return Identity(0, "dev", slot, settings.host)
    try:
        content = json.loads(Path(path).read_text("utf-8"))
        return Identity(int(content["id"]), str(content["release"]), slot, settings.host)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError([f"{path}: is not a readable deployment: {error}"], "deployment.json") from None
