"""The certificate authority of a lab, and a certificate for each of its edges.

Owns `.lab/NAME/tls`: ca.pem, which clients of the lab trust; ca.key; and EDGE.pem, certificate and key together, as the
role haproxy takes them. The authority may vouch for addresses of its lab's network alone, so that it is harmless where
somebody trusts it for longer than the lab lives.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Collection, Mapping
from pathlib import Path

from ansible.module_utils.labs import write_file
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_DAYS = 730
EDGE_DAYS = 90
RENEW_DAYS = 30


def ensure(directory: Path, lab: str, subnet: str, edges: Mapping[str, str]) -> list[str]:
    """Bring *directory* to a valid authority and certificates for *edges* (host to address); return what was made.

    What is valid for RENEW_DAYS more and fits is left alone. *subnet*: the lab's own network.
    """
    now = datetime.datetime.now(datetime.UTC)
    changes = []
    authority = _read(directory / "ca.pem", directory / "ca.key")
    if authority is None or not _lasts(authority[0], now) or _networks(authority[0]) != [subnet]:
        authority = _authority(lab, subnet, now)
        write_file(directory / "ca.key", _private(authority[1]), 0o600)
        write_file(directory / "ca.pem", _public(authority[0]))
        changes.append("certificate authority made")
    for edge, address in edges.items():
        path = directory / f"{edge}.pem"
        known = _read(path, path)
        if known is None or not _lasts(known[0], now) or not _fits(known[0], authority[0], address):
            certificate, key = _edge(edge, address, authority, now)
            write_file(path, _public(certificate) + _private(key), 0o600)
            changes.append(f"certificate for {edge} issued")
    return changes


def reissue(directory: Path, retired: Collection[str]) -> list[str]:
    """Issue another certificate for each edge that has one of *retired* (SHA-256 fingerprints, hex); return those edges."""
    now = datetime.datetime.now(datetime.UTC)
    authority = _read(directory / "ca.pem", directory / "ca.key")
    issued = []
    for path in sorted(directory.glob("*.pem")) if authority else []:
        known = _read(path, path)
        if authority is None or known is None or known[0].fingerprint(hashes.SHA256()).hex() not in retired:
            continue
        names = known[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (address,) = names.get_values_for_type(x509.IPAddress)
        certificate, key = _edge(path.stem, str(address), authority, now)
        write_file(path, _public(certificate) + _private(key), 0o600)
        issued.append(path.stem)
    return issued


Pair = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


def _read(certificate: Path, key: Path) -> Pair | None:
    try:
        found = serialization.load_pem_private_key(key.read_bytes(), None)
        pair = x509.load_pem_x509_certificate(certificate.read_bytes()), found
    except (OSError, ValueError):
        return None
    return (pair[0], found) if isinstance(found, ec.EllipticCurvePrivateKey) else None


def _lasts(certificate: x509.Certificate, now: datetime.datetime) -> bool:
    return certificate.not_valid_after_utc - now > datetime.timedelta(days=RENEW_DAYS)


def _networks(authority: x509.Certificate) -> list[str]:
    try:
        permitted = authority.extensions.get_extension_for_class(x509.NameConstraints).value.permitted_subtrees or []
    except x509.ExtensionNotFound:
        return []
    return [str(item.value) for item in permitted if isinstance(item, x509.IPAddress)]


def _fits(certificate: x509.Certificate, authority: x509.Certificate, address: str) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except Exception:  # whatever is wrong with it, a new one is issued
        return False
    return ipaddress.ip_address(address) in names.get_values_for_type(x509.IPAddress)


def _start(
    subject: str, days: int, now: datetime.datetime
) -> tuple[x509.CertificateBuilder, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=days))
    )
    return builder, key


def _usage(authority: bool) -> x509.KeyUsage:
    others = (
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(
        digital_signature=not authority, key_cert_sign=authority, crl_sign=authority, **dict.fromkeys(others, False)
    )


def _authority(lab: str, subnet: str, now: datetime.datetime) -> Pair:
    builder, key = _start(f"Atlas lab {lab}", CA_DAYS, now)
    # A kind of name that no constraint mentions would be free; .invalid is no one's.
    permitted = [x509.IPAddress(ipaddress.ip_network(subnet)), x509.DNSName("invalid")]
    builder = (
        builder.issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Atlas lab {lab}")]))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .add_extension(x509.NameConstraints(permitted, None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return builder.sign(key, hashes.SHA256()), key


def _edge(edge: str, address: str, authority: Pair, now: datetime.datetime) -> Pair:
    builder, key = _start(f"edge {edge}", EDGE_DAYS, now)
    names = [x509.IPAddress(ipaddress.ip_address(address))]
    issuer = authority[1].public_key()
    builder = (
        builder.issuer_name(authority[0].subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer), critical=False)
    )
    return builder.sign(authority[1], hashes.SHA256()), key


def _public(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _private(key: ec.EllipticCurvePrivateKey) -> str:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()).decode()
