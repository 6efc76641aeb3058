// Reads ../asyncapi.yaml with the official parser. Every finding, a warning too,
// ends it with 1: a description with loose ends helps nobody.
import { fileURLToPath } from 'node:url';
import { Parser, fromFile } from '@asyncapi/parser';

const path = fileURLToPath(new URL('../asyncapi.yaml', import.meta.url));
const severity = ['error', 'warning', 'information', 'hint'];

// Tools read 3.0.0 widely; that there is a newer version is no fault.
const ignored = new Set(['asyncapi-latest-version']);

const { document, diagnostics } = await fromFile(new Parser(), path).parse();
const found = diagnostics.filter((d) => !ignored.has(d.code));
for (const d of found) {
  console.error(`asyncapi.yaml:${d.range.start.line + 1}: ${severity[d.severity]}: ${d.message} (${d.path.join('/')})`);
}
if (!document || found.length > 0) {
  process.exit(1);
}
const count = (collection) => collection.all().length;
console.log(`asyncapi.yaml: ${count(document.channels())} channels, ${count(document.operations())} operations, ${count(document.messages())} messages: valid`);
