// The contract travels with the package: it is read when the package is loaded, and no code is generated from it.
import { cpSync } from "node:fs";

for (const folder of ["equipoise", "google"]) {
  const [from, to] = [`../../proto/${folder}`, `dist/proto/${folder}`].map((path) => new URL(path, import.meta.url));
  cpSync(from, to, { recursive: true });
}
