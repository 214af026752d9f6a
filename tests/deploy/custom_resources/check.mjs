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

// All of them in one program, which reads the language's own declarations once.
function misspelt(resources) {
  const names = resources.map((_, index) => new URL(`resource-${index}.ts`, import.meta.url).pathname);
  const codes = new Map(
    resources.map((resource, index) => [
      names[index],
      `import type { I${resource.kind} } from "${model(resource)}";
export const resource: I${resource.kind} = ${JSON.stringify(resource)};`,
    ]),
  );
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
    codes.has(file) ? ts.createSourceFile(file, codes.get(file), ts.ScriptTarget.ES2022) : onDisk(file, ...rest);
  const program = ts.createProgram(names, options, host);
  return names.map((name) =>
    ts
      .getPreEmitDiagnostics(program, program.getSourceFile(name))
      .map((each) => ts.flattenDiagnosticMessageText(each.messageText, " ")),
  );
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

const resources = JSON.parse(await text(process.stdin));
const found = misspelt(resources);
const answers = [];
for (const [index, resource] of resources.entries()) {
  answers.push([...found[index], ...(await invalid(resource))]);
}
console.log(JSON.stringify(answers));
