export { PolicyClient } from "./client.js";
export {
  EquipoiseError,
  InvalidRequestError,
  StateLostError,
  StepRefusedError,
  UnavailableError,
  type ErrorDetails,
} from "./errors.js";
export type { Backoff, Limits, Options, Timeouts } from "./options.js";
export type { PolicyStatus } from "./protocol.js";
export type { Ids, Numbers, Rows, StepFields } from "./request.js";
export type { Security } from "./security.js";
export type { Stats } from "./session.js";
export type { Outcome, Source, StepResult } from "./window.js";
