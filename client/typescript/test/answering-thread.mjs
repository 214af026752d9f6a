// A scripted server in a thread of its own.
import { parentPort } from "node:worker_threads";

import { ScriptedServer } from "./scripted-server.mjs";

parentPort.postMessage((await ScriptedServer.start()).address);
