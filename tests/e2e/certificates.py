"""Authorities and certificates for tests: made at run time, valid for an hour unless a test wants otherwise."""

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

HOUR = datetime.timedelta(hours=1)
DAY = datetime.timedelta(days=1)


def name(common):
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def subject_names(names):
    def one(text):
        try:
            return x509.IPAddress(ipaddress.ip_address(text))
        except ValueError:
            return x509.DNSName(text)

    return x509.SubjectAlternativeName([one(text) for text in names])


@dataclass
class Issued:
    """A certificate in two files, and what is in it."""

    certificate: Path
    key: Path
    serial: int
    # Seconds since 1970.
    not_after: int

    def flags(self):
        return ["--tls-cert", self.certificate, "--tls-key", self.key]


class Authority:
    """Issues certificates into a folder; its own is `ca`."""

    def __init__(self, folder, common="an authority of tests"):
        self.folder, self.common = Path(folder), common
        self.key = ec.generate_private_key(ec.SECP256R1())
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        now = datetime.datetime.now(datetime.UTC)
        builder = self._builder(common, common, self.key, now - DAY, now + DAY)
        builder = builder.add_extension(x509.BasicConstraints(True, None), True).add_extension(usage, True)
        self.ca = self._write(f"{common.replace(' ', '-')}.pem", builder.sign(self.key, hashes.SHA256()))

    def _builder(self, subject, issuer, key, begin, end):
        builder = x509.CertificateBuilder().subject_name(name(subject)).issuer_name(name(issuer))
        builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
        return builder.not_valid_before(begin).not_valid_after(end)

    def _write(self, file, certificate):
        path = self.folder / file
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return path

    def issue(self, *names, file=None, begin=-HOUR, end=HOUR, client=False, kind="ec", signer=None):
        """A certificate for these names, from `begin` to `end` from now, in FILE.pem and FILE.key."""
        file = file or names[0].replace("*", "any")
        key = ec.generate_private_key(ec.SECP256R1()) if kind == "ec" else rsa.generate_private_key(65537, 2048)
        now = datetime.datetime.now(datetime.UTC)
        issuer = names[0] if signer == "self" else self.common
        builder = self._builder(names[0], issuer, key, now + begin, now + end)
        usage = ExtendedKeyUsageOID.CLIENT_AUTH if client else ExtendedKeyUsageOID.SERVER_AUTH
        builder = builder.add_extension(subject_names(names), False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), False)
        builder = builder.add_extension(x509.BasicConstraints(False, None), True)
        certificate = builder.sign(key if signer == "self" else self.key, hashes.SHA256())
        key_path = self.folder / f"{file}.key"
        form = serialization.PrivateFormat.PKCS8
        plain = serialization.NoEncryption()
        key_path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, plain))
        path = self._write(f"{file}.pem", certificate)
        return Issued(path, key_path, certificate.serial_number, int((now + end).timestamp()))
