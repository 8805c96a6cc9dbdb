"""API keys, the file that names them, and the admin key."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from cluster.gateway.auth import AdminKey, ApiKeys, KeyFileError
from cluster.gateway.errors import ApiError


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def refusal(keys: ApiKeys | AdminKey, headers: dict[str, str]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        keys.tenant(headers) if isinstance(keys, ApiKeys) else keys.check(headers)
    return caught.value


def test_without_keys_everybody_is_served() -> None:
    keys = ApiKeys.load(None)
    assert not keys.required
    assert keys.tenant({}) == keys.tenant(bearer("anything")) == "default"


@pytest.mark.parametrize("form", ["yaml", "json lines", "prefixed"])
def test_tenants_from_a_file(tmp_path: Path, form: str) -> None:
    file = tmp_path / "keys"
    entries = [
        {"key_sha256": digest("sk-a"), "tenant": "alpha", "weight": 2},
        {"key_sha256": digest("sk-b").upper(), "tenant": "beta"},
        {"key_sha256": digest("sk-c")},
    ]
    if form == "json lines":
        file.write_text("\n\n".join(map(json.dumps, entries)))
    else:
        prefix = "sha256:" if form == "prefixed" else ""
        file.write_text(
            "".join(
                f"- key_sha256: '{prefix}{entry['key_sha256']}'\n"
                + (f"  tenant: {entry['tenant']}\n" if "tenant" in entry else "")
                for entry in entries
            )
        )
    keys = ApiKeys.load(file, [digest("sk-flag")])
    assert keys.required
    assert [keys.tenant(bearer(f"sk-{k}")) for k in ("a", "b", "c", "flag")] == [
        "alpha", "beta", "default", "default",
    ]  # fmt: skip
    assert keys.tenant({"authorization": "bearer  sk-a "}) == "alpha"


def test_refusals() -> None:
    keys = ApiKeys({digest("sk-a"): "alpha"})
    for headers in ({}, {"authorization": "sk-a"}, {"authorization": "Basic sk-a"}, bearer("")):
        error = refusal(keys, headers)
        assert (error.status, error.code) == (401, "missing_api_key")
    for key in ("sk-b", digest("sk-a"), "sk-a\udcff"):
        error = refusal(keys, bearer(key))
        assert (error.status, error.code) == (401, "invalid_api_key")
        assert key not in error.message


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "no API key"),
        ("[]", "no API key"),
        ("tenant: a", "not a list"),
        ("- key: sk-secret", "entry 1: expected"),
        ("- key_sha256: sk-secret", "not a SHA-256"),
        ("- sk-secret", "entry 1: expected"),
        ('{"key_sha256": "sk-secret', "neither"),
        ("- {key_sha256: [", "neither"),
        (f"- {{key_sha256: '{'0' * 64}', tenant: 3}}", "not a name"),
        (
            f"- {{key_sha256: '{'0' * 64}', tenant: a}}\n- {{key_sha256: '{'0' * 64}', tenant: b}}",
            "two tenants",
        ),
    ],
)
def test_a_bad_file_is_refused_without_quoting_keys(
    tmp_path: Path, content: str, complaint: str
) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(content)
    with pytest.raises(KeyFileError, match=complaint) as caught:
        ApiKeys.load(file)
    assert "sk-secret" not in str(caught.value)
    with pytest.raises(KeyFileError, match="cannot be read"):
        ApiKeys.load(tmp_path / "missing")


def test_admin_key() -> None:
    key = AdminKey("top")
    key.check(bearer("top"))
    for headers in ({}, bearer("to"), bearer("topp")):
        assert refusal(key, headers).status == 401
    assert refusal(AdminKey(""), bearer("")).status == 403
