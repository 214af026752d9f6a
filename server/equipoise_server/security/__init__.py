"""Who may call what: certificates, tokens, tenants and their quotas. The files are read again when they change."""

from equipoise_server.security.access import ALLOWED, SERVICE, Access
from equipoise_server.security.caller import Caller, caller
from equipoise_server.security.calls import CallLimits, Calls
from equipoise_server.security.certificates import CertificateError, CertificateFiles, Certificates
from equipoise_server.security.files import Reloads, is_exposed
from equipoise_server.security.quotas import StorageQuotas
from equipoise_server.security.tenants import Quotas, Tenant
from equipoise_server.security.tokens import Scope, Token, TokenFile, TokenFileError, entry, new_token

__all__ = [
    "ALLOWED",
    "SERVICE",
    "Access",
    "CallLimits",
    "Caller",
    "Calls",
    "CertificateError",
    "CertificateFiles",
    "Certificates",
    "Quotas",
    "Reloads",
    "Scope",
    "StorageQuotas",
    "Tenant",
    "Token",
    "TokenFile",
    "TokenFileError",
    "caller",
    "entry",
    "is_exposed",
    "new_token",
]
