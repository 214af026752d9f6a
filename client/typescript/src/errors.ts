/** Errors of the client, and the only mapping from gRPC's to ours. */

import { type ServiceError, status as Code } from "@grpc/grpc-js";

import { decodeDetail, decodeStatus, type RpcStatus } from "./protocol.js";

/** What is known of an error beside its message. */
export interface ErrorDetails {
  /** gRPC status code; UNKNOWN where the client itself raised. */
  code?: Code;
  /** The server's UPPER_SNAKE reason (ErrorInfo), such as `LOADING`; empty: not given. */
  reason?: string;
  /** Further details by name, as the server gave them. */
  metadata?: Record<string, string>;
  /** How long the server asks to wait before a retry, ms; 0: not given. */
  retryAfterMs?: number;
  /** The field of the request that is at fault (BadRequest), such as `contributions`; empty: no single one. */
  field?: string;
}

/** Base of every error of this package. */
export class EquipoiseError extends Error {
  readonly code: Code;
  readonly reason: string;
  readonly metadata: Readonly<Record<string, string>>;
  readonly retryAfterMs: number;

  constructor(message: string, details: ErrorDetails = {}) {
    super(message);
    this.name = new.target.name;
    this.code = details.code ?? Code.UNKNOWN;
    this.reason = details.reason ?? "";
    this.metadata = details.metadata ?? {};
    this.retryAfterMs = details.retryAfterMs ?? 0;
  }
}

/** The caller's input breaks a rule; the message names field, value and rule. */
export class InvalidRequestError extends EquipoiseError {
  /** The argument or field at fault, such as `contributions`; empty where no single one is. */
  readonly field: string;

  constructor(message: string, details: ErrorDetails = {}) {
    super(message, { code: Code.INVALID_ARGUMENT, ...details });
    this.field = details.field ?? "";
  }
}

/** The server refused a step; it consumed its sequence and changed nothing else. The stream goes on. */
export class StepRefusedError extends InvalidRequestError {
  /** Sequence of the refused step; 0: a read. */
  sequence = 0;
}

/** The server cannot be reached or cannot answer now; a retry may succeed. */
export class UnavailableError extends EquipoiseError {}

/** What the server holds does not go together with what this trainer has seen. */
export class StateLostError extends EquipoiseError {}

/** Refuses an argument. */
export function invalid(field: string, value: unknown, rule: string): InvalidRequestError {
  const text = String(value);
  const shortened = text.length <= 100 ? text : `${text.slice(0, 50)} … ${text.slice(-50)}`;
  return new InvalidRequestError(`${field} = ${shortened}: ${rule}`, { field });
}

/** The error for a failed RPC; its message names the server's address. */
export function fromRpc(failure: ServiceError, address: string): EquipoiseError {
  const [packed] = failure.metadata?.get("grpc-status-details-bin") ?? [];
  const status = packed instanceof Buffer ? decodeStatus(packed) : { code: failure.code, message: "", details: [] };
  const text = status.message || failure.details || failure.message;
  const details = { ...detailsOf(status), code: failure.code };
  const message = `${address}: ${text}`;
  if (failure.code === Code.INVALID_ARGUMENT) return new InvalidRequestError(message, details);
  return RETRIED.has(failure.code) ? new UnavailableError(message, details) : new EquipoiseError(message, details);
}

/** The error for a step that was answered REFUSED. */
export function fromRefusal(status: RpcStatus | null, sequence: number): StepRefusedError {
  const found = status ?? { code: Code.UNKNOWN, message: "refused", details: [] };
  const error = new StepRefusedError(found.message, { ...detailsOf(found), code: found.code });
  error.sequence = sequence;
  return error;
}

const RETRIED = new Set([
  Code.ABORTED, // FENCED
  Code.CANCELLED, // a proxy that goes down; our own cancellation never gets here
  Code.DEADLINE_EXCEEDED,
  Code.INTERNAL, // a connection that broke in the middle of a message, or a bug, after which the server loads anew
  Code.RESOURCE_EXHAUSTED,
  Code.UNAVAILABLE,
  Code.UNKNOWN,
]);

/** Codes of what no retry mends until somebody does something about it. */
const PERMANENT = new Set([
  Code.ALREADY_EXISTS,
  Code.DATA_LOSS,
  Code.NOT_FOUND,
  Code.PERMISSION_DENIED,
  Code.UNAUTHENTICATED,
  Code.UNIMPLEMENTED,
]);
const QUOTAS = new Set(["QUOTA_EXAMPLES", "QUOTA_POLICIES", "TOO_MANY_TRAINERS"]);

/** Whether an error ends a client for good. `mayBeMended`: training goes on, and an operator may mend it meanwhile. */
export function isFinal(error: EquipoiseError, { mayBeMended }: { mayBeMended: boolean }): boolean {
  if (error.reason === "TRAINER_REPLACED" || error instanceof InvalidRequestError) return true;
  const permanent = PERMANENT.has(error.code) || QUOTAS.has(error.reason) || error.reason === "UID_MISMATCH";
  return (permanent || error instanceof StateLostError) && !mayBeMended;
}

function detailsOf(status: RpcStatus): ErrorDetails {
  const info = decodeDetail(status, "google.rpc.ErrorInfo");
  const delay = decodeDetail(status, "google.rpc.RetryInfo")?.["retryDelay"];
  return {
    reason: info?.["reason"] ?? "",
    metadata: info?.["metadata"] ?? {},
    field: decodeDetail(status, "google.rpc.BadRequest")?.["fieldViolations"][0]?.field ?? "",
    retryAfterMs: delay ? delay.seconds * 1000 + delay.nanos / 1e6 : 0,
  };
}
