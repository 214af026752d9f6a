/** Steps and reads as messages: arrays become little-endian bytes, checked before anything is sent. */

import { endianness } from "node:os";

import { invalid, type InvalidRequestError } from "./errors.js";
import type { StepRequest } from "./protocol.js";

if (endianness() !== "LE") throw new Error("equipoise-client needs a little-endian machine");

/** Example ids: integers in [0, N); `BigUint64Array`, any other typed array of integers, or a plain array. */
export type Ids = ArrayLike<number> | ArrayLike<bigint>;
/** Real numbers: `Float32Array`, any other typed array, or a plain array. They travel as float32. */
export type Numbers = ArrayLike<number>;

/** What a step may carry beside the ids of its B rows. */
export interface StepFields {
  /** [B]: ∇L_target·∇l_n of the unweighted example loss, finite where scored. */
  contributions?: Numbers;
  /** [B]: unweighted example loss, nats, finite where scored. */
  losses?: Numbers;
  /** [B]: loss of a reference model, nats, finite where scored; for rules `rho` and `excess_loss`. */
  referenceLosses?: Numbers;
  /**
   * Row-major [B, k]: instead of contributions, a sketch of each example's gradient; the server multiplies it with
   * `targetSketch`. Finite where scored. A Uint16Array, in both, holds the bits of IEEE 754 binary16 values.
   */
  gradientSketches?: Numbers;
  /** [k]: the same sketch of the target gradient ∇L_target. */
  targetSketch?: Numbers;
  /** [B]: rows that are false or 0 are ignored and may hold NaN; default: all are scored. */
  scored?: ArrayLike<boolean | number>;
  /** [B]: rows that are false or 0 have no contribution, which may be NaN; their losses count. Default: all have one. */
  measured?: ArrayLike<boolean | number>;
  /** [B]: integers in [0, 2^32): the group of each row's example, such as its label or source; for rule `strata`. */
  groups?: ArrayLike<number>;
  /** [B]: integers, where scored at most `attempts`: how many attempts succeeded; for rule `learnability`. */
  successes?: ArrayLike<number>;
  /** [B]: integers in [0, 2^32), where scored at least 1: attempts at each row's example. Needs `successes`. */
  attempts?: ArrayLike<number>;
  /** [A]: losses of single examples of the target set A, nats; for rule `strata`, beside `losses`. */
  targetLosses?: Numbers;
  /** [A]: integers in [0, 2^32): their groups; without, every group is compared with all. */
  targetGroups?: ArrayLike<number>;
  /** Mean loss on the target set A, nats. */
  targetLoss?: number;
  /** Mean loss on the guard set B, nats. */
  guardLoss?: number;
  /** The training step; informational. For rule `trajectory` the row that the contributions move. */
  step?: number | bigint;
  /** Ids whose weights the answer holds, instead of those of the rows. */
  weightsFor?: Ids;
  /** The answer holds no weights. */
  omitWeights?: boolean;
}

/** The examples of a request's rows: ids; "all" of the policy, in order; null: no rows. */
export type Rows = Ids | "all" | null;

/** What a request must keep to, as far as it is known; 0: not known. */
export interface Bounds {
  numExamples: number;
  maxBatchExamples: number;
  maxMessageBytes: number;
}

/** A checked step or read. */
export interface Request {
  message: StepRequest;
  /** Examples whose weights the answer holds. */
  answerIds: Float64Array;
  /** Whether it carries no statistics. */
  reads: boolean;
  /** Whether it asks for a row of a trajectory, which says nothing about the weights of other rows. */
  ofRow: boolean;
  /** Largest size of the message on the wire. */
  bytes: number;
}

/** A message's fields that are no arrays, and its framing, take less than this. */
const FRAME_BYTES = 256;
const ROW_STATISTICS = ["contributions", "losses", "referenceLosses"] as const;
const LOSSES = ["targetLoss", "guardLoss"] as const;

/** A step with statistics. Raises InvalidRequestError. */
export function buildStep(ids: Rows, fields: StepFields, bounds: Bounds): Request {
  const message: StepRequest = { sequence: 0 };
  let rows = setRows(message, ids, bounds, fields.contributions ?? fields.losses ?? fields.successes);
  if (fields.step !== undefined) message.step = trainingStep(fields.step);
  if (fields.scored !== undefined) message.scored = flags("scored", fields.scored, rows.length);
  if (fields.measured !== undefined) message.measured = flags("measured", fields.measured, rows.length);
  if (message.measured && fields.contributions === undefined && fields.gradientSketches === undefined) {
    throw invalid("measured", undefined, "needs contributions or gradientSketches");
  }
  const isScored = (row: number) => message.scored?.[row] !== 0;
  const isMeasured = (row: number) => isScored(row) && message.measured?.[row] !== 0;
  for (const name of ROW_STATISTICS) {
    const values = fields[name];
    const counts = name === "contributions" ? isMeasured : isScored;
    if (values !== undefined) message[name] = floats(name, values, rows.length, counts);
  }
  setSketches(message, fields, rows.length, isMeasured);
  if (fields.groups !== undefined) message.groups = countBytes("groups", fields.groups, rows.length);
  setOutcomes(message, fields, rows.length, isScored);
  setTarget(message, fields, rows.length);
  for (const name of LOSSES) {
    const loss = fields[name];
    if (loss === undefined) continue;
    if (!Number.isFinite(loss)) throw invalid(name, loss, "must be finite");
    message[name] = loss;
  }
  const statistics = [...ROW_STATISTICS, "successes", "gradientSketches", ...LOSSES] as const;
  if (statistics.every((name) => message[name] === undefined)) {
    throw invalid("contributions", undefined, `a step needs one of ${statistics.join(", ")}; read() needs none`);
  }
  if (fields.weightsFor !== undefined) {
    const [bytes, numbers] = idBytes("weightsFor", fields.weightsFor, bounds);
    message.weightsFor = bytes;
    rows = numbers;
  }
  if (fields.omitWeights) {
    message.omitWeights = true;
    rows = new Float64Array(0);
  }
  return sized({ message, answerIds: rows, reads: false, ofRow: false, bytes: 0 }, bounds);
}

/** A read of the weights of ids; with a step, in that row of a trajectory. Raises InvalidRequestError. */
export function buildRead(ids: Rows, bounds: Bounds, step?: number | bigint): Request {
  const message: StepRequest = { sequence: 0 };
  const rows = setRows(message, ids, bounds);
  if (step !== undefined) message.step = trainingStep(step);
  return sized({ message, answerIds: rows, reads: true, ofRow: step !== undefined, bytes: 0 }, bounds);
}

/** What is wrong with a request that is too large for the server; undefined: it is not. */
export function oversize(request: Request, bounds: Bounds): InvalidRequestError | undefined {
  const { maxBatchExamples, maxMessageBytes } = bounds;
  if (request.bytes > maxMessageBytes) {
    return invalid("ids", `a message of ${request.bytes} bytes`, `the server takes at most ${maxMessageBytes}`);
  }
  const rows = Math.max((request.message.exampleIds?.length ?? 0) / 8, request.answerIds.length);
  if (maxBatchExamples && rows > maxBatchExamples) {
    return invalid("ids", `${rows} rows`, `the server takes at most ${maxBatchExamples} in one step`);
  }
  return undefined;
}

/** Ids as uint64 bytes, and as numbers. Raises InvalidRequestError. */
export function idBytes(field: string, ids: Ids, bounds: Bounds): [Uint8Array, Float64Array] {
  if (!ids.length) throw invalid(field, "[]", "must hold at least one id");
  const words = new Uint32Array(2 * ids.length);
  const long = new BigUint64Array(words.buffer);
  const numbers = new Float64Array(ids.length);
  const below = bounds.numExamples || Infinity;
  for (let row = 0; row < ids.length; row++) {
    const id = ids[row]!;
    const fine = typeof id === "bigint" ? id < 1n << 64n : Number.isSafeInteger(id);
    if (!fine || id < 0 || id >= below) {
      throw invalid(`${field}[${row}]`, id, `ids must be integers from 0 to below numExamples = ${below}`);
    }
    if (typeof id === "bigint") long[row] = id;
    else {
      words[2 * row] = id % 2 ** 32;
      words[2 * row + 1] = id / 2 ** 32;
    }
    numbers[row] = Number(id);
  }
  return [new Uint8Array(words.buffer), numbers];
}

/** float32 values of bytes from the wire, in an array of their own. */
export function float32s(bytes: Uint8Array): Float32Array {
  return new Float32Array(new Uint8Array(bytes).buffer); // copied: it may begin anywhere in a larger buffer
}

function setRows(message: StepRequest, ids: Rows, bounds: Bounds, like?: Numbers): Float64Array {
  if (ids === null) return new Float64Array(0);
  if (ids !== "all") {
    const [bytes, numbers] = idBytes("ids", ids, bounds);
    message.exampleIds = bytes;
    return numbers;
  }
  message.allExamples = true;
  const count = bounds.numExamples || like?.length;
  if (!count) throw invalid("ids", "all", "needs numExamples, before the first connection");
  return Float64Array.from({ length: count }, (_, id) => id);
}

function setSketches(message: StepRequest, fields: StepFields, rows: number, isScored: (row: number) => boolean): void {
  const { gradientSketches: sketches, targetSketch: target } = fields;
  if (sketches === undefined && target === undefined) return;
  const k = target?.length;
  if (!sketches || !k) throw invalid("targetSketch", target, "must be given with gradientSketches, and not be empty");
  if (fields.contributions) throw invalid("gradientSketches", "…", "not together with contributions");
  const half = sketches instanceof Uint16Array && target instanceof Uint16Array;
  message.sketchType = half ? "SKETCH_TYPE_FLOAT16" : "SKETCH_TYPE_FLOAT32";
  const pack = half ? halves : floats;
  message.gradientSketches = pack("gradientSketches", sketches, rows * k, (place) => isScored(Math.floor(place / k)));
  message.targetSketch = pack("targetSketch", target, k, () => true);
}

function halves(field: string, values: Numbers, length: number, isScored: (row: number) => boolean): Uint8Array {
  checkLength(field, values, length);
  const bits = Uint16Array.from(values);
  const bad = bits.findIndex((value, row) => (value & 0x7c00) === 0x7c00 && isScored(row));
  if (bad >= 0) throw invalid(`${field}[${bad}]`, "infinite or NaN", "must be finite where scored");
  return new Uint8Array(bits.buffer);
}

function floats(field: string, values: Numbers, length: number, isScored: (row: number) => boolean): Uint8Array {
  checkLength(field, values, length);
  const single = Float32Array.from(values);
  const bad = single.findIndex((value, row) => !Number.isFinite(value) && isScored(row));
  if (bad >= 0) throw invalid(`${field}[${bad}]`, values[bad], "must be finite as float32 where scored");
  return new Uint8Array(single.buffer);
}

function flags(field: string, values: ArrayLike<boolean | number>, length: number): Uint8Array {
  checkLength(field, values, length);
  return Uint8Array.from(values, (value, row) => {
    if (value !== true && value !== false && value !== 0 && value !== 1) {
      throw invalid(`${field}[${row}]`, value, "must be boolean, 0 or 1");
    }
    return Number(value);
  });
}

function setOutcomes(message: StepRequest, fields: StepFields, rows: number, isScored: (row: number) => boolean): void {
  const { successes, attempts } = fields;
  if (successes === undefined && attempts === undefined) return;
  if (!successes) throw invalid("successes", undefined, "must be given with attempts");
  if (!attempts) throw invalid("attempts", undefined, "must be given with successes");
  message.successes = countBytes("successes", successes, rows);
  message.attempts = countBytes("attempts", attempts, rows);
  for (let row = 0; row < rows; row++) {
    if (!isScored(row)) continue;
    if (attempts[row]! < 1) throw invalid(`attempts[${row}]`, attempts[row], "must be at least 1 where scored");
    if (successes[row]! > attempts[row]!) {
      throw invalid(`successes[${row}]`, successes[row], `must be at most the row's ${attempts[row]} attempts`);
    }
  }
}

function setTarget(message: StepRequest, fields: StepFields, rows: number): void {
  const { targetLosses, targetGroups } = fields;
  if (targetLosses === undefined) {
    if (targetGroups !== undefined) throw invalid("targetGroups", undefined, "needs targetLosses");
    return;
  }
  if (!rows || fields.losses === undefined) {
    throw invalid("targetLosses", undefined, "needs losses of the rows, to be compared with");
  }
  message.targetLosses = floats("targetLosses", targetLosses, targetLosses.length, () => true);
  if (targetGroups !== undefined) {
    message.targetGroups = countBytes("targetGroups", targetGroups, targetLosses.length);
  }
}

function countBytes(field: string, values: ArrayLike<number>, length: number): Uint8Array {
  checkLength(field, values, length);
  const counts = Uint32Array.from(values, (value, row) => {
    if (!Number.isInteger(value) || value < 0 || value >= 2 ** 32) {
      throw invalid(`${field}[${row}]`, value, "must be an integer in [0, 2^32)");
    }
    return value;
  });
  return new Uint8Array(counts.buffer);
}

function checkLength(field: string, values: ArrayLike<unknown>, length: number): void {
  if (values.length !== length) throw invalid(field, `length ${values.length}`, `must have ${length} values`);
}

function trainingStep(step: number | bigint): string {
  const fine = typeof step === "bigint" ? step >= 0n && step < 1n << 64n : Number.isSafeInteger(step) && step >= 0;
  if (!fine) throw invalid("step", step, "must be an integer from 0 to 2^64 - 1");
  return String(step);
}

function sized(request: Request, bounds: Bounds): Request {
  const arrays = Object.values(request.message).filter((value) => value instanceof Uint8Array);
  request.bytes = arrays.reduce((sum, array) => sum + array.length, FRAME_BYTES);
  const error = oversize(request, bounds);
  if (error) throw error;
  return request;
}
