// The protocol's reference server, as its README starts it: node server.mjs PORT [DATA-DIRECTORY]
import { DurableStreamTestServer } from "@durable-streams/server";

const [port, dataDir] = process.argv.slice(2);
const server = new DurableStreamTestServer({ port: Number(port), host: "127.0.0.1", ...(dataDir && { dataDir }) });
await server.start();
process.on("SIGTERM", () => process.exit(0));
