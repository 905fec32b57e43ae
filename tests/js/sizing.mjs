// Evaluates expressions with the functions of docs/javascripts/sizing.js, as the page of sizing does.
// Usage: node sizing.mjs FIGURES EXPRESSION…; prints a JSON list of the values
import { readFileSync } from "node:fs";
import { runInThisContext } from "node:vm";

runInThisContext(readFileSync(new URL("../../docs/javascripts/sizing.js", import.meta.url), "utf8"));
globalThis.measured = JSON.parse(process.argv[2]);
console.log(JSON.stringify(process.argv.slice(3).map((expression) => runInThisContext(expression))));
