/** How a client proves who it is, and makes sure whom it talks to. */

import { readFileSync } from "node:fs";
import { isIPv4 } from "node:net";

import { credentials, type ChannelCredentials } from "@grpc/grpc-js";

import { EquipoiseError, invalid } from "./errors.js";

/** TLS and token. Files are read again for each new connection, so they may be replaced meanwhile. */
export interface Security {
  /** Whether to encrypt; implied by each of the next three. */
  tls?: boolean;
  /** PEM file with the authorities to trust; default: those that gRPC brings. */
  rootCertificates?: string;
  /** PEM file with the certificate to show, for servers that ask for one. */
  clientCertificate?: string;
  /** PEM file with its private key. */
  clientKey?: string;
  /** The token to send. */
  token?: string;
  /** File that holds the token instead. */
  tokenFile?: string;
  /** Send the token also without TLS to another machine, where everybody on the way reads it. */
  allowPlaintextToken?: boolean;
}

const VARIABLES = {
  EQUIPOISE_ROOT_CERTIFICATES: "rootCertificates",
  EQUIPOISE_CLIENT_CERTIFICATE: "clientCertificate",
  EQUIPOISE_CLIENT_KEY: "clientKey",
  EQUIPOISE_TOKEN: "token",
  EQUIPOISE_TOKEN_FILE: "tokenFile",
} as const;

/** What the variables `EQUIPOISE_TOKEN`, `EQUIPOISE_TLS` and so on say, as the Python client reads them. */
export function securityFromEnvironment(environment = process.env): Security {
  const found: Security = {};
  for (const [variable, name] of Object.entries(VARIABLES)) {
    const value = environment[variable];
    if (value) found[name] = value;
  }
  const tls = (environment["EQUIPOISE_TLS"] ?? "").toLowerCase();
  if (!["", "0", "1", "false", "true"].includes(tls)) throw invalid("EQUIPOISE_TLS", tls, "must be true or false");
  return { ...found, tls: tls === "1" || tls === "true" };
}

/** Raises where the settings contradict each other, or the token would travel unencrypted to another machine. */
export function checkSecurity(security: Security, address: string): void {
  if (!security.clientCertificate !== !security.clientKey) {
    throw invalid("clientCertificate", security.clientCertificate, "needs clientKey, and the other way round");
  }
  const { token, tokenFile } = security;
  if (token !== undefined && tokenFile !== undefined) throw invalid("token", "…", "not together with tokenFile");
  if (token !== undefined && !PRINTABLE.test(token)) throw invalid("token", "…", "must be printable ASCII characters");
  const guarded = token !== undefined || tokenFile !== undefined;
  if (guarded && !encrypts(security) && !security.allowPlaintextToken && !isLoopback(address)) {
    throw invalid("token", "…", `would reach ${address} unencrypted; use TLS (rootCertificates, or tls)`);
  }
}

/** Credentials of a new connection. */
export function channelCredentials(security: Security): ChannelCredentials {
  if (!encrypts(security)) return credentials.createInsecure();
  const pem = (path?: string) => (path === undefined ? null : read(path));
  return credentials.createSsl(pem(security.rootCertificates), pem(security.clientKey), pem(security.clientCertificate));
}

/** The header that carries the token; undefined: there is none. */
export function authorization(security: Security): string | undefined {
  const token = security.tokenFile === undefined ? security.token : read(security.tokenFile).toString().trim();
  if (token !== undefined && !PRINTABLE.test(token)) throw new EquipoiseError(`${security.tokenFile} holds no token`);
  return token === undefined ? undefined : `Bearer ${token}`;
}

const PRINTABLE = /^[\x21-\x7e]+$/;

function encrypts(security: Security): boolean {
  return Boolean(security.tls || security.rootCertificates || security.clientCertificate);
}

function read(path: string): Buffer {
  try {
    return readFileSync(path);
  } catch (error) {
    throw new EquipoiseError(`${path}: ${(error as Error).message}`);
  }
}

function isLoopback(address: string): boolean {
  const target = address.split("///").at(-1) ?? "";
  const host = target.slice(0, target.lastIndexOf(":")).replace(/^\[|\]$/g, "");
  return target.startsWith("unix:") || ["localhost", "::1"].includes(host) || (isIPv4(host) && host.startsWith("127."));
}
