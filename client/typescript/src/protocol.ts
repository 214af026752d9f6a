/** The contract: its messages and calls, from the .proto files that travel with the package. */

import { join } from "node:path";
import { fileURLToPath } from "node:url";

import protobuf from "protobufjs";

const FOLDER = fileURLToPath(new URL("./proto/", import.meta.url));
const PACKAGE = "equipoise.v1";

const root = new protobuf.Root();
root.resolvePath = (_, target) => (target.startsWith("google/protobuf/") ? target : join(FOLDER, target));
root.loadSync(["equipoise/v1/policy.proto", "google/rpc/error_details.proto"]);

/** A step or read; arrays are little-endian bytes. */
export interface StepRequest {
  sequence: number;
  step?: string;
  exampleIds?: Uint8Array;
  allExamples?: boolean;
  contributions?: Uint8Array;
  losses?: Uint8Array;
  referenceLosses?: Uint8Array;
  scored?: Uint8Array;
  measured?: Uint8Array;
  groups?: Uint8Array;
  successes?: Uint8Array;
  attempts?: Uint8Array;
  targetLosses?: Uint8Array;
  targetGroups?: Uint8Array;
  targetLoss?: number;
  guardLoss?: number;
  gradientSketches?: Uint8Array;
  targetSketch?: Uint8Array;
  sketchType?: string;
  weightsFor?: Uint8Array;
  omitWeights?: boolean;
}

export type ExchangeRequest =
  | { open: { policy: string; trainerId: string; uid: string; clientId: string; attempt: number } }
  | { step: StepRequest };

export interface OpenResponse {
  uid: string;
  epoch: number;
  version: number;
  lastSequence: number;
  durableSequence: number;
  numExamples: number;
  maxBatchExamples: number;
  maxMessageBytes: number;
}

export interface StepResponse {
  sequence: number;
  epoch: number;
  version: number;
  durableSequence: number;
  outcome: string;
  weights: Uint8Array;
  error: RpcStatus | null;
}

export interface ExchangeResponse {
  opened?: OpenResponse;
  step?: StepResponse;
  reconnect?: { withinMs: number };
}

export interface RpcStatus {
  code: number;
  message: string;
  details: { type_url?: string; typeUrl?: string; value: Uint8Array }[];
}

/** A policy as it stands; see `PolicyStatus` in policy.proto. Numbers are exact up to 2^53. */
export interface PolicyStatus {
  uid: string;
  epoch: number;
  version: number;
  durableVersion: number;
  scoredExamples: number;
  effectiveExamples: number;
  guardStrength: number;
  guardTrialsWon: number;
  guardTrialsLost: number;
  [field: string]: unknown;
}

/** What gRPC needs to make one kind of call. */
export interface Method<Request, Response> {
  path: string;
  serialize: (request: Request) => Buffer;
  deserialize: (data: Buffer) => Response;
}

function method<Request extends object, Response>(name: string): Method<Request, Response> {
  const request = root.lookupType(`${PACKAGE}.${name}Request`);
  const response = root.lookupType(`${PACKAGE}.${name}Response`);
  return {
    path: `/${PACKAGE}.PolicyService/${name}`,
    serialize: (message) => Buffer.from(request.encode(request.fromObject(message)).finish()),
    deserialize: (data) => plain(response, data) as Response,
  };
}

function plain(type: protobuf.Type, data: Uint8Array): unknown {
  return type.toObject(type.decode(data), { longs: Number, enums: String, defaults: true, oneofs: true });
}

export const Exchange = method<ExchangeRequest, ExchangeResponse>("Exchange");
export const CreatePolicy = method<{ policy: object }, { status: PolicyStatus; created: boolean }>("CreatePolicy");
export const GetPolicy = method<{ policy: string }, { status: PolicyStatus }>("GetPolicy");
export const ReadWeights = method<
  { policy: string; field: string; exampleIds?: Uint8Array; firstRow?: number; numRows?: number },
  { offset: number; values: Uint8Array }
>("ReadWeights");

/** A serialised google.rpc.Status, as in the metadata `grpc-status-details-bin`. */
export function decodeStatus(data: Uint8Array): RpcStatus {
  return plain(root.lookupType("google.rpc.Status"), data) as RpcStatus;
}

/** The first detail of a type in a status. */
export function decodeDetail(status: RpcStatus, type: string): Record<string, any> | undefined {
  const found = status.details.find((detail) => (detail.typeUrl ?? detail.type_url ?? "").endsWith(`/${type}`));
  return found && (plain(root.lookupType(type), found.value) as Record<string, any>);
}
