"""Removes secrets from files, messages and logged configurations.

    redact("https://me:hf_x@host/a.mp3?token=abc&part=2")  ->  "https://[redacted]@host/a.mp3?token=[redacted]&part=2"

The following are treated as secrets: the values of environment variables with names such as `WANDB_API_KEY`, the credentials in
URLs, and tokens in known formats.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

Value = TypeVar("Value")

REDACTED = "[redacted]"
MIN_SECRET_LENGTH = 8  # shorter values also occur in ordinary words
SECRET_WORDS = {
    "KEY", "KEYS", "APIKEY", "TOKEN", "TOKENS", "SECRET", "SECRETS", "PASSWORD", "PASSWD", "PWD", "PASSPHRASE",
    "CREDENTIAL", "CREDENTIALS", "SIG", "SIGNATURE", "AUTH", "JWT", "BEARER",
}  # fmt: skip
SECRET_ENDINGS = ("TOKEN", "SECRET", "PASSWORD", "APIKEY", "ACCESSKEY", "ACCESSKEYID", "SIGNATURE")
LOCATION_WORDS = {
    "PATH",
    "FILE",
    "DIR",
    "SOCK",
    "URL",
    "HOST",
}  # such variables contain the location of a secret, not the secret

_SCHEME = r"\b[a-zA-Z][a-zA-Z0-9+.-]+:/{1,2}"  # pathlib reduces two slashes to one
_USER_INFO = re.compile(rf"({_SCHEME})([^\s/?#'\"<>]+)@")
_PARAMETERS = re.compile(rf"{_SCHEME}[^\s?#'\"<>]*[?#][^\s'\"<>]*")
_PARAMETER = re.compile(r"([?&;#])([^=&;#?]+)=([^&;#]+)")
_TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{40,}|A[SK]IA[0-9A-Z]{16}|wandb_v\d_\w{30,})\b"
    r"|(?<=Bearer )[A-Za-z0-9._~+/=-]{16,}"
)


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Returns a string with each secret replaced by `[redacted]`.

    Args:
        text: String that may contain secrets.
        environment: Environment variables. Defaults to the variables of this process.

    >>> redact("took https://me:pass@host/a.mp3?X-Amz-Signature=0f3a&part=2", {})
    'took https://[redacted]@host/a.mp3?X-Amz-Signature=[redacted]&part=2'
    >>> redact("key_of_c.mp3 at hunter2hunter2", {"SONG_TOKEN": "hunter2hunter2"})
    'key_of_c.mp3 at [redacted]'
    """
    return _clean(text, _secrets(environment))


def redact_tree(value: Value, environment: Mapping[str, str] | None = None) -> Value:
    """Returns a copy of nested mappings, lists and tuples, with the secrets in all strings, paths and keys redacted."""
    cleaned: Value = _clean_tree(value, _secrets(environment))
    return cleaned


def redactor(environment: Mapping[str, str] | None = None) -> Callable[[str], str]:
    """Returns a function that is equivalent to `redact` but faster for many strings, because the environment is read only once."""
    secrets = _secrets(environment)
    return lambda text: _clean(text, secrets)


def redact_rows(rows: Iterable[Sequence[Any]], environment: Mapping[str, str] | None = None) -> Iterator[list[Any]]:
    """Yields the rows of a table, with the secrets in all strings redacted."""
    secrets = _secrets(environment)
    for row in rows:
        yield [_clean(cell, secrets) if isinstance(cell, str) else cell for cell in row]


def secret_values(environment: Mapping[str, str]) -> list[str]:
    """Returns the values of all environment variables that contain a secret, in order of decreasing length."""
    values = {
        value.strip()
        for name, value in environment.items()
        if is_secret_name(name) and not LOCATION_WORDS & set(_words(name)) and not _is_existing_path(value)
    }
    return sorted(
        (value for value in values if len(value) >= MIN_SECRET_LENGTH), key=lambda value: (-len(value), value)
    )


def is_secret_name(name: str) -> bool:
    """Returns whether a name suggests that an environment variable or URL parameter contains a secret.

    >>> [is_secret_name(name) for name in ("WANDB_API_KEY", "X-Amz-Security-Token", "accessToken", "KEYBOARD", "TOKENIZERS")]
    [True, True, True, False, False]
    """
    words = _words(name)
    return bool(SECRET_WORDS & set(words)) or "".join(words).endswith(SECRET_ENDINGS)


def _words(name: str) -> list[str]:
    return re.split(r"[^A-Z0-9]+", name.upper())


def _is_existing_path(value: str) -> bool:
    """Returns whether a value is an existing absolute path."""
    return value.startswith("/") and "\0" not in value and Path(value).exists()


def _secrets(environment: Mapping[str, str] | None) -> re.Pattern[str] | None:
    """Returns a pattern that matches each secret and its JSON, YAML and URL encodings, or None if there are no secrets."""
    written: dict[str, None] = {}
    for value in secret_values(os.environ if environment is None else environment):
        for form in (value, json.dumps(value)[1:-1], value.replace("'", "''"), quote(value, safe="")):
            written.setdefault(re.escape(form))
    return re.compile("|".join(sorted(written, key=len, reverse=True))) if written else None


def _clean(text: str, secrets: re.Pattern[str] | None) -> str:
    if secrets is not None:
        text = secrets.sub(REDACTED, text)
    if ":/" in text:
        text = _USER_INFO.sub(_without_user_info, text)
        text = _PARAMETERS.sub(lambda url: _PARAMETER.sub(_without_value, url[0]), text)
    return _TOKENS.sub(REDACTED, text)


def _clean_tree(value: Any, secrets: re.Pattern[str] | None) -> Any:
    if isinstance(value, str):
        return _clean(value, secrets)
    if isinstance(value, Path):
        return type(value)(_clean(str(value), secrets))
    if isinstance(value, Mapping):
        return {_clean_tree(key, secrets): _clean_tree(part, secrets) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [_clean_tree(part, secrets) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    return value


def _without_user_info(found: re.Match[str]) -> str:
    """Returns the start of a URL with its credentials redacted.

    A user name without a password, such as `git@`, is kept unless the scheme is HTTP or FTP.
    """
    scheme, user = found[1], found[2]
    is_secret = ":" in user or scheme.lower().startswith(("http", "ftp"))
    return f"{scheme}{REDACTED}@" if is_secret else found[0]


def _without_value(found: re.Match[str]) -> str:
    return f"{found[1]}{found[2]}={REDACTED}" if is_secret_name(found[2]) else found[0]
