// Reads a list of custom resources as JSON from standard input, and prints what is wrong with each, as a list of lists.
// The compiler finds fields that there are not; the validators find what is missing, out of range or against a pattern.
import { text } from "node:stream/consumers";
import ts from "typescript";

const PACKAGES = {
  "cert-manager.io": "cert-manager",
  "gateway.envoyproxy.io": "envoy-gateway",
  "gateway.networking.k8s.io": "gateway-api",
  "keda.sh": "keda",
  "monitoring.coreos.com": "prometheus-operator",
  "networking.istio.io": "istio",
};

function model(resource) {
  const [group] = resource.apiVersion.split("/");
  return `@kubernetes-models/${PACKAGES[group]}/${resource.apiVersion}/${resource.kind}`;
}

function misspelt(resource) {
  const name = new URL("resource.ts", import.meta.url).pathname;
  const code = `import type { I${resource.kind} } from "${model(resource)}";
export const resource: I${resource.kind} = ${JSON.stringify(resource)};`;
  const options = {
    module: ts.ModuleKind.NodeNext,
    moduleResolution: ts.ModuleResolutionKind.NodeNext,
    target: ts.ScriptTarget.ES2022,
    strict: true,
    noEmit: true,
    skipLibCheck: true,
  };
  const host = ts.createCompilerHost(options);
  const onDisk = host.getSourceFile;
  host.getSourceFile = (file, ...rest) =>
    file === name ? ts.createSourceFile(file, code, ts.ScriptTarget.ES2022) : onDisk(file, ...rest);
  const found = ts.getPreEmitDiagnostics(ts.createProgram([name], options, host));
  return found.map((each) => ts.flattenDiagnosticMessageText(each.messageText, " "));
}

async function invalid(resource) {
  const models = await import(model(resource));
  try {
    new models[resource.kind](resource).validate();
    return [];
  } catch (error) {
    return [error.message];
  }
}

const answers = [];
for (const resource of JSON.parse(await text(process.stdin))) {
  answers.push([...misspelt(resource), ...(await invalid(resource))]);
}
console.log(JSON.stringify(answers));
