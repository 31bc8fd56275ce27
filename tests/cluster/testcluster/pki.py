"""Keys and certificates of one cluster, made with openssl in well under a second.

Knows which names a certificate bears, not who reads it. The certificates satisfy the strict checks that Python 3.13
makes by default: key usages and authority key identifiers.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
DAYS = "30"


class CertificateError(RuntimeError):
    """openssl failed; the message holds its words."""


@dataclass(frozen=True)
class Keys:
    """The files that `create` wrote into one folder."""

    folder: Path

    @property
    def authority(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def authority_key(self) -> Path:
        return self.folder / "ca.key"

    @property
    def service_accounts(self) -> Path:
        """The private key that signs service account tokens; its public half is read from it."""
        return self.folder / "service-accounts.key"

    def certificate(self, name: str) -> Path:
        return self.folder / f"{name}.crt"

    def key(self, name: str) -> Path:
        return self.folder / f"{name}.key"


def create(folder: Path, server_names: Iterable[str]) -> Keys:
    """An authority, the API server's certificate for ``server_names`` and its own as a client of kubelets.

    Raises:
        CertificateError: openssl failed.
    """
    keys = Keys(folder)
    usage = ("-addext", "keyUsage=critical,keyCertSign,cRLSign,digitalSignature")
    _openssl("req", "-x509", *NEW_KEY, *_files(keys, "ca"), "-subj", "/CN=test-cluster", *usage)
    _sign(keys, "apiserver", "/CN=kube-apiserver", "serverAuth", f"subjectAltName={','.join(server_names)}")
    _sign(keys, "kubelet-client", "/O=system:masters/CN=kube-apiserver", "clientAuth")
    _openssl("genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", str(keys.service_accounts))
    return keys


def _sign(keys: Keys, name: str, subject: str, use: str, *extensions: str) -> None:
    wanted = (
        "basicConstraints=critical,CA:FALSE",
        "keyUsage=critical,digitalSignature",
        f"extendedKeyUsage={use}",
        *extensions,
    )
    added = [part for extension in wanted for part in ("-addext", extension)]
    signer = ("-CA", str(keys.authority), "-CAkey", str(keys.authority_key))
    _openssl("req", "-x509", *NEW_KEY, *_files(keys, name), "-subj", subject, *signer, *added)


def _files(keys: Keys, name: str) -> tuple[str, ...]:
    return ("-days", DAYS, "-keyout", str(keys.key(name)), "-out", str(keys.certificate(name)))


def _openssl(*arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CertificateError(f"`openssl {' '.join(arguments)}` failed: {done.stderr[-1000:]}")
