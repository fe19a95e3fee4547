"""Secrets are removed, and ordinary text is not changed."""

import json
import string
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from musicgen_eval.files.redaction import REDACTED, is_secret_name, redact, redact_rows, redact_tree, secret_values

KEY = "0123456789abcdef0123456789abcdef01234567"
ENVIRONMENT = {
    "WANDB_API_KEY": KEY,
    "HF_TOKEN": "hf_short",
    "PATH": "/usr/bin:/bin",
    "HOME": "/home/me",
    "KEYBOARD": "us-intl-",
}


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (f"W&B said: {KEY} is wrong", "W&B said: [redacted] is wrong"),
        ("https://user:pa:ss@host.example/a.mp3", "https://[redacted]@host.example/a.mp3"),
        ("https://ghp_x@host/a", "https://[redacted]@host/a"),
        ("/data/https:/user:pass@host/a.mp3", "/data/https:/[redacted]@host/a.mp3"),
        ("s3://id:secret@bucket/a.mp3", "s3://[redacted]@bucket/a.mp3"),
        ("(https://h/a.mp3?token=abc&part=2)", "(https://h/a.mp3?token=[redacted]&part=2)"),
        (
            "https://h/a?X-Amz-Credential=AB%2F1&X-Amz-Date=2026&X-Amz-Signature=0f#access_token=x",
            "https://h/a?X-Amz-Credential=[redacted]&X-Amz-Date=2026&X-Amz-Signature=[redacted]#access_token=[redacted]",
        ),
        (
            "a https://a:b@c/?sig=1 b https://d:e@f/?key=2",
            "a https://[redacted]@c/?sig=[redacted] b https://[redacted]@f/?key=[redacted]",
        ),
        ("Authorization: Bearer abcdefghijklmnop.qrs", "Authorization: Bearer [redacted]"),
        ("hf_" + "a" * 34, REDACTED),
        ("AKIAIOSFODNN7EXAMPLE", REDACTED),
    ],
)  # fmt: skip
def test_secrets_are_replaced_and_the_surrounding_text_is_kept(text, clean):
    assert redact(text, ENVIRONMENT) == clean
    assert redact(clean, ENVIRONMENT) == clean


@pytest.mark.parametrize(
    "text",
    [
        "key_of_c.mp3", "songs/token ring/secret garden.flac", "my_key=c#.wav", "what?key=c.mp3", "ssh://git@github.com/a/b",
        "https://example.org/a.mp3?part=2&rate=32000#t=10", "C:/Users/me@home/a.mp3", "me@example.org: a note", "12345678",
        "the bearer of bad news", "facebook/musicgen-small", "hf_hub", "https://example.org/@user/a.mp3",
    ],
)  # fmt: skip
def test_ordinary_text_is_not_changed(text):
    assert redact(text, ENVIRONMENT) == text


@given(st.text())
def test_text_without_urls_and_secrets_is_not_changed(text):
    clean = redact(text, {"WANDB_API_KEY": KEY})
    assert clean == text or ":/" in text


@given(st.floats() | st.integers() | st.booleans() | st.none())
def test_numbers_are_not_changed(number):
    environment = {"A_TOKEN": "12345678"}
    assert repr(redact_tree({"x": [number]}, environment)) == repr({"x": [number]})


secrets = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=8, max_size=40).filter(
    lambda value: value not in REDACTED and not value.startswith("/")
)


@given(secrets, st.text(), st.text())
def test_the_value_of_a_secret_variable_is_removed_from_any_text(secret, before, after):
    assert secret not in redact(f"{before}{secret}{after}", {"SOME_SECRET": secret}).replace(REDACTED, "")


@given(secrets)
def test_secrets_are_removed_in_their_json_and_url_forms(secret):
    environment = {"SOME_SECRET": secret}
    assert redact(json.dumps([secret]), environment) == json.dumps([REDACTED])
    assert quote(secret, safe="") not in redact(f"file {quote(secret, safe='')}", environment).replace(REDACTED, "")


word = st.text(string.ascii_letters + string.digits + "-._~%", min_size=1)


@given(word, word, word)
def test_all_credentials_in_urls_are_removed(user, password, signature):
    url = f"https://{user}:{password}@host/a.mp3?expires=5&X-Amz-Signature={signature}&part=2"
    assert redact(url, {}) == f"https://{REDACTED}@host/a.mp3?expires=5&X-Amz-Signature={REDACTED}&part=2"


def test_locations_and_short_values_are_not_secrets(tmp_path):
    environment = {
        "HF_TOKEN_PATH": "/home/me/.cache/token",
        "SSH_AUTH_SOCK": "/tmp/ssh-agent",
        "A_KEY": "short",
        "B_KEY": str(tmp_path),
        "TOKENIZERS_PARALLELISM": "false-or-true",
        "AWS_SECRET_ACCESS_KEY": "this one is",
    }
    assert secret_values(environment) == ["this one is"]


def test_secret_names_are_recognised_by_whole_words():
    assert [
        name for name in ("part", "monkey", "signal", "author", "passage", "tokens_per_s") if is_secret_name(name)
    ] == ["tokens_per_s"]
    assert all(map(is_secret_name, ("sig", "AWSAccessKeyId", "X-Goog-Signature", "authToken", "api-key", "password")))


def test_all_strings_in_trees_and_rows_are_redacted():
    tree = {"a": [KEY, {"b": (KEY, 3)}], KEY: None, "path": Path("x") / KEY}
    clean = {"a": [REDACTED, {"b": (REDACTED, 3)}], REDACTED: None, "path": Path("x") / REDACTED}
    assert redact_tree(tree, ENVIRONMENT) == clean
    assert list(redact_rows([["a", KEY, 1.5]], ENVIRONMENT)) == [["a", REDACTED, 1.5]]
